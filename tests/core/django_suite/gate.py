"""The task that keeps the only worker of a HeldBackend busy."""

import fcntl
from pathlib import Path

from django.tasks import task


@task
def wait_at_gate(path: str) -> None:
    """
    Block until Gate.open() unlocks the file at `path`; a file lock also works between processes.
    """
    with Path(path).open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
