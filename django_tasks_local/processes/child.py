"""
Run a worker process: set up Django as in the parent, then run one task after another.

    the parent's dispatcher          main thread                    ticker's thread
    -----------------------          -----------                    ---------------
    RunTask -----------------------> reads the task
            <----- Acknowledged ---- imports the task's module, if it has not
            <------- Started ------- runs the task, in a fresh context
            <------- Sample -------- report_progress()              sends a Sample when due
            <------------------------------- TimedOut ------------- after TIMEOUT seconds
            <------- Result -------- sends the outcome

If the next task has already arrived, the main thread sends the Result of a task together with the
Started of the next one. It never waits for another task before it sends a Result.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from contextvars import Context
from datetime import datetime
from functools import partial
from traceback import format_exc
from typing import TYPE_CHECKING

from django.tasks import TaskResultStatus

from .. import signal_handlers
from ..clocks import Clocks
from ..context import Carried
from ..execution import Outcome, Runnable, execute
from ..execution.connections import (
    close_old_resources,
    close_pools_of_test_run,
    drop_stale_connections,
)
from ..results import make_result
from ..time_limit import TimeLimit
from .applying import set_up_django
from .ending import SIGTERM_EXIT_CODE, call_exit_functions, cancel_alarm, flush_standard_streams
from .lifeline import die_with_parent, keep_descriptors, lead_group
from .loading import is_imported, load_task
from .receiver import Receiver, ReceiverThread
from .sender import Sender
from .tickets import TicketReader
from .wire import (
    Acknowledged,
    Broken,
    Ready,
    Started,
    TimedOut,
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

    from ..aliases import AnyResult
    from ..cancellation import Cancellation
    from ..events import Progress
    from ..progress.reporter import Reporter
    from .settings import WorkerSettings
    from .wire import RunTask

# Seconds of waiting for a task after which the worker closes connections older than CONN_MAX_AGE.
CONNECTION_IDLE = 1.0

_is_worker = False


def in_worker_process() -> bool:
    """Return whether this process is a worker process of a ProcessPoolBackend."""
    return _is_worker


def main(
    sock: socket.socket,
    lifeline: Connection,
    tickets: Connection | None,
    settings: WorkerSettings,
    handles_sigterm: bool,
) -> None:
    """Set up Django, then run tasks until the parent ends this new worker process."""
    global _is_worker
    _is_worker = True
    lead_group()
    die_with_parent(lifeline)
    # Ignore SIGINT: on Windows, Ctrl-C sends it to the workers too, and the parent ends them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal_handlers.leave_signals_alone()
    keep_descriptors(sock)
    call_exit_functions()
    sock.setblocking(True)  # The project's main module may have called socket.setdefaulttimeout().
    reader = None if tickets is None else TicketReader(tickets.fileno())
    sender = Sender(sock)
    try:
        set_up_django(settings)
    except BaseException:  # noqa: BLE001 - the parent logs any error
        sender.send(encode(Broken(format_exc())))
        return
    WorkerMain(sock, sender, reader, settings, handles_sigterm).serve()


class RunningTask(Runnable):
    """Holds the task that this worker runs, as execute() and report_progress() need it."""

    __slots__ = (
        "args",
        "cancellation",
        "carried",
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

    def __init__(self, worker: WorkerMain, message: RunTask) -> None:
        """Import the task's module and load its arguments. Raises any exception of these two."""
        self.worker = worker
        self.id = message.result_id
        self.message = message
        self.started_at = 0.0  # time.time(), which WorkerMain sets when it sends Started.
        self.interval = worker.progress_interval
        self.lock = threading.RLock()
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        self.is_over = False
        self.carried = Carried.from_plain(message.carried)
        options, self.args, self.kwargs = message.load()
        self.task = load_task(message.path, options)

    @property
    def is_finished(self) -> bool:
        """Return whether the task's function has ended, after which reports have no effect."""
        return self.is_over

    def report(self, number: int, progress: Progress) -> None:
        """Send a sample of the progress to the parent. Called from: any thread."""
        self.worker.send(encode_sample(self.id, number, progress))

    def task_result(self) -> AnyResult:
        """Return the TaskResult, with status RUNNING, for the context of a `takes_context` task."""
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
    """Runs the main loop of a worker process, and handles SIGTERM or the frame CANCEL."""

    def __init__(
        self,
        sock: socket.socket,
        sender: Sender,
        tickets: TicketReader | None,
        settings: WorkerSettings,
        handles_sigterm: bool,
    ) -> None:
        self._sender = sender
        self._tickets = tickets
        self._pid = os.getpid()
        self.id = f"{settings.name}@{self._pid}"
        self.progress_interval = settings.progress_interval
        self._timeout = settings.timeout
        self._thread = threading.get_ident()
        self._handles_sigterm = handles_sigterm
        self._receiver = (
            Receiver(sock) if handles_sigterm else ReceiverThread(sock, self._on_cancel)
        )
        self._cancel_received = False  # True after the frame CANCEL.
        # The bodies of received frames whose tasks have not begun.
        self._bodies: deque[memoryview] = deque()
        self._unsent = b""  # the frame of a Result that was not sent yet
        self._running: RunningTask | None = None
        self._terminated = False  # True after the first SIGTERM.
        # True while the main thread sends a frame or has a Result to send. The SIGTERM handler then
        # only sets `_terminated`: if it raised TaskCancelled, the frame would stay unfinished.
        self._defers_sigterm = False

    def serve(self) -> None:
        """Run tasks until the parent closes its side of the socket or sends SIGTERM."""
        if self._handles_sigterm:
            signal_handlers.install(signal.SIGTERM, self._on_sigterm)
        else:
            signal.signal(signal.SIGINT, self._on_sigint)
        self.send(encode(Ready()))
        while not self._terminated and (message := self._next_message()) is not None:
            # Run every task in a fresh context, so that it sees no variable of an earlier task.
            Context().run(self._run, message)
        self._send_result()
        if self._handles_sigterm:
            # SIGTERM must not interrupt the functions that Python calls at its end.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def send(self, data: bytes) -> None:
        """Send one or several frames to the parent. Called from: any thread."""
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
        """Return the next task to run; None when the parent has closed its side of the socket."""
        while True:
            while self._bodies and not self._terminated:
                body = self._bodies.popleft()
                if self._may_begin(ticket_of(body)):
                    return decode_task(body)
            if self._unsent:
                self._send_result()
            waiting_since = Clocks.monotonic()
            bodies = self._receiver.receive()
            if bodies is None:
                return None
            self._bodies.extend(bodies)
            if Clocks.monotonic() - waiting_since > CONNECTION_IDLE:
                close_old_resources()

    def _may_begin(self, ticket: int) -> bool:
        """Return whether the worker may run the task: the parent has not taken the ticket back."""
        return not ticket or (self._tickets is not None and self._tickets.take(ticket))

    def _run(self, message: RunTask) -> None:
        if not is_imported(message.path):
            # The import may take longer than the parent waits for a worker that does not read.
            self._send_result(encode(Acknowledged(message.result_id)))
        running, failed = None, None
        try:
            running = RunningTask(self, message)
        except BaseException as exception:  # the import may raise anything
            if self._terminated:
                raise  # _end_task() has interrupted the import.
            failed = Outcome.failure(exception)
        started_at = time.time()
        self._send_result(encode(Started(message.result_id, started_at)))
        if running is None:
            assert failed is not None
            self._defers_sigterm = True
            self._unsent = encode_result(message.result_id, 0.0, failed, (0, None))
            failed.drop_exception()
            return
        running.started_at = started_at
        drop_stale_connections()
        time_limit = None
        if self._timeout is not None:
            timed_out = encode(TimedOut(message.result_id))
            time_limit = TimeLimit(self._timeout, partial(self._sender.send, timed_out))
        began = Clocks.perf_counter()
        outcome = self._execute(running)
        seconds = Clocks.perf_counter() - began
        if time_limit is not None:
            time_limit.stop()
        if os.getpid() != self._pid:
            os._exit(0)  # The task called fork(), and its child must not continue as a worker.
        cancel_alarm()
        flush_standard_streams()
        if not (self._terminated and outcome.error is not None):
            last = running.close_progress()
            self._unsent = encode_result(message.result_id, seconds, outcome, last)
        outcome.drop_exception()  # The parent gets a description of it.

    def _execute(self, running: RunningTask) -> Outcome:
        self._running = running
        try:
            outcome = execute(running)
        except BaseException as exception:  # noqa: BLE001 - SIGTERM may interrupt execute()
            outcome = Outcome.failure(exception)
        finally:
            self._defers_sigterm = True
            self._running = None
        running.is_over = True
        close_pools_of_test_run()
        return outcome

    def _send_result(self, following: bytes = b"") -> None:
        """Send the unsent Result, if there is one, and the frame `following` in one write."""
        self._defers_sigterm = True
        self._sender.send(self._unsent + following)
        self._unsent = b""
        self._defers_sigterm = False
        if self._terminated:
            self._end_task()

    def _on_sigterm(self, number: int, stack: FrameType | None) -> None:
        """
        Cancel the running task, so that it can clean up; without a task, end the process.

        The parent sends SIGKILL after KILL_AFTER seconds. Python calls this handler in the main
        thread, between any two of its instructions.
        """
        self._terminated = True
        if not self._defers_sigterm:
            self._end_task()

    def _on_cancel(self) -> None:
        """Cancel the running task, as SIGTERM does. Called from: the receiver's thread."""
        self._cancel_received = True
        running = self._running
        if running is not None:
            # A signal does not wake every event loop that Windows has, but this request does.
            running.get_cancellation().request()
        # Of all signals, only SIGINT ends a time.sleep() of the main thread on Windows.
        signal.raise_signal(signal.SIGINT)

    def _on_sigint(self, number: int, stack: FrameType | None) -> None:
        """Handle the SIGINT of _on_cancel() as a SIGTERM, and ignore that of Ctrl-C."""
        if self._cancel_received:
            self._on_sigterm(number, stack)

    def _end_task(self) -> None:
        if self._running is None:
            # Another SIGTERM must not interrupt the functions that Python calls at its end.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SystemExit(SIGTERM_EXIT_CODE)
        # A second interrupt() has no effect, so it cannot interrupt the task's clean-up.
        self._running.get_cancellation().interrupt()
