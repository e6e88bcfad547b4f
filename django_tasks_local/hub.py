"""
The in-process publish/subscribe hub: the latest event of every task. Imports events only.

    publisher's thread              the hub                       reader
    ------------------              -------                       ------
    hub.publish(event) --> [cell: latest event of one task]
                               |  mark the cell as changed,
                               |  once per channel
                               v
                           [channel] --- one wake-up ----> event loop: channel.deliver()
                                                              |  to each subscription of the loop
                                                              v
                                                           subscription.atake() / async for
                           [channel] --- notify ---------> a thread in subscription.take() / for

There is one cell per task and one channel per event loop (or per reading thread), so what a publish
costs does not grow with the number of readers of a loop, and nothing can overflow: a reader that is
slow finds the latest event in the cell.
"""

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary

from .events import NO_VERSION, TaskEvent, Version
from .forking import reset_in_child

# What is kept of tasks that are not held by a backend of this package, finished or not: a web
# process hears `enqueued` of a task that runs elsewhere, and nothing more.
UNHELD_LIMIT = 1000  # tasks
UNHELD_AGE = 3600.0  # seconds since the task's last event

# What a reader of every task may leave unread, besides the tasks that the hub keeps anyway.
UNREAD_LIMIT = 10_000  # tasks


type Recorder = Callable[[TaskEvent], object]


class _Cell:
    """The latest event of one task, and who reads it. Guarded by the hub's lock."""

    __slots__ = ("__weakref__", "event", "held", "lock", "readers", "task_id")

    def __init__(self, task_id: str) -> None:
        self.task_id = task_id
        self.event: TaskEvent | None = None
        self.held = False
        self.lock = threading.Lock()  # Guards `event`; the hub's guards the rest.
        self.readers: dict[_Channel, set[Subscription]] = {}

    def replace(self, event: TaskEvent, recorders: "tuple[Recorder, ...]") -> bool:
        """Keep this event; False if one that is not earlier is there already."""
        with self.lock:
            known = self.event
            if known is not None and (known.is_last or event.version <= known.version):
                return False
            self.event = event
            for record in recorders:
                record(event)
        return True


class _Lock:
    """
    A lock that calls `afterwards` whenever it was released.

    Not an RLock: what it guards may not be changed in the midst of a change by the same thread.
    """

    def __init__(self, afterwards: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._afterwards = afterwards

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        return self._lock.acquire(blocking, timeout)

    def let_go(self) -> None:
        self._lock.release()

    def release(self) -> None:
        self._lock.release()
        self._afterwards()

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *exc_info: object) -> None:
        self.release()


class _Channel:
    """The way from the hub to the subscriptions of one event loop, or to one reading thread."""

    def __init__(self, hub: "Hub", loop: asyncio.AbstractEventLoop | None) -> None:
        self.hub = hub
        self.loop = loop
        self.readable = threading.Condition(hub.lock)  # type: ignore[arg-type]
        # These are guarded by the hub's lock.
        self.changed: dict[_Cell, None] = {}
        self.scheduled = False
        self.subscriptions: set[Subscription] = set()

    def mark(self, cell: _Cell) -> bool:
        """Note a change; say whether the reader needs a wake-up. The caller holds the lock."""
        self.changed[cell] = None
        # A loop that was closed will never do what was scheduled; wake() finds that out.
        if self.scheduled and not (self.loop and self.loop.is_closed()):
            return False
        self.scheduled = True
        return True

    def wake(self) -> None:
        """Wake the reader. Called without the lock, from any thread."""
        if self.loop is None:
            with self.hub.lock:
                self.deliver_locked()
                self.readable.notify_all()
            return
        try:
            self.loop.call_soon_threadsafe(self.deliver)
        except RuntimeError:
            # The loop is closed, and so nobody reads here any more. That is how loops end.
            self.hub.drop_channel(self)

    def deliver(self) -> None:
        """Hand the changes to the subscriptions. Called in the loop's thread."""
        with self.hub.lock:
            woken = self.deliver_locked()
        for subscription in woken:
            subscription.resume()

    def deliver_locked(self) -> "dict[Subscription, None]":
        changed, self.changed = self.changed, {}
        self.scheduled = False
        # In order: those who are told the same follow one another.
        woken: dict[Subscription, None] = {}
        everything = self.hub.everything.get(self, ())
        for cell in changed:
            for subscription in cell.readers.get(self, ()):
                subscription.changed[cell] = None
                woken[subscription] = None
            for subscription in everything:
                subscription.changed[cell] = None
                woken[subscription] = None
        for subscription in everything:
            subscription.bound()
        if self.hub.ended:
            woken |= dict.fromkeys(self.subscriptions)
        return woken


