"""Check the values that a task reports, and copy its data."""

import json
import math
import numbers
from enum import Enum
from typing import Any, Final, Literal

from django.utils.functional import Promise

from ..aliases import Number

# `current` and `total` must be below this number, so that no percentage, rate or ETA overflows.
MAX_NUMBER = 1e100
# MAX_NUMBER as an int, because Python compares an int faster with an int than with a float.
MAX_INT = 10**100


class _Unset(Enum):
    UNSET = "unset"


# UNSET marks an omitted argument where None means "unknown".
UNSET: Final = _Unset.UNSET
type Unset = Literal[_Unset.UNSET]


def check_number(name: str, value: Any) -> Number | None:
    """Return `value` as int, float or None. Raises TypeError or ValueError that names `name`."""
    kind = type(value)
    if value is None:
        return None
    if kind is not int and kind is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Number):
            raise TypeError(f"{name} must be a number or None, not {value!r:.100}.")
        try:
            value = int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore[arg-type]
        except OverflowError:
            value = math.inf
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a real number, not {value!r:.100}.") from error
    # The comparison is also false for NaN.
    if not -MAX_NUMBER < value < MAX_NUMBER:
        shown = value if isinstance(value, float) else "a number outside of ±1e100"
        raise ValueError(f"{name} must be a finite number, not {shown}.")
    return value  # type: ignore[no-any-return]


def check_total(value: Any) -> Number | None:
    """Return `value` as check_number() does. Raises ValueError for 0 and negative numbers too."""
    total = check_number("total", value)
    if total is not None and total <= 0:
        raise ValueError(f"total must be above zero, or None for unknown, not {total!r}.")
    return total


def check_message(message: Any) -> str:
    """Return `message` as str, "" for None. Raises TypeError for a value that is not text."""
    if message is None:
        return ""
    if isinstance(message, str):
        return message
    if isinstance(message, Promise):  # A lazy translation is rendered in the task's language.
        return str(message)
    raise TypeError(f"message must be a string or None, not {message!r:.100}.")


def copy_json(data: dict[str, Any]) -> dict[str, Any]:
    """
    Return a deep copy of `data`, so that the task may change its own objects after the report.

    Raises TypeError or ValueError, naming the keys of `data`, if a value is not JSON.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"The data ({', '.join(data)}) must be JSON: {error}") from error
    return copy
