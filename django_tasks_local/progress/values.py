"""Check the values that a task reports, and copy its data."""

import json
import math
import numbers
from enum import Enum
from traceback import format_exception_only
from typing import Any, Final, Literal

from django.core.serializers.json import DjangoJSONEncoder
from django.utils.functional import Promise

from ..aliases import Number

# `current` and `total` must be below this number, so that no percentage, rate or ETA overflows.
MAX_NUMBER = 1e100
# MAX_NUMBER as an int, because Python compares an int faster with an int than with a float.
MAX_INT = 10**100
# The maximum depth of nesting in `data`. Pickle and JSON encode `data` again on its way to a
# client, and raise RecursionError for data that is nested some hundred levels deep.
MAX_DEPTH = 100


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
    """Return `value` as check_number() does. Raises ValueError for negative numbers too."""
    total = check_number("total", value)
    if total is not None and total < 0:
        raise ValueError(f"total must be 0 or more, or None for unknown, not {total!r}.")
    return total


def check_text(name: str, value: Any) -> str:
    """
    Return `value` as str, "" for None. Raises TypeError, naming `name`, if it is not text.

    An instance of a subclass of str becomes a plain str with the same characters: to unpickle the
    subclass, the web process would import its module.
    """
    if value is None:
        return ""
    if isinstance(value, Promise):  # A lazy translation is rendered in the task's language.
        value = str(value)
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"{name} must be a string or None, not {value!r:.100}.")


class _DataEncoder(DjangoJSONEncoder):
    """Encodes Django's types, and the numbers of other libraries, such as numpy.int64."""

    def default(self, o: Any) -> Any:
        """Return a value of which JSON has the type. Raises TypeError if there is none."""
        if isinstance(o, numbers.Integral):
            return int(o)
        if isinstance(o, numbers.Real):
            return float(o)
        return super().default(o)


_encode_data = _DataEncoder(allow_nan=False).encode


def copy_data(data: dict[Any, Any]) -> tuple[dict[str, Any], str | None]:
    """
    Return `data` as it is after a conversion to JSON, and a text on values that were dropped.

    The copy has only plain types, and the task may change its own objects after the report. A
    value that cannot be encoded, or is nested too deeply, is dropped, because the report of
    progress must not fail the task's work. The text is None if all values were encoded.
    """
    try:
        return _to_json_and_back(data), None
    except Exception:  # noqa: BLE001 - methods of the values may raise anything
        copy: dict[str, Any] = {}
    dropped = []
    # list(): another thread may change the dict concurrently.
    for key, value in list(data.items()):
        try:
            copy |= _to_json_and_back({key: value})
        except Exception as error:  # noqa: BLE001 - see above
            name = str.__str__(key) if isinstance(key, str) else f"a key of {type(key)}"
            dropped.append(f"{name:.100} ({format_exception_only(error)[-1].strip():.200})")
    return copy, ", ".join(dropped)


def _to_json_and_back(data: dict[Any, Any]) -> dict[str, Any]:
    text = _encode_data(data)
    copy: dict[str, Any] = json.loads(text)
    # Data with few brackets cannot be nested deeply, and counting these is faster.
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deeper(copy, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return copy


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and dicts are nested in `value` more than `levels` deep."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(inner, levels - 1) for inner in value)
