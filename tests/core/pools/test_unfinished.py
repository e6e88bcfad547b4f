"""UnfinishedTasks: a thread that waits for the end of all tasks is notified."""

from typing import Any

import pytest

from django_tasks_local.pools.unfinished import UnfinishedTasks
from tests.support.factories import task_record
from tests.support.stale import SeeminglyFilledDict
from tests.support.waiting import LIMIT


def test_the_last_task_ends_while_a_thread_begins_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread does not wait for a task that ended just before, whatever length it reads."""

    def wait(timeout: float) -> bool:
        raise AssertionError("No thread is going to notify this one.")

    unfinished: UnfinishedTasks[Any] = UnfinishedTasks()
    unfinished._records = SeeminglyFilledDict()
    record = task_record()
    unfinished.add(record)
    unfinished.remove(record)
    monkeypatch.setattr(unfinished._has_ended, "wait", wait)
    assert unfinished.wait_until_empty(LIMIT) == []
