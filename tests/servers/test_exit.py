"""
A process that ends while tasks run and wait does not hang, and logs each lost task.

Each test has three tasks, of which one runs, in each of: a thread, a worker process, and a
coroutine that waits for sync code in threads that the interpreter joins at exit.
"""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.project.tasks import gates
from tests.support.paths import ROOT
from tests.support.servers import MANAGE, Server, environment, group_has_ended, serve
from tests.support.sse_client import Message, event_source
from tests.support.waiting import LIMIT, wait_until

SHUTDOWN_TIMEOUT = 1
# A process must end within this time, counted from the signal or the end of its main program.
MAX_SECONDS = SHUTDOWN_TIMEOUT + 2


def settings(**options: Any) -> dict[str, Any]:
    """Return settings with a backend alias for each kind of task."""
    options = {"MAX_WORKERS": 1, **options}
    threads = {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": options}
    processes = {"BACKEND": "django_tasks_local.ProcessPoolBackend", "OPTIONS": options}
    return {
        "TASKS": {"default": threads, "processes": processes, "coroutines": threads},
        "TASKS_SSE": {"RETRY": 0.1},
    }


SETTINGS = settings(SHUTDOWN_TIMEOUT=SHUTDOWN_TIMEOUT)
SERVERS = [
    "runserver",
    "runserver-reload",
    "uvicorn",
    "daphne",
    "granian",
    "gunicorn-sync",
    "gunicorn-gthread",
    "gunicorn-uvicorn",
    "hypercorn",
    "waitress",
    "granian-wsgi",
]
# These refuse connections from the signal on, so that a polling client does not see the end.
REFUSING = ["granian-wsgi"]
# At Ctrl-C granian's worker receives SIGINT, and SIGTERM from its master, at the same time. It may
# sleep on: the kernel can deliver both to another thread than the main thread, in which Python
# calls handlers.
ONLY_SIGTERM = ["granian-wsgi"]
POLLED = ["gunicorn-sync", "gunicorn-gthread", "waitress", "granian-wsgi"]
# hypercorn's worker does not end while a stream is open, as docs/deployment.md explains.
WORKERS = ["uvicorn-workers", "gunicorn-preload", "hypercorn-worker", "gunicorn-max-requests"]
TASKS = {"default": "gated", "processes": "gated", "coroutines": "gated_async"}
SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}


def assert_logged_as_lost(paths: Mapping[str, str], log: str) -> None:
    """Check that the log reports each of these tasks as lost exactly once."""
    lost = [line for line in log.splitlines() if "these tasks are lost" in line]
    for result_id, path in paths.items():
        assert sum(f"{result_id} ({path})" in text for text in lost) == 1, log


def run_in_time(function: Any, ways: Iterable[str], *args: Any) -> dict[str, Any]:
    """
    Call `function` concurrently for each way to end a process; return its results by way.

    The last item of a result is the number of seconds until the process ended. If that is
    MAX_SECONDS or more, `function` gets two more attempts alone, because a busy machine may delay
    a process once or twice.
    """
    ways = list(ways)
    with ThreadPoolExecutor() as threads:
        ends = dict(zip(ways, threads.map(lambda way: function(way, *args), ways), strict=True))
    for way, end in ends.items():
        if end[-1] >= MAX_SECONDS:
            assert any(function(way, *args)[-1] < MAX_SECONDS for _ in range(2)), way
    return ends


# Tests of scripts and management commands.

# Django's log receivers write the outcome of each task at INFO.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "INFO"},
}
WAYS = ["SIGTERM", "Ctrl-C", "exception", "sys.exit"]
COMMAND = ROOT / "tests" / "project" / "management" / "commands" / "exit_with_tasks.py"
PROGRAMS = {
    "script": [str(COMMAND)],
    "management command": [str(MANAGE), "exit_with_tasks"],
}


