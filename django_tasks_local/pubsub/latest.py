"""Latest keeps the topic of each task, with its latest event. Any thread may call its methods."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from ..aliases import ambiguous_id
from ..clocks import Clocks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..events import TaskEvent

# Limits for tasks of other backends, which no pool of this process removes from the hub: a web
# process may receive only the `enqueued` event of a task that then runs in another process.
UNKEPT_LIMIT = 1000  # tasks
# The hub may forget a task this many seconds after its last event, or after trim() last kept it
# because it had a reader.
UNKEPT_SECONDS = 3600.0
# A publication adds at most one topic and checks up to this many old ones, so the number of topics
# shrinks to its limit. The check stays cheap if all old topics have readers and must be kept.
MAX_TRIMMED = 10


class Reader(Protocol):
    """A topic notifies its readers of a later event; Mailbox implements this protocol."""

    def mark(self, topic: Topic) -> bool:
        """Record that a topic has a later event; return whether the caller must call wake()."""

    def wake(self) -> None:
        """Wake the reader, which then reads the marked topics. The caller holds no lock."""

    def reads(self, topic: Topic) -> bool:
        """Return whether this reader still has to be notified of events of this topic."""


class Topic:
    """
    Holds the latest event of one task, and the readers to notify of the next event.

    The backends of this package use the subclass TaskRecord, which creates `event` from its state.
    """

    __slots__ = (
        "__weakref__",
        "_event",
        "backend",
        "id",
        "is_gone",
        "is_kept",
        "lock",
        "readers",
        "successor",
    )

    def __init__(self, backend: str | None, id: str) -> None:
        self.backend = backend  # None if a subscription waits for a task of any backend.
        self.id = id
        # Guards changes of the attributes below, except that Latest.remove() sets `is_gone`
        # without it. Any thread may read them without the lock.
        self.lock = threading.RLock()
        self._event: TaskEvent | None = None
        self.readers: dict[Reader, None] | None = None
        # True if only Hub.release() removes the topic; a pool calls it when it evicts the result.
        self.is_kept = False
        self.is_gone = False  # True if the hub dropped this topic, or another topic replaced it.
        self.successor: Topic | None = None  # The topic that has replaced this one.

    @property
    def event(self) -> TaskEvent | None:
        """Return the latest event; the object is the same until a later event replaces it."""
        return self._event

    def replace(self, event: TaskEvent) -> bool:
        """
        Store this event; return False if it is not later than the present one.

        The caller holds `lock`.
        """
        known = self._event
        if known is not None and (
            event.version <= known.version or (known.is_last and event.run <= known.run)
        ):
            return False
        if known is not None and known.retried_from is not None and event.retried_from is None:
            # Only the `enqueued` event of a task of another backend is made where this is known.
            event = replace(event, retried_from=known.retried_from)
        self._event = event
        return True

    def add_reader(self, reader: Reader) -> None:
        """Add a reader that is notified of each later event. The caller holds `lock`."""
        if self.readers is None:
            self.readers = {}
        self.readers[reader] = None

    def remove_reader(self, reader: Reader) -> None:
        """Undo add_reader() for this reader. The caller holds `lock`."""
        if self.readers is not None:
            self.readers.pop(reader, None)

    @property
    def newest(self) -> Topic:
        """Return this topic or, if others have replaced it, the last topic that did."""
        topic = self
        while topic.successor is not None:
            topic = topic.successor
        return topic


class Latest:
    """
    Stores all topics of a hub by backend alias and task id.

    Each change of a dictionary is one operation, which is atomic with and without a GIL. So no
    thread takes a lock that all tasks share.
    """

    def __init__(self) -> None:
        # The keys are first the alias, then the id: one dictionary with (alias, id) as its key
        # would need one more object, the tuple, for each task.
        self._topics: dict[str, dict[str, Topic]] = {}
        # Topics that hold subscriptions to an id that no backend has used yet; the key is the id.
        self._awaited: dict[str, Topic] = {}
        # Topics that no pool keeps, the oldest first. The value is the time of the last event, or
        # the time at which trim() last kept the topic because it had a reader.
        self._unkept: dict[Topic, float] = {}
        # Topics of closed subscriptions, each with a mailbox. remove_reader() removes the mailbox
        # from the topic unless another subscription of the mailbox still reads the topic.
        self._to_release: deque[tuple[Topic, Reader]] = deque()
        # The thread in trim() holds this lock; other threads skip trimming instead of waiting.
        self._trimming = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, list(self._topics.values())))

    def __iter__(self) -> Iterator[Topic]:
        """Iterate over a copy of all topics, so that other threads may add and remove topics."""
        return iter(
            [t for of_alias in list(self._topics.values()) for t in list(of_alias.values())]
        )

    def find(self, backend: str | None, id: str) -> Topic | None:
        """
        Return the topic of a task, or None if there is none.

        Raises ValueError if `backend` is None and several backends have a task with this id.
        """
        if backend is not None:
            return self._of(backend).get(id)
        found = [
            topic
            for topics in list(self._topics.values())
            if (topic := topics.get(id)) is not None and topic.event is not None
        ]
        if len(found) > 1:
            raise ambiguous_id(id, [str(topic.backend) for topic in found])
        return found[0] if found else None

    def find_or_await(self, backend: str | None, id: str) -> Topic:
        """Return the topic of a task; for an unknown task, one without an event, a placeholder."""
        if backend is not None:
            return self.get_or_create(backend, id)
        found = self.find(None, id)
        if found is not None:
            return found
        awaited = self._awaited.setdefault(id, Topic(None, id))
        # Race: another thread may publish the first event of the task concurrently. It checks
        # `_awaited` after it has stored the event, so either it finds the entry that the line above
        # has added, or the next line finds its topic.
        found = self.find(None, id)
        if found is None:
            return awaited
        self.remove_if_idle(awaited)
        return found

    def get_or_create(self, backend: str, id: str) -> Topic:
        """Return the topic of this task; if there is none, create one that no pool keeps."""
        topics = self._of(backend)
        topic = topics.get(id)
        if topic is None:
            topic = Topic(backend, id)
            topic = topics.setdefault(id, topic)
        return topic

    def add(self, topic: Topic) -> None:
        """Store the topic of a new task that a pool keeps until remove()."""
        assert topic.backend is not None
        topics = self._of(topic.backend)
        known = topics.setdefault(topic.id, topic)
        if known is not topic:
            topics[topic.id] = topic
            _replace(known, topic)
            self._unkept.pop(known, None)
        if topic.is_gone:
            self.remove(topic)  # Another thread has discarded the pool and released this topic.
        # Unconditional, because the truth of a dictionary orders nothing without a GIL. pop() in
        # adopt_readers() locks `_awaited`, as setdefault() in find_or_await() does.
        self.adopt_readers(topic)

    def remove(self, topic: Topic) -> None:
        """Forget a topic; open subscriptions to it still receive its last event."""
        assert topic.backend is not None
        topics = self._of(topic.backend)
        # Set before the removal: if a concurrent add() stores the topic after pop(), it finds the
        # flag set and removes the topic itself. Put no call between these two lines, because
        # publish() in a finalizer would repeat its lookup without end.
        topic.is_gone = True
        removed = topics.pop(topic.id, topic)
        if removed is not topic:
            # `removed` is the topic of another task with this id, which replaced `topic`: put it
            # back.
            topics.setdefault(topic.id, removed)
        if not topic.is_kept:
            self._unkept.pop(topic, None)

    def remove_if_idle(self, topic: Topic) -> None:
        """Forget a topic if it has neither an event nor a reader and no pool keeps it."""
        topics = self._awaited if topic.backend is None else self._of(topic.backend)
        with topic.lock:
            # The event is read first, because reading it is a call, during which a finalizer may
            # subscribe or publish. No such call follows until the topic is removed below.
            if topic.event is not None or topic.readers or topic.is_kept or topic.is_gone:
                return
            removed = topics.pop(topic.id, topic)
            if removed is not topic:
                topics.setdefault(topic.id, removed)  # Put back the topic that replaced this one.
            topic.is_gone = True

    def remove_reader(self, topics: Iterable[Topic], reader: Reader) -> None:
        """
        Remove a reader from those of these topics that it no longer reads.

        Waits for no lock, because a finalizer may call this while its thread holds the lock of
        another topic. If another thread holds a topic's lock, the next call handles that topic.
        """
        self._to_release.extend((topic, reader) for topic in topics)
        for _ in range(len(self._to_release)):
            try:
                topic, reader = self._to_release.popleft()
            except IndexError:
                return  # Another thread has taken the last entry concurrently.
            newest = None
            # Repeat this if another thread or a finalizer replaces the topic before its reader is
            # removed, because the new topic then has the reader.
            while newest is not topic.newest:
                newest = topic.newest
                if not newest.lock.acquire(blocking=False):
                    self._to_release.append((topic, reader))
                    break
                try:
                    if not reader.reads(newest):
                        newest.remove_reader(reader)
                        self.remove_if_idle(newest)
                finally:
                    newest.lock.release()

    def keep(self, topic: Topic) -> None:
        """Exempt a topic from trim() until remove(). The caller holds the topic's lock."""
        topic.is_kept = True
        self._unkept.pop(topic, None)

    def touch(self, topic: Topic) -> None:
        """Make a topic the newest one for trim(). The caller holds the topic's lock."""
        self._unkept.pop(topic, None)
        self._unkept[topic] = Clocks.monotonic()

    def trim(self) -> None:
        """
        Forget topics older than UNKEPT_SECONDS, and the oldest topics beyond UNKEPT_LIMIT.

        A topic that has a reader is kept and becomes the newest one. One call checks at most
        MAX_TRIMMED topics. The caller holds no lock.
        """
        if not self._trimming.acquire(blocking=False):
            return
        try:
            for _ in range(MAX_TRIMMED):
                topic, last_event_at = self._oldest_unkept()
                is_old = Clocks.monotonic() - last_event_at > UNKEPT_SECONDS
                if topic is None or (not is_old and len(self._unkept) <= UNKEPT_LIMIT):
                    return
                self._drop_or_keep(topic)
        finally:
            self._trimming.release()

    def _oldest_unkept(self) -> tuple[Topic | None, float]:
        while True:
            try:
                return next(iter(self._unkept.items()), (None, 0.0))
            except RuntimeError:  # Another thread changed the dictionary during the iteration.
                continue

    def _drop_or_keep(self, topic: Topic) -> None:
        with topic.lock:
            if topic.readers:
                self.touch(topic)
            else:
                self.remove(topic)

    def _of(self, backend: str) -> dict[str, Topic]:
        topics = self._topics.get(backend)
        return self._topics.setdefault(backend, {}) if topics is None else topics

    def adopt_readers(self, topic: Topic) -> None:
        """Move the readers of the placeholder of this id, if there is one, to this topic."""
        awaited = self._awaited.pop(topic.id, None)
        if awaited is not None:
            _replace(awaited, topic)


def _replace(old: Topic, new: Topic) -> None:
    """Move all readers from one topic to the topic that replaces it."""
    with old.lock:
        readers, old.readers = old.readers, None
        with new.lock:
            for reader in readers or ():
                new.add_reader(reader)
        old.successor = new
        old.is_gone = True
