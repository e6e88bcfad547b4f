"""Start and end of worker processes in scripts, management commands and servers."""

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.servers import MANAGE, Server, environment, group_has_ended, serve
from tests.support.systems import needs_fork, needs_groups
from tests.support.waiting import LIMIT, wait_until

METHODS = ["spawn"] if sys.platform == "win32" else ["forkserver", "spawn"]
WARNINGS_ARE_ERRORS = environment() | {"PYTHONWARNINGS": "error"}

SETTINGS = {
    "TASKS": {
        "default": {
            "BACKEND": "django_tasks_local.ProcessPoolBackend",
            "OPTIONS": {"MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 1},
        }
    }
}
CONFIGURE = """
settings.configure(
    USE_TZ=True,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
    TASKS={"default": {
        "BACKEND": "django_tasks_local.ProcessPoolBackend",
        "OPTIONS": {"MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 1, "START_METHOD": sys.argv[1]},
    }},
)
django.setup()
"""
IMPORTS = "import os, sys, time, django\nfrom django.conf import settings\n"
HELPERS = """
from django.tasks import task
from django_tasks_local import report_progress
from django_tasks_local.hub import hub

def wait(result, kind="finished"):
    with hub.subscribe(result.id) as subscription:
        while not any(event.kind == kind for event in subscription.take(20)):
            pass
    result.refresh()
    return result
"""
TASK = """
@task
def here(number):
    return [os.getpid(), number, __name__]
"""
BUSY = """
@task
def busy(in_c):
    report_progress(1)
    if in_c:
        sum(range(10**12))
    time.sleep(3600)
"""


def indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def write(directory: Path, *parts: str) -> str:
    path = directory / "script.py"
    path.write_text("".join(parts))
    return str(path)


def run_python(*command: str, **environ: str) -> str:
    """Run a Python command and return its stdout; fail if it fails or writes to stderr."""
    done = subprocess.run(
        [sys.executable, *command],
        env=WARNINGS_ARE_ERRORS | environ,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# Worker processes of scripts and management commands


@pytest.mark.parametrize("method", METHODS)
def test_script_that_configures_settings(tmp_path: Path, method: str) -> None:
    main = "\nif __name__ == '__main__':\n    print(wait(here.enqueue(1)).return_value)\n"
    script = write(tmp_path, IMPORTS, CONFIGURE, HELPERS, TASK, main)
    assert ", 1, '__mp_main__']" in run_python(script, method)


@pytest.mark.parametrize("method", METHODS)
def test_default_timeout_of_sockets(tmp_path: Path, method: str) -> None:
    """A worker outlives pauses that are longer than the project's default timeout of sockets."""
    if method == "forkserver" and sys.version_info >= (3, 14):
        pytest.skip("the fork server of Python 3.14 itself needs sockets without a timeout")
    timeout = "import socket\nsocket.setdefaulttimeout(0.001)\n"
    main = "    pids = {wait(here.enqueue(number)).return_value[0] for number in range(20)}\n"
    main = f"\nif __name__ == '__main__':\n{main}    print(len(pids))\n"
    script = write(tmp_path, timeout, IMPORTS, CONFIGURE, HELPERS, TASK, main)
    assert run_python(script, method) == "1\n"


@pytest.mark.parametrize("method", METHODS)
def test_script_that_configures_settings_in_its_guard(tmp_path: Path, method: str) -> None:
    main = CONFIGURE + HELPERS + "from tests.project.process_tasks import whoami\n"
    main += "print(wait(whoami.enqueue()).return_value)\n"
    script = write(tmp_path, IMPORTS, "if __name__ == '__main__':\n", indented(main))
    assert "'auth.User'" in run_python(script, method)


def test_error_names_unpickleable_settings(tmp_path: Path) -> None:
    main = CONFIGURE.replace("USE_TZ", "ODD=lambda: 1, USE_TZ") + HELPERS
    main += "from tests.project.process_tasks import noop\n"
    main += "import logging; logging.disable()\n"
    main += "print(hub.snapshot(wait(noop.enqueue()).id).error.message)\n"
    script = write(tmp_path, IMPORTS, "if __name__ == '__main__':\n", indented(main))
    output = run_python(script, METHODS[0])
    assert "ODD cannot be sent to a worker process" in output


def test_error_of_script_without_guard(tmp_path: Path) -> None:
    main = "import logging; logging.disable()\n"
    main += "print(hub.snapshot(wait(here.enqueue(1)).id).error.message)\n"
    script = write(tmp_path, IMPORTS, CONFIGURE, HELPERS, TASK, main)
    done = subprocess.run(
        [sys.executable, script, "spawn"],
        env=WARNINGS_ARE_ERRORS,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=False,
    )
    assert "No worker process could be started" in done.stdout


def test_management_command() -> None:
    answer = json.loads(run_python(str(MANAGE), "run_task", TEST_SETTINGS=json.dumps(SETTINGS)))
    assert answer["task"][0] != answer["server"]


# Worker processes of servers


# Servers with several web workers; tests/servers/test_exit.py covers the other servers.
SERVERS = ["uvicorn-workers", "gunicorn-workers", "gunicorn-preload", "hypercorn-worker", "uwsgi"]


def ask(server: Server) -> dict[str, Any]:
    with urllib.request.urlopen(f"{server.url}/run/", timeout=LIMIT) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


@pytest.mark.servers
@needs_groups
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", SERVERS)
def test_workers_of_servers(tmp_path: Path, name: str, end: signal.Signals) -> None:
    with serve(name, tmp_path, settings=SETTINGS) as server:
        for _ in range(3):
            answer = ask(server)
            assert answer["task"][0] != answer["server"]
            assert answer["task"][2] == "auth.User"
        server.stop(end, group=end == signal.SIGINT)
        wait_until(lambda: group_has_ended(server.process.pid), "a process of the group is left")


# The end of worker processes


@needs_groups
@pytest.mark.parametrize("in_c", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_worker_ends_with_its_killed_parent(tmp_path: Path, method: str, in_c: bool) -> None:
    main = f"\nif __name__ == '__main__':\n    r = wait(busy.enqueue({in_c}), 'progress')\n"
    main += "    print(r.worker_ids[0], flush=True)\n    time.sleep(3600)\n"
    script = write(tmp_path, IMPORTS, CONFIGURE, HELPERS, BUSY, main)
    parent = subprocess.Popen(
        [sys.executable, script, method],
        env=WARNINGS_ARE_ERRORS,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline()
    parent.kill()
    parent.wait(LIMIT)
    parent.stdout.close()
    wait_until(lambda: group_has_ended(parent.pid), "the worker does not end")


@needs_groups
@pytest.mark.parametrize("method", METHODS)
def test_exit_ends_all_processes(tmp_path: Path, method: str) -> None:
    main = "\nif __name__ == '__main__':\n    import logging; logging.disable()\n"
    # A process that serves does not wait at its end for the task `busy`, which never ends.
    main += "    from django.core.signals import request_started; request_started.send(None)\n"
    main += (
        "    wait(here.enqueue(1)); wait(busy.enqueue(True), 'progress')\n    print(os.getpid())\n"
    )
    script = write(tmp_path, IMPORTS, CONFIGURE, HELPERS, TASK, BUSY, main)
    process = subprocess.Popen(
        [sys.executable, script, method], env=WARNINGS_ARE_ERRORS, start_new_session=True
    )
    assert process.wait(LIMIT) == 0
    wait_until(lambda: group_has_ended(process.pid), "a process of the group is left")


@needs_fork
def test_forked_child_starts_its_own_worker(tmp_path: Path) -> None:
    main = """
if __name__ == "__main__":
    import warnings
    warnings.simplefilter("ignore")  # Python warns of fork() in a process with threads.
    first = wait(here.enqueue(1)).worker_ids
    pid = os.fork()
    second = wait(here.enqueue(2)).worker_ids
    if pid == 0:
        assert first != second
        sys.exit(0)
    assert first == second
    assert os.waitpid(pid, 0)[1] == 0
    assert wait(here.enqueue(3)).worker_ids == first
    print("both")
"""
    script = write(tmp_path, IMPORTS, CONFIGURE, HELPERS, TASK, main)
    assert run_python(script, METHODS[0]) == "both\n"


def test_child_of_multiprocessing_can_exit(tmp_path: Path) -> None:
    """
    A process that multiprocessing started can exit although it has worker processes.

    When it ends, multiprocessing joins its child processes before it calls atexit hooks, so the
    pool must stop its workers earlier.
    """
    main = """
def child():
    print(wait(here.enqueue(1)).return_value[1], flush=True)

if __name__ == "__main__":
    import multiprocessing
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start()
    process.join(20)
    print(process.exitcode)
"""
    script = write(tmp_path, IMPORTS, CONFIGURE, HELPERS, TASK, main)
    assert run_python(script, METHODS[0]) == "1\n0\n"
