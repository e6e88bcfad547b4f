"""
A worker process: it starts Django as its parent has it, and does one task after the other.

    the parent's dispatcher          main thread                    sampler's thread
    -----------------------          -----------                    ----------------
    task -------- one socket ------> receive
         <--------- started -------- then run it, in a fresh context
         <--------- progress ------- report_progress()              progress, when it is due
         <---------- result -------- how it ended

What goes through the socket are frames: a length, and so many bytes of pickle. They hold plain
data, so that neither side needs the other's exceptions; one side's death leaves a frame
unfinished, and nothing else.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import struct
import sys
import threading
import time
import warnings
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, partial
from traceback import format_exc
from typing import TYPE_CHECKING, Any, NamedTuple

import django
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.tasks import Task, TaskResult, TaskResultStatus, task_backends
from django.utils import timezone
from django.utils.module_loading import import_string

from . import signal_handlers
from .execution import Outcome, execute
from .execution.connections import close_old_resources, drop_stale_connections
from .progress.reporter import Reporter, Reporting

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from types import FrameType

    from .cancellation import Cancellation
    from .events import Progress

    type TaskOptions = tuple[int, str, str, datetime | None, bool]
    type AnyTask = Task[Any, Any]
    type AnyResult = TaskResult[Any, Any]

logger = logging.getLogger(__name__)

HEADER = struct.Struct("!Q")

# What a worker says: the first item of a message.
READY = "ready"  # Django is set up
BROKEN = "broken"  # ... or cannot be: traceback
STARTED = "started"  # result_id, started_at
PROGRESS = "progress"  # result_id, number, progress
RESULT = "result"  # result_id, return_value, error, message, number, progress

CONNECTION_IDLE = 1.0  # seconds without a task, after which connections are looked at again

# Whether this process is a worker of a pool.
is_worker = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a worker must know to start Django as its parent has it."""

    name: str
    progress_interval: float
    environ: dict[str, str]
    settings_module: str | None
    # Settings that say something else than the settings module does, each pickled by itself.
    overrides: dict[str, bytes] = field(default_factory=dict)
    unpickleable: list[str] = field(default_factory=list)
    # The NAME of each database: a test runner changes it, and the settings module does not say.
    databases: dict[str, Any] = field(default_factory=dict)


class Order(NamedTuple):
    """
    A task to run. It goes through the socket as a plain tuple, and its time as text.

    That matters: pickle needs 9 µs for a dataclass with a datetime, and 1 µs for this.
    """

    result_id: str
    path: str
    options: TaskOptions
    args: list[Any]
    kwargs: dict[str, Any]
    enqueued_at: str


def frame(message: object) -> bytes:
    """Return the bytes of a message. Raises whatever pickle does."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def main(channel: socket.socket, life: Connection, setup: Setup) -> None:
    """Run the worker. Called in the main thread of a new process."""
    global is_worker
    is_worker = True
    die_with_parent(life)
    # Ctrl-C in a terminal goes to every process; the parent decides what it means here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_handlers.leave_signals_alone()
    # The programs that a task starts must not hold the socket open.
    channel.set_inheritable(False)
    worker = Worker(channel, setup)
    try:
        start_django(setup)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent tells it
        worker.say(BROKEN, format_exc())
        return
    worker.serve()


def die_with_parent(life: Connection) -> None:
    """
    End this process when the parent does, which alone holds the other end of this pipe.

    On Linux the kernel sees to it: a thread would wait for the GIL while a task is in C code.
    """
    if sys.platform != "linux":
        threading.Thread(
            target=_exit_at_end, args=(life,), name="django-tasks-parent", daemon=True
        ).start()
        return
    import fcntl

    os.set_inheritable(life.fileno(), False)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)
    if life.poll():  # It has ended already.
        os._exit(1)


def _exit_at_end(life: Connection) -> None:
    with suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)


def start_django(setup: Setup) -> None:
    """Set Django up with the parent's settings and databases."""
    os.environ.clear()
    os.environ.update(setup.environ)
    if setup.settings_module is not None:
        os.environ["DJANGO_SETTINGS_MODULE"] = setup.settings_module
    elif not settings.configured:
        # The parent called settings.configure(), but where importing its script does not: inside
        # of `if __name__ == "__main__"`.
        if setup.unpickleable:
            raise ImproperlyConfigured(
                f"These settings cannot be sent to a worker process: "
                f"{', '.join(setup.unpickleable)}. Call settings.configure() where it also "
                f'happens when the script is imported, outside of `if __name__ == "__main__"`.'
            )
        settings.configure()
    with warnings.catch_warnings(action="ignore"):  # The parent has seen them.
        for name, value in setup.overrides.items():
            setattr(settings, name, pickle.loads(value))  # noqa: S301 - from our own parent
    for alias, database in setup.databases.items():
        settings.DATABASES[alias]["NAME"] = database
    django.setup()


class _Run(Reporting):
    """The task that this process runs, as execute() needs it."""

    __slots__ = (
        "_say",
        "args",
        "cancellation",
        "has_ended",
        "id",
        "interval",
        "kwargs",
        "lock",
        "make_result",
        "reporter",
        "task",
    )

    task: AnyTask
    make_result: Callable[[], AnyResult]

    def __init__(self, order: Order, interval: float, say: Callable[..., None]) -> None:
        self.id = order.result_id
        self.args, self.kwargs = order.args, order.kwargs
        self.interval = interval
        self.lock = threading.RLock()
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        self.has_ended = False
        self._say = say

    @property
    def is_finished(self) -> bool:
        """See Reporting."""
        return self.has_ended

    def report(self, number: int, progress: Progress) -> None:
        """See Reporting."""
        self._say(PROGRESS, self.id, number, progress)

    def task_result(self) -> AnyResult:
        """See Runnable."""
        return self.make_result()


