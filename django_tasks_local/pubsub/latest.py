"""The latest event of each task, and how many of them are kept. Called from any thread."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..events import TaskEvent

# The limits for tasks of other backends, whose stores are elsewhere: a web process may receive
# `enqueued` of a task that runs in another process, and nothing more.
UNKEPT_LIMIT = 1000  # tasks
UNKEPT_SECONDS = 3600.0  # since the task's last event
# Topics that one publication visits to forget them: more than it adds, and few if all have readers.
MAX_TRIMMED = 10


class Reader(Protocol):
    """An addressee of the events of a topic; a Mailbox is one."""

    def mark(self, topic: Topic) -> bool:
        """Note that a topic has a later event; return whether the caller must call wake()."""

    def wake(self) -> None:
        """Have the noted topics read. Called without a lock."""

    def reads(self, topic: Topic) -> bool:
        """Whether it must still be notified of this topic."""


class Topic:
    """
    The latest event of one task, and the readers to notify of the next one.

    The backends of this package have a subclass that creates `event` from its own state.
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
        self.backend = backend  # None: a subscription waits for this id, of whatever backend
        self.id = id
        self.lock = threading.RLock()  # Guards everything below.
        self._event: TaskEvent | None = None
        self.readers: dict[Reader, None] | None = None
        self.is_kept = False  # until release(): the store of a pool bounds it
        self.is_gone = False  # The hub has dropped it, or another topic has replaced it.
        self.successor: Topic | None = None

    @property
    def event(self) -> TaskEvent | None:
        """The latest event: the same object until there is a later one."""
        return self._event

    def replace(self, event: TaskEvent) -> bool:
        """Keep this event; False if it is not later than the present one. The caller has `lock`."""
        known = self._event
        if known is not None and (
            event.version <= known.version or (known.is_last and event.run <= known.run)
        ):
            return False
        self._event = event
        return True

    def add_reader(self, reader: Reader) -> None:
        """Notify this reader of each later event. The caller has `lock`."""
        if self.readers is None:
            self.readers = {}
        self.readers[reader] = None

    def remove_reader(self, reader: Reader) -> None:
        """Undo add_reader(). The caller has `lock`."""
        if self.readers is not None:
            self.readers.pop(reader, None)

    @property
    def newest(self) -> Topic:
        """This topic, or the one that has replaced it."""
        topic = self
        while topic.successor is not None:
            topic = topic.successor
        return topic


