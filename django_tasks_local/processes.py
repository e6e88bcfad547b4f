"""
A pool of worker processes, and what a task looks like on its way to one.

The thread that speaks with the workers is in `dispatcher`, the workers' side in `worker`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from . import shutdown, worker
from .conf import ProcessOptions
from .dispatcher import SENDS, Dispatcher, Parcel
from .exceptions import TaskLost
from .execution import Outcome
from .handover import database_names, refuse_databases_in_memory
from .pools import Job, Pool

if TYPE_CHECKING:
    from django.tasks import TaskResult

    type AnyResult = TaskResult[Any, Any]


class ProcessPool(Pool[ProcessOptions]):
    """Processes named `django-tasks-<alias>-<n>`, started when no idle one can take a job."""

    def __init__(self, sender: type, alias: str, options: ProcessOptions) -> None:
        super().__init__(sender, alias, options)
        # Guards the two below: one dispatcher, one check of the databases.
        self._dispatcher_lock = threading.Lock()
        self._dispatcher: Dispatcher | None = None
        self._databases: dict[str, Any] | None = None

    def _prepare(self, task_result: AnyResult) -> Parcel:
        if worker.is_worker:
            raise RuntimeError(
                f"Task {task_result.task.module_path} was not enqueued: a worker process cannot "
                f"enqueue tasks of a ProcessPoolBackend. Enqueue what follows a task in a receiver "
                f"of task_finished; AppConfig.ready() runs in worker processes too, where "
                f"django_tasks_local.worker.is_worker is True."
            )
        dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.raise_if_broken()
        self._look_at_databases()
        parcel = Parcel(_order_frame(task_result))
        if dispatcher is None:
            self._start_dispatcher()
        return parcel

    def _look_at_databases(self) -> None:
        """
        Make sure that workers use the databases that this process uses now.

        A test runner changes their names in the midst of the process; a worker that was started
        before would work on the real ones.
        """
        databases = database_names()
        if databases == self._databases:
            return
        with self._dispatcher_lock:
            refuse_databases_in_memory()
            self._databases = databases
            if self._dispatcher is not None:
                # Before the job is in the queue, so the dispatcher does this first.
                self._dispatcher.post(self._dispatcher.retire_all)

    def _submit(self, job: Job) -> None:
        job.progress_source = job.running
        self.queue.append(job)
        assert self._dispatcher is not None
        self._dispatcher.job_added()

    def _start_dispatcher(self) -> None:
        with self._dispatcher_lock:
            # Not for a pool that nobody would close any more: enqueue() refuses the task.
            if self._dispatcher is None and not self.closed and shutdown.register(self):
                try:
                    self._dispatcher = Dispatcher(self)
                except (OSError, RuntimeError) as error:
                    raise RuntimeError(
                        f"The task backend {self.alias!r} cannot start the thread that starts "
                        f"its worker processes, so no task was enqueued: {error}"
                    ) from error

    def fail_waiting(self, job: Job, error: BaseException) -> bool:
        # What was sent to a worker may have started there, though it has not said so yet.
        parcel: Parcel = job.running
        if not parcel.claim():
            return False
        return super().fail_waiting(job, error)

    def _stop(self, job: Job) -> None:
        if self._dispatcher is not None:
            self._dispatcher.post(self._dispatcher.stop_job, job)

    def take_back(self, job: Job, error: BaseException) -> None:
        """Put a job that did not start back into the queue, or fail it if that is of no use."""
        parcel: Parcel = job.running
        if parcel.sends >= SENDS:
            self.finish(job, Outcome.failure(error))
            return
        self.queue.appendleft(job)
        parcel.put_back()
        if self.closed:
            self.fail_waiting(job, TaskLost("The process ended before the task started."))

    def close_workers(self) -> None:
        with self._dispatcher_lock:
            dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.close()


def _order_frame(task_result: AnyResult) -> bytes:
    task = task_result.task
    assert task_result.enqueued_at is not None
    order = worker.Order(
        result_id=task_result.id,
        path=task.module_path,
        options=worker.task_options(task),
        args=task_result.args,
        kwargs=task_result.kwargs,
        enqueued_at=task_result.enqueued_at.isoformat(),
    )
    try:
        return worker.frame(tuple(order))
    except Exception as error:
        raise ValueError(f"The arguments of a task must be pickleable: {error}") from error
