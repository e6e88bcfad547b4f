"""
Tasks that run in worker processes.

To block until the test lets it continue, a task reads from a FIFO until the test writes to this
FIFO, which works between processes. Tests kill the worker processes that remain, so no task blocks
for longer than LIMIT.
"""

import asyncio
import atexit
import ctypes
import json
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from logging.handlers import MemoryHandler
from pathlib import Path
from types import ModuleType
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connection
from django.tasks import Task, TaskContext, task

from django_tasks_local import current_result_id, in_worker_process, report_progress, track
from django_tasks_local.exceptions import TaskCancelled
from tests.project.tasks import DemandingError, UnprintableError

LIMIT = 30.0  # seconds that a wait in a task may take at most
OUTLIVES = 10 * LIMIT  # seconds; a program that runs for this time does not end by itself in a test


def wait_at(fifo: str) -> str:
    """
    Block until the test writes to this FIFO; return the text that the test wrote.

    On Windows, which has no FIFOs, wait until the test has written the text to a file.
    """
    while not hasattr(os, "mkfifo") and not Path(fifo).exists():
        time.sleep(0.005)
    return Path(fifo).read_text(encoding="utf-8")


@task
def noop() -> None:
    """Do nothing."""


@task
def whoami() -> list[Any]:
    """Return the pid, the task's id and a model's label, which only exists after django.setup()."""
    assert in_worker_process()
    return [os.getpid(), current_result_id.get(), get_user_model()._meta.label]


@task
async def async_whoami() -> list[Any]:
    """Return the pid and the task's id from a coroutine."""
    await asyncio.sleep(0)
    return [os.getpid(), current_result_id.get()]


@task(takes_context=True)
def with_context(context: TaskContext, *args: Any) -> list[Any]:
    """Return values of the TaskContext and its result, followed by the arguments."""
    result = context.task_result
    times = [str(result.enqueued_at), str(result.started_at)]
    return [result.id, str(result.status), result.worker_ids, context.attempt, *times, *args]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledTask(Task):
    """A Task class of a project that adds two fields to Django's."""

    label: str = ""
    tags: list[str] = field(default_factory=list)  # a value that is not hashable


def labels(context: TaskContext) -> list[Any]:
    """Return the task's values of the fields that LabelledTask adds."""
    labelled: Any = context.task_result.task
    return [type(labelled).__name__, labelled.label, labelled.tags]


labels = LabelledTask(
    func=labels,
    priority=0,
    backend="default",
    queue_name="default",
    run_after=None,
    takes_context=True,
)


@task
def gated(fifo: str) -> int:
    """Report progress, then block until the test writes to the FIFO; return the pid."""
    report_progress(10, message="waiting for the test")
    wait_at(fifo)
    return os.getpid()


@task
def report_objects(fifo: str) -> str:
    """Report values of classes that only this process can import, and deeply nested data."""
    module = ModuleType("only_in_the_worker")
    sys.modules[module.__name__] = module
    kinds: dict[type, Any] = {}
    for base in (str, float):
        kinds[base] = type(base.__name__.title(), (base,), {"__module__": module.__name__})
        setattr(module, kinds[base].__name__, kinds[base])
    text, number = kinds[str]("text"), kinds[float](2.5)
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    data = {text: text, "number": number, "deep": deep}
    for item in track("ab", message=text, unit=text):
        for _ in track([item], total=number):
            report_progress(number, message=text, unit=text, data=data)
            wait_at(fifo)
            return "reported"
    return "not reached"


@task
def burst(calls: int, fifo: str) -> None:
    """
    Report `calls` times without a pause, then block until the test writes to the FIFO.

    The task reports far more often than its reporter publishes events.
    """
    for number in range(1, calls + 1):
        report_progress(number, calls)
    wait_at(fifo)


@task
def tracked(count: int) -> int:
    """Loop over `count` numbers with track(), and return `count`."""
    return sum(1 for _ in track(range(count), message="counting"))


@task
def storm(times: int) -> int:
    """Report `times` times without a pause, each time with a message of 200 characters."""
    for number in range(times):
        report_progress(number, times, "x" * 200)
    return times


@task
def fail(kind: str) -> None:
    """Raise the exception that the name `kind` selects."""
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
    """Return a value that is valid as JSON but cannot be pickled."""

    class Local(str):
        __slots__ = ()

    return Local("text")


@task
def not_json() -> Any:
    """Return an object that JSON cannot represent."""
    return object()


@task
def die(how: str) -> None:
    """Report progress, then end the worker process in the way that `how` names."""
    report_progress(50)
    if how == "exit":
        os._exit(3)
    elif how == "crash":
        ctypes.string_at(0)
    elif how == "kernel":
        # As the kernel does when memory runs out; on Windows, os.kill() ends any process.
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
    elif how == "terminated":
        signal.raise_signal(signal.SIGTERM)
        threading.Event().wait(LIMIT)


@task
def text(size: int) -> str:
    """Report progress, then return a text of `size` characters."""
    report_progress(1)
    return "x" * size


