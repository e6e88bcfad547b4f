"""One view that runs a task and waits for it."""

import os

from django.http import HttpRequest, JsonResponse
from django.urls import path

from django_tasks_local.hub import hub
from tests.process_tasks import LIMIT, whoami


def run(request: HttpRequest) -> JsonResponse:
    """Run a task in a worker process, and say who it was and who we are."""
    result = whoami.enqueue()
    with hub.subscribe(result.id) as subscription:
        while not subscription.ended and subscription.take(LIMIT):
            pass
    result.refresh()
    return JsonResponse({"task": result.return_value, "server": os.getpid()})


urlpatterns = [path("run/", run)]
