"""A page with widgets, and views that start tasks, log in users and publish events."""

import json
import os

from django.contrib.auth import get_user_model, login
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.tasks import task_backends
from django.template import engines
from django_eventstream import send_event

from django_tasks_local.hub import hub
from django_tasks_local_sse.access import cancel_token, events_url
from tests.project import tasks
from tests.project.process_tasks import LIMIT, whoami

PAGE = """\
{% load django_tasks_local_sse %}<!doctype html><html lang="en"><head><title>Tasks</title>
<link rel="icon" href="data:,">
{% task_progress_media %}</head><body>
{% for result in results %}{% task_progress result %}{% endfor %}
</body></html>"""


def page(request: HttpRequest) -> HttpResponse:
    """Render a widget for each task `id=...`."""
    backend = task_backends[request.GET.get("backend", "default")]
    results = [backend.get_result(result_id) for result_id in request.GET.getlist("id")]
    template = engines["django"].from_string(PAGE)
    return HttpResponse(template.render({"results": results}, request))


def start(request: HttpRequest, name: str) -> HttpResponse:
    """Enqueue the task `count` times with the JSON list `args` on `backend`."""
    task = getattr(tasks, name).using(backend=request.GET.get("backend", "default"))
    arguments = json.loads(request.GET.get("args", "[]"))
    results = [task.enqueue(*arguments) for _ in range(int(request.GET.get("count", "1")))]
    return JsonResponse(
        {
            "id": results[0].id,
            "ids": [result.id for result in results],
            "events": events_url(request, *results),
            "cancel": cancel_token(request, results[0]),
            "pid": os.getpid(),
        }
    )


def run_in_worker(request: HttpRequest) -> HttpResponse:
    """Run a task in a worker process; return its value and the id of this process."""
    result = whoami.enqueue()
    with hub.subscribe(result.id) as subscription:
        while not subscription.ended and subscription.take(LIMIT):
            pass
    result.refresh()
    return JsonResponse({"task": result.return_value, "server": os.getpid()})


def readers(request: HttpRequest) -> HttpResponse:
    """Return the number of streams that are open in this process."""
    return JsonResponse({"readers": hub.statistics().subscriptions})


def publish(request: HttpRequest, channel: str, text: str) -> HttpResponse:
    """Publish an event of the application on a channel."""
    send_event(channel, "message", {"text": text})
    return HttpResponse("sent")


def login_as(request: HttpRequest, username: str) -> HttpResponse:
    """Log in a user without a password."""
    user = get_user_model().objects.get(username=username)
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return HttpResponse("logged in")
