"""
Hypothesis compares the hub with a model in any order of publish, subscribe, take, close and end.
"""

import asyncio
from dataclasses import dataclass, field

import pytest
from django.tasks import TaskResultStatus
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
)

from django_tasks_local.events import NO_VERSION, TaskEvent, Version
from django_tasks_local.hub import Hub
from django_tasks_local.pubsub import latest
from django_tasks_local.pubsub.subscription import Subscription
from tests.support import factories
from tests.support.state_machines import SHRINK_TIMEOUT, run_machine

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


@dataclass(eq=False)
class Life:
    """
    The model of a task that the hub knows, from its first event or subscription to its release.

    If the hub has forgotten an id, a later event with this id begins another Life.
    """

    id: str
    event: TaskEvent | None = None
    kept: bool = False


@dataclass(eq=False)
class Reader:
    """
    The model of a subscription: its tasks, and the version of the last event it received of each.
    """

    subscription: Subscription
    is_async: bool
    named: bool
    lives: list[Life]
    seen: dict[Life, Version] = field(default_factory=dict)

    @property
    def unread(self) -> dict[TaskEvent, Life]:
        """
        Return the latest event of each task whose latest event this subscription has not received.
        """
        return {
            life.event: life
            for life in self.lives
            if life.event is not None and life.event.version > self.seen.get(life, NO_VERSION)
        }

    @property
    def ended(self) -> bool:
        """
        Return whether this subscription has received the last event of each task that it names.
        """
        return self.named and all(
            life.event is not None and life.event.is_last and life in self.seen
            for life in self.lives
        )


def event_of(
    id: str, sequence: int, position: int | None = None, is_last: bool = False
) -> TaskEvent:
    kind = "enqueued" if sequence == 1 else "progress"
    return factories.event(id, sequence, "finished" if is_last else kind, position=position)


LIMIT = 2  # The hub may keep this many tasks that no pool keeps and no subscription reads.
rarely = st.integers(0, 5).map(lambda number: number == 5)


