"""A page with widgets, and a way to become somebody."""

from django.contrib.auth import get_user_model, login
from django.http import HttpRequest, HttpResponse
from django.tasks import task_backends
from django.template import engines

PAGE = """\
{% load django_tasks_local_sse %}<!doctype html><html lang="en"><head><title>Tasks</title>
<link rel="icon" href="data:,">
{% task_progress_media %}</head><body>
{% for result in results %}{% task_progress result %}{% endfor %}
</body></html>"""


def page(request: HttpRequest) -> HttpResponse:
    """Show the bars of the tasks `id=...`."""
    backend = task_backends[request.GET.get("backend", "default")]
    results = [backend.get_result(result_id) for result_id in request.GET.getlist("id")]
    template = engines["django"].from_string(PAGE)
    return HttpResponse(template.render({"results": results}, request))


def login_as(request: HttpRequest, username: str) -> HttpResponse:
    """Log somebody in without a password."""
    user = get_user_model().objects.get(username=username)
    login(request, user, backend="django.contrib.auth.backends.ModelBackend")
    return HttpResponse("logged in")
