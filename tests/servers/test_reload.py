"""The development server's autoreloader while tasks run that would take another minute."""

import os
import select
import time
from pathlib import Path

from tests.project.settings import INSTALLED_APPS
from tests.support.paths import ROOT
from tests.support.servers import Server, accepts, serve
from tests.support.sse_client import stream
from tests.support.waiting import LIMIT, wait_until

SETTINGS = {
    "DEBUG": True,  # or else the reloader does not say that it has noticed
    "INSTALLED_APPS": [*INSTALLED_APPS, "changing_app"],
    "TASKS": {
        "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
        "processes": {"BACKEND": "django_tasks_local.ProcessPoolBackend"},
    },
}
NOTICED = "changed, reloading"


def reload(server: Server, module: Path, gate: str) -> float:
    """Change a file while tasks run; return how many seconds the old process lives on."""
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
        wait_until(lambda: server.log.read_text().count(NOTICED) > noticed, "it notices nothing")
        began = time.monotonic()
        assert select.select([process], [], [], LIMIT)[0], "the old process lives on"
        seconds = time.monotonic() - began
    finally:
        os.close(process)
    wait_until(lambda: accepts(server.port), "the new process does not start")
    assert server.start_task("noop")["pid"] != old["pid"]
    log = server.log.read_text()
    for task in (old, in_process, coroutine):
        assert f"{task['id']} (tests.project.tasks.gated" in log, "it was lost in silence"
    return seconds


def test_a_reload_does_not_wait_for_tasks(tmp_path: Path, gate: str) -> None:
    """
    It takes less than two seconds, with tasks that do not end: a thread, a process, a coroutine.

    Measured from the moment when the reloader, which looks at the files once a second, says that
    one has changed, until the old process is gone: then Django starts the new one, at once. A busy
    machine may be late once or twice.
    """
    module = tmp_path / "changing_app.py"
    module.touch()
    environ = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    with serve("runserver-reload", tmp_path, settings=SETTINGS, environ=environ) as server:
        assert any(reload(server, module, gate) < 2 for _ in range(3))
