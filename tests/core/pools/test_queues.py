"""The queue of a pool: its order, and that threads may do with it what they like."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from django_tasks_local.queues import JobQueue


@dataclass
class Waiting:
    """A job as the queue sees it."""

    result_id: str
    position: int = 0


def test_order() -> None:
    queue: JobQueue[Waiting] = JobQueue()
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
    assert list(left) == [jobs[0], jobs[1], jobs[3], jobs[4]], "a copy"


def test_each_job_leaves_once_whoever_takes_it() -> None:
    queue: JobQueue[Waiting] = JobQueue()
    added = threading.Event()
    jobs = [Waiting(str(number)) for number in range(20_000)]
    kept = [job for number, job in enumerate(jobs) if number % 3]

    def add() -> None:
        try:
            for job in jobs:
                queue.append(job)
                if int(job.result_id) % 3 == 0:
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
        taken = [int(job.result_id) for taker in takers for job in taker.result()]
    assert len(taken) == len(set(taken))
    assert set(taken) >= {int(job.result_id) for job in kept}
