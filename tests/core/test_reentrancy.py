"""
Re-entrant calls: a finalizer or a signal handler interrupts a method in the method's own thread.

The garbage collector runs a finalizer (`__del__`) at a time that a test cannot choose. Most tests
therefore re-enter through a function that the code calls anyway: the clock, `publish` or
`Thread.start`.
"""

import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from django_tasks_local import report_progress, shutdown
from django_tasks_local.events import Progress
from django_tasks_local.exceptions import TaskCancelled
from django_tasks_local.execution.daemon_threads import DaemonExecutor
from django_tasks_local.progress import loops
from django_tasks_local.progress import reporter as reporter_module
from django_tasks_local.progress.loops import LoopProgress
from django_tasks_local.progress.reporter import (
    Reporter,
    Reporting,
    current_reporting,
)
from tests.support.stage import FakeTicker
from tests.support.waiting import LIMIT

if TYPE_CHECKING:
    from django_tasks_local.cancellation import Cancellation


def finishes(function: Callable[[], object]) -> bool:
    """
    Call `function` in a thread; return False if it blocks, as on a lock that its own thread holds.
    """
    done = threading.Event()

    def run() -> None:
        function()
        done.set()

    threading.Thread(target=run, daemon=True).start()
    return done.wait(LIMIT)


