"""Exceptions and calls of other threads while the Assigner gives tasks to workers."""

import threading
from typing import Any

import pytest
from django.test import override_settings

from django_tasks_local.conf import ProcessOptions
from django_tasks_local.exceptions import TaskLost
from django_tasks_local.processes import pool as pool_module
from django_tasks_local.processes.pool import ProcessPool
from django_tasks_local.processes.worker_process import WorkerProcess
from django_tasks_local.processes.worker_state import State
from tests.core.processes.test_assigning import Stage, end, frames, ids, new_worker, stage
from tests.support.fake_worker import new_task
from tests.support.stale import SeeminglyFilledDeque
from tests.support.systems import needs_tickets
from tests.support.waiting import LIMIT

__all__ = ["new_worker", "stage"]  # fixtures


@pytest.mark.parametrize("step", ["next_task", "give"])
def test_an_exception_loses_neither_the_worker_nor_the_task(
    step: str, stage: Stage, new_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    If an exception interrupts assign(), the worker stays idle and the next assign() sends the task.

    A RecursionError or KeyboardInterrupt may occur in any thread that assigns a task.
    """

    def fail(*args: object) -> None:
        raise RecursionError

    worker = new_worker()
    stage.assigner.refill(worker.parent)
    stage.add("a")
    with monkeypatch.context() as patch:
        patch.setattr(stage.assigner if step == "next_task" else worker.parent, step, fail)
        with pytest.raises(RecursionError):
            stage.assigner.assign()
    assert worker.parent.state is State.IDLE
    assert stage.wakes == 1
    stage.assigner.assign()
    assert ids(worker) == ["a"]


def test_a_worker_with_a_half_sent_task_is_replaced(
    stage: Stage, new_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    worker = new_worker()
    stage.assigner.refill(worker.parent)
    stage.add("a")
    with monkeypatch.context() as patch:
        patch.setattr(worker.parent.connection, "send", fail, raising=False)
        patch.setattr(WorkerProcess, "_send", fail)
        with pytest.raises(KeyboardInterrupt):
            stage.assigner.assign()
    stage.assigner.assign()
    assert worker.sock.recv(1) == b"", "the pool has not closed the worker's socket"


def test_a_task_cancelled_while_it_was_sent_is_stopped(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.assigner.refill(worker.parent)
    [task] = stage.add("a")
    task.is_cancelled = True
    stage.assigner.assign()
    assert stage.stopped == ["a"]
    assert ids(worker) == ["a"]


def test_a_cancelled_task_that_is_put_back_fails(stage: Stage) -> None:
    task = new_task("a")
    assert task.claim()
    task.is_cancelled = True
    stage.assigner.requeue(task)
    assert stage.failed == ["a"]


@needs_tickets
def test_tasks_put_back_while_they_are_shared_are_assigned(stage: Stage, new_worker: Any) -> None:
    """
    share() gives the idle worker a later task if the busy worker has already begun the next one.
    """
    busy, idle = new_worker(), new_worker()
    stage.add(*"abcd")
    stage.assigner.refill(busy.parent)
    assert ids(busy) == ["a", "b", "c", "d"]
    assert busy.reader.take(1)
    stage.assigner.refill(idle.parent)
    stage.assigner.share([busy.parent])
    assert ids(busy) == ["a", "b"]
    assert ids(idle) == ["c"]
    assert stage.waiting == ["d"]
    assert frames(idle)[0] == ("c", 0)


@needs_tickets
def test_nothing_is_to_be_taken_back_from_a_worker_with_one_task(
    stage: Stage, new_worker: Any
) -> None:
    worker = new_worker()
    first, second = stage.add("a", "b")
    stage.assigner.refill(worker.parent)
    assert worker.parent.recall_at is not None
    stage.assigner.recall(worker.parent, second)
    assert ids(worker) == [first.id]
    assert worker.parent.recall_at is None
    end(stage, worker)


def test_a_task_published_while_it_was_claimed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Race: enqueue() may publish a task while close() holds its claim; fail_waiting() then retries.

    enqueue() cannot fail a task that another thread has claimed.
    """
    task = new_task("a")
    calls: list[int] = []

    def fail_waiting(pool: object, record: Any, error: BaseException) -> bool:
        calls.append(1)
        if len(calls) == 1:
            record.position = 0  # as if another thread published the task
            return False
        return True

    monkeypatch.setattr(pool_module.Pool, "fail_waiting", fail_waiting)
    made = object.__new__(pool_module.ProcessPool)
    assert made.fail_waiting(task, TaskLost())
    assert len(calls) == 2


def test_a_worker_is_not_idle_while_another_thread_gives_it_a_task(
    stage: Stage, new_worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    recall() waits until give() in another thread has appended the task, so the worker stays BUSY.
    """
    worker = new_worker()
    sending, go_on = threading.Event(), threading.Event()
    send = WorkerProcess._send

    def slow_send(self: WorkerProcess, tasks: Any) -> None:
        sending.set()
        assert go_on.wait(LIMIT)
        send(self, tasks)

    monkeypatch.setattr(WorkerProcess, "_send", slow_send)
    task = new_task("a")
    assert task.claim()
    giver = threading.Thread(target=worker.parent.give, args=([task],))
    giver.start()
    assert sending.wait(LIMIT)
    recaller = threading.Thread(target=worker.parent.recall)
    recaller.start()
    go_on.set()
    giver.join(LIMIT)
    recaller.join(LIMIT)
    assert worker.parent.state is State.BUSY
    assert ids(worker) == ["a"]


def test_two_threads_recover_the_same_interrupted_call(stage: Stage, new_worker: Any) -> None:
    """A thread that finds the last entry taken goes on and gives the waiting task to a worker."""
    worker = new_worker()
    stage.assigner.refill(worker.parent)
    stage.assigner._interrupted = SeeminglyFilledDeque()
    stage.add("a")
    stage.assigner.assign()
    assert ids(worker) == ["a"]


def test_tasks_wait_while_workers_with_former_settings_are_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until the workers are replaced, another thread does not take the new settings as sent."""
    watches: list[object] = []
    pool = ProcessPool(object, "default", ProcessOptions(max_workers=1))

    class FakeDispatcher:
        """A dispatcher whose workers are about to be replaced."""

        def replace_workers(self, settings: object) -> None:
            watches.append(pool._watch)

    monkeypatch.setattr(pool_module, "refuse_databases_in_memory", lambda: None)
    pool._update_settings()
    former = pool._watch
    pool._dispatcher = FakeDispatcher()  # type: ignore[assignment]
    with override_settings(MEDIA_ROOT="another folder"):
        pool._update_settings()
        pool._update_settings()
    assert watches == [former]
    assert pool._watch is not former
