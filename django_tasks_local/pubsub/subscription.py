"""Subscription: the reader of the events of some tasks, or of all, in a thread or an event loop."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol, Self
from weakref import WeakKeyDictionary

from ..events import NO_VERSION
from .mailbox import drop_oldest_released, is_over_limit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, MutableMapping
    from types import TracebackType

    from ..events import TaskEvent, Version
    from .latest import Topic
    from .mailbox import Mailbox


class Switchboard(Protocol):
    """The hub, as subscriptions use it."""

    ended: bool

    def attach(self, subscription: Subscription, loop: asyncio.AbstractEventLoop | None) -> None:
        """Start a subscription."""

    def detach(self, subscription: Subscription) -> None:
        """End a subscription."""

    def __len__(self) -> int:
        """Return the number of tasks whose state the hub knows."""


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
        self._newest_topics: set[Topic] = set()
        self._is_closed = False
        self._waiters: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def ended(self) -> bool:
        """Whether no further event will come."""
        if self._hub.ended or self._is_closed:
            return True
        return bool(self.references) and not self._unfinished

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
        """Let a waiting atake() check for events. Called in the loop's thread."""
        for waiter in tuple(self._waiters):
            if not waiter.done():
                waiter.set_result(None)

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

    def reads(self, topic: Topic) -> bool:
        """Whether this topic is one of those that were named. Called from any thread."""
        if topic not in self._newest_topics:
            # A topic that waits for a task is replaced by the task's own.
            self._newest_topics = {named.newest for named in self.topics}
        return topic in self._newest_topics

    def trim_unread(self) -> None:
        """Drop the oldest unread events of released tasks if there are too many."""
        if is_over_limit(self.changed, self._hub):
            self.missed += drop_oldest_released(self.changed)

    def close(self) -> None:
        """Stop reading; a reader that waits gets an empty list. A second call has no effect."""
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
            # No lock is needed: a publisher that replaces the event afterwards marks the topic.
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
