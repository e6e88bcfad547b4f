"""Pools: workers that become idle, interrupted enqueue() calls, reference cycles, discard_all()."""

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.tasks import task, task_backends

from django_tasks_local import pools, report_progress
from django_tasks_local.pools.queue import TaskQueue, make_queue
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
    """
    A task runs if a finalizer enqueues it after the worker's check of the queue, before it is idle.
    """
    queue_class = type(make_queue())
    count = queue_class.__len__
    enqueued: list[Any] = []

    def count_then_enqueue(queue: TaskQueue[TaskRecord]) -> int:
        length = count(queue)
        caller = sys._getframe(1).f_code
        if length == 0 and caller is ThreadPool._wait.__code__ and not enqueued:
            enqueued.append(None)  # set first, because enqueue() re-enters here
            enqueued[0] = tasks.add.enqueue(1)
        return length

    monkeypatch.setattr(queue_class, "__len__", count_then_enqueue)
    tasks.noop.enqueue()
    wait_until(lambda: enqueued and enqueued[0], "the worker does not become idle")
    assert finished(enqueued[0]).return_value == 2


@pytest.mark.parametrize("step", ["enqueue", "task_result"])
def test_interrupted_enqueue(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    If Ctrl-C interrupts enqueue() after the task is stored, as at a Python prompt, the task runs.
    """
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


# No reference cycle keeps a finished task in memory


class Local:
    """
    An object that a task holds in a local variable; a weak reference shows when it is deleted.
    """


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
    """
    No reference cycle keeps the traceback of a failed task, which keeps the task's local variables.
    """
    # A captured log record would also keep the traceback.
    caplog.set_level("CRITICAL", "django.tasks")
    finished(fail.enqueue())
    wait_until(lambda: locals_of_tasks[-1]() is None, "a reference cycle keeps the traceback")


# Discarding all pools


class FakePool:
    """A stand-in for a pool: discard_all() sets `is_replaced` and calls `discard`."""

    is_replaced = False
    discard: Callable[..., None] = staticmethod(lambda: None)


class Pools(dict[Any, Any]):
    """
    The dict of pools by alias; its clear() checks that each pool is already marked as replaced.
    """

    def clear(self) -> None:
        assert all(pool.is_replaced for pool in self.values())
        super().clear()


def test_pools_are_marked_before_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    discard_all() marks each pool as replaced before it removes the pool from the dict of pools.

    Race: another thread may fork() at any time; the child can mark only the pools in the dict.
    """
    pool = FakePool()
    monkeypatch.setattr(pools, "_pools", Pools({"alias": pool}))
    pools.discard_all()
    assert pool.is_replaced
    assert pools.all_pools() == []


# Locks


def test_no_lock_is_held_while_the_queue_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The pool counts its queue outside of its own lock.

    Without a GIL, counting waits for the queue's lock, whose holder may run a finalizer that waits
    for the lock of the pool.
    """
    pool = task_backends["default"]._pool  # type: ignore[attr-defined]
    count = TaskQueue.__len__
    held: list[bool] = []

    def note_then_count(queue: TaskQueue[TaskRecord]) -> int:
        held.append(pool._workers_lock._is_owned())
        return count(queue)

    monkeypatch.setattr(TaskQueue, "__len__", note_then_count)
    for _ in range(3):
        finished(tasks.noop.enqueue())
    wait_until(lambda: pool._idle == 1, "the worker does not become idle")
    assert set(held) == {False}
