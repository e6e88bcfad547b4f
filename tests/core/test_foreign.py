"""The module `foreign` publishes Django's signals of other backends' tasks as events of the hub."""

from contextvars import Context
from datetime import timedelta
from typing import Any

import pytest
from django.tasks import TaskResultStatus, task_backends
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.utils import timezone

from django_tasks_local import current_result_id, foreign
from django_tasks_local.events import LAST_SEQUENCE, TaskEvent
from django_tasks_local.hub import hub
from django_tasks_local.progress.reporter import current_reporting
from django_tasks_local.publishing import event_from_result
from tests.project import tasks
from tests.support.waiting import LIMIT, finished


def events_of_an_immediate_task(task: Any, *args: Any) -> tuple[Any, list[TaskEvent]]:
    """Run a task on the ImmediateBackend; return its result and all events published for it."""
    seen: list[TaskEvent] = []
    publish = hub.publish

    def note(event: TaskEvent, **kwargs: Any) -> bool:
        seen.append(event)
        return publish(event, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(hub, "publish", note)
        # This interval outlasts the test, so that every later report of the task is throttled.
        monkeypatch.setattr(foreign, "PROGRESS_INTERVAL", LIMIT)
        result = task.using(backend="immediate").enqueue(*args)
    return result, seen


def test_an_immediate_task_has_all_its_events() -> None:
    result, events = events_of_an_immediate_task(tasks.steps, 3)
    assert [event.kind for event in events] == ["enqueued", "started", "progress", "finished"]
    assert [event.sequence for event in events] == [1, 2, 3, 4]
    last = events[-1]
    assert (last.id, last.backend, last.name) == (result.id, "immediate", "steps")
    assert (last.status, last.return_value) == (TaskResultStatus.SUCCESSFUL, 3)
    assert (last.progress.current, last.progress.message) == (3, "step 3")
    assert last.enqueued_at <= last.started_at <= last.finished_at
    assert hub.snapshot(result.id) is last


def test_an_immediate_task_knows_its_id() -> None:
    for task in (tasks.result_id, tasks.async_result_id):
        result = task.using(backend="immediate").enqueue()
        assert result.return_value == result.id
    with pytest.raises(LookupError):
        current_result_id.get()
    assert current_reporting.get(None) is None


def test_an_immediate_task_that_fails() -> None:
    result, events = events_of_an_immediate_task(tasks.fail)
    error = events[-1].error
    assert (error.reason, error.type) == ("failed", "builtins.ValueError")
    assert result.status == TaskResultStatus.FAILED
    assert not foreign._running


def test_immediate_tasks_nest() -> None:
    result = finished(tasks.nested.enqueue())
    assert result.return_value == result.id
    outer = tasks.nested.using(backend="immediate").enqueue()
    assert outer.return_value == outer.id


async def test_an_immediate_task_from_async_code() -> None:
    result = await tasks.result_id.using(backend="immediate").aenqueue()
    assert result.return_value == result.id


def test_a_task_that_finishes_elsewhere() -> None:
    result = tasks.noop.using(backend="dummy").enqueue()
    task_enqueued.send(sender=type(task_backends["dummy"]), task_result=result)
    assert hub.snapshot(result.id).kind == "enqueued"
    object.__setattr__(result, "status", TaskResultStatus.SUCCESSFUL)
    task_finished.send(sender=type(task_backends["dummy"]), task_result=result)
    assert hub.snapshot(result.id).kind == "finished"


def test_signals_of_our_own_tasks_make_no_events() -> None:
    result = finished(tasks.noop.enqueue())
    before = hub.snapshot(result.id)
    for signal in (task_enqueued, task_started, task_finished):
        signal.send(sender=type(task_backends["default"]), task_result=result)
    assert hub.snapshot(result.id) is before
    assert not foreign._running


def test_the_runs_of_a_task_that_a_backend_runs_again() -> None:
    result = tasks.noop.using(backend="dummy").enqueue()
    sender = type(task_backends["dummy"])
    runs = []
    for seconds in (1, 2):
        for name in ("started_at", "last_attempted_at"):
            object.__setattr__(result, name, timezone.now() + timedelta(seconds=seconds))
        task_started.send(sender=sender, task_result=result)
        object.__setattr__(result, "status", TaskResultStatus.SUCCESSFUL)
        task_finished.send(sender=sender, task_result=result)
        event = hub.snapshot(result)
        assert event.is_last
        runs.append(event.run)
    assert runs[0] < runs[1] == int(result.last_attempted_at.timestamp() * 1000)
    assert not foreign._running


def test_events_from_stored_results() -> None:
    result = finished(tasks.fail.enqueue())
    event = event_from_result(result)
    assert (event.kind, event.sequence) == ("finished", LAST_SEQUENCE)
    assert event.error.reason == "failed"
    assert event.error.type == "builtins.ValueError"
    ready = tasks.noop.using(backend="dummy").enqueue()
    event = event_from_result(ready)
    assert (event.kind, event.sequence, event.error) == ("enqueued", 1, None)
    object.__setattr__(ready, "status", TaskResultStatus.RUNNING)
    assert event_from_result(ready).sequence == 2


def test_late_sample_has_the_state_in_which_the_task_started() -> None:
    """
    A progress event keeps the status RUNNING although the backend has already changed the result.

    The ImmediateBackend sets `status` and `finished_at` before it sends task_finished.
    """
    result = tasks.noop.using(backend="dummy").enqueue()
    sender = type(task_backends["dummy"])
    object.__setattr__(result, "status", TaskResultStatus.RUNNING)
    task_started.send(sender=sender, task_result=result)
    object.__setattr__(result, "status", TaskResultStatus.SUCCESSFUL)
    object.__setattr__(result, "finished_at", timezone.now())
    foreign._running["dummy", result.id].get_reporter().report(5)
    event = hub.snapshot(result)
    assert (event.kind, event.status, event.finished_at) == ("progress", "RUNNING", None)
    task_finished.send(sender=sender, task_result=result)
    event = hub.snapshot(result)
    assert (event.kind, event.status) == ("finished", "SUCCESSFUL")


def test_number_of_running_tasks_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The module keeps at most RUNNING_LIMIT tasks, because this process may never learn of their end.

    Another process may send task_finished for a task whose task_started was sent in this process.
    """
    monkeypatch.setattr(foreign, "RUNNING_LIMIT", 3)
    monkeypatch.setattr(foreign, "_running", {})
    sender = type(task_backends["dummy"])
    results = [tasks.noop.using(backend="dummy").enqueue() for _ in range(5)]

    def start_all() -> list[str]:
        for result in results:
            task_started.send(sender=sender, task_result=result)
        return [id for _, id in foreign._running]

    assert Context().run(start_all) == [result.id for result in results[2:]]
