"""The loop of the dispatcher: commands and wake-ups of other threads."""

import threading
from collections.abc import Callable, Iterator

import pytest

from django_tasks_local.processes.loop import Loop
from tests.support.stale import SeeminglyEmptyDeque
from tests.support.waiting import LIMIT


@pytest.fixture
def turns() -> threading.Semaphore:
    """A semaphore that each turn of the loop releases."""
    return threading.Semaphore(0)


@pytest.fixture
def loop(turns: threading.Semaphore) -> Iterator[Loop]:
    """A loop that runs, and ends with the test."""
    done = threading.Event()
    made = Loop(
        "test-loop", on_turn=turns.release, is_done=done.is_set, on_end=bool, on_suspension=bool
    )
    # Without a GIL the thread may read an old length of the commands.
    made._commands = SeeminglyEmptyDeque()
    made.start()
    yield made
    done.set()
    made.wake()
    made.join()


def test_each_command_is_called_although_none_seems_to_wait(loop: Loop) -> None:
    """The thread that was woken takes every command that was posted before."""
    called = threading.Semaphore(0)
    command: Callable[[], None] = called.release
    for _ in range(3):
        loop.post(command)
    for _ in range(3):
        assert called.acquire(timeout=LIMIT)


def test_a_wake_up_takes_a_turn(loop: Loop, turns: threading.Semaphore) -> None:
    """The thread calls `on_turn` after wake(), whether or not a command waits."""
    loop.wake()
    assert turns.acquire(timeout=LIMIT)


def test_a_command_that_raises_stops_no_later_one(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """An IndexError of a command does not look like the end of the commands."""
    called = threading.Event()

    def fail() -> None:
        raise IndexError

    def post_both() -> None:
        loop.post(fail)
        loop.post(called.set)

    loop.post(post_both)
    assert called.wait(LIMIT)
    assert "An error in the dispatcher" in caplog.text


@pytest.mark.parametrize(("sleep", "reported"), [(3600.0, [3600.0]), (2.0, [])])
def test_the_time_of_a_suspension_is_reported(sleep: float, reported: list[float]) -> None:
    """
    The loop reports that its process was suspended, but not that a busy machine woke it late.

    A clock that jumps during the second select() stands for the suspension.
    """
    readings = iter([0.0, 0.0, 0.0, 0.0, sleep, sleep])
    turns, suspensions = [], []

    def turn() -> float:
        turns.append("turn")
        return 0.0

    loop = Loop(
        "test-loop",
        on_turn=turn,
        is_done=lambda: len(turns) == 2,
        on_end=bool,
        on_suspension=suspensions.append,
        clock=readings.__next__,
    )
    loop.wake()
    loop.start()
    loop.join()
    assert suspensions == reported
    assert not list(readings)
