"""
The checks of stress/storm.py. Each check receives recorded data and only returns the violations.

A task's history consists of its accepted events, the number of its runs, its cancellation, its
result in the backend and its snapshot in the hub. A reader's history is what one subscription
returned.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from django_tasks_local.events import EventKind, TaskEvent
from stress.invariants import Version, wrong_events
from stress.storm_tasks import TASK_CANCELLED, Expected


@dataclass
class History:
    """All data that stress/storm.py has recorded about one task at the end of a run."""

    expected: Expected
    events: list[TaskEvent]  # The task's events, in the order in which the hub accepted them.
    runs: int = 0  # How often a worker called the task function.
    cancelled: bool = False  # Whether stress/storm.py called cancel() for the task.
    # The return value of get_result() at the end of the run; None if it raised
    # TaskResultDoesNotExist.
    result: Any = None
    # The return value of hub.snapshot() at the end of the run.
    snapshot: TaskEvent | None = None
    # Whether the backend may have evicted the result, because more than MAX_RESULTS tasks finished.
    may_be_evicted: bool = False


def wrong_history(history: History) -> Iterator[str]:
    """Yield a text for each invariant that the recorded data of one task violates."""
    events = history.events
    if not events:
        yield "it was enqueued and has no event"
        return
    yield from wrong_events(events)
    versions = [event.version for event in events]
    if versions != sorted(versions):
        yield f"the hub accepted events out of order: {versions}"
    if history.runs > 1:
        yield f"its function ran {history.runs} times"
    last = events[-1]
    if not last.is_last:
        return  # wrong_events() has reported that the task never finished.
    if last.started_at is None and history.runs:
        yield "its function ran, but it was never started"
    if last.error is None and not history.runs:
        yield "it was successful, but its function never ran"
    yield from _wrong_outcome(history, last)
    yield from _wrong_end_state(history, last)


def _wrong_outcome(history: History, last: TaskEvent) -> Iterator[str]:
    error = None if last.error is None else last.error.type
    if error == TASK_CANCELLED and history.cancelled:
        return
    expected = history.expected
    if error != expected.error:
        yield f"it ended with {error or 'success'}, expected: {expected.error or 'success'}"
    elif error is None and expected.values and last.return_value not in expected.values:
        yield f"it returned {last.return_value!r}, expected: one of {expected.values!r}"


def _wrong_end_state(history: History, last: TaskEvent) -> Iterator[str]:
    result, snapshot = history.result, history.snapshot
    if result is None or snapshot is None:
        if (result is None) != (snapshot is None):
            missing, other = ("backend", "hub") if result is None else ("hub", "backend")
            yield f"the {missing} has forgotten it, but the {other} has not"
        if not history.may_be_evicted:
            yield "it was evicted, although the backend keeps more results"
        return
    if snapshot.version != last.version:
        yield f"the version of its snapshot is {snapshot.version}, of its last event {last.version}"
    yield from disagreements(result, snapshot)


def disagreements(result: Any, event: TaskEvent) -> Iterator[str]:
    """Yield a text for each difference between a final result and the task's last event."""
    if not result.is_finished:
        yield f"the backend reports {result.status} after the event {event.kind}"
        return
    error = result.errors[-1].exception_class_path if result.errors else None
    value = result.return_value if error is None else None
    event_error = None if event.error is None else event.error.type
    for name, of_result, of_event in (
        ("status", result.status, event.status),
        ("enqueued_at", result.enqueued_at, event.enqueued_at),
        ("started_at", result.started_at, event.started_at),
        ("finished_at", result.finished_at, event.finished_at),
        ("error", error, event_error),
        ("return value", value, event.return_value),
    ):
        if of_result != of_event:
            yield f"the {name} of its result is {of_result!r}, that of its event {of_event!r}"
    attempts = int(result.started_at is not None)
    if (result.attempts, len(result.worker_ids)) != (attempts, attempts):
        yield f"{result.attempts} attempts by {result.worker_ids}, expected: {attempts}"


@dataclass
class ReaderHistory:
    """Records which events one subscription returned: only their versions, to save memory."""

    name: str
    # The ids of the tasks to which the subscription belongs; empty for all tasks.
    wanted: frozenset[str] = frozenset()
    # By task id, the version of the last event that the subscription returned.
    versions: dict[str, Version] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    violations: list[tuple[str, str]] = field(default_factory=list)  # Pairs of task id and text.

    def read(self, events: Iterable[TaskEvent]) -> None:
        """Check and record the events that one call of take() returned."""
        for event in events:
            known = self.versions.get(event.id)
            if known is not None and event.version <= known:
                self._violate(event.id, f"received {event.version} after {known}")
            if event.id in self.finished:
                self._violate(event.id, f"received {event.kind} after finished")
            if self.wanted and event.id not in self.wanted:
                self._violate(event.id, "received an event of a task that it did not ask for")
            self.versions[event.id] = event.version
            if event.kind is EventKind.FINISHED:
                self.finished.add(event.id)

    def must_have_seen_the_end(self, of_ids: Iterable[str], *, missed: int = 0) -> None:
        """
        Check that the subscription returned `finished` for each of these tasks, except `missed`.

        `missed` is Subscription.missed: the number of tasks whose last event it has dropped.
        """
        without_end = [task_id for task_id in of_ids if task_id not in self.finished]
        if len(without_end) > missed:
            for task_id in without_end:
                self._violate(task_id, f"never received finished ({missed} admitted as missed)")

    def _violate(self, task_id: str, text: str) -> None:
        self.violations.append((task_id, f"reader {self.name} {text}"))
