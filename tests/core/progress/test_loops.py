"""Nested and overlapping track() loops: the percentage, the message, the unit and the levels."""

import asyncio
import contextlib
import gc
import itertools
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from django.tasks import task

from django_tasks_local import report_progress, track
from django_tasks_local.hub import hub
from django_tasks_local.progress.reporter import current_reporting
from tests.support.stage import Stage


@pytest.fixture
def stage() -> Iterator[Stage]:
    stage = Stage()
    token = current_reporting.set(stage)
    yield stage
    current_reporting.reset(token)


def percent(stage: Stage) -> float | None:
    """Return the percentage in a new sample, to two digits."""
    stage.sample()
    value = stage.last.percent
    return None if value is None else round(value, 2)


def level(message: str, current: int | None, total: int | None, unit: str = "") -> dict[str, Any]:
    return {"message": message, "current": current, "total": total, "unit": unit}


def test_bar_falls_back_at_each_step_of_the_outer_loop(stage: Stage) -> None:
    """The percentage only rises, and the numbers are those of the outer loop."""
    percents = []
    for step in track(range(4), message="pages"):
        for _ in track(range(10)):
            percents.append(percent(stage))
            assert (stage.last.current, stage.last.total) == (step, 4)
    assert percents == [step * 2.5 for step in range(40)]
    assert percent(stage) == 100.0


def test_percentage_of_three_loops(stage: Stage) -> None:
    first = track(range(2))
    second = track(range(5))
    third = track(range(4))
    assert [next(first), next(first), next(second), next(third), next(third)] == [0, 1, 0, 0, 1]
    assert percent(stage) == 52.5  # (1 + (0 + 1/4) / 5) / 2
    third.close()  # type: ignore[attr-defined]
    second.close()  # type: ignore[attr-defined]
    assert list(first) == []
    assert percent(stage) == 100.0


def test_inner_loop_of_unknown_length_counts_as_nothing(stage: Stage) -> None:
    for step in track(range(4)):
        for _ in track(iter("abc")):
            assert percent(stage) == 25.0 * step
            assert stage.last.levels[1] == level("", stage.last.levels[1]["current"], None)


def test_outer_loop_of_unknown_length_has_no_percentage(stage: Stage) -> None:
    for _ in track(iter("ab")):
        for _ in track(range(2)):
            assert percent(stage) is None
    assert stage.sample() == (2, None, "")


def test_an_inner_loop_that_is_left_early_keeps_the_percentage(stage: Stage) -> None:
    percents = []
    for _ in track(range(4)):
        for number in track(range(10)):
            percents.append(percent(stage))
            if number == 5:
                break
        percents.append(percent(stage))
    assert percents == sorted(percents)
    assert percents[6:8] == [12.5, 25.0]


def test_percentage_falls_with_a_new_total(stage: Stage) -> None:
    loop = track(range(4))
    assert [next(loop), next(loop), next(loop)] == [0, 1, 2]
    assert percent(stage) == 50.0
    report_progress(total=8)
    assert percent(stage) == 25.0


def test_percentage_falls_with_another_outermost_loop(stage: Stage) -> None:
    assert list(track(range(4))) == [0, 1, 2, 3]
    assert percent(stage) == 100.0
    for step in track(range(2)):
        assert percent(stage) == 50.0 * step


def test_percentage_falls_as_reported_outside_of_loops(stage: Stage) -> None:
    for reported in (50, 20):
        report_progress(reported)
        assert percent(stage) == reported
    for _ in track(range(10), message="loop"):
        pass
    assert percent(stage) == 100.0
    report_progress(3)
    assert percent(stage) == 30.0


def test_report_in_a_nested_loop_sets_the_innermost_one(stage: Stage) -> None:
    for _ in track(range(2), message="outer"):
        for _ in track("ab", message="inner"):
            report_progress(30, 60, unit="MB")
            assert stage.sample() == (0, 2, "inner")
            assert stage.last.unit == ""
            assert stage.last.percent == 25.0
            assert stage.last.levels == [level("outer", 0, 2), level("inner", 30, 60, "MB")]
            return


def test_levels_need_two_open_loops(stage: Stage) -> None:
    assert list(track("a", message="alone")) == ["a"]
    stage.sample()
    assert stage.last.levels == []
    for _ in track("ab", message="files", unit="files"):
        stage.sample()
        assert stage.last.levels == []
        for _ in track(iter("c"), unit="pages"):
            stage.sample()
            assert stage.last.levels == [
                level("files", stage.last.current, 2, "files"),
                level("", 0, None, "pages"),
            ]
    stage.sample()
    assert stage.last.levels == []


def test_message_is_the_newest_one_of_the_open_loops(stage: Stage) -> None:
    report_progress(message="before")
    for _ in track("a"):
        assert stage.sample()[2] == "before"
        for _ in track("b", message="middle"):
            for _ in track("c"):
                assert stage.sample()[2] == "middle"
                report_progress(message=None)
                assert stage.sample()[2] == ""
                report_progress(message="reported")
                assert stage.sample()[2] == "reported"
            assert stage.sample()[2] == "reported"
        assert stage.sample()[2] == "reported"


def test_message_none_clears_that_of_the_outer_loop(stage: Stage) -> None:
    for _ in track("a", message="outer"):
        for _ in track("b", message=None):
            assert stage.sample()[2] == ""
        assert stage.sample()[2] == "outer"


def test_unit_is_kept_and_none_clears_it(stage: Stage) -> None:
    seen = []
    for keywords in ({"unit": "pages"}, {"current": 5}, {"unit": None}, {"unit": "files"}):
        report_progress(**keywords)  # type: ignore[arg-type]
        stage.sample()
        seen.append(stage.last.unit)
    assert seen == ["pages", "pages", "", "files"]
    for _ in track("ab", unit="letters"):
        stage.sample()
        assert stage.last.unit == "letters"
    for _ in track("ab"):
        stage.sample()
        assert stage.last.unit == ""


