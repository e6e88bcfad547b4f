"""Run one task in the calling thread: call its function and return how the task ended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from inspect import iscoroutinefunction
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Protocol, Self

from django.tasks import Task, TaskContext
from django.tasks.base import TaskError
from django.utils.json import normalize_json

from ..progress.reporter import Reporting, current_reporting, current_result_id
from .connections import close_old_resources
from .coroutines import run_coroutine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..aliases import AnyResult, AnyTask


@dataclass(slots=True, eq=False)
class Outcome:
    """
    Holds how a task ended: with a return value, or with an exception.

    `error` and `message` describe `exception`. A worker process sends `error` and `message` to its
    parent instead of `exception`, because the parent may be unable to import its class.
    """

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
        except BaseException:  # noqa: BLE001 - a user's __str__ may raise anything
            message = ""
        try:
            traceback = "".join(format_exception(exception))
        except BaseException:  # noqa: BLE001 - format_exception() calls users' methods
            traceback = f"{kind.__name__}: (the traceback could not be formatted)\n"
        error = TaskError(
            exception_class_path=f"{kind.__module__}.{kind.__qualname__}", traceback=traceback
        )
        return cls(error=error, message=message, exception=exception)


class Runnable(Reporting, Protocol):
    """Defines what execute() needs to know of a task that has started."""

    __slots__ = ()

    task: AnyTask
    args: list[Any]
    kwargs: dict[str, Any]

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
    try:
        return Outcome(json_value(_call(run)))
    except BaseException as exception:  # noqa: BLE001 - SystemExit must not end the worker
        return Outcome.failure(exception)
    finally:
        close_old_resources()


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

# normalize_json() returns values of exactly these types unchanged, so json_value() skips the call:
# even for None it would take as long as all other work at the end of a task.
_UNCHANGED = frozenset({str, int, float, bool, type(None)})


def json_value(value: Any) -> Any:
    """Return normalize_json(value), but faster for values that it would not change."""
    return value if type(value) in _UNCHANGED else normalize_json(value)


def json_list(values: Sequence[Any]) -> list[Any]:
    """Return a new list of the values of a list or tuple, each as normalize_json() returns it."""
    return [value if type(value) in _UNCHANGED else normalize_json(value) for value in values]


def json_dict(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a new dict of the keys and values of a dict, each as normalize_json() returns it."""
    return {json_value(name): json_value(value) for name, value in values.items()}
