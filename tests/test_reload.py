"""The development server's autoreloader while tasks run that would take another minute."""

import os
import select
import time
from pathlib import Path

import pytest

from tests.conftest import LIMIT, wait_until
from tests.project.settings import INSTALLED_APPS
from tests.servers import ROOT, accepts, serve
from tests.sse import stream

SETTINGS = {
    "DEBUG": True,  # or else the reloader does not say that it has noticed
    "INSTALLED_APPS": [*INSTALLED_APPS, "changing_app"],
    "TASKS": {
        "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
        "processes": {"BACKEND": "django_tasks_local.ProcessPoolBackend"},
    },
}


@pytest.mark.timeout(120)  # A busy machine starts the server slowly, twice.
def test_a_reload_does_not_wait_for_tasks(tmp_path: Path, gate: str) -> None:
    """
    It takes less than two seconds, with tasks in a thread and in a process that do not end.

    Measured from the moment when the reloader, which looks at the files once a second, says that
    one has changed, until the old process is gone: then Django starts the new one, at once.
    """
    module = tmp_path / "changing_app.py"
    module.touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with serve(
        "runserver-reload", tmp_path, settings=SETTINGS, environ={"PYTHONPATH": path}
    ) as server:
        old = server.start_task("gated", gate)
        in_process = server.start_task("gated", gate, backend="processes")
        for task in (old, in_process):
            with stream(server.url + task["events"]) as messages:
                assert any(m.data and m.payload["progress"] for m in messages)
        process = os.pidfd_open(old["pid"])
        try:
            os.utime(module, (time.time() + 10,) * 2)
            wait_until(lambda: "changed, reloading" in server.log.read_text(), "it notices nothing")
            began = time.monotonic()
            assert select.select([process], [], [], LIMIT)[0], "the old process lives on"
            assert time.monotonic() - began < 2
        finally:
            os.close(process)
        wait_until(lambda: accepts(server.port), "the new process does not start")
        assert server.start_task("noop")["pid"] != old["pid"]
        log = server.log.read_text()
    for task in (old, in_process):
        assert f"{task['id']} (tests.project.tasks.gated)" in log, "it was lost in silence"
