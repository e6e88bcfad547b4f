"""Mailbox brings changed topics from publishers to the subscriptions of one loop or thread."""

from __future__ import annotations

import asyncio
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from ..waiting import limit_wait

if TYPE_CHECKING:
    from collections.abc import Container, Sized

    from .latest import Topic

# A subscription to all tasks may have unread events of this many tasks more than the hub keeps.
# Beyond this limit it drops unread events of tasks that the hub has released.
UNREAD_LIMIT = 10_000  # tasks


class Subscriber(Protocol):
    """Declares the attributes and methods of a subscription that its mailbox uses."""

    references: tuple[tuple[str | None, str], ...]
    changed: dict[Topic, None]
    dropped_in_mailbox: int

    def reads(self, topic: Topic) -> bool:
        """Return whether this topic belongs to one of the subscription's `references`."""

    def resume(self) -> None:
        """Wake a waiting atake(), which then checks for events."""

    def trim_unread(self) -> None:
        """Drop the oldest unread events of released tasks if UNREAD_LIMIT is exceeded."""


class Switchboard(Protocol):
    """Declares the attributes and methods of the hub that mailboxes use."""

    ended: bool

    def drop(self, mailbox: Mailbox) -> None:
        """End the subscriptions of this mailbox, whose event loop is closed."""

    def __len__(self) -> int:
        """Return the number of tasks that the hub has, without awaited ids of unknown backends."""


class Mailbox:
    """
    Holds the subscriptions of one event loop, or of one reading thread, and their changed topics.

    No method waits for a lock, because a finalizer may publish an event, and so need a mailbox,
    while its thread runs a method of the same mailbox. Instead each change of a dictionary is one
    atomic operation, and only the thread of the loop adds and removes subscriptions. A dictionary
    that another thread may change is copied with list(), which is atomic without a GIL too;
    tuple() is not.
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
        # The thread in _trim() holds this lock; other threads skip trimming instead of waiting.
        self._trimming = threading.Lock()

    # Methods that any thread may call

    def mark(self, topic: Topic) -> bool:
        """Record that a topic has a later event; return whether the caller must call wake()."""
        self._changed[topic] = None
        if self.to_all and is_over_limit(self._changed, self._hub):
            self._trim()
        # distribute() resets the flag before it copies `_changed`. So if the flag is set at this
        # point, the pending distribute() finds the topic. A closed loop never runs a pending
        # callback; then the caller calls wake(), which drops the loop's subscriptions.
        if self._is_wake_pending and not (self.loop and self.loop.is_closed()):
            return False
        self._is_wake_pending = True
        return True

    def wake(self) -> None:
        """Wake the reading thread, or schedule deliver() in the loop. The caller holds no lock."""
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
                for subscription in list(self.to_all):
                    subscription.dropped_in_mailbox += dropped  # `_trimming` guards this sum.
            finally:
                self._trimming.release()

    # Methods that the reading thread or the thread of the loop calls

    def is_free(self) -> bool:
        """Return whether the calling thread may remove a subscription now, without a callback."""
        if self.loop is None:
            # A reading thread has the only subscription of its mailbox; no other thread uses it.
            return True
        try:
            return asyncio.get_running_loop() is self.loop and not self._is_adding
        except RuntimeError:
            return False

    def add(self, subscription: Subscriber) -> None:
        """Add a subscription, to which distribute() then passes its changed topics."""
        # A finalizer may close another subscription while the lines below run. Because of this
        # flag detach() then schedules a callback instead of changing the same dictionaries.
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
        """Undo add() for this subscription. A second call has no effect."""
        self.subscriptions.pop(subscription, None)
        self.to_all.pop(subscription, None)
        for _, id in subscription.references:
            readers = self.by_id.get(id)
            if readers is not None:
                readers.pop(subscription, None)
                if not readers:
                    self.by_id.pop(id, None)

    def reads(self, topic: Topic) -> bool:
        """Return whether a subscription of this mailbox names this topic's task by its id."""
        return any(subscription.reads(topic) for subscription in list(self.by_id.get(topic.id, ())))

    def wait(self, timeout: float | None) -> None:
        """Wait until another thread calls wake(); limit_wait(timeout) is the longest wait."""
        try:
            self._wake_up.get(timeout=limit_wait(timeout))
        except Empty:
            return

    def deliver(self) -> None:
        """Pass the changed topics to the subscriptions and wake those that have any."""
        for subscription in self.distribute():
            subscription.resume()

    def distribute(self) -> dict[Subscriber, None]:
        """
        Pass the changed topics to the subscriptions; return those that must be resumed.

        These are the subscriptions with a changed topic or, after the hub has ended, all.
        """
        self._is_wake_pending = False
        # A dict keeps subscriptions with the same event adjacent. They are resumed one after the
        # other, so that the encoded bytes of this event are reused for all of them.
        woken: dict[Subscriber, None] = {}
        for topic in self._take_changed():
            for subscription in (*self.by_id.get(topic.id, ()), *self.to_all):
                subscription.changed[topic] = None
                woken[subscription] = None
        for subscription in list(self.to_all):
            subscription.trim_unread()
        return dict.fromkeys(self.subscriptions) if self._hub.ended else woken

    def _take_changed(self) -> list[Topic]:
        # The copy and mark() lock the dictionary, also without a GIL: a publisher that adds a topic
        # after the copy reads that `_is_wake_pending` was reset. len() would order nothing.
        changed = list(self._changed)
        # The topics are removed one by one: if a new dictionary replaced `_changed`, a publisher in
        # another thread could still add a topic to the old one, and that topic would be lost. A
        # topic that is added again before its removal is in the copy, and its event is read later.
        for topic in changed:
            self._changed.pop(topic, None)
        return changed


def is_over_limit(changed: dict[Topic, None], hub: Sized) -> bool:
    """
    Return whether `changed` has over UNREAD_LIMIT more topics than the hub.

    Then the hub has released over UNREAD_LIMIT of these topics.
    """
    return len(changed) > len(hub) + UNREAD_LIMIT


def drop_oldest_released(changed: dict[Topic, None], *, keep: Container[str] = ()) -> int:
    """
    Drop all but the UNREAD_LIMIT / 2 newest topics that the hub has released.

    Returns the number of dropped topics. One call drops half of the limit, so that this scan of all
    topics is rarely needed. Topics whose id is in `keep` are not dropped.
    """
    released = [topic for topic in list(changed) if topic.is_gone and topic.id not in keep]
    surplus = released[: max(0, len(released) - UNREAD_LIMIT // 2)]
    return sum(changed.pop(topic, topic) is None for topic in surplus)
