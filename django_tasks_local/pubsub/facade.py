"""Hub: the public face of the package. Its methods may be called from any thread."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..aliases import task_reference
from ..forking import reset_in_child
from .delivery import Mailbox, Subscription
from .latest import Latest, Topic

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Sequence

    from ..events import TaskEvent
    from .latest import Reader, Recorder


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
        self.recorders: tuple[Recorder, ...] = ()
        # The mailboxes of the subscriptions to all tasks.
        self.to_all: dict[Mailbox, None] = {}
        self._latest = Latest()
        self._open: dict[Subscription, None] = {}
        self._all_closed = threading.Condition()
        # Guards the mailboxes and the reader tables. Publishing does not take it.
        self._lock = threading.RLock()
        self._lock_depth = 0
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        # Subscriptions that were closed and are not detached yet.
        self._closing: deque[Subscription] = deque()

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
                topic.is_kept = topic.is_kept or keep
                if not topic.is_kept:
                    self._latest.touch(topic)
                readers = self.mark(topic)
            break
        for reader in readers:
            reader.wake()
        self._latest.trim()
        return True

    def mark(self, topic: Topic) -> Sequence[Reader]:
        """
        Note a later event of this topic; return the readers for which to call wake().

        The caller has the topic's lock, and calls wake() after it has released the lock. A
        subscription that is attached concurrently waits for that lock and then reads the event.
        """
        if self.recorders:
            event = topic.event
            assert event is not None
            for record in self.recorders:
                record(event)
        if not topic.readers and not self.to_all:
            return ()
        readers = (*(topic.readers or ()), *self.to_all)
        return [reader for reader in readers if reader.mark(topic)]

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
        with self._lock:
            self.recorders = (*self.recorders, record)
        try:
            yield
        finally:
            with self._lock:
                self.recorders = tuple(r for r in self.recorders if r is not record)

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
        """Start a subscription: the present state of its tasks comes first."""
        self._acquire()
        try:
            if subscription.mailbox is not None:
                raise RuntimeError("A subscription can be entered only once.")
            mailbox = Mailbox(self, None) if loop is None else self._mailbox_of(loop)
            subscription.mailbox = mailbox
            mailbox.subscriptions[subscription] = None
            self._open[subscription] = None
            if subscription.references:
                for backend, id in subscription.references:
                    self._attach_to(subscription, mailbox, backend, id)
            else:
                self._attach_to_all(subscription, mailbox)
        finally:
            self._release()

    def detach(self, subscription: Subscription) -> None:
        """
        End a subscription.

        Does not wait for the lock, because the garbage collector may close a subscription at any
        point, even while this thread holds a lock. The thread that has the hub's lock does it then.
        """
        self._closing.append(subscription)
        self._detach_closing()

    def _mailbox_of(self, loop: asyncio.AbstractEventLoop) -> Mailbox:
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = Mailbox(self, loop)
        return mailbox

    def _attach_to(
        self, subscription: Subscription, mailbox: Mailbox, backend: str | None, id: str
    ) -> None:
        mailbox.by_id.setdefault(id, {})[subscription] = None
        while True:
            topic = self._latest.find_or_await(backend, id)
            with topic.lock:
                if topic.is_gone and not topic.is_kept:
                    continue  # Another thread has replaced it between the two lines above.
                topic.add_reader(mailbox)
                subscription.topics.append(topic)
                subscription.changed[topic] = None
            return

    def _attach_to_all(self, subscription: Subscription, mailbox: Mailbox) -> None:
        mailbox.to_all[subscription] = None
        self.to_all[mailbox] = None
        for topic in self._latest:
            # With the lock: a publisher either has finished, and its event is read, or it starts
            # after this point and finds the mailbox.
            with topic.lock:
                subscription.changed[topic] = None

    def _acquire(self) -> None:
        self._lock.acquire()
        self._lock_depth += 1

    def _release(self) -> None:
        self._lock_depth -= 1
        self._lock.release()
        self._detach_closing()

    def _detach_closing(self) -> None:
        # After a release the queue is checked again: another thread may have failed to acquire the
        # lock in between.
        while self._closing and self._lock.acquire(blocking=False):
            try:
                if self._lock_depth:  # This thread has the lock, further up in the call stack.
                    return
                self._lock_depth += 1
                try:
                    while self._closing:
                        self._detach_locked(self._closing.popleft())
                finally:
                    self._lock_depth -= 1
            finally:
                self._lock.release()

    def _detach_locked(self, subscription: Subscription) -> None:
        mailbox = subscription.mailbox
        if mailbox is None or self._open.pop(subscription, subscription) is subscription:
            return
        mailbox.subscriptions.pop(subscription, None)
        mailbox.to_all.pop(subscription, None)
        if not mailbox.to_all:
            self.to_all.pop(mailbox, None)
        for _, id in subscription.references:
            readers = mailbox.by_id.get(id)
            if readers is not None:
                readers.pop(subscription, None)
                if not readers:
                    del mailbox.by_id[id]
        for topic in subscription.topics:
            newest = topic.newest
            if newest.id not in mailbox.by_id:
                newest.remove_reader(mailbox)
            self._latest.remove_if_idle(newest)
        subscription.topics = []
        if mailbox.loop is not None and not mailbox.subscriptions:
            self._mailboxes.pop(mailbox.loop, None)
        if not self._open:
            with self._all_closed:
                self._all_closed.notify_all()


hub = Hub()
reset_in_child(hub.reset)
