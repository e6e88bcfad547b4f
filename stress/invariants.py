"""
Check the invariants of every task: the checker of stress/chaos.py, and parts for stress/storm.py.

One thread passes the entries of a log to the checker, which reads no clock. The log may contain the
entries of different threads in another order than that in which their causes happened. So the
checker judges a task two rounds after its end, when it has received all entries about the task.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from django_tasks_local.events import EventKind, TaskEvent

ROUNDS = 2  # The checker judges a task this number of rounds after its end.
# The number of rounds for which the checker keeps the id of a judged task. Every reader that has
# received events of the task leaves earlier.
REMEMBERED = 10
ORDER = (EventKind.ENQUEUED, EventKind.STARTED, EventKind.PROGRESS, EventKind.FINISHED)
STATUSES = {
    EventKind.ENQUEUED: {"READY"},
    EventKind.STARTED: {"RUNNING"},
    EventKind.PROGRESS: {"RUNNING"},
    EventKind.FINISHED: {"SUCCESSFUL", "FAILED"},
}
LATEST = (math.inf, math.inf)

# A key that orders the events of a task; see TaskEvent.version.
type Version = tuple[float, ...]


def version(sequence: int, position: int | None) -> Version:
    """Return the version of an event that was received as JSON."""
    return sequence, -math.inf if position is None else -position


@dataclass(frozen=True)
class Violation:
    """Describes an invariant that a task violates, with the task's events."""

    task_id: str
    what: str
    events: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join((f"task {self.task_id}: {self.what}", *self.events))


@dataclass
class Record:
    """Collects all entries of the log about one task."""

    events: list[TaskEvent] = field(default_factory=list)
    signals: Counter[str] = field(default_factory=Counter)
    result: Any = None  # The TaskResult that task_finished passed to its receivers.
    stored: Any = None  # The TaskResult in the store while task_finished was sent.
    cancelled: bool = False  # Whether cancel() has returned True.
    missed: bool = False  # Whether the store did not know the task before its end.
    # Whether the pools were discarded before the task finished, so that the task may be lost.
    may_be_missing: bool = False
    finished_in: int | None = None  # The round in which the last event was logged.


class Checker:
    """Receives the entries of the log and collects violations."""

    def __init__(self, expected: dict[str, set[str]], timeout: float) -> None:
        # By the task's name, its outcomes without cancellations, kills and discarded pools, as
        # outcome() returns them.
        self._expected = expected
        self._timeout = timeout  # Seconds; the option TIMEOUT of the process backend.
        self.violations: list[Violation] = []
        self.outcomes: Counter[str] = Counter()
        self.records: dict[str, Record] = {}
        self._judged: dict[str, int] = {}  # By task id, the round in which the task was judged.
        self._round = 0
        self._killed: set[int] = set()
        # By reader and task, the version of the last event that the reader received; LATEST stands
        # for `finished`.
        self._readers: dict[str, dict[str, Version]] = {}

    def violate(self, task_id: str, what: str) -> None:
        """Record a violation together with the events of the task so far."""
        record = self.records.get(task_id, Record())
        events = sorted(record.events, key=attrgetter("version"))
        self.violations.append(Violation(task_id, what, tuple(map(show, events))))

    # Methods that receive the entries of the log, one for each kind of entry.

    def published(self, event: TaskEvent) -> None:
        """Receive an event that the hub has accepted."""
        record = self.records.get(event.id)
        if record is None:
            record = self.records[event.id] = Record()
            if event.kind is not EventKind.ENQUEUED:
                record.events.append(event)
                what = f"{event.kind} of a task that ended long ago or was never enqueued"
                self.violate(event.id, what)
                del self.records[event.id]
                return
        record.events.append(event)
        if event.is_last:
            record.finished_in = self._round

    def signalled(self, signal: str, task_id: str, result: Any = None, stored: Any = None) -> None:
        """Receive that Django sent a signal; task_finished adds its result and the stored one."""
        record = self.records.get(task_id)
        if record is None:
            self.violate(task_id, f"the signal {signal} came long after the end")
            return
        record.signals[signal] += 1
        if result is not None:
            record.result, record.stored = result, stored

    def answered(self, task_id: str, cancelled: bool, finished: bool) -> None:
        """Receive what cancel() returned, and whether the stored result was final after that."""
        if not cancelled and not finished:
            self.violate(task_id, "cancel() was False, but the task had not finished")
        record = self.records.get(task_id)
        if record is not None:
            record.cancelled |= cancelled
        elif cancelled:
            self.violate(task_id, "cancel() was True long after the end")

    def missing(self, task_id: str) -> None:
        """Receive the id of an enqueued task that the store did not know."""
        record = self.records.get(task_id)
        if record is not None and record.finished_in is None:
            record.missed = True

    def killed(self, pid: int) -> None:
        """Receive the id of a worker process that stress/chaos.py is about to kill."""
        self._killed.add(pid)

    def closing(self) -> None:
        """
        Receive that stress/chaos.py discards the pools, so that unfinished tasks may be lost.

        The log has this entry before and after the call that discards the pools, because other
        threads enqueue tasks during the call.
        """
        for record in self.records.values():
            record.may_be_missing = True

    def read(self, reader: str, task_id: str, seen: Version, is_last: bool) -> None:
        """Receive the version of an event that a reader got."""
        known = self._readers.setdefault(reader, {})
        if seen <= known.get(task_id, (0, 0)):
            self.violate(task_id, f"reader {reader} got {seen} after {known[task_id]}")
        known[task_id] = LATEST if is_last else seen

    def left(self, reader: str, complete: bool) -> None:
        """Receive that a reader closed its subscription, `complete` if it first read all events."""
        for task_id, seen in self._readers.pop(reader, {}).items():
            record = self.records.get(task_id)
            # Without a record the task was judged, or the log has not yet passed its first entry.
            long_ended = task_id in self._judged if record is None else self._is_due(record)
            if complete and seen != LATEST and long_ended:
                self.violate(task_id, f"reader {reader} got {seen}, and never the last event")

    # Methods that judge tasks.

    def end_round(self) -> None:
        """Judge the tasks that finished at least ROUNDS rounds ago."""
        self._round += 1
        for task_id, judged_in in list(self._judged.items()):
            if self._round - judged_in <= REMEMBERED:
                break  # The dict is in the order of the rounds, so the rest is newer.
            del self._judged[task_id]
        for task_id in [key for key, record in self.records.items() if self._is_due(record)]:
            self._judge(task_id)

    def end(self) -> None:
        """Judge all remaining tasks. Each must have finished, because the run is over."""
        for task_id in list(self.records):
            self._judge(task_id)

    def _is_due(self, record: Record) -> bool:
        return record.finished_in is not None and self._round - record.finished_in >= ROUNDS

    def _judge(self, task_id: str) -> None:
        record = self.records[task_id]
        if record.missed and not record.may_be_missing:
            self.violate(task_id, "the store has lost a task that was not finished")
        for what in (*wrong_events(record.events), *self._wrong_end(record)):
            self.violate(task_id, what)
        del self.records[task_id]
        self._judged[task_id] = self._round

    def _wrong_end(self, record: Record) -> Iterable[str]:
        last = record.events[-1] if record.finished_in is None else _last(record.events)
        if record.result is None or not last.is_last:
            if last.is_last:
                yield "no task_finished was sent"
            return
        end = outcome(last)
        self.outcomes[end] += 1
        yield from _disagreements(record, last, is_lost=end == "lost")
        if end not in self._expected[last.name] and not self._may_be(end, record):
            yield f"the task {last.name} has the outcome {end}, which the log does not explain"

    def _may_be(self, end: str, record: Record) -> bool:
        """Return whether a cancellation, kill, discarded pool or timeout explains the outcome."""
        result = record.result
        match end:
            case "cancelled":
                return record.cancelled
            case "lost":
                return record.may_be_missing
            case "died":
                # A result has no worker ids if several workers died before the task began.
                pids = [int(worker_id.rpartition("@")[2]) for worker_id in result.worker_ids]
                return bool(self._killed) and self._killed.issuperset(pids)
            case "timeout":
                return (result.finished_at - result.started_at).total_seconds() >= self._timeout
        return False


