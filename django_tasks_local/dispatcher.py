"""
The thread that speaks with the worker processes of a pool: the parent's side.

    enqueue(), any thread       the dispatcher's thread              a worker process
    ---------------------       -----------------------              ----------------
    [queue of jobs] ---ring---> takes a job, claims its parcel
                                   | writes the task ------socket---> reads it
                                   |                   <--started---
                                begin(job)             <--progress--- runs it
                                publication.progress   <---result---
                                finish(job)
    cancel(), close()  ---ring---> terminates the worker ---SIGTERM-->
                                its job fails, or is   <---sentinel-- dies
                                given to another one

There is one socket for each worker, so what one of them does, or leaves unfinished, concerns no
other. Only the dispatcher touches workers: nothing of them is locked. It never waits for one of
them: it reads and writes what is possible now, and sleeps until a socket, a sentinel, the bell or
a deadline wakes it.

A task that was sent may be taken back only until its worker says that it has started. So a worker
that dies while it is idle costs no task at all, even when one is on its way to it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from contextvars import Context
from datetime import datetime
from enum import Enum
from functools import partial
from itertools import count
from multiprocessing import process as multiprocessing_process
from multiprocessing import util as multiprocessing_util
from traceback import format_exc
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from weakref import WeakSet

from django.tasks.base import TaskError

from . import shutdown, worker
from .exceptions import TaskCancelled, TaskTimeout, WorkerDied
from .execution import Outcome
from .execution.connections import (
    close_old_resources,
    close_thread_resources,
    drop_stale_connections,
)
from .forking import reset_in_child
from .handover import worker_setup

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

    from .conf import ProcessOptions
    from .events import Progress
    from .pools import Job
    from .queues import JobQueue

logger = logging.getLogger(__name__)

CHUNK = 1 << 16  # bytes; a fast worker must not keep the dispatcher from the others
LONGEST_SELECT = 3600.0  # seconds; epoll cannot wait for more than 24 days
KILL_AFTER = 0.5  # seconds from SIGTERM to SIGKILL
RETIRE_TIME = 5.0  # seconds for a worker that was told to end after its last task
SENDS = 3  # times a task is sent to a worker that dies before the task starts
# Workers in a row that may end before they are ready: after an error that they could tell, which
# will hardly go away by itself, and otherwise, as when something kills them.
START_ERRORS = 3
START_DEATHS = 10
START_PAUSE = 1.0  # seconds until a start that the system has refused is tried again
SPARE_DESCRIPTORS = 12  # more than the start of a worker and of the fork server take at any time
LOST_EXIT_CODE = 255  # what multiprocessing says when its fork server has died
BROKEN_TIME = 10.0  # seconds until a pool whose workers cannot start tries again


class RemoteTraceback(Exception):  # noqa: N818 - it is the cause of one
    """The text of a traceback in a worker process."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class RemoteError(Exception):
    """What a task raised in a worker process; the traceback there is its cause."""


class Parcel:
    """A job's task on its way to a worker, and what is known of it there."""

    __slots__ = ("_claimed", "frame", "number", "progress", "sends", "worker")

    def __init__(self, frame: bytes) -> None:
        self.frame = frame
        self.sends = 0
        self.worker: WorkerProcess | None = None
        # The last sample that came.
        self.number = 0
        self.progress: Progress | None = None
        self._claimed = threading.Lock()

    def claim(self) -> bool:
        """Take the task out of the queue, to send it or to fail it. Only one can."""
        return self._claimed.acquire(blocking=False)

    def put_back(self) -> None:
        """Give up the claim."""
        self.worker = None
        self._claimed.release()

    def close(self) -> tuple[int, Progress | None]:
        """See ProgressSource."""
        return self.number, self.progress


class JobSource(Protocol):
    """Where the jobs come from, and who hears what becomes of them: the pool."""

    alias: str
    options: ProcessOptions
    queue: JobQueue[Job]

    def begin(self, job: Job, worker_id: str, started_at: datetime | None = None) -> object:
        """See Pool.begin()."""

    def finish(self, job: Job, outcome: Outcome) -> bool:
        """See Pool.finish()."""

    def fail_waiting(self, job: Job, error: BaseException) -> bool:
        """See Pool.fail_waiting()."""

    def take_back(self, job: Job, error: BaseException) -> None:
        """See ProcessPool.take_back()."""


