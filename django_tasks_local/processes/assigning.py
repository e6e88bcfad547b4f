"""
Which worker gets which task. Any thread may assign one: the thread that enqueues a task hands it to
an idle worker itself, so that this task need not wait for the dispatcher's thread.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ..exceptions import TaskLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..conf import ProcessOptions
    from ..pools.base import Pool
    from .task import ProcessTask
    from .worker_process import WorkerProcess


class Assigner:
    """The idle workers of a pool, and its waiting tasks. Methods may be called from any thread."""

    def __init__(self, pool: Pool[ProcessOptions, ProcessTask], wake: Callable[[], object]) -> None:
        self._pool = pool
        self._queue = pool.queue
        self._wake = wake  # the dispatcher's thread
        self._idle: list[WorkerProcess] = []  # Each step that changes it is atomic.

    def add_idle(self, worker: WorkerProcess) -> None:
        """Give a worker that is idle now a task, or let the next added task find it."""
        self._idle.append(worker)
        self.assign()

    def remove_idle(self, worker: WorkerProcess) -> None:
        """Forget a worker. A thread that has taken it finds that it is not idle any longer."""
        with suppress(ValueError):
            self._idle.remove(worker)

    def assign(self) -> None:
        """Give waiting tasks to idle workers."""
        idle, queue = self._idle, self._queue
        # Race: a thread may hold the last worker or the last task while another thread adds its
        # counterpart and finds the other list empty. So after a thread has put something back, it
        # checks both lists again.
        while idle and queue:
            try:
                worker = idle.pop()
            except IndexError:
                return
            task = self.next_task()
            if task is None or not task.claim():  # It was cancelled, or another thread has it.
                idle.append(worker)
            elif not worker.give(task):
                self.requeue(task)
                self._wake()  # The dispatcher must replace this worker.
            elif worker.has_unsent:
                self._wake()  # The dispatcher sends the rest.

    def next_task(self) -> ProcessTask | None:
        """Take the first task out of the queue."""
        try:
            return self._queue.popleft()
        except IndexError:
            return None

    def requeue(self, task: ProcessTask) -> None:
        """Put a claimed task that has not started back to the front of the queue."""
        # In this order, because a thread that finds a claimed task in the queue drops it.
        task.unclaim()
        self._queue.appendleft(task)
        if self._pool.closed:
            error = TaskLost("The process ended before the task started.")
            self._pool.fail_waiting(task, error)
        if task.is_finished:  # It was cancelled between the first two lines.
            self._queue.discard(task)
