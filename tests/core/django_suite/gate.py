"""The task that keeps the only worker of a HeldBackend busy."""

from django.tasks import task

from tests.project import gates


@task
def wait_at_gate(path: str) -> None:
    """Block until Gate.open() opens the gate at `path`, which also works between processes."""
    gates.wait_for(path)
