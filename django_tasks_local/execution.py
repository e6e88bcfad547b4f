"""Run one task, in the thread or in the process that calls: context, async, errors, connections."""

from __future__ import annotations

import asyncio
import logging
import select
import threading
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import lru_cache
from inspect import iscoroutinefunction
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Self

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.core.cache import close_caches
from django.db import close_old_connections, connections
from django.db.backends.signals import connection_created
from django.dispatch import receiver
from django.tasks import TaskContext
from django.tasks.base import TaskError
from django.utils.json import normalize_json

from .exceptions import TaskCancelled
from .executors import DaemonExecutor, DaemonThreadsEventLoop
from .progress import current_reporter, current_result_id

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from django.tasks import TaskResult

    from .progress import Reporter

    type AnyResult = TaskResult[Any, Any]

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Outcome:
    """How a task ended. `error` and `message` describe `exception`, which stays in its process."""

    return_value: Any = None
    error: TaskError | None = None
    message: str | None = None
    exception: BaseException | None = None

    @classmethod
    def failure(cls, exception: BaseException) -> Self:
        """Return the outcome of a task that raised."""
        kind = type(exception)
        try:
            message = str(exception)
        except Exception:  # noqa: BLE001 - what a user's __str__ raises must not hide the error
            message = ""
        error = TaskError(
            exception_class_path=f"{kind.__module__}.{kind.__qualname__}",
            traceback="".join(format_exception(exception)),
        )
        return cls(error=error, message=message, exception=exception)


