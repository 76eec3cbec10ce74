"""What the scripts share: mistakes of the user end in a message and exit code 2."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns the errors that a user can mend (bad settings, files, checkpoints) into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
