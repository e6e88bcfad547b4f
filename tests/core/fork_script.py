"""
A script that test_fork.py runs: it starts child processes while tasks run on the backend ALIAS.

    fork_script.py ALIAS BOOK WAY...

A WAY is "os.fork" or a start method of multiprocessing. Each task appends its id and the pid of its
process to the file BOOK. The script prints its own pid, then the pid of each child.
"""

import multiprocessing
import os
import sys
import threading
from typing import Any

import django

django.setup()

from django_tasks_local.hub import hub  # noqa: E402
from tests.project.tasks import LIMIT, Gate, noop, sign  # noqa: E402

FORKS = 5


def wait_for_event(result: Any, kind: str) -> None:
    """
    Block until the hub publishes an event of this kind for the task; fail if the task ends first.
    """
    with hub.subscribe(result.id) as subscription:
        while not any(event.kind == kind for event in subscription.take(LIMIT)):
            assert not subscription.ended


def child(alias: str, book: str) -> None:
    """Run two tasks in this child process, then print its pid."""
    for result in [sign.using(backend=alias).enqueue(book) for _ in range(2)]:
        wait_for_event(result, "finished")
    print(os.getpid(), flush=True)  # noqa: T201


def fork(alias: str, book: str) -> None:
    """Run child() in FORKS children of os.fork(), each forked while a thread runs keep_busy()."""
    stop = threading.Event()
    traffic = threading.Thread(target=keep_busy, args=(stop,))
    traffic.start()
    for _ in range(FORKS):
        pid = os.fork()
        if pid == 0:
            child(alias, book)
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    stop.set()
    traffic.join(LIMIT)


def keep_busy(stop: threading.Event) -> None:
    """
    Run tasks until `stop` is set, so that this thread may hold any lock when the process forks.
    """
    while not stop.is_set():
        wait_for_event(noop.using(backend="busy").enqueue(), "finished")


def start(method: str, alias: str, book: str) -> None:
    """Run child() in a process that multiprocessing starts with the start method `method`."""
    process = multiprocessing.get_context(method).Process(target=child, args=(alias, book))
    process.start()
    process.join(2 * LIMIT)
    assert process.exitcode == 0


def main(alias: str, book: str, *ways: str) -> None:
    """
    Start children in each way while one task runs and two are queued; then let all three finish.
    """
    print(os.getpid(), flush=True)  # noqa: T201
    gate = Gate(f"{book}-gate")
    results = [sign.using(backend=alias).enqueue(book, f"{book}-gate") for _ in range(3)]
    wait_for_event(results[0], "progress")
    for way in ways:
        if way == "os.fork":
            fork(alias, book)
        else:
            start(way, alias, book)
    gate.set()
    for result in results:
        wait_for_event(result, "finished")


if __name__ == "__main__":
    main(*sys.argv[1:])
