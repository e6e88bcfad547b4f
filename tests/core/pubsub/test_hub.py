"""The hub: order, coalescing, wake-ups, what is kept and what is let go."""

import asyncio
import gc
import threading
import uuid
import weakref
from typing import Any

import pytest

from django_tasks_local import hub as hub_module
from django_tasks_local.events import TaskEvent
from django_tasks_local.hub import Hub
from tests.support.factories import event
from tests.support.waiting import LIMIT, wait_until


@pytest.fixture
def hub() -> Hub:
    return Hub()


@pytest.fixture
def task_id() -> str:
    return uuid.uuid4().hex


def sequences(events: list[TaskEvent]) -> list[int]:
    return [event.sequence for event in events]


def test_the_present_state_comes_first(hub: Hub, task_id: str) -> None:
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
    """Among events with one sequence the one with fewer tasks before it is later."""
    assert hub.publish(event(task_id, 1, "enqueued", position=3), hold=True)
    with hub.subscribe(task_id) as subscription, hub.subscribe() as everything:
        readers = (subscription, everything)
        assert [[e.position for e in reader.take(timeout=0)] for reader in readers] == [[3], [3]]
        assert hub.amend(event(task_id, 1, "enqueued", position=1))
        for stale in (2, 1, None):
            assert not hub.amend(event(task_id, 1, "enqueued", position=stale))
            assert not hub.publish(event(task_id, 1, "enqueued", position=stale))
        assert [[e.position for e in reader.take(timeout=0)] for reader in readers] == [[1], [1]]
        assert hub.publish(event(task_id, 2, "started"))
        assert not hub.amend(event(task_id, 1, "enqueued", position=0))
    assert not hub.amend(event("unknown", 1, "enqueued", position=0))
    assert hub.snapshot("unknown") is None


def test_it_ends_when_all_its_tasks_are_finished(hub: Hub) -> None:
    hub.publish(event("a", 1))
    with hub.subscribe("a", "b", "a") as subscription:
        hub.publish(event("a", 2, "finished"))
        hub.publish(event("b", 1))
        hub.publish(event("b", 2, "finished"))
        assert [(e.id, e.sequence) for e in subscription] == [("a", 2), ("b", 2)]
        assert subscription.ended
        assert subscription.take() == []


def test_an_unknown_id_is_waited_for(hub: Hub, task_id: str) -> None:
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
    """Whatever time an earlier wait, which an event has ended, would have had."""
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


async def test_everything(hub: Hub) -> None:
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


async def test_one_wake_up_for_all_readers_of_a_loop(
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
    assert hub._channels
    assert hub.publish(event(task_id, 1))
    assert not hub._channels
    assert not hub.everything
    assert hub.publish(event(task_id, 2))


def test_a_loop_that_was_closed_before_it_woke_up(hub: Hub, task_id: str) -> None:
    async def subscribe() -> None:
        await hub.subscribe(task_id).__aenter__()
        await hub.subscribe().__aenter__()
        hub.publish(event(task_id, 1))
        asyncio.get_running_loop().stop()  # and does not come to what the hub has scheduled

    loop = asyncio.new_event_loop()
    task = loop.create_task(subscribe())
    loop.run_forever()
    assert task.done()
    loop.close()
    hub.publish(event("other", 1))
    assert not hub._channels
    assert not hub.everything


def test_a_reader_that_is_closed_in_the_midst_of_something(hub: Hub, task_id: str) -> None:
    """As the garbage collector may do it, in a thread that has the lock just then."""
    with hub.subscribe(task_id) as subscription:
        with hub.lock:
            subscription.close()
        assert not hub._open
        subscription.close()


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
    assert not hub._cells


def test_end(hub: Hub, task_id: str) -> None:
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
    # What was published before the end comes before the end, which waits until it was read.
    assert seen == {"sync": [7], "async": [7]}
    for thread in threads:
        thread.join(LIMIT)
    with hub.subscribe("other") as subscription:
        assert subscription.take() == []
        hub.end(timeout=0.01)  # It does not wait for ever.


def test_unheld_tasks_are_bounded(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "UNHELD_LIMIT", 3)
    hub.publish(event("held", 1), hold=True)
    with hub.subscribe("watched") as subscription:
        hub.publish(event("watched", 1))
        for number in range(10):
            hub.publish(event(str(number), 1))
        assert set(hub._cells) == {"held", "watched", "8", "9"}
        assert sequences(subscription.take()) == [1]
        hub.publish(event("watched", 2, "finished"))
        assert sequences(subscription.take()) == [2]
    monkeypatch.setattr(hub_module, "UNHELD_AGE", -1.0)
    hub.publish(event("last", 1))
    assert set(hub._cells) == {"held"}
    hub.release("held")
    hub.release("held")
    assert not hub._cells


def test_a_reader_still_gets_the_end_of_a_task_that_was_released(hub: Hub, task_id: str) -> None:
    hub.publish(event(task_id, 1), hold=True)
    with hub.subscribe(task_id) as subscription:
        hub.publish(event(task_id, 2, "finished"))
        hub.release(task_id)
        assert sequences(list(subscription)) == [2]
    assert hub.snapshot(task_id) is None


def test_a_reader_of_a_task_that_was_released_leaves_the_next_alone(hub: Hub, task_id: str) -> None:
    with hub.subscribe(task_id):
        hub.release(task_id)
        hub.publish(event(task_id, 1), hold=True)
    assert hub.snapshot(task_id).sequence == 1


def test_what_comes_after_the_release_is_dropped(hub: Hub, task_id: str) -> None:
    hub.publish(event(task_id, 1), hold=True)
    assert hub.amend(event(task_id, 2))
    assert not hub.amend(event(task_id, 2))
    hub.amend(event(task_id, 4, "finished"))
    hub.release(task_id)
    with hub.subscribe(task_id) as subscription:
        assert not hub.amend(event(task_id, 3))
        assert subscription.take(timeout=0) == []
    assert not hub._cells


@pytest.mark.parametrize("in_loop", [False, True])
async def test_what_a_reader_of_everything_leaves_unread_is_bounded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, in_loop: bool
) -> None:
    monkeypatch.setattr(hub_module, "UNREAD_LIMIT", 10)
    subscription = hub.subscribe()
    if in_loop:
        await subscription.__aenter__()
    else:
        subscription.__enter__()
    hub.publish(event("kept", 1), hold=True)
    with hub.subscribe("0", "99") as some:
        for number in range(100):
            hub.publish(event(str(number), 1, "finished"), hold=True)
            hub.release(str(number))
            await asyncio.sleep(0)
        assert [e.id for e in some] == ["0", "99"], "who has named a task misses nothing"
    hub.amend(event("kept", 2, "finished"))
    events = await subscription.atake() if in_loop else subscription.take()
    subscription.close()
    assert len(events) + subscription.missed == 101
    assert 5 <= len(events) <= 12
    assert (events[0].id, events[0].sequence) == ("kept", 2), "the hub knows it still"
    assert [e.id for e in events[-2:]] == ["98", "99"]


async def test_a_reader_of_everything_forgets_released_tasks(hub: Hub) -> None:
    async with hub.subscribe() as subscription:
        hub.publish(event("a", 1, "finished"), hold=True)
        await subscription.atake()
        cell = weakref.ref(hub._cells["a"])
        hub.release("a")
        gc.collect()
        assert cell() is None


def test_many_publishers_and_readers(hub: Hub) -> None:
    """Every reader sees rising sequences and the last event, whatever the interleaving."""
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
    wait_until(lambda: not hub._channels, "a channel was left")
