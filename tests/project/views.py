"""Views of the tests' project: a page with progress widgets, and helpers that tests call by URL."""

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
    """Render a page with a progress widget for each task that the query names with `id=...`."""
    backend = task_backends[request.GET.get("backend", "default")]
    results = [backend.get_result(result_id) for result_id in request.GET.getlist("id")]
    template = engines["django"].from_string(PAGE)
    return HttpResponse(template.render({"results": results}, request))


def start(request: HttpRequest, name: str) -> HttpResponse:
    """
    Enqueue the task `name`; `args` (a JSON list), `count` and `backend` come from the query string.
    """
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
    """Run `whoami` in a worker process; return its return value and the pid of the web process."""
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
    """Send an event on a channel of django-eventstream, as an application does."""
    send_event(channel, "message", {"text": text})
    return HttpResponse("sent")


def login_as(request: HttpRequest, username: str) -> HttpResponse:
    """Log in an existing user without a password, so that tests need no login form."""
    user = get_user_model().objects.get(username=username)
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return HttpResponse("logged in")
