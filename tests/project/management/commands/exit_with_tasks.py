"""A management command, and script, that ends while tasks run and wait on three backends."""

import json
import sys
import time
from typing import Any

from django.core.management import BaseCommand, CommandParser

from django_tasks_local.hub import hub
from tests.project.tasks import LIMIT, gated, gated_async


def exit_with_tasks(way: str, gate: str) -> None:
    """Enqueue tasks, print their paths by id once one per backend runs, and end in this way."""
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
        # Short waits: Python handles a signal that arrives just before a wait only after the wait.
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            time.sleep(0.05)


class Command(BaseCommand):
    """Run exit_with_tasks()."""

    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the arguments of exit_with_tasks()."""
        parser.add_argument("way")
        parser.add_argument("gate")

    def handle(self, *args: Any, **options: Any) -> None:
        """Call exit_with_tasks()."""
        exit_with_tasks(options["way"], options["gate"])


if __name__ == "__main__":  # run as a script, without manage.py
    import django

    django.setup()
    exit_with_tasks(*sys.argv[1:])
