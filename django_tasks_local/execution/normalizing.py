"""
Normalize arguments and return values to plain JSON values, as json.loads(json.dumps()) would.

Django's normalize_json() accepts the same values but is slower, and it returns instances of
subclasses of str, int and float unchanged. The code of such a class would then run wherever the
value is used, and a worker process could not load a value whose class it cannot import.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from django.utils.json import normalize_json

if TYPE_CHECKING:
    from ..aliases import AnyTask

# Values of exactly these types are returned unchanged. For None, a call of json_value() would take
# as long as all other work at the end of a task.
UNCHANGED = frozenset({str, int, float, bool, type(None)})

_REMEDY = (
    "Use None, bool, int, float, str, and lists and dicts of these: for example the primary key "
    "instead of a model instance, and str() of a UUID or a datetime."
)


def json_value(value: Any) -> Any:
    """Return a plain copy of a value. Raises TypeError or ValueError if it is not JSON."""
    kind = type(value)
    if kind in UNCHANGED:
        return value
    if kind is list or kind is tuple:
        return json_list(value)
    if kind is dict or isinstance(value, Mapping):
        return json_dict(value)
    if isinstance(value, str):
        return str.__str__(value)  # These three methods of the base class return a plain value.
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return json_list(value)
    return normalize_json(value)  # It decodes bytes, and raises an error for all other values.


def json_list(values: Sequence[Any]) -> list[Any]:
    """Return a new list of the values of a list or tuple, each as json_value() returns it."""
    return [value if type(value) in UNCHANGED else json_value(value) for value in values]


def json_dict(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return a new dict of the keys and values of a dict, each as json_value() returns it."""
    return {
        name if type(name) is str else json_value(name): (
            value if type(value) in UNCHANGED else json_value(value)
        )
        for name, value in values.items()
    }


def json_arguments(
    task: AnyTask, args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None
) -> tuple[list[Any], dict[str, Any]]:
    """
    Return plain copies of the arguments of a task.

    Raises TypeError or ValueError that names the task, the argument and a remedy.
    """
    try:
        return json_list(args) if args else [], json_dict(kwargs) if kwargs else {}
    except (TypeError, ValueError) as error:
        kind, reason = _kind_of(error), error
    # Raised outside of the `except` block, because `from` shows the error already.
    name = _find_argument(task, args or (), kwargs or {})
    raise kind(
        f"Task {task.module_path} was not enqueued, because its argument {name} is not JSON: "
        f"{reason}. {_REMEDY}"
    ) from reason


def json_return_value(task: AnyTask, value: Any) -> Any:
    """Return a plain copy of a return value. Raises TypeError or ValueError with a remedy."""
    try:
        return json_value(value)
    except (TypeError, ValueError) as error:
        kind, reason = _kind_of(error), error
    raise kind(
        f"The return value of task {task.module_path} is not JSON: {reason}. {_REMEDY}"
    ) from reason


def _kind_of(error: Exception) -> type[Exception]:
    return TypeError if isinstance(error, TypeError) else ValueError


def _find_argument(task: AnyTask, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return the name of the first argument that is not JSON, for an error message."""
    for name, value in kwargs.items():
        if not _is_json(value):
            return repr(name)
    index = next((i for i, value in enumerate(args) if not _is_json(value)), 0)
    position = index + bool(task.takes_context)
    try:
        parameter = list(signature(task.func).parameters.values())[position]
    except (IndexError, TypeError, ValueError):  # The function has no such argument or signature.
        return f"number {index + 1}"
    is_named = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    return repr(parameter.name) if is_named else f"number {index + 1}"


def _is_json(value: Any) -> bool:
    try:
        json_value(value)
    except (TypeError, ValueError):
        return False
    return True
