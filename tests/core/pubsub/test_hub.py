"""
The hub: the order and coalescing of events, wake-ups, and which tasks the hub keeps or releases.
"""

import asyncio
import gc
import re
import threading
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from django_tasks_local.events import TaskEvent
from django_tasks_local.hub import Hub
from django_tasks_local.pubsub import HubStatistics, latest, mailbox
from django_tasks_local.pubsub.latest import Topic
from tests.support.factories import event
from tests.support.waiting import LIMIT, wait_until


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def task_id() -> str:
    return uuid.uuid4().hex


def keep(hub: Hub, event: TaskEvent) -> Topic:
    """Publish an event as a pool does, so that the hub keeps the task until it is released."""
    assert hub.publish(event, keep=True)
    topic = hub.find(event)
    assert topic is not None
    return topic


def sequences(events: list[TaskEvent]) -> list[int]:
    return [event.sequence for event in events]


def test_a_subscription_starts_with_the_present_state(hub: Hub, task_id: str) -> None:
    hub.publish(event(task_id, 1))
    hub.publish(event(task_id, 4))
    with hub.subscribe(task_id) as subscription:
        assert sequences(subscription.take(timeout=0)) == [4]
        assert subscription.take(timeout=0) == []
        hub.publish(event(task_id, 5))
        hub.publish(event(task_id, 6))
        assert sequences(subscription.take(timeout=0)) == [6]
    assert hub.snapshot(task_id).sequence == 6


def test_stale_events_are_dropped(hub: Hub, task_id: str) -> None:
    assert hub.publish(event(task_id, 3))
    assert not hub.publish(event(task_id, 3))
    assert not hub.publish(event(task_id, 2))
    assert hub.publish(event(task_id, 4, "finished"))
    assert not hub.publish(event(task_id, 5))
    assert hub.snapshot(task_id).kind == "finished"


def test_a_task_that_moves_up(hub: Hub, task_id: str) -> None:
    """
    Of two `enqueued` events with the same sequence, the hub treats the lower position as newer.
    """
    assert hub.publish(event(task_id, 1, "enqueued", position=3))
    with hub.subscribe(task_id) as subscription, hub.subscribe() as to_all:
        readers = (subscription, to_all)
        assert [[e.position for e in reader.take(timeout=0)] for reader in readers] == [[3], [3]]
        assert hub.publish(event(task_id, 1, "enqueued", position=1))
        for stale in (2, 1, None):
            assert not hub.publish(event(task_id, 1, "enqueued", position=stale))
        assert [[e.position for e in reader.take(timeout=0)] for reader in readers] == [[1], [1]]
        assert hub.publish(event(task_id, 2, "started"))
        assert not hub.publish(event(task_id, 1, "enqueued", position=0))


def test_a_later_run_follows_the_end_of_an_earlier_one(hub: Hub, task_id: str) -> None:
    """The hub accepts events of a later run, because a backend may run a failed task again."""
    assert hub.publish(event(task_id, 9, "finished", run=100))
    assert not hub.publish(event(task_id, 10, run=100))
    assert not hub.publish(event(task_id, 10, run=99))
    assert hub.publish(event(task_id, 2, "started", run=101))
    assert hub.snapshot(task_id).run == 101


def test_two_backends_with_the_same_id(hub: Hub) -> None:
    hub.publish(event("1", 2, "started", backend="first"))
    assert hub.snapshot("1").backend == "first"
    hub.publish(event("1", 5, backend="second"))
    assert hub.snapshot("1", "first").sequence == 2
    assert hub.snapshot("1", "second").sequence == 5
    with pytest.raises(ValueError, match="'first' and 'second'"):
        hub.snapshot("1")
    with pytest.raises(ValueError, match="ambiguous"), hub.subscribe("2", "1"):
        pass
    assert hub.statistics() == HubStatistics(subscriptions=0, events=2, event_loops=0)
    with hub.subscribe(hub.snapshot("1", "first")) as subscription:
        hub.publish(event("1", 6, "finished", backend="second"))
        assert [(e.backend, e.sequence) for e in subscription.take(timeout=0)] == [("first", 2)]
        assert not subscription.ended
        hub.publish(event("1", 3, "finished", backend="first"))
        assert sequences(subscription.take()) == [3]
        assert subscription.ended


