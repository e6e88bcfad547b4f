"""
Start worker processes: decide when one may start, when the pool gives up and when it tries again.

    start() --> the worker is ready:                reset the number of failures
            --> the system refuses the start:       try again after START_PAUSE seconds
            --> the worker ends before it is ready: try again at once
    START_ERRORS or START_DEATHS failures in a row: log one ERROR, try again after BROKEN_TIME
    seconds; until then enqueue() raises RuntimeError, unless a worker is ready

Starter only decides, without a process or a thread of its own; launch() starts the process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from contextlib import ExitStack
from itertools import count
from multiprocessing import process as multiprocessing_process
from typing import TYPE_CHECKING, Any

from ..clocks import Clocks
from ..logs import get_logger
from . import child, facilities
from .connection import WorkerConnection, socketpair
from .multiprocessing_limits import children_allowed, ensure_interpreter
from .settings import WorkerSettings
from .tickets import Tickets
from .worker_process import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..conf import ProcessOptions
    from .settings import DjangoSettings

logger = get_logger(__name__)

# The pool gives up after this many failures in a row. START_ERRORS is the limit if the last failure
# is an error of the start, which another start will hardly repair. START_DEATHS is the limit if a
# worker has ended without reporting an error, for example because another program has killed it.
START_ERRORS = 3
START_DEATHS = 10
START_PAUSE = 1.0  # seconds after a start that the system has refused
BROKEN_TIME = 10.0  # seconds without a new worker after one of the limits above is reached
# bytes; macOS accepts paths of sockets up to this length, and Linux up to 107.
MAX_SOCKET_PATH = 103
FORK_SERVER_MODULE = f"{__package__}.fork_server"
SPARE_DESCRIPTORS = 14  # more than the start of a worker and of the fork server opens at a time


class Starter:
    """Decides when the pool may start a worker. Called from: the dispatcher's thread."""

    def __init__(
        self,
        alias: str,
        launch: Callable[[str, DjangoSettings], WorkerProcess],
        settings: DjangoSettings,
        clock: Callable[[], float] = Clocks.monotonic,
    ) -> None:
        self._alias = alias
        self._launch = launch
        self.settings = settings  # for the workers that start from now on; set by any thread
        self._clock = clock
        self._numbers = count()
        self.failures = 0  # the failed starts since a worker was ready
        self.retry_at = 0.0  # the time on `_clock` before which no start is due
        self._error: str | None = None  # the reason if enqueue() must raise

    def is_due(self) -> bool:
        """Return whether the Crew may start a worker now, because `retry_at` has passed."""
        return self._clock() >= self.retry_at

    def start(self) -> WorkerProcess:
        """Start a worker process and return it. Raises OSError if the system cannot start one."""
        return self._launch(f"django-tasks-{self._alias}-{next(self._numbers)}", self.settings)

    def on_ready(self) -> None:
        """Reset the failures, and let enqueue() accept tasks, because a worker is ready."""
        self.failures = 0
        self._error = None

    def on_refusal(self, error: str) -> bool:
        """Count a start that the system has refused; return whether the pool must give up."""
        return self._on_failure(error, START_ERRORS, START_PAUSE)

    def on_death(self, error: str, *, has_reported: bool) -> bool:
        """
        Count a worker that ended before it was ready; return whether the pool must give up.

        `has_reported` is True if the worker itself has sent `error`, the traceback of set-up, and
        False if `error` is only the exit code or signal.
        """
        return self._on_failure(error, START_ERRORS if has_reported else START_DEATHS, 0.0)

    def _on_failure(self, error: str, limit: int, pause: float) -> bool:
        self.failures += 1
        if not self.is_due():
            return False  # An earlier failure has already begun a pause.
        if self.failures < limit:
            self.retry_at = self._clock() + pause
            return False
        logger.error("The task backend %r cannot start worker processes:\n%s", self._alias, error)
        self.retry_at = self._clock() + BROKEN_TIME
        return True

    def refuse_tasks(self, error: str) -> None:
        """Make raise_if_broken() raise until `retry_at`, because no worker can run a task."""
        self._error = error

    def raise_if_broken(self) -> None:
        """Raise RuntimeError while the pool cannot start any worker. Called from: any thread."""
        error = self._error
        if error is not None and not self.is_due():
            raise RuntimeError(
                f"The task backend {self._alias!r} cannot start worker processes, so no "
                f"task was enqueued. The reason:\n{error}"
            )