class Latest:
    """
    All topics of a hub, by backend alias and id.

    Each change of a dictionary is a single step, which is atomic with and without a GIL, so no lock
    is shared by all tasks.
    """

    def __init__(self) -> None:
        # By alias, then by id: a tuple as the key would be one more object for each task.
        self._topics: dict[str, dict[str, Topic]] = {}
        # Ids without an alias for which a subscription waits.
        self._awaited: dict[str, Topic] = {}
        # Topics that no pool keeps, and the time of their last event, the oldest first.
        self._unkept: dict[Topic, float] = {}
        # Topics of closed subscriptions, with the reader that may no longer read them.
        self._to_release: deque[tuple[Topic, Reader]] = deque()
        # Held by the one thread that trims; other threads skip trimming instead of waiting.
        self._trimming = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, list(self._topics.values())))

    def __iter__(self) -> Iterator[Topic]:
        """Iterate over a copy."""
        return iter(
            [t for of_alias in list(self._topics.values()) for t in list(of_alias.values())]
        )

    def find(self, backend: str | None, id: str) -> Topic | None:
        """
        Return the topic of a task, or None.

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
            aliases = " and ".join(repr(topic.backend) for topic in found)
            raise ValueError(
                f"The id {id!r} is ambiguous: the task backends {aliases} each have a task with "
                f"it. Pass the TaskResult instead."
            )
        return found[0] if found else None

    def find_or_await(self, backend: str | None, id: str) -> Topic:
        """Return the topic of a task; if it is unknown, one that waits for the task."""
        if backend is not None:
            return self.get_or_create(backend, id)
        found = self.find(None, id)
        if found is not None:
            return found
        awaited = self._awaited.setdefault(id, Topic(None, id))
        # A publisher in another thread checks `_awaited` after it has stored an event, so either it
        # has found this entry or the topic is found now.
        found = self.find(None, id)
        if found is None:
            return awaited
        self.remove_if_idle(awaited)
        return found

    def get_or_create(self, backend: str, id: str) -> Topic:
        """Return the topic of a task of any backend."""
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
            self.remove(topic)  # Its pool was discarded concurrently.
        elif self._awaited:
            self.adopt_readers(topic)

    def remove(self, topic: Topic) -> None:
        """Forget a topic. Subscriptions that are open still receive its last event."""
        assert topic.backend is not None
        topics = self._of(topic.backend)
        removed = topics.pop(topic.id, topic)
        if removed is not topic:
            topics.setdefault(topic.id, removed)  # It has replaced the topic.
        if not topic.is_kept:
            self._unkept.pop(topic, None)
        # Afterwards: while a topic is found that is gone, publish() looks it up again.
        topic.is_gone = True

    def remove_if_idle(self, topic: Topic) -> None:
        """Forget a topic that has neither an event nor a reader."""
        topics = self._awaited if topic.backend is None else self._of(topic.backend)
        with topic.lock:
            # The event first: reading it is a call, at which a finalizer may subscribe or publish.
            # No call follows until the topic is taken out.
            if topic.event is not None or topic.readers or topic.is_kept or topic.is_gone:
                return
            removed = topics.pop(topic.id, topic)
            if removed is not topic:
                topics.setdefault(topic.id, removed)  # It has replaced the topic.
            topic.is_gone = True

    def remove_reader(self, topics: Iterable[Topic], reader: Reader) -> None:
        """
        Take a reader out of topics that it no longer reads.

        Waits for no lock, because a finalizer may call this while its thread has another topic's
        lock. A topic whose lock is taken is left for the next call.
        """
        self._to_release.extend((topic, reader) for topic in topics)
        for _ in range(len(self._to_release)):
            try:
                topic, reader = self._to_release.popleft()
            except IndexError:
                return  # Another thread has released it.
            newest = None
            # Again if another thread or a finalizer replaces the topic before its reader is out.
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
        """Keep a topic until remove(). The caller has the topic's lock."""
        topic.is_kept = True
        self._unkept.pop(topic, None)

    def touch(self, topic: Topic) -> None:
        """Note an event of a topic that no pool keeps. The caller has the topic's lock."""
        self._unkept.pop(topic, None)
        self._unkept[topic] = time.monotonic()

    def trim(self) -> None:
        """
        Forget the topics with the oldest events beyond UNKEPT_LIMIT and UNKEPT_SECONDS.

        A topic that has a reader is kept. The caller holds no lock.
        """
        if not self._trimming.acquire(blocking=False):
            return
        try:
            for _ in range(MAX_TRIMMED):
                topic, last_event_at = self._oldest_unkept()
                is_old = time.monotonic() - last_event_at > UNKEPT_SECONDS
                if topic is None or (not is_old and len(self._unkept) <= UNKEPT_LIMIT):
                    return
                self._drop_or_keep(topic)
        finally:
            self._trimming.release()

    def _oldest_unkept(self) -> tuple[Topic | None, float]:
        while True:
            try:
                return next(iter(self._unkept.items()), (None, 0.0))
            except RuntimeError:  # Another thread has changed the dictionary in between.
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
        """Hand the readers that wait for this id to its topic, which has its first event."""
        awaited = self._awaited.pop(topic.id, None)
        if awaited is not None:
            _replace(awaited, topic)


def _replace(old: Topic, new: Topic) -> None:
    """Hand the readers of a topic that waits for a task to the task's own topic."""
    with old.lock:
        readers, old.readers = old.readers, None
        with new.lock:
            for reader in readers or ():
                new.add_reader(reader)
        old.successor = new
        old.is_gone = True