class Subscription:
    """
    A reader of some tasks, or of all. Made by `hub.subscribe()`.

    A context manager and an iterator, both sync and async; use it in one thread, or in one event
    loop. The current state of every task comes first. Between two reads only the latest event of
    each task is kept. With ids it ends when each of these tasks is finished; without, never.

    A reader of every task that does not read is not kept supplied without end: `missed` counts the
    tasks of which it missed the last event, because over UNREAD_LIMIT unread ones were no longer
    known to the hub.
    """

    def __init__(self, hub: "Hub", result_ids: tuple[str, ...]) -> None:
        self._hub = hub
        self._everything = not result_ids
        self._unfinished = dict.fromkeys(result_ids)
        # The version that was read last. A reader of everything never ends, so what it remembers
        # must go with the tasks.
        self._seen: MutableMapping[_Cell, Version] = WeakKeyDictionary() if self._everything else {}
        self._cells: list[_Cell] = []
        self._channel: _Channel | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        # Cells with an event that was not read yet. Of an async subscription only the loop's
        # thread touches it after the start; of a sync one, whoever holds the hub's lock.
        self.changed: dict[_Cell, None] = {}
        self.missed = 0

    @property
    def ended(self) -> bool:
        """Whether no further event will come."""
        return self._hub.ended or not (self._everything or self._unfinished)

    # Reading in a thread

    def __enter__(self) -> Self:
        self._hub.attach(self, None)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def take(self, timeout: float | None = None) -> list[TaskEvent]:
        """
        Wait for news, at most `timeout` seconds, and return the latest event of each changed task.

        An empty list means that the time is up or that the subscription has ended.
        """
        channel = self._attached()
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._hub.lock:
            while True:
                events = self._collect()
                if events or self.ended:
                    return events
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return []
                channel.readable.wait(left)

    def __iter__(self) -> Iterator[TaskEvent]:
        while events := self.take():
            yield from events

    # Reading in an event loop

    async def __aenter__(self) -> Self:
        self._hub.attach(self, asyncio.get_running_loop())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    async def atake(self, timeout: float | None = None) -> list[TaskEvent]:
        """See take()."""
        channel = self._attached()
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            if self._hub.ended:
                channel.deliver()  # What was published before the end comes before the end.
            events = self._collect()
            if events or self.ended or (deadline is not None and loop.time() >= deadline):
                return events
            self._waiter = loop.create_future()
            if deadline is not None:
                self._wake_at(deadline, loop)
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def __aiter__(self) -> AsyncIterator[TaskEvent]:
        while events := await self.atake():
            for event in events:
                yield event

    def resume(self) -> None:
        """Let a waiting atake() look again. Called in the loop's thread."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wake_at(self, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        # A timer that rings before is left as it is: atake() then looks again, and sets the next
        # one. A timer for each event and reader was a quarter of what an event cost.
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = loop.call_at(deadline, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self.resume()

    # Both

    def bound(self) -> None:
        """
        Drop the oldest unread events of tasks that the hub has released, if there are too many.

        Many are dropped at once, so that it is rarely done. The caller holds the hub's lock.
        """
        known = self._hub._cells
        if len(self.changed) > len(known) + UNREAD_LIMIT:
            released = [cell for cell in self.changed if known.get(cell.task_id) is not cell]
            for cell in released[: len(released) - UNREAD_LIMIT // 2]:
                del self.changed[cell]
                self.missed += 1

    def close(self) -> None:
        """Stop reading. Does nothing the second time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._hub.detach(self)

    def _attached(self) -> _Channel:
        if self._channel is None:
            raise RuntimeError("Use a subscription in a `with` or an `async with` block.")
        return self._channel

    def _collect(self) -> list[TaskEvent]:
        events: list[TaskEvent] = []
        if not self.changed:
            return events
        changed, self.changed = self.changed, {}
        for cell in changed:
            # Unlocked on purpose in an event loop: reading one attribute is atomic, and whatever
            # was put there later has marked the cell again.
            event = cell.event
            if event is None or (version := event.version) <= self._seen.get(cell, NO_VERSION):
                continue
            self._seen[cell] = version
            if event.is_last:
                self._unfinished.pop(event.id, None)
            events.append(event)
        return events


