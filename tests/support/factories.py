"""Functions that create results, records, events and requests without a backend or a server."""

import uuid
from typing import Any

from django.http import HttpRequest
from django.tasks import TaskResult, TaskResultStatus
from django.test import RequestFactory
from django.utils import timezone

from django_tasks_local.events import EventKind, TaskEvent
from django_tasks_local.record import TaskRecord
from tests.project import tasks
from tests.support.waiting import AnyResult

STATUSES = {
    EventKind.ENQUEUED: TaskResultStatus.READY,
    EventKind.FINISHED: TaskResultStatus.SUCCESSFUL,
}


def event(id: str, sequence: int, kind: str = "progress", **values: Any) -> TaskEvent:
    """Return an event whose `status` fits `kind`, by default for a task that succeeds."""
    fields = {
        "kind": EventKind(kind),
        "status": STATUSES.get(EventKind(kind), TaskResultStatus.RUNNING),
        "name": "task",
        "backend": "default",
    }
    return TaskEvent(id=id, sequence=sequence, **(fields | values))


def task_result() -> AnyResult:
    """Return the result of a task that is enqueued and has not started."""
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


def task_record(interval: float = 0.0) -> TaskRecord:
    """Return the record of a task that has not started and is neither in a pool nor in the hub."""
    return TaskRecord(tasks.noop, uuid.uuid4().hex, [], {}, "default", timezone.now(), interval)


def anonymous_request() -> HttpRequest:
    """Return a request without a user, so that links created for it are bearer links."""
    return RequestFactory().get("/")
