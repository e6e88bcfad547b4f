"""Run one task in the calling thread: call its function and return how the task ended."""

from __future__ import annotations

from functools import lru_cache, partial
from inspect import isawaitable, iscoroutinefunction
from typing import TYPE_CHECKING, Any, Protocol

from django.tasks import Task, TaskContext

from ..progress.reporter import Reporting, current_reporting, current_result_id
from ..signals import task_postrun, task_prerun
from .connections import close_old_resources
from .coroutines import run_coroutine
from .normalizing import UNCHANGED, json_dict, json_list, json_return_value
from .outcome import Outcome
from .sync_thread import enter_task, leave_task

if TYPE_CHECKING:
    from django.dispatch import Signal

    from ..aliases import AnyResult, AnyTask
    from ..context import Carried

__all__ = ["Outcome", "Runnable", "execute"]


class Runnable(Reporting, Protocol):
    """Defines what execute() needs to know of a task that has started."""

    __slots__ = ()

    task: AnyTask
    args: list[Any]
    kwargs: dict[str, Any]
    carried: Carried | None

    def task_result(self) -> AnyResult:
        """Return the TaskResult, with status RUNNING, for the context of a `takes_context` task."""


def execute(run: Runnable) -> Outcome:
    """
    Run a task and return its outcome. An exception that the task raises is in the outcome.

    Called from: the thread that runs the task, in a contextvars.Context that the caller has made
    for this task. Before execute() returns, it closes old database connections and caches, as
    Django does at the end of a request.
    """
    current_result_id.set(run.id)
    current_reporting.set(run)
    token = enter_task()
    try:
        if run.carried is None:
            return Outcome(_return_value(run))
        return Outcome(run.carried.call(lambda: _return_value(run)))
    except BaseException as exception:  # noqa: BLE001 - SystemExit must not end the worker
        return Outcome.failure(exception)
    finally:
        leave_task(token)
        close_old_resources()


def _return_value(run: Runnable) -> Any:
    if not task_prerun.receivers and not task_postrun.receivers:
        return _value_of_call(run)
    _send(task_prerun, run)
    try:
        return _value_of_call(run)
    finally:
        _send(task_postrun, run)


def _send(signal: Signal, run: Runnable) -> None:
    # send_robust() logs the exceptions of receivers. It raises one itself if it has to call async
    # receivers in the thread of a running event loop, which the thread of a task has not.
    signal.send_robust(sender=run.task, task_result=run.task_result())


def _value_of_call(run: Runnable) -> Any:
    value = _call(run)
    if type(value) in UNCHANGED:
        return value
    if isawaitable(value):  # The task is an async function behind an ordinary decorator.
        value = run_coroutine(lambda: value, run.get_cancellation())
    return json_return_value(run.task, value)


def _call(run: Runnable) -> Any:
    task = run.task
    # The task gets copies, so that its changes to an argument do not reach its TaskResult.
    args = json_list(run.args) if run.args else []
    kwargs = json_dict(run.kwargs) if run.kwargs else {}
    if task.takes_context:
        args.insert(0, TaskContext(task_result=run.task_result()))
    if type(task).call is not Task.call:  # The class overrides call().
        return task.call(*args, **kwargs)
    if _is_coroutine_function(task.func):
        return run_coroutine(partial(task.func, *args, **kwargs), run.get_cancellation())
    return task.func(*args, **kwargs)


_is_coroutine_function = lru_cache(iscoroutinefunction)
