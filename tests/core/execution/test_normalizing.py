"""json_value(), json_list() and json_dict() return plain JSON values, as json.loads() does."""

import enum
import json
from collections import OrderedDict, UserList
from typing import Any

import pytest
from django.utils.json import normalize_json

from django_tasks_local.execution.normalizing import json_dict, json_list, json_value


class Text(str):
    """A subclass of str, which json.dumps() accepts as it accepts str."""

    __slots__ = ()


class Color(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


class Real(float):
    """A subclass of float, such as numpy.float64."""


VALUES: list[Any] = [
    None,
    True,
    0,
    1.5,
    float("inf"),
    "text",
    b"bytes",
    (1, (2, b"3")),
    [1, [None]],
    {"key": {b"inner": (1,)}},
    OrderedDict(key=(1, 2)),
    UserList([1, (2,)]),
    range(3),
]


def same(one: Any, other: Any) -> bool:
    """Return whether two values are equal and have the same types at every level of nesting."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
    return bool(one == other)


# Django leaves instances of these classes unchanged, and json.dumps() writes them as plain values.
SUBCLASSES = [Text("text"), Color.RED, Number.ONE, Real(1.5)]


def plain(value: Any) -> Any:
    """Return the value that json_value() has to return, computed by Django and json."""
    return json.loads(json.dumps(normalize_json(value)))


@pytest.mark.parametrize("value", [*VALUES, *SUBCLASSES], ids=repr)
def test_a_value(value: Any) -> None:
    assert same(json_value(value), plain(value))


def test_instances_of_subclasses_become_plain() -> None:
    """json_value() converts them also inside of lists and dicts, and as keys."""
    nested = {Color.RED: [Text("text"), (Number.ONE, {"x": Real(2.5)})]}
    assert same(json_value(nested), {"red": ["text", [1, {"x": 2.5}]]})
    assert same(json_value({1: 2.0, None: True}), {1: 2.0, None: True})


def test_a_list_and_a_dict() -> None:
    values = [*VALUES, *SUBCLASSES]
    assert same(json_list(values), plain(values))
    assert same(json_list(tuple(values)), plain(values))
    named = {f"name{number}": value for number, value in enumerate(values)}
    named |= {Text("name"): 1, Color.RED: 2}
    assert same(json_dict(named), plain(named))


def test_lists_and_dicts_are_new() -> None:
    values, named = [[1]], {"key": {"inner": 1}}
    copied, copied_named = json_list(values), json_dict(named)
    copied[0].append(2)
    copied.append(3)
    copied_named["key"]["inner"] = 2
    copied_named["other"] = 3
    assert (values, named) == ([[1]], {"key": {"inner": 1}})


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, b"\xff", [object()], {"key": object()}])
def test_a_value_that_is_not_json(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        normalize_json(value)
    for convert in (json_value, lambda v: json_list([v]), lambda v: json_dict({"key": v})):
        with pytest.raises(type(expected.value), match="Unsupported"):
            convert(value)
