"""Positions of waiting tasks: when the queue is looked at, what is told, what it may cost."""

import itertools
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from django_tasks_local import positions
from django_tasks_local.hub import hub
from django_tasks_local.positions import INTERVAL, SHARE, SLICE, Positions
from tests.support.factories import event
from tests.support.stage import FakeTicker


@dataclass
class Waiting:
    """A job as Positions sees it."""

    position: int
    result_id: str = field(default_factory=lambda: uuid.uuid4().hex)


class Stage:
    """A queue of `count` tasks, known to the hub, whose clock and sampler the test moves."""

    def __init__(self, count: int) -> None:
        self.now = 100.0
        self.step = 0.0  # seconds from one look at the clock to the next
        self.queue = deque(Waiting(place) for place in range(count))
        self.all = list(self.queue)
        self.unfinished = {job.result_id for job in self.queue}
        self.ticker = FakeTicker()
        self.positions = Positions(
            self.queue, self.unfinished, clock=self.clock, ticker=self.ticker
        )
        for job in self.queue:
            hub.publish(event(job.result_id, 1, "enqueued", position=job.position), hold=True)

    def clock(self) -> float:
        self.now += self.step
        return self.now

    def tick(self) -> float | None:
        """Let the sampler look, and say when it is to look again."""
        [(due_at, ticking)] = self.ticker.due
        self.ticker.due.clear()
        self.now = max(self.now, due_at)
        again_at = ticking.tick()
        if again_at is not None:
            self.ticker.add(ticking, again_at)
        return again_at

    def told(self) -> list[int | None]:
        return [hub.snapshot(job.result_id).position for job in self.all]


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(getattr(request, "param", 4))
    yield stage
    for job in stage.all:
        hub.release(job.result_id)


def test_what_moves_up_is_told(stage: Stage) -> None:
    stage.queue.popleft()
    stage.positions.look()
    assert stage.told() == [0, 1, 2, 3], "nothing is told in the thread that changes the queue"
    assert stage.tick() is None
    assert stage.told() == [0, 0, 1, 2]


def test_one_look_for_many_moves_and_none_without(stage: Stage) -> None:
    for _ in range(1000):
        stage.positions.look()
    assert len(stage.ticker.due) == 1
    assert stage.tick() is None
    assert stage.ticker.due == []
    first = stage.now
    stage.positions.look()
    [(due_at, _)] = stage.ticker.due
    assert due_at == first + INTERVAL


def test_a_cancelled_task_does_not_count(stage: Stage) -> None:
    stage.unfinished.remove(stage.all[1].result_id)
    stage.positions.look()
    stage.tick()
    assert stage.told() == [0, 1, 1, 2]


def test_a_position_never_rises(stage: Stage) -> None:
    stage.queue.rotate(1)
    stage.positions.look()
    stage.tick()
    assert stage.told() == [0, 1, 2, 0]


def test_a_task_that_has_begun_is_left_alone(stage: Stage) -> None:
    stage.queue.popleft()
    hub.publish(event(stage.all[1].result_id, 2, "started"))
    hub.release(stage.all[2].result_id)
    stage.positions.look()
    stage.tick()
    assert hub.snapshot(stage.all[1].result_id).kind == "started"
    assert hub.snapshot(stage.all[2].result_id) is None, "the hub has forgotten it"
    assert hub.snapshot(stage.all[3].result_id).position == 2


@pytest.mark.parametrize("stage", [SLICE * 3 + 7], indirect=True)
def test_many_tasks_take_a_small_share_of_the_time(stage: Stage) -> None:
    """Also when the queue moves all the time, and in slices, for others use the sampler too."""
    stage.step = 0.2  # a slice takes so long
    began = stage.now
    stage.positions.look()
    for looks in itertools.count(1):
        stage.queue.popleft()
        stage.positions.look()
        if looks == 40:
            break
        assert stage.tick() is not None
    assert looks * stage.step <= (stage.now - began) * SHARE + 2 * stage.step
    stage.step = 0.0
    while stage.tick() is not None:
        pass
    assert stage.told()[40:] == list(range(SLICE * 3 + 7 - 40))


def test_a_move_in_the_midst_of_a_look_is_not_lost(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    amend = hub.amend

    def move(*args: Any) -> bool:
        stage.queue.popleft()
        stage.positions.look()
        return amend(*args)

    stage.queue.popleft()
    stage.positions.look()
    with monkeypatch.context() as patch:
        patch.setattr(positions.hub, "amend", move)
        assert stage.tick() == stage.now + INTERVAL
    assert stage.tick() is None
    assert list(stage.queue) == []


def test_it_begins_anew_after_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(3)
    stage.queue.popleft()
    stage.positions.look()
    with monkeypatch.context() as patch:
        patch.setattr(stage.positions, "_tell", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.tick()
    stage.positions.look()
    stage.tick()
    assert stage.told()[1:] == [0, 1]
