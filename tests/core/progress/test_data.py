"""The data, message and unit of a report become plain values where they enter."""

import datetime
import logging
import math
import numbers
import uuid
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest
from django.db.models import TextChoices
from django.tasks import task
from django.utils.functional import lazystr
from django.utils.safestring import mark_safe
from django.utils.translation import gettext_lazy

from django_tasks_local import report_progress
from django_tasks_local.hub import hub
from django_tasks_local.progress.reporter import current_reporting
from django_tasks_local.progress.values import MAX_DEPTH
from tests.project import tasks
from tests.support.stage import Stage
from tests.support.waiting import finished


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage(interval=0.0)
    token = current_reporting.set(stage)
    yield stage
    current_reporting.reset(token)


class Text(str):
    """Text whose own str() differs from its characters, as that of an enum's member may."""

    __slots__ = ()

    def __str__(self) -> str:
        return "something else"


class Color(TextChoices):
    RED = "red"


class Float(float):
    """A number like numpy.float64, which is a subclass of float."""


class Int:
    """A number like numpy.int64, which is registered as Integral and is no subclass of int."""

    def __int__(self) -> int:
        return 7


numbers.Integral.register(Int)


class Float32:
    """A number like numpy.float32."""

    def __float__(self) -> float:
        return 0.5


numbers.Real.register(Float32)


def is_plain(value: Any) -> bool:
    """Return whether a value and all values in it have built-in types."""
    if type(value) is dict:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(is_plain(item) for item in value)
    return value is None or type(value) in {str, int, float, bool}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (Decimal("1.50"), "1.50"),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), "2026-01-02T03:04:05Z"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (datetime.timedelta(seconds=90), "P0DT00H01M30S"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (gettext_lazy("Yes"), "Yes"),
        (lazystr("lazy"), "lazy"),
        (Int(), 7),
        (Float32(), 0.5),
        (Float(1.5), 1.5),
        (Color.RED, "red"),
        (Text("text"), "text"),
        ((1, [Text("text")]), [1, ["text"]]),
    ],
)
def test_data_with_a_type_that_json_does_not_have(
    stage: Stage, caplog: pytest.LogCaptureFixture, value: Any, expected: Any
) -> None:
    report_progress(data={"key": value})
    assert stage.last.data == {"key": expected}
    assert is_plain(stage.last.data)
    assert caplog.records == []


class Broken(dict[str, Any]):
    """A dict whose items raise."""

    def items(self) -> Any:
        raise ZeroDivisionError


def nested(depth: int) -> dict[str, Any]:
    """Return dicts nested in each other."""
    value: dict[str, Any] = {}
    for _ in range(depth - 1):
        value = {"inner": value}
    return value


def circular() -> list[Any]:
    """Return a list that contains itself."""
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1, 2},
        b"bytes",
        math.nan,
        [math.inf],
        Float(math.nan),
        10**5000,
        {(1, 2): 3},
        Broken(key=1),
        circular(),
        nested(MAX_DEPTH),  # one level more, because the data itself is one
        nested(900),
        nested(100_000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_that_cannot_be_encoded_fails_the_task(
    stage: Stage, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    """Only that value is dropped, and the task's first one is logged."""
    report_progress(1, data={"bad": value, "good": [1]})
    assert (stage.last.current, stage.last.data) == (1, {"good": [1]})
    report_progress(2, data={"bad": value})
    assert (stage.last.current, stage.last.data) == (2, {})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "bad (" in record.getMessage()
    assert "good" not in record.getMessage()
    # Break the nesting here: freeing it in one step could exceed the stack of another thread.
    while isinstance(value, dict) and "inner" in value:
        value = value.pop("inner")


def test_key_that_is_no_text(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    report_progress(data={uuid.UUID(int=1): 1, 2: "two", Text("key"): 3})  # type: ignore[dict-item]
    assert stage.last.data == {"2": "two", "key": 3}
    assert is_plain(stage.last.data)
    assert "a key of <class 'uuid.UUID'>" in caplog.text


def test_deepest_data(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    data = nested(MAX_DEPTH)
    report_progress(data=data)
    assert stage.last.data == data
    wide = {"lists": [[number] for number in range(10 * MAX_DEPTH)]}
    report_progress(data=wide)
    assert stage.last.data == wide
    assert caplog.records == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (Text("text"), "text"),
        (Color.RED, "red"),
        (mark_safe("<b>"), "<b>"),
        (lazystr(mark_safe("<i>")), "<i>"),
        (gettext_lazy("Yes"), "Yes"),
    ],
)
def test_message_and_unit_of_a_subclass_of_str(stage: Stage, text: Any, expected: str) -> None:
    report_progress(message=text, unit=text)
    assert (stage.last.message, stage.last.unit) == (expected, expected)
    assert (type(stage.last.message), type(stage.last.unit)) == (str, str)


def test_numbers_of_subclasses(stage: Stage) -> None:
    report_progress(Float(1.5), Int())  # type: ignore[arg-type]
    assert (stage.last.current, stage.last.total) == (1.5, 7)
    assert (type(stage.last.current), type(stage.last.total)) == (float, int)


@task
def report_object() -> str:
    for step in range(3):
        report_progress(step, 3, data={"step": step, "bad": object()})
    return "done"


def test_task_warns_once_and_names_itself(caplog: pytest.LogCaptureFixture) -> None:
    results = [finished(report_object.enqueue()) for _ in range(2)]
    for result in results:
        assert result.return_value == "done"
        event = hub.snapshot(result)
        assert event is not None
        assert event.progress is not None
        assert event.progress.data == {"step": 2}
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    for result, warning in zip(results, warnings, strict=True):
        assert f"id={result.id}" in warning


def test_progress_is_read_by_attribute_only(gate: str) -> None:
    result = tasks.report.enqueue([1, 4], {"unit": "pages"}, gate)
    tasks.gates[gate].set()
    finished(result)
    event = hub.snapshot(result)
    assert event is not None
    assert event.progress is not None
    assert (event.progress.percent, event.progress.unit) == (25.0, "pages")
    assert event.retried_from is None
    with pytest.raises(TypeError, match="not subscriptable"):
        event.progress["percent"]  # type: ignore[index]
