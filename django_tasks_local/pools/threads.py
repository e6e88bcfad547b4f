"""
ThreadPool: named daemon threads around one queue.

Not concurrent.futures: its interpreter-wide exit hook joins the threads and drains the backlog, so
five waiting 2-second tasks would hold up an exit for ten seconds.
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
from ..execution import execute
from ..execution.connections import (
    close_old_resources,
    close_thread_resources,
    drop_stale_connections,
)
from ..identifiers import new_id
from ..record import TaskRecord
from .base import Pool

if TYPE_CHECKING:
    from ..aliases import AnyTask

logger = logging.getLogger(__name__)


class ThreadPool(Pool[ThreadOptions, TaskRecord]):
    """Threads named `django-tasks-<alias>-<n>`, started when no idle one can take a task."""

    def __init__(self, sender: type, alias: str, options: ThreadOptions) -> None:
        super().__init__(sender, alias, options)
        self._pid = os.getpid()
        # Each entry wakes one idle worker.
        self._wake_ups: SimpleQueue[None] = SimpleQueue()
        # Guards what follows. Re-entrant, because a finalizer may enqueue while this thread holds
        # it. A worker takes it to become idle, not for every task.
        self._workers_lock = threading.RLock()
        self._workers = 0
        self._idle = 0
        # A worker is about to check the queue, and will call the next one.
        self._is_worker_coming = False
        self._stopping = False

    @override
    def count_workers(self) -> int:
        return self._workers

    @override
    def _make_record(self, task: AnyTask, args: list[Any], kwargs: dict[str, Any]) -> TaskRecord:
        return TaskRecord(
            task,
            new_id(),
            args,
            kwargs,
            self.alias,
            timezone.now(),
            self.options.progress_interval,
        )

    @override
    def _submit(self, record: TaskRecord) -> None:
        self.queue.append(record)
        # Unlocked: a worker resets the flag before it takes from the queue. If the flag is set
        # here, after the append, that worker finds the task.
        if self._is_worker_coming:
            return
        try:
            self._call_worker()
        except RuntimeError as error:
            logger.exception("The task backend %r has no worker.", self.alias)
            # Also fail tasks queued by other threads: they saw the flag and called no worker.
            for waiting in self.queue:
                self.fail_waiting(waiting, error)

    def _call_worker(self) -> None:
        """
        Have one more worker check the queue, unless one is about to.

        Waking a worker for each task would set all of them and the caller against each other for
        the GIL, over tasks that the first worker has done before the others are awake.

        Raises RuntimeError when there is no worker and the system has no thread for one.
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
        thread = threading.Thread(
            target=self._work, name=f"django-tasks-{self.alias}-{number}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            if not self._can_continue_after_failed_start():
                raise

    def _can_continue_after_failed_start(self) -> bool:
        """Continue with the workers that exist; False if there is none."""
        with self._workers_lock:
            self._is_worker_coming = False
            self._workers -= 1
            if not self._workers:
                return False
        logger.error("The system has no thread for one more worker of %r.", self.alias)
        if self.queue and self._idle:
            self._call_worker()
        return True

    @override
    def _stop(self, record: TaskRecord) -> None:
        record.get_cancellation().request()

    @override
    def close_workers(self) -> None:
        with self._workers_lock:
            self._stopping = True
            for _ in range(self._idle):
                self._wake_ups.put(None)
            self._idle = 0

    def _work(self) -> None:
        """Run tasks until the pool is closed. Runs in a worker thread."""
        worker_id = f"{threading.current_thread().name}@{os.getpid()}"
        self._arrived()
        while (record := self._next()) is not None:
            try:
                # A fresh context for every task: nothing leaks from one into the next.
                Context().run(self._run, record, worker_id)
            except BaseException:
                # Not from the task, whose errors are in its result, but an error of this package.
                # The worker continues.
                logger.exception("Task id=%s path=%s", record.id, record.path)
            del record  # It would live on while this thread waits.
        close_thread_resources()
        with self._workers_lock:
            self._workers -= 1

    def _next(self) -> TaskRecord | None:
        while True:
            try:
                record = self.queue.popleft()
            except IndexError:
                if not self._wait():
                    return None
                continue
            # Unlocked: a worker that is about to become idle checks the queue again.
            if (self._idle or self._workers < self.options.max_workers) and self.queue:
                self._call_worker()
            return record

    def _wait(self) -> bool:
        """Wait for a wake-up unless a task waits; False when this worker must end."""
        with self._workers_lock:
            if self.queue:
                return True
            if self._stopping:
                return False
            self._idle += 1
        if self.queue:
            # A finalizer has enqueued a task between the check above and `_idle += 1`.
            self._call_worker()
        self._wake_ups.get()
        self._arrived()
        close_old_resources()  # A connection may have become too old while this thread waited.
        return True

    def _arrived(self) -> None:
        with self._workers_lock:
            self._is_worker_coming = False

    def _run(self, record: TaskRecord, worker_id: str) -> None:
        drop_stale_connections()  # before the receivers of task_started
        if not self.begin(record, worker_id):
            return  # It was cancelled while it waited.
        outcome = execute(record)
        if os.getpid() != self._pid:
            # The task has forked, and this is its child. It has a copy of the queue, and would run
            # all tasks in it again.
            os._exit(0)
        self.finish(record, outcome)
        close_old_resources()  # after the receivers of task_finished
