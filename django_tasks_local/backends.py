"""The task backends implement Django's backend interface on top of a pool."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, ClassVar, override

from django.conf import settings
from django.core.signals import setting_changed
from django.dispatch import receiver
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.exceptions import TaskResultDoesNotExist

from . import checks, serving, signal_handlers
from .aliases import task_reference
from .conf import Options, ProcessOptions, ThreadOptions
from .execution.normalizing import json_arguments
from .pools import Pool, PoolStatistics, pool_for
from .pools.threads import ThreadPool
from .processes.loading import raise_if_not_importable
from .processes.pool import ProcessPool

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from django.core.checks import CheckMessage

    from .aliases import AnyResult, AnyTask
    from .record import TaskRecord

# A backend remembers this many tasks that validate_task() has accepted. A site has fewer task
# functions, but a program may create any number of Task objects with Task.using().
VALID_TASKS_LIMIT = 500


class _Shared:
    """
    Holds the values that all instances of one backend alias share.

    Django makes one instance for each thread or asyncio task, so an instance must be cheap.
    """

    __slots__ = ("options", "params", "pool", "valid_tasks", "warned_paths")

    def __init__(self, params: dict[str, Any], options: Options) -> None:
        self.params = params  # The settings TASKS[alias] from which `options` were created.
        self.options = options
        self.pool: Pool[Any, Any] | None = None
        # Tasks that validate_task() has accepted, by id(). The value keeps the task alive, so that
        # no other object can get the same id().
        self.valid_tasks: dict[int, AnyTask] = {}
        self.warned_paths: set[str] = set()  # Tasks of which warn_in_atomic_block() has warned.


_shared: dict[tuple[type, str], _Shared] = {}


@receiver(setting_changed, dispatch_uid="django_tasks_local.debug_changed")
def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    """Let enqueue() check DEBUG again for each task when a test overrides it."""
    if setting == "DEBUG":
        for shared in list(_shared.values()):
            shared.valid_tasks.clear()
            shared.warned_paths.clear()


class LocalBackend(BaseTaskBackend):
    """
    The base class of both backends; all instances with one alias share one pool in a process.

    Methods may be called from any thread. They implement the interface that Django's "Tasks" topic
    guide and reference describe under "Task backends".
    """

    supports_defer = False
    supports_async_task = True
    supports_get_result = True
    supports_priority = False

    # True because the pool publishes the events of these tasks. The module `foreign` publishes
    # events only for tasks of backends that do not have this attribute.
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
        serving.note_new_backend()
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
        Queue a task and return a snapshot of its result, which its `refresh()` method updates.

        Raises InvalidTask for a task that this backend cannot run, TypeError for arguments that
        are not JSON, QueueFull if MAX_PENDING + MAX_WORKERS tasks are unfinished, and ShuttingDown
        while the backend is being closed and after the process has begun to end.
        """
        valid_tasks = self._shared.valid_tasks
        if valid_tasks.get(id(task)) is not task:
            self.validate_task(task)
            self._validate_enqueued_task(task)
            # With DEBUG no task is remembered, so that each call comes here; without DEBUG a call
            # costs no more than without this check. The result of an overridden validate_task() is
            # not remembered either, because it may accept a task in one call and reject it in the
            # next.
            if settings.DEBUG:
                checks.warn_in_atomic_block(task.module_path, self._shared.warned_paths)
            elif type(self).validate_task is BaseTaskBackend.validate_task:
                if len(valid_tasks) >= VALID_TASKS_LIMIT:
                    valid_tasks.clear()
                valid_tasks[id(task)] = task
        return self._pool.enqueue(task, *json_arguments(task, args, kwargs))

    def _validate_enqueued_task(self, task: AnyTask) -> None:
        """
        Check what validate_task() cannot check. Raises InvalidTask.

        validate_task() runs when the task is created, before its module has a name for it.
        """

    def check(self, **kwargs: Any) -> list[CheckMessage]:
        """Return warnings about settings for `manage.py check`; wrong OPTIONS raise in __init__."""
        alias, params, options = self.alias, self._shared.params, self._shared.options
        return [
            *checks.check_web_workers(alias),
            *checks.check_misplaced_options(alias, params, frozenset(options.known())),
            *checks.check_sqlite(alias, options),
        ]

    def enqueue_again(self, task_result: AnyResult) -> AnyResult:
        """Queue the task of a finished result again. For details see django_tasks_local.retry()."""
        return self._pool.enqueue(
            task_result.task, task_result.args, task_result.kwargs, task_result.id
        )

    def record(self, result_id: Any) -> TaskRecord:
        """
        Return the state of a task. Raises TaskResultDoesNotExist for an unknown id.

        Like all methods with a parameter `result_id`, it takes a TaskResult, a str or a UUID.
        """
        return self._pool.results.get(task_reference(result_id, self.alias)[1])

    def has_result(self, result_id: Any) -> bool:
        """Return whether this backend has a task with this id in this process."""
        try:
            self.record(result_id)
        except TaskResultDoesNotExist:
            return False
        return True

    def get_result(self, result_id: Any) -> AnyResult:
        """Return a snapshot of a result. Raises TaskResultDoesNotExist for an unknown id."""
        return self.record(result_id).task_result()

    async def aget_result(self, result_id: Any) -> AnyResult:
        """Call get_result() directly; it reads memory and never blocks the event loop."""
        return self.get_result(result_id)

    def cancel(self, result_id: Any) -> bool:
        """Cancel a task of this backend. For details see django_tasks_local.cancel()."""
        return self._pool.cancel(task_reference(result_id, self.alias)[1])

    def close(self, timeout: float | None = None) -> None:
        """
        Refuse new tasks, fail the waiting ones, and give running ones `timeout` seconds to finish.

        The default of `timeout` is the option SHUTDOWN_TIMEOUT. Tasks that still run after that
        time fail with TaskLost and are logged. The results stay, and a task that is enqueued after
        close() has returned runs in new workers. When the process exits, it closes every backend.
        """
        self._pool.close(timeout)

    def statistics(self) -> PoolStatistics:
        """
        Return the number of workers, of waiting, running and unfinished tasks, and of results.

        The counts are those of this alias in this process; they are read one after the other.
        """
        return self._pool.statistics()

    def wait_until_idle(self, timeout: float) -> list[AnyResult]:
        """
        Wait until all tasks have finished and the receivers of task_finished have returned.

        Returns the results of the tasks for which this is not the case after `timeout` seconds.
        """
        return [record.task_result() for record in self._pool.wait_until_idle(timeout)]


