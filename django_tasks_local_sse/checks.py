"""System checks: what would not work, and how to mend it. Django's "System check framework"."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings
from django.contrib.staticfiles import finders
from django.core.checks import CheckMessage, Error
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured
from django.tasks import task_backends

from django_tasks_local.backends import LocalBackend

from .conf import FIELDS, sse_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = "django_tasks_local_sse/task-progress.js"


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Complain of what TASKS_SSE says and cannot mean."""
    given = getattr(settings, "TASKS_SSE", {})
    if not isinstance(given, dict):
        return [
            Error(f"TASKS_SSE must be a dict, not {given!r}.", id="django_tasks_local_sse.E001")
        ]
    return list(_wrong_keys(given))


def _wrong_keys(given: dict[Any, Any]) -> Iterator[CheckMessage]:
    for key, value in given.items():
        if key not in FIELDS:
            yield Error(
                f"TASKS_SSE has the unknown key {key!r}.",
                hint=f"Valid keys: {', '.join(sorted(FIELDS))}.",
                id="django_tasks_local_sse.E001",
            )
        elif not FIELDS[key].metadata["check"](value):
            yield Error(
                f"TASKS_SSE[{key!r}] must be {FIELDS[key].metadata['wanted']}, not {value!r}.",
                id="django_tasks_local_sse.E002",
            )


def check_channel_manager(**kwargs: Any) -> list[CheckMessage]:
    """Complain of a channel manager that cannot be made; every stream asks it."""
    from django_eventstream.utils import get_channelmanager

    try:
        get_channelmanager()
    except Exception as error:  # noqa: BLE001 - whatever the application's module raises
        return [
            Error(
                f"EVENTSTREAM_CHANNELMANAGER_CLASS names no channel manager that can be made: "
                f"{type(error).__name__}: {error}",
                hint="Every stream asks it who may see a task, and would fail.",
                id="django_tasks_local_sse.E005",
            )
        ]
    return []


def check_bridge(**kwargs: Any) -> list[CheckMessage]:
    """Complain of a bridge to channels that everybody may read."""
    # django-eventstream takes a while to import, and a worker process does not need it.
    from .channels import anyone_may_read

    if not sse_settings().bridge or check_channel_manager() or not anyone_may_read():
        return []
    return [
        Error(
            "TASKS_SSE['BRIDGE'] is not acted on: django-eventstream's channel manager lets anyone "
            "read every channel, and so every task.",
            hint="Set EVENTSTREAM_CHANNELMANAGER_CLASS to a manager of your own, whose "
            "can_read_channel(user, channel) says who may read 'task-<result id>'.",
            id="django_tasks_local_sse.E003",
        )
    ]


def check_eventstream(**kwargs: Any) -> list[CheckMessage]:
    """Complain when django-eventstream is there, but not installed as an application."""
    if apps.is_installed("django_eventstream"):
        return []
    return [
        Error(
            "django_tasks_local_sse needs django-eventstream, which is not in INSTALLED_APPS.",
            hint="Add 'django_eventstream' to INSTALLED_APPS.",
            id="django_tasks_local_sse.E004",
        )
    ]


def check_static_files(**kwargs: Any) -> list[CheckMessage]:
    """Complain when {% task_progress_media %} would name files that nobody finds."""
    if not apps.is_installed("django.contrib.staticfiles"):
        problem = "'django.contrib.staticfiles' is not in INSTALLED_APPS"
        hint = "Add it, or serve the package's static files yourself and silence this check."
    elif not settings.STATIC_URL:
        problem, hint = "STATIC_URL is not set", "Set it, for example to 'static/'."
    elif not _finds_script():
        problem = f"no finder of STATICFILES_FINDERS finds {SCRIPT!r}"
        hint = "Add 'django.contrib.staticfiles.finders.AppDirectoriesFinder'."
    else:
        return []
    return [
        CheckWarning(
            f"The progress bars will have no script and no style: {problem}.",
            hint=hint,
            id="django_tasks_local_sse.W001",
        )
    ]


def _finds_script() -> bool:
    try:
        return finders.find(SCRIPT) is not None
    except ImproperlyConfigured:
        return True  # Another mistake, of which the application staticfiles complains itself.


def check_web_workers(**kwargs: Any) -> list[CheckMessage]:
    """Complain when several web workers are announced, which do not know of each other's tasks."""
    workers = os.environ.get("WEB_CONCURRENCY", "")
    local = [alias for alias in task_backends if isinstance(task_backends[alias], LocalBackend)]
    if not workers.isdecimal() or int(workers) < 2 or not local:
        return []
    return [
        CheckWarning(
            f"WEB_CONCURRENCY announces {workers} web workers, and each knows its own tasks only: "
            f"a stream that comes to another one is told 'unknown'. "
            f"Task backends in the web process: {', '.join(local)}.",
            hint="Run one web worker, with threads or async views; or have the load balancer send "
            "a visitor to the same worker every time, and silence this check.",
            id="django_tasks_local_sse.W002",
        )
    ]


CHECKS = (
    check_settings,
    check_channel_manager,
    check_bridge,
    check_eventstream,
    check_static_files,
    check_web_workers,
)
