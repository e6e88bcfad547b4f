"""
Call signal receivers and log handlers in threads that run no task.

    the dispatcher, cancel(), close()         a thread of the notifier
    ---------------------------------         ------------------------
    notifier.post(id, context, call) -------> context.run(call), one call after the other

Receivers and log handlers are code of the application, and may wait for a row lock or a mail server
without limit. In the dispatcher's thread they would stop all process tasks, and in cancel() the web
request. All calls for one task go to one thread, which makes them in their order. A call that waits
delays only the calls in its own thread: a quarter of all calls.
"""

from __future__ import annotations

import threading
from contextvars import Context
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

from .clocks import Clocks
from .execution.connections import (
    close_old_resources,
    close_thread_resources,
    drop_stale_connections,
)
from .logs import get_logger
from .new_thread import new_thread

if TYPE_CHECKING:
    from collections.abc import Callable

logger = get_logger(__name__)

MAX_THREADS = 4
# The most calls that may wait in one thread; 10,000 in all threads of a pool.
MAX_WAITING = 2500
REPORT_INTERVAL = 1.0  # seconds; a thread's dropped calls are logged at most once in this time
MAX_REPORTED_IDS = 10


class _Call(NamedTuple):
    id: str  # The id of the task.
    context: Context
    on_drop: Callable[[], object] | None
    function: Callable[..., object]
    args: tuple[object, ...]

    def run(self) -> None:
        self.context.run(self._run)

    def _run(self) -> None:
        """Call the function; treat connections and caches as Django does for a request."""
        drop_stale_connections()
        try:
            self.function(*self.args)
        except BaseException:
            # BaseException, because a receiver that raises SystemExit must not end the thread.
            logger.exception("A receiver failed for task id=%s.", self.id)
        finally:
            close_old_resources()


class Notifier:
    """Holds the threads that call the receivers and log handlers of one pool."""

    def __init__(self, alias: str) -> None:
        names = [f"django-tasks-notifier-{alias}-{number}" for number in range(MAX_THREADS)]
        self._threads = [_NotifierThread(name) for name in names]

    def post(
        self,
        id: str,
        context: Context,
        function: Callable[..., object],
        *args: object,
        on_drop: Callable[[], object] | None = None,
    ) -> None:
        """
        Have a thread call `function(*args)` in this context. Called from: any thread.

        All calls with the same id are made in the order of post(). If MAX_WAITING calls wait in the
        thread, the oldest one is dropped, and its `on_drop` is called instead.

        If the system can start no thread, as at the exit of Python 3.12, this method makes the call
        itself.
        """
        index = hash(id) % MAX_THREADS
        if self._threads[index].add(_Call(id, context, on_drop, function, args)):
            # Another thread writes the log record, because the handler may be the call that waits.
            self._threads[index].report_dropped_in(self._threads[(index + 1) % MAX_THREADS])

    def post_log(self, function: Callable[..., object], *args: object) -> None:
        """Have a thread call log handlers for a thread that must not wait for them."""
        self.post("", Context(), function, *args)

    def close(self) -> None:
        """End the threads after the calls that wait now. A later post() starts a thread again."""
        for thread in self._threads:
            thread.close()


class _NotifierThread:
    """Makes the calls of one thread, which the first call starts."""

    def __init__(self, name: str) -> None:
        self._name = name
        # None ends the thread, if no call follows.
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # Guards: the start of the thread, and the attributes below. Reentrant, because a finalizer
        # that runs while its thread holds the lock may post a call.
        self._lock = threading.RLock()
        self._dropped = 0  # The number of dropped calls that no log record has reported.
        self._dropped_ids: list[str] = []  # The tasks of the first of these calls.
        self._report_at = 0.0

    def add(self, call: _Call) -> bool:
        """Add a call; return True if one was dropped that should be reported now."""
        self._calls.put(call)
        # Unlocked: _may_end() sets `_thread` to None and then checks the queue again.
        if self._thread is None:
            self._start()
        return self._calls.qsize() > MAX_WAITING and self._drop_oldest()

    def close(self) -> None:
        if self._thread is not None:
            self._calls.put(None)

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None:
                return
            self._thread = new_thread(self._name, self._run)
            try:
                self._thread.start()
            except RuntimeError:
                self._thread = None
            else:
                return
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            if call is not None:
                call.run()

    def _run(self) -> None:
        while True:
            call = self._calls.get()
            if call is not None:
                call.run()
                call = None  # Otherwise this thread would keep the task alive while it waits.
                if self._dropped and self._calls.empty():
                    self._log_dropped()
            elif self._may_end():
                break
        close_thread_resources()

    def _may_end(self) -> bool:
        # Race: another thread may add a call after this one has received None, and read `_thread`
        # before it becomes None. Then the queue is not empty below, and this thread continues,
        # unless a third thread has started another one for the call.
        thread, self._thread = self._thread, None
        if self._calls.empty():
            return True
        with self._lock:
            if self._thread is not None:
                return True
            self._thread = thread
        return False

    # Methods that drop calls

    def _drop_oldest(self) -> bool:
        try:
            call = self._calls.get_nowait()
        except Empty:
            return False
        if call is None:
            self._calls.put(None)
            return False
        if call.on_drop is not None:
            call.on_drop()
        with self._lock:
            self._dropped += 1
            if len(self._dropped_ids) < MAX_REPORTED_IDS:
                self._dropped_ids.append(call.id)
            now = Clocks.monotonic()
            is_due = now >= self._report_at
            if is_due:
                self._report_at = now + REPORT_INTERVAL
        return is_due

    def report_dropped_in(self, other: _NotifierThread) -> None:
        """Have another thread write the log record of the calls that this thread has dropped."""
        other.add(_Call("", Context(), None, self._log_dropped, ()))

    def _log_dropped(self) -> None:
        with self._lock:
            number, ids = self._dropped, self._dropped_ids
            self._dropped, self._dropped_ids = 0, []
        if number:
            logger.error(
                "%s has dropped %d signals or log records, because a receiver or log handler takes "
                "too long. The first tasks: %s",
                self._name,
                number,
                ", ".join(ids),
            )
