"""report_progress() and track(): the published values, throttling, rate and cancellation."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.contrib.auth.models import User
from django.utils.translation import gettext_lazy

from django_tasks_local import current_result_id, report_progress, track
from django_tasks_local.cancellation import Cancellation
from django_tasks_local.events import Progress
from django_tasks_local.exceptions import TaskCancelled
from django_tasks_local.hub import hub
from django_tasks_local.progress.reporter import Reporter, current_reporting
from django_tasks_local.ticker import Ticker
from tests.project import tasks
from tests.support.stage import Stage
from tests.support.waiting import LIMIT, finished, wait_for_event, wait_until


@pytest.fixture
def stage() -> Any:
    stage = Stage()
    token = current_reporting.set(stage)
    yield stage
    current_reporting.reset(token)


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
def test_values_of_a_report(stage: Stage, arguments: Any, keywords: Any, expected: Any) -> None:
    report_progress(*arguments, **keywords)
    progress = stage.last
    assert (progress.current, progress.total, progress.message) == (
        expected[0],
        expected[1],
        expected[3],
    )
    assert progress.percent == (expected[2] if expected[2] is None else pytest.approx(expected[2]))


def test_omitted_values_stay_unchanged(stage: Stage) -> None:
    steps: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        (
            {"current": 1, "total": 5, "message": "one", "data": {"key": "a"}},
            (1, 5, "one", {"key": "a"}),
        ),
        ({"current": 2}, (2, 5, "one", {"key": "a"})),
        ({"message": "two"}, (2, 5, "two", {"key": "a"})),
        ({"data": {"other": [1]}}, (2, 5, "two", {"other": [1]})),
        ({"total": None}, (2, None, "two", {"other": [1]})),
        ({"current": None, "message": None}, (None, None, "", {"other": [1]})),
        ({"data": None}, (None, None, "", {})),
        ({}, (None, None, "", {})),
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
        ((1, -3), {}, ValueError, "total must be 0 or more.*not -3"),
        ((1, -0.5), {}, ValueError, "total must be 0 or more.*not -0.5"),
        (("50",), {}, TypeError, "current must be a number or None, not '50'"),
        ((True,), {}, TypeError, "current must be a number or None, not True"),
        ((1j,), {}, TypeError, "current must be a real number"),
        ((Decimal("sNaN"),), {}, TypeError, "current must be a real number"),
        (([],), {}, TypeError, "current must be"),
        ((1, "many"), {}, TypeError, "total must be"),
        ((1, 2, b"bytes"), {}, TypeError, "message must be a string or None, not b'bytes'"),
        ((1, 2, 3), {}, TypeError, "message must be"),
        ((), {"unit": 3}, TypeError, "unit must be a string or None, not 3"),
        ((), {"data": [1]}, TypeError, r"data must be a dict or None, not \[1\]"),
    ],
)
def test_invalid_values(
    stage: Stage, in_task: bool, arguments: Any, keywords: Any, error: Any, message: str
) -> None:
    if not in_task:
        token = current_reporting.set(None)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        report_progress(*arguments, **keywords)
    if not in_task:
        current_reporting.reset(token)
    assert stage.published == []


def test_calls_outside_of_a_task() -> None:
    report_progress(1, 2, "outside of a task", data={"key": object()}, unit="pages")
    assert list(track([1, 2])) == [1, 2]
    assert list(track(iter("ab"), total=2, message="letters")) == ["a", "b"]


def test_data_is_copied(stage: Stage) -> None:
    rows = [1]
    report_progress(data={"rows": rows})
    rows.append(2)
    assert stage.last.data == {"rows": [1]}


def test_at_most_one_event_per_interval(stage: Stage) -> None:
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


def test_no_event_after_close(stage: Stage) -> None:
    report_progress(1)
    report_progress(2)
    number, progress = stage.reporter.close()
    assert (number, progress.current) == (1, 2)
    stage.tick(5.0)
    report_progress(3)
    assert len(stage.published) == 1


def test_no_progress_before_the_first_report() -> None:
    assert Stage().reporter.close() == (0, None)


def test_rate_and_eta(stage: Stage) -> None:
    report_progress(5_000, 10_000)
    assert (stage.last.rate, stage.last.eta) == (None, None)
    for second in range(1, 5):
        stage.now = float(second)
        report_progress(5_000 + 100 * second)
    # The first report, of 5,000, does not count as 5,000 steps.
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


def test_sampler_publishes_count_of_tracked_loop(stage: Stage) -> None:
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
    assert stage.ticker.due == []


class OfHugeLength:
    """An iterable whose __len__() exceeds sys.maxsize, so that len() raises OverflowError."""

    def __len__(self) -> int:
        return 10**100

    def __iter__(self) -> Iterator[str]:
        return iter("ab")


def test_track_unknown_length(stage: Stage) -> None:
    assert list(track(iter("ab"))) == ["a", "b"]
    assert stage.sample() == (2, None, "")
    assert list(track(OfHugeLength())) == ["a", "b"]
    assert stage.sample() == (2, None, "")
    assert list(track(iter("ab"), total=2)) == ["a", "b"]
    assert stage.sample() == (2, 2, "")


def test_track_left_early(stage: Stage) -> None:
    for item in track(range(10)):
        if item == 3:
            break
    stage.tick(1.0)
    assert stage.last.current == 3
    stage.tick(2.0)
    assert stage.ticker.due == []


def test_outer_loop_after_inner_loop(stage: Stage) -> None:
    seen = []
    for outer in track(range(3), message="outer"):
        for _ in track(range(10 + outer), message="inner"):
            pass
        seen.append(stage.sample())
        for _ in track(iter("ab")):
            seen.append(stage.sample())
            break
        seen.append(stage.sample())
    assert seen == [(step, 3, "outer") for step in range(3) for _ in range(3)]
    assert stage.sample() == (3, 3, "outer")
    stage.sample()
    assert stage.ticker.due == []


def test_outer_loop_after_error_in_inner_loop(stage: Stage) -> None:
    for _ in track(range(3), message="outer"):
        inner = (1 // number for number in track([1, 0], message="inner"))
        with pytest.raises(ZeroDivisionError):
            list(inner)
    assert stage.sample() == (3, 3, "outer")


def test_report_in_inner_loop(stage: Stage) -> None:
    for _ in track(range(2), message="outer"):
        for _ in track("ab", message="inner"):
            report_progress(50, 60, "a message of its own", data={"stage": "upload"})
    assert stage.sample() == (2, 2, "a message of its own")
    assert stage.last.data == {"stage": "upload"}


def test_rate_is_that_of_the_outermost_loop(stage: Stage) -> None:
    for step in track(range(4)):
        for number in track(range(1000)):
            stage.now += 0.01
            if number == 500:
                stage.tick(stage.now)
                assert stage.last.rate == (None if step == 0 else pytest.approx(0.1, rel=0.5))
    assert stage.sample() == (4, 4, "")
    assert stage.last.rate == pytest.approx(0.1, rel=0.5)
    assert stage.last.eta == 0


@pytest.mark.parametrize("first", [0, 1])
def test_interleaved_loops_end_in_any_order(stage: Stage, first: int) -> None:
    for _ in track(range(3), message="outer"):
        loops = [track(range(5), message="one"), track(range(7), message="another")]
        for loop in loops:
            assert [next(loop), next(loop)] == [0, 1]
        outer = stage.sample()[0]
        assert stage.sample() == (outer, 3, "another")
        loops.pop(first).close()  # type: ignore[attr-defined]
        assert stage.sample() == (outer, 3, "another" if first == 0 else "one")
        loops.pop().close()  # type: ignore[attr-defined]
    assert stage.sample() == (3, 3, "outer")


def test_outer_loop_that_ends_first(stage: Stage) -> None:
    outer, inner = track(range(3), message="outer"), track(range(9), message="inner")
    assert [next(outer), next(inner)] == [0, 0]
    assert list(outer) == [1, 2]
    assert stage.sample() == (0, 9, "inner")
    del inner
    assert stage.sample() == (3, 3, "outer")
    stage.sample()
    assert stage.ticker.due == []


def final_values(stage: Stage) -> tuple[Any, ...]:
    """Close the reporter and return the values of its last sample."""
    progress = stage.reporter.close()[1]
    assert progress is not None
    return progress.current, progress.total, progress.message


def test_loops_open_when_task_ends(stage: Stage) -> None:
    outer, inner = track(range(3), message="outer"), track(range(9), message="inner")
    assert [next(outer), next(inner), next(inner)] == [0, 0, 1]
    assert final_values(stage) == (0, 3, "outer")


async def letters() -> AsyncIterator[str]:
    """Yield "a", "b" and "c"."""
    for letter in "abc":
        yield letter


async def test_track_async_iterable(stage: Stage) -> None:
    assert [letter async for letter in track(letters(), total=3)] == ["a", "b", "c"]
    assert stage.sample() == (3, 3, "")
    async for _ in track(letters(), message="outer"):
        assert [letter async for letter in track(letters(), 3, "inner")] == ["a", "b", "c"]
    assert stage.sample() == (3, None, "outer")
    current_reporting.set(None)  # type: ignore[arg-type]
    assert [letter async for letter in track(letters())] == ["a", "b", "c"]


def test_inner_async_loop_left_early(stage: Stage) -> None:
    async def loops() -> None:
        async for _ in track(letters(), total=3, message="outer"):
            async for _ in track(letters(), message="inner"):
                break  # asyncio closes the inner generator later.

    asyncio.run(loops())
    assert final_values(stage) == (3, 3, "outer")


def test_async_task_that_fails_in_inner_loop(stage: Stage) -> None:
    async def loops() -> None:
        async for _ in track(letters(), total=3, message="outer"):
            async for _ in track(letters(), message="inner"):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(loops())
    assert final_values(stage) == (0, 3, "outer")


# Querysets. Each test creates its own queryset, because a queryset caches its rows.


def collect(users: Iterable[User]) -> list[str]:
    """Loop over the users with `for`; return their names."""
    return [user.username for user in users]


@async_to_sync
async def acollect(users: AsyncIterator[User]) -> list[str]:
    """Loop with `async for`, with the queries in the calling thread; return the users' names."""
    return [user.username async for user in users]


