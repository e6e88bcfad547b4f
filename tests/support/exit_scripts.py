"""Run a script that enqueues tasks and exits."""

import signal
import subprocess
import sys

from tests.support.paths import ROOT

SCRIPT = """
import os, signal, sys, threading, time
{before}
from django.conf import settings
options = {{"SHUTDOWN_TIMEOUT": {timeout}}}
backend = {{"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": options}}
other = backend | {{"OPTIONS": {{"MAX_WORKERS": 1}}}}
settings.configure(TASKS={{"default": backend, "other": other}})
import django
django.setup()
from django_tasks_local import shutdown, signal_handlers
from tests.project import tasks

def say(text):
    print(text, flush=True)

def linger():
    # Windows handles no signal during a wait of the main thread.
    for _ in range(400):
        time.sleep(0.05)

if __name__ == "__main__":
    {body}
"""

# The exit codes of a process that a signal ends; Windows has its own.
ENDED_BY = {signal.SIGTERM: -signal.SIGTERM, signal.SIGINT: -signal.SIGINT}
if sys.platform == "win32":
    ENDED_BY = {signal.SIGTERM: 3, signal.SIGINT: 0xC000013A, signal.SIGBREAK: 3}


def run_script(body: str, before: str = "", timeout: float = 1) -> subprocess.CompletedProcess[str]:
    """Run a script whose backend "default" has this SHUTDOWN_TIMEOUT; "other" has one worker."""
    code = SCRIPT.format(before=before, timeout=timeout, body=body.strip().replace("\n", "\n    "))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
