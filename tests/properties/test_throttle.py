"""Hypothesis compares a throttled Reporter with a model under any sequence of reports and loops."""

import itertools
import math
from typing import Any

import pytest
from django.tasks import TaskResultStatus
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from django_tasks_local.exceptions import TaskCancelled
from django_tasks_local.progress.loops import LoopProgress
from tests.support.stage import Stage
from tests.support.state_machines import SHRINK_TIMEOUT, run_machine

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


LEVEL = ("message", "current", "total", "unit")


def model_of(
    current: int | None, total: int | None, message: str | None, unit: str = ""
) -> dict[str, Any]:
    return {
        "current": current,
        "total": total,
        "message": message,
        "first message": message,
        "unit": unit,
    }


class ThrottleMachine(RuleBasedStateMachine):
    """
    The reporter publishes at most one sample per interval; each sample has the newest values.

    It also publishes the last reported values, at the latest after two intervals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(interval=1.0)
        self.reporter = self.stage.reporter
        self.data: dict[str, Any] = {}
        self.reported = False
        # The model of each loop is a dict; that of an open loop is in `loops` with its real one.
        self.outermost = self.innermost = model_of(None, 100, "")
        self.loops: list[tuple[LoopProgress, dict[str, Any]]] = []
        self.floor: tuple[int, Any, float] | None = None
        self.cancelled = self.delivered = False
        self.closed = False
        self.times: list[float] = []

    @rule(
        changes=st.fixed_dictionaries(
            {},
            optional={
                "current": st.none() | st.integers(0, 9),
                "total": st.none() | st.integers(0, 9),
                "message": st.sampled_from(["", "a", "b"]),
                "unit": st.sampled_from(["", "pages"]),
                "data": st.sampled_from([{}, {"key": 1}]),
            },
        )
    )
    def report(self, changes: dict[str, Any]) -> None:
        if self.raises_cancellation(lambda: self.reporter.report(**changes)):
            return
        if not self.closed:
            self.data = changes.pop("data", self.data)
            self.innermost |= changes
            self.reported = True
        self.check_published()

    @precondition(lambda self: len(self.loops) < 3)
    @rule(
        total=st.none() | st.integers(0, 9),
        message=st.sampled_from([None, "", "tracking"]),
        unit=st.sampled_from(["", "rows"]),
    )
    def start_tracking(self, total: int | None, message: str | None, unit: str) -> None:
        loop = LoopProgress(0, total, message, unit)
        if self.raises_cancellation(lambda: self.reporter.start_tracking(loop)):
            return
        if not self.closed:
            if message is None and not self.loops:
                message = self.outermost["message"]
            self.innermost = model_of(0, total, message, unit)
            if not self.loops:
                self.outermost = self.innermost
            self.loops.append((loop, self.innermost))
            self.reported = True
        self.check_published()

    @precondition(lambda self: self.loops and not self.closed)
    @rule(data=st.data(), count=st.integers(0, 9))
    def step(self, data: st.DataObject, count: int) -> None:
        loop, model = data.draw(st.sampled_from(self.loops))
        loop.current = model["current"] = count

    @precondition(lambda self: self.loops)
    @rule(data=st.data())
    def stop_tracking(self, data: st.DataObject) -> None:
        ended = data.draw(st.sampled_from(self.loops))
        self.reporter.stop_tracking(ended[0])
        self.loops.remove(ended)
        if self.innermost is ended[1]:
            self.go_out_to(self.loops[-1][1] if self.loops else self.outermost)

    def go_out_to(self, outer: dict[str, Any]) -> None:
        """Report values to the outer loop again; it keeps a message that the task reported."""
        if self.innermost["message"] is not self.innermost["first message"]:
            outer["message"] = self.innermost["message"]
        self.innermost = outer

    @property
    def values(self) -> dict[str, Any]:
        """Return the values of the outermost loop, the newest message, and all levels."""
        levels = [
            {**{name: model[name] for name in LEVEL}, "message": model["message"] or ""}
            for _, model in self.loops
        ]
        shown = self.loops[0][1] if self.loops else self.outermost
        messages = [self.outermost["message"], *(model["message"] for _, model in self.loops)]
        return {
            "current": shown["current"],
            "total": shown["total"],
            "unit": shown["unit"],
            "message": [message for message in messages if message is not None][-1],
            "levels": levels if len(levels) > 1 else [],
            "data": self.data,
        }

    @rule()
    def cancel(self) -> None:
        self.stage.cancellation.request()
        self.cancelled = not self.delivered

    @rule(seconds=st.sampled_from([0.25, 0.9375, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.stage.tick(self.stage.now + seconds)
        self.check_published()
        # The reporter adds itself to the ticker to publish a throttled report, so if the ticker has
        # no entry, the newest values must be published.
        if self.reported and not self.closed and not self.stage.ticker.due:
            self.assert_newest_published()

    @rule()
    def wait_for_last_sample(self) -> None:
        for _ in range(2):
            self.wait(1.0)
        if self.reported and not self.closed:
            self.assert_newest_published()

    @precondition(lambda self: len(self.times) > 5)  # close() ends most of the checks.
    @rule()
    def close(self) -> None:
        number, progress = self.reporter.close()
        if self.loops:
            self.loops.clear()
            self.go_out_to(self.outermost)
        assert number == len(self.stage.published)
        assert (progress is not None) == self.reported
        if progress is not None:
            assert self.values_of(progress) == self.values
        self.closed = True

    def raises_cancellation(self, step: Any) -> bool:
        """
        Run the step; return whether it raised TaskCancelled, as exactly one step must after
        cancel().
        """
        if not self.cancelled:
            step()
            return False
        with pytest.raises(TaskCancelled):
            step()
        self.cancelled, self.delivered = False, True
        return True

    def check_published(self) -> None:
        """
        Check that the last step published either nothing or one sample with the newest values.
        """
        new = self.stage.published[len(self.times) :]
        assert len(new) <= (0 if self.closed else 1)
        for number, progress in new:
            self.times.append(self.stage.now)
            assert number == len(self.times)
            assert self.values_of(progress) == self.values
            self.check_percent(progress)
            assert progress.rate is None or progress.rate > 0
            assert progress.eta is None or 0 <= progress.eta < math.inf

    def check_percent(self, progress: Any) -> None:
        """While a loop is open, the percentage falls only with another loop or total."""
        if progress.percent is None:
            return
        assert 0 <= progress.percent <= 100
        if self.loops:
            loop, total = id(self.loops[0][1]), progress.total
            if self.floor is not None and self.floor[:2] == (loop, total):
                assert progress.percent >= self.floor[2]
            self.floor = loop, total, progress.percent

    def assert_newest_published(self) -> None:
        assert self.values_of(self.stage.last) == self.values

    @staticmethod
    def values_of(progress: Any) -> dict[str, Any]:
        names = ("current", "total", "unit", "message", "levels", "data")
        return {name: getattr(progress, name) for name in names}

    @invariant()
    def intervals_are_kept(self) -> None:
        assert all(b - a >= 1.0 for a, b in itertools.pairwise(self.times))
        assert len(self.stage.ticker.due) <= 1

    def teardown(self) -> None:
        self.reporter.close()
        self.stage.tick(self.stage.now + 10.0)
        assert self.stage.ticker.due == [], "a closed reporter is still in the ticker"


@SHRINK_TIMEOUT
def test_throttle_machine() -> None:
    run_machine(ThrottleMachine)
