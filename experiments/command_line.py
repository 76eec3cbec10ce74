"""What the scripts share: mistakes of the user end in a message and exit code 2."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator

import jax


def replaced[Config](config: Config, **changes) -> Config:
    """The dataclass with `changes` in place of its own fields, but for those that are None."""
    return dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had no memory left."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def check_text(name: str, text: str) -> None:
    """Raises a ValueError that names the argument if its text has bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be UTF-8, got {text!r}") from error


@contextlib.contextmanager
def user_errors(*, less_memory: str | None = None) -> Iterator[None]:
    """Turns errors into a message: those that a user can mend (bad settings, files, checkpoints) with exit code 2, a
    training that diverged and a device whose memory does not suffice, where `less_memory` says what takes less, with
    exit code 1, Ctrl-C with 130; whoever stops reading the output ends it quietly."""
    try:
        yield
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        advice = f"; {less_memory}" if less_memory else ""
        print(f"error: the device has not enough memory ({reason}){advice}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as interrupt:
        raise SystemExit(130) from interrupt
    except BrokenPipeError as closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left unwritten goes nowhere
        raise SystemExit(141) from closed
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
