"""Tickets: either the pool or the worker reads each number from their shared pipe, never both."""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from django_tasks_local.processes.tickets import MAX_ISSUED, TicketReader, Tickets
from tests.support.waiting import LIMIT

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the pool sends no tasks ahead on Windows"
)


@pytest.fixture
def tickets() -> Iterator[Tickets]:
    """Return Tickets with an open pipe, from which the pool and a worker read."""
    made = new_tickets()
    yield made
    made.close()


def new_tickets() -> Tickets:
    return Tickets(multiprocessing.get_context("spawn"))


def test_numbers_rise(tickets: Tickets) -> None:
    assert list(tickets.issue(2)) == [1, 2]
    assert list(tickets.issue(1)) == [3]
    assert [tickets.take_back() for _ in range(4)] == [1, 2, 3, None]


def test_many_numbers_at_once(tickets: Tickets) -> None:
    count = 3 * MAX_ISSUED + 1
    tickets.issue(count)
    assert [tickets.take_back() for _ in range(count)] == list(range(1, count + 1))
    assert tickets.take_back() is None


def test_the_worker_begins_what_was_not_taken_back(tickets: Tickets) -> None:
    reader = TicketReader(tickets.pipe.fileno())
    tickets.issue(4)
    assert reader.take(1)
    assert tickets.take_back() == 2
    assert not reader.take(2), (
        "the worker must skip task 2, because it reads number 3 from the pipe"
    )
    assert tickets.take_back() == 4
    assert reader.take(3)
    assert not reader.take(4)
    tickets.issue(1)
    assert reader.take(5)


def test_nothing_is_left_for_a_worker_that_comes_late(tickets: Tickets) -> None:
    reader = TicketReader(tickets.pipe.fileno())
    tickets.issue(2)
    assert [tickets.take_back(), tickets.take_back()] == [1, 2]
    assert not reader.take(1)
    assert not reader.take(2)


def test_no_ticket_can_be_taken_after_the_pipe_was_closed(tickets: Tickets) -> None:
    copy = os.dup(tickets.pipe.fileno())
    tickets.close()
    assert not TicketReader(copy).take(1)
    os.close(copy)


@given(st.lists(st.sampled_from(["issue", "take", "take back"]), max_size=60))
def test_each_task_has_one_owner_in_any_order(steps: list[str]) -> None:
    """
    Either the worker begins a task or the pool takes it back, whatever the order of their steps.

    The worker tries each number once, in rising order, at any time after the pool has issued it.
    """
    tickets = new_tickets()
    reader = TicketReader(tickets.pipe.fileno())
    begun, back, tried, issued = [], [], 0, 0
    for step in [*steps, *["take"] * len(steps)]:
        if step == "issue":
            issued = tickets.issue(1)[-1]
        elif step == "take back":
            number = tickets.take_back()
            back += [] if number is None else [number]
        elif tried < issued:
            tried += 1
            begun += [tried] if reader.take(tried) else []
    tickets.close()
    assert sorted(begun + back) == list(range(1, issued + 1))
    assert begun == sorted(begun)
    assert back == sorted(back)


def test_both_sides_read_at_the_same_time(tickets: Tickets) -> None:
    reader = TicketReader(tickets.pipe.fileno())
    begun: list[int] = []
    ready = threading.Semaphore(0)
    room = threading.Semaphore(1_000)  # A pipe holds 8,192 numbers; a worker has at most 64 ahead.

    def work() -> None:
        for number in range(1, 20_001):
            ready.acquire(timeout=LIMIT)
            if reader.take(number):
                begun.append(number)
            room.release()

    worker = threading.Thread(target=work)
    worker.start()
    back: list[int] = []
    for _ in range(2_000):
        for _ in range(10):
            assert room.acquire(timeout=LIMIT)
        for _ in tickets.issue(10):
            ready.release()
        while len(back) % 5 != 4 and (number := tickets.take_back()) is not None:
            back.append(number)
        back += [n for n in [tickets.take_back()] if n is not None]
    worker.join(LIMIT)
    assert sorted(begun + back) == list(range(1, 20_001))


CHILD = """
import sys
sys.path[:0] = sys.argv[2:]
from django_tasks_local.processes.tickets import TicketReader
reader = TicketReader(int(sys.argv[1]))
for line in sys.stdin:
    print(int(reader.take(int(line))), flush=True)
"""


def test_both_sides_are_processes(tickets: Tickets) -> None:
    descriptor = tickets.pipe.fileno()
    command = [sys.executable, "-c", CHILD, str(descriptor), *sys.path]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[descriptor]
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        numbers = tickets.issue(300)
        child.stdin.write("".join(f"{number}\n" for number in numbers))
        child.stdin.flush()
        back = []
        while (number := tickets.take_back()) is not None:
            back.append(number)
        child.stdin.close()
        answers = [line == "1\n" for line in child.stdout]
        assert child.wait(LIMIT) == 0
    begun = [number for number, taken in zip(numbers, answers, strict=True) if taken]
    assert sorted(begun + back) == list(numbers)