async def test_subscription_by_id_reads_only_the_task_that_came_first(hub: Hub) -> None:
    """
    A subscription by id ignores a task of a second backend that has the same id.

    This also applies if another subscription in the same event loop reads the second task.
    """
    async with hub.subscribe("1") as by_id:
        hub.publish(event("1", 1, backend="first"))
        assert sequences(await by_id.atake(timeout=LIMIT)) == [1]
        async with hub.subscribe(event("1", 1, backend="second")) as other:
            hub.publish(event("1", 7, "finished", backend="second"))
            assert sequences(await other.atake(timeout=LIMIT)) == [7]
            assert await by_id.atake(timeout=0) == []
            assert not by_id.ended
        hub.publish(event("1", 2, "finished", backend="first"))
        assert sequences(await by_id.atake(timeout=LIMIT)) == [2]
        assert by_id.ended


async def test_closed_subscription_leaves_its_task_of_an_id_that_two_backends_have(
    hub: Hub,
) -> None:
    events = [event("1", 1, backend=alias) for alias in ("first", "second")]
    topics = [keep(hub, e) for e in events]
    async with hub.subscribe(events[0]) as first, hub.subscribe(events[1]):
        first.close()
        assert [len(topic.readers or ()) for topic in topics] == [0, 1]
    assert [len(topic.readers or ()) for topic in topics] == [0, 0]


def test_subscription_to_an_unknown_task_takes_no_reader_of_its_id(hub: Hub) -> None:
    """
    The first published event with an id decides which task a subscription by this id reads.

    A subscription to an unpublished task with the same id has no influence on the decision.
    """
    with hub.subscribe("1") as by_id, hub.subscribe(event("1", 1, backend="first")):
        hub.publish(event("1", 1, "finished", backend="second"))
        assert [e.backend for e in by_id.take(timeout=0)] == ["second"]
        assert by_id.ended
        assert hub.snapshot("1").backend == "second"


async def test_two_calls_wait_for_events_of_one_subscription(hub: Hub, task_id: str) -> None:
    async with hub.subscribe(task_id) as subscription:
        waiting = [asyncio.create_task(subscription.atake()) for _ in range(2)]
        await asyncio.sleep(0)
        hub.publish(event(task_id, 1, "finished"))
        done, _ = await asyncio.wait(waiting, timeout=LIMIT)
        assert sorted(sequences(task.result()) for task in done) == [[], [1]]


async def test_close_ends_a_wait_for_events(hub: Hub, task_id: str) -> None:
    async with hub.subscribe(task_id) as subscription:
        waiting = asyncio.create_task(subscription.atake())
        await asyncio.sleep(0)
        subscription.close()
        done, _ = await asyncio.wait([waiting], timeout=LIMIT)
        assert [task.result() for task in done] == [[]]


@pytest.mark.parametrize("wrong", [7, None, b"id"])
def test_what_does_not_name_a_task(hub: Hub, wrong: object) -> None:
    for read in (hub.subscribe, hub.snapshot):
        with pytest.raises(TypeError, match=re.escape(repr(wrong))):
            read(wrong)


def test_an_id_may_be_a_uuid(hub: Hub) -> None:
    id = uuid.uuid4()
    hub.publish(event(str(id), 1))
    assert hub.snapshot(id).id == str(id)
    with hub.subscribe(id) as subscription:
        assert sequences(subscription.take(timeout=0)) == [1]


def test_a_subscription_ends_when_all_its_tasks_are_finished(hub: Hub) -> None:
    hub.publish(event("a", 1))
    with hub.subscribe("a", "b", "a") as subscription:
        hub.publish(event("a", 2, "finished"))
        hub.publish(event("b", 1))
        hub.publish(event("b", 2, "finished"))
        assert [(e.id, e.sequence) for e in subscription] == [("a", 2), ("b", 2)]
        assert subscription.ended
        assert subscription.take() == []


