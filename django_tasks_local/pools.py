"""
One pool per backend alias and process. What threads and processes share is written here.

    enqueue()            a worker                         a worker
    ---------            --------                         --------
    results.add
    hub: enqueued        pool.begin(job)                  pool.finish(job, outcome)
    task_enqueued  --->  results.start  --> the task -->  results.finish
    pool._submit(job)    hub: started                     hub: finished
                         task_started                     task_finished
                                                          results.settle (evicts the oldest)

A subclass says how a job gets to a worker and how a running one is stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from django.core.signals import setting_changed
from django.dispatch import receiver
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started

from . import shutdown
from .exceptions import TaskCancelled, TaskLost
from .execution import Outcome
from .forking import reset_in_child
from .hub import hub
from .lifecycle import Publication
from .positions import Positions
from .progress.reporter import Reporter, Reporting
from .queues import JobQueue
from .results import ResultStore

if TYPE_CHECKING:
    from datetime import datetime

    from django.dispatch import Signal
    from django.tasks import TaskResult

    from .cancellation import Cancellation
    from .conf import Options
    from .events import Progress

    type AnyResult = TaskResult[Any, Any]

logger = logging.getLogger(__name__)


class ProgressSource(Protocol):
    """Where the samples of a job's progress come from; a Reporter is one."""

    def close(self) -> tuple[int, Progress | None]:
        """Publish nothing any more; return the last sample's number and the final state."""


class Job(Reporting):
    """One unfinished task of a pool: an entry of its queue, or what a worker does now."""

    __slots__ = (
        "_task_result",
        "args",
        "cancellation",
        "has_ended",
        "id",
        "interval",
        "kwargs",
        "lock",
        "path",
        "position",
        "progress_source",
        "publication",
        "reporter",
        "result_id",
        "running",
        "task",
    )

    def __init__(self, task_result: AnyResult, interval: float, running: Any = None) -> None:
        self.id = self.result_id = task_result.id
        self.take_arguments(task_result)
        self.interval = interval
        self.lock = threading.RLock()
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        self.has_ended = False
        self.path = task_result.task.module_path
        self.publication = Publication(task_result)
        # How many tasks waited before it when that was last told. Set by enqueue(), then only by
        # Positions.
        self.position = 0
        # Set before it begins: where its progress comes from if not from its Reporter, and what
        # the pool needs to stop it.
        self.progress_source: ProgressSource | None = None
        self.running = running

    def take_arguments(self, task_result: AnyResult) -> None:
        """Keep the running result, for execute()."""
        self._task_result = task_result
        self.task = task_result.task
        self.args = task_result.args
        self.kwargs = task_result.kwargs

    def task_result(self) -> AnyResult:
        """See Runnable."""
        return self._task_result

    @property
    def is_finished(self) -> bool:
        """See Reporting."""
        return self.has_ended

    def report(self, number: int, progress: Progress) -> None:
        """See Reporting."""
        self.publication.progress(number, progress)

    def close_source(self) -> tuple[int, Progress | None]:
        """See ProgressSource."""
        if self.progress_source is not None:
            return self.progress_source.close()
        with self.lock:
            self.has_ended = True
            return self.close_progress()