class State(Enum):
    """What a worker is doing."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    ENDING = "ending"  # it was told to end, or has closed its socket; it gets no task any more


class WorkerProcess:
    """A worker as the dispatcher sees it. Only the dispatcher's thread touches it."""

    def __init__(
        self, worker_id: str, process: BaseProcess, channel: socket.socket, life: Connection
    ) -> None:
        self.worker_id = worker_id
        self.process = process
        self.channel = channel
        self.life = life  # the worker ends when this is closed, as it is when this process ends
        self.state = State.STARTING
        self.was_ready = False
        self.error: str | None = None  # why it cannot start
        self.job: Job | None = None
        self.job_started = False
        self.tasks = 0
        self.is_outdated = False
        self.incoming = bytearray()
        self.outgoing = memoryview(b"")
        # When its time is up: the task's, or its own when it is ENDING.
        self.deadline: float | None = None
        self.terminated = False
        self.reason: BaseException | None = None  # why its task was stopped

    def messages(self, data: bytes) -> list[Any]:
        """Return what is complete now that this data has come."""
        self.incoming += data
        found = []
        with memoryview(self.incoming) as view:
            start, end = 0, worker.HEADER.size
            while len(view) >= end:
                end += worker.HEADER.unpack_from(view, start)[0]
                if len(view) < end:
                    break
                with view[start + worker.HEADER.size : end] as body:
                    found.append(_message(body))
                start, end = end, end + worker.HEADER.size
        del self.incoming[:start]
        return found

    def close(self) -> None:
        """Close what the parent holds of it."""
        self.channel.close()
        self.life.close()


