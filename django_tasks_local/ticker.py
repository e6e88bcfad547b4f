"""
Ticker is a thread that calls the tick() method of objects at the times that they request.

    any thread                              the ticker's thread
    ----------                              -------------------
    ticker.add(ticking, due_at) ----------> ticking.tick() at `due_at`
                                <---------- and again at the time that tick() returns
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from .clocks import Clocks
from .forking import reset_in_child
from .logs import get_logger
from .new_thread import new_thread

logger = get_logger(__name__)

MAX_SLEEP = 3600.0  # Seconds per wait; one wait on Windows cannot be longer than 49 days.

type _Entry = tuple[float, int, Ticking]  # due_at, a number in the order of add(), the object


class Ticking(Protocol):
    """Declares the method that a Ticker calls."""

    def tick(self) -> float | None:
        """
        Do the work that is due; return the time.monotonic() of the next call, or None for no call.

        The ticker's thread calls this. It must not block, because all objects share the thread.
        """


class Ticker:
    """
    Calls tick() of the objects that were added, each at the time that it requested.

    The thread is a daemon named `django-tasks-progress`; the first add() starts it. add() waits
    for no lock, because a finalizer (`__del__`) may call it at any point, even while its own thread
    is inside add(), or holds a lock for which another thread in add() would wait.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """
        Drop all entries and the thread object.

        A child of fork() calls this, because the ticker's thread does not run in it.
        """
        # Entries that the thread has not taken yet. No lock is needed, as deque.append() is atomic.
        self._added: deque[tuple[float, Ticking]] = deque()
        # Entries due at the same time run in order of add(). Only the ticker's thread counts,
        # because two threads could get the same number from itertools.count() without a GIL.
        self._order = itertools.count()
        # An item wakes the thread. A finalizer may call SimpleQueue.put() while its thread is
        # inside put(). If an item is put before the thread sleeps, its get() returns at once.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        # The time at which the thread wakes without an item; inf if nothing is due, and while the
        # thread prepares to sleep. Only the ticker's thread changes it.
        self._sleeps_until = math.inf
        self._thread: threading.Thread | None = None
        # The thread in _start() holds this lock; no thread waits for it.
        self._starting = threading.Lock()

    def add(self, ticking: Ticking, due_at: float) -> None:
        """Schedule tick() for `due_at`, a time.monotonic(). May be called from any thread."""
        self._added.append((due_at, ticking))
        if self._thread is None:
            self._start()
        # Race: _sleep() may have emptied `_added` before append() added the entry. It had set
        # `_sleeps_until` to inf before that, so this branch puts an item, which ends the sleep at
        # once, and the thread takes the entry. A thread that sleeps until a known time gets an item
        # only if the entry is due before that time.
        elif due_at < self._sleeps_until:
            self._wakes.put(None)

    def _start(self) -> None:
        # A caller that does not get the lock need not start the thread, because the thread that
        # holds the lock does. The new thread takes all entries, including that of this caller.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is not None:
                return
            self._thread = new_thread("django-tasks-progress", self._run)
            self._thread.start()
        except RuntimeError:
            # The system has no more threads for this process. The next add() tries again.
            self._thread = None
            logger.exception("The thread that samples the progress of tasks did not start.")
        finally:
            self._starting.release()

    def _run(self) -> None:
        due: list[_Entry] = []
        while True:
            while self._added:
                self._take(due)
            if due and due[0][0] <= Clocks.monotonic():
                self._tick(due)
            else:
                self._sleep(due)

    def _take(self, due: list[_Entry]) -> None:
        due_at, ticking = self._added.popleft()
        heapq.heappush(due, (due_at, next(self._order), ticking))

    def _tick(self, due: list[_Entry]) -> None:
        ticking = heapq.heappop(due)[2]
        try:
            again_at = ticking.tick()
        except BaseException:
            # Log any exception and continue, because other objects must still be called.
            logger.exception("%s.tick() failed.", type(ticking).__name__)
            return
        if again_at is not None:
            heapq.heappush(due, (again_at, next(self._order), ticking))

    def _sleep(self, due: list[_Entry]) -> None:
        self._sleeps_until = math.inf
        # popleft() and append() lock the deque, also without a GIL: a thread whose append() comes
        # after the last popleft() reads the new `_sleeps_until`. len() would order nothing.
        with suppress(IndexError):
            while True:
                self._take(due)
        self._sleeps_until = until = due[0][0] if due else math.inf
        left = until - Clocks.monotonic()
        with suppress(Empty):
            self._wakes.get(timeout=min(max(left, 0.0), MAX_SLEEP))


ticker = Ticker()
reset_in_child(ticker.reset)
