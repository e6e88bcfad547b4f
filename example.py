# /// script
# requires-python = ">=3.12"
# dependencies = ["django-tasks-local[sse]", "uvicorn>=0.38,<1"]
#
# [tool.uv.sources]
# django-tasks-local = { path = ".", editable = true }
# ///
"""
A whole site in one file: background tasks with live progress, no broker, no second service.

    uv run example.py [--host 127.0.0.1] [--port 8000]
"""

import argparse
import hashlib
import math
import random
import time
from contextlib import suppress

import django
import uvicorn
from django.conf import settings

if not settings.configured:
    settings.configure(
        # Not a secret, because this is a demo: links stay good when it is started anew.
        SECRET_KEY="django-tasks-local",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
        INSTALLED_APPS=[
            "django.contrib.staticfiles",
            "django_eventstream",
            "django_tasks_local_sse",
        ],
        MIDDLEWARE=[
            "django.middleware.security.SecurityMiddleware",
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
        ],
        # The page remembers its tasks in a signed cookie, so that the demo needs no database.
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        STATIC_URL="static/",
        TEMPLATES=[
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {
                    "context_processors": ["django.template.context_processors.request"],
                },
            }
        ],
        TASKS={
            "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
            # What computes for long goes to other processes, so that the page stays responsive.
            "cpu": {"BACKEND": "django_tasks_local.ProcessPoolBackend"},
        },
        # The demo shows why a task failed; by default only DEBUG does.
        TASKS_SSE={"EXPOSE_ERRORS": True},
    )
    django.setup()

from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect
from django.tasks import TaskResult, task, task_backends
from django.tasks.exceptions import TaskResultDoesNotExist
from django.template import engines
from django.urls import include, path
from django.views.decorators.http import require_POST, require_safe

from django_tasks_local import report_progress, track

# The tasks: ordinary Django tasks that say how far they are.


@task
def import_files() -> int:
    """Work through a list and say what is being done."""
    names = [f"measurements-{number:02}.csv" for number in range(1, 25)]
    for number, name in enumerate(names):
        report_progress(number, len(names), f"Reading {name}")
        time.sleep(random.uniform(0.1, 0.4))
    report_progress(len(names), len(names), f"Read {len(names)} files")
    return len(names)


@task
def download() -> int:
    """Do something of which nobody knows how long it will take."""
    received = 0
    for _ in range(60):
        received += random.randrange(40_000, 90_000)
        report_progress(received, None, f"{received / 1e6:.1f} MB received, size unknown")
        time.sleep(0.1)
    return received


@task
def checksum() -> str:
    """Track a tight loop: a few million steps, each of them far too short to report."""
    digest = hashlib.sha256()
    for number in track(range(6_000_000), message="Hashing six million numbers"):
        digest.update(number.to_bytes(4))
    return digest.hexdigest()


@task(backend="cpu")
def count_primes() -> int:
    """Compute for a while, in a process of its own."""
    return sum(
        is_prime(number) for number in track(range(2, 600_000), message="Looking for primes")
    )


def is_prime(number: int) -> bool:
    """Try all divisors up to the root."""
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


@task
def fail() -> None:
    """Get to 60 % and fail."""
    for percent in range(0, 61, 3):
        report_progress(percent, message="So far, so good")
        time.sleep(0.1)
    raise ValueError("row 61 has no price")


@task
def convert(name: str, seconds: float) -> None:
    """One of ten tasks that run at the same time."""
    for _ in track(range(100), message=f"Converting {name}"):
        time.sleep(seconds / 100)


ACTIONS = {
    "import": ("Import files", "Says what it does", import_files),
    "download": ("Download", "Of unknown length", download),
    "checksum": ("Tight loop", "Six million steps", checksum),
    "primes": ("Count primes", "In a process", count_primes),
    "fail": ("Fail", "Stops at 60 %", fail),
    "ten": ("Ten at once", "On one connection", convert),
}
REMEMBERED = 30  # tasks a visitor; a cookie holds no more than 4 KB


# The views: enqueue, remember the result's id, show the bars.


@require_safe
def index(request: HttpRequest) -> HttpResponse:
    """Show the buttons, and the bars of the tasks that this visitor has started."""
    found = [find(result_id) for result_id in request.session.get("tasks", [])]
    results = [result for result in found if result is not None]
    labels = {action_task.name: label for label, _, action_task in ACTIONS.values()}
    bars = [(labels[result.task.name], result) for result in results]
    page = engines["django"].from_string(PAGE)
    return HttpResponse(page.render({"actions": ACTIONS, "bars": bars}, request))


