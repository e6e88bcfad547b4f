"""Completion sends task_finished for the tasks of a pool, and then lets the pool forget them."""

from __future__ import annotations

from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING

from ..exceptions import TaskLost
from ..hub import hub
from ..logs import get_logger
from . import signals

if TYPE_CHECKING:
    from ..execution import Outcome
    from ..notifier import Notifier
    from ..record import TaskRecord
    from .store import ResultStore
    from .unfinished import UnfinishedTasks

logger = get_logger(__name__)


class Completion[RecordT: TaskRecord]:
    """Handles the tasks that have an outcome. Methods may be called from any thread."""

    def __init__(
        self,
        sender: type,
        results: ResultStore,
        unfinished: UnfinishedTasks[RecordT],
        notifier: Notifier,
    ) -> None:
        self._sender = sender
        self.results = results  # where finished tasks become evictable
        self._unfinished = unfinished
        self._notifier = notifier
        self.discarded = False  # True if the hub must not keep the tasks of the pool.

    def complete(self, record: RecordT, outcome: Outcome) -> None:
        """Call the receivers of task_finished in the calling thread."""
        try:
            self._send(record, signals.state_of_finished(record, outcome), outcome)
        finally:
            # Also after an exception, such as one that another thread has raised in this thread:
            # close() and wait_until_idle() would wait for this task.
            self._make_evictable(record)
            self._forget(record)

    def post(self, record: RecordT, outcome: Outcome, context: Context | None = None) -> None:
        """
        Have the notifier call the receivers of task_finished.

        `context` is the one in which the notifier calls those of task_started, if it does.
        """
        # The store evicts the tasks in the order of their ends. The threads of the notifier have no
        # common order, so do not wait for the receivers.
        self._make_evictable(record)
        state = signals.state_of_finished(record, outcome)
        if state is None and context is None:
            outcome.drop_exception()
            self._forget(record)
            return
        self._notifier.post(
            record.id,
            Context() if context is None else context,  # A context without variables is falsy.
            self._deliver,
            record,
            state,
            outcome,
            on_drop=partial(self._forget, record),
        )

    def _deliver(self, record: RecordT, state: signals.State | None, outcome: Outcome) -> None:
        try:
            self._send(record, state, outcome)
        finally:
            self._forget(record)

    def _send(self, record: RecordT, state: signals.State | None, outcome: Outcome) -> None:
        carried = record.carried
        if carried is not None and (difference := carried.difference()):
            # A receiver would write into a database of which the test run knows nothing.
            _log_outlived(record, outcome, difference)
        else:
            signals.send_finished(self._sender, state, carried, outcome)

    def _make_evictable(self, record: RecordT) -> None:
        for evicted in self.results.make_evictable(record):
            hub.release(evicted)

    def _forget(self, record: RecordT) -> None:
        """Forget a task whose receivers have returned or were dropped."""
        self._unfinished.remove(record)
        if self.discarded:
            hub.release(record)


def _log_outlived(record: TaskRecord, outcome: Outcome, difference: str) -> None:
    if not isinstance(outcome.exception, TaskLost):  # The pool names a lost task.
        logger.warning(
            "No receiver was called for the end of task id=%s path=%s state=%s. %s",
            record.id,
            record.path,
            record.status,
            difference,
        )
    outcome.drop_exception()
