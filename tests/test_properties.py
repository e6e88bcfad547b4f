"""
What holds in any interleaving: the result store, the throttle, the hub, and a pool around them.

Each machine does generated steps with the real thing and with a tiny model, and compares them.
Under CI the steps are the same in every run; elsewhere a failure prints those that lead to it.
"""

import asyncio
import itertools
import math
import os
import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest
from django.tasks import TaskResult, TaskResultStatus
from django.tasks.base import TaskError
from django.tasks.exceptions import TaskResultDoesNotExist
from django.utils import timezone
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from django_tasks_local import ThreadPoolBackend, shutdown
from django_tasks_local import hub as hub_module
from django_tasks_local.conf import ThreadOptions
from django_tasks_local.events import NO_VERSION, EventKind, TaskEvent, Version
from django_tasks_local.exceptions import QueueFull, TaskCancelled
from django_tasks_local.execution import Outcome
from django_tasks_local.hub import Hub, Subscription, hub
from django_tasks_local.pools import Job, Pool
from django_tasks_local.positions import Positions
from django_tasks_local.progress.reporter import LoopProgress, Reporter
from django_tasks_local.progress.values import UNSET
from django_tasks_local.results import ResultStore
from tests.project import tasks
from tests.test_progress import FakeTicker, Stage

type AnyResult = TaskResult[Any, Any]

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL

EXAMPLES = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,  # The machine that tests run on may be busy.
    database=None,
    derandomize=os.environ.get("CI") == "true",
)


def new_result() -> AnyResult:
    return TaskResult(
        task=tasks.noop,
        id=uuid.uuid4().hex,
        status=READY,
        enqueued_at=timezone.now(),
        started_at=None,
        finished_at=None,
        last_attempted_at=None,
        args=[],
        kwargs={},
        backend="default",
        errors=[],
        worker_ids=[],
    )


class StoreMachine(RuleBasedStateMachine):
    """A status moves forward only; the oldest finished results go first, and no others."""

    ids = Bundle("ids")
    error = TaskError(exception_class_path="builtins.ValueError", traceback="a traceback")

    @initialize(max_results=st.integers(1, 3), max_unfinished=st.none() | st.integers(1, 3))
    def start_anew(self, max_results: int, max_unfinished: int | None) -> None:
        self.max_results, self.max_unfinished = max_results, max_unfinished
        self.store = ResultStore(
            alias="default", max_results=max_results, max_unfinished=max_unfinished
        )
        self.statuses: dict[str, TaskResultStatus] = {}
        self.unsettled: list[str] = []
        self.settled: list[str] = []

    @property
    def unfinished(self) -> int:
        return sum(status in {READY, RUNNING} for status in self.statuses.values())

    @rule(target=ids)
    def add(self) -> Any:
        result = new_result()
        if self.unfinished == self.max_unfinished:
            with pytest.raises(QueueFull):
                self.store.add(result)
            return multiple()
        self.store.add(result)
        self.statuses[result.id] = READY
        return result.id

    @rule(id=ids)
    def start(self, id: str) -> None:
        self.move(id, {READY}, RUNNING, self.store.start(id, "worker"))

    @rule(id=ids, failed=st.booleans())
    def finish(self, id: str, failed: bool) -> None:
        changed = self.store.finish(id, 7, self.error if failed else None)
        self.move(id, {READY, RUNNING}, FAILED if failed else SUCCESSFUL, changed)

    @rule(id=ids)
    def fail_waiting(self, id: str) -> None:
        self.move(id, {READY}, FAILED, self.store.fail_waiting(id, self.error))

    def move(self, id: str, legal: set[Any], to: Any, changed: AnyResult | None) -> None:
        assert (changed is not None) == (self.statuses.get(id) in legal)
        if changed is not None:
            assert (changed.id, changed.status) == (id, to)
            changed.errors.clear()
            changed.worker_ids.append("not in the store")
            self.statuses[id] = to
            if to is not RUNNING:
                self.unsettled.append(id)

    @precondition(lambda self: self.unsettled)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.unsettled))
        self.unsettled.remove(id)
        self.settled.append(id)
        evicted, self.settled = (
            self.settled[: -self.max_results],
            self.settled[-self.max_results :],
        )
        assert self.store.settle(id) == evicted
        for old in evicted:
            del self.statuses[old]

    @rule(id=ids)
    def get(self, id: str) -> None:
        if id not in self.statuses:
            with pytest.raises(TaskResultDoesNotExist):
                self.store.get(id)
            return
        result = self.store.get(id)
        assert result.status == self.statuses[id]
        assert result.is_finished == (result.finished_at is not None)
        assert (result.status == FAILED) == (len(result.errors) == 1)
        assert result.worker_ids == (["worker"] if result.started_at else [])

    @invariant()
    def the_store_has_what_the_model_has(self) -> None:
        assert set(self.store.ids()) == set(self.statuses)
        assert len(self.statuses) <= self.max_results + self.unfinished + len(self.unsettled)
        assert len(self.store._unfinished) == self.unfinished


