"""
Measure one side, which is one library, for benchmarks/threads.py, and print JSON.

Every side runs the same task function and detects its end in the same way. The last task to run
sets a `threading.Event`. Then the program reads the results of the ten most recent tasks until all
are finished, because each of ten workers may still be recording the outcome of its last task. It
reads a result with `result.refresh()`, a future of the bare executor with `future.done()`; between
two reads `time.sleep(0)` releases the GIL, which the worker needs.

In the scenario "one at a time" it waits in this way for each task before it enqueues the next.
"""

import gc
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import django
from django.conf import settings

WORKERS = {"10 workers": 10, "1 worker": 1}
BACKENDS = {
    "ours": "django_tasks_local.ThreadPoolBackend",
    "2.0": "django_tasks_local.ThreadPoolBackend",
    "Immediate": "django.tasks.backends.immediate.ImmediateBackend",
}

# The wall time, CPU time, and CPU time with child processes (of which there are none), in µs per
# task.
type Cost = tuple[float, float, float]


class Countdown:
    """Counts the calls of the task function and sets an event at the last one."""

    def start(self, calls: int) -> None:
        self.done = threading.Event()
        self._last = calls - 1
        self._calls = itertools.count()  # Worker threads need no lock, because next() is atomic.

    def step(self) -> None:
        if next(self._calls) == self._last:
            self.done.set()


countdown = Countdown()


def step() -> None:
    """Count one call. Every side runs this task function."""
    countdown.step()


class Handle(Protocol):
    """Declares how the program asks any side whether an enqueued task is finished."""

    def finished(self) -> bool:
        """Read the task's current state and return whether the task is finished."""


class _Result:
    __slots__ = ("_result",)

    def __init__(self, result: Any) -> None:
        self._result = result

    def finished(self) -> bool:
        if not self._result.is_finished:
            self._result.refresh()
        return bool(self._result.is_finished)


class _Future:
    __slots__ = ("_future",)

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def finished(self) -> bool:
        return self._future.done()


def enqueue_functions(side: str) -> dict[str, Callable[[], Handle]]:
    """Set up one side; return, for each number of workers, a function that enqueues one task."""
    settings.configure(
        DEBUG=False,
        USE_TZ=True,
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        TASKS={
            name: {"BACKEND": BACKENDS[side], "OPTIONS": {"MAX_WORKERS": workers}}
            for name, workers in WORKERS.items()
            if side in BACKENDS
        },
    )
    django.setup()
    if side not in BACKENDS:
        executors = {name: ThreadPoolExecutor(workers) for name, workers in WORKERS.items()}
        return {name: _submit_to(executor) for name, executor in executors.items()}
    return {name: _enqueue_to(name) for name in WORKERS}


def _submit_to(executor: ThreadPoolExecutor) -> Callable[[], Handle]:
    return lambda: _Future(executor.submit(step))


def _enqueue_to(alias: str) -> Callable[[], Handle]:
    from django.tasks import task

    django_task = task(backend=alias)(step)
    # django-tasks-local 2.0 imports the function by its dotted path, where it accepts a plain
    # function as well as a Task.
    return lambda: _Result(django_task.enqueue())


def _wait(handles: list[Handle]) -> None:
    countdown.done.wait()
    for handle in handles:
        while not handle.finished():
            time.sleep(0)


def _cost_per_task(wall: float, cpu: float, tasks: int) -> Cost:
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / tasks * 1e6, cpu / tasks * 1e6, cpu / tasks * 1e6


def many(enqueue: Callable[[], Handle], tasks: int) -> Cost:
    """Enqueue all tasks at once; return the cost per task until the last one is finished."""
    gc.collect()
    countdown.start(tasks)
    wall, cpu = time.perf_counter(), time.process_time()
    handles = [enqueue() for _ in range(tasks)]
    _wait(handles[-max(WORKERS.values()) :])
    return _cost_per_task(wall, cpu, tasks)


def one_by_one(enqueue: Callable[[], Handle], tasks: int) -> Cost:
    """Enqueue each task after the one before is finished; return the cost per task."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(tasks):
        countdown.start(1)
        _wait([enqueue()])
    return _cost_per_task(wall, cpu, tasks)


def measure(side: str, tasks: int) -> dict[str, Cost]:
    """Run all scenarios of one side and return the cost per task of each."""
    enqueue = enqueue_functions(side)
    measured = {}
    for name in WORKERS:
        many(enqueue[name], tasks // 10)  # These tasks start the threads and fill the caches.
        measured[name] = many(enqueue[name], tasks)
    measured["one at a time"] = one_by_one(enqueue["10 workers"], tasks // 10)
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))), flush=True)
