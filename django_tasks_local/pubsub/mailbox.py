"""The changed topics of one event loop, or of one reading thread, on their way to subscriptions."""

from __future__ import annotations

import asyncio
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Container, Sized

    from .latest import Topic

# Unread events that a subscription to all tasks may have of tasks that the hub has released.
UNREAD_LIMIT = 10_000  # tasks


class Subscriber(Protocol):
    """A subscription, as its mailbox uses it."""

    references: tuple[tuple[str | None, str], ...]
    changed: dict[Topic, None]
    missed: int

    def reads(self, topic: Topic) -> bool:
        """Whether this topic is one of those that were named."""

    def resume(self) -> None:
        """Let a waiting reader check for events."""

    def trim_unread(self) -> None:
        """Drop the oldest unread events of released tasks if there are too many."""


class Switchboard(Protocol):
    """The hub, as mailboxes use it."""

    ended: bool

    def drop(self, mailbox: Mailbox) -> None:
        """End the subscriptions of an event loop that is closed."""

    def __len__(self) -> int:
        """Return the number of tasks whose state the hub knows."""


class Mailbox:
    """
    The subscriptions of one event loop, or of one reading thread, and their changed topics.

    It has no lock, because a finalizer may need the lock of a task while its thread is in here.
    Each change of a dictionary is a single step. Only the thread of the loop adds and removes
    subscriptions.
    """

    def __init__(self, hub: Switchboard, loop: asyncio.AbstractEventLoop | None) -> None:
        self.loop = loop
        self.subscriptions: dict[Subscriber, None] = {}
        self.by_id: dict[str, dict[Subscriber, None]] = {}
        self.to_all: dict[Subscriber, None] = {}
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
            self._hub.drop(self)

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

    def add(self, subscription: Subscriber) -> None:
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

    def remove(self, subscription: Subscriber) -> None:
        """Undo add(). A second call has no effect."""
        self.subscriptions.pop(subscription, None)
        self.to_all.pop(subscription, None)
        for _, id in subscription.references:
            readers = self.by_id.get(id)
            if readers is not None:
                readers.pop(subscription, None)
                if not readers:
                    self.by_id.pop(id, None)

    def reads(self, topic: Topic) -> bool:
        """Whether a subscription with ids reads this topic."""
        return any(
            subscription.reads(topic) for subscription in tuple(self.by_id.get(topic.id, ()))
        )

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

    def distribute(self) -> dict[Subscriber, None]:
        """Hand the changed topics to the subscriptions; return those that have something to do."""
        self._is_wake_pending = False
        # A dict keeps subscriptions with the same event adjacent, so that the bytes of one encoded
        # event are written to all of them one after the other.
        woken: dict[Subscriber, None] = {}
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


def is_over_limit(changed: dict[Topic, None], hub: Sized) -> bool:
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
