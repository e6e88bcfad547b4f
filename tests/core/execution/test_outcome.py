"""Tasks whose exceptions cannot be formatted, the memory of failed tasks, and clear errors."""

import gc
import uuid
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import models

from django_tasks_local.execution import Outcome
from django_tasks_local.hub import hub
from django_tasks_local.testing import wait_until_idle
from tests.project import odd, tasks
from tests.support.backends import settings_with
from tests.support.waiting import LIMIT, finished


@pytest.fixture(autouse=True)
def one_worker() -> Iterator[None]:
    """Backends with one worker, so that a later task runs in the worker of a failed one."""
    with settings_with(MAX_WORKERS=1):
        yield


@pytest.mark.parametrize("name", odd.ERRORS)
def test_exception_that_cannot_be_formatted_fails_only_its_task(alias: str, name: str) -> None:
    """The task fails with a description in plain text, and its worker runs the next task."""
    before = finished(tasks.add.using(backend=alias).enqueue(1))
    result = finished(odd.fail.using(backend=alias).enqueue(name))
    assert result.status == "FAILED"
    [error] = result.errors
    assert type(error.traceback) is str
    assert type(error.exception_class_path) is str
    assert error.exception_class_path.rpartition(".")[2] == odd.ERRORS[name]
    assert "in fail" in error.traceback
    after = finished(tasks.add.using(backend=alias).enqueue(2))
    assert after.return_value == 3
    assert before.worker_ids == result.worker_ids == after.worker_ids
    wait_until_idle(alias, LIMIT)


def test_class_without_a_module_has_a_path_that_can_be_imported() -> None:
    outcome = Outcome.failure(odd.make("unprintable module"))
    assert outcome.error is not None
    assert outcome.error.exception_class is BaseException


@pytest.mark.parametrize("name", ["saved", "saved_async", "child", "cause", "group"])
def test_failed_task_leaves_no_memory(alias: str, name: str) -> None:
    """
    The local variables of a failed task are freed without a garbage collection.

    The task `is_freed` reports it, because the variables are those of a worker.
    """
    failing = getattr(odd, name)
    try:
        result = finished(failing.using(backend=alias).enqueue())
        assert "kept in a variable" in result.errors[0].traceback
        wait_until_idle(alias, LIMIT)
        assert finished(odd.is_freed.using(backend=alias).enqueue()).return_value is True
    finally:
        gc.enable()  # The task in a thread of this process has disabled it.


def test_member_of_choices_of_a_function_reaches_the_task(alias: str) -> None:
    """A worker process cannot import such a class, and the task gets a plain str."""

    class Color(models.TextChoices):
        RED = "red"

    result = finished(odd.types.using(backend=alias).enqueue(Color.RED, [Color.RED], x=Color.RED))
    assert result.return_value == ["str", "str", "str"]
    assert [type(value) for value in (result.args[0], result.kwargs["x"])] == [str, str]


def test_value_that_is_not_json_names_task_argument_and_remedy(alias: str) -> None:
    add = tasks.add.using(backend=alias)
    expected = (
        r"Task tests\.project\.tasks\.add was not enqueued, because its argument {} is not JSON: "
        r"Unsupported type: <class 'uuid\.UUID'>\. .* str\(\) of a UUID"
    )
    calls: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("'a'", [uuid.uuid4()], {}),
        ("'b'", [1, [uuid.uuid4()]], {}),
        ("'b'", [1], {"b": {"id": uuid.uuid4()}}),
    ]
    for name, args, kwargs in calls:
        with pytest.raises(TypeError, match=expected.format(name)):
            add.enqueue(*args, **kwargs)
    with pytest.raises(TypeError, match="its argument number 2 is not JSON"):
        tasks.echo.using(backend=alias).enqueue(1, uuid.uuid4())


def test_return_value_that_is_not_json_names_task_and_remedy(alias: str) -> None:
    event = hub.snapshot(finished(tasks.not_json.using(backend=alias).enqueue()).id)
    assert event is not None
    assert event.error is not None
    assert event.error.message.startswith(
        "The return value of task tests.project.tasks.not_json is not JSON: Unsupported type"
    )


def test_async_function_behind_an_ordinary_decorator_is_awaited(alias: str) -> None:
    assert finished(odd.decorated.using(backend=alias).enqueue(3)).return_value == 4


def test_variables_are_cleared_although_exceptions_refer_to_each_other() -> None:
    first, second = ValueError(1), ValueError(2)
    first.__context__, second.__context__ = second, first
    outcome = Outcome.failure(ExceptionGroup("group", [first, second]))
    assert outcome.exception is not None
    reference = weakref.ref(outcome.exception)
    outcome.drop_exception()
    outcome.drop_exception()
    assert outcome.exception is None
    assert reference() is None
