"""task_prerun and task_postrun are sent in the process, thread and context that run the task."""

from collections.abc import Iterator
from typing import Any

import pytest

from django_tasks_local.signals import task_prerun
from django_tasks_local.testing import wait_until_idle
from tests.project import bound_context, tasks
from tests.support.backends import settings_with
from tests.support.waiting import finished


@pytest.fixture
def connected() -> Iterator[None]:
    bound_context.connect()
    yield
    bound_context.disconnect()
    bound_context.ended.clear()


def bound_in(result: Any) -> str:
    return f"{result.task.name} {result.id} RUNNING"


@pytest.mark.parametrize("task", [bound_context.read_bound, bound_context.read_bound_async])
def test_libraries_can_bind_a_context_where_the_task_runs(
    alias: str, task: Any, connected: None
) -> None:
    """A variable that a receiver of task_prerun sets is set in the task, also in a worker."""
    with settings_with(MAX_WORKERS=1):
        first = finished(task.using(backend=alias).enqueue())
        second = finished(task.using(backend=alias).enqueue())
    assert first.return_value == [bound_in(first), []]
    assert second.return_value == [bound_in(second), [[first.id, bound_in(first)]]]


def test_task_postrun_is_sent_after_a_task_that_fails(connected: None) -> None:
    with settings_with():
        result = finished(bound_context.read_bound.enqueue(True))
        assert bound_in(result) in result.errors[0].traceback
        assert bound_context.ended == [(result.id, bound_in(result))]


def test_receiver_of_task_prerun_that_raises_does_not_fail_the_task(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(**kwargs: Any) -> None:
        raise ValueError("a receiver")

    task_prerun.connect(fail)
    try:
        with settings_with():
            assert finished(tasks.add.enqueue(1)).return_value == 2
            wait_until_idle()
    finally:
        task_prerun.disconnect(fail)
    assert "a receiver" in caplog.text
