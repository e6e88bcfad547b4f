"""The queue of a pool keeps its order, and any number of threads may use it concurrently."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest.mock import MagicMock

import pytest

from django_tasks_local.pools.queue import LockedTaskQueue, TaskQueue, make_queue


@dataclass
class Waiting:
    """A stand-in for a TaskRecord, of which the queue reads only the id."""

    id: str


@pytest.fixture(params=[TaskQueue, LockedTaskQueue])
def queue(request: pytest.FixtureRequest) -> Any:
    """Return an empty queue of each kind: for Python with a GIL, and for Python without a GIL."""
    return request.param()


def test_order(queue: Any) -> None:
    jobs = [Waiting(str(number)) for number in range(5)]
    for job in jobs[:3]:
        queue.append(job)
    first = queue.popleft()
    assert first is jobs[0]
    for job in jobs[3:]:
        queue.append(job)
    queue.appendleft(first)
    queue.discard(jobs[2])
    queue.discard(jobs[2])
    left = iter(queue)
    assert len(queue) == 4
    assert [queue.popleft() for _ in range(4)] == [jobs[0], jobs[1], jobs[3], jobs[4]]
    assert not queue
    with pytest.raises(IndexError):
        queue.popleft()
    assert list(left) == [jobs[0], jobs[1], jobs[3], jobs[4]], (
        "the iterator is not a copy of the queue"
    )


def test_a_task_put_back_while_another_thread_takes_it(queue: Any) -> None:
    """
    A task that another thread took can be put back; the queue then has it once.

    Race: another thread may take the task between the two steps of appendleft().
    """
    first = Waiting("first")
    queue.appendleft(first)
    taken = queue.popleft()
    queue.appendleft(taken)
    assert list(queue) == [first]


def test_each_task_leaves_once_in_any_interleaving(queue: Any) -> None:
    if type(queue) is TaskQueue and type(make_queue()) is LockedTaskQueue:
        pytest.skip("this Python has no GIL, so no pool uses a TaskQueue")
    added = threading.Event()
    jobs = [Waiting(str(number)) for number in range(20_000)]
    kept = [job for number, job in enumerate(jobs) if number % 3]

    def add() -> None:
        try:
            for job in jobs:
                queue.append(job)
                if int(job.id) % 3 == 0:
                    queue.discard(job)
        finally:
            added.set()

    def take() -> list[Waiting]:
        taken = []
        while not added.is_set() or queue:
            try:
                taken.append(queue.popleft())
            except IndexError:
                assert len(list(queue)) <= len(jobs)
        return taken

    with ThreadPoolExecutor(3) as threads:
        takers = [threads.submit(take) for _ in range(2)]
        threads.submit(add).result()
        taken = [int(job.id) for taker in takers for job in taker.result()]
    assert len(taken) == len(set(taken))
    assert set(taken) >= {int(job.id) for job in kept}


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(len, id="len"),
        pytest.param(list, id="copy"),
        pytest.param(lambda queue: queue.append(Waiting("a")), id="append"),
        pytest.param(lambda queue: queue.appendleft(Waiting("a")), id="appendleft"),
        pytest.param(lambda queue: queue.discard(Waiting("a")), id="discard"),
        pytest.param(lambda queue: queue.append(Waiting("a")) or queue.popleft(), id="popleft"),
    ],
)
def test_each_method_of_the_queue_without_a_gil_takes_its_lock(
    call: Callable[[Any], object],
) -> None:
    """The lock orders the queue and the flags of the pool, so no method may do without it."""
    queue: Any = LockedTaskQueue()
    lock = queue._lock = MagicMock()
    call(queue)
    assert lock.__enter__.called