class HubMachine(RuleBasedStateMachine):
    """
    Each subscription receives the latest event of each task; the hub forgets tasks without use.

    A task has no use if no pool keeps it and no subscription reads it. Versions of a task's events
    rise.
    """

    readers = Bundle("readers")
    ids = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(latest, "UNKEPT_LIMIT", LIMIT)
        self.hub = Hub()
        self.loop = asyncio.new_event_loop()
        self.lives: dict[str, Life] = {}
        self.open: list[Reader] = []

    def life(self, id: str) -> Life:
        """
        Return the current Life of this id; create one if the id is new or the hub has forgotten it.
        """
        if id not in self.lives:
            self.lives[id] = Life(id)
            for reader in self.open:
                if not reader.named:
                    reader.lives.append(self.lives[id])
        return self.lives[id]

    def is_read(self, life: Life) -> bool:
        return any(reader.named and life in reader.lives for reader in self.open)

    def forget(self) -> None:
        """
        Remove from the model the tasks that the hub has forgotten; fail if a pool keeps such a task
        or a subscription reads such a task.
        """
        for id, life in list(self.lives.items()):
            if self.hub.snapshot(id) is not life.event:
                assert self.hub.snapshot(id) is None
                assert not life.kept
                assert not self.is_read(life)
            if self.hub.snapshot(id) is None and not self.is_read(life):
                del self.lives[id]

    @rule(
        id=ids,
        sequence=st.integers(1, 5),
        position=st.none() | st.integers(0, 3),
        is_last=rarely,
        keep=rarely,
    )
    def publish(
        self, id: str, sequence: int, position: int | None, is_last: bool, keep: bool
    ) -> None:
        event = event_of(id, sequence, position if sequence == 1 else None, is_last)
        life = self.life(id)
        known = life.event
        later = known is None or (not known.is_last and event.version > known.version)
        assert self.hub.publish(event, keep=keep) == later
        if later:
            life.event = event
            life.kept = life.kept or keep
        self.forget()
        if later and not life.kept:
            unkept = [other for other in self.lives.values() if not other.kept]
            assert len([other for other in unkept if not self.is_read(other)]) <= LIMIT

    @rule(id=ids)
    def release(self, id: str) -> None:
        topic = self.hub.find(id)
        if id in self.lives and self.is_read(self.lives[id]):
            # In production ids are unique, so a subscription need not distinguish two tasks with
            # one id.
            return
        if topic is not None:
            self.hub.release(topic)
            self.lives.pop(id, None)
        assert self.hub.snapshot(id) is None

    @rule(target=readers, ids=st.lists(ids, max_size=3), is_async=st.booleans())
    def subscribe(self, ids: list[str], is_async: bool) -> Reader:
        if is_async and not ids:
            # A subscription to all tasks also receives events, even of released tasks, that its
            # event loop has not yet delivered, so let the loop deliver them first.
            self.loop.run_until_complete(asyncio.sleep(0))
        subscription = self.hub.subscribe(*ids)
        lives = [self.life(id) for id in dict.fromkeys(ids)] if ids else list(self.lives.values())
        if is_async:
            self.hub.attach(subscription, self.loop)  # as `async with` does
        else:
            subscription.__enter__()
        reader = Reader(subscription, is_async, bool(ids), lives)
        self.open.append(reader)
        return reader

    @rule(reader=readers, delivered=st.booleans())
    def take(self, reader: Reader, delivered: bool) -> None:
        if reader in self.open:
            self.check(reader, delivered)

    def check(self, reader: Reader, delivered: bool = True) -> None:
        """
        Read all events and compare them with the model.

        An async subscription may miss events if `delivered` is False, because its event loop did
        not run.
        """
        unread = reader.unread
        if not reader.is_async:
            events = reader.subscription.take(timeout=0)
        elif delivered:
            events = self.loop.run_until_complete(reader.subscription.atake(timeout=0))
        else:
            events = reader.subscription._collect()  # as atake() does without a wait
        assert len(events) == len(set(events))
        for event in events:
            reader.seen[unread[event]] = event.version
        if delivered or not reader.is_async:
            assert not reader.unread
            assert reader.subscription.ended == (self.hub.ended or reader.ended)

    @rule(reader=readers)
    def close(self, reader: Reader) -> None:
        reader.subscription.close()
        self.loop.run_until_complete(asyncio.sleep(0))  # lets the loop remove closed readers
        if reader in self.open:
            self.open.remove(reader)
        self.forget()

    @rule()
    def close_the_loop(self) -> None:
        """
        Close the event loop: the next event for one of its subscriptions makes the hub drop them
        all.
        """
        self.loop.close()
        self.loop = asyncio.new_event_loop()
        gone = [reader for reader in self.open if reader.is_async]
        for life in [life for reader in gone for life in reader.lives]:
            is_over = life.event is not None and life.event.is_last
            if self.lives.get(life.id) is life and not is_over:
                sequence = 1 if life.event is None else life.event.sequence + 1
                life.event = event_of(life.id, sequence)
                assert self.hub.publish(life.event)
                assert self.hub.statistics().event_loops == 0
                break
        for reader in gone:
            reader.subscription.close()  # has no effect if the hub has removed them
            self.open.remove(reader)
        self.forget()

    @precondition(lambda self: len(self.open) > 1)
    @rule()
    def end(self) -> None:
        self.hub.end()

    @invariant()
    def the_hub_knows_what_the_model_knows(self) -> None:
        assert {id: self.hub.snapshot(id) for id in self.lives} == {
            id: life.event for id, life in self.lives.items()
        }
        assert len(self.hub) == sum(life.event is not None for life in self.lives.values())

    def teardown(self) -> None:
        try:
            for reader in list(self.open):
                self.check(reader)
                reader.subscription.close()
            self.loop.run_until_complete(asyncio.sleep(0))  # lets the loop remove closed readers
            assert not self.hub.to_all
            assert self.hub.statistics().event_loops == 0
            for id in list(self.lives):
                if (topic := self.hub.find(id)) is not None:
                    self.hub.release(topic)
            assert len(self.hub) == 0
        finally:
            self.loop.close()
            self.patch.undo()


@SHRINK_TIMEOUT
def test_any_interleaving() -> None:
    run_machine(HubMachine)
