"""The task backends: Django's contract on top of a pool."""

from __future__ import annotations

import pickle
import uuid
from typing import TYPE_CHECKING, Any, ClassVar

from django.tasks import TaskResult, TaskResultStatus, task_backends
from django.tasks.backends.base import BaseTaskBackend
from django.utils import timezone

from . import signal_handlers
from .conf import Options, ProcessOptions, ThreadOptions
from .pools import Pool, pool_for
from .processes import ProcessPool
from .threads import ThreadPool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from django.tasks import Task

    type AnyResult = TaskResult[Any, Any]

# Options that were validated, with the settings they came from: Django makes one backend instance
# for each context (each asyncio task, say), and validates nothing but what the first one did.
_validated: dict[tuple[type, str], tuple[dict[str, Any], Options]] = {}


class LocalBackend(BaseTaskBackend):
    """
    What both backends share. An instance is cheap: the pool belongs to the alias and the process.

    Methods may be called from any thread. Source: Django's "Tasks" topic guide and reference,
    "Task backends".
    """

    supports_defer = False
    supports_async_task = True
    supports_get_result = True
    supports_priority = False

    # Tells `lifecycle` that events of these tasks need not be made from Django's signals.
    publishes_events = True

    options_class: ClassVar[type[Options]]
    pool_class: ClassVar[type[Pool[Any]]]

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        key = (type(self), alias)
        known_params, options = _validated.get(key, (None, None))
        if known_params is not params or options is None:
            options = self.options_class.from_params(alias, params)
            _validated[key] = params, options
            signal_handlers.install_signal_handlers()
        self._options = options

    @property
    def _pool(self) -> Pool[Any]:
        # Looked up each time: after a fork, or after TASKS changed, it is another one.
        return pool_for(self.pool_class, type(self), self.alias, self._options)

    def enqueue(
        self,
        task: Task[Any, Any],
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> AnyResult:
        """
        Queue a task and return a snapshot of its result; `refresh()` brings it up to date.

        Raises InvalidTask for a task that this backend cannot run, TypeError for arguments that
        are not JSON, QueueFull when MAX_PENDING tasks wait, and RuntimeError once the backend
        was closed.
        """
        self.validate_task(task)
        return self._pool.enqueue(
            TaskResult(
                task=task,
                id=str(uuid.uuid4()),
                status=TaskResultStatus.READY,
                enqueued_at=timezone.now(),
                started_at=None,
                finished_at=None,
                last_attempted_at=None,
                args=list(args or ()),
                kwargs=dict(kwargs or {}),
                backend=self.alias,
                errors=[],
                worker_ids=[],
            )
        )

    def get_result(self, result_id: str) -> AnyResult:
        """Return a snapshot of a result. Raises TaskResultDoesNotExist."""
        return self._pool.results.get(str(result_id))

    async def aget_result(self, result_id: str) -> AnyResult:
        """See get_result(). It never waits, so it needs no other thread."""
        return self.get_result(result_id)

    def cancel(self, result_id: str) -> bool:
        """See django_tasks_local.cancel()."""
        return self._pool.cancel(str(result_id))

    def close(self, timeout: float | None = None) -> None:
        """
        Refuse new tasks, fail the waiting ones, and give running ones `timeout` seconds to finish.

        The default is the option SHUTDOWN_TIMEOUT. What is unfinished then is FAILED with
        TaskLost, and logged. This happens by itself when the process exits.
        """
        self._pool.close(timeout)


class ThreadPoolBackend(LocalBackend):
    """Runs tasks in threads of this process: for work that waits for something else."""

    options_class = ThreadOptions
    pool_class = ThreadPool


class ProcessPoolBackend(LocalBackend):
    """Runs tasks in processes of their own: for work that computes, or that may crash."""

    options_class = ProcessOptions
    pool_class = ProcessPool

    def enqueue(
        self,
        task: Task[Any, Any],
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> AnyResult:
        """
        See LocalBackend.enqueue().

        Raises ValueError for arguments that cannot be pickled, and RuntimeError when no worker
        process can be started.
        """
        try:
            return super().enqueue(task, args, kwargs)
        except TypeError:
            # What is JSON can be pickled, so only what is not is tried.
            _raise_if_not_pickleable(args, kwargs)
            raise


def _raise_if_not_pickleable(*arguments: object) -> None:
    try:
        pickle.dumps(arguments)
    except Exception as error:
        raise ValueError(f"The arguments of a task must be pickleable: {error}") from error


def cancel(result_id: str, backend: str = "default") -> bool:
    """
    Cancel a task of the backend with this alias. May be called from any thread.

    A waiting task never runs. In a running one the next step of `report_progress()` or `track()`
    raises TaskCancelled, and a coroutine is cancelled at its next await. The result is then FAILED,
    unless the task catches TaskCancelled and returns. In a worker process TaskCancelled is raised
    wherever the task is just now, and half a second later the process is killed.

    Returns False when the task has finished already. Raises TaskResultDoesNotExist for an unknown
    id, and NotImplementedError when the backend cannot cancel.
    """
    backend_instance = task_backends[backend]
    cancel_task = getattr(backend_instance, "cancel", None)
    if cancel_task is None:
        raise NotImplementedError(
            f"The task backend {backend!r} ({type(backend_instance).__qualname__}) cannot cancel."
        )
    return bool(cancel_task(result_id))