def test_a_subscription_waits_for_an_unknown_id(hub: Hub, task_id: str) -> None:
    seen = []

    def read() -> None:
        with hub.subscribe(task_id) as subscription:
            started.set()
            seen.extend(subscription)

    started = threading.Event()
    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(LIMIT)
    assert hub.snapshot(task_id) is None
    hub.publish(event(task_id, 1, "finished"))
    thread.join(LIMIT)
    assert sequences(seen) == [1]


async def test_reading_in_an_event_loop(hub: Hub, task_id: str) -> None:
    async with hub.subscribe(task_id) as subscription:
        threading.Thread(target=hub.publish, args=(event(task_id, 1),)).start()
        assert sequences(await subscription.atake(timeout=LIMIT)) == [1]
        assert await subscription.atake(timeout=0) == []
        assert await subscription.atake(timeout=0.01) == []
        threading.Thread(target=hub.publish, args=(event(task_id, 2, "finished"),)).start()
        assert sequences([event async for event in subscription]) == [2]


async def test_a_wait_ends_at_its_time(hub: Hub, task_id: str) -> None:
    """
    atake() returns after its own timeout, also if an event ended an earlier wait with another one.
    """
    loop = asyncio.get_running_loop()

    async def wait(timeout: float) -> list[TaskEvent]:
        return await asyncio.wait_for(subscription.atake(timeout=timeout), LIMIT)

    async with hub.subscribe(task_id) as subscription:
        for sequence, first, second in [(1, 0.02, 0.1), (2, 10 * LIMIT, 0.01)]:
            waiting = asyncio.create_task(wait(first))
            await asyncio.sleep(0)
            hub.publish(event(task_id, sequence))
            assert sequences(await waiting) == [sequence]
            began = loop.time()
            assert await wait(second) == []
            assert loop.time() - began >= second


async def test_a_subscription_to_all_tasks(hub: Hub) -> None:
    hub.publish(event("a", 1))
    async with hub.subscribe() as subscription:
        assert sequences(await subscription.atake()) == [1]
        for number in range(2, 10):
            hub.publish(event("a", number))
        hub.publish(event("b", 1, "finished"))
        seen = [(e.id, e.sequence) for e in await subscription.atake()]
        assert seen == [("a", 9), ("b", 1)]
        assert not subscription.ended
        hub.publish(event("b", 2))
        assert await subscription.atake(timeout=0.01) == []


async def test_a_finished_event_is_given_once(hub: Hub, task_id: str) -> None:
    async with hub.subscribe() as everything, hub.subscribe(task_id, "other") as some:
        for number in range(1, 4):
            hub.publish(event(task_id, number))
        await asyncio.sleep(0)
        hub.publish(event(task_id, 4, "finished"))
        for subscription in (everything, some):
            seen = [e.sequence for _ in range(3) for e in await subscription.atake(timeout=0.01)]
            assert seen[-1] == 4
            assert seen == sorted(set(seen))


