"""A module whose import takes longer than the TIMEOUT of a test, in a worker process."""

import time

from django.tasks import task

from django_tasks_local import in_worker_process

if in_worker_process():
    time.sleep(1.5)


@task
def noop() -> None:
    """Return at once."""
