"""
Which worker gets which task.

An idle worker gets a task from any thread: the thread that enqueues a task hands it over itself, so
that this task need not wait for the dispatcher's thread.

A busy worker is sent further tasks ahead, by the dispatcher, if all that it has will take less than
AHEAD_SECONDS. Then one write and one read serve several tasks, and the worker need not wait between
two of them. Each task that was sent ahead has a ticket (see `tickets`), so it can be taken back and
given to another worker: if a task before it takes longer than expected, if another worker is idle,
if it is cancelled.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from ..exceptions import TaskCancelled
from .pace import Pace
from .worker_process import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..conf import ProcessOptions
    from ..pools.base import Pool
    from .task import ProcessTask
    from .worker_process import WorkerProcess

# Tasks that a worker has at a time, the running one included. 64 instead of 16 save 8 µs per task.
MAX_AHEAD = 64
AHEAD_SECONDS = 0.002  # that all of them together are expected to take
MAX_AHEAD_SIZE = 1 << 14  # bytes of one; a longer one would delay the result before it


class Assigner:
    """The idle workers of a pool, and its waiting tasks. For the dispatcher, if not stated."""

    def __init__(
        self,
        pool: Pool[ProcessOptions, ProcessTask],
        wake: Callable[[], object],
        stop: Callable[[ProcessTask], object],
    ) -> None:
        self._pool = pool
        self._queue = pool.queue
        self._max_tasks = pool.options.max_tasks_per_worker
        self._wake = wake  # wakes the dispatcher's thread
        self._stop = stop  # has the dispatcher stop a task
        self._idle: list[WorkerProcess] = []  # Each step that changes it is atomic.
        self.pace = Pace()

    def assign(self) -> None:
        """Give waiting tasks to idle workers. Called from any thread."""
        idle, queue = self._idle, self._queue
        # Race: a thread may hold the last worker or the last task while another thread adds its
        # counterpart and finds the other list empty. So after a thread has put something back, it
        # checks both lists again.
        while idle and queue:
            try:
                worker = idle.pop()
            except IndexError:
                return
            taken: list[ProcessTask] = []
            try:
                self._give_first(worker, taken)
            except BaseException:  # a RecursionError, or Ctrl-C in the thread that enqueues
                self._recover(worker, taken)
                raise

    def _give_first(self, worker: WorkerProcess, taken: list[ProcessTask]) -> None:
        """Give the first task of the queue to this worker; `taken` gets the task."""
        task = self.next_task()
        if task is None or not task.claim():  # It was cancelled, or another thread has it.
            self._idle.append(worker)
            return
        taken.append(task)
        if not worker.give([task]):
            self.requeue(task)
            self._wake()  # The dispatcher must replace this worker.
            return
        if task.is_cancelled:
            self._stop(task)
        if worker.connection.has_unsent:
            self._wake()  # The dispatcher sends the rest.

    def _recover(self, worker: WorkerProcess, taken: list[ProcessTask]) -> None:
        """Put back a worker and a task after an exception between their lists."""
        if worker.state is State.BUSY:
            # The task may have been sent in part. The worker reads the end of its socket and ends,
            # and the dispatcher requeues a task that has not started.
            worker.connection.stop_sending()
        for task in taken:
            if task not in worker.tasks and not task.is_finished and task not in self._queue:
                self.requeue(task)
        if worker.state is State.IDLE and worker not in self._idle:
            self._idle.append(worker)
        self._wake()

    def next_task(self) -> ProcessTask | None:
        """Take the first task out of the queue. Called from any thread."""
        try:
            return self._queue.popleft()
        except IndexError:
            return None

    def requeue(self, task: ProcessTask) -> None:
        """Put a claimed task back to the front of the queue. Called from any thread."""
        # In this order, because a thread that finds a claimed task in the queue drops it.
        task.unclaim()
        self._put_back(task)
        if self._pool.closed:
            self._pool.lose_waiting([task])
        elif task.is_cancelled:
            self._pool.fail_waiting(task, TaskCancelled("The task was cancelled."))
        self._pool.queue_changed()

    def _put_back(self, task: ProcessTask) -> None:
        self._queue.appendleft(task)
        if task.is_finished:  # It was cancelled before it was in the queue.
            self._queue.discard(task)

    def refill(self, worker: WorkerProcess) -> None:
        """Send waiting tasks to a worker that has ended one; without any, it may become idle."""
        try:
            is_idle = worker.state is State.IDLE
            tasks = self._choose(worker)
            if tasks and not (worker.give(tasks) if is_idle else worker.give_ahead(tasks)):
                for task in reversed(tasks):
                    self.requeue(task)
            for task in tasks:
                if task.is_cancelled:
                    self._stop(task)
        finally:
            if worker.state is State.IDLE:
                self._idle.append(worker)
        # Also for the tasks that were put back above, or by _choose().
        self.assign()

    def _choose(self, worker: WorkerProcess) -> list[ProcessTask]:
        """Return claimed tasks: one for an idle worker, and those that may be sent ahead."""
        has = len(worker.tasks)
        most = MAX_AHEAD if worker.connection.tickets is not None else 1
        if self._max_tasks is not None:
            most = min(most, self._max_tasks - worker.completed)
        if not self._queue or worker.connection.has_unsent or (has and has > most // 2):
            return []
        estimate = self.pace.estimate
        seconds_left = AHEAD_SECONDS - sum(map(estimate, worker.tasks))
        chosen: list[ProcessTask] = []
        while has + len(chosen) < most and (task := self.next_task()) is not None:
            seconds = estimate(task)
            is_ahead = has or chosen
            if is_ahead and (seconds > seconds_left or len(task.body) > MAX_AHEAD_SIZE):
                self._put_back(task)
                break
            if task.claim():
                chosen.append(task)
                seconds_left -= seconds
        return chosen

    def recall(self, worker: WorkerProcess, last: ProcessTask | None = None) -> None:
        """Requeue tasks that were sent ahead to a worker; with `last` only up to this one."""
        tasks = worker.recall(last)
        for task in reversed(tasks):
            self.requeue(task)
        if tasks and worker.state is State.IDLE:  # It was busy before.
            self._idle.append(worker)

    def share(self, workers: list[WorkerProcess]) -> None:
        """Give tasks that were sent ahead to idle workers."""
        for worker in workers:
            while self._idle and not self._queue and len(worker.tasks) > 1:
                sent_ahead = worker.tasks[1]
                self.recall(worker, sent_ahead)
                # Also if the worker has begun it: then the tasks after it were taken back.
                self.assign()
                if sent_ahead in worker.tasks:
                    break

    def remove_idle(self, worker: WorkerProcess) -> None:
        """Forget a worker. A thread that has taken it finds that it is not idle any longer."""
        with suppress(ValueError):
            self._idle.remove(worker)
