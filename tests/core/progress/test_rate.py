"""Rate, percent_of() and seconds_left(): the speed, the percentage and the time left of a loop."""

import math

import pytest

from django_tasks_local.progress.rate import SMOOTHING, Rate, percent_of, seconds_left


def test_the_first_report_is_the_base() -> None:
    rate = Rate()
    assert rate.update(5_000, now=10.0) is None
    assert rate.update(5_100, now=11.0) == pytest.approx(100)
    assert rate.update(5_200, now=12.0) == pytest.approx(100)


def test_a_loop_that_starts_has_a_base_of_zero() -> None:
    rate = Rate()
    rate.start(now=10.0)
    assert rate.update(50, now=11.0) == pytest.approx(50)


def test_later_steps_weigh_more() -> None:
    rate = Rate()
    rate.start(now=0.0)
    rate.update(100, now=1.0)
    values = [rate.update(100 + 10 * second, now=1.0 + second) for second in range(1, 60)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(50.5, abs=5)
    at_smoothing = values[int(SMOOTHING) - 1]
    assert at_smoothing is not None
    assert 10 < at_smoothing < 40
    assert values[-1] == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize(
    ("current", "now"),
    [
        (100, 2.0),  # no step since the last report
        (110, 1.0),  # a step, but no time has passed
    ],
)
def test_the_rate_stays_without_a_new_step(current: int, now: float) -> None:
    rate = Rate()
    rate.start(now=0.0)
    assert rate.update(100, now=1.0) == pytest.approx(100)
    assert rate.update(current, now=now) == pytest.approx(100)


@pytest.mark.parametrize("lower", [50, None])
def test_a_count_that_falls_starts_a_new_rate(lower: int | None) -> None:
    rate = Rate()
    rate.start(now=0.0)
    assert rate.update(100, now=1.0) == pytest.approx(100)
    assert rate.update(lower, now=2.0) is None
    # After None the next report is the base of the new rate; after 50 the base is 50.
    expected = None if lower is None else pytest.approx(10)
    assert rate.update(60, now=3.0) == expected


def test_a_rate_has_four_digits() -> None:
    rate = Rate()
    rate.start(now=0.0)
    assert rate.update(1, now=3.0) == 0.3333


@pytest.mark.parametrize(
    ("current", "total", "percent"),
    [
        (None, 100, None),
        (1, None, None),
        (0, 100, 0.0),
        (1, 3, pytest.approx(33.33, abs=0.01)),
        (150, 100, 100.0),
        (-5, 100, 0.0),
        (1e99, 1e-99, 100.0),
    ],
)
def test_percent_of(current: float | None, total: float | None, percent: float | None) -> None:
    assert percent_of(current, total) == percent


@pytest.mark.parametrize(
    ("current", "total", "rate", "seconds"),
    [
        (None, 100, 1.0, None),
        (1, None, 1.0, None),
        (1, 100, None, None),
        (40, 100, 2.0, 30.0),
        (1, 2, 3.0, 0.3),
        (150, 100, 2.0, 0.0),
        (0, 1e99, 5e-324, None),  # the quotient exceeds every float
    ],
)
def test_seconds_left(
    current: float | None, total: float | None, rate: float | None, seconds: float | None
) -> None:
    left = seconds_left(current, total, rate)
    assert left == seconds
    assert left is None or math.isfinite(left)
