"""Stage is a task with a Reporter whose clock and ticker a test controls."""

import threading
from typing import Any

from django_tasks_local.cancellation import Cancellation
from django_tasks_local.events import Progress
from django_tasks_local.progress.reporter import Reporter, Reporting
from django_tasks_local.ticker import Ticker, Ticking


class FakeTicker(Ticker):
    """
    A ticker without a thread: it only collects entries, and the test calls those that are due.
    """

    def __init__(self) -> None:
        super().__init__()
        self.due: list[tuple[float, Ticking]] = []

    def add(self, ticking: Ticking, due_at: float) -> None:
        self.due.append((due_at, ticking))


class Stage(Reporting):
    """A task whose Reporter has a clock and a ticker that the test controls with tick()."""

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
        """
        Move the clock by one publishing interval; return the values of the newest published sample.
        """
        self.tick(self.now + self.reporter.interval)
        return self.last.current, self.last.total, self.last.message

    def tick(self, now: float) -> None:
        """Set the clock to `now` and call the ticker's entries that are due."""
        self.now = now
        due, self.ticker.due = self.ticker.due, []
        for due_at, ticking in due:
            if due_at <= now:
                again_at = ticking.tick()
                if again_at is not None:
                    self.ticker.add(ticking, again_at)
            else:
                self.ticker.add(ticking, due_at)
