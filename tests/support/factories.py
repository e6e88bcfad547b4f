"""Results, events and requests that no backend and no server has made."""

import uuid
from typing import Any

from django.http import HttpRequest
from django.tasks import TaskResult, TaskResultStatus
from django.test import RequestFactory
from django.utils import timezone

from django_tasks_local.events import EventKind, TaskEvent
from tests.project import tasks
from tests.support.waiting import AnyResult

STATUSES = {
    EventKind.ENQUEUED: TaskResultStatus.READY,
    EventKind.FINISHED: TaskResultStatus.SUCCESSFUL,
}


def event(id: str, sequence: int, kind: str = "progress", **values: Any) -> TaskEvent:
    """Return an event; without `status`, that of a task that succeeds."""
    fields = {
        "kind": EventKind(kind),
        "status": STATUSES.get(EventKind(kind), TaskResultStatus.RUNNING),
        "name": "task",
        "backend": "default",
    }
    return TaskEvent(id=id, sequence=sequence, **(fields | values))


def task_result() -> AnyResult:
    return TaskResult(
        task=tasks.noop,
        id=uuid.uuid4().hex,
        status=TaskResultStatus.READY,
        enqueued_at=timezone.now(),
        started_at=None,
        finished_at=None,
        last_attempted_at=None,
        args=[],
        kwargs={},
        backend="default",
        errors=[],
        worker_ids=[],
    )


def anonymous() -> HttpRequest:
    """A request of nobody, for whom links are bearer links."""
    return RequestFactory().get("/")
