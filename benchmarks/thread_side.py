"""
One side of benchmarks/threads.py, in a process of its own: measures, and prints JSON.

Every side runs the same task function and hears in the same way that it is finished: the last task
to run sets an event, and then the results of the last tasks are read until they are finished
(the last ones, because as many as there are workers may still be on their way). Reading a result
is `result.refresh()`, or `future.done()` of a bare executor.
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


class Countdown:
    """Counts the calls of the task, and sets an event at the last."""

    def start(self, calls: int) -> None:
        self.done = threading.Event()
        self._last = calls - 1
        self._calls = itertools.count()  # next() of it is atomic

    def step(self) -> None:
        if next(self._calls) == self._last:
            self.done.set()


countdown = Countdown()


def step() -> None:
    """Count: the whole work of the task."""
    countdown.step()


class Handle(Protocol):
    """What `enqueue` returns, as far as this benchmark sees it."""

    def finished(self) -> bool:
        """Read the state and say whether it is the last."""


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
    """Return, for each number of workers, the function that enqueues one task."""
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
    # 2.0 looks the function up by its path, and takes a Task or a function.
    return lambda: _Result(django_task.enqueue())


def _wait(handles: list[Handle]) -> None:
    countdown.done.wait()
    for handle in handles:
        while not handle.finished():
            time.sleep(0)  # lets go of the GIL, which the worker needs to finish


def many(enqueue: Callable[[], Handle], tasks: int) -> tuple[float, float]:
    """Return µs per task from the first enqueue to the last finish: by the clock, and of CPU."""
    gc.collect()
    countdown.start(tasks)
    wall, cpu = time.perf_counter(), time.process_time()
    handles = [enqueue() for _ in range(tasks)]
    _wait(handles[-max(WORKERS.values()) :])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / tasks * 1e6, cpu / tasks * 1e6


def one_by_one(enqueue: Callable[[], Handle], tasks: int) -> tuple[float, float]:
    """Return µs per task when each waits for the one before: by the clock, and of CPU."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(tasks):
        countdown.start(1)
        _wait([enqueue()])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall / tasks * 1e6, cpu / tasks * 1e6


def measure(side: str, tasks: int) -> dict[str, tuple[float, float]]:
    """Return what this side needs for each scenario: µs by the clock, and µs of CPU."""
    enqueue = enqueue_functions(side)
    measured = {}
    for name in WORKERS:
        many(enqueue[name], tasks // 10)  # to warm up
        measured[name] = many(enqueue[name], tasks)
    measured["one at a time"] = one_by_one(enqueue["10 workers"], tasks // 10)
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