class Dispatcher:
    """The thread that speaks with all workers of a pool. Its methods run there if not stated."""

    def __init__(self, pool: JobSource) -> None:
        self._pool = pool
        self._options = pool.options
        self._context: Any = multiprocessing.get_context(self._options.start_method)
        if self._options.start_method == "forkserver":
            _preload()
        self._workers: set[WorkerProcess] = set()
        self._idle: list[WorkerProcess] = []
        self._size = 0  # how many workers there should be: the most that were needed so far
        self._serving = 0  # how many there are, without those that end
        self._numbers = count()
        self._failed_starts = 0
        self._no_start_before = 0.0  # time.monotonic(), after workers could not start
        self._broken: str | None = None  # why there is no worker at all
        self._commands: deque[Callable[[], object]] = deque()
        self._closing = False
        self._rung = False
        self._hungry = True  # a new job could be given to somebody
        self._thread = threading.Thread(
            target=self._run, name=f"django-tasks-{pool.alias}-dispatcher", daemon=True
        )
        # multiprocessing waits at exit for children, and asks its own finalizers before.
        self._finalizer = multiprocessing_util.Finalize(
            None, shutdown.drain_at_exit, exitpriority=100
        )
        with ExitStack() as undo:
            undo.callback(self._finalizer.cancel)
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._bell, self._button = map(undo.enter_context, socket.socketpair())
            self._bell.setblocking(False)
            self._button.setblocking(False)
            self._selector.register(self._bell, selectors.EVENT_READ, self._on_bell)
            self._thread.start()
            undo.pop_all()
        _dispatchers.add(self)

    # Called from any thread

    def job_added(self) -> None:
        """Look at the queue, if that is of any use just now."""
        # Unlocked: when the dispatcher becomes hungry it looks at the queue once more.
        if self._hungry:
            self._hungry = False
            self._ring()

    def post(self, command: Callable[..., object], *args: object) -> None:
        """Have the dispatcher call this."""
        self._commands.append(partial(command, *args))
        self._ring()

    def raise_if_broken(self) -> None:
        """Raise RuntimeError if no worker could be started a moment ago."""
        broken = self._broken
        if broken is not None and time.monotonic() < self._no_start_before:
            raise RuntimeError(
                f"The task backend {self._pool.alias!r} cannot start worker processes, so no "
                f"task was enqueued. The reason:\n{broken}"
            )

    def close(self) -> None:
        """Stop all workers, and return when none is left."""
        self.post(self._close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def abandon(self) -> None:
        """In a child of fork(): let go of workers that are the parent's."""
        for worker_process in self._workers:
            worker_process.close()
            multiprocessing_process._children.discard(worker_process.process)  # type: ignore[attr-defined]
        self._bell.close()
        self._button.close()
        self._selector.close()

    def _ring(self) -> None:
        # Unlocked: the flag is taken back before the dispatcher looks, so what was added by then
        # is seen; two rings at once are one too many, and harmless.
        if not self._rung:
            self._rung = True
            with suppress(OSError):  # It has closed, and nobody listens any more.
                self._button.send(b"\0")

    # The loop

    def _run(self) -> None:
        try:
            while self._workers or not self._closing:
                self._turn()
        except BaseException:
            logger.exception("The dispatcher of the task backend %r failed.", self._pool.alias)
        finally:
            self._finalizer.cancel()
            self._selector.close()
            self._bell.close()
            self._button.close()
            close_thread_resources()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._time_left()):
            self._safely(key.data, events)
        while self._commands:
            self._safely(self._commands.popleft())
        now = time.monotonic()
        for late in [w for w in self._workers if w.deadline is not None and w.deadline <= now]:
            self._safely(self._on_deadline, late)
        self._safely(self._hand_out)

    def _safely(self, function: Callable[..., object], *args: object) -> None:
        try:
            # A fresh context, because the receivers of signals may run in there.
            Context().run(_tidily, function, *args)
        except BaseException:
            # A mistake of ours, or SystemExit from somewhere; the other workers go on.
            logger.exception("An error in the dispatcher of the task backend.")

    def _time_left(self) -> float | None:
        deadlines = [w.deadline for w in self._workers if w.deadline is not None]
        if self._pool.queue and self._no_start_before > time.monotonic():
            deadlines.append(self._no_start_before)
        if not deadlines:
            return None
        return min(max(0.0, min(deadlines) - time.monotonic()), LONGEST_SELECT)

    def _on_bell(self, events: int) -> None:
        self._bell.recv(64)
        self._rung = False

    # Jobs

    def _hand_out(self) -> None:
        """Give waiting jobs to idle workers, and have enough workers."""
        try:
            self._assign()
            self._hungry = True
            self._assign()  # What came in between has not rung.
        finally:
            # Whatever was raised: who never becomes hungry again hears of no job any more.
            self._hungry = bool(self._idle) or self._serving < self._options.max_workers

    def _next_job(self) -> Job | None:
        with suppress(IndexError):  # The last one may be cancelled at any moment.
            return self._pool.queue.popleft()
        return None

    def _assign(self) -> None:
        queue = self._pool.queue
        while self._idle and (job := self._next_job()) is not None:
            if job.running.claim():
                self._give(self._idle.pop(), job)
        most = self._options.max_workers
        if queue and self._size < most:
            starting = sum(w.state is State.STARTING for w in self._workers)
            missing = len(queue) - starting
            self._size = min(most, max(self._size, self._serving + missing))
        while self._serving < self._size and self._may_start():
            self._start_worker()

    def _may_start(self) -> bool:
        return not self._closing and time.monotonic() >= self._no_start_before

    def _give(self, to: WorkerProcess, job: Job) -> None:
        parcel: Parcel = job.running
        parcel.worker = to
        parcel.sends += 1
        to.state = State.BUSY
        to.job = job
        to.job_started = False
        to.outgoing = memoryview(parcel.frame)
        self._write(to)

    def stop_job(self, job: Job) -> None:
        """Stop the worker that does this job, because the task was cancelled."""
        parcel: Parcel = job.running
        error = TaskCancelled("The task was cancelled.")
        if parcel.worker is not None and parcel.worker.job is job:
            self._stop(parcel.worker, error)
        else:
            self._pool.fail_waiting(job, error)  # It was taken back in the meantime.

    # What workers say

    def _on_channel(self, worker_process: WorkerProcess, events: int) -> None:
        if worker_process not in self._workers:
            return  # It was buried in this very turn.
        if events & selectors.EVENT_WRITE:
            self._write(worker_process)
        if events & selectors.EVENT_READ and self._read(worker_process) == b"":
            # Its side is closed, so it dies, or it has closed what it should not.
            self._selector.unregister(worker_process.channel)
            self._set_ending(worker_process, KILL_AFTER)
            if sys.platform == "win32":  # where a selector knows nothing but sockets
                worker_process.process.join(KILL_AFTER)
                worker_process.process.kill()
                self._bury(worker_process)

    def _read(self, worker_process: WorkerProcess) -> bytes | None:
        """Read what is there, but not for long: None is nothing now, b"" nothing ever again."""
        try:
            data = worker_process.channel.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        for kind, *values in worker_process.messages(data):
            self._safely(self._handlers[kind], self, worker_process, *values)
        return data

    def _write(self, worker_process: WorkerProcess) -> None:
        """Write what can be written now."""
        try:
            sent = worker_process.channel.send(worker_process.outgoing)
        except BlockingIOError:
            sent = 0
        except OSError:  # It has died, which its sentinel tells, too.
            worker_process.outgoing = memoryview(b"")
            return
        worker_process.outgoing = worker_process.outgoing[sent:]
        events = selectors.EVENT_READ
        if worker_process.outgoing:
            events |= selectors.EVENT_WRITE
        key = self._selector.get_key(worker_process.channel)
        if key.events != events:
            self._selector.modify(worker_process.channel, events, key.data)

    def _on_ready(self, worker_process: WorkerProcess) -> None:
        self._failed_starts = 0
        self._broken = None
        worker_process.was_ready = True
        if worker_process.state is State.STARTING:
            self._set_idle(worker_process)

    def _on_broken(self, worker_process: WorkerProcess, error: str) -> None:
        worker_process.error = error

    def _on_started(self, worker_process: WorkerProcess, result_id: str, started_at: str) -> None:
        job = worker_process.job
        assert job is not None
        worker_process.job_started = True
        job.running.frame = b""  # It will not be sent again.
        if self._options.timeout is not None and worker_process.state is State.BUSY:
            worker_process.deadline = time.monotonic() + self._options.timeout
        self._pool.begin(job, worker_process.worker_id, datetime.fromisoformat(started_at))

    def _on_progress(
        self, worker_process: WorkerProcess, result_id: str, number: int, progress: Progress
    ) -> None:
        job = worker_process.job
        # A sample may come after its task's result, because another thread has sent it.
        if job is not None and job.result_id == result_id:
            job.running.number, job.running.progress = number, progress
            job.publication.progress(number, progress)

    def _on_result(
        self,
        worker_process: WorkerProcess,
        result_id: str,
        return_value: Any,
        error: tuple[str, str] | None,
        message: str | None,
        number: int,
        progress: Progress | None,
    ) -> None:
        job = worker_process.job
        assert job is not None
        job.running.number, job.running.progress = number, progress
        reason = worker_process.reason
        if reason is not None and not (isinstance(reason, TaskCancelled) and error is None):
            return  # The worker dies, and then the job gets its outcome.
        worker_process.job = None
        worker_process.tasks += 1
        if worker_process.state is State.BUSY:
            worker_process.deadline = None
            is_old = worker_process.tasks == self._options.max_tasks_per_worker
            if is_old or worker_process.is_outdated:
                self._retire(worker_process)
            else:
                self._set_idle(worker_process)
                self._assign()  # The next task begins while this one is recorded.
        self._pool.finish(job, _outcome(return_value, error, message))

    def _on_unreadable(self, worker_process: WorkerProcess, error: Exception) -> None:
        if worker_process.job is not None:
            job, worker_process.job = worker_process.job, None
            self._pool.finish(job, Outcome.failure(error))
        self._stop(worker_process, error)

    _handlers: ClassVar[dict[str, Callable[..., None]]] = {
        worker.READY: _on_ready,
        worker.BROKEN: _on_broken,
        worker.STARTED: _on_started,
        worker.PROGRESS: _on_progress,
        worker.RESULT: _on_result,
        "unreadable": _on_unreadable,
    }

    # The life of a worker

    def _start_worker(self) -> None:
        name = f"django-tasks-{self._pool.alias}-{next(self._numbers)}"
        try:
            # Taken back when anything fails. The worker, if there is one, ends with its sockets.
            with ExitStack() as undo:
                new = self._launch(name, undo)
                self._listen_to(new, undo)
                undo.pop_all()
        except Exception:  # noqa: BLE001 - whatever it is, enqueue() must tell it
            error = format_exc()
        else:
            self._workers.add(new)
            self._serving += 1
            return
        # Not while it is handled: it would be the context of the errors of the waiting tasks.
        self._start_failed(error, START_ERRORS, START_PAUSE)

    def _launch(self, name: str, undo: ExitStack) -> WorkerProcess:
        """Start a worker process. Raises OSError when the system refuses it."""
        with ExitStack() as theirs:
            channel, their_channel = socket.socketpair()
            undo.enter_context(channel)
            theirs.enter_context(their_channel)
            their_life, life = self._context.Pipe(duplex=False)
            undo.enter_context(life)
            theirs.enter_context(their_life)
            setup = worker_setup(name, self._options.progress_interval)
            process = self._context.Process(
                target=worker.main,
                args=(their_channel, their_life, setup),
                name=name,
                daemon=False,  # A task may start processes of its own.
            )
            _raise_if_descriptors_are_short()
            process.start()
        channel.setblocking(False)
        return WorkerProcess(f"{name}@{process.pid}", process, channel, life)

    def _listen_to(self, new: WorkerProcess, undo: ExitStack) -> None:
        handlers: dict[Any, Any] = {new.channel: partial(self._on_channel, new)}
        if sys.platform != "win32":
            handlers[new.process.sentinel] = partial(self._on_sentinel, new)
        for file, handler in handlers.items():
            self._selector.register(file, selectors.EVENT_READ, handler)
            undo.callback(self._selector.unregister, file)

    def _set_idle(self, worker_process: WorkerProcess) -> None:
        worker_process.state = State.IDLE
        self._idle.append(worker_process)

    def _set_ending(self, worker_process: WorkerProcess, seconds: float) -> None:
        if worker_process.state is State.IDLE:
            self._idle.remove(worker_process)
        if worker_process.state is not State.ENDING:
            worker_process.state = State.ENDING
            self._serving -= 1
        worker_process.deadline = time.monotonic() + seconds

    def _retire(self, worker_process: WorkerProcess) -> None:
        """Let a worker end which has no task: it reads the end of its socket."""
        self._set_ending(worker_process, RETIRE_TIME)
        with suppress(OSError):
            worker_process.channel.shutdown(socket.SHUT_WR)

    def retire_all(self) -> None:
        """Let all workers end, busy ones after their task."""
        for worker_process in list(self._workers):
            if worker_process.state is State.IDLE:
                self._retire(worker_process)
            elif worker_process.state is State.STARTING:
                self._stop(worker_process, None)
            else:
                worker_process.is_outdated = True

    def _stop(self, worker_process: WorkerProcess, reason: BaseException | None) -> None:
        """Terminate a worker, and kill it when that does not help."""
        if worker_process.terminated:
            return
        worker_process.terminated = True
        worker_process.reason = reason
        self._set_ending(worker_process, KILL_AFTER)
        worker_process.process.terminate()

    def _on_deadline(self, worker_process: WorkerProcess) -> None:
        if worker_process.state is State.BUSY:
            timeout = self._options.timeout
            self._stop(worker_process, TaskTimeout(f"The task took longer than {timeout} seconds."))
        elif worker_process.terminated:
            worker_process.deadline = None
            worker_process.process.kill()
        else:
            self._stop(worker_process, None)

    def _on_sentinel(self, worker_process: WorkerProcess, events: int) -> None:
        """A worker has died; hear what it has said before."""
        if worker_process in self._workers:
            while self._read(worker_process):
                pass
            self._selector.unregister(worker_process.process.sentinel)
            self._bury(worker_process)

    def _bury(self, dead: WorkerProcess) -> None:
        """Forget a dead worker, and settle what becomes of its job."""
        self._set_ending(dead, 0)
        self._workers.discard(dead)
        with suppress(KeyError):
            self._selector.unregister(dead.channel)
        dead.close()
        death = f"The worker process {dead.worker_id} {_how_it_ended(dead.process)}"
        if dead.job is not None:
            job, dead.job = dead.job, None  # A cancel() that comes too late must not find it here.
            self._settle(dead, job, f"{death} while it ran the task.")
        elif not dead.was_ready and not dead.terminated:
            limit = START_DEATHS if dead.error is None else START_ERRORS
            self._start_failed(dead.error or f"{death} before it was ready.", limit)

    def _settle(self, dead: WorkerProcess, job: Job, death: str) -> None:
        if dead.reason is None and not dead.job_started:
            self._pool.take_back(job, WorkerDied(death))
        else:
            self._pool.finish(job, Outcome.failure(dead.reason or WorkerDied(death)))

    def _start_failed(self, error: str, limit: int, pause: float = 0.0) -> None:
        """Try again after `pause` seconds, up to a limit; then say so once, and wait longer."""
        self._failed_starts += 1
        if not self._may_start():
            return  # Another one has said it already.
        if self._failed_starts < limit:
            self._no_start_before = time.monotonic() + pause
            return
        logger.error(
            "The task backend %r cannot start worker processes:\n%s", self._pool.alias, error
        )
        self._no_start_before = time.monotonic() + BROKEN_TIME
        if any(w.was_ready for w in self._workers):
            return  # They go on with the queue.
        self._size = 0
        self._broken = error
        while (job := self._next_job()) is not None:
            message = f"No worker process could be started.\n{error}"
            self._pool.fail_waiting(job, WorkerDied(message))

    def _close(self) -> None:
        self._closing = True
        for worker_process in list(self._workers):
            self._stop(worker_process, None)