class Worker:
    """The main loop, and what the signal handler and the sampler's thread need of it."""

    def __init__(self, channel: socket.socket, setup: Setup) -> None:
        self._channel = channel
        self._incoming = channel.makefile("rb")
        self._setup = setup
        self._pid = os.getpid()
        self._thread = threading.get_ident()
        # Guards the socket: the sampler's thread sends as well, and a frame must stay whole.
        self._sending = threading.Lock()
        self._cancellation: Cancellation | None = None  # of the task that runs
        # Of SIGTERM. It must wait while the main thread, where it is handled, is in a frame.
        self._terminated = False
        self._in_frame = False
        self._deferred = False

    def serve(self) -> None:
        """Do tasks until the parent closes its side."""
        signal_handlers.install(signal.SIGTERM, self._on_sigterm)
        self.say(READY)
        while not self._terminated and (order := self._next_order()) is not None:
            # A fresh context for every task: nothing leaks from one into the next.
            Context().run(self._do, order)
        if self._terminated:
            _die_of_sigterm()

    def say(self, *message: object) -> None:
        """Send a message. Called in any thread of this process."""
        self._send(frame(message))

    def _send(self, data: bytes) -> None:
        if threading.get_ident() != self._thread:
            with self._sending:
                self._channel.sendall(data)
            return
        self._in_frame = True
        try:
            with self._sending:
                self._channel.sendall(data)
        finally:
            self._in_frame = False
        if self._deferred:
            self._deferred = False
            self._end_task()

    def _next_order(self) -> Order | None:
        waiting_since = time.monotonic()
        header = self._incoming.read(HEADER.size)
        if len(header) < HEADER.size:
            return None
        (length,) = HEADER.unpack(header)
        order = Order._make(pickle.loads(self._incoming.read(length)))  # noqa: S301
        if time.monotonic() - waiting_since > CONNECTION_IDLE:
            close_old_resources()  # A connection may have become too old in the meantime.
        drop_stale_connections()
        return order

    def _do(self, order: Order) -> None:
        started_at = timezone.now()
        self.say(STARTED, order.result_id, started_at.isoformat())
        run = _Run(order, self._setup.progress_interval, self.say)
        outcome = self._run(order, started_at, run)
        if os.getpid() != self._pid:
            os._exit(0)  # The task has forked, and this is its child, which is nobody's worker.
        if self._terminated and outcome.error is not None:
            return
        self._send(_result_frame(run, outcome))

    def _run(self, order: Order, started_at: datetime, run: _Run) -> Outcome:
        try:
            run.task = _task(order.path, order.options)
            run.make_result = partial(self._task_result, run.task, order, started_at)
        except BaseException as exception:  # noqa: BLE001 - importing the task's module failed
            return Outcome.failure(exception)
        self._cancellation = run.get_cancellation()
        try:
            return execute(run)
        except BaseException as exception:  # noqa: BLE001 - it was cancelled when it had just ended
            return Outcome.failure(exception)
        finally:
            self._cancellation = None

    def _task_result(self, task: AnyTask, order: Order, started_at: datetime) -> AnyResult:
        return TaskResult(
            task=task,
            id=order.result_id,
            status=TaskResultStatus.RUNNING,
            enqueued_at=datetime.fromisoformat(order.enqueued_at),
            started_at=started_at,
            finished_at=None,
            last_attempted_at=started_at,
            args=order.args,
            kwargs=order.kwargs,
            backend=task.backend,
            errors=[],
            worker_ids=[f"{self._setup.name}@{self._pid}"],
        )

    def _on_sigterm(self, number: int, stack: FrameType | None) -> None:
        """
        Let the task tidy up: it is cancelled. Whoever sent the signal may kill us soon.

        Runs in the main thread, between any two instructions of it.
        """
        self._terminated = True
        if self._in_frame:
            self._deferred = True
        else:
            self._end_task()

    def _end_task(self) -> None:
        if self._cancellation is None:
            _die_of_sigterm()
        else:
            self._cancellation.interrupt()


def _die_of_sigterm() -> None:
    """End as if nobody had handled the signal, so that the parent can name it."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)


def task_options(task: AnyTask) -> TaskOptions:
    """Return the fields of a task that `Task.using()` may have changed, and `takes_context`."""
    return (task.priority, task.backend, task.queue_name, task.run_after, task.takes_context)


@cache
def _task(path: str, options: TaskOptions) -> AnyTask:
    """Return the task with a function and such options."""
    found = import_string(path)
    priority, backend, queue_name, run_after, takes_context = options
    task: AnyTask = task_backends[backend].task_class(
        func=getattr(found, "func", found),
        priority=priority,
        backend=backend,
        queue_name=queue_name,
        run_after=run_after,
        takes_context=takes_context,
    )
    return task


def _result_frame(run: _Run, outcome: Outcome) -> bytes:
    with run.lock:
        run.has_ended = True
        progress = run.close_progress()
    try:
        return frame(_result(run.id, outcome, *progress))
    except Exception as exception:  # noqa: BLE001 - the return value cannot be pickled
        return frame(_result(run.id, Outcome.failure(exception), *progress))


def _result(
    result_id: str, outcome: Outcome, number: int, progress: Progress | None
) -> tuple[Any, ...]:
    error = outcome.error and (outcome.error.exception_class_path, outcome.error.traceback)
    return RESULT, result_id, outcome.return_value, error, outcome.message, number, progress
