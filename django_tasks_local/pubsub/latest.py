"""The latest event of each task, and how many of them are kept. Called from any thread."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..aliases import TaskKey
    from ..events import TaskEvent

    type Recorder = Callable[[TaskEvent], object]

# The limits for tasks of other backends, whose stores are elsewhere: a web process may receive
# `enqueued` of a task that runs in another process, and nothing more.
UNKEPT_LIMIT = 1000  # tasks
UNKEPT_SECONDS = 3600.0  # since the task's last event


class Reader(Protocol):
    """An addressee of the events of a topic; a Mailbox is one."""

    def mark(self, topic: Topic) -> bool:
        """Note that a topic has a later event; return whether the caller must call wake()."""

    def wake(self) -> None:
        """Have the noted topics read. Called without a lock."""


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
        "last_event_at",
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
        self.last_event_at = 0.0  # time.monotonic()

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
        self.topics: dict[TaskKey, Topic] = {}
        self._aliases: dict[str, None] = {}
        # Ids without an alias for which a subscription waits.
        self._awaited: dict[str, Topic] = {}
        # Topics that no pool keeps; the one with the oldest event comes first.
        self._unkept: dict[TaskKey, Topic] = {}
        # Held by the one thread that trims; other threads skip trimming instead of waiting.
        self._trimming = threading.Lock()

    def __len__(self) -> int:
        return len(self.topics)

    def __iter__(self) -> Iterator[Topic]:
        """Iterate over a copy."""
        return iter(list(self.topics.values()))

    def find(self, backend: str | None, id: str) -> Topic | None:
        """
        Return the topic of a task, or None.

        Raises ValueError if `backend` is None and several backends have a task with this id.
        """
        if backend is not None:
            return self.topics.get((backend, id))
        found = [
            topic
            for alias in list(self._aliases)
            if (topic := self.topics.get((alias, id))) is not None
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
        # add() in another thread checks `_awaited` after it has stored a topic, so either it has
        # found this entry or the topic is found now.
        return self.find(None, id) or awaited

    def get_or_create(self, backend: str, id: str) -> Topic:
        """Return the topic of a task of any backend."""
        topic = self.topics.get((backend, id))
        if topic is None:
            topic = Topic(backend, id)
            known = self.topics.setdefault((backend, id), topic)
            if known is not topic:
                return known
            self._introduce(topic)
        return topic

    def add(self, topic: Topic) -> None:
        """Store the topic of a new task that a pool keeps until remove()."""
        assert topic.backend is not None
        key = topic.backend, topic.id
        known = self.topics.setdefault(key, topic)
        if known is not topic:
            self.topics[key] = topic
            _replace(known, topic)
            self._unkept.pop(key, None)
        self._introduce(topic)

    def remove(self, topic: Topic) -> None:
        """Forget a topic. Subscriptions that are open still receive its last event."""
        assert topic.backend is not None
        topic.is_gone = True
        key = topic.backend, topic.id
        if self.topics.get(key) is topic:
            del self.topics[key]
        self._unkept.pop(key, None)

    def remove_if_idle(self, topic: Topic) -> None:
        """Forget a topic that has neither an event nor a reader."""
        with topic.lock:
            if topic.readers or topic.is_kept or topic.event is not None:
                return
            topic.is_gone = True
        if topic.backend is not None:
            self.remove(topic)
        elif self._awaited.get(topic.id) is topic:
            del self._awaited[topic.id]

    def touch(self, topic: Topic) -> None:
        """Note an event of a topic that no pool keeps. The caller has the topic's lock."""
        assert topic.backend is not None
        key = topic.backend, topic.id
        topic.last_event_at = time.monotonic()
        self._unkept.pop(key, None)
        self._unkept[key] = topic

    def trim(self) -> None:
        """
        Forget the topics with the oldest events beyond UNKEPT_LIMIT and UNKEPT_SECONDS.

        A topic that has a reader is kept. The caller holds no lock.
        """
        if not self._trimming.acquire(blocking=False):
            return
        try:
            for _ in range(len(self._unkept)):
                oldest = self._oldest_unkept()
                if oldest is None:
                    return
                is_old = time.monotonic() - oldest.last_event_at > UNKEPT_SECONDS
                if not is_old and len(self._unkept) <= UNKEPT_LIMIT:
                    return
                self._drop_or_keep(oldest)
        finally:
            self._trimming.release()

    def _oldest_unkept(self) -> Topic | None:
        while True:
            try:
                return next(iter(self._unkept.values()), None)
            except RuntimeError:  # Another thread has changed the dictionary in between.
                continue

    def _drop_or_keep(self, topic: Topic) -> None:
        with topic.lock:
            if topic.readers:
                self.touch(topic)
            else:
                self.remove(topic)

    def _introduce(self, topic: Topic) -> None:
        assert topic.backend is not None
        if topic.backend not in self._aliases:
            self._aliases[topic.backend] = None
        if self._awaited:
            awaited = self._awaited.pop(topic.id, None)
            if awaited is not None:
                _replace(awaited, topic)


def _replace(old: Topic, new: Topic) -> None:
    """Hand the readers of a topic that waits for a task to the task's own topic."""
    with old.lock:
        old.is_gone = True
        old.successor = new
        readers, old.readers = old.readers, None
    with new.lock:
        for reader in readers or ():
            new.add_reader(reader)