class Cancellation:
    """The way to tell a running task that it was cancelled. See `django_tasks_local.cancel()`."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._coroutine: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._watched = False
        self.delivered = False

    def request(self) -> None:
        """Cancel the coroutine, or let the next report raise. Called from any thread."""
        self._reporter.cancel()
        self._interrupt()

    def interrupt(self) -> None:
        """
        Cancel from a signal handler, which runs in the midst of the task, in its thread.

        Raises TaskCancelled, unless there is a coroutine to cancel.
        """
        self.request()
        if self._coroutine is None:
            self._reporter.raise_if_cancelled()

    def watch(self, loop: asyncio.AbstractEventLoop, coroutine: asyncio.Task[Any]) -> None:
        """Name the coroutine to cancel. Called in its event loop."""
        self._coroutine, self._watched = (loop, coroutine), True
        if self._reporter.cancelled:
            self._interrupt()

    def unwatch(self) -> None:
        """Cancel it no more: it has ended, and what follows is ours. Called in its event loop."""
        self._watched = False

    def _interrupt(self) -> None:
        if self._coroutine is not None:
            with suppress(RuntimeError):  # The loop is closed: the coroutine has just ended.
                self._coroutine[0].call_soon_threadsafe(self._cancel_coroutine)

    def _cancel_coroutine(self) -> None:
        if self._coroutine and self._watched and self._reporter.take_cancellation():
            self.delivered = True
            self._coroutine[1].cancel()


def execute(task_result: AnyResult, reporter: Reporter, cancellation: Cancellation) -> Outcome:
    """
    Run the task of a started result and return its outcome; nothing that it raises comes out.

    Runs in the worker's thread, in a contextvars.Context that the caller made for this task. When
    it returns, the database connections and caches are tidied, as at the end of a request.
    """
    current_result_id.set(task_result.id)
    current_reporter.set(reporter)
    try:
        return_value = _call(task_result, cancellation)
        return Outcome(return_value if return_value is None else normalize_json(return_value))
    except BaseException as exception:  # noqa: BLE001 - SystemExit too is the task's, not ours
        return Outcome.failure(exception)
    finally:
        tidy()


class _Thread(threading.local):
    """What is known of the calling thread."""

    has_connected = False  # to a database, ever


_thread = _Thread()


@receiver(connection_created, dispatch_uid="django_tasks_local.connection_created")
def _on_connection_created(**kwargs: Any) -> None:
    _thread.has_connected = True


def tidy() -> None:
    """
    Do what Django does at the end of a request: close old connections, and caches.

    The connections are the calling thread's, the caches its context's. An error is logged: it must
    not hide how the task ended.
    """
    if _thread.has_connected:  # Asking each alias costs as much as all the rest of an end.
        _try_to(close_old_connections)
    # An open cache is a variable of the context (asgiref's Local). Asking for one takes a lock that
    # all threads share, and they queue behind it (see ResultStore).
    context = copy_context()
    if len(context) > (current_result_id in context) + (current_reporter in context):
        _try_to(close_caches)


def drop_stale_connections() -> None:
    """
    Close those of the calling thread's connections that their server has closed, as at its restart.

    Django notices it when a query fails, and then it would be a task that pays. Its
    CONN_HEALTH_CHECKS cost a query for each task; here the socket is asked, which says nothing as
    long as all is well.
    """
    if _thread.has_connected:
        _try_to(_drop_stale_connections)


def _drop_stale_connections() -> None:
    for connection in connections.all(initialized_only=True):
        if _has_unread_data(connection.connection) and not connection.is_usable():
            connection.close()


def _has_unread_data(driver_connection: Any) -> bool:
    """Whether a server has sent what nobody has asked for: its farewell, most likely."""
    # PostgreSQL's drivers have it; those that do not, and Windows, have CONN_HEALTH_CHECKS.
    fileno = getattr(driver_connection, "fileno", None)
    if fileno is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        poll.register(fileno(), select.POLLIN)
    except Exception:  # noqa: BLE001 - each driver has its own for a connection that is closed
        return True
    return bool(poll.poll(0))


def leave_thread() -> None:
    """Close all connections of the calling thread, which is about to end, and the caches."""
    if _thread.has_connected:
        _try_to(connections.close_all)
    _try_to(close_caches)


def _try_to(close: Callable[[], None]) -> None:
    try:
        close()
    except Exception:
        logger.exception("%s() failed around a task.", close.__name__)


def _call(task_result: AnyResult, cancellation: Cancellation) -> Any:
    task = task_result.task
    # The task gets objects of its own: what it does to its arguments is not seen in the result.
    args: list[Any] = _copy(task_result.args)
    kwargs: dict[str, Any] = _copy(task_result.kwargs)
    if task.takes_context:
        args.insert(0, TaskContext(task_result=task_result))
    if _is_coroutine_function(task.func):
        return _call_coroutine(cancellation, task.func(*args, **kwargs))
    return task.func(*args, **kwargs)


_is_coroutine_function = lru_cache(iscoroutinefunction)


def _copy(arguments: Any) -> Any:
    return normalize_json(arguments) if arguments else arguments.copy()


def _call_coroutine(cancellation: Cancellation, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """
    Run a coroutine in the calling thread.

    Not with async_to_sync(): that would take a thread which the interpreter waits for at exit,
    however long the task takes. This one is a daemon, and so are those for sync code.
    """
    # Thread-sensitive code, such as the ORM's, gets a thread of this task's own, if it needs one.
    executor = DaemonExecutor(max_workers=1)
    key = ThreadSensitiveContext()
    token = SyncToAsync.thread_sensitive_context.set(key)
    SyncToAsync.context_to_thread_executor[key] = executor
    context = copy_context()
    try:
        with asyncio.Runner(loop_factory=DaemonThreadsEventLoop) as runner:
            return runner.run(_watched(cancellation, coroutine), context=context)
    finally:
        del SyncToAsync.context_to_thread_executor[key]
        SyncToAsync.thread_sensitive_context.reset(token)
        context.run(_try_to, close_caches)
        if executor.has_threads:
            executor.submit(leave_thread).result()
        executor.shutdown(wait=False)


async def _watched(cancellation: Cancellation, coroutine: Coroutine[Any, Any, Any]) -> Any:
    current = asyncio.current_task()
    assert current is not None
    cancellation.watch(asyncio.get_running_loop(), current)
    try:
        return await coroutine
    except asyncio.CancelledError as error:
        if cancellation.delivered:
            raise TaskCancelled("The task was cancelled.") from error
        raise
    finally:
        cancellation.unwatch()
