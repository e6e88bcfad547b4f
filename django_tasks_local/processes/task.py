"""Record a task of a ProcessPool, with its message to a worker and the claim on it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from ..record import TaskRecord

if TYPE_CHECKING:
    from contextvars import Context
    from datetime import datetime

    from ..aliases import AnyTask
    from ..context import Carried


class ProcessTask(TaskRecord):
    """
    Records a task that runs in a worker process.

    Invariant: a thread claims the task before it sends the task to a worker or fails it as not
    started. So exactly one thread decides between "cancelled while waiting" and "sent to a worker".
    """

    __slots__ = ("_claim", "body", "context", "has_started", "is_cancelled", "sends", "ticket")

    def __init__(
        self,
        task: AnyTask,
        id: str,
        args: list[Any],
        kwargs: dict[str, Any],
        backend: str,
        enqueued_at: datetime,
        interval: float,
        body: bytes,
        carried: Carried | None = None,
    ) -> None:
        super().__init__(task, id, args, kwargs, backend, enqueued_at, interval, carried)
        self.body = body  # the encoded RunTask; empty once a worker has started the task
        # The context in which the notifier has called the receivers of task_started, if it has.
        self.context: Context | None = None
        self.sends = 0  # sends to workers, without those revoked before the worker began
        self.ticket = 0  # the number of its ticket; 0 if it was not sent ahead
        self.has_started = False  # True once the worker's message Started has arrived.
        # True after cancel() of a task that a thread had claimed to send it to a worker.
        self.is_cancelled = False
        # No thread ever waits for this lock, so a finalizer cannot deadlock on it.
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Claim the task; return False if another thread has it. Called from: any thread."""
        return self._claim.acquire(blocking=False)

    def unclaim(self) -> None:
        """Give up the claim, so that another thread can send or fail the task."""
        self._claim.release()
