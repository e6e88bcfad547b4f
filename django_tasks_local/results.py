"""The bounded store of task results: the only place that changes a status."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import fields
from operator import attrgetter
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

# The setters of TaskResult's slots: it is frozen, and this is the fastest way to its fields.
_FIELDS = tuple(field.name for field in fields(TaskResult))
_get_fields = attrgetter(*_FIELDS)
_SETTERS = tuple(vars(TaskResult)[name].__set__ for name in _FIELDS)
_MUTABLE_FIELDS = ("args", "kwargs", "errors", "worker_ids")
_get_mutable_fields = attrgetter(*_MUTABLE_FIELDS)
_MUTABLE_SETTERS = tuple(vars(TaskResult)[name].__set__ for name in _MUTABLE_FIELDS)


def snapshot(task_result: AnyResult) -> AnyResult:
    """
    Return a copy that later changes do not reach.

    Not dataclasses.replace(): that would normalize the arguments once more, for every copy.
    """
    new: AnyResult = object.__new__(TaskResult)
    for set_field, value in zip(_SETTERS, _get_fields(task_result), strict=True):
        set_field(new, value)
    for set_field, value in zip(_MUTABLE_SETTERS, _get_mutable_fields(task_result), strict=True):
        set_field(new, value.copy())
    return new


def _update(task_result: AnyResult, **values: Any) -> None:
    # TaskResult is frozen; Django's own backends set its fields in this way.
    for name, value in values.items():
        object.__setattr__(task_result, name, value)


class _Entry:
    """A result of the store, and the lock that guards its fields."""

    __slots__ = ("lock", "task_result")

    def __init__(self, task_result: AnyResult) -> None:
        self.task_result = task_result
        self.lock = threading.Lock()


class ResultStore:
    """
    The results of one pool, in memory. Methods may be called from any thread.

    A status moves from READY to RUNNING to SUCCESSFUL or FAILED, or from READY to FAILED; a
    move that is not legal does not happen, and the method that would make it returns None.
    """

    def __init__(self, *, alias: str, max_results: int, max_unfinished: int | None) -> None:
        self._alias = alias
        self._max_results = max_results
        self._max_unfinished = max_unfinished
        # There is no lock for the whole store: a thread that loses the GIL while it holds a lock
        # which every task needs makes all others queue behind it, again and again. What follows
        # is changed in single steps, which are atomic.
        self._entries: dict[str, _Entry] = {}
        self._unfinished: set[str] = set()
        self._finished_ids: deque[str] = deque()
        # Held by the thread that evicts; nobody waits for it.
        self._evicting = threading.Lock()

    def add(self, task_result: AnyResult) -> None:
        """
        Store a copy of a new result. Raises QueueFull.

        For one caller at a time: two could both find the last free place.
        """
        unfinished = len(self._unfinished)
        if self._max_unfinished is not None and unfinished >= self._max_unfinished:
            raise QueueFull(
                f"The queue of the task backend {self._alias!r} is full: {unfinished} tasks run "
                f"or wait. Task {task_result.task.module_path} was not enqueued; try again later, "
                f"or raise MAX_PENDING or MAX_WORKERS in its OPTIONS."
            )
        self._unfinished.add(task_result.id)
        self._entries[task_result.id] = _Entry(snapshot(task_result))

    def start(
        self, result_id: str, worker_id: str, started_at: datetime | None = None
    ) -> AnyResult | None:
        """READY -> RUNNING, now or `started_at`."""
        entry = self._entries.get(result_id)
        if entry is None:
            return None  # It was cancelled while it waited, and has been evicted since.
        with entry.lock:
            task_result = entry.task_result
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
        return self._finish(result_id, (READY, RUNNING), return_value, error)

    def fail_waiting(self, result_id: str, error: TaskError) -> AnyResult | None:
        """READY -> FAILED."""
        return self._finish(result_id, (READY,), None, error)

    def settle(self, result_id: str) -> list[str]:
        """Let a finished result, now published, be evicted in its turn; return who was."""
        self._finished_ids.append(result_id)
        evicted: list[str] = []
        # Whoever comes while another thread evicts leaves it to that one, which looks again.
        while len(self._finished_ids) > self._max_results and self._evicting.acquire(False):
            try:
                while len(self._finished_ids) > self._max_results:
                    evicted.append(self._finished_ids.popleft())
                    del self._entries[evicted[-1]]
            finally:
                self._evicting.release()
        return evicted

    def ids(self) -> list[str]:
        """Return the ids of all results."""
        return list(self._entries)

    def get(self, result_id: str) -> AnyResult:
        """Return a copy of a result. Raises TaskResultDoesNotExist."""
        entry = self._entries.get(result_id)
        if entry is None:
            raise TaskResultDoesNotExist(
                f"The task backend {self._alias!r} has no result {result_id!r}: it was never "
                f"here, was lost in a restart, or made room for later ones "
                f"(MAX_RESULTS = {self._max_results})."
            )
        with entry.lock:
            return snapshot(entry.task_result)

    def _finish(
        self,
        result_id: str,
        legal: tuple[TaskResultStatus, ...],
        return_value: Any,
        error: TaskError | None,
    ) -> AnyResult | None:
        entry = self._entries.get(result_id)
        if entry is None:
            return None  # It has finished long ago.
        with entry.lock:
            task_result = entry.task_result
            if task_result.status not in legal:
                return None
            self._unfinished.discard(result_id)
            _update(task_result, finished_at=timezone.now())
            if error is None:
                _update(task_result, status=SUCCESSFUL, _return_value=return_value)
            else:
                task_result.errors.append(error)
                _update(task_result, status=FAILED)
            return snapshot(task_result)
