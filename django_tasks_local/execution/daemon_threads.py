"""Run the sync code of coroutines in daemon threads, which do not delay the exit of the process."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache, lru_cache
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..clocks import Clocks
from ..new_thread import new_thread

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor


class _Call(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DaemonExecutor(ThreadPoolExecutor):
    """
    Works as a ThreadPoolExecutor, but with daemon threads, which do not delay the process's end.

    The interpreter joins every thread of a ThreadPoolExecutor before it calls atexit, however long
    the thread runs. DaemonExecutor inherits from ThreadPoolExecutor because asyncio accepts no
    other class as an event loop's default executor.

    Source: the documentation of concurrent.futures, "ThreadPoolExecutor", note on shutdown.
    """

    def __init__(self, max_workers: int | None = None) -> None:
        super().__init__(max_workers)
        self._limit = max_workers or min(32, (os.cpu_count() or 1) + 4)
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()  # Each None ends one thread.
        self._idle: SimpleQueue[None] = SimpleQueue()  # It has one item for each idle thread.
        # Guards: the attributes below, and the order of `_calls`: shutdown() puts None at its end,
        # and no thread would take a call that submit() put behind this None. Reentrant, because a
        # finalizer that runs while this thread holds it may call submit().
        self._guard = threading.RLock()
        self._workers: list[threading.Thread] = []
        self._alive = 0  # counts the threads of `_workers` that have not ended
        self._closed = False
        self.ended: Future[None] = Future()  # done after shutdown(), when all threads have ended

    @property
    def has_threads(self) -> bool:
        """Return whether submit() has started a thread."""
        return bool(self._workers)

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """
        Queue a call of a function for one of the daemon threads. Called from: any thread.

        Raises RuntimeError after shutdown(), or when the system cannot start the first thread.
        """
        future: Future[T] = Future()
        with self._guard:
            if self._closed:
                raise RuntimeError("The executor is shut down, so it cannot call a function.")
            self._calls.put(_Call(future, fn, args, kwargs))
            try:
                self._idle.get_nowait()
            except Empty:
                if len(self._workers) < self._limit:
                    self._start_worker()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """
        Refuse further calls, and end the threads after the calls that are queued.

        `cancel_futures` cancels the queued calls first; `wait` waits until all threads have ended.
        """
        with self._guard:
            if not self._closed and not self._alive:
                self.ended.set_result(None)
            self._closed = True
            if cancel_futures:
                self._cancel_calls()
            self._calls.put(None)
        if wait:
            for worker in self._workers:
                worker.join()

    def _start_worker(self) -> None:
        worker = new_thread("django-tasks-sync", self._work)
        # Count the thread before start(): a finalizer that runs in start() may call submit().
        self._workers.append(worker)
        self._alive += 1
        try:
            worker.start()
        except RuntimeError:
            self._workers.remove(worker)
            self._alive -= 1
            if not self._workers:
                self._calls.get_nowait()  # No thread exists to take this call.
                raise

    def _cancel_calls(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except Empty:
                return
            if call is not None:
                call.future.cancel()

    def _work(self) -> None:
        while (call := self._next()) is not None:
            _do(call)
            del call  # Free the call's objects while this thread waits.
        with self._guard:
            self._calls.put(None)  # This None ends the next thread.
            self._alive -= 1
            if not self._alive:
                self.ended.set_result(None)

    def _next(self) -> _Call | None:
        try:
            return self._calls.get_nowait()
        except Empty:
            self._idle.put(None)
            return self._calls.get()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """
    Return a new event loop that runs the functions of asyncio.to_thread() in daemon threads.

    The event loop policy of the project chooses the loop. For example, psycopg needs
    WindowsSelectorEventLoopPolicy on Windows.
    """
    # Since Python 3.14, each public function that returns the policy issues a DeprecationWarning.
    return _loop_factory(getattr(asyncio.events, "_event_loop_policy", None))()


@lru_cache(maxsize=1)
def _loop_factory(policy: Any) -> Callable[[], asyncio.AbstractEventLoop]:
    """Return a function that makes event loops as this policy does, but with daemon threads."""
    if policy is not None and not type(policy).__module__.startswith("asyncio."):
        return _new_loop_of_project
    # A policy of asyncio only chooses a class. To replace the class of a loop that asyncio has made
    # would cost 10 µs per task.
    loop: Any = asyncio.new_event_loop()
    loop.close()
    return _with_daemon_threads(loop.__class__)


def _new_loop_of_project() -> asyncio.AbstractEventLoop:
    loop: Any = asyncio.new_event_loop()
    # A loop whose class allows no change works too, but its threads delay the exit of the process.
    with suppress(TypeError):
        loop.__class__ = _with_daemon_threads(loop.__class__)
    return cast("asyncio.AbstractEventLoop", loop)


@cache
def _with_daemon_threads(kind: Any) -> type[asyncio.AbstractEventLoop]:
    """Return a subclass of an event loop's class, with the methods of DaemonThreads."""
    members: dict[str, Any] = {}
    if getattr(kind, "time", None) is asyncio.BaseEventLoop.time:
        # This method reads time.monotonic(). While freezegun replaces it, no timer would expire.
        members["time"] = staticmethod(Clocks.monotonic)
    return type(f"DaemonThreads{kind.__name__}", (_DaemonThreads, kind), members)


class _DaemonThreads(asyncio.AbstractEventLoop):
    """Adds a DaemonExecutor to an event loop, as its default executor."""

    _executor: DaemonExecutor | None = None
    _has_default = False

    def set_default_executor(self, executor: Any) -> None:
        """Use an executor that the task chooses instead of a DaemonExecutor."""
        self._has_default = True
        super().set_default_executor(executor)

    def run_in_executor[*Ts, T](
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Call a function in an executor; for None, in this loop's default executor."""
        if executor is None and not self._has_default:
            executor = self._executor = self._executor or DaemonExecutor()
        return super().run_in_executor(executor, func, *args)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """
        Shut the DaemonExecutor down and wait for its threads without blocking the event loop.

        asyncio's own method would start a thread for the wait, and the interpreter refuses to
        start threads during its shutdown.
        """
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            await asyncio.wait([asyncio.wrap_future(self._executor.ended)], timeout=timeout)
        await super().shutdown_default_executor(timeout)  # type: ignore[call-arg]


def _do(call: _Call) -> None:
    future = call.future
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = call.function(*call.args, **call.kwargs)
    except BaseException as error:  # noqa: BLE001 - the future passes it to the caller
        future.set_exception(error)
        del call, future  # Break the cycle: error, traceback, frame, future.
    else:
        future.set_result(value)
