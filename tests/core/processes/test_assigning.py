"""The Assigner decides which worker gets which task; FakeWorkers replace the worker processes."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from django_tasks_local.pools.queue import make_queue
from django_tasks_local.processes.assigning import (
    AHEAD_SECONDS,
    MAX_AHEAD,
    MAX_AHEAD_SIZE,
    Assigner,
)
from django_tasks_local.processes.frames import FrameReader
from django_tasks_local.processes.task import ProcessTask
from django_tasks_local.processes.wire import decode_task, ticket_of
from django_tasks_local.processes.worker_process import PATIENCE
from django_tasks_local.processes.worker_state import State
from tests.support.fake_worker import FakeWorker, new_task
from tests.support.systems import needs_tickets

SHORT = AHEAD_SECONDS / 4


class Stage:
    """An Assigner with a stand-in for its pool; each test passes its own workers."""

    def __init__(self, max_tasks: int | None = None) -> None:
        self.failed: list[str] = []
        self.wakes = 0
        self.pool: Any = SimpleNamespace(
            queue=make_queue(),
            options=SimpleNamespace(max_tasks_per_worker=max_tasks),
            closed=False,
            fail_waiting=lambda task, error: self.failed.append(task.id),
            lose_waiting=lambda tasks: self.failed.extend(task.id for task in tasks),
            queue_changed=lambda: None,
        )
        self.stopped: list[str] = []
        self.assigner = Assigner(self.pool, self.wake, lambda task: self.stopped.append(task.id))

    def wake(self) -> None:
        """Count the calls with which the assigner wakes the dispatcher."""
        self.wakes += 1

    def add(self, *ids: str, size: int = 0) -> list[ProcessTask]:
        """
        Put a task with an argument of `size` characters into the queue for each id; return the
        tasks.
        """
        tasks = [new_task(id, "x" * size) for id in ids]
        for task in tasks:
            self.pool.queue.append(task)
        return tasks

    @property
    def waiting(self) -> list[str]:
        """Return the ids of the tasks in the queue."""
        return [task.id for task in self.pool.queue]


@pytest.fixture
def stage() -> Stage:
    """Return a Stage whose assigner has measured that the task takes SHORT seconds."""
    made = Stage()
    made.assigner.pace.note(new_task(), SHORT)
    return made


@pytest.fixture
def new_worker() -> Iterator[Callable[[], FakeWorker]]:
    """Return a function that creates a ready FakeWorker; close the workers after the test."""
    made: list[FakeWorker] = []

    def make() -> FakeWorker:
        made.append(FakeWorker())
        made[-1].parent.become_ready()
        return made[-1]

    yield make
    for worker in made:
        worker.close()


def ids(worker: FakeWorker) -> list[str]:
    """Return the ids of the tasks that the worker has been given and has not ended."""
    return [task.id for task in worker.parent.tasks]


def frames(worker: FakeWorker) -> list[tuple[str, int]]:
    """Return the id and the ticket of each task that arrives at the worker's end of the socket."""
    bodies = FrameReader().feed(worker.sock.recv(1 << 20))
    return [(decode_task(body).result_id, ticket_of(body)) for body in bodies]


def end(stage: Stage, worker: FakeWorker) -> None:
    """
    Start and end the worker's first task; refill the worker afterwards, as the dispatcher does.
    """
    worker.parent.start_first(None)
    worker.parent.end_first()
    stage.assigner.refill(worker.parent)


