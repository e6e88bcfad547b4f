"""json_value(), json_list() and json_dict() return the same values as Django's normalize_json()."""

import enum
from collections import OrderedDict, UserList
from typing import Any

import pytest
from django.utils.json import normalize_json

from django_tasks_local.execution import json_dict, json_list, json_value


class Text(str):
    """A subclass of str, which json.dumps() accepts as it accepts str."""

    __slots__ = ()


class Color(enum.StrEnum):
    RED = "red"


class Number(enum.IntEnum):
    ONE = 1


VALUES: list[Any] = [
    None,
    True,
    0,
    1.5,
    float("inf"),
    "text",
    b"bytes",
    Text("text"),
    Color.RED,
    Number.ONE,
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


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value(value: Any) -> None:
    assert same(json_value(value), normalize_json(value))


def test_a_list_and_a_dict() -> None:
    assert same(json_list(VALUES), normalize_json(VALUES))
    assert same(json_list(tuple(VALUES)), normalize_json(VALUES))
    named = {f"name{number}": value for number, value in enumerate(VALUES)}
    named |= {Text("name"): 1, Color.RED: 2}
    assert same(json_dict(named), normalize_json(named))


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
