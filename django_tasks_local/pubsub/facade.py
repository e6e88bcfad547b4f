"""Hub is the public interface of this package; any thread may call its methods."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..aliases import task_reference
from ..forking import reset_in_child
from .latest import Latest, Topic
from .mailbox import Mailbox
from .subscription import Subscription

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from ..events import TaskEvent

    type Recorder = Callable[[TaskEvent], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubStatistics:
    """Counts of a hub: open subscriptions, events, and event loops that have subscriptions."""

    subscriptions: int
    # Latest events, one for each task that the hub knows. A task whose TaskResult a subscription
    # names counts too, although the hub may have no event of it yet.
    events: int
    event_loops: int


class Hub:
    """Publishes events to subscriptions and keeps the latest event of each task."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop all tasks and subscriptions; in a child of fork() their threads do not exist."""
        self.ended = False
        self.recorders: list[Recorder] = []  # The list is empty unless a test uses recording().
        # The mailboxes that have a subscription to all tasks; notify() marks topics in all of them.
        self.to_all: dict[Mailbox, None] = {}
        self._latest = Latest()
        self._open: dict[Subscription, None] = {}
        # detach() notifies this condition when `_open` is empty after end() was called.
        self._all_closed = threading.Condition()
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}

    # Methods that publish events

    def publish(self, event: TaskEvent, *, keep: bool = False) -> bool:
        """
        Make `event` the latest event of its task and wake the subscriptions to the task.

        Never waits for a reader, only for the task's lock, which other threads hold briefly.
        Returns False and drops the event if it is not later than the present one, as may happen
        when two threads publish concurrently. With `keep` the hub keeps the task until release();
        other tasks are forgotten beyond UNKEPT_LIMIT and UNKEPT_SECONDS (module `latest`).
        """
        while True:
            topic = self._latest.get_or_create(event.backend, event.id)
            with topic.lock:
                if topic.is_gone:
                    continue  # Another thread dropped the topic before this thread locked it.
                if not topic.replace(event):
                    return False
                if keep:
                    self._latest.keep(topic)
                elif not topic.is_kept:
                    self._latest.touch(topic)
                self._latest.adopt_readers(topic)
                if self.recorders:
                    self.record(topic)
            break
        self.notify(topic)
        self._latest.trim()
        return True

    def record(self, topic: Topic) -> None:
        """Pass the latest event of a topic to the recorders. The caller holds the topic's lock."""
        event = topic.event
        assert event is not None
        for record in tuple(self.recorders):
            record(event)

    def notify(self, topic: Topic) -> None:
        """
        Mark this topic in the mailboxes of its readers, and wake them so that they read its event.

        The caller must not hold the topic's lock. A subscription that is attached concurrently
        adds its mailbox under the lock and reads the event afterwards. So it reads this event, even
        if this method does not find its mailbox.
        """
        # Iterate over copies, because another thread may change the two dictionaries.
        for reader in (*(topic.readers or ()), *self.to_all):
            if reader.mark(topic):
                reader.wake()

    def add(self, topic: Topic) -> None:
        """Store the topic of a pool's new task, which the hub keeps until release()."""
        self._latest.add(topic)

    def release(self, topic: Topic) -> None:
        """Forget a task; open subscriptions to it still receive its last event."""
        self._latest.remove(topic)

    def __len__(self) -> int:
        """Return the number of tasks that the hub has, without awaited ids of unknown backends."""
        return len(self._latest)

    # Methods that read events, or subscribe to them

    def snapshot(self, result_or_id: Any, backend: str | None = None) -> TaskEvent | None:
        """
        Return the latest event of a task, or None if the hub does not know the task.

        `result_or_id` is a TaskResult or its id (str or UUID); `backend` is the backend's alias,
        which is needed only if two backends have a task with this id. Raises TypeError if
        `result_or_id` has another type, and ValueError for an ambiguous id, or if the TaskResult
        is of another backend.
        """
        topic = self.find(result_or_id, backend)
        return None if topic is None else topic.event

    def find(self, result_or_id: Any, backend: str | None = None) -> Topic | None:
        """Return the topic of a task, or None if the hub has none. For arguments see snapshot()."""
        return self._latest.find(*task_reference(result_or_id, backend))

    def subscribe(self, *results_or_ids: Any) -> Subscription:
        """
        Return a subscription to these tasks or, without arguments, to all tasks of this process.

        Each argument is a TaskResult or its id (str or UUID); another type raises TypeError. The
        subscription starts when its `with` or `async with` block is entered. An id that the hub
        does not know is no error: the subscription waits for the first event of that task.
        """
        return Subscription(self, tuple(map(task_reference, results_or_ids)))

    @contextmanager
    def recording(self, record: Recorder) -> Iterator[None]:
        """
        Call `record` with every event that is published in the `with` block, for use in tests.

        A subscription may skip events of a task, but `record` receives all of them, and those of
        one task in order. The publisher's thread calls `record` while it holds the task's lock, so
        `record` should only append the event to a list.
        """
        self.recorders.append(record)
        try:
            yield
        finally:
            self.recorders.remove(record)

    def statistics(self) -> HubStatistics:
        """Return the counts of this hub, which are read one after the other, without a lock."""
        return HubStatistics(
            subscriptions=len(self._open),
            events=len(self._latest),
            event_loops=len(self._mailboxes),
        )

    def end(self, timeout: float = 0) -> None:
        """
        End all open and all later subscriptions, because this process is about to exit.

        Waits until their readers have closed the open ones, but at most `timeout` seconds.
        """
        self.ended = True
        mailboxes = {s.mailbox for s in list(self._open) if s.mailbox is not None}
        for mailbox in mailboxes:
            mailbox.wake()
        with self._all_closed:
            self._all_closed.wait_for(lambda: not self._open, timeout)

    # Methods that subscriptions and mailboxes call

    def attach(self, subscription: Subscription, loop: asyncio.AbstractEventLoop | None) -> None:
        """
        Start a subscription, whose first read returns the present state of its tasks.

        The thread that will read calls this: the thread of `loop`, or any thread if that is None.
        """
        if subscription.mailbox is not None:
            raise RuntimeError("A subscription can be entered only once.")
        mailbox = Mailbox(self, loop)
        if loop is not None:
            mailbox = self._mailboxes.setdefault(loop, mailbox)
        subscription.mailbox = mailbox
        self._open[subscription] = None
        # Add the subscription before its topics get the mailbox: a concurrent detach() of another
        # subscription of this mailbox then keeps the mailbox in the topics that this one reads.
        mailbox.add(subscription)
        try:
            if not subscription.references:
                self._attach_to_all(subscription, mailbox)
            for backend, id in subscription.references:
                self._attach_to(subscription, mailbox, backend, id)
        except BaseException:  # Latest.find() raises ValueError for an ambiguous id.
            self.detach(subscription)
            raise
        if loop is not None:
            self._drop_closed_loops()

    def detach(self, subscription: Subscription) -> None:
        """
        End a subscription. Any thread may call this; a second call has no effect.

        The garbage collector may close a subscription in any thread and at any point of the code.
        So only the thread of an open event loop removes it from the loop's mailbox; another thread,
        or a finalizer that interrupts Mailbox.add(), schedules a callback in the loop for that.
        """
        if self._open.pop(subscription, subscription) is subscription:
            return
        mailbox = subscription.mailbox
        assert mailbox is not None
        if self.ended and not self._open:
            with self._all_closed:
                self._all_closed.notify_all()
        if mailbox.loop is not None and not mailbox.is_free():
            try:
                mailbox.loop.call_soon_threadsafe(self._detach, subscription, mailbox)
            except RuntimeError:
                self._detach(subscription, mailbox)  # The loop is closed and runs no callback.
        else:
            self._detach(subscription, mailbox)

    def drop(self, mailbox: Mailbox) -> None:
        """End the subscriptions of a closed event loop. May be called from any thread."""
        for subscriber in list(mailbox.subscriptions):
            assert isinstance(subscriber, Subscription)
            self._open.pop(subscriber, None)
            # Detach here even if detach() has scheduled _detach() in the loop: a closed loop never
            # runs it.
            self._detach(subscriber, mailbox)

    def _drop_closed_loops(self) -> None:
        for loop, mailbox in list(self._mailboxes.items()):
            if loop.is_closed():
                self.drop(mailbox)

    def _attach_to(
        self, subscription: Subscription, mailbox: Mailbox, backend: str | None, id: str
    ) -> None:
        while True:
            topic = self._latest.find_or_await(backend, id)
            with topic.lock:
                topic.add_reader(mailbox)
                # Check after add_reader(), because a finalizer may replace the topic in that call.
                if topic.is_gone and not topic.is_kept:
                    continue  # The topic was replaced after find_or_await() had returned it.
                subscription.topics.append(topic)
                subscription.changed[topic] = None
            return

    def _attach_to_all(self, subscription: Subscription, mailbox: Mailbox) -> None:
        self.to_all[mailbox] = None
        for topic in self._latest:
            # Race: a publisher may be publishing an event of this topic. If it got the lock first,
            # the subscription reads the event; if it gets the lock later, it finds the mailbox.
            with topic.lock:
                subscription.changed[topic] = None

    def _detach(self, subscription: Subscription, mailbox: Mailbox) -> None:
        mailbox.remove(subscription)
        if mailbox.loop is None:
            mailbox.wake()  # Another thread may be waiting in take(), which must return.
        elif not mailbox.loop.is_closed():
            subscription.resume()
        if not mailbox.to_all:
            self.to_all.pop(mailbox, None)
        topics, subscription.topics = subscription.topics, []
        self._latest.remove_reader(topics, mailbox)
        loop = mailbox.loop
        if loop is None or mailbox.subscriptions:
            return
        if self._mailboxes.get(loop) is mailbox:  # Otherwise the loop already has a new mailbox.
            self._mailboxes.pop(loop, None)


hub = Hub()
reset_in_child(hub.reset)
