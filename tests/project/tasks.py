"""
Tasks that the tests enqueue.

To keep a task running, a test passes the path of a closed Gate; the task then calls wait_for(),
which blocks until the test opens the gate. Other waits in a task last at most LIMIT seconds.
"""

import asyncio
import os
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import AsyncIterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.core.cache import cache
from django.db import connections, transaction
from django.tasks import TaskContext, task
from django.utils import timezone, translation

from django_tasks_local import ajoin, current_result_id, join, report_progress, track
from django_tasks_local.exceptions import TaskCancelled
from tests.project.gates import Gate, wait_for

LIMIT = 30.0  # seconds that a wait in a task or in a test may take at most


# The gates of the current test by path, and the notes that its tasks in threads write, by name.
gates: dict[str, Gate] = {}
notes: defaultdict[str, list[Any]] = defaultdict(list)
marker: ContextVar[str] = ContextVar("marker")
children: set[asyncio.Task[None]] = set()  # prevents their garbage collection


@task
def noop() -> None:
    """Do nothing."""


@task
def add(a: Any, b: Any = 1) -> Any:
    """Return the sum of `a` and `b`."""
    return a + b


@task
def echo(*args: Any, **kwargs: Any) -> Any:
    """Return the positional and the keyword arguments that this task received."""
    return {"args": args, "kwargs": kwargs}


@task
def result_id() -> str:
    """Return the value of current_result_id in a function."""
    return current_result_id.get()


@task
async def async_result_id() -> str:
    """Return the value of current_result_id in a coroutine."""
    await asyncio.sleep(0)
    return current_result_id.get()


@task(takes_context=True)
def with_context(context: TaskContext, number: int) -> list[Any]:
    """Return values of the TaskContext and its result, followed by `number`."""
    result = context.task_result
    return [context.attempt, result.id, str(result.status), number]


@task(takes_context=True)
async def async_with_context(context: TaskContext) -> str:
    """Return the task's id from the TaskContext."""
    return context.task_result.id


class UnprintableError(Exception):
    """An exception whose str() raises RuntimeError."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class ExitingError(Exception):
    """An exception whose str() raises SystemExit."""

    def __str__(self) -> str:
        raise SystemExit(3)


class DemandingError(Exception):
    """An exception whose constructor needs two arguments, so that it cannot be unpickled."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


@task
def fail(kind: str = "value") -> None:
    """Raise the exception that the name `kind` selects."""
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
    """Raise the exception that the name `kind` selects, in a coroutine."""
    await asyncio.sleep(0)
    fail.func(kind)


@task
def recurse() -> None:
    """Call this function recursively until Python raises RecursionError."""
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
    """Empty the list that was passed as argument; return its new length."""
    values.clear()
    return len(values)


@task
def gated(gate: str) -> str:
    """Report progress, then block until the test opens the gate; return the gate's path."""
    report_progress(10, message="waiting for the test")
    wait_for(gate)
    return gate


@task
async def gated_async(gate: str) -> None:
    """
    Block a thread of sync_to_async() and one of asyncio.to_thread() until the test opens the gate.
    """
    both = threading.Barrier(2)

    def wait() -> None:
        both.wait(LIMIT)
        report_progress(10, message="waiting for the test")
        wait_for(gate)

    await asyncio.gather(sync_to_async(wait)(), asyncio.to_thread(wait))


@task
def sign(book: str, gate: str | None = None) -> int:
    """
    Report twice, block until the gate (if any) opens, then append the task's id and pid to `book`.
    """
    report_progress(1)
    report_progress(2)
    if gate is not None:
        wait_for(gate)
    with Path(book).open("a", encoding="utf-8") as file:
        file.write(f"{current_result_id.get()} {os.getpid()}\n")
    return os.getpid()


@task
def leave_traces(name: str) -> None:
    """
    Note the context variable, language and time zone of this thread, then change all three.

    The next task in this thread must not see the changes.
    """
    notes[name].append(
        (marker.get(None), translation.get_language(), timezone.get_current_timezone_name())
    )
    marker.set("leaked")
    translation.activate("de")
    timezone.activate("Asia/Tokyo")


@task
def query(name: str) -> int:
    """Count the users in the database, and note the database connection of this thread."""
    count = get_user_model().objects.count()
    notes[name].append(connections["default"].connection)
    return count


@task
def add_user(name: str) -> int:
    """Count the users in the database and then add one, in one transaction; return the count."""
    with transaction.atomic():
        count = get_user_model().objects.count()
        get_user_model().objects.create(username=name)
    return count


@task
async def query_async() -> int:
    """Count the users in the database from a coroutine."""
    return await get_user_model().objects.acount()


@task
def query_in_own_loop(name: str) -> None:
    """Query the database in an event loop of this sync task; note the thread and its connection."""

    def query() -> None:
        get_user_model().objects.count()
        notes[name].append((threading.current_thread().name, connections["default"].connection))

    asyncio.run(sync_to_async(query)())


@task
def use_cache() -> str:
    """Write a key to the default cache and return the value that the cache then has for it."""
    cache.set("key", "value")
    return str(cache.get("key"))


@task
async def use_cache_async() -> str:
    """
    Write a key to the default cache from a coroutine; return the value that the cache then has.
    """
    await cache.aset("key", "value")
    return str(await cache.aget("key"))


@task
def burst(calls: int, gate: str) -> None:
    """
    Report `calls` times without a pause, then block until the test opens the gate.

    The task reports far more often than its reporter publishes events.
    """
    for number in range(1, calls + 1):
        report_progress(number, calls)
    wait_for(gate)


