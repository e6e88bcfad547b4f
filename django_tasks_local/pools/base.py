"""
Pool: the life of a task, from enqueue() to its outcome. Threads and processes share it.

    enqueue()            a worker                          a worker
    ---------            --------                          --------
    store.add
    record.enqueue       pool.begin(record)                pool.finish(record, outcome)
    task_enqueued  --->  record.start  --> the task -->    record.succeed or record.fail
    pool._submit         task_started                      task_finished
                                                           store.make_evictable

A subclass defines how a task reaches a worker and how a running one is stopped.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from .. import shutdown
from ..exceptions import TaskCancelled, TaskLost
from ..execution import Outcome
from ..hub import hub
from ..record import READY, RUNNING, TaskRecord
from . import signals
from .positions import Positions
from .queue import TaskQueue, make_queue
from .statistics import PoolStatistics
from .store import ResultStore
from .unfinished import UnfinishedTasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from ..aliases import AnyResult, AnyTask
    from ..conf import Options
    from ..events import Progress

logger = logging.getLogger(__name__)


class Pool[OptionsT: Options, RecordT: TaskRecord](ABC):
    """
    The queue, the workers and the results of one backend alias.

    Starts nothing until the first task. Methods may be called from any thread.
    """

    def __init__(self, sender: type, alias: str, options: OptionsT) -> None:
        self.sender = sender  # of the signals: the backend's class
        self.alias = alias
        self.options = options
        self.closed = False
        # Another pool serves the alias: TASKS has changed, or this process is a child of fork().
        self.is_replaced = False
        unfinished = None
        if options.max_pending is not None:
            unfinished = options.max_pending + options.max_workers
        self.results = ResultStore(
            alias=alias, max_results=options.max_results, max_unfinished=unfinished
        )
        # The tasks that no worker has taken and nobody has cancelled.
        self.queue: TaskQueue[RecordT] = make_queue()
        # A task is in here from enqueue() until the receivers of task_finished have returned.
        self._unfinished: UnfinishedTasks[RecordT] = UnfinishedTasks()
        self._positions = Positions(
            self.queue, self._unfinished, count_ahead=self.waiting_in_workers
        )
        self._discarded = False

    # What a subclass defines

    @abstractmethod
    def _make_record(self, task: AnyTask, args: list[Any], kwargs: dict[str, Any]) -> RecordT:
        """
        Return the record of a new task. Called by enqueue(), in the caller's thread.

        Raises an exception if the task cannot be enqueued: nothing is stored at this point.
        """

    @abstractmethod
    def _submit(self, record: RecordT) -> None:
        """Queue a task. Called by enqueue(), in the caller's thread."""

    @abstractmethod
    def _stop(self, record: RecordT) -> None:
        """Stop a task that a worker has begun. Called from any thread."""

    @abstractmethod
    def close_workers(self) -> None:
        """End the idle workers, and stop the busy ones if possible: the last part of close()."""

    @abstractmethod
    def count_workers(self) -> int:
        """Return the number of workers, those that are starting or ending included."""

    def waiting_in_workers(self) -> int:
        """Return the number of tasks that wait outside of the queue, before all tasks in it."""
        return 0

    def _call_receivers(self, send: Callable[..., object], *args: object) -> None:
        """Call receivers of a signal. A subclass may prepare the thread for them."""
        send(*args)

    # The life of a task

    def enqueue(self, task: AnyTask, args: list[Any], kwargs: dict[str, Any]) -> AnyResult:
        """
        Store and queue a new task; return a snapshot of its result.

        `args` and `kwargs` are normalized to JSON and belong to the pool. Raises QueueFull when
        MAX_PENDING tasks wait, and RuntimeError after close().
        """
        record = self._make_record(task, args, kwargs)
        # The second check: register() may register a pool that was closed in between.
        if self.closed or not shutdown.register(self) or self.closed:
            raise RuntimeError(
                f"The task backend {self.alias!r} is shutting down; "
                f"task {record.path} was not enqueued."
            )
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
            # Also after an exception: the task is in the store, so it must run.
            if self.closed:
                # Race: another thread may close the pool after the check above. Its refuse() fails
                # the tasks that it finds in `_unfinished` after record.enqueue(), this line others.
                self.lose_waiting([record])
            else:
                self._submit(record)
                if record.id not in self._unfinished:
                    self.queue.discard(record)  # It was cancelled before it was in the queue.
        if position:
            self.queue_changed()  # A task before it may have started or been cancelled.
        return task_result

    def begin(self, record: RecordT, worker_id: str, started_at: datetime | None = None) -> bool:
        """
        Note that a worker has taken the task; False if the task must not run.

        Called in the worker's thread, or in the thread that serves a worker process, which knows
        when the task was `started_at`.
        """
        if not record.start(worker_id, started_at):
            return False
        self.queue_changed()
        signals.started.deliver(self.sender, record, logging.INFO, self._call_receivers)
        return True

    def finish(
        self,
        record: RecordT,
        outcome: Outcome,
        last: tuple[int, Progress | None] | None = None,
    ) -> bool:
        """
        Record the outcome of a task. The first outcome counts; False if there was one.

        `last` is the last sample of the progress and its number, if another process reported it.
        """
        if outcome.error is None:
            is_first = record.succeed(outcome.return_value, last)
        else:
            is_first = record.fail(outcome.error, outcome.message, last)
        if is_first:
            self._finished(record, outcome)
        else:
            logger.info(
                "Task id=%s path=%s had an outcome already; a later one is dropped.",
                record.id,
                record.path,
            )
        return is_first

    def cancel(self, result_id: str) -> bool:
        """
        Cancel a task; False when it has finished already. See `django_tasks_local.cancel()`.

        Raises TaskResultDoesNotExist.
        """
        self.results.get(result_id)
        record = self._unfinished.get(result_id)
        if record is None or record.is_finished:  # None: its receivers have returned as well.
            return False
        if self.fail_waiting(record, TaskCancelled("The task was cancelled before it started.")):
            return True
        if record.is_finished:
            return False  # Another thread has cancelled it concurrently, or it was lost.
        self._stop(record)
        return True

    def fail_waiting(self, record: RecordT, error: BaseException) -> bool:
        """Fail a task that no worker has begun; False if one has. Called from any thread."""
        outcome = Outcome.failure(error)
        assert outcome.error is not None
        if not record.fail(outcome.error, outcome.message, only_waiting=True):
            return False
        self._finished(record, outcome)
        # After the task has left `_unfinished`: if enqueue() has not queued it yet, enqueue() takes
        # it out of the queue again.
        self.queue.discard(record)
        self.queue_changed()
        return True

    # The end

    def close(self, timeout: float | None = None) -> None:
        """
        Refuse new tasks, fail the waiting ones, and give the running ones `timeout` seconds.

        Tasks that are unfinished then are FAILED with TaskLost and named in one log record. The
        default of `timeout` is the option SHUTDOWN_TIMEOUT. A closed pool stays closed.
        """
        self.refuse()
        self.drain(self.options.shutdown_timeout if timeout is None else timeout)
        self.close_workers()

    def refuse(self) -> None:
        """Refuse new tasks and fail the waiting ones: the first part of close()."""
        self.closed = True
        self.lose_waiting(self._unfinished.records())

    def drain(self, timeout: float) -> None:
        """Let running tasks finish for `timeout` seconds, then fail them: the second part."""
        records = self.wait_until_idle(timeout)
        message = "The process ended before the task finished."
        lost = [r for r in records if self.finish(r, Outcome.failure(TaskLost(message)))]
        _log_lost(self.alias, lost)
        for record in lost:
            # If the process goes on, a lost task must not keep its worker.
            self._stop(record)

    def wait_until_idle(self, timeout: float) -> list[RecordT]:
        """
        Wait until no task is unfinished, and receivers of task_finished have returned.

        Returns the tasks that are unfinished after `timeout` seconds.
        """
        return self._unfinished.wait_until_empty(timeout)

    def discard(self) -> None:
        """Close at once and let the hub forget every task."""
        self.close(timeout=0)
        self._discarded = True
        for record in self.results.records():
            # Another thread may be about to publish the end of an unfinished one; it releases it.
            if record.id not in self._unfinished:
                hub.release(record)

    def statistics(self) -> PoolStatistics:
        """Return the present counts. They are read one after the other, without a lock."""
        unfinished = [(record.status, record.enqueued_at) for record in self._unfinished.records()]
        waiting = [enqueued_at for status, enqueued_at in unfinished if status is READY]
        return PoolStatistics(
            workers=self.count_workers(),
            waiting=len(waiting),
            running=sum(status is RUNNING for status, _ in unfinished),
            unfinished=len(unfinished),
            oldest_waiting=min(waiting, default=None),
            results=len(self.results),
        )

    # Helpers

    def queue_changed(self) -> None:
        """Have the positions of the waiting tasks published. Called from any thread."""
        if not self._positions.has_moved and self.queue and not self.closed:
            self._positions.schedule()

    def _finished(self, record: RecordT, outcome: Outcome) -> None:
        signals.send_finished(self.sender, record, outcome, self._call_receivers)
        for evicted in self.results.make_evictable(record):
            hub.release(evicted)
        self._unfinished.remove(record)
        if self._discarded:
            hub.release(record)

    def lose_waiting(self, records: list[RecordT]) -> None:
        """Fail tasks of a closed pool that have not started, and log their ids."""
        message = "The process ended before the task started."
        _log_lost(self.alias, [r for r in records if self.fail_waiting(r, TaskLost(message))])


def _log_lost(alias: str, records: Sequence[TaskRecord]) -> None:
    if records:
        logger.warning(
            "The task backend %r was closed; these tasks are lost: %s",
            alias,
            ", ".join(f"{record.id} ({record.path})" for record in records),
        )
