"""
Measure the cost of report_progress() and track(), and that of tqdm and a bare loop.
See docs/performance.md.

    uv run benchmarks/progress.py [--rounds 7] [--steps 2000000]

Each round measures everything once, so that changes of the machine's speed affect all in the same
way. "In a task" means that a task of ThreadPoolBackend runs the measured loop, also that of tqdm
and the bare loop.
"""

import argparse
import io
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import django
from django.conf import settings
from django.tasks import task
from tqdm import tqdm

from benchmarks.common.tables import (
    median_ratio,
    print_machine,
    print_table,
    print_verdict,
)
from django_tasks_local import report_progress, track

REPORT_BUDGET = 1.5  # The largest number of µs for a call of report_progress() in a task.
TRACK_BUDGET = 1.0  # The largest ratio of the time of track() per item to that of tqdm().

# By the name of a loop, the µs per call or item in each round.
type Measured = dict[str, list[float]]


def time_loop(items: Iterable[int]) -> float:
    """Return the seconds that an empty loop over the items takes."""
    began = time.perf_counter()
    for _ in items:
        pass
    return time.perf_counter() - began


def time_tqdm_to_devnull(steps: int) -> float:
    """Return the seconds of a loop over tqdm, which writes its bar to the null device."""
    with Path(os.devnull).open("w", encoding="utf-8") as devnull:
        return time_loop(tqdm(range(steps), file=devnull))


def time_reports(steps: int) -> float:
    """Return the seconds of `steps` calls of report_progress(), nearly all of them throttled."""
    began = time.perf_counter()
    for step in range(steps):
        report_progress(step, steps)
    return time.perf_counter() - began


def time_reports_with_message(steps: int) -> float:
    """Return the seconds of `steps` calls of report_progress() with a message."""
    began = time.perf_counter()
    for step in range(steps):
        report_progress(step, steps, "resizing")
    return time.perf_counter() - began


LOOPS: dict[str, Callable[[int], float]] = {
    "bare for loop": lambda steps: time_loop(range(steps)),
    "track()": lambda steps: time_loop(track(range(steps))),
    "tqdm() to the null device": time_tqdm_to_devnull,
    "tqdm() to a StringIO": lambda steps: time_loop(tqdm(range(steps), file=io.StringIO())),
}
REPORTS: dict[str, Callable[[int], float]] = {
    "report_progress(step, steps)": time_reports,
    "the same with a message": time_reports_with_message,
}


def measure(name: str, steps: int) -> float:
    """Return µs per step of the loop with this name."""
    return {**LOOPS, **REPORTS}[name](steps) / steps * 1e6


def measure_in_task(name: str, steps: int) -> float:
    """Call measure() in a task of ThreadPoolBackend and return its result."""
    result = task(measure).enqueue(name, steps)
    while not result.is_finished:
        time.sleep(0.02)
        result.refresh()
    value: float = result.return_value
    return value


def measure_all(rounds: int, steps: int) -> tuple[Measured, Measured]:
    """Return the measurements in a task and those outside of a task, in interleaved rounds."""
    inside: Measured = {name: [] for name in (*LOOPS, *REPORTS)}
    outside: Measured = {name: [] for name in REPORTS}
    for _ in range(rounds):
        for name, times in inside.items():
            times.append(measure_in_task(name, steps))
        for name, times in outside.items():
            times.append(measure(name, steps))
    return inside, outside


def print_loops(inside: Measured) -> None:
    """Print the time per item of each loop, and the ratio of the time of track() to it."""
    rows = [
        (name, f"{median(times):.3f}", f"{median_ratio(inside['track()'], times):.2f}")
        for name, times in inside.items()
        if name in LOOPS
    ]
    print_table(("loop in a task", "µs per item", "track() / this"), rows)


def print_reports(inside: Measured, outside: Measured) -> None:
    """Print the time of one call of report_progress(), in a task and outside of one."""
    rows = [
        (name, f"{median(inside[name]):.2f}", f"{median(outside[name]):.2f}") for name in REPORTS
    ]
    print_table(("call", "µs in a task", "µs outside of one"), rows)


def main() -> None:
    """Run the benchmark, and print tables and whether each budget is met."""
    parser = argparse.ArgumentParser(description="The cost of report_progress() and track().")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2_000_000)
    options = parser.parse_args()
    settings.configure(
        TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"}}, USE_TZ=True
    )
    django.setup()
    inside, outside = measure_all(options.rounds, options.steps)
    print_machine(f"Medians of {options.rounds} interleaved rounds, {options.steps:,} steps each.")
    print_loops(inside)
    print_reports(inside, outside)
    slowest_report = max(median(inside[name]) for name in REPORTS)
    print_verdict("a throttled report_progress() in a task", slowest_report, REPORT_BUDGET, "µs")
    ratio = median_ratio(inside["track()"], inside["tqdm() to the null device"])
    print_verdict("track() per item", ratio, TRACK_BUDGET, "times tqdm()")


if __name__ == "__main__":
    main()