# A total of 0


def test_export_without_rows_fails_at_its_first_report(stage: Stage) -> None:
    report_progress(0, 0)
    progress = stage.last
    assert (progress.current, progress.total, progress.percent, progress.eta) == (0, 0, 100.0, 0)


@pytest.mark.parametrize("keywords", [{}, {"total": 0}])
def test_empty_loop_is_done(stage: Stage, keywords: dict[str, Any]) -> None:
    assert list(track([], **keywords)) == []
    assert percent(stage) == 100.0
    assert stage.sample() == (0, 0, "")


def test_empty_async_loop_is_done(stage: Stage) -> None:
    class Rows:
        def __len__(self) -> int:
            return 0

        async def __aiter__(self) -> AsyncIterator[str]:
            for row in ():
                yield row

    async def loop() -> list[str]:
        return [row async for row in track(Rows())]

    assert asyncio.run(loop()) == []
    assert stage.sample() == (0, 0, "")


def test_items_despite_a_total_of_zero(stage: Stage) -> None:
    assert list(track(iter("ab"), total=0)) == ["a", "b"]
    assert percent(stage) == 100.0
    assert stage.sample() == (2, 0, "")


# Loops that overlap without nesting


async def numbers(count: int) -> AsyncIterator[int]:
    for number in range(count):
        await asyncio.sleep(0)
        yield number


def test_loops_in_gather_are_no_levels_of_each_other(stage: Stage) -> None:
    """Only the first of the inner loops counts for the percentage; all of them are levels."""

    async def inner(name: str, steps: int, barrier: asyncio.Barrier) -> None:
        async with contextlib.aclosing(track(numbers(8), 8, name)) as loop:  # type: ignore[type-var]
            for _ in range(steps + 1):
                await anext(loop)
            await barrier.wait()
            await barrier.wait()

    async def outer() -> None:
        for _ in track("ab", message="outer"):
            barrier = asyncio.Barrier(3)
            async with asyncio.TaskGroup() as group:
                group.create_task(inner("first", 4, barrier))
                await asyncio.sleep(0)
                group.create_task(inner("second", 6, barrier))
                await barrier.wait()
                assert percent(stage) == 25.0
                assert stage.last.levels == [
                    level("outer", 0, 2),
                    level("first", 4, 8),
                    level("second", 6, 8),
                ]
                await barrier.wait()
            return

    asyncio.run(outer())


def test_percentage_does_not_fall_when_the_first_of_two_overlapping_loops_ends(
    stage: Stage,
) -> None:
    def in_copied_context(*args: Any) -> tuple[Any, Any]:
        context, loop = copy_context(), track(*args)
        return loop, lambda: context.run(next, loop)

    outer = track(range(2))
    next(outer)
    first, step_first = in_copied_context(range(4))
    second, step_second = in_copied_context(range(10))
    for _ in range(4):
        step_first()
    step_second()
    step_second()
    assert percent(stage) == 37.5
    first.close()
    assert percent(stage) == 37.5  # The second loop alone would make it 5 %.
    for _ in range(8):
        step_second()
    assert percent(stage) == 45.0
    second.close()
    outer.close()  # type: ignore[attr-defined]


def test_loops_in_threads_are_inside_the_loop_that_started_them(stage: Stage) -> None:
    def convert(page: int) -> float | None:
        for step in track(range(4)):
            if step == 2:
                return percent(stage)
        return None

    with ThreadPoolExecutor(1) as executor:
        percents = [
            executor.submit(copy_context().run, convert, page).result() for page in track(range(2))
        ]
    assert percents == [25.0, 75.0]


def test_a_loop_is_not_inside_one_that_asyncio_closed_later(stage: Stage) -> None:
    """After a `break` in an `async for`, the context still names the loop that was left."""

    seen = []

    async def loops() -> None:
        async for _ in track(numbers(2), total=2):
            async for _ in track(numbers(4), total=4):
                break
            while stage.sample() and stage.last.levels:
                gc.collect()
                await asyncio.sleep(0)
            async for number in track(numbers(4), total=4):
                if number == 2:
                    seen.append(percent(stage))
                    assert len(stage.last.levels) == 2

    asyncio.run(loops())
    assert seen == [25.0, 75.0]


@task
def track_letters() -> None:
    for _ in track("ab", message="letters"):
        pass


def test_an_immediate_task_is_not_inside_the_loop_of_its_caller(stage: Stage) -> None:
    percents = []
    for _ in track(range(2), message="outer"):
        result = track_letters.using(backend="immediate").enqueue()
        event = hub.snapshot(result)
        assert event is not None
        assert event.progress is not None
        assert (event.progress.total, event.progress.message) == (2, "letters")
        assert event.progress.percent == 100.0
        assert event.progress.levels == []
        inner = track(range(2))
        assert [next(inner), next(inner)] == [0, 1]
        percents.append(percent(stage))
        del inner
    assert percents == [25.0, 75.0]
    assert stage.sample() == (2, 2, "outer")


def test_deeply_nested_loops(stage: Stage) -> None:
    """A recursive function may track each of its levels."""

    def descend(depth: int) -> None:
        for _ in track("ab"):
            if depth:
                descend(depth - 1)
            else:
                stage.sample()
            return

    descend(150)
    assert len(max((p.levels for _, p in stage.published), key=len)) == 151
    assert list(itertools.chain(track("ab"))) == ["a", "b"]
    assert stage.sample() == (2, 2, "")
