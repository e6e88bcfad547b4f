"""Run one task, in the calling thread: context, arguments, outcome, clean-up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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
        except BaseException:  # noqa: BLE001 - an error in a user's __str__ must not hide this one
            message = ""
        try:
            traceback = "".join(format_exception(exception))
        except BaseException:  # noqa: BLE001 - as above: it calls methods of users' exceptions
            traceback = f"{kind.__name__}: (the traceback could not be formatted)\n"
        error = TaskError(
            exception_class_path=f"{kind.__module__}.{kind.__qualname__}", traceback=traceback
        )
        return cls(error=error, message=message, exception=exception)


class Runnable(Reporting, Protocol):
    """A task that was started, as execute() needs it."""

    __slots__ = ()

    task: AnyTask
    args: list[Any]
    kwargs: dict[str, Any]

    def task_result(self) -> AnyResult:
        """Return the running result, for a task with `takes_context`."""


def execute(run: Runnable) -> Outcome:
    """
    Run a task that was started and return its outcome; an exception of the task is part of it.

    Called in the worker's thread, in a contextvars.Context that the caller made for this task.
    Before it returns, it closes old database connections and caches, as at the end of a request.
    """
    current_result_id.set(run.id)
    current_reporting.set(run)
    try:
        return Outcome(json_value(_call(run)))
    except BaseException as exception:  # noqa: BLE001 - a SystemExit ends the task, not the worker
        return Outcome.failure(exception)
    finally:
        close_old_resources()


def _call(run: Runnable) -> Any:
    task = run.task
    # Copies, so that a task which changes its arguments does not change those in its result.
    args = json_list(run.args) if run.args else []
    kwargs = json_dict(run.kwargs) if run.kwargs else {}
    if task.takes_context:
        args.insert(0, TaskContext(task_result=run.task_result()))
    if type(task).call is not Task.call:  # a task class with a call() of its own
        return task.call(*args, **kwargs)
    if _is_coroutine_function(task.func):
        return run_coroutine(task.func(*args, **kwargs), run.get_cancellation())
    return task.func(*args, **kwargs)


_is_coroutine_function = lru_cache(iscoroutinefunction)

# normalize_json() returns values of exactly these types as they are, and takes as long for None
# as the rest of the end of a task. Values of subclasses take the long way, to the same result.
_UNCHANGED = frozenset({str, int, float, bool, type(None)})


def json_value(value: Any) -> Any:
    """Return normalize_json(value)."""
    return value if type(value) in _UNCHANGED else normalize_json(value)


def json_list(values: Sequence[Any]) -> list[Any]:
    """Return normalize_json() of a list or a tuple: always a new list."""
    return [value if type(value) in _UNCHANGED else normalize_json(value) for value in values]


def json_dict(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return normalize_json() of a dict: always a new dict."""
    return {json_value(name): json_value(value) for name, value in values.items()}
