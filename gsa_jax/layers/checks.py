"""What every configuration asks of its numbers."""

import dataclasses
import math


def check_numbers(config, *may_be_zero):
    """Raises a ValueError that names the first field of a dataclass whose number is out of range.

    Fields of type int are at least 1, those named in `may_be_zero` at least 0; fields of type float are positive and
    finite. None passes.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        if field.type in (int, int | None):
            least = 0 if field.name in may_be_zero else 1
            fits, expected = value >= least, f"at least {least}"
        elif field.type is float:
            fits, expected = 0 < value < math.inf, "positive and finite"
        else:
            continue
        if not fits:
            raise ValueError(f"{field.name} must be {expected}, got {value}")
