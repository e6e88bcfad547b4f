"""TimeLimit measures how long one task runs, and reports that it takes longer than TIMEOUT."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clocks import Clocks
from .exceptions import TaskTimeout
from .ticker import Ticker, ticker

if TYPE_CHECKING:
    from collections.abc import Callable

# The time limit is checked at least this often, so that it notices a suspension of the process,
# and so that the ticker soon forgets the time limit of a task that has ended.
CHECK_INTERVAL = 1.0  # seconds
# If a check is later than this, the process was suspended: by SIGSTOP, a paused container, or a
# laptop's sleep. The time since the check before it does not count, because the suspension may have
# begun at any point of it. A busy machine may also delay a check, and then the task gets this time
# in addition, which does no harm.
LATE_SECONDS = 0.5


def timeout_error(seconds: float) -> TaskTimeout:
    """Return the error with which a task fails that takes longer than TIMEOUT."""
    return TaskTimeout(f"The task took longer than {seconds} seconds.")


class TimeLimit:
    """Calls a function in the ticker's thread if a task has not ended after a number of seconds."""

    def __init__(
        self,
        seconds: float,
        on_expired: Callable[[], object],
        clock: Callable[[], float] = Clocks.monotonic,
        ticker: Ticker = ticker,
    ) -> None:
        """Begin to measure the time."""
        self._on_expired: Callable[[], object] | None = on_expired
        self._clock = clock
        self._checked_at = now = clock()
        self._ends_at = now + seconds
        self._due_at = min(self._ends_at, now + CHECK_INTERVAL)
        ticker.add(self, self._due_at)

    def stop(self) -> None:
        """Stop measuring, because the task has ended."""
        self._on_expired = None  # The ticker keeps this object for up to CHECK_INTERVAL.

    def tick(self) -> float | None:
        """Report a task that has run too long. Called from: the ticker's thread."""
        on_expired = self._on_expired
        if on_expired is None:
            return None
        now = self._clock()
        if now - self._due_at > LATE_SECONDS:
            self._ends_at += now - self._checked_at
        self._checked_at = now
        if now >= self._ends_at:
            on_expired()
            return None
        self._due_at = min(self._ends_at, now + CHECK_INTERVAL)
        return self._due_at
