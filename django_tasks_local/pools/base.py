"""
Pool leads a task from enqueue() to its outcome; the thread and the process pool inherit from it.

    enqueue()            a worker                          a worker
    ---------            --------                          --------
    store.add
    record.enqueue       pool.begin(record)                pool.finish(record, outcome)
    task_enqueued  --->  record.start  --> the task -->    record.succeed or record.fail
    pool._submit         task_started                      task_finished
                                                           store.make_evictable

A subclass defines how a task reaches a worker and how a running task is stopped.
"""

from __future__ import annotations

import logging
from sys import modules
from typing import TYPE_CHECKING, Any

from .. import shutdown
from ..context import carry
from ..databases import TEST_UTILS
from ..exceptions import ShuttingDown, TaskCancelled, TaskLost
from ..execution import Outcome
from ..hub import hub
from ..logs import get_logger
from ..notifier import Notifier
from ..record import TaskRecord
from . import signals
from .completion import Completion
from .positions import Positions
from .queue import TaskQueue, make_queue
from .statistics import PoolStatistics
from .store import ResultStore
from .unfinished import UnfinishedTasks
from .workers import PoolOfWorkers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from ..aliases import AnyResult, AnyTask
    from ..conf import Options
    from ..events import Progress

logger = get_logger(__name__)

# When SHUTDOWN_TIMEOUT has passed, drain() waits for this many more seconds until the notifier has
# called the receivers: they store that a task is lost.
RECEIVERS_SECONDS = 1.0


