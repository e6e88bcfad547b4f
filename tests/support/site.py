"""A Django site in a directory: a settings module, a module of tasks and programs that use them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT
from tests.support.servers import environment
from tests.support.waiting import LIMIT

SETTINGS = """
from pathlib import Path

SECRET_KEY = "only for tests"
USE_TZ = True
INSTALLED_APPS = ["site_app"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": Path(__file__).with_name("configured.sqlite3"),
        "TEST": {"NAME": str(Path(__file__).with_name("test.sqlite3"))},
    }
}
TASKS = {
    "default": {
        "BACKEND": "django_tasks_local.ProcessPoolBackend",
        "OPTIONS": {"MAX_WORKERS": 1},
    }
}
"""
MODELS = """
from django.db import models

class Note(models.Model):
    text = models.TextField()
"""
TASKS = """
import asyncio
import time
from pathlib import Path

from django.conf import settings
from django.core import mail
from django.core.files.storage import storages
from django.db import connection, connections
from django.tasks import task

from site_app.models import Note

def wait(begun, gate):
    if begun:
        Path(begun).touch()
    deadline = time.monotonic() + 60
    while gate and not Path(gate).exists() and time.monotonic() < deadline:
        time.sleep(0.01)

@task
def evaluate(expression):
    return eval(expression)

@task
def delete_notes():
    Note.objects.all().delete()
    return connection.settings_dict["HOST"]

@task
def write_note(text, begun="", gate="", attempts=1):
    wait(begun, gate)
    error = None
    for number in range(attempts):
        try:
            Note.objects.create(text=f"{text} {number}")
        except Exception as exception:
            if attempts == 1:
                raise
            error = str(exception)
    return error

@task
async def write_note_async(text, begun, gate):
    await asyncio.to_thread(wait, begun, gate)
    await Note.objects.acreate(text=text)

@task
def write_later(text, begun, gate):
    wait(begun, gate)
    write_note.enqueue(text)
"""
# Every program of a site begins with these lines, and works on under `if __name__ == "__main__"`.
PROGRAM = """
import json, os, sys
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_settings")

def report(value):
    print(json.dumps(value), flush=True)

def run(task, *args):
    result = task.enqueue(*args)
    with hub.subscribe(result.id) as subscription:
        while not subscription.ended:
            assert subscription.take(60), "the task takes too long"
    result.refresh()
    if result.errors:
        return result.errors[-1].traceback
    return result.return_value

def main():
    global hub
    import django
    SETUP
    from django.conf import settings
    from django_tasks_local.hub import hub
    from site_app.tasks import evaluate
BODY

if __name__ == "__main__":
    main()
"""


class Site:
    """A site with the models and tasks above, and with settings that a test extends."""

    def __init__(self, directory: Path, settings: str = "") -> None:
        self.directory = directory
        (directory / "site_settings.py").write_text(SETTINGS + settings)
        app = directory / "site_app"
        app.mkdir()
        (app / "__init__.py").touch()
        (app / "models.py").write_text(MODELS)
        (app / "tasks.py").write_text(TASKS)

    def write(self, name: str, text: str) -> None:
        """Write a module of the site."""
        (self.directory / name).write_text(text)

    def program(
        self, body: str, *, set_up: str = "django.setup()", warnings: str = "error"
    ) -> list[Any]:
        """Run a program that calls report() with JSON values, and return these values."""
        indented = "".join(f"    {line}\n" for line in body.splitlines())
        self.write("program.py", PROGRAM.replace("SETUP", set_up).replace("BODY", indented))
        done = self.python("program.py", PYTHONWARNINGS=warnings)
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    def python(self, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the site's directory; warnings are errors."""
        path = os.pathsep.join([str(self.directory), str(ROOT)])
        return subprocess.run(
            [sys.executable, *args],
            cwd=self.directory,
            env=environment() | {"PYTHONPATH": path, "PYTHONWARNINGS": "error"} | environ,
            capture_output=True,
            text=True,
            timeout=3 * LIMIT,
            check=False,
        )
