"""The way from a changed topic to a subscriber: mailboxes and subscriptions."""

from __future__ import annotations

import asyncio
import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, Self
from weakref import WeakKeyDictionary

from ..events import NO_VERSION

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Container, Iterator, MutableMapping
    from types import TracebackType

    from ..events import TaskEvent, Version
    from .latest import Topic

# Unread events that a subscription to all tasks may have of tasks that the hub has released.
UNREAD_LIMIT = 10_000  # tasks


class Switchboard(Protocol):
    """The hub, as mailboxes and subscriptions use it."""

    ended: bool

    def attach(self, subscription: Subscription, loop: asyncio.AbstractEventLoop | None) -> None:
        """Start a subscription."""

    def detach(self, subscription: Subscription) -> None:
        """End a subscription."""

    def __len__(self) -> int:
        """Return the number of tasks whose state the hub knows."""


class Mailbox:
    """
    The subscriptions of one event loop, or of one reading thread, and their changed topics.

    It has no lock, because a publisher calls mark() with a topic's lock, and a finalizer may need
    that lock while its thread is in here. Each change of a dictionary is a single step. Only the
    thread of the loop adds and removes subscriptions.
    """

    def __init__(self, hub: Switchboard, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.subscriptions: dict[Subscription, None] = {}
        self.by_id: dict[str, dict[Subscription, None]] = {}
        self.to_all: dict[Subscription, None] = {}
        self._hub = hub
        self._is_adding = False
        # A SimpleQueue, because its put() is the one wake-up that a finalizer may call at any
        # point (documentation of `queue`, "SimpleQueue Objects").
        self._wake_up: SimpleQueue[None] = SimpleQueue()
        self._changed: dict[Topic, None] = {}
        self._is_wake_pending = False
        # At most one thread trims; others skip trimming instead of waiting.
        self._trimming = threading.Lock()

    # Called from any thread

    def mark(self, topic: Topic) -> bool:
        """
        Note that a topic has a later event; return whether the caller must call wake().

        The caller has the topic's lock.
        """
        self._changed[topic] = None
        if self.to_all and is_over_limit(self._changed, self._hub):
            self._trim()
        # distribute() resets the flag before it empties `_changed`. So if the flag is set here,
        # distribute() finds the topic. A closed loop never runs a pending callback; wake() finds
        # that out.
        if self._is_wake_pending and not (self.loop and self.loop.is_closed()):
            return False
        self._is_wake_pending = True
        return True

    def wake(self) -> None:
        """Wake the reader. The caller should hold no lock."""
        if self.loop is None:
            self._wake_up.put(None)
            return
        try:
            self.loop.call_soon_threadsafe(self.deliver)
        except RuntimeError:
            # The event loop is closed; drop its subscriptions. This is normal at shutdown.
            for subscription in list(self.subscriptions):
                self._hub.detach(subscription)

    def _trim(self) -> None:
        if self._trimming.acquire(blocking=False):
            try:
                dropped = drop_oldest_released(self._changed, keep=self.by_id)
                for subscription in tuple(self.to_all):
                    subscription.missed += dropped
            finally:
                self._trimming.release()

    # Called in the reading thread, or in the thread of the loop

    def is_free(self) -> bool:
        """Whether the calling thread may remove a subscription now, without a callback."""
        if self.loop is None:
            return True  # The mailbox has no other subscription.
        try:
            return asyncio.get_running_loop() is self.loop and not self._is_adding
        except RuntimeError:
            return False

    def add(self, subscription: Subscription) -> None:
        """Deliver to this subscription."""
        # A finalizer may close another subscription while a line below runs. The flag defers it.
        self._is_adding = True
        try:
            self.subscriptions[subscription] = None
            if not subscription.references:
                self.to_all[subscription] = None
            for _, id in subscription.references:
                self.by_id.setdefault(id, {})[subscription] = None
        finally:
            self._is_adding = False

    def remove(self, subscription: Subscription) -> None:
        """Undo add(). A second call has no effect."""
        self.subscriptions.pop(subscription, None)
        self.to_all.pop(subscription, None)
        for _, id in subscription.references:
            readers = self.by_id.get(id)
            if readers is not None:
                readers.pop(subscription, None)
                if not readers:
                    self.by_id.pop(id, None)

    def wait(self, timeout: float | None) -> None:
        """Wait for wake(), at most `timeout` seconds."""
        try:
            self._wake_up.get(timeout=timeout)
        except Empty:
            return

    def deliver(self) -> None:
        """Hand the changed topics to the subscriptions and resume them."""
        for subscription in self.distribute():
            subscription.resume()

    def distribute(self) -> dict[Subscription, None]:
        """Hand the changed topics to the subscriptions; return those that have something to do."""
        self._is_wake_pending = False
        # A dict keeps subscriptions with the same event adjacent, so that the bytes of one encoded
        # event are written to all of them one after the other.
        woken: dict[Subscription, None] = {}
        for topic in self._take_changed():
            for subscription in (*self.by_id.get(topic.id, ()), *self.to_all):
                subscription.changed[topic] = None
                woken[subscription] = None
        for subscription in tuple(self.to_all):
            subscription.trim_unread()
        return dict.fromkeys(self.subscriptions) if self._hub.ended else woken

    def _take_changed(self) -> list[Topic]:
        # One by one, because a publisher in another thread may still hold the dictionary.
        changed = []
        while self._changed:
            try:
                changed.append(self._changed.popitem()[0])
            except KeyError:  # Another thread has trimmed it in between.
                break
        changed.reverse()
        return changed


def is_over_limit(changed: dict[Topic, None], hub: Switchboard) -> bool:
    """Whether more than UNREAD_LIMIT of these topics were released by the hub."""
    return len(changed) > len(hub) + UNREAD_LIMIT


def drop_oldest_released(changed: dict[Topic, None], *, keep: Container[str] = ()) -> int:
    """
    Drop the oldest topics that the hub has released, except UNREAD_LIMIT / 2; return how many.

    So many at once, so that the scan is rare. Topics whose id is in `keep` stay.
    """
    released = [topic for topic in list(changed) if topic.is_gone and topic.id not in keep]
    surplus = released[: max(0, len(released) - UNREAD_LIMIT // 2)]
    return sum(changed.pop(topic, topic) is None for topic in surplus)


class Subscription:
    """
    A reader of some tasks, or of all tasks of this process. Created by `hub.subscribe()`.

    A context manager and an iterator, both sync and async; use it in one thread, or in one event
    loop. The current state of every task comes first. Between two reads only the latest event of
    each task is kept. With ids it ends when each of these tasks is finished; without, never.

    A subscription to all tasks keeps at most UNREAD_LIMIT unread events of tasks that the hub has
    already released. `missed` counts the tasks whose last event was dropped for that reason.
    """

    def __init__(self, hub: Switchboard, references: tuple[tuple[str | None, str], ...]) -> None:
        self.references = references  # backend alias, or None for any, and id
        self.missed = 0
        # Topics with an event that has not been read. Only the reading thread or loop touches it.
        self.changed: dict[Topic, None] = {}
        # Set by the hub: the topics of `references`, and where they are delivered.
        self.topics: list[Topic] = []
        self.mailbox: Mailbox | None = None
        self._hub = hub
        self._unfinished = dict.fromkeys(references)
        # The version that was read last. A subscription to all tasks never ends, so its memory of a
        # task must end with the task.
        self._seen: MutableMapping[Topic, Version] = {} if references else WeakKeyDictionary()
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Whether no further event will come."""
        return self._hub.ended or (bool(self.references) and not self._unfinished)

    # Reading in a thread

    def __enter__(self) -> Self:
        self._hub.attach(self, None)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def take(self, timeout: float | None = None) -> list[TaskEvent]:
        """
        Return the latest event of each changed task; wait for one at most `timeout` seconds.

        An empty list means that the time is up or that the subscription has ended.
        """
        mailbox = self._attached()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            has_ended = self.ended  # read first: events published before the end come before it
            mailbox.distribute()
            events = self._collect()
            if events or has_ended or self.ended:
                return events
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return []
            mailbox.wait(left)

    def __iter__(self) -> Iterator[TaskEvent]:
        while events := self.take():
            yield from events

    # Reading in an event loop

    async def __aenter__(self) -> Self:
        self._hub.attach(self, asyncio.get_running_loop())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def atake(self, timeout: float | None = None) -> list[TaskEvent]:
        """See take()."""
        mailbox = self._attached()
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            if self._hub.ended:
                mailbox.deliver()  # Events that were published before the end come before it.
            events = self._collect()
            if events or self.ended or (deadline is not None and loop.time() >= deadline):
                return events
            self._waiter = loop.create_future()
            if deadline is not None:
                self._wake_at(deadline, loop)
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def __aiter__(self) -> AsyncIterator[TaskEvent]:
        while events := await self.atake():
            for event in events:
                yield event

    def resume(self) -> None:
        """Let a waiting atake() check for events. Called in the loop's thread."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wake_at(self, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        # An earlier timer stays: when it fires, atake() checks and sets the next one. A timer for
        # each event and subscription was a quarter of the cost of an event.
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.resume()

    # Both

    def trim_unread(self) -> None:
        """Drop the oldest unread events of released tasks if there are too many."""
        if is_over_limit(self.changed, self._hub):
            self.missed += drop_oldest_released(self.changed)

    def close(self) -> None:
        """Stop reading. A second call has no effect."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._hub.detach(self)

    def _attached(self) -> Mailbox:
        if self.mailbox is None:
            raise RuntimeError("Use a subscription in a `with` or an `async with` block.")
        return self.mailbox

    def _collect(self) -> list[TaskEvent]:
        events: list[TaskEvent] = []
        if not self.changed:
            return events
        changed, self.changed = self.changed, {}
        for topic in changed:
            # No lock is needed: a publisher that replaces the event afterwards marks the topic.
            event = topic.event
            if event is None or (version := event.version) <= self._seen.get(topic, NO_VERSION):
                continue
            if self.references and not self._names(event):
                continue  # A task of another backend has the same id.
            self._seen[topic] = version
            if event.is_last:
                self._unfinished.pop((event.backend, event.id), None)
                self._unfinished.pop((None, event.id), None)
            events.append(event)
        return events

    def _names(self, event: TaskEvent) -> bool:
        return (event.backend, event.id) in self.references or (None, event.id) in self.references
