"""
Kill worker processes at random moments under load; check that no task is lost or finished twice.

    uv run stress/kill_storm.py [--kills 500] [--workers 4] [--seed 1]

The program mixes short and long tasks and cancels some. The exit status is 1 if a task stays
unfinished, finishes twice or has a wrong return value, if an event arrives out of order, if more
tasks than kills end with WorkerDied, or if a task that was not cancelled ends with TaskCancelled.
"""

import argparse
import collections
import logging
import multiprocessing.process
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import django
from django.conf import settings

if not settings.configured:
    settings.configure(
        USE_TZ=True,
        TASKS={
            "default": {
                "BACKEND": "django_tasks_local.ProcessPoolBackend",
                "OPTIONS": {"MAX_WORKERS": 4, "MAX_RESULTS": 1_000_000},
            }
        },
    )
    django.setup()

from django.tasks import TaskResultStatus, task, task_backends
from django.tasks.signals import task_finished

from django_tasks_local import cancel, report_progress
from django_tasks_local.hub import hub

PENDING = 200  # The number of tasks that wait or run at any time.
# Steps of a task and their weights: most take a millisecond at most, one in 17 about 0.1 s.
STEPS, WEIGHTS = (0, 1, 10, 300, 10_000), (4, 4, 4, 4, 1)
CANCELLED = 0.05  # The share of the tasks that the program cancels.
# The parent process has this number of file descriptors open for each worker: the socket, the
# lifeline, and two of multiprocessing.
FILES_PER_WORKER = 4
PATIENCE = 60.0  # If no task finishes for this number of seconds, the program exits with an error.
WORKER_DIED = "django_tasks_local.exceptions.WorkerDied"
TASK_CANCELLED = "django_tasks_local.exceptions.TaskCancelled"


@task
def work(steps: int) -> int:
    """Call report_progress() and compute, `steps` times."""
    for step in range(steps):
        report_progress(step, steps)
        sum(range(500))
    return steps


class Storm:
    """Enqueues and cancels tasks and kills workers, `kills` times; then checks all results."""

    def __init__(self, kills: int, workers: int, seed: int) -> None:
        settings.TASKS["default"]["OPTIONS"]["MAX_WORKERS"] = workers
        self.kills = kills
        self.worker_count = workers
        self.rng = random.Random(seed)
        self.finishes: collections.Counter[str] = collections.Counter()
        self.steps: dict[str, int] = {}
        self.recent: collections.deque[str] = collections.deque(maxlen=PENDING)
        self.cancelled: set[str] = set()
        self.workers: set[int] = set()  # The process ids of workers that have run a task.
        self.one_finished = threading.Event()
        self.late_events = 0
        task_finished.connect(self.on_finished)

    def on_finished(self, sender: type, task_result: Any, **kwargs: object) -> None:
        """Count the finish of a task and note its worker. Called in a thread of the backend."""
        self.finishes[task_result.id] += 1
        self.workers.update(
            int(worker_id.rpartition("@")[2]) for worker_id in task_result.worker_ids
        )
        self.one_finished.set()

    def watch(self) -> None:
        """Count events that arrive after a newer event of the same task. Runs in a thread."""
        last: dict[str, Any] = {}
        with hub.subscribe() as subscription:
            for event in subscription:
                self.late_events += event.id in last and event.version <= last[event.id]
                last[event.id] = event.version

    def run(self) -> bool:
        """Run until `kills` workers are killed and all tasks finished; True without violation."""
        threading.Thread(target=self.watch, daemon=True).start()
        while len(self.workers) < self.worker_count:
            self.fill()
            self.wait_for_one()
        began = time.monotonic()
        files = self.files_without_workers()
        killed = 0
        while killed < self.kills:
            self.fill()
            time.sleep(self.rng.uniform(0, 0.03))
            killed += self.kill()
        while len(self.finishes) < len(self.steps):
            self.wait_for_one()
        seconds = time.monotonic() - began
        return self.report(killed, seconds, self.files_without_workers() - files)

    def fill(self) -> None:
        """Enqueue tasks until PENDING are unfinished, and cancel some of them."""
        self.one_finished.clear()
        while len(self.steps) - len(self.finishes) < PENDING:
            [steps] = self.rng.choices(STEPS, WEIGHTS)
            result_id = work.enqueue(steps).id
            self.steps[result_id] = steps
            self.recent.append(result_id)
            if self.rng.random() < CANCELLED:
                chosen = self.rng.choice(self.recent)
                # Add the id before the call, because the task may finish before cancel() returns.
                self.cancelled.add(chosen)
                cancel(chosen)

    def wait_for_one(self) -> None:
        """Wait until a task finishes; exit the program after PATIENCE seconds without one."""
        if not self.one_finished.wait(PATIENCE):
            unfinished = len(self.steps) - len(self.finishes)
            raise SystemExit(f"{unfinished} tasks did not finish in {PATIENCE} seconds.")
        self.one_finished.clear()

    def kill(self) -> int:
        """Kill one worker, busy or idle, or rarely all of them; return the number of kills."""
        # Workers that still start are spared, because after several failed starts in a row the
        # backend starts no workers for some time.
        known = [child.pid for child in children() if child.pid in self.workers]
        victims = known if self.rng.random() < 0.02 else self.rng.sample(known, min(1, len(known)))
        for pid in victims:
            self.workers.discard(pid)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(victims)

    def files_without_workers(self) -> int:
        """Return the number of open files minus those for workers; 0 if there is no /proc."""
        directory = Path("/proc/self/fd")
        if not directory.exists():
            return 0
        return len(list(directory.iterdir())) - FILES_PER_WORKER * len(children())

    def report(self, killed: int, seconds: float, files: int) -> bool:
        """Print the figures and return whether there is no violation."""
        backend = task_backends["default"]
        results = [backend.get_result(result_id) for result_id in self.steps]
        ends = {
            result.id: (
                result.errors[0].exception_class_path if result.errors else str(result.status)
            )
            for result in results
        }
        states = collections.Counter(ends.values())
        wrong = sum(
            result.status == TaskResultStatus.SUCCESSFUL
            and result.return_value != self.steps[result.id]
            for result in results
        )
        twice = sum(count > 1 for count in self.finishes.values())
        without_cancel = sum(
            end == TASK_CANCELLED and result_id not in self.cancelled
            for result_id, end in ends.items()
        )
        unfinished = sum(not result.is_finished for result in results)
        print(f"{killed} kills in {seconds:.0f} s under {len(results)} tasks: {dict(states)}")
        print(f"wrong: {wrong}, finished twice: {twice}, unfinished: {unfinished}, ", end="")
        print(f"late events: {self.late_events}, cancelled without cancel(): {without_cancel}")
        print(f"files left open: {files}")
        violations = wrong + twice + unfinished + self.late_events + without_cancel
        return not violations and states[WORKER_DIED] <= killed


def children() -> list[Any]:
    """Return the worker processes, without reaping dead ones as active_children() would."""
    return list(multiprocessing.process._children.copy())


def main() -> None:
    """Run once with the options of the command line; exit with 1 after a violation."""
    parser = argparse.ArgumentParser(description="Kill worker processes under load.")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable()  # The backend would log each failed task with a traceback.
    storm = Storm(arguments.kills, arguments.workers, arguments.seed)
    if not storm.run():
        raise SystemExit("At least one check failed.")


if __name__ == "__main__":
    main()
