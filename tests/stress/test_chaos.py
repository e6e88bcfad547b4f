"""Tests that the checker of stress/chaos.py reports violations, and that a short run has none."""

import re
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.tasks import TaskResultStatus
from django.utils import timezone

from django_tasks_local.events import FailureReason, TaskEvent, TaskFailure
from stress.invariants import Checker
from tests.support import factories
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT

ID = "some-task"

type Entry = tuple[Any, ...]


def event(sequence: int, kind: str, **values: Any) -> TaskEvent:
    return factories.event(ID, sequence, kind, name="noop", **values)


def failed(reason: str) -> dict[str, Any]:
    error = TaskFailure(reason=FailureReason(reason), type="Error", message="")
    return {"status": TaskResultStatus.FAILED, "error": error}


def result(**values: Any) -> Any:
    now = timezone.now()
    fields = {
        "status": TaskResultStatus.SUCCESSFUL,
        "started_at": now,
        "finished_at": now,
        "worker_ids": ["worker@7"],
        "errors": [],
        "return_value": None,
    }
    return SimpleNamespace(**{**fields, **values})


def failed_result(**values: Any) -> Any:
    error = SimpleNamespace(exception_class_path="Error")
    return result(status=TaskResultStatus.FAILED, errors=[error], **values)


def finish(sequence: int = 4, *, of: Any = None, stored: Any = None, **values: Any) -> list[Entry]:
    of = of or result()
    return [
        ("published", event(sequence, "finished", **values)),
        ("signalled", "finished", ID, of, stored or of),
    ]


ENQUEUED: list[Entry] = [("published", event(1, "enqueued")), ("signalled", "enqueued", ID)]
STARTED: list[Entry] = [("published", event(2, "started")), ("signalled", "started", ID)]
PROGRESS: list[Entry] = [("published", event(3, "progress"))]
HEALTHY = ENQUEUED + STARTED + PROGRESS + finish()
FAILED = {reason: finish(3, of=failed_result(), **failed(reason)) for reason in FailureReason}
ROUNDS: list[Entry] = [("end_round",)] * 3


def violations(log: list[Entry]) -> str:
    checker = Checker({"noop": {"successful"}}, timeout=1.0)
    for entry, *values in log:
        getattr(checker, entry)(*values)
    checker.end()
    return "\n".join(map(str, checker.violations))