class Pool[OptionsT: Options](ABC):
    """
    The queue, the workers and the results of one backend alias.

    Starts nothing until the first task. Methods may be called from any thread.
    """

    def __init__(self, sender: type, alias: str, options: OptionsT) -> None:
        self.sender = sender  # of the signals: the backend's class
        self.alias = alias
        self.options = options
        unfinished = None
        if options.max_pending is not None:
            unfinished = options.max_pending + options.max_workers
        self.results = ResultStore(
            alias=alias, max_results=options.max_results, max_unfinished=unfinished
        )
        self.queue: JobQueue[Job] = JobQueue()  # what no worker has taken, and nobody cancelled
        # Guards `closed`, so that no task slips in behind close(). The entries of `_jobs` need no
        # lock: each is put in once and taken out once, which is atomic.
        self._lock = threading.Lock()
        self._job_ended = threading.Condition()
        self._waiters = 0  # who wait for `_job_ended`, which guards this
        self._jobs: dict[str, Job] = {}
        self._positions = Positions(self.queue, self._jobs)
        self.closed = False
        self._discarded = False

    # How a job gets to a worker

    def _prepare(self, task_result: AnyResult) -> Any:  # noqa: B027 - it may have nothing to do
        """
        Return what `Job.running` starts as. Called by enqueue(), in the caller's thread.

        Raises what must keep the task from being enqueued: nothing is stored yet.
        """

    @abstractmethod
    def _submit(self, job: Job) -> None:
        """Queue a job. Called by enqueue(), in the caller's thread."""

    @abstractmethod
    def _stop(self, job: Job) -> None:
        """Stop a job that a worker has begun. Called from any thread."""

    @abstractmethod
    def close_workers(self) -> None:
        """Let idle workers end, and stop busy ones if possible: the last part of close()."""

    # The life of a task

    def enqueue(self, task_result: AnyResult) -> AnyResult:
        """
        Store and queue a new task result; return a snapshot of it.

        Raises QueueFull when MAX_PENDING tasks wait, and RuntimeError after close().
        """
        job = Job(task_result, self.options.progress_interval, self._prepare(task_result))
        with self._lock:
            if self.closed or not shutdown.register(self):
                raise RuntimeError(
                    f"The task backend {self.alias!r} is shutting down; "
                    f"task {job.path} was not enqueued."
                )
            self.results.add(task_result)
            self._jobs[job.result_id] = job
            # In here, so that close() in another thread cannot end it before it was published.
            job.position = len(self.queue)
            job.publication.enqueued(job.position, hold=True)
        try:
            self._send(task_enqueued, task_result)
        finally:
            # Whatever a receiver did, the task is in the store and must run.
            self._submit(job)
            if job.result_id not in self._jobs:
                self.queue.discard(job)  # It was cancelled before it was in the queue.
        if job.position:
            self._queue_moved()  # What was before it may have begun, or was cancelled, meanwhile.
        return task_result

    def begin(
        self, job: Job, worker_id: str, started_at: datetime | None = None
    ) -> AnyResult | None:
        """
        A worker has taken the job: return the running result, or None if there is nothing to do.

        Called in the worker's thread, or in the thread that speaks for a worker process, which
        knows when the job was `started_at`.
        """
        task_result = self.results.start(job.result_id, worker_id, started_at)
        if task_result is not None:
            job.publication.started(task_result)
            self._queue_moved()
            self._send_safely(task_started, task_result)
        return task_result

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """Record how a job ended. The first outcome counts; False: there was one already."""
        task_result = self.results.finish(job.result_id, outcome.return_value, outcome.error)
        if task_result is None:
            logger.info(
                "Task id=%s path=%s had an outcome already; what came later is dropped.",
                job.result_id,
                job.path,
            )
            return False
        self._finished(job, task_result, outcome)
        return True

    def cancel(self, result_id: str) -> bool:
        """
        Cancel a task; False when it has finished already. See `django_tasks_local.cancel()`.

        Raises TaskResultDoesNotExist.
        """
        if self.results.get(result_id).is_finished:
            return False
        job = self._jobs.get(result_id)
        if job is None:  # It has finished in this very moment.
            return False
        if self.fail_waiting(job, TaskCancelled("The task was cancelled before it started.")):
            return True
        try:
            if self.results.get(result_id).is_finished:
                return False  # Somebody else has cancelled it in the meantime, or it was lost.
        except TaskResultDoesNotExist:
            return False  # ... and it has been evicted since.
        self._stop(job)
        return True

    def close(self, timeout: float | None = None) -> None:
        """
        Refuse new tasks, fail the waiting ones, and give the running ones `timeout` seconds.

        Whatever is unfinished then is FAILED with TaskLost, and named in one log record. Without
        `timeout` it is the option SHUTDOWN_TIMEOUT. A closed pool stays closed.
        """
        self.refuse()
        self.drain(self.options.shutdown_timeout if timeout is None else timeout)
        self.close_workers()

    def refuse(self) -> None:
        """Refuse new tasks and fail the waiting ones: the first part of close()."""
        with self._lock:
            self.closed = True
        jobs = list(self._jobs.values())
        message = "The process ended before the task started."
        self._log_lost([job for job in jobs if self.fail_waiting(job, TaskLost(message))])

    def drain(self, timeout: float) -> None:
        """Let running tasks finish, and fail what still runs then: the second part of close()."""
        jobs = self.wait_until_idle(timeout)
        message = "The process ended before the task finished."
        lost = [job for job in jobs if self.finish(job, Outcome.failure(TaskLost(message)))]
        self._log_lost(lost)
        for job in lost:
            # Where the process lives on, a lost task must not run on for nobody.
            self._stop(job)

    def wait_until_idle(self, timeout: float) -> list[Job]:
        """
        Wait until no task is unfinished, receivers of task_finished included.

        Returns those that still are after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._job_ended:
            self._waiters += 1
            try:
                while self._jobs and (left := deadline - time.monotonic()) > 0:
                    self._job_ended.wait(left)
            finally:
                self._waiters -= 1
        return list(self._jobs.values())

    def discard(self) -> None:
        """Close at once and let the hub forget every task."""
        self.close(timeout=0)
        self._discarded = True
        for result_id in self.results.ids():
            # The end of some is recorded in another thread just now, and not published yet.
            if result_id not in self._jobs:
                hub.release(result_id)

    def fail_waiting(self, job: Job, error: BaseException) -> bool:
        """Fail a job that no worker has begun; False if one has. Called from any thread."""
        outcome = Outcome.failure(error)
        assert outcome.error is not None
        task_result = self.results.fail_waiting(job.result_id, outcome.error)
        if task_result is None:
            return False
        self._finished(job, task_result, outcome)
        # After it has left `_jobs`: if enqueue() has not queued it yet, it sees that it need not.
        self.queue.discard(job)
        self._queue_moved()
        return True

    def _queue_moved(self) -> None:
        if self.queue and not self.closed:
            self._positions.look()

    def _finished(self, job: Job, task_result: AnyResult, outcome: Outcome) -> None:
        number, progress = job.close_source()
        job.publication.finished(task_result, number, progress, outcome.message)
        self._send_finished(task_result, outcome)
        for result_id in self.results.settle(job.result_id):
            hub.release(result_id)
        del self._jobs[job.result_id]
        if self._discarded:
            hub.release(job.result_id)
        # Unlocked: who begins to wait from here on sees that the job has gone.
        if self._waiters:
            with self._job_ended:
                self._job_ended.notify_all()

    def _log_lost(self, jobs: list[Job]) -> None:
        if jobs:
            logger.warning(
                "The task backend %r was closed; these tasks are lost: %s",
                self.alias,
                ", ".join(f"{job.result_id} ({job.path})" for job in jobs),
            )

    def _send(self, signal: Signal, task_result: AnyResult) -> None:
        """Send a signal. An Exception is logged and harms nobody; SystemExit and the like pass."""
        try:
            signal.send_robust(sender=self.sender, task_result=task_result)
        except Exception:
            # Not a receiver's: that is logged by send_robust(). But it cannot call async receivers
            # in the thread of a running event loop.
            logger.exception("Not all receivers were called for task id=%s.", task_result.id)

    def _send_safely(self, signal: Signal, task_result: AnyResult) -> None:
        try:
            self._send(signal, task_result)
        except BaseException:
            # A SystemExit must not end a worker, nor keep a job from its end.
            logger.exception("A receiver failed for task id=%s.", task_result.id)

    def _send_finished(self, task_result: AnyResult, outcome: Outcome) -> None:
        exception, outcome.exception = outcome.exception, None
        if exception is None:
            self._send_safely(task_finished, task_result)
            return
        try:
            # Django's receiver logs sys.exc_info().
            raise exception
        except BaseException:  # noqa: BLE001 - it was raised two lines above
            self._send_safely(task_finished, task_result)


_pools: dict[tuple[type, str, Options], Pool[Any]] = {}
# Guards `_pools`, so that the first tasks of several threads find one pool.
_pools_lock = threading.Lock()


def pool_for(pool_class: type[Pool[Any]], sender: type, alias: str, options: Options) -> Pool[Any]:
    """Return the pool of a backend alias in this process, made at the first call."""
    key = (sender, alias, options)
    pool = _pools.get(key)
    if pool is None:
        with _pools_lock:
            pool = _pools.get(key)
            if pool is None:
                pool = _pools[key] = pool_class(sender, alias, options)
    return pool


@receiver(setting_changed, dispatch_uid="django_tasks_local.setting_changed")
def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    """Discard the pools when a test changes TASKS, as Django does with its backends."""
    if setting == "TASKS":
        with _pools_lock:
            pools = list(_pools.values())
            _pools.clear()
        for pool in pools:
            pool.discard()
            shutdown.unregister(pool)


@reset_in_child
def _start_anew() -> None:
    """In a child of fork(): the threads, the queue and the tasks are the parent's."""
    global _pools_lock
    _pools_lock = threading.Lock()
    _pools.clear()
