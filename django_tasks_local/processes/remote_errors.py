"""
Describe an exception of a task with plain values, and make a RemoteError of them in the parent.

    a worker process                             the parent
    ----------------                             ----------
    describe(exception) -- plain values -------> rebuild(description)
                                                 logs the RemoteError, as Django does

The parent may be unable to import the exception's class. So it makes a class with the same name,
and a traceback of frames that have the same files, lines and functions but no variables. Programs
that group log records by class and frames, such as Sentry, then see those of the task.
"""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any

from ..execution.outcome import (
    cause_of,
    context_of,
    members_of,
    module_of,
    plain_text,
    qualname_of,
    traceback_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    # A file, a module, a function, the qualified name of the function, and a line.
    type Place = tuple[str, str, str, str, int]
    type Description = tuple[Any, ...]  # the values that describe() returns

MAX_DEPTH = 5  # causes of causes, and groups in groups, that are described
MAX_MEMBERS = 10  # exceptions of a group that are described
MAX_PLACES = 100  # the innermost frames of a traceback; a RecursionError has a thousand


class RemoteError(Exception):
    """
    Stands for the exception that a task raised in a worker process.

    The class of an instance is a subclass that has the `__module__` and `__qualname__` of the
    task's exception; the text and the traceback are those of the task's exception.
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


# A worker process calls the functions below.


def describe(exception: BaseException, depth: int = MAX_DEPTH) -> Description:
    """Return plain values for rebuild(): class, text, frames, cause, context and members."""
    kind = type(exception)
    cause = context = None
    members: list[Description] = []
    if depth:
        if (found := cause_of(exception)) is not None:
            cause = describe(found, depth - 1)
        elif (found := context_of(exception)) is not None and not _hides_context(exception):
            context = describe(found, depth - 1)
        if issubclass(kind, BaseExceptionGroup):
            members = [describe(one, depth - 1) for one in members_of(exception)[:MAX_MEMBERS]]
    return (
        plain_text(lambda: module_of(kind), "builtins"),
        plain_text(lambda: qualname_of(kind), "BaseException"),
        plain_text(lambda: str(exception), ""),
        _places(traceback_of(exception)),
        cause,
        context,
        members,
    )


_hides_context = BaseException.__dict__["__suppress_context__"].__get__


def _places(traceback: TracebackType | None) -> list[Place]:
    places = []
    while traceback is not None:
        places.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return [_place(frame, line) for frame, line in places[-MAX_PLACES:]]


def _place(frame: FrameType, line: int | None) -> Place:
    code = frame.f_code
    # The name of the module is any object that the task's module has put there.
    module = plain_text(lambda: frame.f_globals["__name__"], "")
    return str(code.co_filename), module, str(code.co_name), str(code.co_qualname), line or 0


# The parent calls the functions below.


def rebuild(description: Description, text: str) -> RemoteError:
    """Return the described RemoteError; one with only `text` if the description is invalid."""
    try:
        return _rebuild(description)
    except Exception:  # noqa: BLE001 - a class name may be invalid in many ways
        return RemoteError(text)


def _rebuild(description: Description) -> RemoteError:
    module, qualname, message, places, cause, context, members = description
    error: RemoteError
    if members:
        error = _class(module, qualname, True)(message, [_rebuild(one) for one in members])
    else:
        error = _class(module, qualname, False)(message)
    if cause is not None:
        error.__cause__ = _rebuild(cause)
    elif context is not None:
        error.__context__ = _rebuild(context)
    return error.with_traceback(_traceback(places))


@lru_cache(maxsize=256)
def _class(module: str, qualname: str, is_group: bool) -> type[Any]:
    bases = (RemoteError, ExceptionGroup) if is_group else (RemoteError,)
    names = {"__module__": module, "__qualname__": qualname}
    return type(qualname.rpartition(".")[2], bases, names)


def _traceback(places: list[Place]) -> TracebackType | None:
    traceback = None
    for *names, line in reversed(places):
        # An instruction below 0 has no columns, so Python marks no part of the line.
        traceback = TracebackType(traceback, _frame(*names), -1, line)
    return traceback


@lru_cache(maxsize=256)
def _frame(file: str, module: str, function: str, qualname: str) -> FrameType:
    """Return a frame with these names and without variables, which is never executed."""
    code = _empty.__code__.replace(co_filename=file, co_name=function, co_qualname=qualname)
    # Use the frame of a generator, because a generator that is not executed has no `f_back`. Any
    # other frame would keep alive the frames of the dispatcher that have called this function.
    generator = FunctionType(code, {"__name__": module, "__file__": file})()
    frame: FrameType = generator.gi_frame
    generator.close()
    return frame


def _empty() -> Iterator[None]:
    yield
