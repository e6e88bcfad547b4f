"""Estimate how long tasks take: the dispatcher sends only short tasks ahead to a busy worker."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .task import ProcessTask

UNKNOWN = 1.0  # seconds; the estimate for a task function without a measurement
DECAY = 0.1  # the weight of a measurement that is shorter than the estimate


class Pace:
    """Keeps the recent durations of task functions. Called from: the dispatcher's thread."""

    def __init__(self) -> None:
        self._seconds: dict[Callable[..., Any], float] = {}

    def note(self, task: ProcessTask, seconds: float) -> None:
        """Update the estimate for the function of a task that has run for `seconds`."""
        function = task.task.func
        before = self._seconds.get(function)
        if before is not None and seconds < before:
            # A longer run replaces the estimate at once; a shorter one lowers it only by a tenth of
            # the difference, because the next run may be long again.
            seconds = (1 - DECAY) * before + DECAY * seconds
        self._seconds[function] = seconds

    def estimate(self, task: ProcessTask) -> float:
        """Return how many seconds the task will probably run; rather too many than too few."""
        return self._seconds.get(task.task.func, UNKNOWN)
