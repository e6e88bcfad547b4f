"""Tasks for tests. What waits, waits for the test, and never longer than LIMIT."""

import asyncio
import fcntl
import os
import threading
import time
from collections import defaultdict
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.core.cache import cache
from django.db import connections
from django.tasks import TaskContext, task
from django.utils import timezone, translation

from django_tasks_local import current_result_id, report_progress, track
from django_tasks_local.exceptions import TaskCancelled

LIMIT = 30.0  # seconds


class Gate:
    """A file that the test has locked: a task waits for it in this process or in another one."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w")  # noqa: SIM115 - closing it opens the gate
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def set(self) -> None:
        """Open the gate, for all who wait and who will."""
        self._file.close()


# The gates of the present test, and what tasks in threads have noted for it, by the gate's path.
gates: dict[str, Gate] = {}
notes: defaultdict[str, list[Any]] = defaultdict(list)
marker: ContextVar[str] = ContextVar("marker")
children: set[asyncio.Task[None]] = set()  # or they would be collected


def wait_for(gate: str) -> None:
    """Wait until the test opens the gate; at the latest it does so when it ends."""
    with Path(gate).open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)


@task
def noop() -> None:
    """Do nothing."""


@task
def add(a: Any, b: Any = 1) -> Any:
    """Return a sum."""
    return a + b


@task
def echo(*args: Any, **kwargs: Any) -> Any:
    """Return the arguments."""
    return {"args": args, "kwargs": kwargs}


@task
def result_id() -> str:
    """Return what the task knows of itself."""
    return current_result_id.get()


@task
async def async_result_id() -> str:
    """Return what a coroutine knows of itself."""
    await asyncio.sleep(0)
    return current_result_id.get()


@task(takes_context=True)
def with_context(context: TaskContext, number: int) -> list[Any]:
    """Return what the context says."""
    result = context.task_result
    return [context.attempt, result.id, str(result.status), number]


@task(takes_context=True)
async def async_with_context(context: TaskContext) -> str:
    """Return the id that the context says."""
    return context.task_result.id


class UnprintableError(Exception):
    """An error that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class DemandingError(Exception):
    """An error whose arguments are not those of Exception."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


@task
def fail(kind: str = "value") -> None:
    """Raise."""
    errors: dict[str, BaseException] = {
        "value": ValueError("bad value\nin two lines"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "generator": GeneratorExit(),
        "unprintable": UnprintableError(),
        "demanding": DemandingError(7, "because"),
        "group": ExceptionGroup("several", [ValueError("one"), TypeError("two")]),
        "cancelled": asyncio.CancelledError(),
    }
    raise errors[kind]


@task
async def fail_async(kind: str = "value") -> None:
    """Raise in a coroutine."""
    await asyncio.sleep(0)
    fail.func(kind)


@task
def recurse() -> None:
    """Never come back."""
    recurse.func()


@task
def not_json() -> Any:
    """Return what JSON cannot carry."""
    return object()


@task
def cyclic() -> Any:
    """Return a list that contains itself."""
    value: list[Any] = []
    value.append(value)
    return value


@task
def spoil(values: list[Any]) -> int:
    """Change an argument."""
    values.clear()
    return len(values)


@task
def gated(gate: str) -> str:
    """Wait for the test."""
    report_progress(10, message="waiting for the test")
    wait_for(gate)
    return gate


@task
async def gated_async(gate: str) -> None:
    """Wait for the test in the two kinds of threads that sync code may have in a coroutine."""
    both = threading.Barrier(2)

    def wait() -> None:
        both.wait(LIMIT)
        report_progress(10, message="waiting for the test")
        wait_for(gate)

    await asyncio.gather(sync_to_async(wait)(), asyncio.to_thread(wait))


@task
def sign(book: str, gate: str | None = None) -> int:
    """Report, wait for the test if it wants that, and sign a book: who has done which task."""
    report_progress(1)
    report_progress(2)
    if gate is not None:
        wait_for(gate)
    with Path(book).open("a") as file:
        file.write(f"{current_result_id.get()} {os.getpid()}\n")
    return os.getpid()


@task
def leave_traces(name: str) -> None:
    """Set what the next task in this thread must not see."""
    notes[name].append(
        (marker.get(None), translation.get_language(), timezone.get_current_timezone_name())
    )
    marker.set("leaked")
    translation.activate("de")
    timezone.activate("Asia/Tokyo")


@task
def query(name: str) -> int:
    """Use the database, and note the connection."""
    count = get_user_model().objects.count()
    notes[name].append(connections["default"].connection)
    return count


@task
async def query_async() -> int:
    """Use the database in a coroutine."""
    return await get_user_model().objects.acount()


@task
def use_cache() -> str:
    """Use the cache."""
    cache.set("key", "value")
    return str(cache.get("key"))


@task
async def use_cache_async() -> str:
    """Use the cache in a coroutine."""
    await cache.aset("key", "value")
    return str(await cache.aget("key"))


@task
def burst(calls: int, gate: str) -> None:
    """Report far more often than anybody can see, then go on for a while."""
    for number in range(1, calls + 1):
        report_progress(number, calls)
    wait_for(gate)


@task
def steps(count: int, pause: float = 0.0) -> int:
    """Report every step."""
    for number in range(1, count + 1):
        report_progress(number, count, f"step {number}")
        if pause:
            time.sleep(pause)
    return count


@task
def large(count: int, size: int, pause: float) -> None:
    """Report messages of so many characters."""
    for number in range(1, count + 1):
        report_progress(number, count, str(number).ljust(size))
        time.sleep(pause)


@task
def tracked(count: int, gate: str | None = None) -> int:
    """Track a loop; with a gate, wait in the middle of it."""
    for number in track(range(count), message="tracking"):
        if gate is not None and number == count // 2:
            report_progress(message="half-way")
            wait_for(gate)
    return count


@task
def track_users() -> list[str]:
    """Track a query."""
    return [user.get_username() for user in track(get_user_model().objects.order_by("pk"))]


@task
async def atrack_users() -> list[str]:
    """Track a query in a coroutine."""
    return [user.get_username() async for user in track(get_user_model().objects.order_by("pk"))]


@task
def report(arguments: list[Any], keywords: dict[str, Any], gate: str) -> str:
    """Report what the test says, return the error if there is one, and wait."""
    try:
        report_progress(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    wait_for(gate)
    return "reported"


@task
def until_cancelled(name: str, swallow: bool = False) -> str:
    """Report until the cancellation comes, then tidy up."""
    try:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            report_progress(message="working")
            time.sleep(0.001)
    except TaskCancelled:
        report_progress(message="tidying up")
        if not swallow:
            raise
    finally:
        notes[name].append("tidied")
    return "swallowed"


@task
def tidy_up(name: str, gate: str) -> None:
    """Wait for the cancellation, and for the test before and after it has tidied up."""
    try:
        while True:
            report_progress(message="working")
            time.sleep(0.001)
    finally:
        notes[name].append("tidying")
        wait_for(gate)
        report_progress(message="tidy")
        notes[name].append("tidied")


@task
async def tidy_up_async(name: str, gate: str) -> None:
    """The same in a coroutine."""
    report_progress(message="working")
    try:
        await asyncio.sleep(LIMIT)
    finally:
        notes[name].append("tidying")
        await asyncio.to_thread(wait_for, gate)
        report_progress(message="tidy")
        notes[name].append("tidied")


@task
async def leave_a_child() -> None:
    """End while a child task waits, which then tidies up in sync code."""

    def tidy_up() -> None:
        notes["child"].append(threading.current_thread().name)

    async def child() -> None:
        try:
            await asyncio.sleep(LIMIT)
        finally:
            await sync_to_async(tidy_up)()

    children.add(asyncio.create_task(child()))
    await asyncio.sleep(0)


@task
async def leave_a_query(gate: str) -> str:
    """End while the thread of thread-sensitive code is busy."""
    report_progress(message="working")
    query = sync_to_async(wait_for)(gate)
    await asyncio.wait([asyncio.ensure_future(query)], timeout=0.01)
    report_progress(message="ending")
    return "value"


@task
async def sleep_forever(name: str) -> None:
    """Wait for the cancellation."""
    report_progress(message="sleeping")
    try:
        await asyncio.sleep(LIMIT)
    finally:
        notes[name].append("tidied")


@task
def nested() -> str:
    """Run another task inside this one, on the ImmediateBackend."""
    inner = result_id.using(backend="immediate").enqueue()
    if inner.return_value != inner.id:
        raise AssertionError("the inner task saw the wrong id")
    return current_result_id.get()
