"""
One side of benchmarks/processes.py, in a process of its own: measures, and prints JSON.

Every side runs the same function in as many worker processes, and hears in the same way that it is
finished: the results of the last tasks are read until they are, with a short sleep in between.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import django
from django.conf import settings

WORKERS = 2
PAUSE = 0.0002  # seconds


def noop() -> None:
    """Do nothing: what is left is the price of the pool."""


def burn() -> int:
    """Compute for about a third of a second."""
    return sum(number * number % 7 for number in range(4_000_000))


def django_submit(thread_backend: bool) -> Callable[[Callable[[], Any]], Callable[[], bool]]:
    """Return a function that enqueues, and returns one that says whether it is finished."""
    kind = "ThreadPoolBackend" if thread_backend else "ProcessPoolBackend"
    settings.configure(
        USE_TZ=True,
        TASKS={
            "default": {
                "BACKEND": f"django_tasks_local.{kind}",
                "OPTIONS": {"MAX_WORKERS": WORKERS},
            }
        },
    )
    django.setup()
    from django.tasks import task

    # 2.0 looks the function up by its path, and takes a Task or a function.
    tasks = {function: task(function) for function in (noop, burn)}

    def submit(function: Callable[[], Any]) -> Callable[[], bool]:
        result = tasks[function].enqueue()

        def finished() -> bool:
            result.refresh()
            return bool(result.is_finished)

        return finished

    return submit


def executor_submit(side: str) -> Callable[[Callable[[], Any]], Callable[[], bool]]:
    """See django_submit()."""
    if side == "loky":
        from loky import ProcessPoolExecutor
    else:
        from concurrent.futures import ProcessPoolExecutor
    executor = ProcessPoolExecutor(max_workers=WORKERS)
    return lambda function: executor.submit(function).done


def pebble_submit() -> Callable[[Callable[[], Any]], Callable[[], bool]]:
    """See django_submit(). The second argument of pebble's submit() is a timeout."""
    from pebble import ProcessPool

    pool = ProcessPool(max_workers=WORKERS)
    return lambda function: pool.submit(function, None).done


def wait(finished: list[Callable[[], bool]]) -> None:
    """Wait for the last tasks: as many as there are workers may still be on their way."""
    for is_finished in finished[-2 * WORKERS :]:
        while not is_finished():
            time.sleep(PAUSE)


def seconds_for(submit: Callable[..., Callable[[], bool]], function: Any, tasks: int) -> float:
    """Return the time from the first enqueue to the last finish."""
    gc.collect()
    began = time.perf_counter()
    wait([submit(function) for _ in range(tasks)])
    return time.perf_counter() - began


def measure(side: str, tasks: int) -> dict[str, float]:
    """Return the seconds of each scenario."""
    if side in {"ours", "2.0", "threads"}:
        submit = django_submit(thread_backend=side == "threads")
    else:
        submit = pebble_submit() if side == "pebble" else executor_submit(side)
    seconds_for(submit, burn, WORKERS)  # to start the workers
    measured = {"four computing tasks": seconds_for(submit, burn, 4)}
    if side == "threads":
        return measured
    seconds_for(submit, noop, tasks // 10)
    measured["noop"] = seconds_for(submit, noop, tasks)
    began = time.perf_counter()
    for _ in range(tasks // 20):
        wait([submit(noop)])
    measured["noop, one at a time"] = time.perf_counter() - began
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))), flush=True)
