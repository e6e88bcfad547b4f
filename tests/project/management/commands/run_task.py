"""A management command that runs a task in a worker process."""

import json
import os
from typing import Any

from django.core.management import BaseCommand

from django_tasks_local.hub import hub
from tests.project.process_tasks import LIMIT, whoami


class Command(BaseCommand):
    """Run the task `whoami`; print its return value and the pid of this process."""

    def handle(self, *args: Any, **options: Any) -> None:
        """Enqueue the task, wait until it has ended and print a JSON object."""
        result = whoami.enqueue()
        with hub.subscribe(result.id) as subscription:
            while not subscription.ended and subscription.take(LIMIT):
                pass
        result.refresh()
        self.stdout.write(json.dumps({"task": result.return_value, "server": os.getpid()}))
