"""A management command that ends while tasks run and wait: threads, processes, coroutines."""

import json
import sys
import time
from typing import Any

from django.core.management import BaseCommand, CommandParser

from django_tasks_local.hub import hub
from tests.project.tasks import LIMIT, gated, gated_async


def leave(way: str, gate: str) -> None:
    """Enqueue tasks on each backend, print their ids when one of each runs, and end this way."""
    enqueued = []
    for task, alias in ((gated, "default"), (gated, "processes"), (gated_async, "coroutines")):
        results = [task.using(backend=alias).enqueue(gate) for _ in range(3)]
        with hub.subscribe(results[0].id) as subscription:
            while not any(event.progress for event in subscription.take(LIMIT)):
                assert not subscription.ended
        enqueued += results
    ids = {result.id: result.task.module_path for result in enqueued}
    print(json.dumps(ids), flush=True)  # noqa: T201
    if way == "sys.exit":
        sys.exit(3)
    if way == "exception":
        raise RuntimeError("an exception in main")
    if way != "end":
        # Short waits for a signal: Python sees one that comes just before a wait only after it.
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            time.sleep(0.05)


class Command(BaseCommand):
    """End in one of the ways that there are."""

    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """See BaseCommand."""
        parser.add_argument("way")
        parser.add_argument("gate")

    def handle(self, *args: Any, **options: Any) -> None:
        """See Command."""
        leave(options["way"], options["gate"])


if __name__ == "__main__":  # the same, as a plain script
    import django

    django.setup()
    leave(*sys.argv[1:])
