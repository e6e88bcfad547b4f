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
from django_tasks_local.progress.reporter import LoopProgress
from django_tasks_local.progress.values import UNSET
from tests.support.stage import Stage
from tests.support.state_machines import SHRINK_TIMEOUT, run_machine

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


class ThrottleMachine(RuleBasedStateMachine):
    """
    The reporter publishes at most one sample per interval; each sample has the newest values.

    It also publishes the last reported values, at the latest after two intervals.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(interval=1.0)
        self.reporter = self.stage.reporter
        self.values: dict[str, Any] = {"current": None, "total": 100, "message": "", "data": {}}
        self.reported = False
        # The open loops: each with its first message and the values to publish while it is the
        # innermost.
        self.loops: list[tuple[LoopProgress, str, dict[str, Any]]] = []
        self.outermost = self.values
        self.cancelled = self.delivered = False
        self.closed = False
        self.times: list[float] = []

    @rule(
        changes=st.fixed_dictionaries(
            {},
            optional={
                "current": st.none() | st.integers(0, 9),
                "total": st.none() | st.integers(1, 9),
                "message": st.sampled_from(["", "a", "b"]),
                "data": st.sampled_from([{}, {"key": 1}]),
            },
        )
    )
    def report(self, changes: dict[str, Any]) -> None:
        if self.raises_cancellation(lambda: self.reporter.report(**changes)):
            return
        if not self.closed:
            self.values |= changes
            self.reported = True
        self.check_published()

    @precondition(lambda self: len(self.loops) < 3)
    @rule(total=st.none() | st.integers(1, 9), message=st.sampled_from([UNSET, "tracking"]))
    def start_tracking(self, total: int | None, message: Any) -> None:
        loop = LoopProgress(0, total)
        if self.raises_cancellation(lambda: self.reporter.start_tracking(loop, message)):
            return
        if not self.closed:
            if message is UNSET:
                message = self.values["message"]
            self.values = self.values | {"current": 0, "total": total, "message": message}
            if not self.loops:
                self.outermost = self.values
            self.loops.append((loop, message, self.values))
            self.reported = True
        self.check_published()

    @precondition(lambda self: self.loops and not self.closed)
    @rule(data=st.data(), count=st.integers(0, 9))
    def step(self, data: st.DataObject, count: int) -> None:
        loop, _, values = data.draw(st.sampled_from(self.loops))
        loop.current = values["current"] = count

    @precondition(lambda self: self.loops)
    @rule(data=st.data())
    def stop_tracking(self, data: st.DataObject) -> None:
        ended = data.draw(st.sampled_from(self.loops))
        loop, message, values = ended
        self.reporter.stop_tracking(loop)
        self.loops.remove(ended)
        if self.values is values:
            self.show_outer(message, self.loops[-1][2] if self.loops else self.outermost)

    def show_outer(self, message: str, outer: dict[str, Any]) -> None:
        """
        Make the outer loop's values current again, but keep a message and data that the task
        reported.
        """
        kept = {"data": self.values["data"]}
        if self.values["message"] is not message:
            kept["message"] = self.values["message"]
        self.values = outer
        self.values |= kept

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
            self.show_outer(self.loops[-1][1], self.outermost)
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
            assert progress.percent is None or 0 <= progress.percent <= 100
            assert progress.rate is None or progress.rate > 0
            assert progress.eta is None or 0 <= progress.eta < math.inf

    def assert_newest_published(self) -> None:
        assert self.values_of(self.stage.last) == self.values

    @staticmethod
    def values_of(progress: Any) -> dict[str, Any]:
        return {name: getattr(progress, name) for name in ("current", "total", "message", "data")}

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
