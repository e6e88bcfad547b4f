"""Positions scans the queue, publishes the positions of waiting tasks, and limits its CPU time."""

import itertools
import threading
from collections import deque
from collections.abc import Iterator

import pytest

from django_tasks_local.hub import hub
from django_tasks_local.pools.positions import (
    INTERVAL_SECONDS,
    MAX_CPU_SHARE,
    TASKS_PER_SLICE,
    Positions,
)
from django_tasks_local.record import TaskRecord
from tests.support.factories import task_record
from tests.support.stage import FakeTicker


class Stage:
    """
    The Positions of a queue of `count` tasks that the hub knows, with a fake clock and ticker.
    """

    def __init__(self, count: int) -> None:
        self.now = 100.0
        self.step = 0.0  # seconds from one reading of the clock to the next
        self.all = [task_record() for _ in range(count)]
        self.queue = deque(self.all)
        self.unfinished = {record.id for record in self.queue}
        self.ahead = 0
        self.ticker = FakeTicker()
        self.positions = Positions(
            self.queue,
            self.unfinished,
            count_ahead=lambda: self.ahead,
            clock=self.clock,
            ticker=self.ticker,
        )
        for place, record in enumerate(self.queue):
            record.enqueue(place)

    def clock(self) -> float:
        self.now += self.step
        return self.now

    def tick(self) -> float | None:
        """Call the due Positions as the ticker would; return the time of its next call, or None."""
        [(due_at, ticking)] = self.ticker.due
        self.ticker.due.clear()
        self.now = max(self.now, due_at)
        again_at = ticking.tick()
        if again_at is not None:
            self.ticker.add(ticking, again_at)
        return again_at

    def published(self) -> list[int | None]:
        """Return the position of each task in its latest event in the hub."""
        return [hub.snapshot(record.id).position for record in self.all]


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(getattr(request, "param", 4))
    yield stage
    for record in stage.all:
        hub.release(record)


def test_a_task_that_moves_up_is_published(stage: Stage) -> None:
    stage.queue.popleft()
    stage.positions.schedule()
    assert stage.published() == [0, 1, 2, 3], (
        "schedule() published in the thread that changes the queue"
    )
    assert stage.tick() is None
    assert stage.published() == [0, 0, 1, 2]


def test_one_scan_for_many_changes_and_none_without(stage: Stage) -> None:
    for _ in range(1000):
        stage.positions.schedule()
    assert len(stage.ticker.due) == 1
    assert stage.tick() is None
    assert stage.ticker.due == []
    first = stage.now
    stage.positions.schedule()
    [(due_at, _)] = stage.ticker.due
    assert due_at == first + INTERVAL_SECONDS


def test_a_cancelled_task_does_not_count(stage: Stage) -> None:
    stage.unfinished.remove(stage.all[1].id)
    stage.positions.schedule()
    stage.tick()
    assert stage.published() == [0, 1, 1, 2]


def test_tasks_that_wait_outside_of_the_queue_count(stage: Stage) -> None:
    stage.queue.popleft()
    stage.queue.popleft()
    stage.ahead = 1
    stage.positions.schedule()
    stage.tick()
    assert stage.published() == [0, 1, 1, 2]


def test_a_position_never_rises(stage: Stage) -> None:
    stage.queue.rotate(1)
    stage.positions.schedule()
    stage.tick()
    assert stage.published() == [0, 1, 2, 0]


def test_a_started_task_has_no_position(stage: Stage) -> None:
    """
    A started task gets no position, even if it is in the queue because a pool put it back before.
    """
    stage.queue.popleft()
    assert stage.all[1].start("worker")
    stage.positions.schedule()
    stage.tick()
    assert hub.snapshot(stage.all[1].id).kind == "started"
    assert hub.snapshot(stage.all[3].id).position == 2


def test_queue_changes_during_a_scan_that_raises(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    After a scan that raised, schedule() starts a new scan, even if the queue changed before.
    """

    def change_then_raise(record: TaskRecord, position: int) -> None:
        stage.positions.schedule()  # as another thread does
        raise OSError

    with monkeypatch.context() as broken:
        broken.setattr(TaskRecord, "move_up", change_then_raise)
        stage.queue.popleft()
        stage.positions.schedule()
        with pytest.raises(OSError):  # noqa: PT011 - any would do
            stage.tick()
    stage.positions.schedule()
    stage.tick()
    assert stage.published() == [0, 0, 1, 2]


@pytest.mark.parametrize("stage", [TASKS_PER_SLICE * 3 + 7], indirect=True)
def test_many_tasks_take_a_small_share_of_the_time(stage: Stage) -> None:
    """
    Positions scans in short slices, because the ticker's thread must also publish progress in time.
    """
    stage.step = 0.2  # the seconds that a slice takes
    began = stage.now
    stage.positions.schedule()
    for scans in itertools.count(1):
        stage.queue.popleft()
        stage.positions.schedule()
        if scans == 40:
            break
        assert stage.tick() is not None
    assert scans * stage.step <= (stage.now - began) * MAX_CPU_SHARE + 2 * stage.step
    stage.step = 0.0
    while stage.tick() is not None:
        pass
    assert stage.published()[40:] == list(range(TASKS_PER_SLICE * 3 + 7 - 40))


def test_a_change_during_a_scan_is_not_lost(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    move_up = TaskRecord.move_up

    def move_up_while_the_queue_changes(record: TaskRecord, position: int) -> None:
        if stage.queue:
            stage.queue.popleft()
        stage.positions.schedule()
        move_up(record, position)

    stage.queue.popleft()
    stage.positions.schedule()
    with monkeypatch.context() as patch:
        patch.setattr(TaskRecord, "move_up", move_up_while_the_queue_changes)
        assert stage.tick() == stage.now + INTERVAL_SECONDS
    assert stage.tick() is None
    assert list(stage.queue) == []


def test_a_scan_that_raises_is_followed_by_a_new_one(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.queue.popleft()
    stage.positions.schedule()
    with monkeypatch.context() as patch:
        patch.setattr(TaskRecord, "move_up", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.tick()
    stage.positions.schedule()
    stage.tick()
    assert stage.published()[1:] == [0, 1, 2]


def test_a_change_while_a_failed_scan_resets_its_flags(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that changes the queue between two resets of flags does not stop all later scans."""

    class Lock:
        """The lock of the positions, which the failed scan gets after another thread had it."""

        def __enter__(self) -> None:
            monkeypatch.setattr(stage.positions, "_lock", threading.RLock())
            stage.positions.schedule()

        def __exit__(self, *args: object) -> None:
            pass

    stage.queue.popleft()
    stage.positions.schedule()
    monkeypatch.setattr(stage.positions, "_lock", Lock())
    with monkeypatch.context() as patch:
        patch.setattr(TaskRecord, "move_up", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.tick()
    stage.positions.schedule()
    stage.tick()
    assert stage.published()[1:] == [0, 1, 2]
