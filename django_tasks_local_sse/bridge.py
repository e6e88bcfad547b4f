"""
Send task events to django-eventstream's channels, from a thread of this module.

    hub ---> thread "django-tasks-bridge" ---> send_event("task-<id>", kind, payload)

The thread has a subscription of the hub, as streams have. While a store or Redis is slow, only this
thread waits; afterwards it receives the latest event of each task.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from django.tasks.signals import task_enqueued, task_started
from django_eventstream import send_event

from django_tasks_local.execution.connections import close_old_resources
from django_tasks_local.forking import reset_in_child
from django_tasks_local.hub import hub
from django_tasks_local.logs import get_logger
from django_tasks_local.new_thread import new_thread

from . import encoding
from .conf import sse_settings
from .eventstream import anyone_may_read, channel_name

if TYPE_CHECKING:
    from django_tasks_local.events import TaskEvent

logger = get_logger(__name__)

RETRY_DELAYS = (1.0, 4.0)  # Seconds before each retry; after these the event is dropped.


class _State:
    def __init__(self) -> None:
        self.started = False
        # The thread that starts the bridge holds this lock. Others skip the start instead of
        # waiting, because a finalizer in that thread may enqueue a task, and so call _start().
        self.starting = threading.Lock()


_state = _State()


def install() -> None:
    """
    Start the bridge when the first task is enqueued or starts.

    Does nothing but log an error if anyone may read every channel. There is a system check for it,
    but servers do not run system checks.
    """
    try:
        refused = anyone_may_read()
    except Exception:
        logger.exception("TASKS_SSE['BRIDGE'] is ignored: the channel manager cannot be created.")
        return
    if refused:
        logger.error(
            "TASKS_SSE['BRIDGE'] is ignored: django-eventstream's channel manager would let "
            "anyone read every task. Run `manage.py check`."
        )
        return
    for signal in (task_enqueued, task_started):
        signal.connect(_start, dispatch_uid="django_tasks_local_sse.bridge")


def _start(**kwargs: Any) -> None:
    """Start the bridge's thread once. Called as the receiver of a signal, in any thread."""
    state = _state
    if state.started or not state.starting.acquire(blocking=False):
        return
    try:
        if not state.started:
            new_thread("django-tasks-bridge", _run).start()
            state.started = True
    finally:
        state.starting.release()


def _run() -> None:
    # A subscription receives the state of every task first, so it misses no event that was
    # published between the signal and this line.
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
    """Send an event; retry it after RETRY_DELAYS. Called in the bridge's thread; raises nothing."""
    for delay in (*RETRY_DELAYS, None):
        try:
            content = encoding.to_json(encoding.payload(event, sse_settings()))
            send_event(channel_name(event.id), event.kind, content, json_encode=False)
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
def _reset() -> None:
    """Allow a child of fork() to start its own thread: it has no copy of the parent's."""
    global _state
    _state = _State()
