"""System checks: each reports a configuration that would not work, with the remedy.

Source: Django's topic guide "System check framework"."""

from __future__ import annotations

from typing import Any

from django.apps import apps
from django.conf import settings
from django.contrib.staticfiles import finders
from django.core.checks import CheckMessage, Error
from django.core.checks import Warning as CheckWarning
from django.core.exceptions import ImproperlyConfigured

from .conf import find_mistakes, sse_settings

SCRIPT = "django_tasks_local_sse/task-progress.js"


def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """Report unknown keys and invalid values in TASKS_SSE."""
    return [Error(mistake.message, id=mistake.check_id) for mistake in find_mistakes()]


def check_channel_manager(**kwargs: Any) -> list[CheckMessage]:
    """Report a channel manager that cannot be created, because every stream needs it."""
    from django_eventstream.utils import get_channelmanager

    try:
        get_channelmanager()
    except Exception as error:  # noqa: BLE001 - the application's module may raise anything
        return [
            Error(
                f"EVENTSTREAM_CHANNELMANAGER_CLASS names a channel manager that cannot be created: "
                f"{type(error).__name__}: {error}",
                hint="Every stream asks it whether the user may see a task, and would fail.",
                id="django_tasks_local_sse.E005",
            )
        ]
    return []


def check_bridge(**kwargs: Any) -> list[CheckMessage]:
    """Report a bridge to channels that anyone may read."""
    # Imported here, because django-eventstream is slow to import and worker processes do not
    # need it.
    from .eventstream import anyone_may_read

    if check_settings() or not sse_settings().bridge:
        return []
    if check_channel_manager() or not anyone_may_read():
        return []
    return [
        Error(
            "TASKS_SSE['BRIDGE'] is ignored: django-eventstream's channel manager lets anyone read "
            "every channel, and so every task.",
            hint="Set EVENTSTREAM_CHANNELMANAGER_CLASS to a manager of your own, whose "
            "can_read_channel(user, channel) decides about 'task-<result id>'.",
            id="django_tasks_local_sse.E003",
        )
    ]


def check_eventstream(**kwargs: Any) -> list[CheckMessage]:
    """Report that django-eventstream is missing from INSTALLED_APPS."""
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
    """Report that no finder finds the static files to which {% task_progress_media %} links."""
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
        return True  # A check of Django's app staticfiles reports this wrong setting.


CHECKS = (
    check_settings,
    check_channel_manager,
    check_bridge,
    check_eventstream,
    check_static_files,
)
