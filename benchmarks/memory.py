"""
Measure whether memory use stays constant over a million tasks. See docs/performance.md.

    uv run benchmarks/memory.py [--tasks 1000000]

The program runs tasks that do nothing, with MAX_RESULTS 1000, and prints the resident memory of its
process. At most 1,000 tasks are unfinished at any time, so finished tasks cause any growth. The
program runs on Linux only.
"""

import argparse
import itertools
import os
import threading
from pathlib import Path

import django
from django.conf import settings
from django.tasks import task

from benchmarks.common.tables import print_machine, print_table, print_verdict

BATCH = 1_000  # The maximum number of unfinished tasks.
STEP = 50_000  # The number of tasks between two readings of the memory.
BUDGET = 2.0  # The MiB by which memory may grow from the first reading to the last.

calls = itertools.count(1)  # Worker threads need no lock, because next() on it is atomic.
batch_done = threading.Event()


def step() -> None:
    """Count the call of this task function; set `batch_done` at the last call of a batch."""
    if next(calls) % BATCH == 0:
        batch_done.set()


def resident_mebibytes() -> float:
    """Return the resident set size of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_batch() -> None:
    """Enqueue BATCH tasks and wait until the last of them has run."""
    batch_done.clear()
    django_task = task(step)
    for _ in range(BATCH):
        django_task.enqueue()
    batch_done.wait()


def measure(tasks: int) -> list[tuple[int, float]]:
    """Run this number of tasks; return (tasks so far, resident memory) for each STEP of them."""
    readings = []
    for done in range(BATCH, tasks + 1, BATCH):
        run_batch()
        if done % STEP == 0:
            readings.append((done, resident_mebibytes()))
    return readings


def main() -> None:
    """Run the tasks, and print the readings and whether the budget is met."""
    parser = argparse.ArgumentParser(description="Whether memory stays flat over many tasks.")
    parser.add_argument("--tasks", type=int, default=1_000_000, help=f"a multiple of {STEP:,}")
    tasks = parser.parse_args().tasks
    if tasks < 2 * STEP or tasks % STEP:
        parser.error(f"--tasks must be a multiple of {STEP:,}, and at least {2 * STEP:,}.")
    settings.configure(
        TASKS={
            "default": {
                "BACKEND": "django_tasks_local.ThreadPoolBackend",
                "OPTIONS": {"MAX_RESULTS": 1000},
            }
        },
        USE_TZ=True,
    )
    django.setup()
    readings = measure(tasks)
    print_machine(f"{tasks:,} tasks, at most {BATCH:,} in flight, MAX_RESULTS 1000.")
    print_table(("tasks", "RSS in MiB"), [(f"{done:,}", f"{rss:.1f}") for done, rss in readings])
    growth = readings[-1][1] - readings[0][1]
    print_verdict(f"growth from {readings[0][0]:,} to {tasks:,} tasks", growth, BUDGET, "MiB")


if __name__ == "__main__":
    main()