def test_an_idle_worker_waits_for_a_task(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.assigner.refill(worker.parent)
    assert worker.parent.state is State.IDLE
    [task] = stage.add("a")
    stage.assigner.assign()
    assert ids(worker) == ["a"]
    assert not task.claim(), "the assigner has not claimed the task"
    assert frames(worker) == [("a", 0)]


@needs_tickets
def test_short_tasks_are_sent_ahead_in_one_write(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.add(*"abcdef")
    stage.assigner.refill(worker.parent)
    # Four tasks of SHORT seconds take AHEAD_SECONDS, so the assigner sends no fifth task ahead.
    assert ids(worker) == ["a", "b", "c", "d"]
    assert stage.waiting == ["e", "f"]
    assert frames(worker) == [("a", 0), ("b", 1), ("c", 2), ("d", 3)]
    assert worker.parent.recall_at == worker.now + PATIENCE


@needs_tickets
def test_a_worker_has_a_limited_number_of_tasks(stage: Stage, new_worker: Any) -> None:
    stage.assigner.pace = type(stage.assigner.pace)()
    stage.assigner.pace.note(new_task(), 0.0)
    worker = new_worker()
    stage.add(*map(str, range(2 * MAX_AHEAD)))
    stage.assigner.refill(worker.parent)
    assert len(worker.parent.tasks) == MAX_AHEAD
    end(stage, worker)
    assert len(worker.parent.tasks) == MAX_AHEAD - 1, (
        "the worker was refilled before half of its tasks had ended"
    )
    for _ in range(MAX_AHEAD // 2 - 1):
        end(stage, worker)
    assert len(worker.parent.tasks) == MAX_AHEAD


def test_unknown_and_long_tasks_are_not_sent_ahead(new_worker: Any) -> None:
    stage, worker = Stage(), new_worker()
    stage.add("a", "b")
    stage.assigner.refill(worker.parent)
    assert ids(worker) == ["a"]
    assert stage.waiting == ["b"]
    assert worker.parent.recall_at is None
    stage.assigner.pace.note(new_task(), 2 * AHEAD_SECONDS)
    end(stage, worker)
    assert ids(worker) == ["b"]


@needs_tickets
def test_a_large_task_is_not_sent_ahead(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.add("a")
    stage.add("large", size=MAX_AHEAD_SIZE)
    stage.add("c")
    stage.assigner.refill(worker.parent)
    assert ids(worker) == ["a"]
    assert stage.waiting == ["large", "c"]
    end(stage, worker)
    assert ids(worker) == ["large", "c"]


@needs_tickets
def test_a_worker_without_tickets_is_sent_one_task(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    worker.parent.connection.tickets = None
    stage.add("a", "b")
    stage.assigner.refill(worker.parent)
    assert ids(worker) == ["a"]
    worker.parent.connection.tickets = worker.tickets


@needs_tickets
def test_no_more_tasks_than_a_worker_may_do(new_worker: Any) -> None:
    stage, worker = Stage(max_tasks=2), new_worker()
    stage.assigner.pace.note(new_task(), 0.0)
    stage.add(*"abcd")
    stage.assigner.refill(worker.parent)
    assert ids(worker) == ["a", "b"]


@needs_tickets
def test_a_cancelled_task_is_dropped(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    tasks = stage.add("a", "b", "c")
    assert tasks[0].claim()
    assert tasks[2].claim()
    stage.assigner.refill(worker.parent)
    assert ids(worker) == ["b"]
    assert stage.waiting == []


def test_recalled_tasks_wait_again_in_their_order(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    tasks = stage.add(*"abcde")
    stage.assigner.refill(worker.parent)
    worker.parent.start_first(None)
    stage.assigner.recall(worker.parent)
    assert ids(worker) == ["a"]
    assert stage.waiting == ["b", "c", "d", "e"]
    assert [task.sends for task in tasks] == [1, 0, 0, 0, 0]
    assert tasks[1].claim(), (
        "a recalled task must be unclaimed, so that it can be cancelled or sent again"
    )
    assert worker.parent.recall_at is None


@needs_tickets
def test_a_task_that_the_worker_has_begun_is_not_recalled(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.add(*"abcd")
    stage.assigner.refill(worker.parent)
    assert worker.reader.take(1)
    stage.assigner.recall(worker.parent)
    assert ids(worker) == ["a", "b"]
    assert stage.waiting == ["c", "d"]


@needs_tickets
def test_recall_up_to_a_task(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    tasks = stage.add(*"abcd")
    stage.assigner.refill(worker.parent)
    stage.assigner.recall(worker.parent, tasks[2])
    assert ids(worker) == ["a", "d"]
    assert stage.waiting == ["b", "c"]


@needs_tickets
def test_a_worker_without_a_begun_task_becomes_idle(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.add("a", "b")
    stage.assigner.refill(worker.parent)
    end(stage, worker)
    stage.assigner.recall(worker.parent)
    assert worker.parent.state is State.IDLE
    stage.assigner.assign()
    assert ids(worker) == ["b"]
    assert frames(worker) == [("a", 0), ("b", 1), ("b", 0)]
    assert not worker.reader.take(1), "the worker must skip the first of the two frames of task b"


@needs_tickets
def test_an_idle_worker_gets_what_was_sent_ahead_to_another_one(
    stage: Stage, new_worker: Any
) -> None:
    busy, idle = new_worker(), new_worker()
    stage.add("a", "b", "c")
    stage.assigner.refill(busy.parent)
    stage.assigner.refill(idle.parent)
    stage.assigner.share([busy.parent, idle.parent])
    assert ids(busy) == ["a", "c"]
    assert ids(idle) == ["b"]


@needs_tickets
def test_nothing_is_shared_if_no_worker_is_idle(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.add("a", "b")
    stage.assigner.refill(worker.parent)
    stage.assigner.share([worker.parent])
    assert ids(worker) == ["a", "b"]


def test_a_worker_that_cannot_be_given_a_task_loses_none(stage: Stage, new_worker: Any) -> None:
    worker, other = new_worker(), new_worker()
    stage.assigner.refill(other.parent)
    stage.assigner.refill(worker.parent)
    worker.parent.is_outdated = True
    stage.add("a")
    stage.assigner.assign()
    assert ids(other) == ["a"]
    assert stage.wakes == 1, "the assigner must wake the dispatcher, which replaces the worker"


def test_a_task_of_a_closed_pool_is_not_queued_again(stage: Stage) -> None:
    [task] = stage.add("a")
    assert stage.assigner.next_task() is task
    assert task.claim()
    stage.pool.closed = True
    stage.assigner.requeue(task)
    assert stage.failed == ["a"]


def test_the_dispatcher_sends_the_rest_of_a_long_task(stage: Stage, new_worker: Any) -> None:
    worker = new_worker()
    stage.assigner.refill(worker.parent)
    stage.add("long", size=5_000_000)
    stage.assigner.assign()
    assert worker.parent.connection.has_unsent
    assert stage.wakes == 1