@pytest.mark.parametrize(
    "log",
    [
        HEALTHY,
        HEALTHY + ROUNDS + HEALTHY,
        # The log may contain entries of different threads in any order.
        ENQUEUED + finish() + PROGRESS + STARTED,
        [("published", event(1, "enqueued", position=n)) for n in (3, 1, 0)] + HEALTHY[1:],
        [*ENQUEUED, ("answered", ID, True, False), *STARTED, *FAILED["cancelled"]],
        [*ENQUEUED, *STARTED, ("killed", 7), *FAILED["died"]],
        [*ENQUEUED, *STARTED, ("closing",), ("missing", ID), *FAILED["lost"]],
        [*HEALTHY, ("missing", ID), ("answered", ID, False, True)],
        [*ENQUEUED, ("missing", ID), *HEALTHY[2:], ("closing",)],
        [*HEALTHY, ("read", "r", ID, (1, 0), False), ("read", "r", ID, (4, 0), True)],
        [*HEALTHY, ("read", "r", ID, (1, 0), False), *ROUNDS, ("left", "r", False)],
        [("read", "r", ID, (1, 0), False), ("left", "r", True), *HEALTHY],
    ],
)
def test_checker_accepts_valid_logs(log: list[Entry]) -> None:
    assert violations(log) == ""


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (ENQUEUED + STARTED, "it was finished 0 times"),
        (HEALTHY[:-1], "no task_finished was sent"),
        ([*HEALTHY, ("published", event(5, "finished"))], "it was finished 2 times"),
        ([*HEALTHY, ("published", event(3, "progress"))], "two events have the same version"),
        (
            [*HEALTHY, ("published", event(5, "progress"))],
            "the kinds of its events are not in order",
        ),
        ([*HEALTHY, *ROUNDS, ("published", event(3, "progress"))], "ended long ago"),
        ([*HEALTHY, *ROUNDS, ("signalled", "started", ID)], "came long after the end"),
        ([("published", event(2, "enqueued")), *HEALTHY[1:]], "not enqueued first"),
        ([*ENQUEUED, ("published", event(3, "started")), *HEALTHY[3:]], "started is not 2"),
        ([*HEALTHY, ("published", event(2.5, "started"))], "started twice"),  # type: ignore[arg-type]
        ([*HEALTHY, ("signalled", "finished", ID)], "'finished': 2"),
        (HEALTHY[:1] + HEALTHY[2:], "the signals sent were"),
        (ENQUEUED + STARTED[1:] + finish(), "started was published: False"),
        (
            ENQUEUED + STARTED + finish(status=TaskResultStatus.RUNNING),
            "a status does not fit its kind",
        ),
        (ENQUEUED + STARTED + finish(stored=failed_result()), "in the store is FAILED"),
        (ENQUEUED + STARTED + finish(of=failed_result()), "in the hub is SUCCESSFUL"),
        (
            ENQUEUED + STARTED + finish(return_value=1),
            "it returned 1 in the hub, None in the result",
        ),
        ([*ENQUEUED, *STARTED, *FAILED["failed"]], "the task noop has the outcome failed"),
        ([*ENQUEUED, *STARTED, *FAILED["cancelled"]], "the task noop has the outcome cancelled"),
        (
            [*ENQUEUED, *STARTED, ("killed", 8), *FAILED["died"]],
            "the task noop has the outcome died",
        ),
        ([*ENQUEUED, *STARTED, *FAILED["lost"]], "the task noop has the outcome lost"),
        (
            [("closing",), *ENQUEUED, *STARTED, *FAILED["lost"]],
            "the task noop has the outcome lost",
        ),
        ([*ENQUEUED, *STARTED, *FAILED["timeout"]], "the task noop has the outcome timeout"),
        ([*ENQUEUED, ("answered", ID, False, False)], "cancel() was False"),
        ([*HEALTHY, *ROUNDS, ("answered", ID, True, True)], "cancel() was True long after"),
        ([*ENQUEUED, ("missing", ID), *HEALTHY[2:]], "the store has lost"),
        ([*HEALTHY, *(("read", "r", ID, (3, 0), False),) * 2], "reader r got (3, 0) after (3, 0)"),
        (
            [*HEALTHY, ("read", "r", ID, (4, 0), True), ("read", "r", ID, (5, 0), False)],
            "reader r got (5, 0) after",
        ),
        (
            [*HEALTHY, ("read", "r", ID, (3, 0), False), *ROUNDS, ("left", "r", True)],
            "and never the last event",
        ),
    ],
)
def test_checker_reports_violations(log: list[Entry], found: str) -> None:
    assert found in violations(log)


def test_timeout_after_its_time_is_valid() -> None:
    now = timezone.now()
    late = failed_result(started_at=now, finished_at=now + timedelta(seconds=1.1))
    log = [*ENQUEUED, *STARTED, *finish(3, of=late, **failed("timeout"))]
    assert violations(log) == ""


def test_violation_names_task_and_events() -> None:
    lines = violations(ENQUEUED).splitlines()
    assert lines == [f"task {ID}: it was finished 0 times", "    1 enqueued READY noop"]


def test_short_run() -> None:
    """A run of stress/chaos.py for three seconds judges over 100 tasks and has no violation."""
    done = subprocess.run(
        [sys.executable, "stress/chaos.py", "--minutes", "0.05", "--seed", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2.5 * LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    judged = re.search(r"^\| tasks judged +\| +([\d,]+) \|$", done.stdout, re.MULTILINE)
    assert judged is not None, done.stdout
    assert int(judged[1].replace(",", "")) > 100, "the run judged too few tasks"
    assert "seed: 20" in done.stdout
    assert "violations: 0" in done.stdout
