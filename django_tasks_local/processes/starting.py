"""
Starting worker processes: when one may be started, when the pool gives up, when it tries again.

    start() --> the worker is ready:              all failures are forgotten
            --> the system refuses the start:     again after START_PAUSE seconds
            --> the worker ends before it is ready: again at once
    START_ERRORS or START_DEATHS failures in a row: one ERROR, again after BROKEN_TIME seconds;
    while no worker is ready, enqueue() raises RuntimeError until then

Starter is the policy and has no process and no thread; launch() is the start itself.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import time
from contextlib import ExitStack
from itertools import count
from multiprocessing import process as multiprocessing_process
from typing import TYPE_CHECKING, Any

from . import child
from .settings import worker_settings
from .tickets import Tickets
from .worker_process import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..conf import ProcessOptions

logger = logging.getLogger(__name__)

# Failures in a row after which starting is given up: errors that a start reports, which will hardly
# disappear without a change, and deaths without a report, as when another program kills workers.
START_ERRORS = 3
START_DEATHS = 10
START_PAUSE = 1.0  # seconds after a start that the system has refused
BROKEN_TIME = 10.0  # seconds without a start after the pool has given up
SPARE_DESCRIPTORS = 14  # more than the start of a worker and of the fork server need at any time


class Starter:
    """Decides when the workers of one pool are started. Used in the dispatcher's thread."""

    def __init__(
        self,
        alias: str,
        launch: Callable[[str], WorkerProcess],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._alias = alias
        self._launch = launch
        self._clock = clock
        self._numbers = count()
        self.failures = 0  # in a row
        self.retry_at = 0.0  # on the clock; no worker is started before
        self._error: str | None = None  # why the pool has given up and no worker is ready

    def is_due(self) -> bool:
        """Whether a worker may be started now."""
        return self._clock() >= self.retry_at

    def start(self) -> WorkerProcess:
        """Start a worker process. Raises OSError if the system refuses it."""
        return self._launch(f"django-tasks-{self._alias}-{next(self._numbers)}")

    def on_ready(self) -> None:
        """Forget the failures: a worker is ready."""
        self.failures = 0
        self._error = None

    def on_refusal(self, error: str) -> bool:
        """Note that the system has refused a start; True if the pool must give up."""
        return self._on_failure(error, START_ERRORS, START_PAUSE)

    def on_death(self, error: str, *, has_reported: bool) -> bool:
        """
        Note that a worker has ended before it was ready; True if the pool must give up.

        `has_reported`: the error is the worker's own report, and not only how the worker ended.
        """
        return self._on_failure(error, START_ERRORS if has_reported else START_DEATHS, 0.0)

    def _on_failure(self, error: str, limit: int, pause: float) -> bool:
        self.failures += 1
        if not self.is_due():
            return False  # Another worker's failure has begun a pause already.
        if self.failures < limit:
            self.retry_at = self._clock() + pause
            return False
        logger.error("The task backend %r cannot start worker processes:\n%s", self._alias, error)
        self.retry_at = self._clock() + BROKEN_TIME
        return True

    def refuse_tasks(self, error: str) -> None:
        """Let raise_if_broken() raise until the next start: no worker can run a task."""
        self._error = error

    def raise_if_broken(self) -> None:
        """Raise RuntimeError if the pool has given up and has no worker. Called from any thread."""
        error = self._error
        if error is not None and not self.is_due():
            raise RuntimeError(
                f"The task backend {self._alias!r} cannot start worker processes, so no "
                f"task was enqueued. The reason:\n{error}"
            )


def make_launch(options: ProcessOptions) -> Callable[[str], WorkerProcess]:
    """Return launch() for the workers of a pool with these options."""
    context: Any = multiprocessing.get_context(options.start_method)
    if options.start_method == "forkserver":
        _preload_django()
    return lambda name: launch(name, context, options.progress_interval)


def launch(name: str, context: Any, progress_interval: float) -> WorkerProcess:
    """
    Start a worker process. Raises OSError if the system refuses it.

    If anything fails, the parent's ends of the connections are closed, and a worker that was
    started all the same ends with them.
    """
    with ExitStack() as undo, ExitStack() as passed:
        sock, worker_sock = socket.socketpair()
        undo.enter_context(sock)
        passed.enter_context(worker_sock)
        worker_lifeline, lifeline = context.Pipe(duplex=False)
        undo.enter_context(lifeline)
        passed.enter_context(worker_lifeline)
        tickets = None if sys.platform == "win32" else Tickets(context)
        if tickets is not None:
            undo.callback(tickets.close)
        process = context.Process(
            target=child.main,
            args=(
                worker_sock,
                worker_lifeline,
                None if tickets is None else tickets.pipe,
                worker_settings(name, progress_interval),
            ),
            name=name,
            daemon=False,  # A task may start processes of its own.
        )
        _raise_if_descriptors_are_short()
        process.start()
        sock.setblocking(False)
        undo.pop_all()
    return WorkerProcess(f"{name}@{process.pid}", process, sock, lifeline, tickets)


def _raise_if_descriptors_are_short() -> None:
    """
    Raise OSError now if multiprocessing would run out of file descriptors halfway through a start.

    It leaks the descriptors that it has opened until then, and cannot use its fork server later.
    """
    with ExitStack() as spare:
        for _ in range(SPARE_DESCRIPTORS):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))


# multiprocessing has no public names for the objects below.


def _preload_django() -> None:
    """
    Have the fork server import Django, once for all workers: they start three times as fast.

    Only if the application has set no preload list of its own. The fork server does not set up
    Django: an app's ready() may start threads, and workers must be forked from a single thread.
    """
    from multiprocessing import forkserver  # not on Windows

    server: Any = forkserver._forkserver  # noqa: SLF001 - holds the names that are preloaded
    if server._preload_modules == ["__main__"]:  # noqa: SLF001 - the default
        forkserver.set_forkserver_preload(["__main__", child.__name__])


def forget_parents_children(workers: list[WorkerProcess]) -> None:
    """In a child of fork(): the workers and the fork server belong to the parent."""
    module: Any = multiprocessing_process
    children = module._children  # noqa: SLF001 - multiprocessing waits for these at exit
    for worker in workers:
        worker.close()
        children.discard(worker.process)
    module = sys.modules.get("multiprocessing.forkserver")
    if module is None or not workers:
        return
    server = module._forkserver  # noqa: SLF001 - only the parent may ask it whether it lives
    if server._forkserver_pid is not None:  # noqa: SLF001 - None: there is no fork server
        os.close(server._forkserver_alive_fd)  # noqa: SLF001 - multiprocessing never closes it
        server.__init__()
