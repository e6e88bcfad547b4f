"""
This module cancels, repeats and awaits tasks of any backend, in sync and in async code.

A task is named by its TaskResult, or by the id of its result (str or UUID) and the alias of its
backend. An id without an alias is searched in the backends of this package only.
"""

from __future__ import annotations

import asyncio
import time
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.tasks import TaskResult, task_backends
from django.tasks.exceptions import TaskResultDoesNotExist

from .aliases import ambiguous_id, task_reference
from .backends import LocalBackend
from .checks import CALLED_BY_USERS
from .clocks import Clocks
from .hub import hub
from .progress.reporter import current_reporting
from .publishing import retried_id

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.tasks.backends.base import BaseTaskBackend

    from .aliases import AnyResult

# join() reads the result of another backend again after the first number of seconds, then after
# twice that time, and so on up to the second number. A worker in another process sends no event to
# this one.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 1.0


def cancel(result_or_id: Any, backend: str | None = None) -> bool:
    """
    Cancel a task. May be called from any thread.

    A waiting task fails and never runs. In a running task the next call of `report_progress()` or
    step of `track()` raises TaskCancelled, and a coroutine is cancelled at its next await. The
    result is then FAILED, unless the task catches TaskCancelled and returns. In a worker process a
    signal handler raises TaskCancelled at any point of the task, and half a second later the pool
    kills the process.

    Returns False if the task has finished already. Raises TaskResultDoesNotExist for an unknown
    id, ValueError for an id that two backends use, and NotImplementedError if the backend has no
    method `cancel`.
    """
    backend_instance, id = _locate(result_or_id, backend)
    cancel_task = getattr(backend_instance, "cancel", None)
    if cancel_task is None:
        raise NotImplementedError(
            f"The task backend {backend_instance.alias!r} "
            f"({type(backend_instance).__qualname__}) cannot cancel."
        )
    return bool(cancel_task(id))


async def acancel(result_or_id: Any, backend: str | None = None) -> bool:
    """See cancel()."""
    return await sync_to_async(cancel, thread_sensitive=True)(result_or_id, backend)


def retry(result_or_id: Any, backend: str | None = None) -> AnyResult:
    """
    Enqueue the task of a finished result again, with the same arguments; return the new result.

    The events of the new task have the old id as `retried_from`. Raises ValueError if the task has
    not finished, TaskResultDoesNotExist for an unknown id, NotImplementedError if the backend does
    not store results, and every exception of enqueue().
    """
    backend_instance, id = _locate(result_or_id, backend)
    task_result = backend_instance.get_result(id)
    if not task_result.is_finished:
        raise ValueError(
            f"Task id={id} path={task_result.task.module_path} was not enqueued again: "
            f"it has not finished, its status is {task_result.status}."
        )
    if isinstance(backend_instance, LocalBackend):
        return backend_instance.enqueue_again(task_result)
    with _retrying(id):
        return backend_instance.enqueue(task_result.task, task_result.args, task_result.kwargs)


async def aretry(result_or_id: Any, backend: str | None = None) -> AnyResult:
    """See retry()."""
    return await sync_to_async(retry, thread_sensitive=True)(result_or_id, backend)


