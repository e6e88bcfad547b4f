"""Compute the rate, the percentage and the remaining seconds of a task or a track() loop."""

import math

from ..aliases import Number

SMOOTHING = 5.0  # seconds over which the rate is averaged


class Rate:
    """
    Averages the steps per second over about SMOOTHING seconds; later steps weigh more.

    The rate counts steps from the first reported value, not from 0, because a task that resumes
    at 5,000 has not done 5,000 steps.
    """

    __slots__ = ("_average", "_base", "_weight")

    def __init__(self) -> None:
        self._base: tuple[Number, float] | None = None  # the steps at the last update, and its time
        self._average = self._weight = 0.0

    def start(self, now: float) -> None:
        """Count steps from 0 at the time `now`, because a track() loop begins."""
        self._base = (0, now)

    def update(self, current: Number | None, now: float) -> float | None:
        """Note `current` steps at time `now`; return the rate to 4 digits, or None if unknown."""
        base = self._base
        if current is None or base is None or current < base[0]:
            self._base = None if current is None else (current, now)
            self._average = self._weight = 0.0
            return None
        steps, seconds = current - base[0], now - base[1]
        if steps > 0 and seconds > 0:
            weight = 1 - math.exp(-seconds / SMOOTHING)
            self._average += weight * (float(steps) / seconds - self._average)
            self._weight += weight * (1 - self._weight)
            self._base = (current, now)
        if not self._weight:
            return None
        return float(f"{self._average / self._weight:.4g}")


def percent_of(current: Number | None, total: Number | None) -> float | None:
    """Return the percentage, 0.0 to 100.0, or None if `current` or `total` is unknown."""
    if total == 0:
        return 100.0  # There is nothing to do.
    if current is None or total is None:
        return None
    return min(max(100.0 * current / total, 0.0), 100.0)


def seconds_left(current: Number | None, total: Number | None, rate: float | None) -> float | None:
    """Return the estimated seconds to the end, or None if they cannot be computed."""
    if total == 0:
        return 0.0
    if current is None or total is None or not rate:
        return None
    seconds = max(total - current, 0) / rate
    return round(seconds, 1) if math.isfinite(seconds) else None
