"""
If a server or an application forks while tasks run, processes share no pool and each task runs
once.

processes/test_worker.py also tests the fork of a process that has worker processes.
"""

import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.project import tasks
from tests.project.settings import INSTALLED_APPS
from tests.support.paths import ROOT
from tests.support.servers import environment, serve
from tests.support.systems import needs_fork
from tests.support.waiting import LIMIT, wait_until

pytestmark = needs_fork
THREADS = "django_tasks_local.ThreadPoolBackend"
PROCESSES = "django_tasks_local.ProcessPoolBackend"
SETTINGS = {
    "TASKS": {
        "default": {"BACKEND": THREADS, "OPTIONS": {"MAX_WORKERS": 1}},
        "busy": {"BACKEND": THREADS},
        "processes": {"BACKEND": PROCESSES, "OPTIONS": {"MAX_WORKERS": 1}},
    }
}


def runs_by_process(book: Path) -> dict[int, Counter[str]]:
    """Read the file `book`; return for each pid how often this process has run each task id."""
    done: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for line in book.read_text(encoding="utf-8").splitlines() if book.exists() else ():
        result_id, pid = line.split()
        done[int(pid)][result_id] += 1
    return done


@pytest.mark.parametrize(
    ("alias", "ways"),
    [
        ("default", ["os.fork", "fork", "forkserver", "spawn"]),
        ("processes", ["fork"]),
    ],
)
def test_forks_by_users(alias: str, ways: list[str], tmp_path: Path) -> None:
    book = tmp_path / "book"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fork_script.py")), alias, str(book), *ways],
        env=environment()
        | {
            "DJANGO_SETTINGS_MODULE": "tests.project.settings",
            # Python emits a DeprecationWarning when a process with threads forks.
            "PYTHONWARNINGS": "ignore",
            "TEST_SETTINGS": json.dumps(SETTINGS),
        },
        capture_output=True,
        text=True,
        timeout=4 * LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    parent, *children = map(int, done.stdout.split())
    found = runs_by_process(book)
    assert all(count == 1 for of_one in found.values() for count in of_one.values())
    numbers = sorted(len(of_one) for of_one in found.values())
    assert numbers == [2] * len(children) + [3]
    if alias == "default":
        assert len(found[parent]) == 3
        assert {pid: len(found[pid]) for pid in children} == dict.fromkeys(children, 2)
    else:
        assert not found.keys() & {parent, *children}


def run_script(code: str) -> str:
    """
    Run SET_UP and `code`, which uses a thread pool, in a new interpreter; return its stdout.

    A child that `code` forks must end with os._exit().
    """
    done = subprocess.run(
        [sys.executable, "-c", SET_UP + code],
        env=environment()
        | {"DJANGO_SETTINGS_MODULE": "tests.project.settings", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


SET_UP = """
import os, signal, threading
import django
django.setup()
from django.tasks import task
from django_tasks_local import report_progress
from django_tasks_local.progress.reporter import current_reporting
from django_tasks_local.testing import wait_until_idle
"""


def test_application_blocks_a_signal_between_two_forks() -> None:
    """
    A signal that the application has blocked stays blocked after fork().

    The package blocks signals during a fork() and unblocks only the signals that it has blocked.
    """
    output = run_script("""
def fork():
    if not (pid := os.fork()):
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0

fork()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
fork()
print(*(number.name for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())))
""")
    assert output.split() == ["SIGTERM"]


def test_report_in_a_child_of_a_task_whose_lock_is_held_by_another_thread() -> None:
    """
    report_progress() in a forked child does not wait for a lock that a thread of the parent holds.

    The child has no copy of this thread, so nothing would release the lock in the child.
    """
    output = run_script("""
@task
def forking():
    report_progress(1)
    reporting = current_reporting.get()
    held, forked = threading.Event(), threading.Event()

    def hold():
        with reporting.lock:
            held.set()
            forked.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    if not (pid := os.fork()):
        signal.alarm(10)  # ends a child that waits for the lock
        report_progress(2)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    forked.set()
    holder.join()
    return status

result = forking.enqueue()
wait_until_idle(timeout=20)
result.refresh()
print(result.return_value)
""")
    assert output.split() == ["0"]


# ready() also runs in worker processes, where enqueue() raises an exception, so it returns early.
APP = """
import os
from django.apps import AppConfig

class Config(AppConfig):
    name = "preloading_app"

    def ready(self):
        from django_tasks_local import in_worker_process
        if in_worker_process():
            return
        from tests.project.tasks import sign
        for alias in ("default", "processes"):
            for _ in range(3):
                sign.using(backend=alias).enqueue(os.environ["BOOK"], os.environ["GATE"])
"""


@pytest.mark.servers
def test_gunicorn_preload(tmp_path: Path, gate: str) -> None:
    """
    A gunicorn master that enqueues tasks before it forks runs these tasks itself, each of them
    once.

    The application enqueues the tasks in ready(), in a thread pool and in a process pool. Each web
    worker runs only the tasks that it has enqueued itself.
    """
    book = tmp_path / "book"
    (tmp_path / "preloading_app.py").write_text(APP)
    settings = SETTINGS | {"INSTALLED_APPS": [*INSTALLED_APPS, "preloading_app.Config"]}
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environ = {"PYTHONPATH": path, "BOOK": str(book), "GATE": gate}
    with serve("gunicorn-preload", tmp_path, settings=settings, environ=environ) as server:
        of_workers: defaultdict[int, list[str]] = defaultdict(list)
        while len(of_workers) < 2:
            task = server.start_task("sign", str(book))
            of_workers[task["pid"]].append(task["id"])
        expected = sum(map(len, of_workers.values()))
        wait_until(lambda: len(runs_by_process(book)) == 2, "the workers do not run their tasks")
        tasks.gates[gate].set()
        wait_until(
            lambda: sum(c.total() for c in runs_by_process(book).values()) >= expected + 6,
            "tasks are lost",
        )
        server.stop()
    found = runs_by_process(book)
    assert all(count == 1 for of_one in found.values() for count in of_one.values())
    assert {pid: list(found.pop(pid)) for pid in of_workers} == dict(of_workers)
    assert len(found.pop(server.process.pid)) == 3
    # The worker process of the master's process pool has run the remaining three tasks.
    assert [len(of_one) for of_one in found.values()] == [3]