async def test_one_wake_up_for_all_subscriptions_of_a_loop(
    hub: Hub, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    calls = []
    schedule = loop.call_soon_threadsafe

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return schedule(*args, **kwargs)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    subscriptions = [hub.subscribe(task_id) for _ in range(100)]
    for subscription in subscriptions:
        await subscription.__aenter__()
    for number in range(1, 51):
        hub.publish(event(task_id, number))
    assert len(calls) == 1
    for subscription in subscriptions:
        assert sequences(await subscription.atake(timeout=LIMIT)) == [50]
        subscription.close()


def test_a_closed_loop_is_dropped_quietly(hub: Hub, task_id: str) -> None:
    async def subscribe() -> None:
        await hub.subscribe(task_id).__aenter__()
        await hub.subscribe().__aenter__()

    asyncio.run(subscribe())
    assert hub.statistics().event_loops == 1
    assert hub.publish(event(task_id, 1))
    assert hub.statistics().event_loops == 0
    assert not hub.to_all
    assert hub.publish(event(task_id, 2))


def test_a_loop_closed_between_the_wake_up_and_the_delivery(hub: Hub, task_id: str) -> None:
    async def subscribe() -> None:
        await hub.subscribe(task_id).__aenter__()
        await hub.subscribe().__aenter__()
        hub.publish(event(task_id, 1))
        # The loop stops before it runs the delivery that the hub has scheduled.
        asyncio.get_running_loop().stop()

    loop = asyncio.new_event_loop()
    task = loop.create_task(subscribe())
    loop.run_forever()
    assert task.done()
    loop.close()
    hub.publish(event("other", 1))
    assert hub.statistics().event_loops == 0
    assert not hub.to_all


def test_subscriptions_closed_after_their_loop_has_stopped(hub: Hub, task_id: str) -> None:
    """
    The next publish() removes subscriptions that were closed after their loop had stopped.

    A stopped loop runs no callback that could remove them.
    """

    async def subscribe() -> None:
        for subscription in subscriptions:
            await subscription.__aenter__()

    loop = asyncio.new_event_loop()
    subscriptions = [hub.subscribe(), hub.subscribe(task_id)]
    loop.run_until_complete(subscribe())
    for subscription in subscriptions:
        subscription.close()
    loop.close()
    hub.publish(event("other", 1))
    assert hub.statistics() == HubStatistics(subscriptions=0, events=1, event_loops=0)
    assert not hub.to_all
    assert not hub._latest._awaited


def test_subscription_of_a_closed_loop_to_an_id_that_is_never_published(
    hub: Hub, task_id: str
) -> None:
    """The next subscription, in any event loop, removes the subscription of the closed loop."""

    async def subscribe(id: str) -> None:
        await hub.subscribe(id).__aenter__()

    async def read() -> None:
        async with hub.subscribe():
            assert hub.statistics() == HubStatistics(subscriptions=1, events=0, event_loops=1)

    for id in (task_id, "another"):
        asyncio.run(subscribe(id))
    asyncio.run(read())
    assert hub.statistics() == HubStatistics(subscriptions=0, events=0, event_loops=0)
    assert not hub._latest._awaited


class HookedId(str):
    """An id that calls a function whenever a dictionary looks it up."""

    hook: Callable[[], None] | None = None

    def __hash__(self) -> int:
        if self.hook is not None:
            self.hook()
        return super().__hash__()


async def test_subscription_closed_while_its_loop_adds_another(hub: Hub, task_id: str) -> None:
    """A subscription may be closed while the hub adds another, because a finalizer may close it."""
    async with hub.subscribe(task_id) as first:
        id = HookedId(task_id)
        id.hook = first.close
        async with hub.subscribe(id) as second:
            assert hub.statistics().subscriptions == 1
            id.hook = None
            await asyncio.sleep(0)
            hub.publish(event(task_id, 1, "finished"))
            assert sequences(await second.atake(timeout=LIMIT)) == [1]
    assert hub.statistics() == HubStatistics(subscriptions=0, events=1, event_loops=0)


async def test_subscription_closed_by_another_thread(hub: Hub, task_id: str) -> None:
    """
    Only the loop's thread removes a closed subscription, so the readers of a delivery do not
    change.
    """
    async with hub.subscribe(task_id) as first, hub.subscribe(task_id) as second:
        closing = threading.Thread(target=first.close)
        closing.start()
        closing.join(LIMIT)
        assert hub.statistics() == HubStatistics(subscriptions=1, events=0, event_loops=1)
        await asyncio.sleep(0)
        hub.publish(event(task_id, 1, "finished"))
        assert sequences(await second.atake(timeout=LIMIT)) == [1]
        assert await first.atake(timeout=0) == []


def test_a_finalizer_that_publishes_in_the_middle_of_a_publication(
    hub: Hub, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    A `__del__` may publish in a thread that is publishing and holds the lock of the same task.
    """
    nested = iter(range(2, 1000))
    mark = mailbox.Mailbox.mark

    def publish_again(box: mailbox.Mailbox, topic: Topic) -> bool:
        if threading.current_thread() is publisher and depth.depth == 0:
            depth.depth = 1
            try:
                hub.publish(event(task_id, next(nested)))
                hub.publish(event("other", next(nested)))
            finally:
                depth.depth = 0
        return mark(box, topic)

    depth = threading.local()
    depth.depth = 0
    publisher = threading.current_thread()
    monkeypatch.setattr(mailbox.Mailbox, "mark", publish_again)
    with hub.subscribe(task_id, "other") as subscription, hub.subscribe() as to_all:
        hub.publish(event(task_id, 1))
        for reader in (subscription, to_all):
            last = {e.id: e.sequence for e in reader.take(timeout=0)}
            assert last[task_id] >= 2
            assert last["other"] >= 3
    assert hub.snapshot(task_id).sequence == last[task_id]


def test_closing_twice_and_using_it_wrongly(hub: Hub, task_id: str) -> None:
    subscription = hub.subscribe(task_id)
    with pytest.raises(RuntimeError, match="block"):
        subscription.take()
    subscription.close()
    with subscription:
        pass
    subscription.close()
    with pytest.raises(RuntimeError, match="once"), subscription:
        pass
    assert len(hub) == 0


def test_the_end_of_the_hub(hub: Hub, task_id: str) -> None:
    seen: dict[str, list[int]] = {}

    def read() -> None:
        with hub.subscribe(task_id) as subscription:
            ready.wait(LIMIT)
            seen["sync"] = sequences(list(subscription))

    async def aread() -> None:
        async with hub.subscribe(task_id) as subscription:
            ready.wait(LIMIT)
            seen["async"] = sequences([event async for event in subscription])

    ready = threading.Barrier(3)
    threads = [
        threading.Thread(target=read),
        threading.Thread(target=lambda: asyncio.run(aread())),
    ]
    for thread in threads:
        thread.start()
    ready.wait(LIMIT)
    hub.publish(event(task_id, 7))
    hub.end(timeout=LIMIT)
    # Readers receive an event that was published before end(), and end() waits until they have it.
    assert seen == {"sync": [7], "async": [7]}
    for thread in threads:
        thread.join(LIMIT)
    with hub.subscribe("other") as subscription:
        assert subscription.take() == []
        hub.end(timeout=0.01)  # end() waits at most `timeout` seconds.


def test_the_number_of_tasks_that_no_pool_keeps_is_bounded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latest, "UNKEPT_LIMIT", 3)
    kept = keep(hub, event("kept", 1))

    def known() -> set[str]:
        return {id for id in ["kept", "watched", *map(str, range(10)), "last"] if hub.snapshot(id)}

    with hub.subscribe("watched") as subscription:
        hub.publish(event("watched", 1))
        for number in range(10):
            hub.publish(event(str(number), 1))
        assert known() == {"kept", "watched", "8", "9"}
        assert sequences(subscription.take()) == [1]
        hub.publish(event("watched", 2, "finished"))
        assert sequences(subscription.take()) == [2]
    monkeypatch.setattr(latest, "UNKEPT_SECONDS", -1.0)
    hub.publish(event("last", 1))
    assert known() == {"kept"}
    hub.release(kept)
    hub.release(kept)
    assert len(hub) == 0


def test_one_publication_visits_few_tasks_to_forget_them(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    One publish() checks at most MAX_TRIMMED tasks, however many tasks with readers the hub has.

    The hub keeps tasks with readers even beyond UNKEPT_LIMIT, and their number must not slow
    publish() down.
    """
    visited: list[Topic] = []
    drop_or_keep = latest.Latest._drop_or_keep

    def count(self: latest.Latest, topic: Topic) -> None:
        visited.append(topic)
        drop_or_keep(self, topic)

    ids = [str(number) for number in range(5 * latest.MAX_TRIMMED)]
    with hub.subscribe(*ids):
        for id in ids:
            hub.publish(event(id, 1))
        monkeypatch.setattr(latest, "UNKEPT_LIMIT", 1)
        monkeypatch.setattr(latest.Latest, "_drop_or_keep", count)
        hub.publish(event(ids[0], 2))
        assert len(visited) == latest.MAX_TRIMMED


def test_a_subscription_still_gets_the_end_of_a_released_task(hub: Hub, task_id: str) -> None:
    topic = keep(hub, event(task_id, 1))
    with hub.subscribe(task_id) as subscription:
        hub.publish(event(task_id, 2, "finished"))
        hub.release(topic)
        assert sequences(list(subscription)) == [2]
    assert hub.snapshot(task_id) is None


def test_a_subscription_to_a_released_task_leaves_its_successor_alone(
    hub: Hub, task_id: str
) -> None:
    topic = keep(hub, event(task_id, 3))
    with hub.subscribe(task_id):
        hub.release(topic)
        keep(hub, event(task_id, 1))
    assert hub.snapshot(task_id).sequence == 1


@pytest.mark.parametrize("in_loop", [False, True])
async def test_the_unread_events_of_a_subscription_to_all_tasks_are_bounded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, in_loop: bool
) -> None:
    monkeypatch.setattr(mailbox, "UNREAD_LIMIT", 10)
    subscription = hub.subscribe()
    if in_loop:
        await subscription.__aenter__()
    else:
        subscription.__enter__()
    keep(hub, event("kept", 1))
    with hub.subscribe("0", "99") as some:
        for number in range(100):
            hub.release(keep(hub, event(str(number), 1, "finished")))
            await asyncio.sleep(0)
        assert [e.id for e in some] == ["0", "99"], "a subscription with ids misses nothing"
    hub.publish(event("kept", 2, "finished"))
    events = await subscription.atake() if in_loop else subscription.take()
    subscription.close()
    assert len(events) + subscription.missed == 101
    assert 5 <= len(events) <= 12
    assert (events[0].id, events[0].sequence) == ("kept", 2), "the hub has not released it"
    assert [e.id for e in events[-2:]] == ["98", "99"]


async def test_a_blocked_loop_does_not_collect_released_tasks_without_limit(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The hub drops the oldest unread events of released tasks while an event loop is blocked.

    The event loop does not run between the publications of this test, so it takes no events.
    """
    monkeypatch.setattr(mailbox, "UNREAD_LIMIT", 10)
    async with hub.subscribe() as to_all, hub.subscribe("0") as some:
        for number in range(100):
            hub.release(keep(hub, event(str(number), 1, "finished")))
        assert sequences(await some.atake(timeout=LIMIT)) == [1]
        events = await to_all.atake(timeout=LIMIT)
        assert len(events) + to_all.missed == 100
        assert events[-1].id == "99"
        assert len(events) <= 12


async def test_a_subscription_to_all_tasks_forgets_released_tasks(hub: Hub) -> None:
    async with hub.subscribe() as subscription:
        topic = keep(hub, event("a", 1, "finished"))
        await subscription.atake()
        reference = weakref.ref(topic)
        hub.release(topic)
        del topic
        gc.collect()
        assert reference() is None


def test_many_publishers_and_readers(hub: Hub) -> None:
    """In any interleaving of threads, each reader receives rising sequences and the last event."""
    ids = [f"task-{number}" for number in range(5)]
    seen: list[list[TaskEvent]] = []

    def publish(task_id: str) -> None:
        ready.wait(LIMIT)
        for number in range(1, 300):
            hub.publish(event(task_id, number))
        hub.publish(event(task_id, 300, "finished"))

    def read() -> None:
        with hub.subscribe(*ids) as subscription:
            ready.wait(LIMIT)
            seen.append(list(subscription))

    async def read_in_loop() -> None:
        async with hub.subscribe(*ids) as subscription:
            ready.wait(LIMIT)
            seen.append([event async for event in subscription])

    ready = threading.Barrier(15)
    threads = [threading.Thread(target=publish, args=(task_id,)) for task_id in ids]
    threads += [threading.Thread(target=read) for _ in range(5)]
    threads += [threading.Thread(target=lambda: asyncio.run(read_in_loop())) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(seen) == 10
    for events in seen:
        for task_id in ids:
            numbers = [event.sequence for event in events if event.id == task_id]
            assert numbers == sorted(set(numbers))
            assert numbers[-1] == 300
    wait_until(lambda: hub.statistics().event_loops == 0, "a mailbox was left")
