"""Tests that runserver reloads at once although tasks would run for LIMIT seconds more."""

import os
import select
import time
from pathlib import Path

from tests.project.settings import INSTALLED_APPS
from tests.support.paths import ROOT
from tests.support.servers import Server, is_listening, serve
from tests.support.sse_client import stream
from tests.support.waiting import LIMIT, wait_until

SETTINGS = {
    "DEBUG": True,  # With DEBUG=False Django's reloader does not log the line NOTICED.
    "INSTALLED_APPS": [*INSTALLED_APPS, "changing_app"],
    "TASKS": {
        "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
        "processes": {"BACKEND": "django_tasks_local.ProcessPoolBackend"},
    },
}
NOTICED = "changed, reloading"


def reload_server(server: Server, module: Path, gate: str) -> float:
    """Change a file while tasks run; return the seconds until the old process has ended."""
    old = server.start_task("gated", gate)
    in_process = server.start_task("gated", gate, backend="processes")
    coroutine = server.start_task("gated_async", gate)
    for task in (old, in_process, coroutine):
        with stream(server.url + task["events"]) as messages:
            assert any(m.data and m.payload["progress"] for m in messages)
    noticed = server.log.read_text().count(NOTICED)
    process = os.pidfd_open(old["pid"])
    try:
        os.utime(module, (time.time() + 10 * (noticed + 1),) * 2)
        wait_until(
            lambda: server.log.read_text().count(NOTICED) > noticed,
            "the reloader does not notice the change",
        )
        began = time.monotonic()
        assert select.select([process], [], [], LIMIT)[0], "the old process does not end"
        seconds = time.monotonic() - began
    finally:
        os.close(process)
    wait_until(lambda: is_listening(server.port), "the new process does not start")
    assert server.start_task("noop")["pid"] != old["pid"]
    log = server.log.read_text()
    for task in (old, in_process, coroutine):
        assert f"{task['id']} (tests.project.tasks.gated" in log, (
            "the log does not name a lost task"
        )
    return seconds


def test_reload_does_not_wait_for_tasks(tmp_path: Path, gate: str) -> None:
    """
    A reload takes less than 2 s while a thread, a process and a coroutine run tasks.

    The time runs from the reloader's log line about the changed file (it scans once a second) to
    the end of the old process; Django then starts the new one immediately. Of three reloads one
    must be that fast, because a busy machine may delay the others.
    """
    module = tmp_path / "changing_app.py"
    module.touch()
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    with serve("runserver-reload", tmp_path, settings=SETTINGS, environ=environ) as server:
        assert any(reload_server(server, module, gate) < 2 for _ in range(3))
