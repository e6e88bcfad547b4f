"""Pools in processes that multiprocessing has started, and interpreters of embedded Pythons."""

import multiprocessing
import os
import subprocess
import sys
from multiprocessing import spawn
from pathlib import Path

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_tasks_local.processes.multiprocessing_limits import (
    children_allowed,
    ensure_interpreter,
)
from tests.support.paths import ROOT

SCRIPT = """
import multiprocessing, sys
from django.conf import settings

def configure():
    options = {"MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 0}
    backend = {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": options}
    processes = backend | {"BACKEND": "django_tasks_local.ProcessPoolBackend"}
    settings.configure(TASKS={"default": backend, "processes": processes})
    import django
    django.setup()

def serve(alias, gate):
    if not settings.configured:
        configure()
    from django.core.signals import request_started
    from django_tasks_local.hub import hub
    from tests.project import tasks
    request_started.send(None)  # A process that serves does not wait for its tasks at its end.
    result = tasks.gated.using(backend=alias).enqueue(gate)
    with hub.subscribe(result) as subscription:
        while not subscription.take(30)[-1].progress:
            pass
    assert multiprocessing.current_process().daemon
    print(result.id, flush=True)

if __name__ == "__main__":
    method, alias, gate = sys.argv[1:]
    if method == "fork":  # The child inherits the settings and must not inherit the exit hooks.
        configure()
        from tests.project import tasks
        tasks.noop.enqueue()
    context = multiprocessing.get_context(method)
    process = context.Process(target=serve, args=(alias, gate), daemon=True)
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_in_daemonic_process(tmp_path: Path, alias: str, method: str, gate: str) -> None:
    """A daemonic process starts workers, and at its end it names the tasks that are lost."""
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no start method {method}")
    script = tmp_path / "daemonic.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), method, {"threads": "default"}.get(alias, alias), gate],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{done.stdout.strip()} (tests.project.tasks.gated)" in done.stderr


def test_flag_of_process_that_may_have_children() -> None:
    process = multiprocessing.current_process()
    assert not process.daemon
    with children_allowed():
        pass
    assert not process.daemon
    assert "daemon" not in process._config  # type: ignore[attr-defined]


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this interpreter look as if uWSGI had embedded it."""
    monkeypatch.setattr(sys, "executable", "/usr/sbin/uwsgi")
    monkeypatch.setattr(spawn, "_python_exe", b"/usr/sbin/uwsgi")


def test_interpreter_of_embedded_python(embedded: None) -> None:
    ensure_interpreter()
    code = "import sys; print(sys.prefix, *sys.version_info[:2])"
    found = subprocess.run(
        [spawn.get_executable(), "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == [sys.prefix, *map(str, sys.version_info[:2])]


def test_interpreter_set_by_project(embedded: None) -> None:
    multiprocessing.set_executable("/opt/python")
    ensure_interpreter()
    assert spawn.get_executable() == b"/opt/python"


def test_missing_interpreter(
    embedded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prefix", "exec_prefix", "base_prefix", "base_exec_prefix"):
        monkeypatch.setattr(sys, name, str(tmp_path))
    with pytest.raises(ImproperlyConfigured, match=r"multiprocessing\.set_executable\(\)"):
        ensure_interpreter()


def test_interpreter_that_is_python(monkeypatch: pytest.MonkeyPatch) -> None:
    before = spawn.get_executable()
    ensure_interpreter()
    assert spawn.get_executable() == before
