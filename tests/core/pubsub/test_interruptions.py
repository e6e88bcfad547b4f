"""A finalizer or another thread may publish or subscribe during any call that the hub makes."""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from django_tasks_local.events import TaskEvent
from django_tasks_local.hub import Hub
from django_tasks_local.pubsub import HubStatistics, latest, mailbox, subscription
from django_tasks_local.pubsub.latest import Latest, Topic
from django_tasks_local.pubsub.subscription import Subscription
from tests.support.factories import event
from tests.support.interruptions import each_call
from tests.support.stale import SeeminglyEmptyDict

MAX_LOOKUPS = 1000  # in one test, far more than a test needs
REFERENCES = [pytest.param("1", id="id"), pytest.param(event("1", 1), id="event")]


@pytest.fixture(autouse=True)
def bounded_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Fail a test in which the hub looks up topics more than MAX_LOOKUPS times, as in an endless loop.
    """
    for name in ("get_or_create", "find_or_await"):
        monkeypatch.setattr(Latest, name, bounded(getattr(Latest, name)))


def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        assert calls < MAX_LOOKUPS, "the hub looks up topics in an endless loop"
        return function(*args)

    return call


def assert_empty(hub: Hub, tasks: int) -> None:
    """Check that the hub has `tasks` tasks and keeps no trace of the closed subscriptions."""
    assert hub.statistics() == HubStatistics(subscriptions=0, events=tasks, event_loops=0)
    assert hub._latest._awaited == {}
    assert [topic for topic in hub._latest if topic.readers] == []


def test_publish_while_the_task_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latest, "UNKEPT_LIMIT", 1)
    for interruption in each_call():
        hub = Hub()
        hub.publish(event("1", 1))
        with interruption.by(publisher(hub)):
            hub.publish(event("2", 1))
        hub.publish(event("1", 3))
        assert hub.snapshot("1").sequence == 3


@pytest.mark.parametrize("reference", REFERENCES)
def test_subscription_begins_while_another_is_closed(reference: str | TaskEvent) -> None:
    """
    A subscription receives events if it begins while close() of another one removes their topic.

    The hub removes the topic because it has no event yet, so the second subscription needs a new
    one.
    """
    for interruption in each_call():
        hub = Hub()
        second = hub.subscribe(reference)
        with hub.subscribe(reference) as first, interruption.by(second.__enter__):
            first.close()
        hub.publish(event("1", 2, "finished"))
        assert [e.kind for e in second.take(timeout=0)] == ["finished"]
        second.close()
        assert_empty(hub, tasks=1)


@pytest.mark.parametrize("reference", REFERENCES)
def test_task_added_while_a_subscription_is_closed(reference: str | TaskEvent) -> None:
    """
    close() removes the topic that the subscription created, but keeps the topic of the new task.

    Both topics have the same id.
    """
    for interruption in each_call():
        hub = Hub()
        topic = kept_topic()
        with hub.subscribe(reference) as subscription:
            with interruption.by(functools.partial(hub.add, topic)):
                subscription.close()
            assert hub.find("1", "default") is topic
        assert_empty(hub, tasks=1)


def test_task_added_while_it_is_released() -> None:
    """The hub keeps no task that a closed pool releases while enqueue() still adds it."""
    for interruption in each_call():
        hub = Hub()
        topic = kept_topic()
        with interruption.by(functools.partial(hub.add, topic)):
            hub.release(topic)
        assert hub.find("1") is None


def test_first_event_reaches_a_subscription_to_an_unknown_id() -> None:
    """add() finds the subscription, although without a GIL it may read an old length."""
    hub = Hub()
    hub._latest._awaited = SeeminglyEmptyDict()
    with hub.subscribe("1") as subscription:
        topic = kept_topic()
        hub.add(topic)
        hub.notify(topic)
        assert [e.sequence for e in subscription.take(timeout=0)] == [2]


def test_published_topics_are_delivered_although_the_mailbox_seems_empty() -> None:
    """A mailbox delivers each marked topic, although it may read an old length without a GIL."""
    hub = Hub()
    with hub.subscribe("1") as subscription:
        assert subscription.mailbox is not None
        subscription.mailbox._changed = SeeminglyEmptyDict()
        hub.publish(event("1", 1))
        assert [e.sequence for e in subscription.take(timeout=0)] == [1]


def test_another_thread_asks_for_the_topics_of_a_subscription_while_it_reads() -> None:
    """The reading thread's answer is its own, also if another thread stores an older one."""
    hub = Hub()
    hub.publish(event("1", 1))
    with hub.subscribe("1") as subscription:
        [topic] = subscription.topics

        class WithOlderAnswer(Subscription):
            """A Subscription in which another thread has stored the older answer each time."""

            _newest_topics = property(lambda self: set(), lambda self, value: None)  # type: ignore[assignment]

        subscription.__class__ = WithOlderAnswer
        assert subscription.reads(topic)


def test_a_drop_in_the_mailbox_counts_while_the_reader_counts_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No dropped task is left out of `missed` if two threads drop tasks concurrently."""
    monkeypatch.setattr(mailbox, "UNREAD_LIMIT", 10)
    drop = mailbox.drop_oldest_released

    def drop_while_a_publisher_drops(changed: dict[Topic, None]) -> int:
        publish_and_release(range(100, 120))
        return drop(changed)

    def publish_and_release(numbers: range) -> None:
        for number in numbers:
            assert hub.publish(event(str(number), 1, "finished"), keep=True)
            topic = hub.find(str(number))
            assert topic is not None
            hub.release(topic)

    hub = Hub()
    with hub.subscribe() as to_all:
        publish_and_release(range(10))
        assert to_all.mailbox is not None
        to_all.mailbox.distribute()
        publish_and_release(range(10, 20))
        monkeypatch.setattr(subscription, "drop_oldest_released", drop_while_a_publisher_drops)
        received = [*to_all.take(timeout=0), *to_all.take(timeout=0)]
        assert len(received) + to_all.missed == 40


def test_task_added_while_another_of_its_id_is_released() -> None:
    for interruption in each_call():
        hub = Hub()
        first, second = kept_topic(), kept_topic()
        hub.add(first)
        with interruption.by(functools.partial(hub.add, second)):
            hub.release(first)
        assert hub.find("1") is second


@pytest.mark.parametrize("reference", REFERENCES)
def test_publish_while_a_subscription_is_closed(reference: str | TaskEvent) -> None:
    for interruption in each_call():
        hub = Hub()
        with (
            hub.subscribe(reference) as subscription,
            interruption.by(publisher(hub)),
        ):
            subscription.close()
        assert hub.snapshot("1").sequence == 2
        assert_empty(hub, tasks=1)


@pytest.mark.parametrize("reference", REFERENCES)
def test_publish_while_a_subscription_begins(reference: str | TaskEvent) -> None:
    for interruption in each_call():
        hub = Hub()
        subscription = hub.subscribe(reference)
        with interruption.by(publisher(hub)):
            subscription.__enter__()
        assert [e.sequence for e in subscription.take(timeout=0)] == [2]
        subscription.close()
        assert_empty(hub, tasks=1)


def publisher(hub: Hub) -> Callable[[], object]:
    return lambda: hub.publish(event("1", 2))


def kept_topic() -> Topic:
    """Return a topic that is marked as kept and has an event, like the topics that a pool adds."""
    topic = Topic("default", "1")
    topic.is_kept = True
    topic.replace(event("1", 2))
    return topic