class Hub:
    """
    Publishes events to subscriptions and keeps the latest of each task.

    All methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        # Guards the cells, the channels and the subscriptions. Held for a few dictionary
        # operations; no callback, wake-up of a loop or code of a user runs inside.
        self.lock = _Lock(self._detach_waiting)
        self.ended = False
        self._open: set[Subscription] = set()
        self._closing: deque[Subscription] = deque()  # by whom the lock was not to be had
        self._all_closed = threading.Condition(self.lock)  # type: ignore[arg-type]
        self.everything: dict[_Channel, set[Subscription]] = {}
        self._cells: dict[str, _Cell] = {}
        self._channels: dict[asyncio.AbstractEventLoop, _Channel] = {}
        # When the tasks that no backend holds had their last event, the oldest first.
        self._unheld: OrderedDict[str, float] = OrderedDict()
        self._recorders: tuple[Recorder, ...] = ()

    def publish(self, event: TaskEvent, *, hold: bool = False) -> bool:
        """
        Make `event` the latest of its task and wake whoever reads it.

        Never blocks and never raises into the publisher. An event that is not later than the one
        that is there is stale, as when two threads race: it is dropped, and the answer is False.
        With `hold` the task is kept until `release()`, because a backend's store bounds it.
        """
        cell = self._cells.get(event.id)
        if cell is not None and cell.held:
            # It stays until release(), so that its own lock is enough.
            accepted = cell.replace(event, self._recorders)
        else:
            with self.lock:
                cell = self._cell_locked(event.id)
                accepted = cell.replace(event, self._recorders)
                if accepted and hold:
                    cell.held = True
                    self._unheld.pop(event.id, None)
                elif accepted and not cell.held:
                    self._bound_unheld_locked(event.id)
        if accepted:
            self._wake_readers(cell)
        return accepted

    def amend(self, event: TaskEvent) -> bool:
        """
        Publish a later event of a task that is known here; do nothing when it is not.

        What is late, as a sample of the progress in another thread, must not bring a task back.
        """
        cell = self._cells.get(event.id)
        # A cell that is released just now is nobody's any more, and may say what it likes.
        if cell is None or cell.event is None or not cell.replace(event, self._recorders):
            return False
        self._wake_readers(cell)
        return True

    def _wake_readers(self, cell: _Cell) -> None:
        # Who begins to read from here on finds the event in the cell.
        if not cell.readers and not self.everything:
            return
        with self.lock:
            channels = {*cell.readers, *self.everything}
            to_wake = [channel for channel in channels if channel.mark(cell)]
        for channel in to_wake:
            channel.wake()

    def snapshot(self, result_id: str) -> TaskEvent | None:
        """Return the latest event of a task, or None."""
        cell = self._cells.get(result_id)
        return None if cell is None else cell.event

    @contextmanager
    def recording(self, record: Recorder) -> Iterator[None]:
        """
        Have `record` called with every event that is published in the `with` block. For tests.

        A subscription is given the latest event, and this all of them, each task's in order.
        `record` is called in the publisher's thread while the task's lock is held: it may do no
        more than to note the event.
        """
        with self.lock:
            self._recorders += (record,)
        try:
            yield
        finally:
            with self.lock:
                self._recorders = tuple(r for r in self._recorders if r is not record)

    def subscribe(self, *result_ids: str) -> Subscription:
        """
        Return a subscription to these tasks, or to all tasks when no id is given.

        It starts at its `with` or `async with`. An id that the hub does not know is waited for.
        """
        return Subscription(self, result_ids)

    def release(self, result_id: str) -> None:
        """Forget a task. Who reads it now still finds its last event."""
        cell = self._cells.get(result_id)
        if cell is not None and cell.held:
            self._cells.pop(result_id, None)
            return
        with self.lock:
            self._cells.pop(result_id, None)
            self._unheld.pop(result_id, None)

    def end(self, timeout: float = 0) -> None:
        """
        End every subscription, present and future: this process is about to exit.

        Wait until the present ones are closed, but not for more than `timeout` seconds.
        """
        with self.lock:
            self.ended = True
            channels = {s for s in self._channels.values() if not s.scheduled}
            cells = list(self._cells.values())  # in one step, because release() takes no lock
            readers = [c for cell in cells for c in cell.readers if c.loop is None]
            channels.update(readers, self.everything)
        for channel in channels:
            channel.wake()
        with self.lock:
            self._all_closed.wait_for(lambda: not self._open, timeout)

    # For subscriptions and channels

    def attach(self, subscription: Subscription, loop: asyncio.AbstractEventLoop | None) -> None:
        """Start a subscription: the present state of its tasks is its first news."""
        with self.lock:
            if subscription._channel is not None:
                raise RuntimeError("A subscription can be entered once only.")
            channel = _Channel(self, None) if loop is None else self._channels.get(loop)
            if channel is None:
                assert loop is not None
                channel = self._channels[loop] = _Channel(self, loop)
            subscription._channel = channel
            channel.subscriptions.add(subscription)
            self._open.add(subscription)
            if subscription._everything:
                self.everything.setdefault(channel, set()).add(subscription)
                cells = list(self._cells.values())
            else:
                cells = [self._cell_locked(result_id) for result_id in subscription._unfinished]
                subscription._cells = cells
                for cell in cells:
                    cell.readers.setdefault(channel, set()).add(subscription)
            subscription.changed = dict.fromkeys(cells)

    def detach(self, subscription: Subscription) -> None:
        """
        End a subscription.

        Does not wait for the lock: the garbage collector may close a reader at any moment, also
        while this thread has it. Whoever has it does the rest.
        """
        self._closing.append(subscription)
        self._detach_waiting()

    def _detach_waiting(self) -> None:
        while self._closing and self.lock.acquire(blocking=False):
            try:
                while self._closing:
                    subscription = self._closing.popleft()
                    channel = subscription._channel
                    if channel is not None and subscription in channel.subscriptions:
                        self._detach_locked(subscription, channel)
            finally:
                self.lock.let_go()

    def drop_channel(self, channel: _Channel) -> None:
        """Forget the subscriptions of a loop that was closed."""
        with self.lock:
            for subscription in list(channel.subscriptions):
                self._detach_locked(subscription, channel)

    def _detach_locked(self, subscription: Subscription, channel: _Channel) -> None:
        channel.subscriptions.discard(subscription)
        self._open.discard(subscription)
        if not self._open:
            self._all_closed.notify_all()
        for cell in subscription._cells:
            with suppress(KeyError):
                cell.readers[channel].discard(subscription)
                if not cell.readers[channel]:
                    del cell.readers[channel]
            is_idle = cell.event is None and not cell.held and not cell.readers
            # A cell that was released may have a successor.
            if is_idle and self._cells.get(cell.task_id) is cell:
                del self._cells[cell.task_id]
        subscription._cells = []
        if subscription._everything and channel in self.everything:
            self.everything[channel].discard(subscription)
            if not self.everything[channel]:
                del self.everything[channel]
        if channel.loop is not None and not channel.subscriptions:
            self._channels.pop(channel.loop, None)

    def _cell_locked(self, result_id: str) -> _Cell:
        cell = self._cells.get(result_id)
        if cell is None:
            cell = self._cells[result_id] = _Cell(result_id)
        return cell

    def _bound_unheld_locked(self, result_id: str) -> None:
        now = time.monotonic()
        self._unheld[result_id] = now
        self._unheld.move_to_end(result_id)
        for _ in range(len(self._unheld)):
            oldest, heard_at = next(iter(self._unheld.items()))
            if len(self._unheld) <= UNHELD_LIMIT and now - heard_at <= UNHELD_AGE:
                return
            del self._unheld[oldest]
            if self._cells[oldest].readers:
                self._unheld[oldest] = now  # Somebody waits for its next event.
            else:
                del self._cells[oldest]


hub = Hub()

# A child of fork() has neither the threads nor the loops that read here, and the lock may be held.
reset_in_child(hub._reset)
