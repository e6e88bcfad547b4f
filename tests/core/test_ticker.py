"""Ticker: the order and time of its calls, errors in them, and calls of add() that interrupt it."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import pytest

from django_tasks_local import ticker as module
from django_tasks_local.ticker import Ticker
from tests.support.stale import SeeminglyEmptyDeque
from tests.support.waiting import LIMIT


class Noted:
    """An entry of a ticker that records each tick() and returns the next of `times` from it."""

    def __init__(self, *times: float | None, action: Callable[[], object] = bool) -> None:
        self.ticks: SimpleQueue[float] = SimpleQueue()
        self.times = list(times)
        self.action = action

    def tick(self) -> float | None:
        self.action()
        again_at = self.times.pop(0) if self.times else None
        self.ticks.put(time.monotonic())
        return again_at

    def wait(self) -> float:
        """Wait for the next tick() and return its time."""
        return self.ticks.get(timeout=LIMIT)


@pytest.fixture
def ticker() -> Ticker:
    return Ticker()


def test_nothing_starts_before_the_first_add(ticker: Ticker) -> None:
    assert ticker._thread is None
    noted = Noted()
    ticker.add(noted, 0.0)
    noted.wait()
    thread = ticker._thread
    assert thread is not None
    assert (thread.name, thread.daemon) == ("django-tasks-progress", True)
    ticker.add(noted, 0.0)
    noted.wait()
    assert ticker._thread is thread


def test_it_calls_in_the_order_of_times_and_of_add(ticker: Ticker) -> None:
    go = threading.Event()
    ticker.add(Noted(action=lambda: go.wait(LIMIT)), 0.0)  # blocks during the next calls of add()
    called: list[int] = []
    last = Noted(action=lambda: called.append(4))
    for number, due_at in enumerate((3.0, 1.0, 2.0, 1.0)):
        ticker.add(Noted(action=lambda number=number: called.append(number)), due_at)  # type: ignore[misc]
    ticker.add(last, 4.0)
    go.set()
    last.wait()
    assert called == [1, 3, 2, 0, 4]


def test_it_calls_again_when_tick_says(ticker: Ticker) -> None:
    began = time.monotonic()
    noted = Noted(began + 0.01, began + 0.03, None)
    ticker.add(noted, began)
    ticks = [noted.wait() for _ in range(3)]
    assert ticks[1] >= began + 0.01
    assert ticks[2] >= began + 0.03


def test_an_earlier_time_wakes_it(ticker: Ticker) -> None:
    sleeps = note_sleeps(ticker)
    ticker.add(Noted(), time.monotonic() + 2 * LIMIT)
    sleeps.get(timeout=LIMIT)
    early = Noted()
    ticker.add(early, 0.0)
    early.wait()


def test_a_later_time_does_not_wake_it(ticker: Ticker) -> None:
    sleeps = note_sleeps(ticker)
    until = time.monotonic() + 2 * LIMIT
    ticker.add(Noted(), until)
    assert sleeps.get(timeout=LIMIT) == until
    ticker.add(Noted(), until + 1)
    assert ticker._wakes.empty()
    early = Noted()
    ticker.add(early, 0.0)
    early.wait()
    assert sleeps.get(timeout=LIMIT) == until, "the ticker has lost its first entry"


def note_sleeps(ticker: Ticker) -> SimpleQueue[float]:
    """
    Return a queue that receives the end of each sleep of the ticker's thread, unless it is endless.
    """
    sleeps: SimpleQueue[float] = SimpleQueue()

    class Wakes(SimpleQueue[None]):
        def get(self, block: bool = True, timeout: float | None = None) -> None:
            if ticker._sleeps_until < math.inf:
                sleeps.put(ticker._sleeps_until)
            return super().get(block, timeout)

    ticker._wakes = Wakes()
    return sleeps


def test_a_tick_that_raises_stops_no_other(
    ticker: Ticker, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    sound = Noted()
    ticker.add(Noted(action=fail), 0.0)
    ticker.add(sound, 1.0)
    sound.wait()
    assert "Noted.tick() failed." in caplog.text
    assert "a bug" in caplog.text


def test_a_thread_that_cannot_be_started(
    ticker: Ticker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    first, second = Noted(), Noted()
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        ticker.add(first, 0.0)
    assert "did not start" in caplog.text
    ticker.add(second, 0.0)
    first.wait()
    second.wait()


def test_a_sleep_is_limited(ticker: Ticker, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The ticker sleeps at most MAX_SLEEP seconds at a time, because Windows rejects longer timeouts.
    """
    monkeypatch.setattr(module, "MAX_SLEEP", 0.001)
    sleeps = note_sleeps(ticker)
    until = time.monotonic() + 10**9
    ticker.add(Noted(), until)
    assert [sleeps.get(timeout=LIMIT) for _ in range(3)] == [until] * 3


# A finalizer may call add() at any point of the thread that it interrupts. The next tests call
# add() at chosen points instead.


def test_add_while_its_own_thread_starts_the_ticker(
    ticker: Ticker, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start
    inner, outer = Noted(), Noted()

    def interrupted_start(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 1:
            ticker.add(inner, 0.0)
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted_start)
        ticker.add(outer, 0.0)
    inner.wait()
    outer.wait()
    assert len(started) == 1


def test_an_entry_is_taken_although_its_deque_seems_empty(ticker: Ticker) -> None:
    """The thread takes all entries before it sleeps, without a GIL too."""
    ticker._added = SeeminglyEmptyDeque()
    noted = Noted()
    ticker.add(noted, 0.0)
    noted.wait()


def test_entries_that_several_threads_add_for_the_same_time(ticker: Ticker) -> None:
    """Objects that are due at the same time are never compared, since they have no order."""
    due_at = time.monotonic()
    noted = [Noted() for _ in range(2000)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda each: ticker.add(each, due_at), noted))
    for each in noted:
        each.wait()


@pytest.mark.parametrize("point", ["after it took the entries", "before it sleeps"])
def test_add_in_the_tickers_own_thread(
    ticker: Ticker, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """
    The ticker's thread wakes for an entry that it adds itself after its last check of the entries.

    A finalizer may call add() in this thread between the check and the sleep.
    """
    noted = Noted()
    interrupted = threading.Event()

    def interrupt() -> None:
        if not interrupted.is_set():
            interrupted.set()
            ticker.add(noted, 0.0)

    class Wakes(SimpleQueue[None]):
        def get(self, block: bool = True, timeout: float | None = None) -> None:
            interrupt()
            return super().get(block, timeout)

    def monotonic() -> float:
        if ticker._sleeps_until < math.inf:  # _sleep() calls this, after it took all entries.
            interrupt()
        return real()

    real = time.monotonic
    if point == "before it sleeps":
        ticker._wakes = Wakes()
    else:
        clocks = type("Clocks", (), {"monotonic": staticmethod(monotonic)})
        monkeypatch.setattr(module, "Clocks", clocks)
    ticker.add(Noted(), real() + 2 * LIMIT)
    noted.wait()
    assert interrupted.is_set()


def test_reset_forgets_everything(ticker: Ticker) -> None:
    """reset() removes all entries, because a child of fork() has no ticker thread to call them."""
    forgotten, noted = Noted(), Noted()
    ticker.add(forgotten, time.monotonic() + 2 * LIMIT)
    thread = ticker._thread
    ticker.reset()
    assert ticker._thread is None
    ticker.add(noted, 0.0)
    noted.wait()
    assert ticker._thread is not thread
    assert forgotten.ticks.empty()
