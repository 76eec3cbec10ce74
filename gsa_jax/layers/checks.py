"""What every configuration asks of its numbers."""

import dataclasses
import math


def check_numbers(config, *may_be_zero, may_be_infinite=()):
    """Raises a ValueError that names the first field of a dataclass whose number is out of range.

    Fields of type int, and all of a tuple of them, are at least 1 and fields of type float positive and finite; those
    named in `may_be_zero` may be 0 too, floats in `may_be_infinite` inf. None passes.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        zero, infinite = field.name in may_be_zero, field.name in may_be_infinite
        if field.type in (int, int | None, tuple[int, ...]):
            least = 0 if zero else 1
            numbers = value if isinstance(value, tuple) else (value,)
            fits, expected = all(number >= least for number in numbers), f"at least {least}"
        elif field.type is float:
            fits = value > 0 and (value < math.inf or infinite) or value == 0 and zero
            expected = ("at least 0" if zero else "positive") + ("" if infinite else " and finite")
        else:
            continue
        if not fits:
            raise ValueError(f"{field.name} must be {expected}, got {value}")
