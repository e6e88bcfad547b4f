"""Checks of the values that a task reports."""

import json
import math
import numbers
from enum import Enum
from typing import Any, Final, Literal

from django.utils.functional import Promise

from ..aliases import Number

MAX_NUMBER = 1e100  # of `current` and `total`: no percentage, rate or ETA of them overflows
MAX_INT = 10**100  # the same; an int is compared faster with an int


class _Unset(Enum):
    UNSET = "unset"


# The default of arguments for which None means "unknown".
UNSET: Final = _Unset.UNSET
type Unset = Literal[_Unset.UNSET]


def check_number(name: str, value: Any) -> Number | None:
    """Return an int or a float, or None. Raises TypeError or ValueError that names the argument."""
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
    # Also false for NaN.
    if not -MAX_NUMBER < value < MAX_NUMBER:
        shown = value if isinstance(value, float) else "a number of that size"
        raise ValueError(f"{name} must be a finite number, not {shown}.")
    return value  # type: ignore[no-any-return]


def check_total(value: Any) -> Number | None:
    """Return a number above zero, or None. Raises as check_number(), and for zero and below."""
    total = check_number("total", value)
    if total is not None and total <= 0:
        raise ValueError(f"total must be above zero, or None for unknown, not {total!r}.")
    return total


def check_message(message: Any) -> str:
    """Return the text, "" for None. Raises TypeError."""
    if message is None:
        return ""
    if isinstance(message, str):
        return message
    if isinstance(message, Promise):  # a lazy translation: rendered in the task's language
        return str(message)
    raise TypeError(f"message must be a string or None, not {message!r:.100}.")


def copy_json(data: dict[str, Any]) -> dict[str, Any]:
    """
    Return a copy, which does not change when the task changes its objects afterwards.

    Raises TypeError or ValueError that names the keys if `data` is not JSON.
    """
    try:
        copy: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"The data ({', '.join(data)}) must be JSON: {error}") from error
    return copy