class ThreadPoolBackend(LocalBackend):
    """Runs tasks in threads of this process; use it for tasks that wait for I/O."""

    options_class = ThreadOptions
    pool_class = ThreadPool


class ProcessPoolBackend(LocalBackend):
    """Runs tasks in worker processes; use it for tasks that compute, or that may crash."""

    options_class = ProcessOptions
    pool_class = ProcessPool

    @override
    def check(self, **kwargs: Any) -> list[CheckMessage]:
        return [*super().check(**kwargs), *checks.check_local_memory_cache(self.alias)]

    @override
    def _validate_enqueued_task(self, task: AnyTask) -> None:
        raise_if_not_importable(task)

    def enqueue(
        self,
        task: AnyTask,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> AnyResult:
        """
        Queue a task as LocalBackend.enqueue() does.

        Also raises ValueError for arguments that cannot be pickled, and RuntimeError when no worker
        process can be started.
        """
        try:
            return super().enqueue(task, args, kwargs)
        except TypeError:
            # Values that are JSON can be pickled, so the check runs only for arguments that are
            # not JSON.
            _raise_if_not_pickleable(args, kwargs)
            raise


def _raise_if_not_pickleable(*arguments: object) -> None:
    try:
        pickle.dumps(arguments)
    except Exception as error:
        raise ValueError(f"The arguments of a task must be pickleable: {error}") from error