def join(result_or_id: Any, timeout: float | None = None, backend: str | None = None) -> AnyResult:
    """
    Wait until a task has finished, at most `timeout` seconds; return its result.

    The result of a task of another backend is read once a second. Raises TimeoutError after
    `timeout` seconds, TaskResultDoesNotExist for an unknown id, and RuntimeError in the thread of a
    running event loop, which it would block.

    In a task of the same backend it warns, because this task occupies its worker while it waits: if
    all workers wait for tasks in the queue, none of them ever ends.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        pass
    else:
        raise RuntimeError("join() would block the running event loop: use `await ajoin(…)`.")
    if (finished := _finished_argument(result_or_id, backend)) is not None:
        return finished
    backend_instance, id = _locate(result_or_id, backend)
    _warn_in_task_of(backend_instance.alias)
    if isinstance(backend_instance, LocalBackend):
        record = backend_instance.record(id)
        with hub.subscribe(record.task_result()) as subscription:
            for left in _seconds_left(timeout):
                if record.is_finished or subscription.ended:
                    break
                subscription.take(left)
        return _finished_result(record.task_result(), timeout)
    task_result = backend_instance.get_result(id)
    for pause in _pauses(timeout):
        if task_result.is_finished:
            break
        time.sleep(pause)
        task_result = backend_instance.get_result(id)
    return _finished_result(task_result, timeout)


async def ajoin(
    result_or_id: Any, timeout: float | None = None, backend: str | None = None
) -> AnyResult:
    """See join()."""
    if (finished := _finished_argument(result_or_id, backend)) is not None:
        return finished
    backend_instance, id = _locate(result_or_id, backend)
    _warn_in_task_of(backend_instance.alias)
    if isinstance(backend_instance, LocalBackend):
        record = backend_instance.record(id)
        async with hub.subscribe(record.task_result()) as subscription:
            for left in _seconds_left(timeout):
                if record.is_finished or subscription.ended:
                    break
                await subscription.atake(left)
        return _finished_result(record.task_result(), timeout)
    task_result = await backend_instance.aget_result(id)
    for pause in _pauses(timeout):
        if task_result.is_finished:
            break
        await asyncio.sleep(pause)
        task_result = await backend_instance.aget_result(id)
    return _finished_result(task_result, timeout)


def _locate(result_or_id: Any, alias: str | None) -> tuple[BaseTaskBackend, str]:
    """Return the backend of a task and the id of its result."""
    alias, id = task_reference(result_or_id, alias)
    if alias is not None:
        return task_backends[alias], id
    local = [backend for backend in task_backends.all() if isinstance(backend, LocalBackend)]
    found = [backend for backend in local if backend.has_result(id)]
    if len(found) > 1:
        raise ambiguous_id(id, [backend.alias for backend in found])
    if not found:
        aliases = ", ".join(repr(backend.alias) for backend in local)
        raise TaskResultDoesNotExist(
            f"No task backend of this process has a result {id!r} (searched: {aliases or 'none'}). "
            f"A task of another backend needs its TaskResult or `backend=`."
        )
    return found[0], id


@contextmanager
def _retrying(id: str) -> Iterator[None]:
    """Let the module `foreign` give the events of the task that the block enqueues this id."""
    token = retried_id.set(id)
    try:
        yield
    finally:
        retried_id.reset(token)


def _finished_argument(result_or_id: Any, alias: str | None) -> AnyResult | None:
    """
    Return `result_or_id` if it is the TaskResult of a finished task, which needs no refresh.

    So join() also works with an ImmediateBackend, which stores no results.
    """
    task_reference(result_or_id, alias)  # Raises an exception for an invalid argument.
    if isinstance(result_or_id, TaskResult) and result_or_id.is_finished:
        return result_or_id
    return None


def _finished_result(task_result: AnyResult, timeout: float | None) -> AnyResult:
    if task_result.is_finished:
        return task_result
    waited = "before this process ended" if timeout is None else f"after {timeout:g} seconds"
    raise TimeoutError(
        f"Task id={task_result.id} path={task_result.task.module_path} has not finished {waited}; "
        f"its status is {task_result.status}."
    )


def _seconds_left(timeout: float | None) -> Iterator[float | None]:
    """Yield the seconds that are left of `timeout`, until none are; None means no limit."""
    deadline = None if timeout is None else Clocks.monotonic() + timeout
    while True:
        left = None if deadline is None else deadline - Clocks.monotonic()
        if left is not None and left <= 0:
            return
        yield left


def _pauses(timeout: float | None) -> Iterator[float]:
    """Yield the seconds to wait between two reads of a result, until `timeout` seconds are over."""
    pause = FIRST_PAUSE
    for left in _seconds_left(timeout):
        yield pause if left is None else min(pause, left)
        pause = min(2 * pause, LONGEST_PAUSE)


def _warn_in_task_of(alias: str) -> None:
    """Warn the caller of join() or ajoin() if the current task has the backend with this alias."""
    task = getattr(current_reporting.get(None), "task", None)
    if task is not None and task.backend == alias:
        warnings.warn(
            f"Task {task.module_path} waits for another task of its own backend {alias!r}: if all "
            f"workers wait like this, no task ends. Use another backend for one of them.",
            RuntimeWarning,
            skip_file_prefixes=CALLED_BY_USERS,
        )
