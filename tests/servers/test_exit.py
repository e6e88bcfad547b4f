"""
How a process ends while tasks run and wait: nothing hangs, and nothing is lost in silence.

Every test has tasks in threads, in worker processes, and coroutines that wait for sync code, whose
threads the interpreter would wait for: of each three, of which one runs.
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

from tests.support.paths import ROOT
from tests.support.servers import MANAGE, Server, environment, group_is_gone, serve
from tests.support.sse_client import Message, event_source
from tests.support.waiting import LIMIT, wait_until

SHUTDOWN_TIMEOUT = 1
LONGEST = SHUTDOWN_TIMEOUT + 2  # seconds until a process has ended


def settings(**options: Any) -> dict[str, Any]:
    """Return the settings of a program, with a backend for each kind."""
    options = {"MAX_WORKERS": 1, **options}
    threads = {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": options}
    processes = {"BACKEND": "django_tasks_local.ProcessPoolBackend", "OPTIONS": options}
    return {
        "TASKS": {"default": threads, "processes": processes, "coroutines": threads},
        "TASKS_SSE": {"RETRY": 100},
    }


SETTINGS = settings(SHUTDOWN_TIMEOUT=SHUTDOWN_TIMEOUT)
SERVERS = [
    "runserver",
    "runserver-reload",
    "uvicorn",
    "daphne",
    "granian",
    "gunicorn-sync",
    "gunicorn-uvicorn",
]
POLLED = ["gunicorn-sync"]
TASKS = {"default": "gated", "processes": "gated", "coroutines": "gated_async"}
SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}


def assert_named(paths: Mapping[str, str], log: str) -> None:
    """Check that the log names each of these tasks as lost."""
    lost = [line for line in log.splitlines() if "these tasks are lost" in line]
    for result_id, path in paths.items():
        assert sum(f"{result_id} ({path})" in text for text in lost) == 1, log


def all_in_time(function: Any, ways: Iterable[str], *args: Any) -> dict[str, Any]:
    """
    Call a function for each way to end, all at the same time; it returns the seconds last.

    What takes too long is tried again by itself: a busy machine may be late once or twice.
    """
    ways = list(ways)
    with ThreadPoolExecutor() as threads:
        ends = dict(zip(ways, threads.map(lambda way: function(way, *args), ways), strict=True))
    for way, end in ends.items():
        if end[-1] >= LONGEST:
            assert any(function(way, *args)[-1] < LONGEST for _ in range(2)), way
    return ends


# Scripts and management commands

WAYS = ["SIGTERM", "Ctrl-C", "exception", "sys.exit", "end"]
COMMAND = ROOT / "tests" / "project" / "management" / "commands" / "leave.py"
PROGRAMS = {
    "script": [str(COMMAND)],
    "management command": [str(MANAGE), "leave"],
}


def leave(way: str, command: list[str], gate: str) -> tuple[dict[str, str], str, float]:
    """Return the paths of the tasks by id, the log, and how many seconds the end has taken."""
    environ = environment() | {
        "DJANGO_SETTINGS_MODULE": "tests.project.settings",
        "TEST_SETTINGS": json.dumps(SETTINGS),
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
        if way == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif way == "SIGTERM":
            process.terminate()
        _, log = process.communicate(timeout=LIMIT)
        seconds = time.monotonic() - began
    wait_until(lambda: group_is_gone(process.pid), "something is left")
    return paths, log, seconds


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program(program: str, gate: str) -> None:
    """However it ends."""
    for paths, log, _ in all_in_time(leave, WAYS, PROGRAMS[program], gate).values():
        assert len(paths) == 9, log
        assert_named(paths, log)


# Servers


class Watcher:
    """A client of a server, which reads what becomes of some tasks."""

    def __init__(self, server: Server, url: str) -> None:
        self.last: dict[str, Any] = {}
        self._url = server.url + url

    def read(self) -> None:
        """Read until the server is gone, or has told the end of each task."""
        try:
            for message in event_source(self._url):
                self._note(message)
        except httpx.HTTPError:
            pass  # At Ctrl-C gunicorn's sync worker ends with 500 what it does just then.

    def _note(self, message: Message) -> None:
        if message.data:
            self.last[message.payload["id"]] = message.payload

    def runs(self, result_id: str) -> bool:
        """Whether a task has begun to report."""
        return bool(self.last.get(result_id, {}).get("progress"))


def stop(server: Server, end: str, pid: int) -> float:
    """Return how many seconds the process with the tasks has taken to end; its master ends, too."""
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
    """Return what was started, what clients were told, the log, and the seconds it took."""
    directory = Path(tempfile.mkdtemp(prefix=end, dir=directory))
    # Django's reloader kills the serving process a quarter of a second after Ctrl-C, so the default
    # there is 0.
    options = settings() if name == "runserver-reload" else SETTINGS
    with serve(name, directory, settings=options) as server, ThreadPoolExecutor() as threads:
        started = [
            server.start_task(name, gate, backend=alias, count=3) for alias, name in TASKS.items()
        ]
        watchers = [Watcher(server, tasks["events"]) for tasks in started]
        reading = [threads.submit(watcher.read) for watcher in watchers]
        for watcher, tasks in zip(watchers, started, strict=True):
            wait_until(lambda: watcher.runs(tasks["id"]), "the task does not start")  # noqa: B023
        seconds = stop(server, end, started[0]["pid"])
        wait_until(lambda: group_is_gone(server.process.pid), "something is left")
        for future in reading:
            future.result(LIMIT)
        told = {id: payload for watcher in watchers for id, payload in watcher.last.items()}
        return started, told, server.log.read_text(), seconds


def expected_on_streams(name: str, way: str, running: str, waiting: list[str]) -> list[str]:
    """Return the tasks whose clients must have seen how they ended."""
    if name not in POLLED:
        return [running, *waiting]
    # Who polls comes too late for what happens in the last moment; and at Ctrl-C gunicorn's sync
    # worker stops to serve at once.
    return waiting if way == "SIGTERM" else []


@pytest.mark.parametrize("name", SERVERS)
def test_a_server(name: str, tmp_path: Path, gate: str) -> None:
    """Waiting tasks are FAILED on their streams, and what still runs at the end is as well."""
    # Django's reloader kills the serving process when it gets a SIGTERM itself.
    ways = ["Ctrl-C"] if name == "runserver-reload" else list(SIGNALS)
    ends = all_in_time(stop_server, ways, name, tmp_path, gate)
    for way, (started, told, log, _) in ends.items():
        for tasks, name_of_task in zip(started, TASKS.values(), strict=True):
            path = f"tests.project.tasks.{name_of_task}"
            assert_named(dict.fromkeys(tasks["ids"], path), log)
            running, *waiting = tasks["ids"]
            for result_id in expected_on_streams(name, way, running, waiting):
                payload = told[result_id]
                assert (payload["status"], payload["error"]["reason"]) == ("FAILED", "lost"), way
