"""
Measure one side, which is one library, for benchmarks/processes.py, and print JSON.

Every side runs the same functions in two worker processes. A task counts as finished when the
cheapest notification that the library offers has arrived, and its result can be read:

- ours: `hub.subscribe(id)` and `take()` until the subscription has ended, then one `refresh()`
- 2.0: a callback of the future that its backend keeps in `_state.futures`, then one `refresh()`.
  The callback runs after 2.0's own, which stores the result; `future.result()` returns before that.
- bare, loky, pebble: `future.result()`

No side polls. A poll of `refresh()` in a `time.sleep(0)` loop costs ours and 2.0 about as much time
by the clock, but more CPU time.

The program prints two CPU times: that of its process, and the sum of that and the CPU time of all
descendants. The descendants' part consists of the CPU clocks of living processes, and of
`RUSAGE_CHILDREN` for direct children that have ended. The program runs on Linux only.
"""

import gc
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django
from django.conf import settings

WORKERS = 2

# The type of a function that blocks until its task is finished.
type Wait = Callable[[], object]
type Submit = Callable[[Callable[[], Any]], Wait]
# The wall time, CPU time, and CPU time with descendants, in µs per task.
type Cost = tuple[float, float, float]


def noop() -> None:
    """Do nothing, so that only the library causes the measured cost."""


def burn() -> int:
    """Compute in Python for about a third of a second."""
    return sum(number * number % 7 for number in range(4_000_000))


def django_submit(side: str) -> Submit:
    """Return a function that enqueues a task and returns a function that waits for its end."""
    kind = "ThreadPoolBackend" if side == "threads" else "ProcessPoolBackend"
    settings.configure(
        DEBUG=False,
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

    # 2.0 imports the function by its path and accepts a Task or a plain function there.
    tasks = {function: task(function) for function in (noop, burn)}
    wait_for_end = future_waiter() if side == "2.0" else subscription_waiter()

    def submit(function: Callable[[], Any]) -> Wait:
        result = tasks[function].enqueue()

        def wait() -> None:
            wait_for_end(result.id)
            result.refresh()
            assert result.is_finished, "the library reported the end before it stored the result"

        return wait

    return submit


def subscription_waiter() -> Callable[[str], None]:
    """Return a function that waits for the end of a task of this package."""
    from django_tasks_local.hub import hub

    def wait(result_id: str) -> None:
        with hub.subscribe(result_id) as subscription:
            while not subscription.ended:
                subscription.take()

    return wait


def future_waiter() -> Callable[[str], None]:
    """Return a function that waits for the end of a task of django-tasks-local 2.0."""
    from django.tasks import task_backends

    futures = task_backends["default"]._state.futures

    def wait(result_id: str) -> None:
        future = futures.get(result_id)
        if future is None:
            return  # 2.0 removes a future once it has stored the result.
        lock = threading.Lock()  # It costs less than an Event, which allocates two locks.
        lock.acquire()
        future.add_done_callback(lambda _: lock.release())
        lock.acquire()

    return wait


def executor_submit(side: str) -> Submit:
    """Do the same as django_submit() with the executor of loky or of concurrent.futures."""
    if side == "loky":
        from loky import ProcessPoolExecutor
    else:
        from concurrent.futures import ProcessPoolExecutor
    executor = ProcessPoolExecutor(max_workers=WORKERS)
    return lambda function: executor.submit(function).result


def pebble_submit() -> Submit:
    """Do the same as django_submit() with pebble, without a timeout (None in its submit())."""
    from pebble import ProcessPool

    pool = ProcessPool(max_workers=WORKERS)
    return lambda function: pool.submit(function, None).result


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU seconds of this process, and the sum of these and its descendants'."""
    own = time.process_time()
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    alive = sum(map(_cpu_seconds_of, _descendants()))
    return own, own + ended.ru_utime + ended.ru_stime + alive


def _cpu_seconds_of(pid: int) -> float:
    # Compute the clock id as clock_getcpuclockid(3) does on Linux, because the times in
    # /proc/PID/stat have steps of 10 ms.
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:
        return 0.0  # The process ended after the scan.


def _descendants() -> list[int]:
    """Return the ids of the worker processes and, with forkserver, of their parent."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # In this file the state and the parent's id follow the process name, which stands in
            # parentheses and may contain spaces.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # The process ended during the scan.
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(os.getpid(), []))
    for pid in found:  # The loop also visits the pids that it appends.
        found += children.get(pid, [])
    return found


def timed(run: Callable[[], object], tasks: int) -> Cost:
    """Call `run`, which runs this number of tasks, and return its cost per task."""
    gc.collect()
    cpu, cpu_with_children = cpu_seconds()
    wall = time.perf_counter()
    run()
    wall = time.perf_counter() - wall
    cpu_after, cpu_with_children_after = cpu_seconds()
    seconds = wall, cpu_after - cpu, cpu_with_children_after - cpu_with_children
    wall, cpu, cpu_with_children = (value / tasks * 1e6 for value in seconds)
    return wall, cpu, cpu_with_children


def run_at_once(submit: Submit, function: Callable[[], Any], tasks: int) -> None:
    """Enqueue all tasks and wait for the last few, because these may finish in any order."""
    waits = [submit(function) for _ in range(tasks)]
    for wait in waits[-2 * WORKERS :]:
        wait()


def run_one_by_one(submit: Submit, tasks: int) -> None:
    """Enqueue each task after the one before has finished."""
    for _ in range(tasks):
        submit(noop)()


def measure(side: str, tasks: int) -> dict[str, Cost]:
    """Run all scenarios of one side and return the cost per task of each."""
    if side in {"ours", "2.0", "threads"}:
        submit = django_submit(side)
    else:
        submit = pebble_submit() if side == "pebble" else executor_submit(side)
    run_at_once(submit, burn, 2 * WORKERS)  # These tasks make the library start its workers.
    measured = {"four computing tasks": timed(lambda: run_at_once(submit, burn, 4), 4)}
    if side == "threads":
        return measured
    run_at_once(submit, noop, tasks // 10)
    measured["noop"] = timed(lambda: run_at_once(submit, noop, tasks), tasks)
    few = tasks // 20
    measured["noop, one at a time"] = timed(lambda: run_one_by_one(submit, few), few)
    return measured


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))), flush=True)
