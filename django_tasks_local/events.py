"""
TaskEvent is a complete snapshot of one task. This module imports nothing of this package.

Every event contains the whole state, so a later event of a task replaces all earlier ones. A slow
reader may receive only the latest event, and a reader that reconnects needs no history.
"""

import math
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from django.tasks import TaskResultStatus

# A `finished` event that is made from a stored result has this sequence, so that it is later than
# every other event of the run. It is the largest integer on which all implementations of JSON agree
# (RFC 8259, section 6).
LAST_SEQUENCE = 2**53 - 1
# `enqueued` and `started` events have these sequences; samples of the progress have higher ones.
ENQUEUED_SEQUENCE = 1
STARTED_SEQUENCE = 2
type Version = tuple[int, int, float]
# This version is less than that of every event. A reader starts with it for each task.
NO_VERSION: Version = (0, 0, 0.0)


class EventKind(StrEnum):
    """The kind of an event, which is also the name of the server-sent event."""

    ENQUEUED = "enqueued"
    STARTED = "started"
    PROGRESS = "progress"
    FINISHED = "finished"


class FailureReason(StrEnum):
    """One word for the reason of a failure, which every user with access to the task may read."""

    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    DIED = "died"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """
    The progress of a task, with its numbers, message and data.

    `current` and `total` are the numbers that the task reported, None if unknown; `unit` names what
    they count, "" if unknown; `percent` is 0.0 to 100.0, or None. `rate` is the average number of
    steps a second, and `eta` the estimated number of seconds left; both are None until the task has
    made steps in two samples. `levels` describes the open track() loops, the outermost first, as
    dicts with "message", "current", "total" and "unit"; it is empty if fewer than two are open.
    """

    current: int | float | None = None
    total: int | float | None = 100
    percent: float | None = None
    message: str = ""
    unit: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    levels: list[dict[str, Any]] = field(default_factory=list)
    rate: float | None = None
    eta: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailure:
    """The error of a failed task: `type` is the exception's dotted path, `message` its text."""

    reason: FailureReason
    type: str
    message: str


# `eq=False`: events are compared by identity, because of two events of a task one is always later.
# `weakref_slot=True`: a cache with weak keys can keep data about an event, such as its encoded
# bytes, as long as the event exists.
@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class TaskEvent:
    """
    An immutable snapshot of the whole state of one task.

    `run` is 0 before the first start of the task, and is greater in each later run of the same id.
    `sequence` is 1 in `enqueued` events, of which there is one for each change of the position, 2
    in `started` events, and grows with each later event of the run. `position` is the number of
    tasks of the same backend alias that wait before this one; it is None if the number is unknown,
    and after the task has started. `retried_from` is the id of the task that this one repeats.
    """

    id: str
    run: int = 0
    sequence: int
    kind: EventKind
    status: TaskResultStatus
    name: str
    backend: str
    position: int | None = None
    retried_from: str | None = None
    progress: Progress | None = None
    enqueued_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    error: TaskFailure | None = None
    return_value: Any = None

    @property
    def key(self) -> tuple[str, str]:
        """Return the alias of the backend and the task's id, which identify the task together."""
        return self.backend, self.id

    @property
    def version(self) -> Version:
        """
        Return a tuple that orders the events of one task: a later event has a greater version.

        A later event has a higher run, or the same run and a higher sequence. If both are equal,
        the task has a smaller position in the later event.
        """
        position = self.position
        return self.run, self.sequence, -math.inf if position is None else -position

    @property
    def is_last(self) -> bool:
        """Return whether this event ends its run; some backends may run the same task again."""
        return self.kind is EventKind.FINISHED
