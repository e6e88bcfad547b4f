"""Time limits while freezegun has frozen the time."""

import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from django.tasks import task_backends
from django.test import override_settings
from freezegun import freeze_time

from django_tasks_local import join
from django_tasks_local.clocks import Clocks
from django_tasks_local.hub import hub
from tests.project import tasks
from tests.support.backends import PROCESSES, THREADS, settings_with
from tests.support.paths import ROOT
from tests.support.waiting import finished, running, wait_for_event

FROZEN = datetime(2020, 2, 2, tzinfo=UTC)


@pytest.fixture(autouse=True)
def frozen_time() -> Iterator[None]:
    with settings_with(MAX_WORKERS=1), freeze_time(FROZEN):
        yield


def test_time_is_frozen() -> None:
    assert time.monotonic() == time.monotonic()
    first = Clocks.monotonic()
    while Clocks.monotonic() == first:
        pass


def test_wait_until_idle_ends_while_the_time_is_frozen(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    backend: Any = task_backends["default"]
    assert [unfinished.id for unfinished in backend.wait_until_idle(0.01)] == [result.id]


def test_wait_for_an_event_ends_while_the_time_is_frozen(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with hub.subscribe(result.id) as subscription:
        subscription.take(0)
        assert subscription.take(0.01) == []


def test_join_ends_while_the_time_is_frozen(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with pytest.raises(TimeoutError, match=r"after 0\.01 seconds"):
        join(result, 0.01)


def test_last_report_is_published_while_the_time_is_frozen(gate: str) -> None:
    """The ticker publishes it after PROGRESS_INTERVAL seconds of the real time."""
    result = tasks.burst.enqueue(100, gate)
    wait_for_event(result.id, lambda event: event.progress and event.progress.current == 100)


def test_coroutine_sleeps_while_the_time_is_frozen() -> None:
    assert finished(tasks.nap.enqueue()).return_value == "awake"


def test_task_takes_too_long_while_the_time_is_frozen() -> None:
    processes = {"BACKEND": PROCESSES, "OPTIONS": {"TIMEOUT": 0.05, "MAX_WORKERS": 1}}
    with override_settings(TASKS={"default": {"BACKEND": THREADS}, "processes": processes}):
        result = finished(tasks.endless.using(backend="processes").enqueue())
    assert result.errors[0].exception_class_path.endswith(".TaskTimeout")


def test_timestamps_are_frozen() -> None:
    result = finished(tasks.noop.enqueue())
    assert [result.enqueued_at, result.started_at, result.finished_at] == [FROZEN] * 3


def test_each_module_reads_the_real_clocks() -> None:
    """A module that reads time.monotonic() itself would wait without end."""
    for package in ("django_tasks_local", "django_tasks_local_sse"):
        for path in (ROOT / package).rglob("*.py"):
            code = re.sub(r'"""[\s\S]*?"""|#.*', "", path.read_text())
            found = re.findall(r"\btime\.(?:monotonic|perf_counter)\b", code)
            assert not found or path.name == "clocks.py", path
