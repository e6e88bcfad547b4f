"""Real servers, each in processes of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.conftest import LIMIT, wait_until

ROOT = Path(__file__).parent.parent

# `{project}` is a package with manage.py, asgi.py and wsgi.py.
COMMANDS = {
    "runserver": ["{manage}", "runserver", "--noreload", "127.0.0.1:{port}"],
    "runserver-daphne": ["{manage}", "runserver", "--noreload", "127.0.0.1:{port}"],
    "runserver-reload": ["{manage}", "runserver", "127.0.0.1:{port}"],
    "uvicorn": ["-m", "uvicorn", "--port={port}", "{project}.asgi:application"],
    "uvicorn-workers": [
        *("-m", "uvicorn", "--port={port}", "--workers=2", "{project}.asgi:application"),
    ],
    "daphne": ["-m", "daphne", "-p", "{port}", "{project}.asgi:application"],
    "granian": ["-m", "granian", "--interface=asgi", "--port={port}", "{project}.asgi:application"],
    "gunicorn-sync": ["-m", "gunicorn", "-b", "127.0.0.1:{port}", "{project}.wsgi:application"],
    "gunicorn-gthread": [
        *("-m", "gunicorn", "-b", "127.0.0.1:{port}", "--threads=4", "{project}.wsgi:application"),
    ],
    "gunicorn-uvicorn": [
        *("-m", "gunicorn", "-b", "127.0.0.1:{port}", "-k", "uvicorn_worker.UvicornWorker"),
        "{project}.asgi:application",
    ],
    "gunicorn-workers": [
        *("-m", "gunicorn", "-b", "127.0.0.1:{port}", "-w2", "{project}.wsgi:application"),
    ],
    "gunicorn-preload": [
        *("-m", "gunicorn", "-b", "127.0.0.1:{port}", "-w2", "--preload"),
        "{project}.wsgi:application",
    ],
}
ASGI = ["uvicorn", "daphne", "granian", "gunicorn-uvicorn", "runserver-daphne"]
WSGI = ["gunicorn-sync", "gunicorn-gthread", "runserver"]


@dataclass
class Server:
    """A running server: its first process, where it answers, and where it logs."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Enqueue a task in the server; see `tests.project.views.start`."""
        query = {"args": json.dumps(args), **options}
        response = httpx.get(f"{self.url}/start/{name}/", params=query, timeout=LIMIT)
        assert response.status_code == 200, response.text
        return response.json()

    def stop(self, number: signal.Signals = signal.SIGTERM, *, group: bool = False) -> float:
        """Send a signal, as a process manager does, or as a terminal to the whole group; wait."""
        began = time.monotonic()
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(LIMIT)
        return time.monotonic() - began


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    """Return the environment of a program that knows this package and nothing of these tests."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("DJANGO_")}
    return {**environ, "PYTHONPATH": str(ROOT)}


def group_is_gone(pid: int) -> bool:
    """Whether no process is left of those that began with this one, in a session of their own."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(group) == pid and state != "Z":
            return False
    return True


@contextmanager
def serve(
    name: str,
    directory: Path,
    *,
    project: str = "tests.project",
    settings: Mapping[str, Any] | None = None,
    port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """
    Start one of COMMANDS in a session of its own, and wait until it answers.

    `settings` come on top of those of the tests' project; its log is in `directory`.
    """
    port = port or free_port()
    manage = ROOT.joinpath(*project.split("."), "manage.py")
    places = {"port": port, "project": project, "manage": manage}
    settings = dict(settings or {})
    if name == "runserver-daphne":
        settings["WITH_DAPHNE"] = True
    log = directory / f"{name}-{port}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *(part.format_map(places) for part in COMMANDS[name])],
            env=environment() | {"TEST_SETTINGS": json.dumps(settings)} | dict(environ or {}),
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is not None or accepts(port), f"{name} does not start")
        assert process.poll() is None, log.read_text()
        yield Server(process, port, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT)


def accepts(port: int) -> bool:
    """Whether somebody listens on a port."""
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
