"""Functions that receive every event, for tests."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..events import NO_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..events import TaskEvent, Version
    from .latest import Topic

    type Recorder = Callable[[TaskEvent], object]


class Recording:
    """The recorders of a hub. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.recorders: list[Recorder] = []  # the hub has the same list
        # The version that was recorded last.
        self._recorded: WeakKeyDictionary[Topic, Version] = WeakKeyDictionary()

    @contextmanager
    def with_recorder(self, record: Recorder) -> Iterator[None]:
        """See Hub.recording()."""
        self.recorders.append(record)
        try:
            yield
        finally:
            self.recorders.remove(record)

    def note(self, topic: Topic) -> None:
        """Pass the latest event of a topic to the recorders, unless they have it."""
        # In order: with the lock no later event of the task is recorded in between.
        with topic.lock:
            event = topic.event
            if event is None or event.version <= self._recorded.get(topic, NO_VERSION):
                return  # Another thread has recorded this event or a later one.
            self._recorded[topic] = event.version
            for record in tuple(self.recorders):
                record(event)
