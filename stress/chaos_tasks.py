"""The tasks of stress/chaos.py, and their outcomes if nothing cancels, kills or stops them."""

import asyncio
import ctypes
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

from django.tasks import task

from django_tasks_local import report_progress, track
from django_tasks_local.exceptions import TaskCancelled

TIMEOUT = 1.0  # Seconds; the option TIMEOUT of the process backend.
# Seconds that a task takes that stress/chaos.py cancels, or the process backend stops, before that.
ENDLESS = 60.0


@task
def noop() -> None:
    """Do nothing and return None."""


@task
def storm(times: int) -> int:
    """Call report_progress() `times` times as fast as possible."""
    for number in range(times):
        report_progress(number, times, "x" * (number % 50), data={"number": number})
    return times


@task
def tracked(count: int) -> int:
    """Count the items of a track() loop."""
    return sum(1 for _ in track(range(count), message="counting"))


@task
async def coroutine(count: int) -> int:
    """Count the items of an async track() loop."""

    async def numbers() -> AsyncIterator[int]:
        for number in range(count):
            await asyncio.sleep(0.001)
            yield number

    return sum([1 async for _ in track(numbers(), total=count)])


@task
def nap(seconds: float) -> str:
    """Sleep without a call of report_progress()."""
    time.sleep(seconds)
    return "slept"


@task
def compute(rounds: int) -> int:
    """Compute in Python, so that the task uses CPU time."""
    return sum(number * number % 7 for number in range(rounds))


@task
def fail(kind: str) -> None:
    """Raise the exception that `kind` names."""
    errors: dict[str, BaseException] = {
        "value": ValueError("bad value"),
        "exit": SystemExit(3),
        "interrupt": KeyboardInterrupt(),
        "generator": GeneratorExit(),
        "cancelled": asyncio.CancelledError(),
        "group": ExceptionGroup("several", [ValueError("one"), TypeError("two")]),
    }
    raise errors[kind]


@task
async def fail_async(kind: str) -> None:
    """Raise the exception that `kind` names in a coroutine."""
    await asyncio.sleep(0)
    fail.func(kind)


@task
def not_json() -> Any:
    """Return a value that JSON cannot represent."""
    return object()


@task
def swallow(seconds: float) -> str:
    """Catch TaskCancelled and return."""
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            report_progress(message="working")
            time.sleep(0.005)
    except TaskCancelled:
        return "swallowed"
    return "finished"


@task
def endless() -> None:
    """Call report_progress() until the task is cancelled."""
    end = time.monotonic() + ENDLESS
    while time.monotonic() < end:
        report_progress(message="still here")
        time.sleep(0.005)


@task
async def endless_coroutine() -> None:
    """Sleep in a coroutine until the task is cancelled."""
    await asyncio.sleep(ENDLESS)


@task
def overlong() -> None:
    """Sleep for longer than TIMEOUT, so that the process backend stops the task."""
    time.sleep(ENDLESS)


@task
def hold_the_gil() -> int:
    """Run for longer than TIMEOUT in C code that does not check for signals."""
    return sum(range(10**12))


@task
def die(how: str) -> None:
    """End the worker process by os._exit(), a crash or SIGKILL."""
    report_progress(50)
    if how == "exit":
        os._exit(3)
    elif how == "crash":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)


type Choice = tuple[float, Any, Callable[[Random], tuple[Any, ...]]]

FAILURES = ("value", "exit", "interrupt", "generator", "cancelled", "group")
# Each choice consists of a weight, a task, and a function that draws the task's arguments.
ANYWHERE: tuple[Choice, ...] = (
    (30, noop, lambda rng: ()),
    (6, storm, lambda rng: (rng.choice((1, 10, 1000, 10_000)),)),
    (4, tracked, lambda rng: (rng.choice((0, 10, 50_000)),)),
    (4, coroutine, lambda rng: (rng.choice((1, 100)),)),
    (3, nap, lambda rng: (rng.uniform(0, 0.4),)),
    (2, compute, lambda rng: (rng.choice((1000, 300_000)),)),
    (5, fail, lambda rng: (rng.choice(FAILURES),)),
    (2, fail_async, lambda rng: (rng.choice(FAILURES),)),
    (2, not_json, lambda rng: ()),
    (2, swallow, lambda rng: (rng.uniform(0, 0.3),)),
    (0.5, endless, lambda rng: ()),
    (0.5, endless_coroutine, lambda rng: ()),
)
IN_PROCESSES: tuple[Choice, ...] = (
    *ANYWHERE,
    (0.3, overlong, lambda rng: ()),
    (0.2, hold_the_gil, lambda rng: ()),
    (1, die, lambda rng: (rng.choice(("exit", "crash", "kernel")),)),
)
TO_BE_CANCELLED = (endless, endless_coroutine)

# By the task's name, the outcomes that can occur without a cancellation, a kill or a timeout.
EXPECTED = {
    **{choice.name: {"successful"} for _, choice, _ in IN_PROCESSES},
    **{choice.name: {"failed"} for choice in (fail, fail_async, not_json)},
    **{choice.name: set[str]() for choice in (*TO_BE_CANCELLED, overlong, hold_the_gil)},
    die.name: {"died"},
}
