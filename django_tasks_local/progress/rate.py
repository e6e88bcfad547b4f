"""How fast a loop is, how much of it is done, and how long the rest takes. Pure arithmetic."""

import math

from ..aliases import Number

SMOOTHING = 5.0  # seconds over which the rate is averaged


class Rate:
    """
    The steps a second, averaged over about SMOOTHING seconds, in which later steps weigh more.

    The first report is the base, not 0: a task that resumes at 5,000 has not done 5,000 steps.
    """

    __slots__ = ("_average", "_base", "_weight")

    def __init__(self) -> None:
        self._base: tuple[Number, float] | None = None  # a number of steps, and when it was seen
        self._average = self._weight = 0.0

    def start(self, now: float) -> None:
        """Use 0 steps at `now` as the base, as for a loop that begins."""
        self._base = (0, now)

    def update(self, current: Number | None, now: float) -> float | None:
        """Return the rate, with 4 digits, or None while it is unknown."""
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
    """Return 0.0 to 100.0, or None if one of the two is unknown."""
    if current is None or total is None:
        return None
    return min(max(100.0 * current / total, 0.0), 100.0)


def seconds_left(current: Number | None, total: Number | None, rate: float | None) -> float | None:
    """Return the estimated time to the end, or None while it is unknown."""
    if current is None or total is None or not rate:
        return None
    seconds = max(total - current, 0) / rate
    return round(seconds, 1) if math.isfinite(seconds) else None
