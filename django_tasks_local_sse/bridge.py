"""
Task events on django-eventstream's own channels.

    hub ---> thread "django-tasks-bridge" ---> send_event("task-<id>", kind, payload)

The thread reads the hub as any other reader does. While a store or a Redis is slow, it is given the
latest event of each task when it comes back, and nobody else waits.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from django.tasks.signals import task_enqueued, task_started
from django_eventstream import send_event

from django_tasks_local.execution.connections import close_old_resources
from django_tasks_local.forking import reset_in_child
from django_tasks_local.hub import hub

from . import encoding
from .channels import anyone_may_read, channel
from .conf import sse_settings

if TYPE_CHECKING:
    from django_tasks_local.events import TaskEvent

logger = logging.getLogger(__name__)

RETRY_DELAYS = (1.0, 4.0)  # seconds; then the event is dropped, so that the others are not held up


class _State:
    def __init__(self) -> None:
        self.started = False
        self.lock = threading.Lock()  # Guards `started`: there is one thread.


_state = _State()


def install() -> None:
    """
    Have the bridge start with the first task.

    Refused while anyone may read every channel: servers do not run the system check that says so.
    """
    try:
        refused = anyone_may_read()
    except Exception:
        logger.exception("TASKS_SSE['BRIDGE'] is not acted on: there is no channel manager.")
        return
    if refused:
        logger.error(
            "TASKS_SSE['BRIDGE'] is not acted on: django-eventstream's channel manager would let "
            "anyone read every task. Run `manage.py check`."
        )
        return
    for signal in (task_enqueued, task_started):
        signal.connect(_start, dispatch_uid="django_tasks_local_sse.bridge")


def _start(**kwargs: Any) -> None:
    """Start the thread. A signal's receiver: called in any thread."""
    if _state.started:
        return
    with _state.lock:
        if not _state.started:
            threading.Thread(target=_run, name="django-tasks-bridge", daemon=True).start()
            _state.started = True


def _run() -> None:
    # The state of every task comes first, so nothing is missed between the signal and this.
    missed = 0
    with hub.subscribe() as subscription:
        while events := subscription.take():
            if subscription.missed > missed:
                logger.error(
                    "The store of django-eventstream was too slow: the last events of %d tasks "
                    "were not sent to their channels.",
                    subscription.missed - missed,
                )
                missed = subscription.missed
            for event in events:
                _send(event)


def _send(event: TaskEvent) -> None:
    """Send an event, if need be a few times. Called in the bridge's thread; raises nothing."""
    for delay in (*RETRY_DELAYS, None):
        try:
            content = encoding.to_json(encoding.payload(event, sse_settings()))
            send_event(channel(event.id), event.kind, content, json_encode=False)
            return
        except Exception:
            message = "The event %r of task id=%s could not be sent to its channel; %s."
            then = "it is dropped" if delay is None else f"trying again in {delay:.0f} s"
            logger.exception(message, str(event.kind), event.id, then)
        finally:
            close_old_resources()  # The store may have used the database.
        if delay is not None:
            time.sleep(delay)


@reset_in_child
def _start_anew() -> None:
    """In a child of fork(): the thread is the parent's."""
    global _state
    _state = _State()
