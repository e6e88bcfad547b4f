"""
cancel() at any time: each task has one outcome, and the return value of cancel() agrees with it.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.tasks import TaskResultStatus, task_backends
from django.tasks.exceptions import TaskResultDoesNotExist
from django.test import override_settings

from django_tasks_local import cancel
from django_tasks_local.hub import hub
from django_tasks_local.processes import worker_process
from tests.project import tasks
from tests.support.waiting import LIMIT, finished, running, wait_for_event, wait_until

CANCELLED = "django_tasks_local.exceptions.TaskCancelled"
ALIASES = ["default", "processes"]


@pytest.fixture(autouse=True, scope="module")
def backends() -> Iterator[None]:
    settings = {
        "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
        "processes": {
            "BACKEND": "django_tasks_local.ProcessPoolBackend",
            "OPTIONS": {"MAX_WORKERS": 1},
        },
    }
    with override_settings(TASKS=settings):
        yield


def was_cancelled(result: Any) -> bool:
    """
    Return whether a finished task was cancelled; fail if its result and its last event disagree.
    """
    event = hub.snapshot(result.id)
    assert event is not None
    assert event.status == result.status
    if result.status == TaskResultStatus.SUCCESSFUL:
        assert not result.errors
        return False
    assert [error.exception_class_path for error in result.errors] == [CANCELLED]
    assert event.error is not None
    assert event.error.reason == "cancelled"
    return True


@pytest.mark.parametrize("alias", ALIASES)
def test_cancel_finished_task(alias: str) -> None:
    result = finished(tasks.noop.using(backend=alias).enqueue())
    assert cancel(result.id, alias) is False
    result.refresh()
    assert not was_cancelled(result)


@pytest.mark.parametrize("alias", ALIASES)
def test_cancel_unknown_id(alias: str) -> None:
    with pytest.raises(TaskResultDoesNotExist):
        cancel("nothing", alias)


def test_cancel_twice(tmp_path: Path) -> None:
    """Two cancel() calls interrupt the task once; each returns whether the task was unfinished."""
    result = running(tasks.until_cancelled.enqueue(str(tmp_path)))
    assert cancel(result.id) is True
    assert cancel(result.id) in {True, False}  # False if the task ended before this call.
    assert was_cancelled(finished(result))
    assert cancel(result.id) is False
    assert tasks.notes[str(tmp_path)] == ["cleaned up"]


@pytest.mark.parametrize("task", [tasks.clean_up, tasks.clean_up_async])
def test_cancel_again_during_cleanup(task: Any, gate: str) -> None:
    """A second cancel() returns True but does not interrupt the `finally` block of the task."""
    result = running(task.enqueue(gate, gate))
    notes = tasks.notes[gate]
    assert cancel(result.id) is True
    wait_until(lambda: notes, "the task is not cancelled")
    assert cancel(result.id) is True
    tasks.gates[gate].set()
    assert was_cancelled(finished(result))
    assert notes == ["cleaning up", "cleaned up"]


@pytest.mark.parametrize("task", [tasks.clean_up, tasks.clean_up_async])
def test_report_during_cleanup_is_in_the_final_event(task: Any, gate: str) -> None:
    result = running(task.enqueue(gate, gate))
    assert cancel(result.id) is True
    tasks.gates[gate].set()
    assert was_cancelled(finished(result))
    assert hub.snapshot(result).progress.message == "clean"


def test_cancel_after_coroutine_has_ended(gate: str) -> None:
    """
    If the coroutine has returned, cancel() fails neither the task nor the thread that it left
    running.
    """
    result = tasks.leave_a_query.enqueue(gate)
    wait_for_event(result.id, lambda e: e.progress and e.progress.message == "ending")
    assert cancel(result.id) is True
    tasks.gates[gate].set()
    assert finished(result).return_value == "value"
    assert not was_cancelled(result)


def test_cancel_from_four_threads(gate: str) -> None:
    """
    If four threads cancel a waiting task at once, the task fails and at least one call returns
    True.
    """
    blocked = [tasks.gated.enqueue(gate) for _ in range(10)]
    waiting = tasks.noop.enqueue()
    barrier = threading.Barrier(4)

    def race(_: int) -> bool:
        barrier.wait(tasks.LIMIT)
        return cancel(waiting.id)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(race, range(4)))
    assert any(answers)
    assert was_cancelled(finished(waiting))
    for result in blocked:
        cancel(result.id)
    tasks.gates[gate].set()


@pytest.mark.parametrize("alias", ALIASES)
def test_cancel_while_task_finishes(alias: str) -> None:
    """
    If cancel() races with the end of a task, it never returns False for a task that was cancelled.

    In a thread, cancel() may return True for a task that succeeds, because only report_progress()
    raises TaskCancelled there, and the task may not call it again.
    """
    # Each cancellation in the process backend replaces a worker process, which takes time.
    times = 300 if alias == "default" else 8
    for number in range(times):
        result = tasks.steps.using(backend=alias).enqueue(number % 7)
        if number % 3:
            with hub.subscribe(result.id) as subscription:
                while not any(event.sequence > 1 for event in subscription.take(tasks.LIMIT)):
                    pass
        answer = cancel(result.id, alias)
        cancelled = was_cancelled(finished(result))
        assert answer or not cancelled
        assert cancel(result.id, alias) is False


def test_cancel_after_concurrent_cancel(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    cancel() returns False if another thread cancels the task after cancel() has read its status.
    """
    busy = [tasks.gated.enqueue(gate) for _ in range(10)]
    for result in busy:
        running(result)
    waiting = tasks.noop.enqueue()
    pool = task_backends["default"]._pool
    fail_waiting = pool.fail_waiting
    monkeypatch.setattr(pool, "fail_waiting", lambda *args: fail_waiting(*args) and False)
    assert cancel(waiting.id) is False
    assert was_cancelled(finished(waiting))


@pytest.fixture
def long_kill_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a busy machine more time before the parent kills a worker process that cleans up."""
    monkeypatch.setattr(worker_process, "KILL_AFTER", LIMIT)


@pytest.mark.usefixtures("long_kill_after")
@pytest.mark.parametrize("alias", ALIASES)
def test_cancel_reaches_threads_of_a_coroutine(alias: str, tmp_path: Path) -> None:
    """cancel() ends the work of asyncio.to_thread() and sync_to_async(), not only the coroutine."""
    note = str(tmp_path / "note")
    result = running(tasks.work_in_threads.using(backend=alias).enqueue(note))
    assert cancel(result.id, alias)
    assert was_cancelled(finished(result))
    ends = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert ends.pop("note-coroutine") == "cleaned up"
    # A thread that had not begun to report when the task was cancelled was never started.
    assert ends
    assert set(ends.values()) == {"cancelled"}


@pytest.mark.usefixtures("long_kill_after")
@pytest.mark.parametrize("alias", ALIASES)
def test_cancelled_task_group_counts_as_cancelled(alias: str) -> None:
    """A TaskGroup raises a group of TaskCancelled; the outcome is a TaskCancelled."""
    result = running(tasks.work_in_group.using(backend=alias).enqueue())
    assert cancel(result.id, alias)
    assert was_cancelled(finished(result))


@pytest.mark.usefixtures("long_kill_after")
def test_cancel_reaches_threads_of_asyncio_run(tmp_path: Path) -> None:
    """cancel() ends the threads of an event loop in a sync task, and lets the task clean up."""
    result = running(tasks.work_in_own_loop.enqueue(str(tmp_path / "note")))
    assert cancel(result.id)
    assert was_cancelled(finished(result))
    event = hub.snapshot(result.id)
    assert event.progress.message == "after the loop"