@task
def steps(count: int, pause: float = 0.0) -> int:
    """Report `count` steps, each with its own message and followed by `pause` seconds."""
    for number in range(1, count + 1):
        report_progress(number, count, f"step {number}")
        if pause:
            time.sleep(pause)
    return count


@task
def large(count: int, size: int, pause: float) -> None:
    """Report `count` messages of `size` characters, each followed by `pause` seconds."""
    for number in range(1, count + 1):
        report_progress(number, count, str(number).ljust(size))
        time.sleep(pause)


@task
async def nap() -> str:
    """Sleep for a moment in a coroutine."""
    await asyncio.sleep(0.01)
    return "awake"


@task
def endless() -> None:
    """Sleep until the task is stopped."""
    time.sleep(LIMIT)


@task
def tracked(count: int, gate: str | None = None) -> int:
    """Loop with track(); if there is a gate, block halfway until the test opens the gate."""
    for number in track(range(count), message="tracking"):
        if gate is not None and number == count // 2:
            report_progress(message="half-way")
            wait_for(gate)
    return count


@task
def track_users() -> list[str]:
    """Iterate over the users of the database with track(); return their names."""
    return [user.get_username() for user in track(get_user_model().objects.order_by("pk"))]


@task
async def atrack_users() -> list[str]:
    """Iterate over the users of the database with track() and `async for`; return their names."""
    return [user.get_username() async for user in track(get_user_model().objects.order_by("pk"))]


@task
def report(arguments: list[Any], keywords: dict[str, Any], gate: str) -> str:
    """
    Report these values, then block until the gate opens; if the report fails, return its error.
    """
    try:
        report_progress(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    wait_for(gate)
    return "reported"


@task
def until_cancelled(name: str, swallow: bool = False) -> str:
    """Report until the task is cancelled, note the cleanup, then raise or swallow TaskCancelled."""
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
    """Report until the task is cancelled; then block in `finally` until the test opens the gate."""
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
    """Sleep until the task is cancelled; then block in `finally` until the test opens the gate."""
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
    """
    Return while a child asyncio task sleeps; the `finally` block of the child calls sync code.
    """

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
    """Return while the thread of sync_to_async() still blocks until the test opens the gate."""
    report_progress(message="working")
    query = sync_to_async(wait_for)(gate)
    await asyncio.wait([asyncio.ensure_future(query)], timeout=0.01)
    report_progress(message="ending")
    return "value"


@task
async def sleep_until_cancelled(name: str) -> None:
    """Sleep in a coroutine until the task is cancelled, then note the cleanup."""
    report_progress(message="sleeping")
    try:
        await asyncio.sleep(LIMIT)
    finally:
        notes[name].append("cleaned up")


def report_until_cancelled(note: str) -> None:
    """Report in a thread until the task is cancelled; write how the thread ended to `note`."""
    deadline = time.monotonic() + LIMIT / 2
    try:
        while time.monotonic() < deadline:
            report_progress(message="working in threads")
            time.sleep(0.001)
    except TaskCancelled:
        # `note` appears complete, because a test waits for it.
        with Path(f"{note}-new").open("w", encoding="utf-8") as file:
            file.write("cancelled")
        Path(f"{note}-new").replace(note)
        raise


def report_clean_up(note: str) -> None:
    """Report in a thread that starts after the cancellation, which does not interrupt it."""
    report_progress(message="cleaning up")
    Path(note).write_text("cleaned up", encoding="utf-8")


@task
async def work_in_threads(note: str) -> None:
    """Report in a thread of asyncio.to_thread() and in one of sync_to_async() until cancelled."""
    try:
        await asyncio.gather(
            asyncio.to_thread(report_until_cancelled, f"{note}-to_thread"),
            sync_to_async(report_until_cancelled)(f"{note}-sync_to_async"),
        )
    finally:
        await asyncio.to_thread(report_clean_up, f"{note}-coroutine")


async def report_in_coroutine() -> None:
    """Report in an asyncio task until the task is cancelled."""
    try:
        async for _ in track(ticks(), message="working in a group"):
            pass
    finally:
        report_progress(message="cleaning up")


async def ticks() -> AsyncIterator[None]:
    """Yield often, for a limited time."""
    deadline = time.monotonic() + LIMIT / 2
    while time.monotonic() < deadline:
        yield
        # A sleep here would let the cancellation of the asyncio task come first.
        time.sleep(0.001)  # noqa: ASYNC251


@task
async def work_in_group() -> None:
    """Report in one asyncio task of a TaskGroup inside of another group."""
    async with asyncio.TaskGroup(), asyncio.TaskGroup() as group:
        group.create_task(report_in_coroutine())


@task
def work_in_own_loop(note: str) -> None:
    """Run asyncio tasks and their threads in a loop of this sync task; report after the loop."""
    try:
        asyncio.run(work_in_threads.func(note))
    finally:
        report_progress(message="after the loop")


@task
def nested() -> str:
    """
    Run `result_id` on the ImmediateBackend inside this task; check that each task has its own id.
    """
    inner = result_id.using(backend="immediate").enqueue()
    if inner.return_value != inner.id:
        raise AssertionError("the inner task had the wrong id")
    return current_result_id.get()


@task
def enqueue_noop(alias: str) -> str:
    """Enqueue the task `noop` with another backend; return the id of its result."""
    return noop.using(backend=alias).enqueue().id


@task
def join_task(id: str) -> list[str]:
    """Join the task with this id; return the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        join(id, LIMIT)
    return [str(warning.message) for warning in caught]


@task
async def ajoin_task(id: str) -> list[str]:
    """Join the task with this id in async code; return the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await ajoin(id, LIMIT)
    return [str(warning.message) for warning in caught]
