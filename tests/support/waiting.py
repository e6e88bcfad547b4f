"""Functions that wait for a condition or an event, for at most LIMIT seconds."""

import time
from collections.abc import Callable
from typing import Any

from django.tasks import TaskResult

from django_tasks_local.events import TaskEvent
from django_tasks_local.hub import hub
from tests.project import tasks

type AnyResult = TaskResult[Any, Any]

LIMIT = tasks.LIMIT


def wait_until(condition: Callable[[], object], failure: str) -> None:
    """
    Poll a condition that no event announces; fail with the message `failure` after LIMIT seconds.
    """
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.005)


def wait_for_event(result_id: str, condition: Callable[[TaskEvent], object]) -> TaskEvent:
    """
    Return the task's first event that meets the condition; fail if the task ends or after LIMIT.
    """
    deadline = time.monotonic() + LIMIT
    with hub.subscribe(result_id) as subscription:
        while events := subscription.take(timeout=deadline - time.monotonic()):
            for event in events:
                if condition(event):
                    return event
    raise AssertionError(f"No such event; the last one was {hub.snapshot(result_id)}")


def finished(result: AnyResult) -> AnyResult:
    """Wait until the task has ended; refresh its result and return it."""
    wait_for_event(result.id, lambda event: event.is_last)
    result.refresh()
    return result


def running(result: AnyResult) -> AnyResult:
    """
    Wait until the task has reported progress, which shows that it runs; refresh and return its
    result.
    """
    wait_for_event(result.id, lambda event: event.progress is not None)
    result.refresh()
    return result
