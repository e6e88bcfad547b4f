"""Describe how a task ended, whatever exception it has raised: nothing here raises another one."""

from __future__ import annotations

from dataclasses import dataclass
from traceback import clear_frames, format_exception, format_tb
from typing import TYPE_CHECKING, Any, Self

from django.tasks.base import TaskError

from ..exceptions import TaskCancelled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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
        """
        Return the outcome of a task that raised; `error` and `message` have only plain str.

        An asyncio.TaskGroup raises a group of the TaskCancelled that its tasks have raised. If the
        group contains nothing else, the outcome is a TaskCancelled.
        """
        if _has_only_cancellations(exception):
            cancelled = TaskCancelled("The task was cancelled.")
            cancelled.__cause__ = exception
            exception = cancelled
        path = _class_path(type(exception))
        return cls(
            error=TaskError(exception_class_path=path, traceback=_traceback(exception, path)),
            message=plain_text(lambda: str(exception), ""),
            exception=exception,
        )

    def drop_exception(self) -> None:
        """
        Forget the exception, and clear the local variables of the frames in its traceback.

        A variable often refers to the exception again: `error = exc` in an `except` block, or the
        asyncio.Task of a child. Such a cycle would keep all variables of the task alive until the
        next full garbage collection, which may be thousands of tasks later.
        """
        exception, self.exception = self.exception, None
        if exception is not None:
            for one in _related(exception):
                clear_frames(traceback_of(one))  # It skips frames that are being executed.


def plain_text(make: Callable[[], str], default: str) -> str:
    """Return the text that `make` returns, as plain str; `default` if it raises an exception."""
    try:
        # str.__str__() makes a plain str of an instance of a subclass.
        return str.__str__(make())
    except BaseException:  # noqa: BLE001 - a user's __str__ may raise anything, such as SystemExit
        return default


def _has_only_cancellations(exception: BaseException) -> bool:
    """Return whether the exception is a group whose members, also in groups, are TaskCancelled."""
    found = [exception]
    while found:
        one = found.pop()
        if issubclass(type(one), BaseExceptionGroup):
            found += members_of(one)
        elif not issubclass(type(one), TaskCancelled):
            return False
    return issubclass(type(exception), BaseExceptionGroup)


module_of = type.__dict__["__module__"].__get__
qualname_of = type.__dict__["__qualname__"].__get__


def _class_path(kind: type[BaseException]) -> str:
    """Return the dotted path of an exception's class, also if its metaclass hides the names."""
    return plain_text(lambda: f"{module_of(kind)}.{qualname_of(kind)}", "builtins.BaseException")


def _traceback(exception: BaseException, path: str) -> str:
    """Return the traceback as Python prints it, or only its frames if it cannot be formatted."""

    def make_frames() -> str:
        frames = "".join(format_tb(traceback_of(exception)))
        return f"Traceback (most recent call last):\n{frames}{path}: (cannot be formatted)\n"

    fallback = plain_text(make_frames, f"{path}: (the traceback could not be formatted)\n")
    return plain_text(lambda: "".join(format_exception(exception)), fallback)


# The descriptors of BaseException, because a user's class may define these names otherwise.
traceback_of = BaseException.__dict__["__traceback__"].__get__
context_of = BaseException.__dict__["__context__"].__get__
cause_of = BaseException.__dict__["__cause__"].__get__
members_of = BaseExceptionGroup.__dict__["exceptions"].__get__


def _related(exception: BaseException) -> Iterator[BaseException]:
    """Yield an exception, those that it was raised from or while handling, and group members."""
    seen: set[int] = set()
    found: list[BaseException | None] = [exception]
    while found:
        one = found.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        found += [context_of(one), cause_of(one)]
        if issubclass(type(one), BaseExceptionGroup):
            found += members_of(one)
        yield one
