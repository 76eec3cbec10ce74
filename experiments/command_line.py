"""What the scripts share: mistakes of the user end in a message and exit code 2."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors into one line: those that a user can mend (bad settings, files, checkpoints) with exit code 2, a
    training that diverged with exit code 1."""
    try:
        yield
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