def find(result_id: str) -> TaskResult | None:
    """Return a result of either backend; None if the server was started anew in the meantime."""
    for alias in settings.TASKS:
        with suppress(TaskResultDoesNotExist):
            return task_backends[alias].get_result(result_id)
    return None


@require_POST
def start(request: HttpRequest) -> HttpResponse:
    """Enqueue what the button says."""
    action = request.POST.get("action", "")
    if action == "clear":
        request.session["tasks"] = []
    elif action == "ten":
        remember(
            request,
            *(
                convert.enqueue(f"video-{number:02}.mp4", random.uniform(3, 9))
                for number in range(1, 11)
            ),
        )
    elif action in ACTIONS:
        remember(request, ACTIONS[action][2].enqueue())
    return redirect("index")


def remember(request: HttpRequest, *results: TaskResult) -> None:
    """Put these tasks before those that the visitor's session knows."""
    ids = [result.id for result in results]
    request.session["tasks"] = (ids + request.session.get("tasks", []))[:REMEMBERED]


urlpatterns = [
    path("", index, name="index"),
    path("start/", start, name="start"),
    path("tasks/", include("django_tasks_local_sse.urls")),
]

PAGE = """\
{% load django_tasks_local_sse %}<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>django-tasks-local</title>
<link rel="icon" href="data:,">
{% task_progress_media %}
<style>
:root { color-scheme: light dark; --ink: light-dark(#1c2430, #e7ebf0);
  --soft: light-dark(#5b6675, #9aa5b3); --paper: light-dark(#f4f6f8, #12161c);
  --card: light-dark(#fff, #1b212a); --line: light-dark(#dfe4ea, #2c3542);
  --accent: light-dark(#0c7a55, #3ecf9a); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { margin: 0; font-size: 1.75rem; letter-spacing: -.02em; }
.lead { margin: .25rem 0 2rem; color: var(--soft); }
.actions { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); }
.actions button { display: flex; flex-direction: column; padding: .7rem .85rem;
  text-align: start; font: inherit; color: inherit; cursor: pointer;
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.actions button:hover { border-color: var(--accent); }
.actions button:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.actions small { line-height: 1.35; color: var(--soft); }
header.bars { display: flex; justify-content: space-between; align-items: baseline;
  margin: 2.5rem 0 .75rem; }
h2 { margin: 0; font-size: 1.1rem; }
.link { padding: 0; font: inherit; color: var(--accent); cursor: pointer; background: none;
  border: 0; }
.link:hover { text-decoration: underline; }
.empty { padding: 2rem; text-align: center; color: var(--soft);
  border: 1px dashed var(--line); border-radius: .6rem; }
.card { margin-bottom: .75rem; padding: .25rem 1.15rem; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; --task-progress-color: var(--accent); }
</style>
</head>
<body>
<main>
<h1>django-tasks-local</h1>
<p class="lead">Background tasks and live progress with nothing else to run. Reload any time.</p>
<form method="post" action="{% url 'start' %}" class="actions">
{% csrf_token %}
{% for action, texts in actions.items %}
<button name="action" value="{{ action }}"><strong>{{ texts.0 }}</strong>
<small>{{ texts.1 }}</small></button>
{% endfor %}
</form>
<header class="bars"><h2>Your tasks</h2>
{% if bars %}<form method="post" action="{% url 'start' %}">{% csrf_token %}
<button class="link" name="action" value="clear">Clear the list</button></form>{% endif %}
</header>
{% for label, result in bars %}
<div class="card">{% task_progress result label=label %}</div>
{% empty %}
<p class="empty">Nothing yet. Press one of the buttons.</p>
{% endfor %}
</main>
</body>
</html>
"""


def main() -> None:
    """Serve the demo."""
    parser = argparse.ArgumentParser(description="Serve the demo of django-tasks-local.")
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument("--port", default=8000, type=int, help="default: %(default)s")
    arguments = parser.parse_args()
    application = ASGIStaticFilesHandler(get_asgi_application())
    uvicorn.run(application, host=arguments.host, port=arguments.port, lifespan="off")


if __name__ == "__main__":
    main()