@task
def length(value: str) -> int:
    """Return the length of the argument, which tests make long."""
    return len(value)


@task
def until_cancelled(marker: str, swallow: bool = False) -> str:
    """
    Sleep until the task is cancelled, write the file `marker`, then raise or swallow TaskCancelled.
    """
    try:
        report_progress(1)
        # Python handles a signal that arrives just before a sleep only after the sleep, so each
        # sleep is short.
        for _ in range(int(LIMIT / 0.05)):
            time.sleep(0.05)
    except TaskCancelled:
        Path(marker).write_text("cleaned up", encoding="utf-8")
        if not swallow:
            raise
    return "swallowed"


@task
async def async_until_cancelled(marker: str) -> None:
    """Sleep in a coroutine until the task is cancelled, then write the file `marker`."""
    try:
        report_progress(1)
        for _ in range(int(LIMIT / 0.05)):  # short sleeps as in until_cancelled()
            await asyncio.sleep(0.05)
    finally:
        Path(marker).write_text("cleaned up", encoding="utf-8")  # noqa: ASYNC240 - nothing else runs in this loop


def _status_of_terminated_child() -> int:
    """Fork a child, send SIGTERM to this child and return its wait status."""
    # Python emits a DeprecationWarning when a process with threads forks.
    warnings.simplefilter("ignore")
    pid = os.fork()
    if pid == 0:
        time.sleep(LIMIT)
        os._exit(3)
    os.kill(pid, signal.SIGTERM)
    return os.waitpid(pid, 0)[1]


@task
def fork() -> int:
    """Return the wait status of a child that this function forked and terminated with SIGTERM."""
    return _status_of_terminated_child()


@task
async def fork_async() -> int:
    """Return the wait status of a child that this coroutine forked and terminated with SIGTERM."""
    return _status_of_terminated_child()


@task
def run_c_code() -> int:
    """
    Run C code that takes hours and does not check for signals, so only SIGKILL stops the task.
    """
    report_progress(1)
    return sum(range(10**12))


@task
def make_user(name: str) -> list[Any]:
    """Create a user; return the name of the task's database and the number of users in it."""
    get_user_model().objects.create(username=name)
    return [str(connection.settings_dict["NAME"]), get_user_model().objects.count()]


@task
def burn(rounds: int) -> int:
    """Use CPU time in a loop of `rounds` steps that never waits."""
    return sum(number * number % 7 for number in range(rounds))


@task
def enqueue_another() -> None:
    """Enqueue a task inside this task: in a worker process enqueue() must raise an exception."""
    noop.enqueue()


@task
def media_root() -> str:
    """Return the setting MEDIA_ROOT as the worker process sees it."""
    return str(settings.MEDIA_ROOT)


@task
def sleep_in_steps(steps: int, seconds: float) -> None:
    """Report progress, then sleep in steps, so that a stopped process does not sleep."""
    report_progress(1)
    for _ in range(steps):
        time.sleep(seconds)


@task
def leave_a_program(how: str, marker: str) -> None:
    """
    Start a process that outlives this task, write its pid to `marker`, and kill this worker.

    The process is a program that a shell starts, or a child of fork().
    """
    if how == "program":
        os.system(f"sleep {OUTLIVES} & echo $! > {marker}")
    else:
        warnings.simplefilter("ignore")  # Python warns when a process with threads forks.
        pid = os.fork()
        if pid == 0:
            time.sleep(OUTLIVES)
            os._exit(0)
        Path(marker).write_text(str(pid), encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)


@task
def wait_for_programs(how: str, marker: str) -> None:
    """Wait for a program in one of several ways; its pid stands in the file `marker`."""
    command = f"echo $$ > {marker}; exec sleep {OUTLIVES}"
    if how == "Popen":
        subprocess.Popen(["sh", "-c", command]).wait()
    elif how == "shell":
        os.system(command)
    else:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            executor.submit(os.system, command).result()


@task
def leave_an_alarm() -> None:
    """Request SIGALRM, whose default action ends the process, and return."""
    signal.setitimer(signal.ITIMER_REAL, 0.2)


@task
def sleep(seconds: float) -> int:
    """Return the pid after this number of seconds."""
    time.sleep(seconds)
    return os.getpid()


@task
def inherited_descriptors() -> list[int]:
    """Return the descriptors that a program inherits if its caller closes none of them."""
    code = "import os; print([n for n in range(100) if os.path.exists(f'/proc/self/fd/{n}')])"
    command = [sys.executable, "-c", code]
    return json.loads(subprocess.check_output(command, close_fds=False))


@task
def leave_exit_functions(path: str) -> None:
    """Register functions that each append a line to a file at the end of the worker process."""

    def note(line: str) -> None:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    atexit.register(note, "atexit")
    multiprocessing.util.Finalize(None, note, args=("multiprocessing",), exitpriority=0)
    handler = MemoryHandler(1000, logging.CRITICAL, logging.FileHandler(path, encoding="utf-8"))
    logger = logging.getLogger("tests.exit_functions")
    logger.addHandler(handler)
    logger.warning("logging")