class ThrottleMachine(RuleBasedStateMachine):
    """At most one sample in an interval, always of the newest values, and the last one arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = Stage(interval=1.0)
        self.reporter = self.stage.reporter
        self.values: dict[str, Any] = {"current": None, "total": 100, "message": "", "data": {}}
        self.reported = False
        # The open loops: of each its first message, and what is told while it is the newest.
        self.loops: list[tuple[LoopProgress, str, dict[str, Any]]] = []
        self.outermost = self.values
        self.cancelled = self.told = False
        self.closed = False
        self.times: list[float] = []

    @rule(
        changes=st.fixed_dictionaries(
            {},
            optional={
                "current": st.none() | st.integers(0, 9),
                "total": st.none() | st.integers(1, 9),
                "message": st.sampled_from(["", "a", "b"]),
                "data": st.sampled_from([{}, {"key": 1}]),
            },
        )
    )
    def report(self, changes: dict[str, Any]) -> None:
        if self.told_of_cancellation(lambda: self.reporter.report(**changes)):
            return
        if not self.closed:
            self.values |= changes
            self.reported = True
        self.note()

    @precondition(lambda self: len(self.loops) < 3)
    @rule(total=st.none() | st.integers(1, 9), message=st.sampled_from([UNSET, "tracking"]))
    def start_tracking(self, total: int | None, message: Any) -> None:
        loop = LoopProgress(0, total)
        if self.told_of_cancellation(lambda: self.reporter.start_tracking(loop, message)):
            return
        if not self.closed:
            if message is UNSET:
                message = self.values["message"]
            self.values = self.values | {"current": 0, "total": total, "message": message}
            if not self.loops:
                self.outermost = self.values
            self.loops.append((loop, message, self.values))
            self.reported = True
        self.note()

    @precondition(lambda self: self.loops and not self.closed)
    @rule(data=st.data(), count=st.integers(0, 9))
    def step(self, data: st.DataObject, count: int) -> None:
        loop, _, values = data.draw(st.sampled_from(self.loops))
        loop.current = values["current"] = count

    @precondition(lambda self: self.loops)
    @rule(data=st.data())
    def stop_tracking(self, data: st.DataObject) -> None:
        ended = data.draw(st.sampled_from(self.loops))
        loop, message, values = ended
        self.reporter.stop_tracking(loop)
        self.loops.remove(ended)
        if self.values is values:
            self.show_outer(message, self.loops[-1][2] if self.loops else self.outermost)

    def show_outer(self, message: str, outer: dict[str, Any]) -> None:
        """Keep the task's own words and its data; the rest is the outer loop's again."""
        kept = {"data": self.values["data"]}
        if self.values["message"] is not message:
            kept["message"] = self.values["message"]
        self.values = outer
        self.values |= kept

    @rule()
    def cancel(self) -> None:
        self.stage.cancellation.request()
        self.cancelled = not self.told

    @rule(seconds=st.sampled_from([0.25, 0.9375, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.stage.tick(self.stage.now + seconds)
        self.note()
        # Nobody waits for longer than an interval for what was reported.
        if self.reported and not self.closed and not self.stage.ticker.due:
            self.has_told_all()

    @rule()
    def wait_for_the_last(self) -> None:
        for _ in range(2):
            self.wait(1.0)
        if self.reported and not self.closed:
            self.has_told_all()

    @precondition(lambda self: len(self.times) > 5)  # There is little to see after it.
    @rule()
    def close(self) -> None:
        number, progress = self.reporter.close()
        if self.loops:
            self.show_outer(self.loops[-1][1], self.outermost)
        assert number == len(self.stage.published)
        assert (progress is not None) == self.reported
        if progress is not None:
            assert self.of(progress) == self.values
        self.closed = True

    def told_of_cancellation(self, step: Any) -> bool:
        """Do this step; it is the one that raises if the task was cancelled before, for once."""
        if not self.cancelled:
            step()
            return False
        with pytest.raises(TaskCancelled):
            step()
        self.cancelled, self.told = False, True
        return True

    def note(self) -> None:
        """Look at what this step has published: nothing, or one sample of the newest values."""
        new = self.stage.published[len(self.times) :]
        assert len(new) <= (0 if self.closed else 1)
        for number, progress in new:
            self.times.append(self.stage.now)
            assert number == len(self.times)
            assert self.of(progress) == self.values
            assert progress.percent is None or 0 <= progress.percent <= 100
            assert progress.rate is None or progress.rate > 0
            assert progress.eta is None or 0 <= progress.eta < math.inf

    def has_told_all(self) -> None:
        assert self.of(self.stage.last) == self.values

    @staticmethod
    def of(progress: Any) -> dict[str, Any]:
        return {name: getattr(progress, name) for name in ("current", "total", "message", "data")}

    @invariant()
    def the_intervals_are_kept(self) -> None:
        assert all(b - a >= 1.0 for a, b in itertools.pairwise(self.times))
        assert len(self.stage.ticker.due) <= 1

    def teardown(self) -> None:
        self.reporter.close()
        self.stage.tick(self.stage.now + 10.0)
        assert self.stage.ticker.due == [], "the sampler would look at it for ever"


@dataclass(eq=False)
class Life:
    """A task as the hub knows it, from the first that it hears or is asked, until it forgets it."""

    id: str
    event: TaskEvent | None = None
    held: bool = False


@dataclass(eq=False)
class Reader:
    """A subscription, and what it must have been given."""

    subscription: Subscription
    is_async: bool
    named: bool
    lives: list[Life]
    seen: dict[Life, Version] = field(default_factory=dict)

    @property
    def news(self) -> dict[TaskEvent, Life]:
        """The latest events that it has not seen."""
        return {
            life.event: life
            for life in self.lives
            if life.event is not None and life.event.version > self.seen.get(life, NO_VERSION)
        }

    @property
    def ended(self) -> bool:
        """Whether it has read the end of each of its tasks."""
        return self.named and all(
            life.event is not None and life.event.is_last and life in self.seen
            for life in self.lives
        )


def event_of(
    id: str, sequence: int, position: int | None = None, is_last: bool = False
) -> TaskEvent:
    kind = EventKind.ENQUEUED if sequence == 1 else EventKind.PROGRESS
    return TaskEvent(
        id=id,
        sequence=sequence,
        kind=EventKind.FINISHED if is_last else kind,
        status=SUCCESSFUL if is_last else RUNNING,
        name="task",
        backend="default",
        position=position,
    )


LIMIT = 2  # of tasks that nobody holds and nobody reads
rarely = st.integers(0, 5).map(lambda number: number == 5)


class HubMachine(RuleBasedStateMachine):
    """Readers get the latest of each task, in order, and the end; nothing else is kept."""

    readers = Bundle("readers")
    ids = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(hub_module, "UNHELD_LIMIT", LIMIT)
        self.hub = Hub()
        self.loop = asyncio.new_event_loop()
        self.lives: dict[str, Life] = {}
        self.open: list[Reader] = []

    def life(self, id: str) -> Life:
        """Return the present life of this id; a new one begins when the hub has no old one."""
        if id not in self.lives:
            self.lives[id] = Life(id)
            for reader in self.open:
                if not reader.named:
                    reader.lives.append(self.lives[id])
        return self.lives[id]

    def is_read(self, life: Life) -> bool:
        return any(reader.named and life in reader.lives for reader in self.open)

    def forget(self) -> None:
        """Forget, as the hub may, tasks that are neither held nor read."""
        for id, life in list(self.lives.items()):
            if self.hub.snapshot(id) is not life.event:
                assert self.hub.snapshot(id) is None
                assert not life.held
                assert not self.is_read(life)
            if self.hub.snapshot(id) is None and not self.is_read(life):
                del self.lives[id]

    @rule(
        id=ids,
        sequence=st.integers(1, 5),
        position=st.none() | st.integers(0, 3),
        is_last=rarely,
        hold=rarely,
        amend=rarely,
    )
    def publish(
        self,
        id: str,
        sequence: int,
        position: int | None,
        is_last: bool,
        hold: bool,
        amend: bool,
    ) -> None:
        event = event_of(id, sequence, position if sequence == 1 else None, is_last)
        if amend and id not in self.lives:
            assert not self.hub.amend(event)
            return
        life = self.life(id)
        known = life.event
        later = not amend
        if known is not None:
            later = not known.is_last and event.version > known.version
        accepted = self.hub.amend(event) if amend else self.hub.publish(event, hold=hold)
        assert accepted == later
        if later:
            life.event = event
            life.held = life.held or (hold and not amend)
        self.forget()
        if later and not amend and not life.held:
            kept = [other for other in self.lives.values() if not other.held]
            assert len([other for other in kept if not self.is_read(other)]) <= LIMIT

    @rule(id=ids)
    def release(self, id: str) -> None:
        self.hub.release(id)
        assert self.hub.snapshot(id) is None
        self.lives.pop(id, None)

    @rule(target=readers, ids=st.lists(ids, max_size=3), is_async=st.booleans())
    def subscribe(self, ids: list[str], is_async: bool) -> Reader:
        if is_async and not ids:
            # A reader of everything is told what its loop was about to be told, released or not.
            self.loop.run_until_complete(asyncio.sleep(0))
        subscription = self.hub.subscribe(*ids)
        lives = [self.life(id) for id in dict.fromkeys(ids)] if ids else list(self.lives.values())
        if is_async:
            self.hub.attach(subscription, self.loop)  # as `async with` does
        else:
            subscription.__enter__()
        reader = Reader(subscription, is_async, bool(ids), lives)
        self.open.append(reader)
        return reader

    @rule(reader=readers, delivered=st.booleans())
    def take(self, reader: Reader, delivered: bool) -> None:
        if reader in self.open:
            self.check(reader, delivered)

    def check(self, reader: Reader, delivered: bool = True) -> None:
        """Read; what was not `delivered` in the event loop may be missing, and nothing else."""
        news = reader.news
        if not reader.is_async:
            events = reader.subscription.take(timeout=0)
        elif delivered:
            events = self.loop.run_until_complete(reader.subscription.atake(timeout=0))
        else:
            events = reader.subscription._collect()  # as atake() does when it need not wait
        assert len(events) == len(set(events))
        for event in events:
            reader.seen[news[event]] = event.version
        if delivered or not reader.is_async:
            assert not reader.news
            assert reader.subscription.ended == (self.hub.ended or reader.ended)

    @rule(reader=readers)
    def close(self, reader: Reader) -> None:
        reader.subscription.close()
        if reader in self.open:
            self.open.remove(reader)
        self.forget()

    @rule()
    def close_the_loop(self) -> None:
        """Its readers are gone when the hub next has something for them."""
        self.loop.close()
        self.loop = asyncio.new_event_loop()
        gone = [reader for reader in self.open if reader.is_async]
        for life in [life for reader in gone for life in reader.lives]:
            is_over = life.event is not None and life.event.is_last
            if self.lives.get(life.id) is life and not is_over:
                sequence = 1 if life.event is None else life.event.sequence + 1
                life.event = event_of(life.id, sequence)
                assert self.hub.publish(life.event)
                assert not self.hub._channels
                break
        for reader in gone:
            reader.subscription.close()  # for nothing, if there was an event for one of them
            self.open.remove(reader)
        self.forget()

    @precondition(lambda self: len(self.open) > 1)
    @rule()
    def end(self) -> None:
        self.hub.end()

    @invariant()
    def what_is_kept_is_bounded(self) -> None:
        assert {id: self.hub.snapshot(id) for id in self.lives} == {
            id: life.event for id, life in self.lives.items()
        }
        assert set(self.hub._cells) == set(self.lives)
        assert set(self.hub._unheld) <= set(self.hub._cells)

    def teardown(self) -> None:
        try:
            for reader in list(self.open):
                self.check(reader)
                reader.subscription.close()
            assert not self.hub.everything
            assert not self.hub._channels
            for id in list(self.hub._cells):
                self.hub.release(id)
            assert not self.hub._unheld
        finally:
            self.loop.close()
            self.patch.undo()


class ManualPool(Pool[ThreadOptions]):
    """A pool whose workers are the test."""

    def __init__(self, options: ThreadOptions) -> None:
        super().__init__(ThreadPoolBackend, "default", options)
        self.ticker = FakeTicker()
        self._positions = Positions(self.queue, self._jobs, ticker=self.ticker)
        self.stopped: list[Job] = []

    def _submit(self, job: Job) -> None:
        self.queue.append(job)

    def _stop(self, job: Job) -> None:
        self.stopped.append(job)

    def close_workers(self) -> None:
        pass


class PoolMachine(RuleBasedStateMachine):
    """The hub tells each task's life in order and once, and what it says agrees with the store."""

    ids = Bundle("ids")

    @initialize(max_results=st.integers(1, 3), max_pending=st.none() | st.integers(0, 3))
    def start_anew(self, max_results: int, max_pending: int | None) -> None:
        self.pool = ManualPool(
            ThreadOptions(max_workers=1, max_results=max_results, max_pending=max_pending)
        )
        self.running: list[Job] = []
        self.over: list[Job] = []
        self.events: list[TaskEvent] = []
        self.recording = hub.recording(self.events.append)
        self.recording.__enter__()

    @rule(target=ids)
    def enqueue(self) -> Any:
        result = new_result()
        options = self.pool.options
        limit = None if options.max_pending is None else options.max_pending + options.max_workers
        if self.pool.closed:
            with pytest.raises(RuntimeError, match="shutting down"):
                self.pool.enqueue(result)
        elif limit is not None and len(self.pool._jobs) >= limit:
            with pytest.raises(QueueFull):
                self.pool.enqueue(result)
        else:
            self.pool.enqueue(result)
            assert hub.snapshot(result.id).position == len(self.pool.queue) - 1
            return result.id
        assert hub.snapshot(result.id) is None
        return multiple()

    @precondition(lambda self: self.pool.queue)
    @rule()
    def begin(self) -> None:
        job = self.pool.queue.popleft()
        job.reporter = Reporter(job.report, 0.0, job.get_cancellation(), ticker=FakeTicker())
        is_waiting = job.result_id in self.pool._jobs
        begun = self.pool.begin(job, "worker")
        assert (begun is not None) == is_waiting
        if begun is not None:
            self.running.append(job)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), current=st.integers(0, 100))
    def report(self, data: st.DataObject, current: int) -> None:
        job = data.draw(st.sampled_from(self.running))
        assert isinstance(job.reporter, Reporter)
        job.reporter.report(current)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.running.remove(job)
        outcome = Outcome.failure(ValueError("no")) if fails else Outcome(return_value=7)
        # After close() it has an outcome already.
        assert self.pool.finish(job, outcome) == (not self.pool.closed)
        self.over.append(job)

    @precondition(lambda self: self.over)
    @rule(data=st.data())
    def finish_again(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.over))
        job.publication.progress(1000, job.reporter.close()[1])  # a sample that was on its way
        assert not self.pool.finish(job, Outcome(return_value="too late"))

    @rule(id=ids)
    def cancel(self, id: str) -> None:
        before = hub.snapshot(id)
        if before is None:
            with pytest.raises(TaskResultDoesNotExist):
                self.pool.cancel(id)
            return
        assert self.pool.cancel(id) == (not before.is_last)
        if before.status == READY:
            after = hub.snapshot(id)
            assert after is None or (after.error and after.error.reason == "cancelled")
        assert (before.status == RUNNING) == (id in {job.result_id for job in self.pool.stopped})
        self.pool.stopped.clear()

    @rule()
    def look_at_the_queue(self) -> None:
        due, self.pool.ticker.due = self.pool.ticker.due, []
        assert len(due) <= 1
        for _, ticking in due:
            assert ticking.tick() is None
        waiting = [job.result_id for job in self.pool.queue if job.result_id in self.pool._jobs]
        positions = [hub.snapshot(id).position for id in waiting]
        assert positions == list(range(len(waiting)))

    @precondition(lambda self: len(self.events) > 20)
    @rule()
    def close(self) -> None:
        unfinished = set(self.pool._jobs)
        running = unfinished & {job.result_id for job in self.running}
        began = len(self.events)
        self.pool.close(timeout=0)
        assert {job.result_id for job in self.pool.stopped} == running
        self.pool.stopped.clear()
        lost = [event for event in self.events[began:] if event.error]
        assert {event.id for event in lost} == unfinished
        assert {event.error.reason for event in lost if event.error} <= {"lost"}

    @invariant()
    def the_hub_agrees_with_the_store(self) -> None:
        ids = self.pool.results.ids()
        told = {event.id for event in self.events}
        for id in told:
            event = hub.snapshot(id)
            assert (event is not None) == (id in ids)
            if event is not None:
                result = self.pool.results.get(id)
                assert event.status == result.status
                assert event.is_last == result.is_finished == (id not in self.pool._jobs)
                assert event.started_at == result.started_at
                assert event.finished_at == result.finished_at
        assert len(ids) <= self.pool.options.max_results + len(self.pool._jobs)

    @invariant()
    def nothing_is_in_the_queue_for_nothing(self) -> None:
        assert {job.result_id for job in self.pool.queue} <= set(self.pool._jobs)

    @invariant()
    def each_life_is_told_in_order(self) -> None:
        order = list(EventKind)
        lives: dict[str, list[TaskEvent]] = {}
        for event in self.events:
            lives.setdefault(event.id, []).append(event)
        for id, life in lives.items():
            assert all(a.version < b.version for a, b in itertools.pairwise(life))
            kinds = [order.index(event.kind) for event in life]
            assert kinds == sorted(kinds)
            assert kinds[0] == 0
            assert [event.is_last for event in life].count(True) == (id not in self.pool._jobs)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.discard()
            self.recording.__exit__(None, None, None)
            shutdown.unregister(self.pool)
            assert not any(hub.snapshot(event.id) for event in self.events)


@pytest.mark.timeout(360)  # Hypothesis takes up to five minutes to simplify what has failed.
@pytest.mark.parametrize("machine", [StoreMachine, ThrottleMachine, HubMachine, PoolMachine])
def test_any_interleaving(machine: type[RuleBasedStateMachine]) -> None:
    run_state_machine_as_test(machine, settings=EXAMPLES)
