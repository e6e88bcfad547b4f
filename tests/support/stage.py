"""A reporter on a stage, whose clock and sampler the test moves."""

from typing import Any

from django_tasks_local.events import Progress
from django_tasks_local.progress import Reporter, Sampler


class FakeSampler(Sampler):
    """Samples when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.due: list[tuple[float, Reporter]] = []

    def add(self, reporter: Reporter, due_at: float) -> None:
        self.due.append((due_at, reporter))


class Stage:
    """A reporter with a clock and a sampler that the test moves."""

    def __init__(self, interval: float = 1.0) -> None:
        self.now = 0.0
        self.published: list[tuple[int, Progress]] = []
        self.sampler = FakeSampler()
        self.reporter = Reporter(
            lambda number, progress: self.published.append((number, progress)),
            interval,
            clock=lambda: self.now,
            sampler=self.sampler,
        )

    @property
    def last(self) -> Progress:
        return self.published[-1][1]

    def look(self) -> tuple[Any, ...]:
        """Return what is told an interval later."""
        self.tick(self.now + self.reporter.interval)
        return self.last.current, self.last.total, self.last.message

    def tick(self, now: float) -> None:
        """Move the clock and let the sampler do what is due."""
        self.now = now
        due, self.sampler.due = self.sampler.due, []
        for due_at, reporter in due:
            if due_at <= now:
                again_at = reporter.sample()
                if again_at is not None:
                    self.sampler.add(reporter, again_at)
            else:
                self.sampler.add(reporter, due_at)
