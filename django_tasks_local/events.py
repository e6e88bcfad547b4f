"""
TaskEvent: a complete snapshot of one task at one moment. Imports nothing of this package.

Because every event carries the whole state, any later event of a task replaces any earlier one. A
slow reader may receive only the latest event, and a reader that reconnects needs no history.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from django.tasks import TaskResultStatus

# The sequence of a `finished` event that is made from a stored result: no event of the task can
# follow it. It is the largest integer that JSON readers agree on (RFC 8259, section 6).
LAST_SEQUENCE = 2**53 - 1
# The sequences of the first two events of a run. Samples of the progress follow.
ENQUEUED_SEQUENCE = 1
STARTED_SEQUENCE = 2
type Version = tuple[int, int, float]
# Before the version of every event: the version of a task of which no event was read yet.
NO_VERSION: Version = (0, 0, 0.0)


class EventKind(StrEnum):
    """The step in the task's life; also the name of the server-sent event."""

    ENQUEUED = "enqueued"
    STARTED = "started"
    PROGRESS = "progress"
    FINISHED = "finished"


class FailureReason(StrEnum):
    """Why a task failed: one word, which every user with access to the task may read."""

    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    DIED = "died"
    TIMEOUT = "timeout"


class _PayloadNames:
    """Access by the names in the JSON payload: `event.progress["percent"]`."""

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except AttributeError:
            raise KeyError(name) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress(_PayloadNames):
    """
    How far a task is.

    `current` and `total` are the numbers that the task reported, None if unknown; `percent` is 0.0
    to 100.0, or None. `rate` is the average number of steps a second, and `eta` the estimated
    number of seconds left; both are None until the task has made steps in two samples.
    """

    current: int | float | None = None
    total: int | float | None = 100
    percent: float | None = None
    message: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    rate: float | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailure(_PayloadNames):
    """Why a task failed: `type` is the exception's dotted path, `message` its text."""

    reason: FailureReason
    type: str
    message: str


# Compared by identity: two events are never "equal", one of them is later. Weakly referenced, so
# that data about an event, such as its encoded bytes, can be kept for as long as the event lives.
@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class TaskEvent:
    """
    The whole state of one task at one moment.

    `run` is 0 before the first start of the task, and grows with each run of the same id.
    `sequence` is 1 for enqueued and 2 for started, and grows with every event of a run.
    `position` is the number of tasks of the same backend alias that wait before this one; None if
    the number is unknown, and after the task has started.
    """

    id: str
    run: int = 0
    sequence: int
    kind: EventKind
    status: TaskResultStatus
    name: str
    backend: str
    position: int | None = None
    progress: Progress | None = None
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: TaskFailure | None = None
    return_value: Any = None

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the task: the alias of its backend and its id."""
        return self.backend, self.id

    @property
    def version(self) -> Version:
        """
        The order of the events of one task: a later event has a greater version.

        It has a higher run; or the same one and a higher sequence; or both are the same, and fewer
        tasks wait before it.
        """
        position = self.position
        return self.run, self.sequence, -math.inf if position is None else -position

    @property
    def is_last(self) -> bool:
        """Whether no event of this task can follow."""
        return self.kind is EventKind.FINISHED