class Pool[OptionsT: Options, RecordT: TaskRecord](PoolOfWorkers[RecordT]):
    """
    A pool has the queue, the workers and the results of one backend alias.

    It starts no worker before the first task. Methods may be called from any thread.
    """

    def __init__(self, sender: type, alias: str, options: OptionsT) -> None:
        self.sender = sender  # The task signals are sent with this sender, the backend's class.
        self.alias = alias
        self.options = options
        self.closed = False
        self._context = options.context
        # True if the alias needs a new pool: close() has returned, TASKS has changed, or fork()
        # created this process.
        self.is_replaced = False
        self.results = ResultStore(
            alias=alias,
            max_results=options.max_results,
            max_unfinished=options.max_unfinished,
        )
        # The queue has the tasks that no worker has taken and no thread has cancelled.
        self.queue: TaskQueue[RecordT] = make_queue()
        # `_unfinished` has a task from enqueue() until the receivers of task_finished return.
        self._unfinished: UnfinishedTasks[RecordT] = UnfinishedTasks()
        self._positions = Positions(
            self.queue, self._unfinished, count_ahead=self.waiting_in_workers
        )
        self.notifier = Notifier(alias)
        self._completion = Completion(sender, self.results, self._unfinished, self.notifier)

    # Methods in the order in which a task passes through them

    def enqueue(
        self,
        task: AnyTask,
        args: list[Any],
        kwargs: dict[str, Any],
        retried_from: str | None = None,
    ) -> AnyResult:
        """
        Store and queue a new task; return a snapshot of its result.

        The caller has normalized `args` and `kwargs` to JSON and must not change them.
        `retried_from` is the id of the task that this one repeats. Raises QueueFull if MAX_PENDING
        + MAX_WORKERS tasks are unfinished, and ShuttingDown after refuse().
        """
        carried = None
        if TEST_UTILS in modules or self._context:
            carried = carry(self._context)
        record = self._make_record(task, args, kwargs, carried)
        if retried_from is not None:
            record.retried_from = retried_from
        # Race: another thread may close the pool before register(), so `closed` is read twice.
        if self.closed or not shutdown.register(self) or self.closed:
            raise _shutting_down(self.alias, record)
        self.results.add(record)
        position = 0
        try:
            self._unfinished.add(record)
            position = len(self.queue) + self.waiting_in_workers()
            record.enqueue(position)
            task_result = record.task_result()
            if signals.enqueued.has_receivers:
                signals.enqueued.send(self.sender, task_result)
            else:
                signals.enqueued.log(self.sender, record, logging.DEBUG)
        finally:
            # A task that is in the store must run, even if a receiver raised an exception above.
            if self.closed:
                # Race: another thread may close the pool after the check above. refuse() fails this
                # task only if record.enqueue() has set its position; otherwise this line fails it.
                self.lose_waiting([record])
            else:
                self._submit(record)
                if record.is_finished:
                    self.queue.discard(record)  # The task was cancelled before _submit() queued it.
        if position:
            self.queue_changed()  # A task ahead of this one may have started or been cancelled.
        return task_result

    def begin(self, record: RecordT, worker_id: str, started_at: datetime | None = None) -> bool:
        """
        Record that a worker has taken the task; return False if the task must not run.

        A worker thread calls this for itself. The dispatcher's thread calls it for a worker
        process, which reports the time `started_at`.
        """
        if not record.start(worker_id, started_at):
            return False
        self.queue_changed()
        self._send_started(record)
        return True

    def finish(
        self,
        record: RecordT,
        outcome: Outcome,
        last: tuple[int, Progress | None] | None = None,
    ) -> bool:
        """
        Record the outcome of a task; return False if the task already had an outcome, which stays.

        `last` is the number of the last progress sample, and the sample, from a worker process.
        """
        if outcome.error is None:
            is_first = record.succeed(outcome.return_value, last)
        else:
            is_first = record.fail(outcome.error, outcome.message, last)
        if is_first:
            self._send_finished(record, outcome)
        else:
            message = "Task id=%s path=%s had an outcome already; a later one is dropped."
            logger.info(message, record.id, record.path)
        return is_first

    def cancel(self, result_id: str) -> bool:
        """
        Cancel a task as `django_tasks_local.cancel()` does; return False if it has finished.

        Raises TaskResultDoesNotExist for an unknown id.
        """
        self.results.get(result_id)
        record = self._unfinished.get(result_id)
        if record is None or record.is_finished:  # None: receivers of task_finished have returned.
            return False
        if self.fail_waiting(record, TaskCancelled("The task was cancelled before it started.")):
            return True
        if record.is_finished:
            return False  # Another thread has cancelled the task or closed the pool concurrently.
        self._stop(record)
        return True

    def fail_waiting(self, record: RecordT, error: BaseException) -> bool:
        """Fail a task that no worker has begun; return False if one has, or it has an outcome."""
        outcome = Outcome.failure(error)
        assert outcome.error is not None
        if not record.fail(outcome.error, outcome.message, only_waiting=True):
            return False
        # If enqueue() queues the task after the line below, enqueue() finds that it is finished and
        # takes it out of the queue again.
        self.queue.discard(record)
        self._completion.post(record, outcome)
        self.queue_changed()
        return True

    # Methods that close the pool

    def close(self, timeout: float | None = None) -> None:
        """
        Refuse new tasks, fail the waiting ones, and give the running ones `timeout` seconds.

        Tasks that still run after that time fail with TaskLost, and one log record lists them. The
        default of `timeout` is the option SHUTDOWN_TIMEOUT. The next call of pool_for() replaces
        the closed pool by a new one, which keeps the results.
        """
        self.refuse()
        self.drain(self.options.shutdown_timeout if timeout is None else timeout)
        self.close_workers()
        self.is_replaced = True

    def refuse(self) -> None:
        """Refuse new tasks and fail the waiting ones. close() calls this as its first step."""
        self.closed = True
        self.lose_waiting(self._unfinished.records())

    def drain(self, timeout: float) -> None:
        """
        Wait `timeout` seconds for running tasks, then fail them; the second step of close().

        Receivers that have not returned by then get RECEIVERS_SECONDS more.
        """
        lost: list[tuple[RecordT, Outcome]] = []
        for record in self.wait_until_idle(timeout):
            outcome = Outcome.failure(TaskLost("The process ended before the task finished."))
            assert outcome.error is not None
            if record.fail(outcome.error, outcome.message):
                lost.append((record, outcome))
        _log_lost(self.alias, [record for record, _ in lost])
        for record, outcome in lost:
            self._completion.post(record, outcome)
            # The process may continue after close(), and a lost task must not occupy its worker.
            self._stop(record)
        self.wait_until_idle(RECEIVERS_SECONDS)

    def close_workers(self) -> None:
        """End the workers, and the notifier's threads; close() calls this as its last step."""
        try:
            self._close_workers()
        finally:
            self.notifier.close()

    def unfinished_tasks(self) -> list[RecordT]:
        """Return the tasks that have no outcome yet."""
        return [record for record in self._unfinished.records() if not record.is_finished]

    def wait_until_idle(self, timeout: float) -> list[RecordT]:
        """
        Wait until all tasks have finished and the receivers of task_finished have returned.

        Returns the tasks for which this is not the case after `timeout` seconds.
        """
        return self._unfinished.wait_until_empty(timeout)

    def discard(self) -> None:
        """Close the pool with a timeout of 0 seconds, and remove all of its tasks from the hub."""
        self.close(timeout=0)
        self._completion.discarded = True
        # While a task is in _unfinished, another thread will remove it. That thread calls release()
        # itself, because the pool is discarded. The copy is made before that of the results, and
        # after `discarded` is set: it locks the dict, so a thread that removes its task after the
        # copy reads the new `discarded`, also without a GIL.
        unfinished = set[TaskRecord](self._unfinished.records())
        for record in self.results.records():
            if record not in unfinished:
                hub.release(record)

    def take_results_of(self, closed: Pool[OptionsT, RecordT]) -> None:
        """Keep the results of the closed pool that this new pool replaces."""
        self.results = self._completion.results = closed.results

    def statistics(self) -> PoolStatistics:
        """Return the counts of this pool, which are read one after the other, without a lock."""
        records = self._unfinished.records()
        return PoolStatistics.of(records, self.count_workers(), len(self.results))

    # Methods that other methods of the pool call

    def queue_changed(self) -> None:
        """Schedule the publication of changed positions in the queue. Any thread may call this."""
        if not self._positions.has_moved and self.queue and not self.closed:
            self._positions.schedule()

    def lose_waiting(self, records: list[RecordT]) -> None:
        """Fail tasks of a closed pool that have not started, and log their ids."""
        message = "The process ended before the task started."
        _log_lost(self.alias, [r for r in records if self.fail_waiting(r, TaskLost(message))])


def _shutting_down(alias: str, record: TaskRecord) -> ShuttingDown:
    return ShuttingDown(
        f"The task backend {alias!r} is shutting down; task {record.path} was not enqueued."
    )


def _log_lost(alias: str, records: Sequence[TaskRecord]) -> None:
    if records:
        logger.warning(
            "The task backend %r was closed; these tasks are lost: %s",
            alias,
            ", ".join(f"{record.id} ({record.path})" for record in records),
        )
