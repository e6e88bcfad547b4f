"""Hub: the public face of the package. Its methods may be called from any thread."""

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
    """Counts of a hub: open subscriptions, tasks with a known state, and loops that read."""

    subscriptions: int
    tasks: int
    event_loops: int


class Hub:
    """Publishes events to subscriptions and keeps the latest event of each task."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Drop everything. In a child of fork() neither the threads nor the loops exist."""
        self.ended = False
        self.recorders: list[Recorder] = []  # empty unless recording() is in use
        # The mailboxes of the subscriptions to all tasks.
        self.to_all: dict[Mailbox, None] = {}
        self._latest = Latest()
        self._open: dict[Subscription, None] = {}
        self._all_closed = threading.Condition()  # `_open` has become empty.
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}

    # Publishing

    def publish(self, event: TaskEvent, *, keep: bool = False) -> bool:
        """
        Make `event` the latest of its task and wake the subscriptions that read it.

        Never blocks and never raises into the publisher. An event that is not later than the
        present one is stale, for example when two threads race: it is dropped, and the answer is
        False. With `keep` the task stays until release(); otherwise the hub bounds the number.
        """
        while True:
            topic = self._latest.get_or_create(event.backend, event.id)
            with topic.lock:
                if topic.is_gone:
                    continue  # Another thread has dropped it between the two lines above.
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
        """Pass the latest event of a topic to the recorders. The caller has the topic's lock."""
        event = topic.event
        assert event is not None
        for record in tuple(self.recorders):
            record(event)

    def notify(self, topic: Topic) -> None:
        """
        Have the later event of this topic read. The caller does not hold the topic's lock.

        A subscription that is attached concurrently adds its mailbox with the lock and reads the
        event afterwards. So it reads this event unless its mailbox is found here.
        """
        # Copies, because another thread may change the dictionaries.
        for reader in (*(topic.readers or ()), *self.to_all):
            if reader.mark(topic):
                reader.wake()

    def add(self, topic: Topic) -> None:
        """Take in the topic of a new task, which a pool keeps until release()."""
        self._latest.add(topic)

    def release(self, topic: Topic) -> None:
        """Forget a task. Subscriptions that are already open still receive its last event."""
        self._latest.remove(topic)

    def __len__(self) -> int:
        """Return the number of tasks whose state the hub knows."""
        return len(self._latest)

    # Reading

    def snapshot(self, result_or_id: Any, backend: str | None = None) -> TaskEvent | None:
        """
        Return the latest event of a task, or None.

        `result_or_id` is a TaskResult or its id; `backend` is the alias, needed only for an id that
        two backends have in use. Raises TypeError for anything else, and ValueError for an
        ambiguous id.
        """
        topic = self.find(result_or_id, backend)
        return None if topic is None else topic.event

    def find(self, result_or_id: Any, backend: str | None = None) -> Topic | None:
        """Return the topic of a task, or None. See snapshot()."""
        alias, id = task_reference(result_or_id)
        return self._latest.find(backend or alias, id)

    def subscribe(self, *results_or_ids: Any) -> Subscription:
        """
        Return a subscription to these tasks, or to all tasks of this process without arguments.

        Each argument is a TaskResult or its id (str or UUID); TypeError for anything else. The
        subscription starts at its `with` or `async with`. It waits for an id that the hub does not
        know.
        """
        return Subscription(self, tuple(map(task_reference, results_or_ids)))

    @contextmanager
    def recording(self, record: Recorder) -> Iterator[None]:
        """
        Call `record` with every event that is published in the `with` block. For tests.

        A subscription receives the latest event of a task, and `record` receives all of them, those
        of one task in order. It is called in the publisher's thread while the task's lock is held,
        so it may do no more than note the event.
        """
        self.recorders.append(record)
        try:
            yield
        finally:
            self.recorders.remove(record)

    def statistics(self) -> HubStatistics:
        """Return how much the hub holds at this moment."""
        return HubStatistics(
            subscriptions=len(self._open),
            tasks=len(self._latest),
            event_loops=len(self._mailboxes),
        )

    def end(self, timeout: float = 0) -> None:
        """
        End every subscription, present and future: this process is about to exit.

        Waits until the present ones are closed, but at most `timeout` seconds.
        """
        self.ended = True
        mailboxes = {s.mailbox for s in list(self._open) if s.mailbox is not None}
        for mailbox in mailboxes:
            mailbox.wake()
        with self._all_closed:
            self._all_closed.wait_for(lambda: not self._open, timeout)

    # For subscriptions and mailboxes

    def attach(self, subscription: Subscription, loop: asyncio.AbstractEventLoop | None) -> None:
        """
        Start a subscription: the present state of its tasks comes first.

        Called in the reading thread, or in the thread of `loop`.
        """
        if subscription.mailbox is not None:
            raise RuntimeError("A subscription can be entered only once.")
        mailbox = Mailbox(self, loop)
        if loop is not None:
            mailbox = self._mailboxes.setdefault(loop, mailbox)
        subscription.mailbox = mailbox
        self._open[subscription] = None
        # Before the topics are changed, so that a concurrent detach() of another subscription of
        # this mailbox leaves the mailbox in them.
        mailbox.add(subscription)
        try:
            if not subscription.references:
                self._attach_to_all(subscription, mailbox)
            for backend, id in subscription.references:
                self._attach_to(subscription, mailbox, backend, id)
        except BaseException:  # an ambiguous id
            self.detach(subscription)
            raise
        if loop is not None:
            self._drop_closed_loops()

    def detach(self, subscription: Subscription) -> None:
        """
        End a subscription. Called from any thread; a second call has no effect.

        The garbage collector may close a subscription at any point. So only the thread of its loop
        removes it, in a callback if that thread is inside of attach().
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
                self._detach(subscription, mailbox)  # The loop is closed.
        else:
            self._detach(subscription, mailbox)

    def drop(self, mailbox: Mailbox) -> None:
        """End the subscriptions of an event loop that is closed. Called from any thread."""
        for subscriber in list(mailbox.subscriptions):
            assert isinstance(subscriber, Subscription)
            self._open.pop(subscriber, None)
            # Also those that detach() left to the loop, which has not run since.
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
                # Afterwards, because a finalizer may run at that call.
                if topic.is_gone and not topic.is_kept:
                    continue  # It was replaced after it was found.
                subscription.topics.append(topic)
                subscription.changed[topic] = None
            return

    def _attach_to_all(self, subscription: Subscription, mailbox: Mailbox) -> None:
        self.to_all[mailbox] = None
        for topic in self._latest:
            # With the lock: a publisher either has finished, and its event is read, or it starts
            # after this point and finds the mailbox.
            with topic.lock:
                subscription.changed[topic] = None

    def _detach(self, subscription: Subscription, mailbox: Mailbox) -> None:
        mailbox.remove(subscription)
        if mailbox.loop is None:
            mailbox.wake()  # The thread that reads may be another one.
        elif not mailbox.loop.is_closed():
            subscription.resume()
        if not mailbox.to_all:
            self.to_all.pop(mailbox, None)
        topics, subscription.topics = subscription.topics, []
        self._latest.remove_reader(topics, mailbox)
        loop = mailbox.loop
        if loop is None or mailbox.subscriptions:
            return
        if self._mailboxes.get(loop) is mailbox:  # Otherwise another one has taken its place.
            self._mailboxes.pop(loop, None)


hub = Hub()
reset_in_child(hub.reset)
