"""Pools: an idle worker, interrupted calls, references to finished tasks, discarding."""

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.tasks import task, task_backends

from django_tasks_local import pools, report_progress
from django_tasks_local.pools.queue import TaskQueue
from django_tasks_local.pools.threads import ThreadPool
from django_tasks_local.record import TaskRecord
from tests.project import tasks
from tests.support.backends import settings_with
from tests.support.waiting import LIMIT, finished, wait_until


@pytest.fixture(autouse=True)
def one_worker() -> Iterator[None]:
    with settings_with(MAX_WORKERS=1, MAX_RESULTS=1, PROGRESS_INTERVAL=0):
        yield


def test_finalizer_enqueues_while_the_worker_becomes_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs after the worker's check of the queue, and the worker is not idle yet."""
    count = TaskQueue.__len__
    enqueued: list[Any] = []

    def count_then_enqueue(queue: TaskQueue[TaskRecord]) -> int:
        length = count(queue)
        caller = sys._getframe(1).f_code
        if length == 0 and caller is ThreadPool._wait.__code__ and not enqueued:
            enqueued.append(None)  # enqueue() calls this function as well.
            enqueued[0] = tasks.add.enqueue(1)
        return length

    monkeypatch.setattr(TaskQueue, "__len__", count_then_enqueue)
    tasks.noop.enqueue()
    wait_until(lambda: enqueued and enqueued[0], "the worker does not become idle")
    assert finished(enqueued[0]).return_value == 2


@pytest.mark.parametrize("step", ["enqueue", "task_result"])
def test_interrupted_enqueue(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at a prompt: a task that is in the store runs."""
    original = getattr(TaskRecord, step)
    interrupted: list[TaskRecord] = []

    def interrupt(record: TaskRecord, *args: Any) -> None:
        monkeypatch.undo()
        interrupted.append(record)
        original(record, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(TaskRecord, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        tasks.noop.enqueue()
    assert task_backends["default"].wait_until_idle(LIMIT) == []  # type: ignore[attr-defined]
    assert interrupted[0].status == "SUCCESSFUL"


# Memory


class Local:
    """A local variable of a task."""


locals_of_tasks: list[weakref.ref[Local]] = []


@task
def report() -> None:
    report_progress(1)


@task
def fail() -> None:
    local = Local()
    locals_of_tasks.append(weakref.ref(local))
    raise ValueError


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("function", [tasks.noop, report])
def test_evicted_record_is_in_no_reference_cycle(function: Any) -> None:
    pool = task_backends["default"]._pool  # type: ignore[attr-defined]
    record = weakref.ref(pool.results.get(finished(function.enqueue()).id))
    finished(tasks.noop.enqueue())
    wait_until(lambda: record() is None, "a reference cycle keeps the record")


@pytest.mark.usefixtures("no_garbage_collection")
def test_failed_task_is_in_no_reference_cycle(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of its exception refers to its local variables."""
    caplog.set_level("CRITICAL", "django.tasks")  # A captured log record refers to it as well.
    finished(fail.enqueue())
    wait_until(lambda: locals_of_tasks[-1]() is None, "a reference cycle keeps the traceback")


# Discarding


class FakePool:
    """A pool that notes at which step it is marked as replaced."""

    is_replaced = False
    discard: Callable[..., None] = staticmethod(lambda: None)


class Pools(dict[Any, Any]):
    """The pools by alias; a fork() may copy the process before and after clear()."""

    def clear(self) -> None:
        assert all(pool.is_replaced for pool in self.values())
        super().clear()


def test_pools_are_marked_before_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child of a concurrent fork() marks only the pools that are not forgotten."""
    pool = FakePool()
    monkeypatch.setattr(pools, "_pools", Pools({"alias": pool}))
    pools.discard_all()
    assert pool.is_replaced
    assert pools.all_pools() == []
