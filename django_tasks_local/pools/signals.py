"""
This module sends Django's task signals, and saves their cost if only Django's log receivers listen.

Signal.send_robust() takes a lock that all senders share, and it needs a TaskResult, of which
Django's log receivers read three fields. A TaskRecord has these fields, so this module calls the
log receivers with the record directly. If the logger "django.tasks" has the level WARNING, no log
record is created, which saves another 12 µs per task.

This module reads two private parts of Django, and tests fail if a Django version changes them: the
entries of `Signal.receivers` (if their shape is unknown, send_robust() is used for every task), and
`django.tasks.signals.log_task_*` (documentation of django.tasks, "Logging").
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from django.dispatch import Signal
from django.tasks import TaskResult
from django.tasks import signals as django_signals

from .. import foreign
from ..exceptions import TaskCancelled, TaskLost
from ..logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.tasks import TaskResultStatus

    from ..aliases import AnyResult, AnyTask
    from ..context import Carried
    from ..execution import Outcome
    from ..record import TaskRecord

logger = get_logger(__name__)


class LoggedState(NamedTuple):
    """Has the fields of a TaskResult that Django's log receivers read, at one point in time."""

    id: str
    task: AnyTask
    status: TaskResultStatus
    backend: str


type State = AnyResult | TaskRecord | LoggedState

# Django's log receivers write to this logger.
_tasks_logger = logging.getLogger("django.tasks")
_safe_tasks_logger = get_logger("django.tasks")
# Signal.connect() stores this id as the sender of a receiver that is connected for all senders.
_ANY_SENDER = id(None)
# TaskError.exception_class_path of a task that was cancelled or lost, which is no error of the
# task: the log record has the level INFO and no traceback, so ADMINS get no mail.
_NO_ERRORS = {f"{kind.__module__}.{kind.__qualname__}" for kind in (TaskCancelled, TaskLost)}


class TaskSignal:
    """Sends one of Django's task signals for the tasks of this package."""

    __slots__ = ("_django_key", "_known", "_log", "_our_key", "_signal")

    def __init__(self, signal: Signal, log: Callable[..., object], our_dispatch_uid: str) -> None:
        self._signal = signal
        self._log = log
        self._django_key = (id(log), _ANY_SENDER)
        # The module `foreign` connects this receiver to make events for tasks of other backends.
        self._our_key = (our_dispatch_uid, _ANY_SENDER)
        # The first two entries of `Signal.receivers` at the last call of has_receivers, if they
        # belong to `_django_key` and `_our_key`. While the Signal still has these two objects,
        # has_receivers does not compare their keys again.
        self._known: tuple[Any, Any] = (None, None)

    @property
    def has_receivers(self) -> bool:
        """Return whether any receiver besides Django's log receiver and `foreign` is connected."""
        try:
            first, second = self._signal.receivers
        except (TypeError, ValueError):
            return True  # The signal does not have exactly two receivers.
        known = self._known
        if first is known[0] and second is known[1]:
            return False
        try:
            keys = [first[0], second[0]]
        except (IndexError, TypeError):
            return True  # An unknown Django version stores the receivers in another shape.
        if keys not in ([self._django_key, self._our_key], [self._our_key, self._django_key]):
            return True
        self._known = first, second
        return False

    def state_for_receivers(self, record: TaskRecord, level: int) -> State | None:
        """
        Return what deliver() needs: None if there is nothing to call.

        This is a TaskResult of the present state, or the record itself if only Django's log
        receiver is to be called, which writes a log record with this level.
        """
        if self.has_receivers:
            return record.task_result()
        return record if _tasks_logger.isEnabledFor(level) else None

    def deliver(self, sender: type, state: State | None, carried: Carried | None) -> None:
        """
        Call all receivers with a TaskResult, or only Django's log receiver with another object.

        The receivers can connect only to the databases that the task has `carried`.

        Logs every exception and raises none.
        """
        if state is None:
            return
        try:
            if isinstance(state, TaskResult):
                databases = None if carried is None else carried.databases
                send = self.send if databases is None else databases.guard(self.send)
                send(sender, state)
            else:
                self._log(sender=sender, task_result=state)
        except BaseException:
            # BaseException, because a receiver that raises SystemExit must neither end a worker
            # thread nor prevent the outcome of a task from being recorded.
            logger.exception("A receiver failed for task id=%s.", state.id)

    def send(self, sender: type, task_result: AnyResult) -> None:
        """
        Call all receivers and log each Exception that they raise.

        A BaseException such as SystemExit is raised to the caller.
        """
        try:
            self._signal.send_robust(sender=sender, task_result=task_result)
        except Exception:
            # send_robust() logs the exceptions of receivers. It raises one itself if it has to call
            # async receivers in the thread of a running event loop.
            logger.exception("Not all receivers were called for task id=%s.", task_result.id)

    def without_log(self) -> TaskSignal | None:
        """Return a copy without Django's log receiver; None if that receiver cannot be found."""
        try:
            receivers = [one for one in self._signal.receivers if one[0] != self._django_key]
        except (IndexError, TypeError):
            return None
        if len(receivers) != len(self._signal.receivers) - 1:
            return None
        signal = Signal()
        signal.receivers = receivers
        return TaskSignal(signal, lambda **kwargs: None, self._our_key[0])

    def log(self, sender: type, record: TaskRecord, level: int) -> None:
        """
        Call only Django's log receiver, unless its logger is disabled for `level`.

        `level` is the log level that this receiver uses.
        """
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


def state_of_started(record: TaskRecord) -> State | None:
    """Return what started.deliver() needs when the task may have ended before it is called."""
    state = started.state_for_receivers(record, logging.INFO)
    if state is record:
        return LoggedState(record.id, record.task, record.status, record.backend)
    return state


def state_of_finished(record: TaskRecord, outcome: Outcome) -> State | None:
    """Return what send_finished() needs."""
    level = logging.INFO if outcome.error is None else logging.ERROR
    return finished.state_for_receivers(record, level)


def send_started(sender: type, state: State | None, carried: Carried | None) -> None:
    """Deliver task_started, unless a test run has ended and its databases have been replaced."""
    if carried is None or not carried.difference():
        started.deliver(sender, state, carried)


def send_finished(
    sender: type, state: State | None, carried: Carried | None, outcome: Outcome
) -> None:
    """Deliver task_finished while sys.exc_info() returns the exception that failed the task."""
    exception = outcome.exception
    if exception is None:
        finished.deliver(sender, state, carried)
        return
    signal = finished
    if outcome.error is not None and outcome.error.exception_class_path in _NO_ERRORS:
        others = finished.without_log()
        if others is not None and state is not None:
            signal = others
            _safe_tasks_logger.info(
                "Task id=%s path=%s state=%s", state.id, state.task.module_path, state.status
            )
    try:
        raise exception
    except BaseException:  # noqa: BLE001 - the line above raised this exception
        # Django's log receiver reads the traceback of a failed task from sys.exc_info().
        signal.deliver(sender, state, carried)
    finally:
        del exception  # The traceback of the exception now refers to this frame.
        outcome.drop_exception()
