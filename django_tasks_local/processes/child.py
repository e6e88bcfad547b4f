"""
The worker's side: sets up Django as its parent has it, and runs one task after another.

    the parent's dispatcher          main thread                    ticker's thread
    -----------------------          -----------                    ---------------
    RunTask -----------------------> reads it
            <------- Started ------- then runs it, in a fresh context
            <------- Sample -------- report_progress()              Sample, when one is due
            <------- Result -------- how it ended

The main thread sends the result of a task together with the start of the next one if that has
arrived already. It never waits for another task before it sends a result.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from contextvars import Context
from datetime import datetime
from functools import cache
from traceback import format_exc
from typing import TYPE_CHECKING

from django.tasks import TaskResultStatus, task_backends
from django.utils.module_loading import import_string

from .. import signal_handlers
from ..execution import Outcome, Runnable, execute
from ..execution.connections import close_old_resources, drop_stale_connections
from ..results import make_result
from .settings import set_up_django
from .tickets import TicketReader
from .wire import (
    READ_SIZE,
    Broken,
    FrameReader,
    Ready,
    Started,
    decode_task,
    encode,
    encode_result,
    encode_sample,
    ticket_of,
    to_datetime,
)

if TYPE_CHECKING:
    import socket
    from multiprocessing.connection import Connection
    from types import FrameType

    from ..aliases import AnyResult, AnyTask
    from ..cancellation import Cancellation
    from ..events import Progress
    from ..progress.reporter import Reporter
    from .settings import WorkerSettings
    from .wire import RunTask, TaskOptions

# Seconds without a task after which a database connection may have become too old.
CONNECTION_IDLE = 1.0

_is_worker = False


def in_worker_process() -> bool:
    """Return whether this process is a worker of a process pool."""
    return _is_worker


def main(
    sock: socket.socket,
    lifeline: Connection,
    tickets: Connection | None,
    settings: WorkerSettings,
) -> None:
    """Run the worker. Called in the main thread of a new process."""
    global _is_worker
    _is_worker = True
    die_with_parent(lifeline)
    # Ctrl-C in a terminal reaches every process of the group; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_handlers.leave_signals_alone()
    # Programs that a task starts must not hold the socket open.
    sock.set_inheritable(False)
    reader = None
    if tickets is not None:
        os.set_inheritable(tickets.fileno(), False)
        reader = TicketReader(tickets.fileno())
    sender = Sender(sock)
    try:
        set_up_django(settings)
    except BaseException:  # noqa: BLE001 - the parent logs it, whatever it is
        sender.send(encode(Broken(format_exc())))
        return
    WorkerMain(sock, sender, reader, settings).serve()


def die_with_parent(lifeline: Connection) -> None:
    """
    End this process when the parent ends: only the parent holds the other end of this pipe.

    On Linux the kernel sends SIGKILL: a thread would wait for the GIL while a task is in C code.
    """
    if sys.platform != "linux":
        threading.Thread(
            target=_exit_at_end, args=(lifeline,), name="django-tasks-parent", daemon=True
        ).start()
        return
    import fcntl

    os.set_inheritable(lifeline.fileno(), False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # The parent has ended before the lines above.
        os._exit(1)


def _exit_at_end(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)


class Sender:
    """Sends whole frames. May be called from any thread, and from a finalizer or signal handler."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Keeps the frames of several threads apart. Reentrant, because a finalizer that runs while
        # this thread holds it may report progress.
        self._lock = threading.RLock()
        self._is_sending = False
        self._frames: deque[bytes] = deque()

    def send(self, data: bytes) -> None:
        """Send one or several frames; if this interrupts another call, that one sends them."""
        with self._lock:
            self._frames.append(data)
            if self._is_sending:
                return
            self._is_sending = True
            try:
                while self._frames:
                    self._sock.sendall(self._frames.popleft())
            finally:
                self._is_sending = False


class RunningTask(Runnable):
    """The task that the worker runs."""

    __slots__ = (
        "args",
        "cancellation",
        "id",
        "interval",
        "is_over",
        "kwargs",
        "lock",
        "message",
        "reporter",
        "started_at",
        "task",
        "worker",
    )

    def __init__(self, worker: WorkerMain, message: RunTask, started_at: float) -> None:
        """Import the task's module and load its arguments. Raises whatever that raises."""
        self.worker = worker
        self.id = message.result_id
        self.message = message
        self.started_at = started_at
        self.interval = worker.progress_interval
        self.lock = threading.RLock()
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        self.is_over = False
        self.task = _task(message.path, message.options)
        self.args, self.kwargs = message.load_arguments()

    @property
    def is_finished(self) -> bool:
        """See Reporting."""
        return self.is_over

    def report(self, number: int, progress: Progress) -> None:
        """See Reporting."""
        self.worker.send(encode_sample(self.id, number, progress))

    def task_result(self) -> AnyResult:
        """See Runnable."""
        return make_result(
            self.task,
            self.id,
            TaskResultStatus.RUNNING,
            datetime.fromisoformat(self.message.enqueued_at),
            to_datetime(self.started_at),
            None,
            self.args.copy(),
            self.kwargs.copy(),
            self.task.backend,
            [],
            [self.worker.id],
            None,
        )


