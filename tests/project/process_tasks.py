"""
Tasks that run in worker processes.

What waits, waits at a FIFO until the test writes to it: that works between processes, and wakes at
once. Nothing waits for longer than LIMIT, because the tests kill what is left.
"""

import asyncio
import ctypes
import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connection
from django.tasks import TaskContext, task

from django_tasks_local import current_result_id, report_progress, track
from django_tasks_local.exceptions import TaskCancelled
from tests.project.tasks import DemandingError, UnprintableError

LIMIT = 30.0  # seconds


def wait_at(fifo: str) -> str:
    """Wait until the test writes to this FIFO."""
    return Path(fifo).read_text()


@task
def noop() -> None:
    """Do nothing."""


@task
def whoami() -> list[Any]:
    """Return this process, and what it knows of the task and of Django."""
    return [os.getpid(), current_result_id.get(), get_user_model()._meta.label]


@task
async def async_whoami() -> list[Any]:
    """Return what a coroutine knows."""
    await asyncio.sleep(0)
    return [os.getpid(), current_result_id.get()]


@task(takes_context=True)
def with_context(context: TaskContext, *args: Any) -> list[Any]:
    """Return what the context says."""
    result = context.task_result
    times = [str(result.enqueued_at), str(result.started_at)]
    return [result.id, str(result.status), result.worker_ids, context.attempt, *times, *args]


@task
def gated(fifo: str) -> int:
    """Report, then wait for the test."""
    report_progress(10, message="waiting for the test")
    wait_at(fifo)
    return os.getpid()


@task
def burst(calls: int, fifo: str) -> None:
    """Report far more often than anybody can see, then go on for a while."""
    for number in range(1, calls + 1):
        report_progress(number, calls)
    wait_at(fifo)


@task
def tracked(count: int) -> int:
    """Count with a bar."""
    return sum(1 for _ in track(range(count), message="counting"))


@task
def storm(times: int) -> int:
    """Report as fast as possible."""
    for number in range(times):
        report_progress(number, times, "x" * 200)
    return times


@task
def fail(kind: str) -> None:
    """Raise."""
    errors: dict[str, BaseException] = {
        "value": ValueError("bad value"),
        "exit": SystemExit(3),
        "demanding": DemandingError(7, "because"),
        "unprintable": UnprintableError(),
        "unpickleable": RuntimeError(threading.Lock()),
    }
    raise errors[kind]


@task
def unpickleable_value() -> str:
    """Return what is JSON, but cannot be sent."""

    class Local(str):
        __slots__ = ()

    return Local("text")


@task
def not_json() -> Any:
    """Return what is not JSON."""
    return object()


@task
def die(how: str) -> None:
    """Take the process along."""
    report_progress(50)
    if how == "exit":
        os._exit(3)
    elif how == "crash":
        ctypes.string_at(0)
    elif how == "kernel":
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory is short
    elif how == "terminated":
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(LIMIT)


@task
def text(size: int) -> str:
    """Return a long text."""
    report_progress(1)
    return "x" * size


@task
def length(value: str) -> int:
    """Return the length of a long argument."""
    return len(value)


@task
def until_cancelled(marker: str, swallow: bool = False) -> str:
    """Wait for the cancellation, tidy up, and go or stay."""
    try:
        report_progress(1)
        # Short waits: Python sees a signal that comes just before a wait only after it.
        for _ in range(int(LIMIT / 0.05)):
            time.sleep(0.05)
    except TaskCancelled:
        Path(marker).write_text("tidied")
        if not swallow:
            raise
    return "swallowed"


@task
async def async_until_cancelled(marker: str) -> None:
    """Wait for the cancellation of a coroutine."""
    try:
        report_progress(1)
        for _ in range(int(LIMIT / 0.05)):  # See until_cancelled().
            await asyncio.sleep(0.05)
    finally:
        Path(marker).write_text("tidied")  # noqa: ASYNC240 - there is nothing else in this loop


def _status_of_a_child() -> int:
    """Return how a child of fork() has ended after a SIGTERM, as waitpid() has it."""
    warnings.simplefilter("ignore")  # Python warns of fork() in a process with threads.
    pid = os.fork()
    if pid == 0:
        time.sleep(LIMIT)
        os._exit(3)
    os.kill(pid, signal.SIGTERM)
    return os.waitpid(pid, 0)[1]


@task
def fork() -> int:
    """See _status_of_a_child()."""
    return _status_of_a_child()


@task
async def fork_async() -> int:
    """See _status_of_a_child()."""
    return _status_of_a_child()


@task
def hold_the_gil() -> int:
    """Spend hours in C code that does not look for signals."""
    report_progress(1)
    return sum(range(10**12))


@task
def make_user(name: str) -> list[Any]:
    """Write to the database, and say which one it is."""
    get_user_model().objects.create(username=name)
    return [str(connection.settings_dict["NAME"]), get_user_model().objects.count()]


@task
def burn(rounds: int) -> int:
    """Compute."""
    return sum(number * number % 7 for number in range(rounds))


@task
def enqueue_another() -> None:
    """Do what a worker process refuses."""
    noop.enqueue()


@task
def media_root() -> str:
    """Return a setting."""
    return str(settings.MEDIA_ROOT)
