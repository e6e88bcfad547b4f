"""Which tasks a worker process can import; real shells and programs enqueue them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SETTINGS = """
from django.conf import settings
TASKS = {"default": {"BACKEND": "django_tasks_local.ProcessPoolBackend"}}
settings.configured or settings.configure(TASKS=TASKS)
import django
django.setup()
"""
TASK = """
from django.tasks import task, task_backends

@task
def double(number):
    return 2 * number
"""
ENQUEUE = """
if __name__ == "__main__" or __name__.endswith("shell"):
    result = double.enqueue(21)
    assert not task_backends["default"].wait_until_idle(30)
    result.refresh()
    print(result.status, result.errors or result.return_value)

"""
REFUSED = "InvalidTask: A worker process cannot import the function of task "


def run(command: list[str], program: str | None = None) -> str:
    """Return what a Python program writes to its standard output and error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *command],
        cwd=ROOT,
        input=program,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize("command", [["-c", SETTINGS + TASK + ENQUEUE], ["-"], ["-i", "-"]])
def test_a_function_without_a_file_is_refused(command: list[str]) -> None:
    """enqueue() refuses a function of `python -c`, of standard input and of a Python prompt."""
    program = None if command[0] == "-c" else SETTINGS + TASK + ENQUEUE
    assert f"{REFUSED}__main__.double" in run(command, program)


@pytest.mark.parametrize("where", ["argument", "input"])
def test_a_function_of_manage_py_shell_is_refused(where: str) -> None:
    """enqueue() refuses a function that a user types into `manage.py shell`."""
    code = 'settings.TASKS["default"]["BACKEND"] = "django_tasks_local.ProcessPoolBackend"\n'
    code = "from django.conf import settings\n" + code + TASK + "double.enqueue(21)\n"
    shell = ["-m", "django", "shell", "--settings=tests.project.settings", "--no-imports"]
    output = run([*shell, "-c", code]) if where == "argument" else run(shell, code)
    assert REFUSED in output


def test_a_function_of_a_script_runs(tmp_path: Path) -> None:
    """A worker imports the script that the parent runs, as multiprocessing does."""
    script = tmp_path / "script.py"
    script.write_text(SETTINGS + TASK + ENQUEUE)
    assert run([str(script)]) == "SUCCESSFUL 42\n"
