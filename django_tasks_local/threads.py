"""
A pool of named daemon threads around one queue.

Not concurrent.futures: its interpreter-wide exit hook joins the threads and drains the backlog, so
five waiting 2-second tasks would hold up an exit for ten seconds.
"""

from __future__ import annotations

import logging
import os
import threading
from contextvars import Context
from queue import SimpleQueue

from .conf import ThreadOptions
from .execution import execute
from .execution.connections import (
    close_old_resources,
    close_thread_resources,
    drop_stale_connections,
)
from .pools import Job, Pool

logger = logging.getLogger(__name__)


class ThreadPool(Pool[ThreadOptions]):
    """Threads named `django-tasks-<alias>-<n>`, started when no idle one can take a job."""

    def __init__(self, sender: type, alias: str, options: ThreadOptions) -> None:
        super().__init__(sender, alias, options)
        self._pid = os.getpid()
        self._bell: SimpleQueue[None] = SimpleQueue()  # wakes one idle worker
        # Guards what follows. A worker takes it to become idle, not for every job.
        self._workers_lock = threading.Lock()
        self._workers = 0
        self._idle = 0
        self._called = False  # A worker is on its way to the queue, and will call the next.
        self._stopping = False

    def _submit(self, job: Job) -> None:
        self.queue.append(job)
        try:
            self._call_worker()
        except RuntimeError as error:
            logger.exception("The task backend %r has no worker.", self.alias)
            # Those of other threads as well, which have seen that a worker was on its way.
            for waiting in self.queue:
                self.fail_waiting(waiting, error)

    def _call_worker(self) -> None:
        """
        Have one more worker look at the queue, unless one is on its way already.

        Waking a worker for each job would set all of them against each other and the caller for
        the GIL, over tasks that the first one had done before the others were awake.

        Raises RuntimeError when there is no worker and the system has no thread for one.
        """
        with self._workers_lock:
            if self._called:
                return
            if self._idle:
                self._idle -= 1
                self._called = True
                self._bell.put(None)
                return
            if self._workers == self.options.max_workers:
                return
            number = self._workers
            self._workers += 1
            self._called = True
        thread = threading.Thread(
            target=self._work, name=f"django-tasks-{self.alias}-{number}", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:
            if not self._start_failed():
                raise

    def _start_failed(self) -> bool:
        """Go on with the workers that are there; False if there are none."""
        with self._workers_lock:
            self._called = False
            self._workers -= 1
            if not self._workers:
                return False
        logger.error("The system has no thread for one more worker of %r.", self.alias)
        if self.queue and self._idle:
            self._call_worker()
        return True

    def _stop(self, job: Job) -> None:
        job.get_cancellation().request()

    def close_workers(self) -> None:
        with self._workers_lock:
            self._stopping = True
            for _ in range(self._idle):
                self._bell.put(None)
            self._idle = 0

    def _work(self) -> None:
        """Do jobs until the pool is closed. Runs in a worker thread."""
        worker_id = f"{threading.current_thread().name}@{os.getpid()}"
        self._arrived()
        while (job := self._next()) is not None:
            try:
                # A fresh context for every task: nothing leaks from one into the next.
                Context().run(self._run, job, worker_id)
            except BaseException:
                # Not from the task, whose errors are in its result: a mistake of ours. The worker
                # lives on.
                logger.exception("Task id=%s path=%s", job.result_id, job.path)
            del job  # It would live on while this thread waits.
        close_thread_resources()

    def _next(self) -> Job | None:
        while True:
            try:
                job = self.queue.popleft()
            except IndexError:
                if not self._wait():
                    return None
                continue
            # Unlocked on purpose: a worker that is about to become idle looks at the queue again.
            if self.queue and (self._idle or self._workers < self.options.max_workers):
                self._call_worker()
            return job

    def _wait(self) -> bool:
        """Wait for the bell unless there are jobs; False when this worker is to end."""
        with self._workers_lock:
            if self.queue:
                return True
            if self._stopping:
                return False
            self._idle += 1
        self._bell.get()
        self._arrived()
        close_old_resources()  # A connection may have become too old while this thread waited.
        return True

    def _arrived(self) -> None:
        with self._workers_lock:
            self._called = False

    def _run(self, job: Job, worker_id: str) -> None:
        drop_stale_connections()  # before the receivers of task_started
        task_result = self.begin(job, worker_id)
        if task_result is None:
            return  # It was cancelled while it waited.
        job.take_arguments(task_result)
        outcome = execute(job)
        if os.getpid() != self._pid:
            # The task has forked, and this is its child. It has a copy of the queue, and would do
            # all tasks in there once more.
            os._exit(0)
        self.finish(job, outcome)
        close_old_resources()  # after the receivers of task_finished
