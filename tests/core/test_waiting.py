"""limit_wait() bounds each single wait, so that long waits work on every system."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from django_tasks_local import waiting
from django_tasks_local.hub import Hub
from django_tasks_local.pools.unfinished import UnfinishedTasks
from django_tasks_local.waiting import limit_wait
from tests.support.factories import event

ENDLESS = threading.TIMEOUT_MAX * 2


def test_main_thread_waits_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main thread handles signals, so only its waits are divided."""
    monkeypatch.setattr(waiting, "MAX_MAIN_WAIT", 0.5)
    assert [limit_wait(seconds) for seconds in (None, 0.25, 8)] == [0.5, 0.25, 0.5]
    with ThreadPoolExecutor(1) as executor:
        limits = list(executor.map(limit_wait, (None, 8, ENDLESS)))
    assert limits == [threading.TIMEOUT_MAX, 8, threading.TIMEOUT_MAX]


def test_subscription_waits_for_event_over_several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """take() returns no empty list when a slice of its wait has passed without an event."""
    hub = Hub()
    slices = []

    def limit(seconds: float | None) -> float:
        slices.append(seconds)
        if len(slices) == 3:
            hub.publish(event("id", 1))
        return 0.001

    monkeypatch.setattr("django_tasks_local.pubsub.mailbox.limit_wait", limit)
    with hub.subscribe("id") as subscription:
        [first] = subscription.take()
    assert (first.id, len(slices)) == ("id", 3)


def test_wait_may_be_longer_than_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single wait above TIMEOUT_MAX, which is 49 days on Windows, raises OverflowError."""
    hub = Hub()
    with hub.subscribe("id") as subscription:
        publisher = threading.Timer(0.001, hub.publish, [event("id", 1)])
        publisher.start()
        assert subscription.take(timeout=ENDLESS)
        publisher.join()
    unfinished: UnfinishedTasks[Any] = UnfinishedTasks()
    record: Any = event("id", 1)
    unfinished.add(record)
    remover = threading.Timer(0.001, unfinished.remove, [record])
    remover.start()
    assert unfinished.wait_until_empty(ENDLESS) == []
    remover.join()
