"""A worker process ends as Python ends a process, and the programs of its tasks end with it."""

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from django.tasks import TaskResultStatus, task_backends
from django.test import override_settings

from django_tasks_local import cancel
from django_tasks_local.hub import hub
from tests.project import process_tasks as tasks
from tests.support.backends import PROCESSES
from tests.support.paths import ROOT
from tests.support.programs import require
from tests.support.servers import environment
from tests.support.systems import is_alive, needs_groups
from tests.support.waiting import LIMIT, finished, wait_until

METHODS = ["spawn"] if sys.platform == "win32" else ["forkserver", "spawn"]

SCRIPT = """
import sys
import django
from django.conf import settings
from django.tasks import task
from django_tasks_local.hub import hub

settings.configure(
    INSTALLED_APPS=["django.contrib.contenttypes"],
    TASKS={"default": {
        "BACKEND": "django_tasks_local.ProcessPoolBackend",
        "OPTIONS": {"MAX_WORKERS": 1, "START_METHOD": sys.argv[1]},
    }},
)
django.setup()

@task
def speak(word):
    print(word, end="")

def run(word):
    result = speak.enqueue(word)
    with hub.subscribe(result.id) as subscription:
        while not subscription.ended:
            subscription.take(20)
"""


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Iterator[str]:
    """Configure a process backend with each start method; return its name."""
    options = {"MAX_WORKERS": 1, "START_METHOD": request.param}
    with override_settings(TASKS={"default": {"BACKEND": PROCESSES, "OPTIONS": options}}):
        yield request.param


def wait_for_pid(marker: Path) -> int:
    """Return the pid in a file, as soon as a task has written it."""

    def text() -> str:
        return marker.read_text(encoding="utf-8") if marker.exists() else ""

    wait_until(lambda: text().endswith("\n"), "no program was started")
    return int(text())


@needs_groups
@pytest.mark.parametrize("how", ["program", "fork"])
@pytest.mark.usefixtures("method")
def test_surviving_program_hides_the_death_of_its_worker(how: str, tmp_path: Path) -> None:
    """The parent notices the death although a process holds copies of the worker's descriptors."""
    marker = tmp_path / "pid"
    result = finished(tasks.leave_a_program.enqueue(how, str(marker)))
    event = hub.snapshot(result.id)
    assert event is not None
    assert event.error is not None
    assert event.error.reason == "died"
    wait_until(lambda: not is_alive(int(marker.read_text(encoding="utf-8"))), "the program runs on")


@needs_groups
@pytest.mark.parametrize("how", ["Popen", "shell", "executor"])
@pytest.mark.usefixtures("method")
def test_programs_of_a_stopped_task_run_on(how: str, tmp_path: Path) -> None:
    """A cancelled task's worker ends with all programs in its process group."""
    marker = tmp_path / "pid"
    result = tasks.wait_for_programs.enqueue(how, str(marker))
    pid = wait_for_pid(marker)
    assert cancel(result.id)
    assert finished(result).status == TaskResultStatus.FAILED
    wait_until(lambda: not is_alive(pid), "the program runs on")


@needs_groups
@pytest.mark.usefixtures("method")
def test_programs_inherit_descriptors_of_the_worker() -> None:
    """A program that a task starts inherits the three standard streams only."""
    result = finished(tasks.inherited_descriptors.enqueue())
    assert result.return_value == [0, 1, 2]


