"""report_progress() and track(): values, throttling, rate, cancelling."""

import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from django.utils.translation import gettext_lazy

from django_tasks_local import report_progress, track
from django_tasks_local.events import Progress
from django_tasks_local.exceptions import TaskCancelled
from django_tasks_local.hub import hub
from django_tasks_local.progress import Reporter, Sampler, current_reporter
from tests.conftest import LIMIT, finished, wait_for_event, wait_until
from tests.project import tasks


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


@pytest.fixture
def stage() -> Any:
    stage = Stage()
    token = current_reporter.set(stage.reporter)
    yield stage
    current_reporter.reset(token)


@pytest.mark.parametrize(
    ("arguments", "keywords", "expected"),
    [
        ((42,), {}, (42, 100, 42.0, "")),
        ((3, 10, "resizing"), {}, (3, 10, 30.0, "resizing")),
        ((), {"message": "still here"}, (None, 100, None, "still here")),
        ((None,), {}, (None, 100, None, "")),
        ((1500, None), {}, (1500, None, None, "")),
        ((150,), {}, (150, 100, 100.0, "")),
        ((-5,), {}, (-5, 100, 0.0, "")),
        ((0.5, 2), {}, (0.5, 2, 25.0, "")),
        ((Decimal("2.5"), Fraction(5)), {}, (2.5, 5.0, 50.0, "")),
        ((1, 10**90), {}, (1, 10**90, 0.0, "")),
        ((1e99, 1e-99), {}, (1e99, 1e-99, 100.0, "")),
        ((1, 2, None), {}, (1, 2, 50.0, "")),
        ((1, 2, gettext_lazy("Yes")), {}, (1, 2, 50.0, "Yes")),
    ],
)
def test_values(stage: Stage, arguments: Any, keywords: Any, expected: Any) -> None:
    report_progress(*arguments, **keywords)
    progress = stage.last
    assert (progress.current, progress.total, progress.message) == (
        expected[0],
        expected[1],
        expected[3],
    )
    assert progress.percent == (expected[2] if expected[2] is None else pytest.approx(expected[2]))


def test_what_is_left_out_keeps_its_value(stage: Stage) -> None:
    steps: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        ({"current": 1, "total": 5, "message": "one", "key": "a"}, (1, 5, "one", {"key": "a"})),
        ({"current": 2}, (2, 5, "one", {"key": "a"})),
        ({"message": "two"}, (2, 5, "two", {"key": "a"})),
        ({"other": [1]}, (2, 5, "two", {"other": [1]})),
        ({"total": None}, (2, None, "two", {"other": [1]})),
        ({"current": None, "message": None}, (None, None, "", {"other": [1]})),
        ({}, (None, None, "", {"other": [1]})),
    ]
    for now, (keywords, expected) in enumerate(steps, 1):
        stage.now = now * 10.0
        report_progress(**keywords)
        progress = stage.last
        assert (progress.current, progress.total, progress.message, progress.data) == expected


@pytest.mark.parametrize("in_task", [True, False])
@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        ((math.nan,), {}, ValueError, "current must be a finite number, not nan"),
        ((math.inf,), {}, ValueError, "current must be a finite number, not inf"),
        ((1, -math.inf), {}, ValueError, "total must be a finite number, not -inf"),
        ((10**5000,), {}, ValueError, "current must be a finite number"),
        ((Fraction(10**5000),), {}, ValueError, "current must be a finite number"),
        ((1, 0), {}, ValueError, "total must be above zero.*not 0"),
        ((1, -3), {}, ValueError, "total must be above zero.*not -3"),
        (("50",), {}, TypeError, "current must be a number or None, not '50'"),
        ((True,), {}, TypeError, "current must be a number or None, not True"),
        ((1j,), {}, TypeError, "current must be a real number"),
        ((Decimal("sNaN"),), {}, TypeError, "current must be a real number"),
        (([],), {}, TypeError, "current must be"),
        ((1, "many"), {}, TypeError, "total must be"),
        ((1, 2, b"bytes"), {}, TypeError, "message must be a string or None, not b'bytes'"),
        ((1, 2, 3), {}, TypeError, "message must be"),
        ((), {"key": object()}, TypeError, r"data \(key\) must be JSON"),
        ((), {"key": math.nan}, ValueError, r"data \(key\) must be JSON"),
        ((), {"key": {1: {2: {3}}}}, TypeError, "must be JSON"),
    ],
)
def test_bad_values(
    stage: Stage, in_task: bool, arguments: Any, keywords: Any, error: Any, message: str
) -> None:
    if not in_task:
        token = current_reporter.set(None)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        report_progress(*arguments, **keywords)
    if not in_task:
        current_reporter.reset(token)
    assert stage.published == []


