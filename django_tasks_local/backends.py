"""The task backends: Django's contract on top of a pool."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, ClassVar

from django.tasks import task_backends
from django.tasks.backends.base import BaseTaskBackend

from . import signal_handlers
from .conf import Options, ProcessOptions, ThreadOptions
from .execution import json_dict, json_list
from .pools import Pool, PoolStatistics, pool_for
from .pools.threads import ThreadPool
from .processes.pool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .aliases import AnyResult, AnyTask

# A site has fewer task functions, but a program may create any number of tasks with Task.using().
VALID_TASKS_LIMIT = 500


class _Shared:
    """
    What all instances of one backend alias share.

    Django makes one instance for each context (each asyncio task, say).
    """

    __slots__ = ("options", "params", "pool", "valid_tasks")

    def __init__(self, params: dict[str, Any], options: Options) -> None:
        self.params = params  # the settings that `options` came from
        self.options = options
        self.pool: Pool[Any, Any] | None = None
        self.valid_tasks: dict[int, AnyTask] = {}  # by id(); the entry keeps the id from reuse


_shared: dict[tuple[type, str], _Shared] = {}


class LocalBackend(BaseTaskBackend):
    """
    The common part of both backends. An instance is cheap: the pool belongs to alias and process.

    Methods may be called from any thread. Source: Django's "Tasks" topic guide and reference,
    "Task backends".
    """

    supports_defer = False
    supports_async_task = True
    supports_get_result = True
    supports_priority = False

    # The pool publishes the events of these tasks; `foreign` makes events for other backends.
    publishes_events = True

    options_class: ClassVar[type[Options]]
    pool_class: ClassVar[type[Pool[Any, Any]]]

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        key = (type(self), alias)
        shared = _shared.get(key)
        if shared is None or shared.params is not params:
            shared = _Shared(params, self.options_class.from_params(alias, params))
            _shared[key] = shared
            signal_handlers.install_signal_handlers()
        self._shared = shared

    @property
    def _pool(self) -> Pool[Any, Any]:
        shared = self._shared
        pool = shared.pool
        if pool is None or pool.is_replaced:
            pool = pool_for(self.pool_class, type(self), self.alias, shared.options)
            shared.pool = pool
        return pool

    def enqueue(
        self,
        task: AnyTask,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> AnyResult:
        """
        Queue a task and return a snapshot of its result; `refresh()` updates it.

        Raises InvalidTask for a task that this backend cannot run, TypeError for arguments that
        are not JSON, QueueFull when MAX_PENDING tasks wait, and RuntimeError once the backend
        was closed.
        """
        valid_tasks = self._shared.valid_tasks
        if valid_tasks.get(id(task)) is not task:
            self.validate_task(task)
            # A subclass may decide differently each time.
            if type(self).validate_task is BaseTaskBackend.validate_task:
                if len(valid_tasks) >= VALID_TASKS_LIMIT:
                    valid_tasks.clear()
                valid_tasks[id(task)] = task
        return self._pool.enqueue(
            task, json_list(args) if args else [], json_dict(kwargs) if kwargs else {}
        )

    def get_result(self, result_id: str) -> AnyResult:
        """Return a snapshot of a result. Raises TaskResultDoesNotExist."""
        return self._pool.results.get(str(result_id)).task_result()

    async def aget_result(self, result_id: str) -> AnyResult:
        """See get_result(). It never waits, so it needs no other thread."""
        return self.get_result(result_id)

    def cancel(self, result_id: str) -> bool:
        """See django_tasks_local.cancel()."""
        return self._pool.cancel(str(result_id))

    def close(self, timeout: float | None = None) -> None:
        """
        Refuse new tasks, fail the waiting ones, and give running ones `timeout` seconds to finish.

        The default is the option SHUTDOWN_TIMEOUT. Tasks that are unfinished then are FAILED with
        TaskLost, and logged. This happens automatically when the process exits.
        """
        self._pool.close(timeout)

    def statistics(self) -> PoolStatistics:
        """Return how many workers, waiting, running and finished tasks this process has."""
        return self._pool.statistics()

    def wait_until_idle(self, timeout: float) -> list[AnyResult]:
        """
        Wait until no task is unfinished, and the receivers of task_finished have returned.

        Returns the results of the tasks that are unfinished after `timeout` seconds.
        """
        return [record.task_result() for record in self._pool.wait_until_idle(timeout)]


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
        task: AnyTask,
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
            # JSON can be pickled, so only arguments that are not JSON are tried.
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
    at whatever the task is doing, and half a second later the process is killed.

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