@pytest.mark.usefixtures("method")
def test_worker_ends_without_its_exit_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle worker calls the functions of atexit, multiprocessing and logging at its end."""
    monkeypatch.setattr("django_tasks_local.processes.crew.KILL_AFTER", LIMIT, raising=False)
    path = tmp_path / "lines"
    finished(tasks.leave_exit_functions.enqueue(str(path)))
    task_backends["default"].close()  # type: ignore[attr-defined]
    assert sorted(path.read_text(encoding="utf-8").split()) == [
        "atexit",
        "logging",
        "multiprocessing",
    ]


@needs_groups
@pytest.mark.usefixtures("method")
def test_alarm_of_a_task_kills_the_next_one() -> None:
    left = finished(tasks.leave_an_alarm.enqueue())
    result = finished(tasks.sleep.enqueue(0.4))
    assert result.worker_ids == left.worker_ids
    assert result.status == TaskResultStatus.SUCCESSFUL


@needs_groups
@pytest.mark.parametrize("end", ["os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_fork_server_leaves_a_directory(end: str, tmp_path: Path) -> None:
    """The fork server removes its directory also after an end of the site without atexit."""
    script = tmp_path / "script.py"
    main = f"\nif __name__ == '__main__':\n    import os\n    run('printed')\n    {end}\n"
    script.write_text(SCRIPT + main, encoding="utf-8")
    with TemporaryDirectory() as directory:
        subprocess.run(
            [sys.executable, str(script), "forkserver"],
            env=environment() | {"TMPDIR": directory},
            cwd=ROOT,
            timeout=2 * LIMIT,
            check=False,
        )
        left = Path(directory)
        wait_until(lambda: not any(left.iterdir()), "the fork server leaves its directory")


@needs_groups
def test_long_path_of_temporary_files(tmp_path: Path) -> None:
    """With a TMPDIR that is too long for a socket, workers start without the fork server."""
    directory = tmp_path / ("x" * 100)
    directory.mkdir()
    script = tmp_path / "script.py"
    main = "\nif __name__ == '__main__':\n    run('printed')\n"
    script.write_text(SCRIPT + main, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), "forkserver"],
        env=environment() | {"TMPDIR": str(directory)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=2 * LIMIT,
        check=True,
    )
    assert done.stdout == "printed"
    assert "Set the environment variable TMPDIR to a shorter path." in done.stderr


SANDBOX = """
import fcntl, time
from multiprocessing import Pipe
from django_tasks_local.processes import lifeline

call = fcntl.fcntl

def refuse(file, command, *arguments):
    if command == fcntl.F_SETSIG:
        raise PermissionError("refused")
    return call(file, command, *arguments)

fcntl.fcntl = refuse
watched, parent = Pipe(duplex=False)
lifeline.lead_group()
lifeline.die_with_parent(watched)
parent.close()
time.sleep(30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has F_SETSIG")
def test_sandbox_refuses_f_setsig() -> None:
    """A worker whose sandbox refuses F_SETSIG watches its parent in a thread, and dies with it."""
    command = [sys.executable, "-c", SANDBOX]
    assert subprocess.run(command, cwd=ROOT, timeout=2 * LIMIT, check=False).returncode == -9


@pytest.mark.parametrize("method", METHODS)
def test_printed_text_never_arrives(method: str, tmp_path: Path) -> None:
    """The text that a task prints is in the parent's stdout, a pipe, when the task has finished."""
    script = tmp_path / "script.py"
    wait = "    print('after ', end='', flush=True)\n"
    main = f"\nif __name__ == '__main__':\n    run('printed ')\n{wait}"
    script.write_text(SCRIPT + main, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script), method],
        env=environment() | {"PYTHONUNBUFFERED": ""},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=2 * LIMIT,
        check=True,
    )
    assert done.stdout == "printed after "


@pytest.mark.parametrize("method", METHODS)
def test_coverage_of_task_bodies_is_zero(method: str, tmp_path: Path) -> None:
    """The package coverage measures the function of a task in a worker process."""
    require("coverage" if find_spec("coverage") else None, "coverage")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + "\nif __name__ == '__main__':\n    run('printed')\n")
    body = SCRIPT.splitlines().index('    print(word, end="")') + 1
    options = tmp_path / ".coveragerc"
    options.write_text("[run]\nconcurrency = multiprocessing,thread\nparallel = true\n")
    coverage = [sys.executable, "-m", "coverage"]

    def call(*arguments: str) -> str:
        return subprocess.run(
            [*coverage, *arguments],
            env=environment() | {"PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            timeout=2 * LIMIT,
            check=True,
        ).stdout

    call("run", "--rcfile", str(options), str(script), method)
    call("combine", "--rcfile", str(options))
    missing = call("report", "--rcfile", str(options), "-m", "--include", "script.py")
    assert f"{body}" not in missing.split("%")[1]