def test_outside_of_a_task() -> None:
    report_progress(1, 2, "nobody listens", key="value")
    assert list(track([1, 2])) == [1, 2]
    assert list(track(iter("ab"), total=2, message="letters")) == ["a", "b"]


def test_data_is_a_copy(stage: Stage) -> None:
    rows = [1]
    report_progress(rows=rows)
    rows.append(2)
    assert stage.last.data == {"rows": [1]}


def test_at_most_one_event_in_an_interval(stage: Stage) -> None:
    for number in range(1, 1001):
        report_progress(number, 1000)
    assert [(n, p.current) for n, p in stage.published] == [(1, 1)]
    stage.tick(0.5)
    assert len(stage.published) == 1
    stage.tick(1.0)
    assert [(n, p.current) for n, p in stage.published] == [(1, 1), (2, 1000)]
    stage.tick(2.0)
    assert len(stage.published) == 2
    stage.now = 2.5
    report_progress(1)
    assert len(stage.published) == 3


def test_nothing_after_the_end(stage: Stage) -> None:
    report_progress(1)
    report_progress(2)
    number, progress = stage.reporter.close()
    assert (number, progress.current) == (1, 2)
    stage.tick(5.0)
    report_progress(3)
    assert len(stage.published) == 1


def test_no_progress_before_the_first_report() -> None:
    assert Stage().reporter.close() == (0, None)


def test_rate_and_time_left(stage: Stage) -> None:
    report_progress(5_000, 10_000)
    assert (stage.last.rate, stage.last.eta) == (None, None)
    for second in range(1, 5):
        stage.now = float(second)
        report_progress(5_000 + 100 * second)
    # The task has gone on at 5,000: it has not done 5,000 steps.
    assert stage.last.rate == pytest.approx(100)
    assert stage.last.eta == pytest.approx(46)
    stage.now = 8.0
    report_progress(message="nothing new")
    assert stage.last.rate == pytest.approx(100)
    for second in range(9, 40):
        stage.now = float(second)
        report_progress(5_400 + 10 * (second - 8))
    assert 10 <= stage.last.rate < 12
    stage.now = 50.0
    report_progress(3)
    assert (stage.last.rate, stage.last.eta) == (None, None)
    report_progress(None)
    stage.tick(60.0)
    assert (stage.last.rate, stage.last.eta) == (None, None)


def test_rate_of_extreme_values_stays_finite(stage: Stage) -> None:
    for second, current in enumerate([-1e99, 1e99, 1e-99, 1e99], 1):
        stage.now = second * 10.0
        report_progress(current, 1e-99)
        assert stage.last.rate is None or math.isfinite(stage.last.rate)
        assert stage.last.eta is None or math.isfinite(stage.last.eta)


def test_track_counts_and_the_sampler_looks(stage: Stage) -> None:
    for number in track("abcdef", message="letters"):
        if number == "c":
            stage.tick(1.0)
        if number == "e":
            report_progress(message="still letters")
            stage.tick(2.0)
    stage.tick(3.0)
    stage.tick(4.0)
    assert [(p.current, p.total, p.message) for _, p in stage.published] == [
        (0, 6, "letters"),
        (2, 6, "letters"),
        (4, 6, "still letters"),
        (6, 6, "still letters"),
    ]
    assert stage.sampler.due == []


def test_track_of_unknown_length(stage: Stage) -> None:
    assert list(track(iter("ab"))) == ["a", "b"]
    assert (stage.reporter.current, stage.reporter.total) == (2, None)
    assert list(track([])) == []
    assert (stage.reporter.current, stage.reporter.total) == (0, None)
    assert list(track(iter("ab"), total=2)) == ["a", "b"]
    assert (stage.reporter.current, stage.reporter.total) == (2, 2)


def test_leaving_a_tracked_loop_early(stage: Stage) -> None:
    for item in track(range(10)):
        if item == 3:
            break
    stage.tick(1.0)
    assert stage.last.current == 3
    stage.tick(2.0)
    assert stage.sampler.due == []