def outcome(event: TaskEvent) -> str:
    """Return the outcome of a task from its last event: "successful" or the failure's reason."""
    return "successful" if event.error is None else str(event.error.reason)


def wrong_events(events: list[TaskEvent]) -> Iterable[str]:
    """Yield a text for each fault in the kinds, statuses and versions of a task's events."""
    events = sorted(events, key=attrgetter("version"))
    kinds = [event.kind for event in events]
    versions = [event.version for event in events]
    if len(set(versions)) < len(versions):
        yield "two events have the same version"
    if [ORDER.index(kind) for kind in kinds] != sorted(ORDER.index(kind) for kind in kinds):
        yield "the kinds of its events are not in order"
    if kinds[0] is not EventKind.ENQUEUED or events[0].sequence != 1:
        yield "it was not enqueued first"
    if any(event.sequence != 2 for event in events if event.kind is EventKind.STARTED):
        yield "the sequence of started is not 2"
    if kinds.count(EventKind.STARTED) > 1:
        yield "it was started twice"
    if kinds.count(EventKind.FINISHED) != 1:
        yield f"it was finished {kinds.count(EventKind.FINISHED)} times"
    if any(event.status not in STATUSES[event.kind] for event in events):
        yield "a status does not fit its kind"


def _disagreements(record: Record, last: TaskEvent, *, is_lost: bool) -> Iterable[str]:
    """Yield a text for each difference between a task's events, signals and two results."""
    result, stored = record.result, record.stored
    was_started = result.started_at is not None
    wanted = {"enqueued": 1, "started": int(was_started), "finished": 1}
    if record.signals != Counter(wanted):
        yield f"the signals sent were {dict(record.signals)}"
    # A task that is lost while it starts may have started_at and still no event `started`.
    started = any(event.kind is EventKind.STARTED for event in record.events)
    if started != was_started and not is_lost:
        yield f"started_at is {result.started_at}, but started was published: {started}"
    if stored is None:
        yield "the store did not know it when task_finished was sent"
    elif (stored.status, stored.errors) != (result.status, result.errors):
        yield f"its status in the store is {stored.status}, in task_finished {result.status}"
    if last.status != result.status:
        yield f"its status in the hub is {last.status}, in task_finished {result.status}"
    if last.error is not None and last.error.type != result.errors[-1].exception_class_path:
        yield f"its error in the hub is {last.error.type}, in the result another one"
    if last.error is None and last.return_value != result.return_value:
        yield f"it returned {last.return_value!r} in the hub, {result.return_value!r} in the result"


def _last(events: list[TaskEvent]) -> TaskEvent:
    return next(event for event in events if event.is_last)


def show(event: TaskEvent) -> str:
    """Return one line that describes an event."""
    position = "" if event.position is None else f" ({event.position} before it)"
    error = "" if event.error is None else f" {event.error.reason}: {event.error.message}"
    return f"{event.sequence} {event.kind} {event.status} {event.name}{position}{error}"
