"""The bounded store of task results: the only place that changes a status."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from django.tasks import TaskResult, TaskResultStatus
from django.tasks.exceptions import TaskResultDoesNotExist
from django.utils import timezone

from .exceptions import QueueFull

if TYPE_CHECKING:
    from datetime import datetime

    from django.tasks.base import TaskError

    type AnyResult = TaskResult[Any, Any]

READY = TaskResultStatus.READY
RUNNING = TaskResultStatus.RUNNING
FAILED = TaskResultStatus.FAILED
SUCCESSFUL = TaskResultStatus.SUCCESSFUL
_FINISHED = (SUCCESSFUL, FAILED)  # not a set: an enum's hash is slow

# The descriptors of TaskResult's slots, which are the fastest way to its fields.
_SLOTS = [
    (slot.__get__, slot.__set__)
    for slot in (vars(TaskResult)[field.name] for field in fields(TaskResult))
]
_MUTABLE_SLOTS = [
    (slot.__get__, slot.__set__)
    for slot in map(vars(TaskResult).__getitem__, ("args", "kwargs", "errors", "worker_ids"))
]


def snapshot(task_result: AnyResult) -> AnyResult:
    """
    Return a copy that later changes do not reach.

    Not dataclasses.replace(): that would normalize the arguments once more, for every copy.
    """
    new: AnyResult = object.__new__(TaskResult)
    for get_field, set_field in _SLOTS:
        set_field(new, get_field(task_result))
    for get_field, set_field in _MUTABLE_SLOTS:
        set_field(new, get_field(task_result).copy())
    return new


def _update(task_result: AnyResult, **values: Any) -> None:
    # TaskResult is frozen; Django's own backends set its fields in this way.
    for name, value in values.items():
        object.__setattr__(task_result, name, value)


class ResultStore:
    """
    The results of one pool, in memory. All methods may be called from any thread.

    A status moves from READY to RUNNING to SUCCESSFUL or FAILED, or from READY to FAILED; a
    move that is not legal does not happen, and the method that would make it returns None.
    """

    def __init__(self, *, alias: str, max_results: int, max_unfinished: int | None) -> None:
        self._alias = alias
        self._max_results = max_results
        self._max_unfinished = max_unfinished
        # Guards what follows, and the fields of the results in it.
        self._lock = threading.Lock()
        self._results: dict[str, AnyResult] = {}
        self._unfinished = 0
        self._finished_ids: deque[str] = deque()

    def add(self, task_result: AnyResult) -> None:
        """Store a copy of a new result. Raises QueueFull."""
        with self._lock:
            if self._max_unfinished is not None and self._unfinished >= self._max_unfinished:
                raise QueueFull(
                    f"The queue of the task backend {self._alias!r} is full: {self._unfinished} "
                    f"tasks run or wait. Task {task_result.task.module_path} was not enqueued; "
                    f"try again later, or raise MAX_PENDING or MAX_WORKERS in its OPTIONS."
                )
            self._unfinished += 1
            self._results[task_result.id] = snapshot(task_result)

    def start(
        self, result_id: str, worker_id: str, started_at: datetime | None = None
    ) -> AnyResult | None:
        """READY -> RUNNING, now or `started_at`."""
        with self._lock:
            task_result = self._results[result_id]
            if task_result.status != READY:
                return None
            at = started_at or timezone.now()
            _update(task_result, status=RUNNING, started_at=at, last_attempted_at=at)
            task_result.worker_ids.append(worker_id)
            return snapshot(task_result)

    def finish(
        self, result_id: str, return_value: Any, error: TaskError | None
    ) -> AnyResult | None:
        """READY or RUNNING -> SUCCESSFUL, or FAILED when there is an error."""
        with self._lock:
            if self._results[result_id].status in _FINISHED:
                return None
            return self._finish_locked(result_id, return_value, error)

    def fail_waiting(self, result_id: str, error: TaskError) -> AnyResult | None:
        """READY -> FAILED."""
        with self._lock:
            if self._results[result_id].status != READY:
                return None
            return self._finish_locked(result_id, None, error)

    def settle(self, result_id: str) -> list[str]:
        """Let a finished result, now published, be evicted in its turn; return who was."""
        with self._lock:
            self._finished_ids.append(result_id)
            excess = len(self._finished_ids) - self._max_results
            evicted = [self._finished_ids.popleft() for _ in range(excess)]
            for result_id in evicted:
                del self._results[result_id]
        return evicted

    def ids(self) -> list[str]:
        """Return the ids of all results."""
        with self._lock:
            return list(self._results)

    def get(self, result_id: str) -> AnyResult:
        """Return a copy of a result. Raises TaskResultDoesNotExist."""
        with self._lock:
            try:
                return snapshot(self._results[result_id])
            except KeyError:
                raise TaskResultDoesNotExist(
                    f"The task backend {self._alias!r} has no result {result_id!r}: it was never "
                    f"here, was lost in a restart, or made room for later ones "
                    f"(MAX_RESULTS = {self._max_results})."
                ) from None

    def _finish_locked(
        self, result_id: str, return_value: Any, error: TaskError | None
    ) -> AnyResult:
        task_result = self._results[result_id]
        self._unfinished -= 1
        _update(task_result, finished_at=timezone.now())
        if error is None:
            _update(task_result, status=SUCCESSFUL, _return_value=return_value)
        else:
            task_result.errors.append(error)
            _update(task_result, status=FAILED)
        return snapshot(task_result)