def _tidily(function: Callable[..., object], *args: object) -> None:
    """Call what may call receivers of signals, which may use the database."""
    drop_stale_connections()
    try:
        function(*args)
    finally:
        close_old_resources()


def _preload() -> None:
    """
    Have the fork server import Django, once for all workers: they start three times as fast.

    Only if nobody else has said what it shall import. It imports, and does no more: setting Django
    up there would start what an app starts, and workers are to be forked from a single thread.
    """
    from multiprocessing import forkserver  # not on Windows

    if forkserver._forkserver._preload_modules == ["__main__"]:  # type: ignore[attr-defined]
        forkserver.set_forkserver_preload(["__main__", worker.__name__])


def _raise_if_descriptors_are_short() -> None:
    """
    Raise OSError now, if multiprocessing would run out of file descriptors in the midst of a start.

    It would lose those that it has opened, and with them its fork server.
    """
    with ExitStack() as spare:
        for _ in range(SPARE_DESCRIPTORS):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))


def _message(body: memoryview) -> Any:
    try:
        return pickle.loads(body)  # noqa: S301 - from our own process
    except Exception as error:  # noqa: BLE001 - a class of a return value that is not known here
        return "unreadable", error


def _outcome(return_value: Any, error: tuple[str, str] | None, message: str | None) -> Outcome:
    if error is None:
        return Outcome(return_value=return_value)
    path, traceback = error
    # Django's log record shows it. As in concurrent.futures, the cause has the text from there.
    exception = RemoteError(f"{path}: {message}")
    exception.__cause__ = RemoteTraceback(traceback)
    return Outcome(
        error=TaskError(exception_class_path=path, traceback=traceback),
        message=message,
        exception=exception,
    )


def _how_it_ended(process: BaseProcess) -> str:
    """Say it with the signal's name or the exit code, and free what the process object holds."""
    process.join(KILL_AFTER)
    code = process.exitcode
    if code is None or code == LOST_EXIT_CODE:
        # The fork server was killed, and so nobody knows; whatever it is, it must not go on.
        process.kill()
    with suppress(ValueError):  # It still runs.
        process.close()
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


_dispatchers: WeakSet[Dispatcher] = WeakSet()


@reset_in_child
def _start_anew() -> None:
    """In a child of fork(): the workers and the fork server are the parent's."""
    dispatchers = list(_dispatchers)
    _dispatchers.clear()
    for dispatcher in dispatchers:
        dispatcher.abandon()
    module: Any = sys.modules.get("multiprocessing.forkserver")
    if dispatchers and module is not None and module._forkserver._forkserver_pid is not None:
        # It would ask the fork server whether it lives, which only its parent may do.
        os.close(module._forkserver._forkserver_alive_fd)
        module._forkserver.__init__()