class Task(Reporting):
    """
    A task whose clock, publisher and `is_finished` call the function that arm() has set, once.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.id = "the task's id"
        self.lock = threading.RLock()
        self.interval = interval
        self.has_ended = False
        self.now = 0.0
        self.published: list[tuple[int, Progress]] = []
        self.ticker = FakeTicker()
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        self.armed: dict[str, Callable[[], object]] = {}

    def arm(self, place: str, function: Callable[[], object]) -> None:
        """Make the next call of interrupt(place) call `function`; later calls do nothing."""
        self.armed[place] = function

    def interrupt(self, place: str) -> None:
        if function := self.armed.pop(place, None):
            function()

    @property
    def is_finished(self) -> bool:
        self.interrupt("is_finished")
        return self.has_ended

    def clock(self) -> float:
        self.interrupt("clock")
        return self.now

    def report(self, number: int, progress: Progress) -> None:
        self.interrupt("publish")
        self.published.append((number, progress))

    def tick(self) -> None:
        """Advance the clock by one second, then call the due reporter as the ticker would."""
        self.now += 1.0
        due, self.ticker.due = self.ticker.due, []
        assert len(due) <= 1, "the reporter was added to the ticker more than once"
        for _, ticking in due:
            again_at = ticking.tick()
            if again_at is not None:
                self.ticker.add(ticking, again_at)

    @property
    def newest(self) -> tuple[Any, str]:
        """
        Return the values of the sample with the highest number, which is the sample that readers
        keep.
        """
        numbers = [number for number, _ in self.published]
        assert len(numbers) == len(set(numbers))
        progress = max(self.published, key=lambda sample: sample[0])[1]
        return progress.current, progress.message


@pytest.fixture(params=[1.0, 0.0], ids=["throttled", "unthrottled"])
def task(request: pytest.FixtureRequest) -> Task:
    task = Task(request.param)
    task.reporter = Reporter(
        task.report,
        task.interval,
        task.get_cancellation(),
        clock=task.clock,
        ticker=task.ticker,
        lock=task.lock,
    )
    return task


@pytest.fixture
def reporter(task: Task) -> Reporter:
    return task.get_reporter()


@pytest.mark.parametrize("place", ["clock", "publish"])
@pytest.mark.parametrize("earlier_reports", [0, 1, 2])
def test_a_report_during_a_report(
    task: Task, reporter: Reporter, place: str, earlier_reports: int
) -> None:
    """
    A report inside a report neither deadlocks nor reuses a number, and publishes the newest values.
    """
    for number in range(earlier_reports):
        reporter.report(number)
    task.arm(place, lambda: reporter.report(message="from a finalizer"))
    assert finishes(lambda: reporter.report(current=10))
    # A throttled report neither reads the clock nor publishes; the next tick does both.
    if place in task.armed:
        task.tick()
    task.tick()
    task.tick()
    assert task.newest == (10, "from a finalizer")
    assert task.ticker.due == []


@pytest.mark.parametrize(
    ("module", "function"), [(loops, "percent_of"), (reporter_module, "seconds_left")]
)
def test_a_report_while_a_sample_is_made(
    task: Task,
    reporter: Reporter,
    module: ModuleType,
    function: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(module, function)

    def interrupted(*args: Any) -> Any:
        task.interrupt(function)
        return original(*args)

    monkeypatch.setattr(module, function, interrupted)
    task.arm(function, lambda: reporter.report(20, message="from a finalizer"))
    assert finishes(lambda: reporter.report(10))
    task.tick()
    assert task.newest == (20, "from a finalizer")


def test_a_report_during_a_tick(task: Task, reporter: Reporter) -> None:
    reporter.start_tracking(loop := LoopProgress(0, 10, "loop"))
    loop.current = 5
    task.arm("clock", lambda: reporter.report(message="from a finalizer"))
    assert finishes(task.tick)
    task.tick()
    assert task.newest == (5, "from a finalizer")
    reporter.stop_tracking(loop)
    task.tick()
    assert task.ticker.due == []


def test_a_loop_that_begins_during_another_ones_begin(task: Task, reporter: Reporter) -> None:
    outer, inner = LoopProgress(0, 10, "outer"), LoopProgress(0, 5, "inner")

    def run_inner() -> None:
        reporter.start_tracking(inner)
        reporter.stop_tracking(inner)

    task.arm("clock", run_inner)
    assert finishes(lambda: reporter.start_tracking(outer))
    outer.current = 3
    task.tick()
    assert task.newest == (3, "outer")
    reporter.stop_tracking(outer)
    for _ in range(2):
        task.tick()
    assert task.ticker.due == []


def test_the_end_during_a_report(task: Task, reporter: Reporter) -> None:
    task.arm("clock", reporter.close)
    assert finishes(lambda: reporter.report(1))
    assert task.published == []
    task.tick()
    assert task.ticker.due == []


def test_a_cancellation_during_a_report(task: Task, reporter: Reporter) -> None:
    cancellation = task.get_cancellation()
    task.arm("clock", cancellation.request)
    assert finishes(lambda: reporter.report(1))
    with pytest.raises(TaskCancelled):
        reporter.report(2)


def test_a_report_while_the_reporter_is_made() -> None:
    """
    Re-entrant calls of get_reporter() return one Reporter; a second one would reuse sample numbers.
    """
    task = Task()
    task.arm("is_finished", lambda: task.get_reporter().report(1))
    reporters: list[Reporter] = []
    assert finishes(lambda: reporters.append(task.get_reporter()))
    assert reporters == [task.reporter]
    assert [number for number, _ in task.published] == [1]


class Message(str):
    """
    A message whose finalizer runs in the function that drops the last reference to the message.
    """

    __slots__ = ("finalize",)

    finalize: Callable[[], object]

    def __del__(self) -> None:
        self.finalize()


@pytest.fixture
def current(task: Task) -> Iterator[None]:
    token = current_reporting.set(task)
    yield
    current_reporting.reset(token)


def test_a_real_finalizer_that_reports(task: Task, reporter: Reporter, current: None) -> None:
    finalized = []

    def finalize() -> None:
        finalized.append(True)
        report_progress(message="from the finalizer")

    message = Message("from the task")
    message.finalize = finalize
    # report_progress() would store a plain copy of the message.
    reporter.report(1, message=message)
    task.published.clear()
    del message
    task.now += 1.0

    def report() -> None:
        current_reporting.set(task)
        report_progress(2, message="the next message")

    assert finishes(report)
    assert finalized == [True]
    task.tick()
    assert task.newest[0] == 2


def test_a_finalizer_that_enqueues_while_its_thread_registers_a_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Registered:
        """
        A pool whose __hash__() calls `during` while register() holds its lock, like a finalizer.
        """

        def __init__(self, during: Callable[[], object] = bool) -> None:
            self.during = during
            self.calls = 0

        def __hash__(self) -> int:
            self.calls += 1
            if self.calls == 2:
                self.during()
            return id(self)

        def __eq__(self, other: object) -> bool:
            return self is other

    exit = shutdown._Exit()
    exit.hook_registered = True
    monkeypatch.setattr(shutdown, "_exit", exit)
    inner: Any = Registered()
    outer: Any = Registered(during=lambda: shutdown.register(inner))
    assert finishes(lambda: shutdown.register(outer))
    assert exit.pools == {inner, outer}


def test_a_call_in_a_thread_while_one_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    executor = DaemonExecutor(max_workers=1)
    values: list[int] = []
    inner: list[Any] = []

    def interrupted_start(thread: threading.Thread) -> None:
        if thread.name == "django-tasks-sync" and not inner:
            inner.append(executor.submit(abs, -1))
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted_start)
    assert finishes(lambda: values.append(executor.submit(abs, -2).result(LIMIT)))
    assert values == [2]
    assert inner[0].result(LIMIT) == 1
    assert len(executor._workers) == 1
    executor.shutdown()