def run_program(way: str, command: list[str], gate: str) -> tuple[dict[str, str], str, float]:
    """Run a program that ends in the given `way`; return the paths of its tasks by id, and more.

    The second result is its log, the third the number of seconds until it ended.
    """
    environ = environment() | {
        "DJANGO_SETTINGS_MODULE": "tests.project.settings",
        "TEST_SETTINGS": json.dumps(SETTINGS | {"LOGGING": LOGGING}),
    }
    with subprocess.Popen(
        [sys.executable, *command, way, gate],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        paths = json.loads(process.stdout.readline() or "{}")
        began = time.monotonic()
        if way == "end":
            gates[gate].set()
        elif way == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif way == "SIGTERM":
            process.terminate()
        _, log = process.communicate(timeout=LIMIT)
        seconds = time.monotonic() - began
    wait_until(lambda: group_has_ended(process.pid), "a process of the group is left")
    return paths, log, seconds


@pytest.mark.parametrize("program", PROGRAMS)
def test_exit_of_program(program: str, gate: str) -> None:
    """A program logs its nine unfinished tasks as lost, whichever way it ends."""
    for paths, log, _ in run_in_time(run_program, WAYS, PROGRAMS[program], gate).values():
        assert len(paths) == 9, log
        assert_logged_as_lost(paths, log)


@pytest.mark.parametrize("program", PROGRAMS)
def test_tasks_of_program_run_at_its_end(program: str, gate: str) -> None:
    """A program that ends without an error runs its running and waiting tasks to completion."""
    paths, log, _ = run_program("end", PROGRAMS[program], gate)
    if sys.version_info < (3, 13):
        # Python 3.12 starts no thread after the main thread has ended, and each of these coroutines
        # needs one.
        paths = {id: path for id, path in paths.items() if "async" not in path}
    assert "are lost" not in log
    assert len(paths) in {6, 9}, log
    for result_id in paths:
        assert f"id={result_id} path={paths[result_id]} state=SUCCESSFUL" in log, log


# Tests of servers.


class StreamReader:
    """Read a stream and keep the latest payload of each task in `last`."""

    def __init__(self, server: Server, url: str) -> None:
        self.last: dict[str, Any] = {}
        self._url = server.url + url

    def read(self) -> None:
        """Read until the server closes the connection or the stream has ended."""
        try:
            for message in event_source(self._url):
                self._note(message)
        except httpx.HTTPError:
            pass  # At Ctrl-C gunicorn's sync worker answers its current request with 500.

    def _note(self, message: Message) -> None:
        if message.data:
            self.last[message.payload["id"]] = message.payload

    def is_running(self, result_id: str) -> bool:
        """Whether a task has reported progress."""
        return bool(self.last.get(result_id, {}).get("progress"))


def stop(server: Server, end: str, pid: int) -> float:
    """Stop the server; return the seconds until `pid`, the process with the tasks, has ended."""
    serving = os.pidfd_open(pid)
    try:
        began = time.monotonic()
        with ThreadPoolExecutor() as threads:
            stopping = threads.submit(server.stop, SIGNALS[end], group=end == "Ctrl-C")
            select.select([serving], [], [], LIMIT)
            seconds = time.monotonic() - began
            stopping.result()
            return seconds
    finally:
        os.close(serving)


def stop_server(end: str, name: str, directory: Path, gate: str) -> tuple[Any, ...]:
    """Stop a server while it runs tasks and clients read their streams.

    Return the tasks, the payloads that the clients received, the log, and the seconds until the
    process with the tasks ended.
    """
    directory = Path(tempfile.mkdtemp(prefix=end, dir=directory))
    # Use the default SHUTDOWN_TIMEOUT, which is 0 under Django's reloader: the reloader kills the
    # serving process 0.25 s after Ctrl-C.
    options = settings() if name == "runserver-reload" else SETTINGS
    with serve(name, directory, settings=options) as server, ThreadPoolExecutor() as threads:
        started = [
            server.start_task(name, gate, backend=alias, count=3) for alias, name in TASKS.items()
        ]
        readers = [StreamReader(server, tasks["events"]) for tasks in started]
        reading = [threads.submit(reader.read) for reader in readers]
        for reader, tasks in zip(readers, started, strict=True):
            wait_until(lambda: reader.is_running(tasks["id"]), "the task does not start")  # noqa: B023
        seconds = stop(server, end, started[0]["pid"])
        wait_until(lambda: group_has_ended(server.process.pid), "a process of the group is left")
        for future in reading:
            future.result(LIMIT)
        received = {id: payload for reader in readers for id, payload in reader.last.items()}
        return started, received, server.log.read_text(), seconds


def expected_on_streams(name: str, way: str, running: str, waiting: list[str]) -> list[str]:
    """Return the ids of the tasks of which the client must have received the last event."""
    if name not in POLLED:
        return [running, *waiting]
    # A polling client misses events sent after its last request; and at Ctrl-C gunicorn's sync
    # worker stops accepting requests immediately.
    return waiting if way == "SIGTERM" and name not in REFUSING else []


@pytest.mark.parametrize("name", SERVERS)
def test_exit_of_server(name: str, tmp_path: Path, gate: str) -> None:
    """When a server exits, its log and its streams report all unfinished tasks as lost."""
    # On SIGTERM Django's reloader kills the serving process, which cannot log its lost tasks.
    ways = ["Ctrl-C"] if name == "runserver-reload" else list(SIGNALS)
    if name in ONLY_SIGTERM:
        ways.remove("Ctrl-C")
    ends = run_in_time(stop_server, ways, name, tmp_path, gate)
    for way, (started, received, log, _) in ends.items():
        for tasks, name_of_task in zip(started, TASKS.values(), strict=True):
            path = f"tests.project.tasks.{name_of_task}"
            assert_logged_as_lost(dict.fromkeys(tasks["ids"], path), log)
            running, *waiting = tasks["ids"]
            for result_id in expected_on_streams(name, way, running, waiting):
                payload = received[result_id]
                assert (payload["status"], payload["error"]["reason"]) == ("FAILED", "lost"), way


@pytest.mark.parametrize("name", WORKERS)
def test_exit_of_workers(name: str, tmp_path: Path, gate: str) -> None:
    """Each worker of a server reports its lost tasks, of both backends, while no stream is open."""
    with serve(name, tmp_path, settings=SETTINGS) as server:
        started = [
            server.start_task(task, gate, backend=alias, count=3) for alias, task in TASKS.items()
        ]
        if name == "gunicorn-max-requests":  # The worker ends by itself.
            last_id = started[-1]["ids"][0]  # It runs, and so it is the last to be reported.
            wait_until(lambda: last_id in server.log.read_text(), "the worker does not end")
        server.stop()
        wait_until(lambda: group_has_ended(server.process.pid), "a process of the group is left")
        log = server.log.read_text()
    for tasks, task in zip(started, TASKS.values(), strict=True):
        assert_logged_as_lost(dict.fromkeys(tasks["ids"], f"tests.project.tasks.{task}"), log)
