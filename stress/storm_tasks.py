"""The tasks of stress/storm.py, each with the outcome that the checker expects."""

import asyncio
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from django.tasks import task
from django.tasks.exceptions import TaskException

from django_tasks_local import current_result_id, report_progress, track
from django_tasks_local.exceptions import TaskCancelled

# The environment variable with the path of the file in which worker processes record their runs.
# stress/storm.py sets it before the first worker starts.
RUNS_FILE = "STORM_RUNS_FILE"
TASK_CANCELLED = "django_tasks_local.exceptions.TaskCancelled"
TOO_LONG = 60.0  # Seconds after which a task that waits for its cancellation returns.

# Task functions in threads append to both deques without a lock, because append() is atomic.
runs: deque[str] = deque()  # The id of the task, once for each call of its function.
children: deque[tuple[str, "Expected"]] = deque()  # The tasks that other tasks have enqueued.


class Expected(NamedTuple):
    """The expected outcome of a task that is not cancelled: one of `values`, or an error."""

    values: tuple[Any, ...] = ()  # The possible return values; empty for any value.
    error: str | None = None  # The dotted path of the exception.


def count_run() -> None:
    """Record that the function of the current task runs. Each task function calls this first."""
    result_id = current_result_id.get()
    if multiprocessing.parent_process() is None:
        runs.append(result_id)
        return
    # Each process writes with a single write() to a file opened with O_APPEND, so that the kernel
    # never mixes lines of different processes.
    descriptor = os.open(os.environ[RUNS_FILE], os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, f"{result_id}\n".encode())
    finally:
        os.close(descriptor)


def counted_runs() -> Counter[str]:
    """Return the number of runs of each task, in threads and in processes."""
    return Counter(runs) + Counter(Path(os.environ[RUNS_FILE]).read_text(encoding="utf-8").split())


@task
def noop() -> None:
    """Record the run and return None."""
    count_run()


@task
def echo(value: Any) -> Any:
    """Return the argument unchanged."""
    count_run()
    return value


@task
async def coroutine(steps: int) -> int:
    """Await asyncio.sleep(0) `steps` times."""
    count_run()
    for _ in range(steps):
        await asyncio.sleep(0)
    return steps


@task
def fail() -> None:
    """Raise ValueError in a sync task."""
    count_run()
    raise ValueError("an error in a task")


@task
async def fail_async() -> None:
    """Raise KeyError in a coroutine."""
    count_run()
    await asyncio.sleep(0)
    raise KeyError("an error in a coroutine")


@task
def report(steps: int) -> int:
    """Call report_progress() `steps` times."""
    count_run()
    for step in range(steps):
        report_progress(step + 1, steps, f"step {step}", data={"step": step})
    return steps


@task
def count(outer: int, inner: int) -> int:
    """Count the items of two nested track() loops."""
    count_run()
    return sum(1 for _ in track(range(outer)) for _ in track(range(inner), message="inner"))


@task
async def count_async(steps: int) -> int:
    """Count the items of an asynchronous track() loop."""
    count_run()

    async def numbers() -> AsyncIterator[int]:
        for number in range(steps):
            await asyncio.sleep(0)
            yield number

    return len([number async for number in track(numbers(), total=steps)])


@task
def swallow(steps: int) -> str:
    """Catch TaskCancelled and return a value, so that the task succeeds although cancelled."""
    try:
        count_run()
        for step in range(steps):
            report_progress(step, steps)
            time.sleep(0.001)
    except TaskCancelled:
        return "swallowed"
    return "not cancelled"


@task
def parent(number: int) -> str | None:
    """Enqueue another task and return its id, or None if the queue is full."""
    count_run()
    try:
        child = echo.enqueue(number)
    except TaskException:
        return None
    children.append((child.id, Expected((number,))))
    return child.id


@task
def wait_for_cancel() -> str:
    """Call report_progress() until the task is cancelled."""
    count_run()
    deadline = time.monotonic() + TOO_LONG
    while time.monotonic() < deadline:
        report_progress(message="waiting")
        time.sleep(0.001)
    return "was never cancelled"


@task
async def wait_for_cancel_async() -> str:
    """Sleep in a coroutine until the task is cancelled."""
    count_run()
    await asyncio.sleep(TOO_LONG)
    return "was never cancelled"


# Each choice consists of a weight, a task, and a function that draws the task's arguments and
# returns them with the outcome to expect.
type Choice = tuple[float, Any, Callable[[Random], tuple[tuple[Any, ...], Expected]]]


def _steps(*choices: int) -> Callable[[Random], tuple[tuple[Any, ...], Expected]]:
    def draw(rng: Random) -> tuple[tuple[Any, ...], Expected]:
        steps = rng.choice(choices)
        return (steps,), Expected((steps,))

    return draw


def _always(*arguments: Any, values: tuple[Any, ...] = (), error: str | None = None) -> Any:
    return lambda rng: (arguments, Expected(values, error))


def _echo(rng: Random) -> tuple[tuple[Any, ...], Expected]:
    value = rng.choice((None, 7, "text", [1, [2, None]], {"key": [1.5, True]}))
    return (value,), Expected((value,))


def _count(rng: Random) -> tuple[tuple[Any, ...], Expected]:
    outer, inner = rng.choice((0, 1, 5)), rng.choice((0, 3, 200))
    return (outer, inner), Expected((outer * inner,))


ANYWHERE: tuple[Choice, ...] = (
    (30, noop, _always(values=(None,))),
    (15, echo, _echo),
    (10, coroutine, _steps(0, 1, 5)),
    (8, fail, _always(error="builtins.ValueError")),
    (4, fail_async, _always(error="builtins.KeyError")),
    (8, report, _steps(1, 10, 500)),
    (6, count, _count),
    (4, count_async, _steps(0, 1, 20)),
    (3, swallow, _always(5, values=("swallowed", "not cancelled"))),
    (0.5, swallow, _always(50, values=("swallowed", "not cancelled"))),
)
IN_THREADS: tuple[Choice, ...] = (*ANYWHERE, (6, parent, _always(1)))
# stress/storm.py cancels every task of these, because they run until then.
TO_BE_CANCELLED: tuple[Choice, ...] = tuple(
    (1, waiting, _always(error=TASK_CANCELLED))
    for waiting in (wait_for_cancel, wait_for_cancel_async)
)
