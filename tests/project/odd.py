"""Tasks with exceptions that cannot be formatted, or whose variables refer to the exception."""

import asyncio
import functools
import gc
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from django.tasks import task

from django_tasks_local.progress.reporter import current_reporting


class HidesName(type):
    """A metaclass whose classes have no `__qualname__`."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "__qualname__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class HidesModule(type):
    """A metaclass whose classes have no `__module__`."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "__module__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class NamelessError(Exception, metaclass=HidesName):
    """An error whose class has no `__qualname__`."""


class ModulelessError(Exception, metaclass=HidesModule):
    """An error whose class has no `__module__`."""


class UnreadableGroup(ExceptionGroup[Exception]):
    """An exception group whose `exceptions` raises."""

    @property
    def exceptions(self) -> NoReturn:  # type: ignore[override]
        """Raise an error."""
        raise RuntimeError("no members")


class ExitingError(Exception):
    """An error whose text raises SystemExit."""

    def __str__(self) -> NoReturn:
        raise SystemExit(3)


class InterruptingError(Exception):
    """An error whose text raises KeyboardInterrupt."""

    def __str__(self) -> NoReturn:
        raise KeyboardInterrupt


class Text(str):
    """A text of a class that the web process need not have."""

    __slots__ = ()


class SubclassError(Exception):
    """An error whose text is an instance of a subclass of str."""

    def __str__(self) -> str:
        return Text("text")


class GuardedError(Exception):
    """An error whose attributes raise SystemExit."""

    def __getattribute__(self, name: str) -> NoReturn:
        raise SystemExit(4)


ERRORS = {
    "syntax": "SyntaxError",
    "group": "UnreadableGroup",
    "exit": "ExitingError",
    "interrupt": "InterruptingError",
    "nameless": "NamelessError",
    "moduleless": "ModulelessError",
    "subclass": "SubclassError",
    "guarded": "GuardedError",
}


class UnprintableName:
    """An object whose text raises."""

    def __str__(self) -> NoReturn:
        raise RuntimeError


def make(name: str) -> BaseException:
    """Return an exception that is hard to describe."""
    if name == "syntax":
        error = SyntaxError("bad")
        odd: Any = error
        odd.lineno, odd.offset, odd.text, odd.filename = "x", [], 5, object()
        return error
    if name == "group":
        return UnreadableGroup("group", [ValueError()])
    if name == "unprintable module":
        made: Any = type("Made", (Exception,), {})
        made.__module__ = UnprintableName()
        return made()  # type: ignore[no-any-return]
    found: BaseException = globals()[ERRORS[name]]()
    return found


@task
def fail(name: str) -> None:
    """Raise an exception that is hard to describe."""
    raise make(name)


class Large:
    """Stands for a large object in a variable of a task."""


# A reference to the Large of the failed task that ran last in this process.
references: list[weakref.ref[Large]] = []


def make_large() -> Large:
    """Return a Large to which `references` refers, and disable the garbage collection."""
    gc.disable()
    large = Large()
    references[:] = [weakref.ref(large)]
    return large


@task
def saved() -> None:
    """Keep the exception in a variable, as many functions that retry something do."""
    large = make_large()
    try:
        raise ValueError("kept in a variable")
    except ValueError as error:
        last_error = error
    assert large
    raise last_error


@task
async def saved_async() -> None:
    """Keep the exception of a coroutine in a variable."""
    await asyncio.sleep(0)
    saved.func()


@task
async def child() -> None:
    """Fail with the exception of an asyncio task, which is in a variable."""
    large = make_large()

    async def run() -> None:
        raise ValueError("kept in a variable")

    asyncio_task = asyncio.create_task(run())
    await asyncio_task
    assert large


@task
def cause() -> None:
    """Fail with an exception whose cause is in a variable."""
    try:
        saved.func()
    except ValueError as error:
        raise RuntimeError("the first error is its cause") from error


@task
def group() -> None:
    """Fail with a group whose member is in a variable."""
    try:
        saved.func()
    except ValueError as error:
        member = error
    raise ExceptionGroup("a group", [member])


@task
def is_freed() -> bool:
    """Return whether the Large of the failed task is freed."""
    gc.enable()
    [reference] = references
    return reference() is None


@task
def types(*args: Any, **kwargs: Any) -> list[str]:
    """Return the names of the types of three arguments."""
    return [type(value).__name__ for value in (args[0], args[1][0], kwargs["x"])]


def ordinary[**P, T](function: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T]]:
    """Wrap a function in an ordinary one, as decorators do that know no coroutines."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return function(*args, **kwargs)

    return wrapper


@task
@ordinary
async def decorated(number: int) -> int:
    """Return the next number."""
    await asyncio.sleep(0)
    return number + 1


@task
def send_bytes(data: str) -> None:
    """Send these bytes, in hexadecimal, from a worker process to its parent; wait for the end."""
    run: Any = current_reporting.get()
    run.worker.send(bytes.fromhex(data))
    time.sleep(30)
