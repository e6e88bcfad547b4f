"""Subscription reads the events of some tasks, or of all tasks, in a thread or an event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, Self
from weakref import WeakKeyDictionary

from ..clocks import Clocks
from ..events import NO_VERSION
from .mailbox import drop_oldest_released, is_over_limit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, MutableMapping
    from types import TracebackType

    from ..events import TaskEvent, Version
    from .latest import Topic
    from .mailbox import Mailbox


class Switchboard(Protocol):
    """Declares the attributes and methods of the hub that subscriptions use."""

    ended: bool

    def attach(self, subscription: Subscription, loop: asyncio.AbstractEventLoop | None) -> None:
        """Start a subscription in `loop`, or in the calling thread if `loop` is None."""

    def detach(self, subscription: Subscription) -> None:
        """End a subscription. Any thread may call this; a second call has no effect."""

    def __len__(self) -> int:
        """Return the number of tasks that the hub has, without awaited ids of unknown backends."""


class Subscription:
    """
    Reads the events of some tasks, or of all tasks of this process; see `hub.subscribe()`.

    It is a context manager and an iterator, both sync and async; use it in one thread, or in one
    event loop. It first returns the current state of its tasks, and later only the latest event of
    each task that has changed since the last read. A subscription with ids ends when it has
    returned the `finished` events of all these tasks. Each ends at close() and `hub.end()`.

    If a subscription to all tasks has unread events of over UNREAD_LIMIT more tasks than the hub,
    it drops the oldest unread events of tasks that the hub has released. `missed` counts them.
    """

    def __init__(self, hub: Switchboard, references: tuple[tuple[str | None, str], ...]) -> None:
        # Each reference is a backend alias, or None for a task of any backend, and an id.
        self.references = references
        self._dropped = 0  # by trim_unread(), in the thread that reads
        self.dropped_in_mailbox = 0  # by Mailbox, in a thread that publishes
        # Topics that may have an unread event. Only the reading thread or loop uses this dict.
        self.changed: dict[Topic, None] = {}
        # Hub.attach() sets the topics of `references`, and the mailbox that delivers their events.
        self.topics: list[Topic] = []
        self.mailbox: Mailbox | None = None
        self._hub = hub
        self._unfinished = dict.fromkeys(references)
        # The version of each topic's event that was read last. A subscription to all tasks may stay
        # open as long as the process, so its entry for a topic must vanish with the topic.
        self._seen: MutableMapping[Topic, Version] = {} if references else WeakKeyDictionary()
        self._newest_topics: set[Topic] = set()
        self._is_closed = False
        self._waiters: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def missed(self) -> int:
        """Return the number of tasks whose unread events were dropped."""
        # Two numbers, because two threads that add to the same one could lose an addition.
        return self._dropped + self.dropped_in_mailbox

    @property
    def ended(self) -> bool:
        """Return whether this subscription waits for no further event."""
        if self._hub.ended or self._is_closed:
            return True
        return bool(self.references) and not self._unfinished

    # Methods that read events in a thread

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
        deadline = None if timeout is None else Clocks.monotonic() + timeout
        while True:
            # Read before distribute(), so that events published before the end are returned first.
            has_ended = self.ended
            mailbox.distribute()
            events = self._collect()
            if events or has_ended or self.ended:
                return events
            left = None if deadline is None else deadline - Clocks.monotonic()
            if left is not None and left <= 0:
                return []
            mailbox.wait(left)

    def __iter__(self) -> Iterator[TaskEvent]:
        while events := self.take():
            yield from events

    # Methods that read events in an event loop

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
        """Do the same as take(), but wait in the running event loop instead of blocking it."""
        mailbox = self._attached()
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            if self._hub.ended:
                mailbox.deliver()  # Events that were published before the end are returned first.
            events = self._collect()
            if events or self.ended or (deadline is not None and loop.time() >= deadline):
                return events
            waiter = loop.create_future()
            self._waiters.add(waiter)
            if deadline is not None:
                self._wake_at(deadline, loop)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    async def __aiter__(self) -> AsyncIterator[TaskEvent]:
        while events := await self.atake():
            for event in events:
                yield event

    def resume(self) -> None:
        """Wake a waiting atake(), which then checks for events. The loop's thread calls this."""
        for waiter in tuple(self._waiters):
            if not waiter.done():
                waiter.set_result(None)

    def _wake_at(self, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        # A timer that fires earlier is kept: atake() then finds that its own deadline is later and
        # sets a new timer. Setting a timer for each event and subscription took a quarter of the
        # time that an event costs.
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = loop.call_at(deadline, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.resume()

    # Methods for readers in a thread and in an event loop

    def reads(self, topic: Topic) -> bool:
        """Return whether this topic belongs to one of `references`. Any thread may call this."""
        newest = self._newest_topics
        if topic not in newest:
            # `topics` may have a placeholder of an id without a task (Latest.find_or_await()). At
            # the first event of the task its own topic replaces the placeholder. This method
            # returns an answer from its own set, because another thread may concurrently replace
            # `_newest_topics` with an older one.
            self._newest_topics = newest = {named.newest for named in self.topics}
        return topic in newest

    def trim_unread(self) -> None:
        """Drop the oldest unread events of released tasks if UNREAD_LIMIT is exceeded."""
        if is_over_limit(self.changed, self._hub):
            self._dropped += drop_oldest_released(self.changed)

    def close(self) -> None:
        """End this subscription and wake a waiting reader. A second call has no effect."""
        self._is_closed = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
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
            # No lock is needed: a publisher that replaces the event after this read marks the topic
            # again.
            event = topic.event
            if event is None or (version := event.version) <= self._seen.get(topic, NO_VERSION):
                continue
            if self.references and not self.reads(topic):
                continue  # A task of another backend has the same id.
            self._seen[topic] = version
            if event.is_last:
                self._unfinished.pop((event.backend, event.id), None)
                self._unfinished.pop((None, event.id), None)
            events.append(event)
        return events
