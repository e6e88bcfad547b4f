"""Starter decides when to start a worker, give up and try again; the test moves its clock."""

import logging
import multiprocessing
import os
import sys
from typing import Any

import pytest

from django_tasks_local.conf import ProcessOptions
from django_tasks_local.processes import starting
from django_tasks_local.processes.settings import DjangoSettings
from django_tasks_local.processes.starting import (
    BROKEN_TIME,
    START_DEATHS,
    START_ERRORS,
    START_PAUSE,
    Starter,
)

SETTINGS = DjangoSettings(None, {})


class Launches:
    """A Starter whose clock the test moves and whose launch() starts no process."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.names: list[str] = []
        self.starter = Starter("alias", self.launch, SETTINGS, clock=lambda: self.now)

    def launch(self, name: str, settings: DjangoSettings) -> Any:
        """Record the name instead of starting a worker."""
        assert settings is SETTINGS
        self.names.append(name)
        return object()


@pytest.fixture
def launches() -> Launches:
    """Return a Starter that has started no worker, with its clock and its recorded names."""
    return Launches()


def test_workers_have_numbers(launches: Launches) -> None:
    assert launches.starter.is_due()
    assert launches.starter.start()
    assert launches.starter.start()
    assert launches.names == ["django-tasks-alias-0", "django-tasks-alias-1"]


def test_an_error_of_the_system_is_raised(launches: Launches) -> None:
    def refuse(name: str, settings: DjangoSettings) -> Any:
        raise OSError("too many files")

    with pytest.raises(OSError, match="too many files"):
        Starter("alias", refuse, SETTINGS).start()


def test_a_refused_start_is_tried_again_after_a_pause(launches: Launches) -> None:
    assert not launches.starter.on_refusal("no memory")
    assert not launches.starter.is_due()
    assert launches.starter.retry_at == launches.now + START_PAUSE
    launches.now += START_PAUSE
    assert launches.starter.is_due()


def test_a_worker_that_dies_at_its_start_is_replaced_at_once(launches: Launches) -> None:
    assert not launches.starter.on_death("killed", has_reported=False)
    assert launches.starter.is_due()


@pytest.mark.parametrize(("has_reported", "limit"), [(True, START_ERRORS), (False, START_DEATHS)])
def test_starting_is_given_up(
    launches: Launches, has_reported: bool, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(limit - 1):
        assert not launches.starter.on_death("bad settings", has_reported=has_reported)
    assert not caplog.records
    assert launches.starter.on_death("bad settings", has_reported=has_reported)
    assert launches.starter.retry_at == launches.now + BROKEN_TIME
    # Another worker that was already starting fails later; the starter does not log this again.
    assert not launches.starter.on_death("bad settings", has_reported=has_reported)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    message = "The task backend 'alias' cannot start worker processes:\nbad settings"
    assert record.getMessage() == message


def test_after_it_was_given_up_each_failure_is_final(
    launches: Launches, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(START_ERRORS):
        launches.now += START_PAUSE
        launches.starter.on_refusal("no memory")
    for _ in range(2):
        launches.now += BROKEN_TIME
        assert launches.starter.on_refusal("no memory")
    assert len(caplog.records) == 3


def test_a_worker_that_is_ready_ends_the_count(launches: Launches) -> None:
    for _ in range(3 * START_ERRORS):
        launches.now += START_PAUSE
        assert not launches.starter.on_refusal("no memory")
        launches.starter.on_ready()
    assert launches.starter.failures == 0


def test_tasks_are_refused_until_the_next_start(launches: Launches) -> None:
    launches.starter.raise_if_broken()
    for _ in range(START_ERRORS):
        launches.now += START_PAUSE
        launches.starter.on_refusal("no memory")
    launches.starter.raise_if_broken()  # A ready worker may still run tasks.
    launches.starter.refuse_tasks("no memory")
    expected = r"'alias' cannot start worker processes, so no task was enqueued\. .*:\nno memory"
    with pytest.raises(RuntimeError, match=expected):
        launches.starter.raise_if_broken()
    launches.now += BROKEN_TIME
    launches.starter.raise_if_broken()
    launches.starter.on_ready()
    launches.now -= BROKEN_TIME
    launches.starter.raise_if_broken()


@pytest.mark.skipif(sys.platform == "win32", reason="needs /dev/null and close()")
def test_a_start_that_fails_leaves_no_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError("too many files")

    monkeypatch.setattr(starting, "_raise_if_descriptors_are_short", refuse)
    context = multiprocessing.get_context("spawn")
    before = os.dup(0)
    os.close(before)
    with pytest.raises(OSError, match="too many files"):
        starting.launch("name", context, ProcessOptions(), SETTINGS)
    after = os.dup(0)
    os.close(after)
    assert after == before
