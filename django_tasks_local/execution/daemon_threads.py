"""Daemon threads for the sync code of coroutines, which the interpreter does not join at exit."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor


# The class that asyncio.new_event_loop() uses by default, without an event loop policy.
if sys.platform == "win32":
    _EventLoop = asyncio.ProactorEventLoop
else:
    _EventLoop = asyncio.SelectorEventLoop


class _Call(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DaemonExecutor(ThreadPoolExecutor):
    """
    A ThreadPoolExecutor with daemon threads, which do not delay the end of the process.

    The interpreter joins every thread of a ThreadPoolExecutor before it calls atexit, however long
    that takes. This is a subclass because asyncio accepts no other class.

    Source: the documentation of concurrent.futures, "ThreadPoolExecutor", note on shutdown.
    """

    def __init__(self, max_workers: int | None = None) -> None:
        super().__init__(max_workers)
        self._limit = max_workers or min(32, (os.cpu_count() or 1) + 4)
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()  # None ends one thread
        self._idle: SimpleQueue[None] = SimpleQueue()  # one item for each thread without a call
        # Guards the attributes below, and that no call is queued behind the None of shutdown().
        # Reentrant, because a finalizer of the task may call submit() in a thread that is in it.
        self._guard = threading.RLock()
        self._workers: list[threading.Thread] = []
        self._alive = 0  # of `_workers`
        self._closed = False
        self.ended: Future[None] = Future()  # done when the last thread has ended after shutdown()

    @property
    def has_threads(self) -> bool:
        """Whether any function was ever called."""
        return bool(self._workers)

    def submit[**P, T](self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """
        Have a function called in one of the threads. Called in any thread.

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
        """Make the calls that are queued, and no others; see concurrent.futures.Executor."""
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
        worker = threading.Thread(target=self._work, name="django-tasks-sync", daemon=True)
        # Before start(), in which a finalizer may call submit(): it counts this thread.
        self._workers.append(worker)
        self._alive += 1
        try:
            worker.start()
        except RuntimeError:
            self._workers.remove(worker)
            self._alive -= 1
            if not self._workers:
                self._calls.get_nowait()  # No thread would ever take it.
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
            del call  # While this thread waits, nothing should keep the call's objects.
        with self._guard:
            self._calls.put(None)  # It ends the next thread.
            self._alive -= 1
            if not self._alive:
                self.ended.set_result(None)

    def _next(self) -> _Call | None:
        try:
            return self._calls.get_nowait()
        except Empty:
            self._idle.put(None)
            return self._calls.get()


class DaemonThreadsEventLoop(_EventLoop):
    """An event loop whose default executor, used by asyncio.to_thread(), is a DaemonExecutor."""

    _executor: DaemonExecutor | None = None
    _has_default = False

    def set_default_executor(self, executor: Any) -> None:
        """See asyncio.loop.set_default_executor(): the task wants an executor of its own."""
        self._has_default = True
        super().set_default_executor(executor)

    def run_in_executor[*Ts, T](
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """See asyncio.loop.run_in_executor()."""
        if executor is None and not self._has_default:
            executor = self._executor = self._executor or DaemonExecutor()
        return super().run_in_executor(executor, func, *args)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """
        See asyncio.loop.shutdown_default_executor().

        asyncio starts a thread for this, which the interpreter refuses during its shutdown.
        """
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            await asyncio.wait([asyncio.wrap_future(self._executor.ended)], timeout=timeout)
        await super().shutdown_default_executor(timeout)


def _do(call: _Call) -> None:
    future = call.future
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = call.function(*call.args, **call.kwargs)
    except BaseException as error:  # noqa: BLE001 - the caller gets it from the future
        future.set_exception(error)
        del call, future  # They hold the error, and its traceback holds this frame's variables.
    else:
        future.set_result(value)
