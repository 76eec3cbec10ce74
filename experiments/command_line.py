"""What the scripts share: mistakes of the user end in a message and exit code 2."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator


def replaced[Config](config: Config, **changes) -> Config:
    """The dataclass with `changes` in place of its own fields, but for those that are None."""
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def check_text(name: str, text: str) -> None:
    """Raises a ValueError that names the argument if its text has bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be UTF-8, got {text!r}") from error


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors into one line: those that a user can mend (bad settings, files, checkpoints) with exit code 2, a
    training that diverged with exit code 1, Ctrl-C with 130; whoever stops reading the output ends it quietly."""
    try:
        yield
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as interrupt:
        raise SystemExit(130) from interrupt
    except BrokenPipeError as closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left unwritten goes nowhere
        raise SystemExit(141) from closed
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
