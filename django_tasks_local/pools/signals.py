"""
Sends Django's task signals, and avoids their cost where only Django's log receivers listen.

Signal.send_robust() takes a lock that all senders share, and it needs a TaskResult, which its log
receivers read three fields of. A TaskRecord has these fields, so the log receivers are called with
the record directly. Setting the logger "django.tasks" to WARNING saves the records as well, 12 µs
per task.

Two private parts of Django are read here, and tests fail if a Django version changes them: the
entries of `Signal.receivers` (if their shape is unknown, send_robust() is used for every task), and
`django.tasks.signals.log_task_*` (documentation of django.tasks, "Logging").
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from django.tasks import signals as django_signals

from .. import foreign

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.dispatch import Signal

    from ..aliases import AnyResult
    from ..execution import Outcome
    from ..record import TaskRecord

logger = logging.getLogger(__name__)

# The logger that Django's receivers write to.
_tasks_logger = logging.getLogger("django.tasks")
# The sender of receivers for all senders, as Signal.connect() notes it.
_ANY_SENDER = id(None)


class TaskSignal:
    """One of Django's task signals."""

    __slots__ = ("_django_key", "_known", "_log", "_our_key", "_signal")

    def __init__(self, signal: Signal, log: Callable[..., object], our_dispatch_uid: str) -> None:
        self._signal = signal
        self._log = log
        self._django_key = (id(log), _ANY_SENDER)
        # Our own receiver makes events for the tasks of other backends (see `foreign`).
        self._our_key = (our_dispatch_uid, _ANY_SENDER)
        # The two entries of `receivers` that were compared last and have these keys.
        self._known: tuple[Any, Any] = (None, None)

    @property
    def has_receivers(self) -> bool:
        """Whether a receiver other than Django's log and this package's is connected."""
        try:
            first, second = self._signal.receivers
        except (TypeError, ValueError):
            return True  # There are more or fewer than two.
        known = self._known
        if first is known[0] and second is known[1]:
            return False
        try:
            keys = [first[0], second[0]]
        except (IndexError, TypeError):
            return True  # The shape is that of an unknown Django version.
        if keys not in ([self._django_key, self._our_key], [self._our_key, self._django_key]):
            return True
        self._known = first, second
        return False

    def deliver(
        self,
        sender: type,
        record: TaskRecord,
        level: int,
        call_receivers: Callable[..., object],
    ) -> None:
        """Call the receivers, or only Django's log receiver if it is alone. Raises nothing."""
        try:
            if self.has_receivers:
                call_receivers(self.send, sender, record.task_result())
            elif _tasks_logger.isEnabledFor(level):
                self._log(sender=sender, task_result=record)
        except BaseException:
            # A SystemExit of a receiver must not end a worker, nor keep a task from its end.
            logger.exception("A receiver failed for task id=%s.", record.id)

    def send(self, sender: type, task_result: AnyResult) -> None:
        """
        Call all receivers. An Exception is logged and has no effect; SystemExit and the like pass.
        """
        try:
            self._signal.send_robust(sender=sender, task_result=task_result)
        except Exception:
            # Exceptions of receivers are logged by send_robust(). But it raises if it should call
            # async receivers in the thread of a running event loop.
            logger.exception("Not all receivers were called for task id=%s.", task_result.id)

    def log(self, sender: type, record: TaskRecord, level: int) -> None:
        """Have Django's receiver write its log record. `level` is the one that it uses."""
        if _tasks_logger.isEnabledFor(level):
            try:
                self._log(sender=sender, task_result=record)
            except Exception:
                logger.exception("Task id=%s: its log record was not written.", record.id)


enqueued = TaskSignal(
    django_signals.task_enqueued, django_signals.log_task_enqueued, foreign.ENQUEUED_UID
)
started = TaskSignal(
    django_signals.task_started, django_signals.log_task_started, foreign.STARTED_UID
)
finished = TaskSignal(
    django_signals.task_finished, django_signals.log_task_finished, foreign.FINISHED_UID
)


def send_finished(
    sender: type,
    record: TaskRecord,
    outcome: Outcome,
    call_receivers: Callable[..., object],
) -> None:
    """Deliver task_finished, where sys.exc_info() returns the exception of the task."""
    # No frame keeps the exception, because its traceback will refer to the frames of this call.
    exception, outcome.exception = outcome.exception, None
    if exception is None:
        finished.deliver(sender, record, logging.INFO, call_receivers)
        return
    try:
        raise exception
    except BaseException:  # noqa: BLE001 - it was raised one line above
        # Django's log receiver reads sys.exc_info().
        finished.deliver(sender, record, logging.ERROR, call_receivers)
    finally:
        del exception
