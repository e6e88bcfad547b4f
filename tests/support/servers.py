"""serve() runs a web server in a process of its own; ServerThread runs uvicorn in this process."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tests.support.paths import ROOT
from tests.support.programs import require
from tests.support.waiting import LIMIT, wait_until

MANAGE = ROOT / "tests" / "project" / "manage.py"
COMMANDS = {
    "runserver": ["{manage}", "runserver", "--noreload", "127.0.0.1:{port}"],
    "runserver-daphne": ["{manage}", "runserver", "--noreload", "127.0.0.1:{port}"],
    "runserver-reload": ["{manage}", "runserver", "127.0.0.1:{port}"],
    "uvicorn": ["-m", "uvicorn", "--port={port}", "{asgi}"],
    "uvicorn-workers": ["-m", "uvicorn", "--port={port}", "--workers=2", "{asgi}"],
    "daphne": ["-m", "daphne", "-p", "{port}", "{asgi}"],
    "granian": ["-m", "granian", "--interface=asgi", "--port={port}", "{asgi}"],
    "gunicorn-sync": ["-m", "gunicorn", "-b", "127.0.0.1:{port}", "{wsgi}"],
    "gunicorn-gthread": ["-m", "gunicorn", "-b", "127.0.0.1:{port}", "--threads=4", "{wsgi}"],
    "gunicorn-gevent": ["-m", "gunicorn", "-b", "127.0.0.1:{port}", "-k", "gevent", "{wsgi}"],
    "gunicorn-uvicorn": [
        *("-m", "gunicorn", "-b", "127.0.0.1:{port}"),
        *("-k", "uvicorn_worker.UvicornWorker", "{asgi}"),
    ],
    "gunicorn-workers": ["-m", "gunicorn", "-b", "127.0.0.1:{port}", "-w2", "{wsgi}"],
    "gunicorn-preload": ["-m", "gunicorn", "-b", "127.0.0.1:{port}", "-w2", "--preload", "{wsgi}"],
    "granian-wsgi": ["-m", "granian", "--interface=wsgi", "--port={port}", "{wsgi}"],
    "hypercorn-worker": ["-m", "hypercorn", "-b", "127.0.0.1:{port}", "{asgi}"],
    "gunicorn-max-requests": [
        *("-m", "gunicorn", "-b", "127.0.0.1:{port}", "--max-requests=3", "{wsgi}"),
    ],
    "hypercorn": ["-m", "hypercorn", "-w0", "-b", "127.0.0.1:{port}", "{asgi}"],
    "waitress": ["-m", "waitress", "--listen=127.0.0.1:{port}", "{wsgi}"],
    "uwsgi": [
        *("{uwsgi}", "--http-socket=127.0.0.1:{port}", "--module={wsgi}", "--enable-threads"),
        *("--master", "--die-on-term", "--need-app", "--disable-logging"),
    ],
    "tornado": ["-m", "tests.project.tornado_server", "{port}"],
}
ASGI = ["uvicorn", "daphne", "granian", "hypercorn", "gunicorn-uvicorn", "runserver-daphne"]
WSGI = ["gunicorn-sync", "gunicorn-gthread", "granian-wsgi", "waitress", "uwsgi", "runserver"]
# Servers that call the application only in threads, where no signal handler can be installed.
# waitress has no handler for SIGTERM itself; gunicorn's stops to accept requests before the drain.
NEED_APP = ["waitress", "gunicorn-gthread"]


@dataclass
class Server:
    """A running web server: its first process, its port and the file of its log."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start_task(self, name: str, *args: Any, **options: Any) -> Any:
        """Enqueue a task in the server with the view `start` of the tests' project."""
        query = {"args": json.dumps(args), **options}
        response = httpx.get(f"{self.url}/start/{name}/", params=query, timeout=LIMIT)
        assert response.status_code == 200, response.text
        return response.json()

    def stop(self, number: signal.Signals = signal.SIGTERM, *, group: bool = False) -> float:
        """
        Send a signal to the server, with `group` to its process group; return the seconds until it
        ends.
        """
        began = time.monotonic()
        if group:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(LIMIT)
        return time.monotonic() - began


def require_uwsgi() -> str:
    """Return the path of uWSGI, which is in a group of its own because it has no wheels."""
    folder = Path(sys.executable).parent
    name = "uWSGI (needs a C compiler: uv sync --group uwsgi)"
    return require(shutil.which("uwsgi", path=folder), name)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which no socket listens."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment() -> dict[str, str]:
    """Return environment variables without Django's, with which Python can import the project."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("DJANGO_")}
    return {**environ, "PYTHONPATH": str(ROOT)}


def group_has_ended(pid: int) -> bool:
    """Return whether all processes of the process group `pid` have ended."""
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
    settings: Mapping[str, Any] | None = None,
    port: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """
    Start a server of COMMANDS in its own session, and wait until it accepts connections.

    `settings` override the settings of the tests' project. The server writes its log to
    `directory`. On exit, SIGKILL ends the server's process group.
    """
    port = port or free_port()
    values = {
        "port": port,
        "uwsgi": require_uwsgi() if name == "uwsgi" else None,
        "manage": MANAGE,
        "asgi": "tests.project.asgi:application",
        "wsgi": "tests.project.wsgi:application",
    }
    settings = dict(settings or {})
    if name == "runserver-daphne":
        settings["WITH_DAPHNE"] = True
    if name in NEED_APP:
        settings["WITH_APP"] = True
    command = [part.format_map(values) for part in COMMANDS[name]]
    log = directory / f"{name}-{port}.log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            command if name == "uwsgi" else [sys.executable, *command],
            env=environment() | {"TEST_SETTINGS": json.dumps(settings)} | dict(environ or {}),
            cwd=ROOT,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_until(
            lambda: process.poll() is not None or is_listening(port), f"{name} does not start"
        )
        assert process.poll() is None, log.read_text()
        yield Server(process, port, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(LIMIT)


def is_listening(port: int) -> bool:
    """Return whether a socket listens on this TCP port of 127.0.0.1."""
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class ServerThread:
    """
    Runs uvicorn in a thread of this process, so that the server and the test share hub and pools.
    """

    def __init__(self) -> None:
        # Both imports require django.setup(). The views are imported here and not at the first
        # request, because a test may then have replaced TASKS with a backend that rejects the tasks
        # of the views.
        import tests.project.urls  # noqa: F401
        from tests.project.asgi import application

        config = uvicorn.Config(application, port=0, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, name="test-server", daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        wait_until(lambda: self.server.started, "uvicorn does not start")
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        self.thread.join(LIMIT)
