"""The state of a task as the server renders it; in the browser the widget replaces it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured
from django.tasks import TaskResultStatus

from django_tasks_local.events import FailureReason
from django_tasks_local.lookup import newest_event

from .access import events_url
from .conf import sse_settings

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
# The same words as in task-progress.js, so that nothing changes visibly when the widget starts.
_WORDS = {
    "waiting": "Waiting",
    "running": "Running",
    "done": "Done",
    FailureReason.FAILED: "Failed",
    FailureReason.CANCELLED: "Cancelled",
    FailureReason.LOST: "Lost",
    FailureReason.DIED: "Crashed",
    FailureReason.TIMEOUT: "Timed out",
}


def widget_context(
    request: HttpRequest | None, result: AnyResult, *, href: str | None, label: str | None
) -> dict[str, Any]:
    """
    Return the context of the widget's template.

    Raises TypeError if `result` is not a TaskResult, and ImproperlyConfigured without a request.
    """
    if request is None:
        raise ImproperlyConfigured(
            "{% task_progress %} needs a request: render the template with one, as in "
            "render(request, 'page.html', context), or have `request` in its context."
        )
    src = events_url(request, result)
    event = newest_event(result)
    return {
        "src": src,
        "href": href,
        "label": label,
        "name": event.name,
        "state": state(event),
        "sequence": event.sequence,
        "percent": event.progress and event.progress.percent,
        "message": message(event, expose_errors=sse_settings().expose_errors),
        "detail": detail(event),
    }


def state(event: TaskEvent) -> str:
    """Return the widget's name for the state of a task."""
    if event.error is not None and event.error.reason is FailureReason.CANCELLED:
        return "cancelled"
    return _STATES[event.status]


def message(event: TaskEvent, *, expose_errors: bool) -> str:
    """Return the latest message of the task; if it failed and errors are exposed, the error."""
    error = event.error
    text = event.progress.message if event.progress else ""
    if error is not None and expose_errors and state(event) == "failed":
        text = ": ".join(filter(None, (error.type.rpartition(".")[2], error.message)))
    # A lone surrogate, as in a file name that is not UTF-8, cannot be encoded; it becomes "?".
    return text.encode("utf-8", "replace").decode()


def detail(event: TaskEvent) -> str:
    """Return the text at the end of the bar: a state, a position, a percentage or a count."""
    progress = event.progress
    if state(event) == "running" and progress is not None and progress.current is not None:
        if progress.percent is None:
            return f"{progress.current:,}"
        return f"{math.floor(progress.percent)} %{_time_left(progress.eta)}"
    word = _WORDS[event.error.reason if event.error else state(event)]
    return f"{word}, {event.position:,} before it" if event.position else word


def _time_left(seconds: float | None) -> str:
    if seconds is None or seconds <= 1:
        return ""
    if seconds < 90:
        return f" · {seconds:.0f} s left"
    if seconds < 5400:
        return f" · {seconds / 60:.0f} min left"
    return f" · {seconds / 3600:.1f} h left"
