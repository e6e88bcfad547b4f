"""Tests that the settings and the code in the README of the published version 2.0 still run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# The constants below are exact copies of the Python blocks in the README of version 2.0.

THREAD_SETTINGS = """\
# settings.py
TASKS = {
    "default": {
        "BACKEND": "django_tasks_local.ThreadPoolBackend",
        "OPTIONS": {
            "MAX_WORKERS": 10,    # Thread pool size (default: 10)
            "MAX_RESULTS": 1000,  # Result retention limit (default: 1000)
        }
    }
}
"""

PROCESS_SETTINGS = """\
# settings.py
TASKS = {
    "default": {
        "BACKEND": "django_tasks_local.ThreadPoolBackend",
    },
    "cpu_intensive": {
        "BACKEND": "django_tasks_local.ProcessPoolBackend",
        "OPTIONS": {
            "MAX_WORKERS": 4,  # Typically number of CPU cores
        }
    }
}
"""

USING_TASKS = """\
from django.tasks import task

@task
def send_welcome_email(user_id):
    # This runs in a background thread
    ...

# In your view
send_welcome_email.enqueue(user.id)
"""

ACCESSING_RESULT_ID = """\
from django_tasks_local import current_result_id

@task
def my_task():
    result_id = current_result_id.get()
    # Use result_id for logging, caching progress, etc.
"""

# Tasks whose return values the test compares. The test appends them to the module that contains
# `my_task` of the README.
TASKS_OF_THE_TEST = """

import os
import threading

ten_workers = threading.Barrier(10)


@task
def get_result_id():
    return current_result_id.get()


@task
def get_process_id():
    return os.getpid()


@task
def meet_nine_others():
    ten_workers.wait(timeout=30)  # raises BrokenBarrierError if fewer tasks run at once


@task
def return_unchanged(value):
    return value
"""

DRIVER = """
import os
import sys
from queue import SimpleQueue
from types import SimpleNamespace

import django


def raises(expected, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except expected as error:
        return str(error)
    raise AssertionError(f"{expected.__name__} was not raised")


def main(alias):
    django.setup()
    from django.conf import settings
    from django.tasks import TaskResultStatus, task_backends
    from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
    from django.tasks.signals import task_finished
    import emails
    import views
    from django_tasks_local import ProcessPoolBackend, ThreadPoolBackend, current_result_id

    finished = SimpleQueue()

    def on_finished(sender, task_result, **kwargs):
        finished.put(task_result)

    task_finished.connect(on_finished)

    def run_task(task, *args):
        result = task.using(backend=alias).enqueue(*args)
        assert result.status == TaskResultStatus.READY
        assert finished.get(timeout=30).id == result.id
        result.refresh()
        assert result.status == TaskResultStatus.SUCCESSFUL, result.errors
        return result

    # "Using Tasks": the view enqueues in the default backend.
    views.welcome(SimpleNamespace(id=7))
    sent = finished.get(timeout=30)
    assert (sent.status, sent.args, sent.backend) == (TaskResultStatus.SUCCESSFUL, [7], "default")
    assert task_backends["default"].get_result(sent.id).return_value is None
    assert run_task(emails.send_welcome_email, 7).return_value is None

    # "Accessing Result ID from Within a Task"
    assert run_task(emails.my_task).return_value is None
    result = run_task(emails.get_result_id)
    assert result.return_value == result.id
    raises(LookupError, current_result_id.get)

    # "Backend Capabilities"
    backend = task_backends[alias]
    is_process_pool = isinstance(backend, ProcessPoolBackend)
    assert is_process_pool != isinstance(backend, ThreadPoolBackend)
    assert not backend.supports_priority
    raises(InvalidTask, emails.my_task.using, backend=alias, priority=5)
    assert not backend.supports_defer
    raises(InvalidTask, emails.my_task.using, backend=alias, run_after=result.enqueued_at)
    assert backend.supports_get_result
    assert backend.get_result(result.id) == result
    assert (run_task(emails.get_process_id).return_value != os.getpid()) == is_process_pool
    echo = emails.return_unchanged.using(backend=alias)
    if is_process_pool:
        assert "pickleable" in raises(ValueError, echo.enqueue, lambda: None)
    else:
        assert "pickle" not in raises(TypeError, echo.enqueue, lambda: None)

    # The options, also where the README does not set them.
    if not is_process_pool:
        for _ in range(10):
            emails.meet_nine_others.using(backend=alias).enqueue()
        outcomes = {finished.get(timeout=60).status for _ in range(10)}
        assert outcomes == {TaskResultStatus.SUCCESSFUL}  # MAX_WORKERS: 10
    results = [echo.enqueue(number) for number in range(1001)]
    for _ in results:
        finished.get(timeout=60)
    task_finished.disconnect(on_finished)
    assert 1 <= backend.statistics().workers <= settings.TASKS[alias].get("OPTIONS", {}).get(
        "MAX_WORKERS", 10
    )
    # MAX_RESULTS: 1000. A result is dropped after the receivers of a later one have returned.
    newest = echo.enqueue("newest")
    assert backend.wait_until_idle(timeout=30) == []
    raises(TaskResultDoesNotExist, backend.get_result, result.id)
    assert backend.statistics().results == 1000
    assert backend.get_result(newest.id).return_value == "newest"


if __name__ == "__main__":  # worker processes import this file
    main(*sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("settings", "alias"),
    [
        pytest.param(THREAD_SETTINGS, "default", id="threads"),
        pytest.param(PROCESS_SETTINGS, "cpu_intensive", id="processes"),
        pytest.param(PROCESS_SETTINGS, "default", id="threads without options"),
        pytest.param(
            THREAD_SETTINGS.replace("ThreadPoolBackend", "ProcessPoolBackend"),
            "default",
            id="processes with all options",
        ),
    ],
)
def test_documented_settings_and_code(tmp_path: Path, settings: str, alias: str) -> None:
    module, view = USING_TASKS.split("# In your view\n")
    files = {
        "settings.py": 'SECRET_KEY = "only for this test"\n' + settings,
        "emails.py": module + ACCESSING_RESULT_ID + TASKS_OF_THE_TEST,
        "views.py": f"from emails import send_welcome_email\n\ndef welcome(user):\n    {view}",
        "driver.py": DRIVER,
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    done = subprocess.run(
        [sys.executable, "-W", "error", "driver.py", alias],
        cwd=tmp_path,
        env=os.environ | {"DJANGO_SETTINGS_MODULE": "settings", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
