"""Tests that a task which outlives its test run does not write into the configured database."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.support.site import Site

BACKENDS = ["ThreadPoolBackend", "ProcessPoolBackend"]
SETTINGS = """
TASKS["default"] = {{
    "BACKEND": "django_tasks_local.{backend}",
    "OPTIONS": {{"MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 60}},
}}
"""
# The receiver writes, as that of a package that records tasks in the database.
APPS = """
from django.apps import AppConfig
from django.tasks import signals

def write(task_result, **kwargs):
    from site_app.models import Note
    Note.objects.create(text=f"receiver {task_result.status}")

class App(AppConfig):
    name = "site_app"
    def ready(self):
        signals.task_finished.connect(write)
"""


def make_site(directory: Path, backend: str) -> Site:
    """Return a site whose configured database exists and has the table of Note."""
    site = Site(directory, SETTINGS.format(backend=backend))
    site.write("site_app/apps.py", APPS)
    with closing(sqlite3.connect(directory / "configured.sqlite3")) as connection:
        connection.execute("CREATE TABLE site_app_note (id integer PRIMARY KEY, text text)")
    return site


def rows(site: Site) -> list[Any]:
    """Return the texts in the configured database."""
    with closing(sqlite3.connect(site.directory / "configured.sqlite3")) as connection:
        return [text for (text,) in connection.execute("SELECT text FROM site_app_note")]


OUTLIVE = """
import logging, time
from pathlib import Path
from django.tasks import task_backends
from django.test.runner import DiscoverRunner
from site_app import tasks
from site_app.models import Note

warnings = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
logging.getLogger("django_tasks_local").addHandler(handler)
runner = DiscoverRunner(verbosity=0, interactive=False)
runner.setup_test_environment()
databases = runner.setup_databases()
results = [getattr(tasks, name).enqueue(*args) for name, args in TASKS]
while not Path("begun").exists():
    time.sleep(0.01)
runner.teardown_databases(databases)
runner.teardown_test_environment()
Path("gate").touch()
assert not task_backends["default"].wait_until_idle(60)
for result in results:
    result.refresh()
    error = result.errors[-1] if result.errors else None
    report([str(result.status), error and error.exception_class_path, error and error.traceback])
report(warnings)
"""


def outlive(site: Site, *tasks: tuple[str, tuple[Any, ...]]) -> list[Any]:
    """Run tasks that begin in a test run and go on after it; return results and warnings."""
    return site.program(OUTLIVE.replace("TASKS", repr(list(tasks))))


def assert_refused(site: Site, value: list[Any]) -> None:
    """Check that a task has failed with an error that names both databases."""
    status, path, traceback = value
    assert (status, path) == ("FAILED", "django_tasks_local.exceptions.DatabaseChanged")
    assert str(site.directory / "configured.sqlite3") in traceback
    assert str(site.directory / "test.sqlite3") in traceback


@pytest.mark.parametrize(
    "task",
    [
        ("write_note", ("a", "begun", "gate")),
        ("write_note", ("a", "begun", "gate", 3)),
        ("write_note_async", ("a", "begun", "gate")),
    ],
    ids=["sync", "swallows the errors", "async"],
)
def test_running_task_in_a_thread(tmp_path: Path, task: Any) -> None:
    """Its new connection is closed and the task fails, also if it catches the error and repeats."""
    site = make_site(tmp_path, "ThreadPoolBackend")
    value, warnings = outlive(site, task)
    assert_refused(site, value)
    assert rows(site) == []
    assert len(warnings) == 1
    assert task[0] in warnings[0]


def test_running_task_in_a_process(tmp_path: Path) -> None:
    """Its worker keeps the databases of the test run, and no receiver is called."""
    site = make_site(tmp_path, "ProcessPoolBackend")
    _, warnings = outlive(site, ("write_note", ("a", "begun", "gate", 3)))
    assert rows(site) == []
    assert len(warnings) == 1


def test_waiting_task(tmp_path: Path) -> None:
    """A task that starts after the test run fails before its function is called."""
    site = make_site(tmp_path, "ThreadPoolBackend")
    first = "evaluate", ("wait('begun', 'gate')",)
    second = "evaluate", ("Path('called').touch()",)
    first_value, second_value, warnings = outlive(site, first, second)
    assert first_value[0] == "SUCCESSFUL"  # It used no database.
    assert_refused(site, second_value)
    assert not (tmp_path / "called").exists()
    assert rows(site) == []
    assert len(warnings) == 2


def test_task_that_enqueues_after_the_test_run(tmp_path: Path) -> None:
    """The task that it enqueues inherits the databases of the test run."""
    site = make_site(tmp_path, "ThreadPoolBackend")
    outlive(site, ("write_later", ("a", "begun", "gate")))
    assert rows(site) == []


def test_receiver_that_outlives_the_run(tmp_path: Path) -> None:
    """A receiver that waits in the test run, and opens a connection after it, is refused."""
    site = make_site(tmp_path, "ThreadPoolBackend")
    waiting = "from site_app.tasks import wait; wait('begun', 'gate')\n    "
    site.write(
        "site_app/apps.py", APPS.replace("from site_app.models", waiting + "from site_app.models")
    )
    outlive(site, ("evaluate", ("1",)))
    assert rows(site) == []


TESTS = """
import time
from pathlib import Path
from django.test import TransactionTestCase
from site_app.tasks import write_note

def leave():
    for number in range(4):
        write_note.enqueue("late", "begun", "gate")
    while not Path("begun").exists():
        time.sleep(0.01)

class First(TransactionTestCase):
    def test_leave_tasks(self):
        leave()

class Second(TransactionTestCase):
    def test_leave_tasks(self):
        leave()
"""
# Opens the gate after the runner has restored the names of the databases.
RUNNER = """
from pathlib import Path
from django.test.runner import DiscoverRunner

class Runner(DiscoverRunner):
    def teardown_test_environment(self, **kwargs):
        super().teardown_test_environment(**kwargs)
        Path("gate").touch()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_manage_test(tmp_path: Path, backend: str) -> None:
    """`manage.py test` ends while four tasks of a test run or wait."""
    site = make_site(tmp_path, backend)
    site.write("test_notes.py", TESTS)
    site.write("runner.py", RUNNER)
    done = site.python(
        *("-m", "django", "test", "--noinput", "--testrunner=runner.Runner", "test_notes.First"),
        DJANGO_SETTINGS_MODULE="site_settings",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "gate").exists()
    assert rows(site) == []


def test_manage_test_parallel(tmp_path: Path) -> None:
    """Each process of `manage.py test --parallel` ends while its tasks run or wait."""
    site = make_site(tmp_path, "ThreadPoolBackend")
    # The processes end before the runner opens a gate, so the tasks wait for the end itself.
    draining = "from django_tasks_local import shutdown\n"
    draining += "Path.exists = lambda path: shutdown._exit.draining if path.name == 'gate' else "
    draining += "path.is_file()\n"
    site.write("test_notes.py", TESTS + draining)
    done = site.python(
        *("-m", "django", "test", "--noinput", "--parallel=2", "test_notes"),
        DJANGO_SETTINGS_MODULE="site_settings",
    )
    assert done.returncode == 0, done.stderr
    assert rows(site) == []


CONFTEST = """
from pathlib import Path

def pytest_unconfigure():
    Path("gate").touch()
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_pytest_django(tmp_path: Path, backend: str) -> None:
    """A run of pytest-django ends while tasks of a test run or wait."""
    site = make_site(tmp_path, backend)
    site.write("test_notes.py", TESTS)
    site.write("conftest.py", CONFTEST)
    done = site.python(
        *("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:asyncio"),
        "test_notes.py::First",
        DJANGO_SETTINGS_MODULE="site_settings",
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "gate").exists()
    assert rows(site) == []
