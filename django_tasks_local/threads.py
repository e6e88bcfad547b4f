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
from queue import Empty, SimpleQueue

from .conf import ThreadOptions
from .execution import Cancellation, execute, tidy
from .pools import Job, Pool
from .progress import Reporter

logger = logging.getLogger(__name__)


class ThreadPool(Pool[ThreadOptions]):
    """Threads named `django-tasks-<alias>-<n>`, started when no idle one can take a job."""

    def __init__(self, sender: type, alias: str, options: ThreadOptions) -> None:
        super().__init__(sender, alias, options)
        self._queue: SimpleQueue[Job | None] = SimpleQueue()
        # Guards the two numbers. An idle thread is one that nobody has counted on yet.
        self._workers_lock = threading.Lock()
        self._workers = 0
        self._idle = 0

    def _submit(self, job: Job) -> None:
        self._queue.put(job)
        with self._workers_lock:
            if self._idle:
                self._idle -= 1
                return
            if self._workers == self.options.max_workers:
                return
            number = self._workers
            self._workers += 1
        threading.Thread(
            target=self._work, name=f"django-tasks-{self.alias}-{number}", daemon=True
        ).start()

    def _stop(self, job: Job) -> None:
        cancellation: Cancellation = job.running
        cancellation.request()

    def _close_workers(self) -> None:
        with self._workers_lock:
            for _ in range(self._workers):
                self._queue.put(None)

    def _work(self) -> None:
        """Do jobs until None comes. Runs in a worker thread."""
        worker_id = f"{threading.current_thread().name}@{os.getpid()}"
        while (job := self._next()) is not None:
            try:
                # A fresh context for every task: nothing leaks from one into the next.
                Context().run(self._run, job, worker_id)
            except BaseException:
                # Not from the task, whose errors are in its result: a mistake of ours. The worker
                # lives on.
                logger.exception("Task id=%s path=%s", job.result_id, job.path)
            del job  # It would live on while this thread waits.

    def _next(self) -> Job | None:
        try:
            return self._queue.get_nowait()
        except Empty:
            with self._workers_lock:
                self._idle += 1
            job = self._queue.get()
            tidy()  # A connection may have become too old while this thread waited.
            return job

    def _run(self, job: Job, worker_id: str) -> None:
        reporter = Reporter(job.publication.progress, self.options.progress_interval)
        job.reporter = reporter
        job.running = Cancellation(reporter)
        task_result = self.begin(job, worker_id)
        if task_result is None:
            return  # It was cancelled while it waited.
        self.finish(job, execute(task_result, reporter, job.running))
        tidy()  # after the receivers of task_finished
