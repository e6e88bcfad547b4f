"""Tasks for tests. A task that waits does so at a gate that the test opens, or up to LIMIT."""

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
    """A locked file: tasks in any process wait for the lock until the test opens the gate."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("w")  # noqa: SIM115 - closing it releases the lock
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def set(self) -> None:
        """Open the gate, now and for later waits."""
        self._file.close()


# Of the test that runs: its gates by path, and notes that its tasks in threads wrote, by name.
gates: dict[str, Gate] = {}
notes: defaultdict[str, list[Any]] = defaultdict(list)
marker: ContextVar[str] = ContextVar("marker")
children: set[asyncio.Task[None]] = set()  # keeps them from garbage collection


def wait_for(gate: str) -> None:
    """Wait until the test opens the gate; the fixture `no_leaks` opens it after the test."""
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
    """Return the id that current_result_id has in a function."""
    return current_result_id.get()


@task
async def async_result_id() -> str:
    """Return the id that current_result_id has in a coroutine."""
    await asyncio.sleep(0)
    return current_result_id.get()


@task(takes_context=True)
def with_context(context: TaskContext, number: int) -> list[Any]:
    """Return values of the TaskContext."""
    result = context.task_result
    return [context.attempt, result.id, str(result.status), number]


@task(takes_context=True)
async def async_with_context(context: TaskContext) -> str:
    """Return the task's id from the TaskContext."""
    return context.task_result.id


class UnprintableError(Exception):
    """An error whose str() raises."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class ExitingError(Exception):
    """An error whose str() raises SystemExit."""

    def __str__(self) -> str:
        raise SystemExit(3)


class DemandingError(Exception):
    """An error whose constructor has its own arguments, so that it cannot be unpickled."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


@task
def fail(kind: str = "value") -> None:
    """Raise an error of this kind."""
    errors: dict[str, BaseException] = {
        "value": ValueError("bad value\nin two lines"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "generator": GeneratorExit(),
        "unprintable": UnprintableError(),
        "exiting": ExitingError(),
        "demanding": DemandingError(7, "because"),
        "group": ExceptionGroup("several", [ValueError("one"), TypeError("two")]),
        "cancelled": asyncio.CancelledError(),
    }
    raise errors[kind]


@task
async def fail_async(kind: str = "value") -> None:
    """Raise an error of this kind in a coroutine."""
    await asyncio.sleep(0)
    fail.func(kind)


@task
def recurse() -> None:
    """Recurse without end."""
    recurse.func()


@task
def not_json() -> Any:
    """Return an object that JSON cannot represent."""
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
    """Report progress, then wait at the gate."""
    report_progress(10, message="waiting for the test")
    wait_for(gate)
    return gate


@task
async def gated_async(gate: str) -> None:
    """Wait at the gate in both kinds of threads that run sync code for a coroutine."""
    both = threading.Barrier(2)

    def wait() -> None:
        both.wait(LIMIT)
        report_progress(10, message="waiting for the test")
        wait_for(gate)

    await asyncio.gather(sync_to_async(wait)(), asyncio.to_thread(wait))


@task
def sign(book: str, gate: str | None = None) -> int:
    """Report twice, perhaps wait at the gate, then write the ids of task and process to a book."""
    report_progress(1)
    report_progress(2)
    if gate is not None:
        wait_for(gate)
    with Path(book).open("a") as file:
        file.write(f"{current_result_id.get()} {os.getpid()}\n")
    return os.getpid()


@task
def leave_traces(name: str) -> None:
    """Note the context of this thread, then change it; the next task must not see the changes."""
    notes[name].append(
        (marker.get(None), translation.get_language(), timezone.get_current_timezone_name())
    )
    marker.set("leaked")
    translation.activate("de")
    timezone.activate("Asia/Tokyo")


@task
def query(name: str) -> int:
    """Query the database, and note the connection."""
    count = get_user_model().objects.count()
    notes[name].append(connections["default"].connection)
    return count


@task
async def query_async() -> int:
    """Query the database in a coroutine."""
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
    """Report far more often than events are published, then wait until the file `gate` exists."""
    for number in range(1, calls + 1):
        report_progress(number, calls)
    wait_for(gate)


@task
def steps(count: int, pause: float = 0.0) -> int:
    """Report each step."""
    for number in range(1, count + 1):
        report_progress(number, count, f"step {number}")
        if pause:
            time.sleep(pause)
    return count


@task
def large(count: int, size: int, pause: float) -> None:
    """Report messages of `size` characters."""
    for number in range(1, count + 1):
        report_progress(number, count, str(number).ljust(size))
        time.sleep(pause)


@task
def tracked(count: int, gate: str | None = None) -> int:
    """Track a loop; with a gate, wait there halfway."""
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
    """Report these values, then wait at the gate; return the error if the report raises one."""
    try:
        report_progress(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    wait_for(gate)
    return "reported"


@task
def until_cancelled(name: str, swallow: bool = False) -> str:
    """Report until the task is cancelled, then clean up."""
    try:
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            report_progress(message="working")
            time.sleep(0.001)
    except TaskCancelled:
        report_progress(message="cleaning up")
        if not swallow:
            raise
    finally:
        notes[name].append("cleaned up")
    return "swallowed"


@task
def clean_up(name: str, gate: str) -> None:
    """Report until the task is cancelled; wait at the gate during the cleanup."""
    try:
        while True:
            report_progress(message="working")
            time.sleep(0.001)
    finally:
        notes[name].append("cleaning up")
        wait_for(gate)
        report_progress(message="clean")
        notes[name].append("cleaned up")


@task
async def clean_up_async(name: str, gate: str) -> None:
    """Sleep until the task is cancelled; wait at the gate during the cleanup."""
    report_progress(message="working")
    try:
        await asyncio.sleep(LIMIT)
    finally:
        notes[name].append("cleaning up")
        await asyncio.to_thread(wait_for, gate)
        report_progress(message="clean")
        notes[name].append("cleaned up")


@task
async def leave_a_child() -> None:
    """End while a child asyncio task waits; the child's cleanup calls sync code."""

    def clean_up() -> None:
        notes["child"].append(threading.current_thread().name)

    async def child() -> None:
        try:
            await asyncio.sleep(LIMIT)
        finally:
            await sync_to_async(clean_up)()

    children.add(asyncio.create_task(child()))
    await asyncio.sleep(0)


@task
async def leave_a_query(gate: str) -> str:
    """End while the thread for thread-sensitive code waits at the gate."""
    report_progress(message="working")
    query = sync_to_async(wait_for)(gate)
    await asyncio.wait([asyncio.ensure_future(query)], timeout=0.01)
    report_progress(message="ending")
    return "value"


@task
async def sleep_until_cancelled(name: str) -> None:
    """Sleep until the task is cancelled."""
    report_progress(message="sleeping")
    try:
        await asyncio.sleep(LIMIT)
    finally:
        notes[name].append("cleaned up")


@task
def nested() -> str:
    """Run another task on the ImmediateBackend within this one."""
    inner = result_id.using(backend="immediate").enqueue()
    if inner.return_value != inner.id:
        raise AssertionError("the inner task had the wrong id")
    return current_result_id.get()