async def test_track_of_an_async_iterable(stage: Stage) -> None:
    async def letters() -> AsyncIterator[str]:
        for letter in "abc":
            yield letter

    assert [letter async for letter in track(letters(), total=3)] == ["a", "b", "c"]
    assert stage.reporter.current == 3
    current_reporter.set(None)  # type: ignore[arg-type]
    assert [letter async for letter in track(letters())] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("iterable", "keywords", "error"),
    [
        ([1], {"total": -1}, ValueError),
        ([1], {"total": math.nan}, ValueError),
        ([1], {"total": "3"}, TypeError),
        ([1], {"message": 3}, TypeError),
    ],
)
def test_track_complains_at_the_call(
    stage: Stage, iterable: Any, keywords: Any, error: Any
) -> None:
    with pytest.raises(error):
        track(iterable, **keywords)


@pytest.mark.parametrize("step", [lambda: report_progress(1), lambda: list(track([1, 2]))])
def test_cancelling_is_told_once(stage: Stage, step: Callable[[], object]) -> None:
    stage.reporter.cancel()
    with pytest.raises(TaskCancelled):
        step()
    step()


def standing_clock() -> Callable[[], float]:
    """A clock by which every second report is in the interval of the first, however late it is."""
    now = time.monotonic()
    return lambda: now


def test_a_publisher_that_raises_does_not_stop_the_sampler(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(number: int, progress: Progress) -> None:
        if number > 1:
            raise RuntimeError("broken")

    sampler = Sampler()
    broken = Reporter(fail, 0.001, clock=standing_clock(), sampler=sampler)
    broken.report(1)
    broken.report(2)
    published = threading.Event()
    good = Reporter(
        lambda number, progress: number == 2 and published.set(),
        0.001,
        clock=standing_clock(),
        sampler=sampler,
    )
    good.report(1)
    good.report(2)
    assert published.wait(LIMIT)
    wait_until(lambda: "could not be published" in caplog.text, "the error was not logged")


def test_a_sampler_whose_thread_does_not_start_tries_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    published = threading.Event()
    sampler = Sampler()
    reporter = Reporter(
        lambda n, p: p.current == 3 and published.set(),
        0.001,
        clock=standing_clock(),
        sampler=sampler,
    )
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        reporter.report(1)
        reporter.report(2)
    assert "did not start" in caplog.text
    other = Reporter(lambda n, p: None, 0.001, clock=standing_clock(), sampler=sampler)
    other.report(1)
    other.report(2)
    reporter.report(3)
    assert published.wait(LIMIT)


# Through a backend


@pytest.mark.parametrize("repetition", range(200))
def test_a_burst(gate: str, repetition: int) -> None:
    """20,000 calls: few events, the last value while the task still runs, `finished` at the end."""
    events = []
    result = tasks.burst.enqueue(20_000, gate)
    with hub.subscribe(result.id) as subscription:
        for event in subscription:
            events.append(event)
            if event.progress and event.progress.current == 20_000:
                tasks.gates[gate].set()
    assert len(events) < 60
    assert events[-2].progress.current == 20_000
    assert events[-2].status == "RUNNING"
    assert events[-1].kind == "finished"
    assert [event.sequence for event in events] == sorted({event.sequence for event in events})


def test_a_message_inside_a_tracked_loop(gate: str) -> None:
    result = tasks.tracked.enqueue(10, gate)
    event = wait_for_event(result.id, lambda e: e.progress and e.progress.message == "half-way")
    assert (event.progress.current, event.progress.total) == (5, 10)
    tasks.gates[gate].set()
    finished(result)
    assert hub.snapshot(result.id).progress.percent == 100.0


@pytest.mark.parametrize(
    "message",
    ["two\nlines", "<script>alert(1)</script>", "🙂 \u2028 \x00", "x" * 1_000_000, "\ud800"],
)
def test_messages(gate: str, message: str) -> None:
    result = tasks.report.enqueue([1, 2, message], {}, gate)
    event = wait_for_event(result.id, lambda event: event.progress)
    assert event.progress.message == message
    tasks.gates[gate].set()
    assert finished(result).return_value == "reported"


def test_an_error_in_a_report_is_the_tasks_own(gate: str) -> None:
    result = finished(tasks.report.enqueue([1, -1], {}, gate))
    assert result.return_value.startswith("ValueError: total must be above zero")


def test_what_cannot_be_sampled_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def sample(self) -> float | None:
            raise RuntimeError("a mistake")

    class Sound:
        def __init__(self) -> None:
            self.sampled = threading.Event()

        def sample(self) -> float | None:
            self.sampled.set()
            return None

    sampler, sound = Sampler(), Sound()
    sampler.add(Broken(), 0)
    sampler.add(sound, 1)
    assert sound.sampled.wait(LIMIT)
    assert "Broken could not be sampled" in caplog.text
