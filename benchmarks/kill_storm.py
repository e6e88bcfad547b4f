"""
Kill worker processes at random moments under load, and see that no task is lost or finished twice.

    uv run benchmarks/kill_storm.py [--kills 500] [--workers 4] [--seed 1]
"""

import argparse
import collections
import logging
import os
import random
import signal
import threading
import time
from pathlib import Path

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

from django_tasks_local import report_progress
from django_tasks_local.events import NO_VERSION, Version
from django_tasks_local.hub import hub

PENDING = 200  # tasks that wait or run
FILES_PER_WORKER = 4  # the socket, the life line, and multiprocessing's two
PATIENCE = 60.0  # seconds without a finished task, after which they are stuck


@task
def work(steps: int) -> int:
    """Report and compute."""
    for step in range(steps):
        report_progress(step, steps)
        sum(range(500))
    return steps


class Storm:
    """Enqueues and kills until there were enough kills, then looks at every result."""

    def __init__(self, kills: int, workers: int, seed: int) -> None:
        settings.TASKS["default"]["OPTIONS"]["MAX_WORKERS"] = workers
        self.kills = kills
        self.rng = random.Random(seed)
        self.finishes: collections.Counter[str] = collections.Counter()
        self.steps: dict[str, int] = {}
        self.one_finished = threading.Event()
        self.late_events = 0
        task_finished.connect(self.on_finished)

    def on_finished(self, sender: type, task_result: object, **kwargs: object) -> None:
        """Called in the dispatcher's thread."""
        self.finishes[task_result.id] += 1
        self.one_finished.set()

    def watch(self) -> None:
        """See that nothing comes after `finished`, and nothing twice. Runs in a thread."""
        last: dict[str, Version] = {}
        with hub.subscribe() as subscription:
            for event in subscription:
                self.late_events += event.version <= last.get(event.id, NO_VERSION)
                last[event.id] = event.version

    def run(self) -> bool:
        """Return whether all went well."""
        threading.Thread(target=self.watch, daemon=True).start()
        self.fill()
        self.wait_for_one()
        began = time.monotonic()
        files = self.other_files()
        killed = 0
        while killed < self.kills:
            self.fill()
            time.sleep(self.rng.uniform(0, 0.03))
            killed += self.kill()
        while len(self.finishes) < len(self.steps):
            self.wait_for_one()
        seconds = time.monotonic() - began
        return self.report(killed, seconds, self.other_files() - files)

    def fill(self) -> None:
        """Keep the workers busy."""
        self.one_finished.clear()
        while len(self.steps) - len(self.finishes) < PENDING:
            steps = self.rng.choice((0, 1, 10, 300))
            self.steps[work.enqueue(steps).id] = steps

    def wait_for_one(self) -> None:
        """Wait until a task is finished."""
        if not self.one_finished.wait(PATIENCE):
            raise SystemExit(f"{len(self.steps) - len(self.finishes)} tasks are stuck.")
        self.one_finished.clear()

    def kill(self) -> int:
        """Kill one worker that is there, busy or idle, or now and then all of them."""
        dispatcher = task_backends["default"]._pool._dispatcher
        ready = [worker for worker in list(dispatcher._workers) if worker.was_ready]
        if self.rng.random() > 0.02:
            ready = self.rng.sample(ready, min(1, len(ready)))
        for worker in ready:
            try:
                os.kill(int(worker.worker_id.rpartition("@")[2]), signal.SIGKILL)
            except ProcessLookupError:
                continue
        return len(ready)

    def other_files(self) -> int:
        """Return how many files are open besides those of the workers, where that can be told."""
        directory = Path("/proc/self/fd")
        if not directory.exists():
            return 0
        workers = len(task_backends["default"]._pool._dispatcher._workers)
        return len(list(directory.iterdir())) - FILES_PER_WORKER * workers

    def report(self, killed: int, seconds: float, files: int) -> bool:
        """Print and judge."""
        backend = task_backends["default"]
        results = [backend.get_result(result_id) for result_id in self.steps]
        states = collections.Counter(
            result.errors[0].exception_class_path if result.errors else str(result.status)
            for result in results
        )
        wrong = sum(
            result.status == TaskResultStatus.SUCCESSFUL
            and result.return_value != self.steps[result.id]
            for result in results
        )
        twice = sum(count > 1 for count in self.finishes.values())
        print(f"{killed} kills in {seconds:.0f} s under {len(results)} tasks: {dict(states)}")
        print(f"wrong: {wrong}, finished twice: {twice}, late events: {self.late_events}, ", end="")
        print(f"files left open: {files}")
        unfinished = sum(not result.is_finished for result in results)
        died = states.get("django_tasks_local.exceptions.WorkerDied", 0)
        return not (wrong or twice or self.late_events or unfinished) and died <= killed


def main() -> None:
    """Run one storm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    logging.disable()  # of every task that fails
    storm = Storm(arguments.kills, arguments.workers, arguments.seed)
    if not storm.run():
        raise SystemExit("Something went wrong.")


if __name__ == "__main__":
    main()
