"""A management command and script that exits while three backends have running and queued tasks."""

import json
import sys
import time
from typing import Any

from django.core.management import BaseCommand, CommandParser

from django_tasks_local.hub import hub
from tests.project.tasks import LIMIT, gated, gated_async


def exit_with_tasks(way: str, gate: str) -> None:
    """
    Enqueue three tasks per backend, print their ids and paths when one per backend runs, then exit.

    `way` is "sys.exit", "exception", "end" (return), or another text: then wait LIMIT seconds for a
    signal.
    """
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
        # Python handles a signal that arrives just before a sleep only after the sleep, so each
        # sleep is short.
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            time.sleep(0.05)


class Command(BaseCommand):
    """The management command that calls exit_with_tasks() with its two arguments."""

    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        """Declare the two arguments `way` and `gate` of exit_with_tasks()."""
        parser.add_argument("way")
        parser.add_argument("gate")

    def handle(self, *args: Any, **options: Any) -> None:
        """Call exit_with_tasks() with the arguments of the command line."""
        exit_with_tasks(options["way"], options["gate"])


if __name__ == "__main__":  # run as a script, without manage.py
    import django

    django.setup()
    exit_with_tasks(*sys.argv[1:])
