"""
Decide which worker process gets which task.

Any thread may give a task to an idle worker: the thread that enqueues the task sends it itself, so
that the task need not wait for the dispatcher's thread.

The dispatcher sends further tasks ahead to a busy worker, if it expects all tasks of this worker to
take less than AHEAD_SECONDS together. Then one write and one read serve several tasks, and the
worker need not wait between two tasks. Each task that was sent ahead has a ticket (see
`tickets.py`). With it, the dispatcher takes the task back if a task before it takes longer than
expected, if another worker is idle, or if the task is cancelled.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from ..exceptions import TaskCancelled
from .pace import Pace
from .worker_state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..conf import ProcessOptions
    from ..pools.base import Pool
    from .task import ProcessTask
    from .worker_process import WorkerProcess

# The most tasks that a worker has at a time, with the running one. 64, not 16, saves 8 µs per task.
MAX_AHEAD = 64
# The dispatcher sends tasks ahead while it expects all tasks of the worker to take less than this.
AHEAD_SECONDS = 0.002
# bytes; a larger task is not sent ahead, because the worker decodes the message of a task before it
# sends the Result of the previous task.
MAX_AHEAD_SIZE = 1 << 14


class Assigner:
    """
    Gives the waiting tasks of a pool to its workers, and knows which workers are idle.

    Called from: the dispatcher's thread, unless a method states "any thread".
    """

    def __init__(
        self,
        pool: Pool[ProcessOptions, ProcessTask],
        wake: Callable[[], object],
        stop: Callable[[ProcessTask], object],
    ) -> None:
        self._pool = pool
        self._queue = pool.queue
        self._max_tasks = pool.options.max_tasks_per_worker
        self._wake = wake  # It wakes the dispatcher's thread.
        self._stop = stop  # It has the dispatcher stop the worker of a cancelled task.
        # Workers and tasks that a thread had taken out of their lists when an exception came.
        self._interrupted: deque[tuple[WorkerProcess, list[ProcessTask]]] = deque()
        self._idle: list[WorkerProcess] = []  # Unlocked: append(), pop() and remove() are atomic.
        self.pace = Pace()

    def assign(self) -> None:
        """Give waiting tasks to idle workers. Called from: any thread."""
        while self._interrupted:
            try:
                interrupted = self._interrupted.popleft()
            except IndexError:
                break  # Another thread has taken the last entry concurrently.
            self._recover(*interrupted)
        idle, queue = self._idle, self._queue
        # Race: while thread A holds the last idle worker, thread B may add a task and find no idle
        # worker (or the reverse). So after A has put its worker back, A checks both lists again.
        while idle and queue:
            try:
                worker = idle.pop()
            except IndexError:
                return
            taken: list[ProcessTask] = []
            try:
                self._give_first(worker, taken)
            except BaseException:  # a RecursionError, or Ctrl-C in the thread that enqueues
                # The next call recovers them, because the stack of this one may be exhausted.
                self._interrupted.append((worker, taken))
                self._wake()
                raise

    def _give_first(self, worker: WorkerProcess, taken: list[ProcessTask]) -> None:
        """Give the first waiting task to this worker, and append it to `taken` before that."""
        task = self.next_task()
        if task is not None:
            taken.append(task)
        if task is None or not task.claim():  # Another thread has sent or cancelled the task.
            taken.clear()
            self._idle.append(worker)
            return
        if not worker.give([task]):
            self.requeue(task)
            self._wake()  # The dispatcher must replace this worker.
            return
        if task.is_cancelled:
            self._stop(task)
        if worker.connection.has_unsent:
            self._wake()  # The dispatcher sends the unsent bytes.

    def _recover(self, worker: WorkerProcess, taken: list[ProcessTask]) -> None:
        """Put back the worker and the tasks that _give_first() had taken when it raised."""
        if worker.state is State.BUSY:
            # The task may have been sent in part. The worker reads the end of its socket and ends,
            # and the dispatcher requeues a task that has not started.
            worker.connection.stop_sending()
        for task in taken:
            if task not in worker.tasks and not task.is_finished and task not in self._queue:
                task.claim()  # The exception may have come before this.
                self.requeue(task)
        if worker.state is State.IDLE and worker not in self._idle:
            self._idle.append(worker)

    def next_task(self) -> ProcessTask | None:
        """Remove and return the first waiting task, or None. Called from: any thread."""
        try:
            return self._queue.popleft()
        except IndexError:
            return None

    def requeue(self, task: ProcessTask) -> None:
        """Put a claimed task back at the front of the queue. Called from: any thread."""
        # Unclaim the task first, because a thread that finds a claimed task in the queue drops it.
        task.unclaim()
        self._put_back(task)
        if self._pool.closed:
            self._pool.lose_waiting([task])
        elif task.is_cancelled:
            self._pool.fail_waiting(task, TaskCancelled("The task was cancelled."))
        self._pool.queue_changed()

    def _put_back(self, task: ProcessTask) -> None:
        self._queue.appendleft(task)
        if task.is_finished:  # cancel() found it outside of the queue.
            self._queue.discard(task)

    def refill(self, worker: WorkerProcess) -> None:
        """Send waiting tasks to a worker that has none or few; note it as idle if it gets none."""
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
        # Assign again, because this method or _choose() may have put tasks back into the queue.
        self.assign()

    def _choose(self, worker: WorkerProcess) -> list[ProcessTask]:
        """Claim and return tasks to send: one to run now if the worker is idle, others ahead."""
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
        """Requeue the tasks that were sent ahead to a worker; with `last`, only those up to it."""
        tasks = worker.recall(last)
        for task in reversed(tasks):
            self.requeue(task)
        if tasks and worker.state is State.IDLE:  # recall() made the worker idle.
            self._idle.append(worker)

    def share(self, workers: list[WorkerProcess]) -> None:
        """Take back tasks that were sent ahead to `workers`, and give them to idle workers."""
        for worker in workers:
            while self._idle and not self._queue and len(worker.tasks) > 1:
                sent_ahead = worker.tasks[1]
                self.recall(worker, sent_ahead)
                # If the worker has begun `sent_ahead`, recall() has taken back the tasks behind it.
                self.assign()
                if sent_ahead in worker.tasks:
                    break

    def remove_idle(self, worker: WorkerProcess) -> None:
        """Give no task to this worker. If another thread has popped it, give() returns False."""
        with suppress(ValueError):
            self._idle.remove(worker)
