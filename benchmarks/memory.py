"""
Measure whether memory stays flat over a million tasks. See docs/performance.md.

    uv run benchmarks/memory.py [--tasks 1000000]

Prints the resident memory of the process while it runs tasks that do nothing, with MAX_RESULTS
1000. At most 1,000 tasks are in flight, so growth comes from finished tasks. Linux only.
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

BATCH = 1_000  # tasks in flight, at most
STEP = 50_000  # tasks between two readings
BUDGET = 2.0  # MiB of growth after the first reading

calls = itertools.count(1)  # next() on it is atomic
batch_done = threading.Event()


def step() -> None:
    """Count one call, and set `batch_done` at the last of a batch: the task function."""
    if next(calls) % BATCH == 0:
        batch_done.set()


def resident_mebibytes() -> float:
    """Return the resident set size of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_batch() -> None:
    """Run a batch of tasks and wait for the last of them."""
    batch_done.clear()
    django_task = task(step)
    for _ in range(BATCH):
        django_task.enqueue()
    batch_done.wait()


def measure(tasks: int) -> list[tuple[int, float]]:
    """Return the resident memory after each STEP of the tasks."""
    readings = []
    for done in range(BATCH, tasks + 1, BATCH):
        run_batch()
        if done % STEP == 0:
            readings.append((done, resident_mebibytes()))
    return readings


def main() -> None:
    """Measure and print."""
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