def make_launch(options: ProcessOptions) -> Callable[[str, DjangoSettings], WorkerProcess]:
    """
    Return a function that starts the worker with a name and Django settings.

    Raises ImproperlyConfigured if no Python interpreter is found for the workers.
    """
    ensure_interpreter()
    method = options.start_method
    if method == "forkserver" and not _fork_server_has_short_path():
        method = "spawn"
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        _preload_django()
    return lambda name, settings: launch(name, context, options, settings)


def launch(
    name: str, context: Any, options: ProcessOptions, settings: DjangoSettings
) -> WorkerProcess:
    """
    Start a worker process and return it. Raises OSError if the system cannot start one.

    After any error, launch() closes the parent's ends of the socket and pipes. If the process had
    started nevertheless, it then ends.
    """
    with ExitStack() as undo, ExitStack() as passed:
        sock, worker_sock = socketpair()
        undo.enter_context(sock)
        passed.enter_context(worker_sock)
        sock.setblocking(False)
        worker_sock.setblocking(True)  # The project may have called socket.setdefaulttimeout().
        worker_lifeline, lifeline = context.Pipe(duplex=False)
        undo.enter_context(lifeline)
        passed.enter_context(worker_lifeline)
        tickets = Tickets(context) if facilities.HAS_TICKETS else None
        if tickets is not None:
            undo.callback(tickets.close)
        process = context.Process(
            target=child.main,
            args=(
                worker_sock,
                worker_lifeline,
                None if tickets is None else tickets.pipe,
                WorkerSettings(
                    name=name,
                    progress_interval=options.progress_interval,
                    timeout=options.timeout,
                    setup=options.worker_setup,
                    environ=dict(os.environ),
                    django=settings,
                ),
                facilities.HANDLES_SIGTERM,
            ),
            name=name,
            daemon=False,  # A daemonic process may start no processes, but a task may.
        )
        _raise_if_descriptors_are_short()
        with children_allowed():
            process.start()
        undo.pop_all()
    return WorkerProcess(
        f"{name}@{process.pid}", process, WorkerConnection(sock, lifeline, tickets)
    )


def _raise_if_descriptors_are_short() -> None:
    """
    Raise OSError if multiprocessing would run out of file descriptors halfway through a start.

    multiprocessing would leak the descriptors that it had opened before the error, and could no
    longer use its fork server.
    """
    with ExitStack() as spare:
        for _ in range(SPARE_DESCRIPTORS):
            spare.callback(os.close, os.open(os.devnull, os.O_RDONLY))


# The functions below use private names of multiprocessing, which has no public ones for them.


def _fork_server_has_short_path() -> bool:
    """Return whether the system accepts the path of the fork server's socket; warn otherwise."""
    path = f"{tempfile.gettempdir()}/pymp-12345678/listener-12345678"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return True
    logger.warning(
        "Worker processes start slowly, by START_METHOD 'spawn': the path of the directory for "
        "temporary files, %r, is too long for the socket of a fork server. Set the environment "
        "variable TMPDIR to a shorter path.",
        tempfile.gettempdir(),
    )
    return False


def _preload_django() -> None:
    """
    Let the fork server import Django once for all workers, which then start three times as fast.

    This function has no effect if the application has set a preload list. The fork server does not
    set up Django, because an app's ready() may start threads, and a process with several threads
    must not fork workers.
    """
    from multiprocessing import forkserver  # Windows has no fork server.

    server: Any = forkserver._forkserver  # noqa: SLF001 - holds the names of preloaded modules
    if server._preload_modules == ["__main__"]:  # noqa: SLF001 - this list is the default
        forkserver.set_forkserver_preload(["__main__", child.__name__, FORK_SERVER_MODULE])


def forget_parents_children(workers: list[WorkerProcess]) -> None:
    """Close the parent's workers and fork server. Called from: a child of fork()."""
    module: Any = multiprocessing_process
    children = module._children  # noqa: SLF001 - multiprocessing joins these at exit
    for worker in workers:
        worker.connection.close()
        children.discard(worker.process)
    module = sys.modules.get("multiprocessing.forkserver")
    if module is None or not workers:
        return
    server = module._forkserver  # noqa: SLF001 - a child must not use it
    if server._forkserver_pid is not None:  # noqa: SLF001 - None without a fork server
        os.close(server._forkserver_alive_fd)  # noqa: SLF001 - __init__() leaves it open
        server.__init__()
