"""
One thread that calls objects at the times they ask for.

    any thread                              the ticker's thread
    ----------                              -------------------
    ticker.add(ticking, due_at) ----------> ticking.tick() at `due_at`
                                <---------- and again at the time that tick() returns
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import threading
import time
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Protocol

from .forking import reset_in_child

logger = logging.getLogger(__name__)

MAX_SLEEP = 3600.0  # seconds; Windows cannot wait for more than 49 days at once

type _Entry = tuple[float, int, Ticking]


class Ticking(Protocol):
    """An object that a Ticker calls."""

    def tick(self) -> float | None:
        """
        Do the work that is due; return when to be called again, in time.monotonic(), or None.

        Called in the ticker's thread. It must not block, because all objects share this thread.
        """


class Ticker:
    """
    Calls tick() of the objects that were added, each when it is due.

    The thread is a daemon named `django-tasks-progress`; the first add() starts it. add() waits
    for no lock, because a finalizer (`__del__`) may call it at any point, also while its own
    thread is inside add(), or while that thread holds a lock that a thread in add() waits for.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything that was added. Called in a child of fork(), which has no thread."""
        # Entries that the thread has not seen yet. deque.append() is atomic.
        self._added: deque[_Entry] = deque()
        self._order = itertools.count()  # Entries due at the same time run in order of add().
        # SimpleQueue.put() may be called again during a call of it in the same thread. An item
        # that is put before the thread sleeps is not lost: its get() then returns at once.
        self._wakes: SimpleQueue[None] = SimpleQueue()
        # When the thread wakes by itself, inf while it is awake. Written by the thread only.
        self._sleeps_until = math.inf
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()  # Never waited for, see _start().

    def add(self, ticking: Ticking, due_at: float) -> None:
        """Have tick() called at `due_at`, in time.monotonic(). Called from any thread."""
        self._added.append((due_at, next(self._order), ticking))
        if self._thread is None:
            self._start()
        # An awake thread may already have passed the point where it takes new entries; the item
        # makes it take them again instead of sleeping. A sleeping thread wakes only if it must.
        elif due_at < self._sleeps_until:
            self._wakes.put(None)

    def _start(self) -> None:
        # A thread that does not get the lock need not start anything: the holder does, and
        # `_thread` is set before the new thread takes the entries, this caller's among them.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is not None:
                return
            self._thread = threading.Thread(
                target=self._run, name="django-tasks-progress", daemon=True
            )
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
            # In this order: an entry that is added after the loop below finds `inf` and wakes us.
            self._sleeps_until = math.inf
            while self._added:
                heapq.heappush(due, self._added.popleft())
            if due and due[0][0] <= time.monotonic():
                self._tick(due)
            else:
                self._sleep(due[0][0] if due else math.inf)

    def _tick(self, due: list[_Entry]) -> None:
        ticking = heapq.heappop(due)[2]
        try:
            again_at = ticking.tick()
        except Exception:
            # A bug in one class must not keep the others from being called.
            logger.exception("%s.tick() failed.", type(ticking).__name__)
            return
        if again_at is not None:
            heapq.heappush(due, (again_at, next(self._order), ticking))

    def _sleep(self, until: float) -> None:
        self._sleeps_until = until
        left = until - time.monotonic()
        with suppress(Empty):
            self._wakes.get(timeout=min(max(left, 0.0), MAX_SLEEP))


ticker = Ticker()
reset_in_child(ticker.reset)
