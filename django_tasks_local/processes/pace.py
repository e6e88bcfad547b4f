"""How long tasks take: only short ones are sent to a worker ahead of their turn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from .task import ProcessTask

UNKNOWN = 1.0  # seconds; a function that was not measured counts as long
DECAY = 0.1  # the weight of a measurement that is shorter than the estimate


class Pace:
    """The recent durations of task functions. Its methods are called in the dispatcher's thread."""

    def __init__(self) -> None:
        self._seconds: dict[Callable[..., Any], float] = {}

    def note(self, task: ProcessTask, seconds: float) -> None:
        """Note how long the function of a task has run."""
        function = task.task.func
        before = self._seconds.get(function)
        if before is not None and seconds < before:
            # One long run counts at once, and is forgotten slowly: the next one may be as long.
            seconds = (1 - DECAY) * before + DECAY * seconds
        self._seconds[function] = seconds

    def estimate(self, task: ProcessTask) -> float:
        """Return how many seconds the task will run, rather too many than too few."""
        return self._seconds.get(task.task.func, UNKNOWN)
