"""A reporter whose clock and ticker the test moves."""

import threading
from typing import Any

from django_tasks_local.cancellation import Cancellation
from django_tasks_local.events import Progress
from django_tasks_local.progress.reporter import Reporter, Reporting
from django_tasks_local.ticker import Ticker, Ticking


class FakeTicker(Ticker):
    """A ticker without a thread; the test calls what is due."""

    def __init__(self) -> None:
        super().__init__()
        self.due: list[tuple[float, Ticking]] = []

    def add(self, ticking: Ticking, due_at: float) -> None:
        self.due.append((due_at, ticking))


class Stage(Reporting):
    """A task with a reporter whose clock and ticker the test moves."""

    reporter: Reporter
    cancellation: Cancellation

    def __init__(self, interval: float = 1.0) -> None:
        self.id = "the task's id"
        self.lock = threading.RLock()
        self.interval = interval
        self.now = 0.0
        self.published: list[tuple[int, Progress]] = []
        self.ticker = FakeTicker()
        self.cancellation = Cancellation()
        self.reporter = Reporter(
            self.report,
            interval,
            self.cancellation,
            clock=lambda: self.now,
            ticker=self.ticker,
            lock=self.lock,
        )

    @property
    def is_finished(self) -> bool:
        return False

    def report(self, number: int, progress: Progress) -> None:
        self.published.append((number, progress))

    @property
    def last(self) -> Progress:
        return self.published[-1][1]

    def sample(self) -> tuple[Any, ...]:
        """Move the clock by one publishing interval and return the values of the newest event."""
        self.tick(self.now + self.reporter.interval)
        return self.last.current, self.last.total, self.last.message

    def tick(self, now: float) -> None:
        """Move the clock and call what is due."""
        self.now = now
        due, self.ticker.due = self.ticker.due, []
        for due_at, ticking in due:
            if due_at <= now:
                again_at = ticking.tick()
                if again_at is not None:
                    self.ticker.add(ticking, again_at)
            else:
                self.ticker.add(ticking, due_at)
