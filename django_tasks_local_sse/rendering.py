"""The state of a task as the server renders it, until the widget takes over. Plain functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.tasks import TaskResultStatus
from django.utils.formats import number_format

from django_tasks_local.events import FailureReason
from django_tasks_local.hub import hub
from django_tasks_local.lifecycle import event_from_result

from .access import events_url

if TYPE_CHECKING:
    from django.http import HttpRequest
    from django.tasks import TaskResult

    from django_tasks_local.events import TaskEvent

    type AnyResult = TaskResult[Any, Any]

_STATES = {
    TaskResultStatus.READY: "waiting",
    TaskResultStatus.RUNNING: "running",
    TaskResultStatus.SUCCESSFUL: "done",
    TaskResultStatus.FAILED: "failed",
}
_WORDS = {"waiting": "Waiting", "done": "Done", "failed": "Failed", "cancelled": "Cancelled"}


def widget_context(
    request: HttpRequest | None, result: AnyResult, *, href: str | None, label: str | None
) -> dict[str, Any]:
    """
    Return what the widget's template needs.

    Raises TypeError for what is not a TaskResult, and ImproperlyConfigured without a request.
    """
    if request is None:
        raise ImproperlyConfigured(
            "{% task_progress %} needs `request` in the template's context: render with a request, "
            "and have 'django.template.context_processors.request' among the context processors."
        )
    src = events_url(request, result)
    event = hub.snapshot(result.id) or event_from_result(result)
    progress = event.progress
    return {
        "src": src,
        "href": href,
        "label": label,
        "name": event.name,
        "state": state(event),
        "percent": progress and progress.percent,
        "message": progress.message if progress else "",
        "detail": detail(event),
    }


def state(event: TaskEvent) -> str:
    """Return the widget's name for the state of a task."""
    if event.error is not None and event.error.reason == FailureReason.CANCELLED:
        return "cancelled"
    return _STATES[event.status]


def detail(event: TaskEvent) -> str:
    """Return what stands at the end of the bar: a word, a percentage or a count."""
    word = _WORDS.get(state(event))
    progress = event.progress
    if word is not None or progress is None or progress.current is None:
        return word or ""
    if progress.percent is not None:
        return f"{int(progress.percent)} %"
    return number_format(progress.current, use_l10n=True, force_grouping=True)
