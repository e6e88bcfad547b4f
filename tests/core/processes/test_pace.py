"""Pace estimates the duration of a task from earlier runs of the same function."""

import pytest

from django_tasks_local.processes.pace import UNKNOWN, Pace
from tests.support.fake_worker import new_task


def test_a_function_that_was_not_measured_counts_as_long() -> None:
    assert Pace().estimate(new_task()) == UNKNOWN


def test_a_long_run_counts_at_once_and_is_forgotten_slowly() -> None:
    pace, measured = Pace(), new_task()
    pace.note(measured, 0.001)
    assert pace.estimate(measured) == 0.001
    pace.note(measured, 0.5)
    assert pace.estimate(measured) == 0.5
    pace.note(measured, 0.001)
    assert pace.estimate(measured) == pytest.approx(0.4501)
    for _ in range(100):
        pace.note(measured, 0.001)
    assert pace.estimate(measured) == pytest.approx(0.001, abs=0.0001)