def all_users() -> Any:
    return User.objects.order_by("username")


def raw_users() -> Any:
    return User.objects.raw("SELECT * FROM auth_user ORDER BY username")


@pytest.fixture
def users(db: None) -> list[str]:
    names = ["ann", "bob", "eve"]
    User.objects.bulk_create(User(username=name) for name in names)
    return names


@pytest.fixture(params=[True, False], ids=["in a task", "outside"])
def maybe_stage(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("stage") if request.param else None


@pytest.mark.parametrize("queryset", [all_users, raw_users])
@pytest.mark.parametrize("loop", [collect, acollect])
def test_track_queryset(
    maybe_stage: Stage | None,
    users: list[str],
    loop: Any,
    queryset: Any,
    django_assert_num_queries: Any,
) -> None:
    with django_assert_num_queries(1):
        assert loop(track(queryset(), message="Users")) == users
    if maybe_stage:
        assert maybe_stage.sample() == (3, 3, "Users")
    User.objects.all().delete()
    assert loop(track(queryset())) == []
    if maybe_stage:
        assert maybe_stage.sample() == (0, 0, "Users")
        assert maybe_stage.last.percent == 100.0


@pytest.mark.parametrize("loop", [collect, acollect])
def test_track_queryset_with_total(
    maybe_stage: Stage | None, users: list[str], loop: Any, django_assert_num_queries: Any
) -> None:
    with django_assert_num_queries(2):
        assert loop(track(all_users(), total=User.objects.count())) == users
    if maybe_stage:
        assert maybe_stage.sample() == (3, 3, "")
    with django_assert_num_queries(1):
        assert loop(track(all_users(), total=None)) == users
    if maybe_stage:
        assert maybe_stage.sample() == (3, None, "")


@pytest.mark.parametrize(
    ("loop", "iterate"),
    [
        (collect, lambda: all_users().iterator()),
        (acollect, lambda: all_users().aiterator()),
    ],
)
def test_track_iterator_of_queryset(
    maybe_stage: Stage | None, users: list[str], loop: Any, iterate: Any
) -> None:
    assert loop(track(iterate())) == users
    if maybe_stage:
        assert maybe_stage.sample() == (3, None, "")
    assert loop(track(iterate(), total=all_users().count())) == users
    if maybe_stage:
        assert maybe_stage.sample() == (3, 3, "")


def test_total_of_queryset_is_set_at_first_step(stage: Stage, users: list[str]) -> None:
    @async_to_sync
    async def look_at_each(tracked: AsyncIterator[User]) -> list[Any]:
        return [stage.sample() async for _ in tracked]

    expected = [(0, 3, ""), (1, 3, ""), (2, 3, "")]
    assert [stage.sample() for _ in track(all_users())] == expected
    assert look_at_each(track(all_users())) == expected


def test_next_and_anext_of_tracked_queryset(maybe_stage: Stage | None, users: list[str]) -> None:
    @async_to_sync
    async def first(tracked: AsyncIterator[User]) -> str:
        return (await anext(tracked)).username

    assert next(track(all_users())).username == "ann"
    assert first(track(all_users())) == "ann"


async def test_len_that_raises_in_event_loop(stage: Stage) -> None:
    class Users:
        def __len__(self) -> int:
            return User.objects.count()

        def __aiter__(self) -> AsyncIterator[str]:
            return letters()

    assert [letter async for letter in track(Users())] == ["a", "b", "c"]
    assert stage.sample() == (3, None, "")


@pytest.mark.parametrize(
    ("iterable", "keywords", "error"),
    [
        ([1], {"total": -1}, ValueError),
        ([1], {"total": math.nan}, ValueError),
        ([1], {"total": "3"}, TypeError),
        ([1], {"message": 3}, TypeError),
        (User.objects.all(), {"total": -1}, ValueError),
    ],
)
def test_track_validates_arguments_when_called(
    stage: Stage, iterable: Any, keywords: Any, error: Any
) -> None:
    with pytest.raises(error):
        track(iterable, **keywords)


@pytest.mark.parametrize("in_task", [True, False])
def test_track_non_iterable(stage: Stage, in_task: bool) -> None:
    if not in_task:
        current_reporting.set(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'int' object is not iterable"):
        for _ in track(3):  # type: ignore[call-overload]
            pass
    assert stage.published == []


# Reports from other threads of a task


def report_from_a_thread(current: int) -> str:
    """Report progress; return current_result_id in this thread, or "unknown"."""
    report_progress(current)
    return current_result_id.get("unknown")


@pytest.fixture
def result_id() -> Iterator[str]:
    token = current_result_id.set("the task's id")
    yield "the task's id"
    current_result_id.reset(token)


def test_report_from_thread_with_context(stage: Stage, result_id: str) -> None:
    with ThreadPoolExecutor(2) as executor:
        futures = [
            executor.submit(copy_context().run, report_from_a_thread, number)
            for number in (1, 2, 3)
        ]
        assert [future.result() for future in futures] == [result_id] * 3
        assert stage.sample()[0] in {1, 2, 3}
        stage.cancellation.request()
        with pytest.raises(TaskCancelled):
            executor.submit(copy_context().run, report_from_a_thread, 4).result()


@pytest.mark.parametrize(
    "in_thread",
    [asyncio.to_thread, lambda function, *args: sync_to_async(function)(*args)],
)
def test_report_from_thread_of_coroutine(stage: Stage, result_id: str, in_thread: Any) -> None:
    async def report() -> Any:
        return await in_thread(report_from_a_thread, 7)

    assert asyncio.run(report()) == result_id
    assert stage.sample()[0] == 7


@pytest.mark.parametrize("step", [lambda: report_progress(1), lambda: list(track([1, 2]))])
def test_cancelling_is_told_once(stage: Stage, step: Callable[[], object]) -> None:
    stage.cancellation.request()
    with pytest.raises(TaskCancelled):
        step()
    step()


def standing_clock() -> Callable[[], float]:
    """Return a clock that stands still, so that every report after the first one is throttled."""
    now = time.monotonic()
    return lambda: now


def test_sampler_continues_after_error_of_publisher(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(number: int, progress: Progress) -> None:
        if number > 1:
            raise RuntimeError("broken")

    ticker = Ticker()
    broken = Reporter(fail, 0.001, Cancellation(), clock=standing_clock(), ticker=ticker)
    broken.report(1)
    broken.report(2)
    published = threading.Event()
    good = Reporter(
        lambda number, progress: number == 2 and published.set(),
        0.001,
        Cancellation(),
        clock=standing_clock(),
        ticker=ticker,
    )
    good.report(1)
    good.report(2)
    assert published.wait(LIMIT)
    wait_until(lambda: "could not be published" in caplog.text, "the error was not logged")


def test_sampler_starts_its_thread_again_after_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    published = threading.Event()
    ticker = Ticker()
    reporter = Reporter(
        lambda n, p: p.current == 3 and published.set(),
        0.001,
        Cancellation(),
        clock=standing_clock(),
        ticker=ticker,
    )
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        reporter.report(1)
        reporter.report(2)
    assert "did not start" in caplog.text
    other = Reporter(
        lambda n, p: None, 0.001, Cancellation(), clock=standing_clock(), ticker=ticker
    )
    other.report(1)
    other.report(2)
    reporter.report(3)
    assert published.wait(LIMIT)


# Progress of tasks that a backend runs


@pytest.mark.parametrize("repetition", range(200))
def test_burst_is_coalesced(gate: str, repetition: int) -> None:
    """
    Of 20,000 reports fewer than 60 become events, among them the last report before `finished`.
    """
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


def test_message_in_tracked_loop(gate: str) -> None:
    result = tasks.tracked.enqueue(10, gate)
    event = wait_for_event(result.id, lambda e: e.progress and e.progress.message == "half-way")
    assert (event.progress.current, event.progress.total) == (5, 10)
    tasks.gates[gate].set()
    finished(result)
    assert hub.snapshot(result.id).progress.percent == 100.0


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("task", [tasks.track_users, tasks.atrack_users])
def test_task_that_tracks_a_queryset(task: Any) -> None:
    User.objects.bulk_create(User(username=name) for name in ("ann", "bob"))
    result = finished(task.enqueue())
    assert result.return_value == ["ann", "bob"]
    progress = hub.snapshot(result.id).progress
    assert (progress.current, progress.total, progress.percent) == (2, 2, 100.0)


@pytest.mark.parametrize(
    "message",
    ["two\nlines", "<script>alert(1)</script>", "🙂 \u2028 \x00", "x" * 1_000_000, "\ud800"],
)
def test_messages_arrive_unchanged(gate: str, message: str) -> None:
    result = tasks.report.enqueue([1, 2, message], {}, gate)
    event = wait_for_event(result.id, lambda event: event.progress)
    assert event.progress.message == message
    tasks.gates[gate].set()
    assert finished(result).return_value == "reported"


def test_error_of_report_is_raised_in_task(gate: str) -> None:
    result = finished(tasks.report.enqueue([1, -1], {}, gate))
    assert result.return_value.startswith("ValueError: total must be 0 or more")


def test_sampler_continues_after_error_of_sample(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def tick(self) -> float | None:
            raise RuntimeError("a mistake")

    class Sound:
        def __init__(self) -> None:
            self.called = threading.Event()

        def tick(self) -> float | None:
            self.called.set()
            return None

    ticker, sound = Ticker(), Sound()
    ticker.add(Broken(), 0)
    ticker.add(sound, 1)
    assert sound.called.wait(LIMIT)
    assert "Broken.tick() failed" in caplog.text
