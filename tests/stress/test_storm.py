"""Tests that the checks of stress/storm.py report wrong histories, and of two short runs."""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.tasks import TaskResultStatus
from django.utils import timezone

from django_tasks_local.events import FailureReason, TaskEvent, TaskFailure
from stress.histories import History, ReaderHistory, wrong_history
from stress.storm_tasks import TASK_CANCELLED, Expected
from tests.support import factories
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT

ID = "some-task"
NOW = timezone.now()
LATER = NOW + timedelta(seconds=1)


def event(sequence: int, kind: str, **values: Any) -> TaskEvent:
    return factories.event(
        ID,
        sequence,
        kind,
        name="echo",
        enqueued_at=NOW,
        started_at=None if kind == "enqueued" else NOW,
        finished_at=NOW if kind == "finished" else None,
        **values,
    )


ENQUEUED, STARTED, PROGRESS = event(1, "enqueued"), event(2, "started"), event(3, "progress")
FINISHED = event(4, "finished", return_value=7)
EVENTS = [ENQUEUED, STARTED, PROGRESS, FINISHED]


def result(**values: Any) -> Any:
    fields = {
        "status": TaskResultStatus.SUCCESSFUL,
        "is_finished": True,
        "enqueued_at": NOW,
        "started_at": NOW,
        "finished_at": NOW,
        "attempts": 1,
        "worker_ids": ["worker"],
        "errors": [],
        "return_value": 7,
    }
    return SimpleNamespace(**{**fields, **values})


def failed_with(path: str) -> dict[str, Any]:
    """Return the fields of the history of a task that failed with this exception."""
    error = TaskFailure(reason=FailureReason.FAILED, type=path, message="")
    last = replace(FINISHED, status=TaskResultStatus.FAILED, error=error, return_value=None)
    failed = result(
        status=TaskResultStatus.FAILED, errors=[SimpleNamespace(exception_class_path=path)]
    )
    return {"events": [ENQUEUED, STARTED, last], "snapshot": last, "result": failed}


HEALTHY = History(Expected((7,)), EVENTS, runs=1, result=result(), snapshot=FINISHED)
EVICTED = replace(HEALTHY, result=None, snapshot=None)
CANCELLED = replace(HEALTHY, **failed_with(TASK_CANCELLED))


@pytest.mark.parametrize(
    "history",
    [
        HEALTHY,
        replace(HEALTHY, expected=Expected()),
        replace(HEALTHY, expected=Expected((6, 7))),
        replace(HEALTHY, cancelled=True),
        replace(HEALTHY, expected=Expected(error="ValueError"), **failed_with("ValueError")),
        replace(CANCELLED, cancelled=True),
        replace(CANCELLED, cancelled=True, runs=0),
        replace(EVICTED, may_be_evicted=True),
    ],
)
def test_the_checker_accepts_a_right_history(history: History) -> None:
    assert list(wrong_history(history)) == []


