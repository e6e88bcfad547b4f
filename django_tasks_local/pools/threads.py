"""
ThreadPool runs tasks in named daemon threads that take them from one queue.

It does not use concurrent.futures, whose exit hook joins the threads after they have run all queued
work: with one worker, five waiting 2-second tasks would delay the exit by ten seconds.
"""

from __future__ import annotations

import logging
import os
import threading
from contextvars import Context
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, override

from django.utils import timezone

from ..conf import ThreadOptions
from ..execution import Outcome, execute
from ..execution.connections import (
    close_old_resources,
    close_thread_resources,
    drop_stale_connections,
)
from ..identifiers import new_id
from ..logs import get_logger
from ..new_thread import new_thread
from ..record import TaskRecord
from ..time_limit import TimeLimit, timeout_error
from . import signals
from .base import Pool

if TYPE_CHECKING:
    from ..aliases import AnyTask
    from ..context import Carried

logger = get_logger(__name__)


class ThreadPool(Pool[ThreadOptions, TaskRecord]):
    """
    Runs tasks in threads named `django-tasks-<alias>-<n>`.

    It starts a thread when a task waits, no thread is idle and there are fewer than MAX_WORKERS.
    """

    def __init__(self, sender: type, alias: str, options: ThreadOptions) -> None:
        super().__init__(sender, alias, options)
        self._pid = os.getpid()
        # An entry in this queue wakes one idle worker.
        self._wake_ups: SimpleQueue[None] = SimpleQueue()
        # Guards the attributes below. It is re-entrant, because a finalizer may enqueue a task
        # while its thread holds this lock. A worker takes the lock to become idle and to call
        # another worker, but not for every task.
        self._workers_lock = threading.RLock()
        self._workers = 0
        self._idle = 0
        # True while a worker that was woken or started has not checked the queue yet. That worker
        # calls the next one if more tasks wait.
        self._is_worker_coming = False
        self._stopping = False

    @override
    def count_workers(self) -> int:
        return self._workers

    @override
    def _make_record(
        self, task: AnyTask, args: list[Any], kwargs: dict[str, Any], carried: Carried | None
    ) -> TaskRecord:
        return TaskRecord(
            task,
            new_id(),
            args,
            kwargs,
            self.alias,
            timezone.now(),
            self.options.progress_interval,
            carried,
        )

    @override
    def _submit(self, record: TaskRecord) -> None:
        self.queue.append(record)
        # The flag is read without the lock: a worker resets it before it takes a task from the
        # queue. If the flag is set at this point, after the append, that worker finds the task.
        # Without a GIL, the lock of LockedTaskQueue orders the append, the flag and the worker's
        # popleft() in the same way.
        if self._is_worker_coming:
            return
        try:
            self._call_worker()
        except RuntimeError as error:
            logger.exception("The task backend %r has no worker.", self.alias)
            # Fail the tasks of other threads too: those threads saw the flag and called no worker.
            for waiting in self.queue:
                self.fail_waiting(waiting, error)

    def _call_worker(self) -> None:
        """
        Wake an idle worker or start a new one, unless a worker is about to check the queue.

        If each task woke a worker, all workers and the caller would compete for the GIL, although
        the first worker finishes short tasks before the others are awake.

        Raises RuntimeError if the pool has no worker and the system cannot start a thread.
        """
        with self._workers_lock:
            if self._is_worker_coming:
                return
            if self._idle:
                self._idle -= 1
                self._is_worker_coming = True
                self._wake_ups.put(None)
                return
            if self._workers == self.options.max_workers:
                return
            number = self._workers
            self._workers += 1
            self._is_worker_coming = True
        thread = new_thread(f"django-tasks-{self.alias}-{number}", self._work)
        try:
            thread.start()
        except RuntimeError:
            if not self._can_continue_after_failed_start():
                raise

    def _can_continue_after_failed_start(self) -> bool:
        """
        Undo the failed start of a worker; return False if the pool has no other worker.

        If tasks wait and a worker is idle, that worker is woken in its place.
        """
        with self._workers_lock:
            self._is_worker_coming = False
            self._workers -= 1
            if not self._workers:
                return False
        logger.error("The system cannot start one more worker thread of %r.", self.alias)
        if self.queue and self._idle:
            self._call_worker()
        return True

    @override
    def _stop(self, record: TaskRecord) -> None:
        record.get_cancellation().request()

    @override
    def _send_started(self, record: TaskRecord) -> None:
        state = signals.started.state_for_receivers(record, logging.INFO)
        signals.send_started(self.sender, state, record.carried)

    @override
    def _send_finished(self, record: TaskRecord, outcome: Outcome) -> None:
        # The worker's thread calls the receivers itself, in the context of the task.
        self._completion.complete(record, outcome)

    @override
    def _close_workers(self) -> None:
        with self._workers_lock:
            self._stopping = True
            for _ in range(self._idle):
                self._wake_ups.put(None)
            self._idle = 0

    def _work(self) -> None:
        """Run tasks in a worker thread until the pool is closed and its queue is empty."""
        worker_id = f"{threading.current_thread().name}@{os.getpid()}"
        try:
            while not self._serve(worker_id):
                pass
            close_thread_resources()
        finally:
            with self._workers_lock:
                self._workers -= 1
                self._is_worker_coming = False
            if self.queue and not self._stopping:
                self._call_worker()

    def _serve(self, worker_id: str) -> bool:
        """
        Run tasks until this worker must end; then return True. Return False after an error.

        execute() stores the errors of a task in its outcome. Any other error may be one of this
        package, of a database connection or of a cache; or another thread has raised an exception
        in this thread with PyThreadState_SetAsyncExc(). The worker fails its task and continues.
        """
        record = None
        try:
            self._arrived()
            while (record := self._next()) is not None:
                # Each task runs in a new context, so its context variables do not leak into the
                # next task of this thread.
                Context().run(self._run, record, worker_id)
                record = None  # Otherwise this thread would keep the record alive while it waits.
        except BaseException as error:
            logger.exception("An error in the worker thread %s.", worker_id)
            if record is not None and not record.is_finished:
                self.finish(record, Outcome.failure(error))
            return False
        return True

    def _next(self) -> TaskRecord | None:
        while True:
            try:
                record = self.queue.popleft()
            except IndexError:
                record = None
            # Wait outside of the `except` block, so that the IndexError does not become __context__
            # of an error that _wait() logs.
            if record is None:
                if not self._wait():
                    return None
                continue
            # These counts are read without the lock: if a worker becomes idle concurrently, _wait()
            # checks the queue again and that worker takes the waiting task.
            if (self._idle or self._workers < self.options.max_workers) and self.queue:
                self._call_worker()
            return record

    def _wait(self) -> bool:
        """Wait for a wake-up unless a task waits; return False if this worker must end."""
        if self.queue:
            return True
        with self._workers_lock:
            if self._stopping:
                return False
            self._idle += 1
        if self.queue:
            # Race: another thread, or a finalizer in this one, may enqueue a task between the check
            # of the queue and `_idle += 1`, when no worker counts as idle. Wake a worker for it.
            self._call_worker()
        self._wake_ups.get()
        self._arrived()
        # A database connection may have passed its CONN_MAX_AGE while this thread waited.
        close_old_resources()
        return True

    def _arrived(self) -> None:
        with self._workers_lock:
            self._is_worker_coming = False

    def _run(self, record: TaskRecord, worker_id: str) -> None:
        drop_stale_connections()  # The receivers of task_started must not get a stale connection.
        if not self.begin(record, worker_id):
            return  # Another thread has cancelled the task or closed the pool.
        try:
            timeout = self.options.timeout
            outcome = execute(record) if timeout is None else self._execute(record, timeout)
        finally:
            if os.getpid() != self._pid:
                # This process is a child that the task has forked. It has a copy of the queue and
                # would run all queued tasks a second time, so it exits.
                os._exit(0)
        self.finish(record, outcome)
        close_old_resources()  # The receivers of task_finished may have opened connections.

    def _execute(self, record: TaskRecord, timeout: float) -> Outcome:
        """Run a task; cancel it after `timeout` seconds, and fail it if it has noticed that."""
        cancellation = record.get_cancellation()
        has_expired = False

        def expire() -> None:
            nonlocal has_expired
            if cancellation.requested:
                return  # cancel() was called before.
            has_expired = True
            cancellation.request()
            # The notifier writes the log record, because the ticker must not wait for a handler.
            self.notifier.post(
                record.id,
                Context(),
                logger.warning,
                "Task id=%s path=%s takes longer than TIMEOUT = %s seconds. It was cancelled, but "
                "occupies a worker thread until it ends.",
                record.id,
                record.path,
                timeout,
            )

        time_limit = TimeLimit(timeout, expire)
        try:
            outcome = execute(record)
        finally:
            time_limit.stop()
        if has_expired and cancellation.delivered:
            outcome.drop_exception()
            return Outcome.failure(timeout_error(timeout))
        return outcome