class WorkerMain:
    """The main loop of a worker, and its handler of SIGTERM."""

    def __init__(
        self,
        sock: socket.socket,
        sender: Sender,
        tickets: TicketReader | None,
        settings: WorkerSettings,
    ) -> None:
        self._sock = sock
        self._sender = sender
        self._tickets = tickets
        self._pid = os.getpid()
        self.id = f"{settings.name}@{self._pid}"
        self.progress_interval = settings.progress_interval
        self._thread = threading.get_ident()
        self._reader = FrameReader()
        self._bodies: deque[memoryview] = deque()  # of frames that were read
        self._unsent = b""  # the result of the last task
        self._running: RunningTask | None = None
        self._terminated = False  # SIGTERM has come.
        # While the main thread sends a frame, or has the result of a task to send, SIGTERM is only
        # noted: its handler may raise, and would leave the frame unfinished.
        self._defers_sigterm = False

    def serve(self) -> None:
        """Run tasks until the parent closes its side of the socket."""
        signal_handlers.install(signal.SIGTERM, self._on_sigterm)
        self.send(encode(Ready()))
        while not self._terminated and (message := self._next_message()) is not None:
            # A fresh context for every task: no variable leaks from one into the next.
            Context().run(self._run, message)
        self._send_result()

    def send(self, data: bytes) -> None:
        """Send frames. Called from any thread."""
        if threading.get_ident() != self._thread:
            self._sender.send(data)
            return
        before, self._defers_sigterm = self._defers_sigterm, True
        try:
            self._sender.send(data)
        finally:
            self._defers_sigterm = before
        if self._terminated and not before:
            self._end_task()

    def _next_message(self) -> RunTask | None:
        """Return the next task; None when the parent has closed its side."""
        while True:
            while self._bodies and not self._terminated:
                body = self._bodies.popleft()
                if self._may_begin(ticket_of(body)):
                    return decode_task(body)
            if self._unsent:
                self._send_result()
            waiting_since = time.monotonic()
            data = self._sock.recv(READ_SIZE)
            if not data:
                return None
            self._bodies.extend(self._reader.feed(data))
            if time.monotonic() - waiting_since > CONNECTION_IDLE:
                close_old_resources()

    def _may_begin(self, ticket: int) -> bool:
        """Whether the parent has not taken this task back."""
        return not ticket or (self._tickets is not None and self._tickets.take(ticket))

    def _run(self, message: RunTask) -> None:
        started_at = time.time()
        self._send_result(encode(Started(message.result_id, started_at)))
        drop_stale_connections()
        try:
            running = RunningTask(self, message, started_at)
        except BaseException as exception:  # noqa: BLE001 - e.g. the task's module has an error
            failed = Outcome.failure(exception)
            self._defers_sigterm = True
            self._unsent = encode_result(message.result_id, 0.0, failed, (0, None))
            return
        # After the import of the task's module, which only the first task of a worker waits for.
        began = time.perf_counter()
        outcome = self._execute(running)
        seconds = time.perf_counter() - began
        if os.getpid() != self._pid:
            os._exit(0)  # The task has forked: this is its child, which is not a worker.
        if not (self._terminated and outcome.error is not None):
            last = running.close_progress()
            self._unsent = encode_result(message.result_id, seconds, outcome, last)

    def _execute(self, running: RunningTask) -> Outcome:
        self._running = running
        try:
            outcome = execute(running)
        except BaseException as exception:  # noqa: BLE001 - it was cancelled after its last line
            outcome = Outcome.failure(exception)
        finally:
            self._defers_sigterm = True
            self._running = None
        running.is_over = True
        return outcome

    def _send_result(self, following: bytes = b"") -> None:
        """Send the result of the last task, if there is one, together with the next frame."""
        self._defers_sigterm = True
        self._sender.send(self._unsent + following)
        self._unsent = b""
        self._defers_sigterm = False
        if self._terminated:
            self._end_task()

    def _on_sigterm(self, number: int, stack: FrameType | None) -> None:
        """
        Cancel the task, so that it can clean up: the parent sends SIGKILL after KILL_AFTER seconds.

        Runs in the main thread, between any two of its instructions.
        """
        self._terminated = True
        if not self._defers_sigterm:
            self._end_task()

    def _end_task(self) -> None:
        if self._running is None:
            _die_of_sigterm()
        else:
            # Only the first call has an effect, so the task's clean-up is not interrupted.
            self._running.get_cancellation().interrupt()


def _die_of_sigterm() -> None:
    """End as if SIGTERM had no handler, so that the parent can name the signal."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.raise_signal(signal.SIGTERM)


@cache
def _task(path: str, options: TaskOptions) -> AnyTask:
    """Return the task with this function and these options."""
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