@pytest.mark.parametrize(
    ("history", "found"),
    [
        (replace(HEALTHY, events=[]), "has no event"),
        (replace(HEALTHY, events=EVENTS[:-1]), "it was finished 0 times"),
        (replace(HEALTHY, events=[*EVENTS, event(5, "finished")]), "it was finished 2 times"),
        (replace(HEALTHY, events=[*EVENTS, FINISHED]), "it was finished 2 times"),
        (
            replace(HEALTHY, events=[ENQUEUED, PROGRESS, STARTED, FINISHED]),
            "the hub accepted events out of order",
        ),
        (replace(HEALTHY, events=EVENTS[1:]), "it was not enqueued first"),
        (replace(HEALTHY, runs=2), "its function ran 2 times"),
        (replace(HEALTHY, runs=0), "its function never ran"),
        (
            replace(HEALTHY, events=[ENQUEUED, replace(FINISHED, started_at=None)]),
            "it was never started",
        ),
        (replace(HEALTHY, expected=Expected((8,))), "it returned 7, expected: one of (8,)"),
        (replace(HEALTHY, expected=Expected(error="ValueError")), "expected: ValueError"),
        (CANCELLED, f"it ended with {TASK_CANCELLED}, expected: success"),
        (
            replace(HEALTHY, cancelled=True, **failed_with("ValueError")),
            "it ended with ValueError, expected: success",
        ),
        (replace(HEALTHY, result=None), "the backend has forgotten it"),
        (replace(HEALTHY, snapshot=None), "the hub has forgotten it"),
        (EVICTED, "it was evicted, although"),
        (replace(HEALTHY, snapshot=PROGRESS), "the version of its snapshot"),
        (
            replace(HEALTHY, result=result(status=TaskResultStatus.RUNNING, is_finished=False)),
            "the backend reports RUNNING",
        ),
        (
            replace(HEALTHY, result=result(status=TaskResultStatus.FAILED)),
            "the status of its result",
        ),
        *(
            (replace(HEALTHY, result=result(**{name: LATER})), f"the {name} of its result")
            for name in ("enqueued_at", "started_at", "finished_at")
        ),
        (
            replace(
                HEALTHY,
                result=result(errors=[SimpleNamespace(exception_class_path="ValueError")]),
            ),
            "the error of its result is 'ValueError', that of its event None",
        ),
        (replace(HEALTHY, result=result(return_value=8)), "the return value of its result is 8"),
        (replace(HEALTHY, result=result(attempts=2)), "2 attempts"),
        (replace(HEALTHY, result=result(worker_ids=[])), "1 attempts by []"),
    ],
)
def test_the_checker_reports_a_wrong_history(history: History, found: str) -> None:
    assert found in "\n".join(wrong_history(history))


def violations_of_reader(*takes: list[TaskEvent], wanted: str = "") -> Iterator[str]:
    reader = ReaderHistory("r", frozenset({wanted} - {""}))
    for events in takes:
        reader.read(events)
    reader.must_have_seen_the_end([ID])
    return iter([text for _, text in reader.violations])


def test_the_checker_accepts_a_right_reader() -> None:
    assert list(violations_of_reader([ENQUEUED], [PROGRESS], [FINISHED])) == []
    assert list(violations_of_reader([FINISHED], wanted=ID)) == []


@pytest.mark.parametrize(
    ("takes", "wanted", "found"),
    [
        (
            [[STARTED], [ENQUEUED], [FINISHED]],
            "",
            f"received {ENQUEUED.version} after {STARTED.version}",
        ),
        (
            [[STARTED], [STARTED], [FINISHED]],
            "",
            f"received {STARTED.version} after {STARTED.version}",
        ),
        ([[FINISHED], [event(5, "progress")]], "", "received progress after finished"),
        ([[ENQUEUED], [PROGRESS]], "", "never received finished (0 admitted as missed)"),
        ([[FINISHED]], "another-task", "an event of a task that it did not ask for"),
    ],
)
def test_the_checker_reports_a_wrong_reader(
    takes: list[list[TaskEvent]], wanted: str, found: str
) -> None:
    assert found in "\n".join(violations_of_reader(*takes, wanted=wanted))


def test_the_checker_allows_the_ends_that_a_reader_admits_to_have_missed() -> None:
    reader = ReaderHistory("r")
    reader.read([PROGRESS])
    reader.must_have_seen_the_end([ID], missed=1)
    assert reader.violations == []
    reader.must_have_seen_the_end([ID, "another-task"], missed=1)
    assert len(reader.violations) == 2


@pytest.mark.parametrize("options", [[], ["--processes"]])
def test_a_short_storm(options: list[str]) -> None:
    """Two runs of stress/storm.py with 1,000 tasks have no violation.

    By default the program runs 50,000 tasks, ten times.
    """
    done = subprocess.run(
        [sys.executable, "stress/storm.py", "--tasks", "1000", "--runs", "2", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=5 * LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    summaries = re.findall(r"^seed \d+: ([\d,]+) tasks, .*: 0 violations$", done.stdout, re.M)
    assert [int(total.replace(",", "")) >= 1000 for total in summaries] == [True, True]
