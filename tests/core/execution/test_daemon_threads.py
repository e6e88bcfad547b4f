"""DaemonExecutor, whose threads run the sync code that coroutine tasks call."""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from django_tasks_local.execution.daemon_threads import DaemonExecutor, new_event_loop
from tests.support.waiting import LIMIT


@pytest.fixture
def executor() -> Iterator[DaemonExecutor]:
    with DaemonExecutor(max_workers=2) as executor:
        yield executor


def test_values_and_errors(executor: DaemonExecutor) -> None:
    assert executor.submit(pow, 2, 3, mod=5).result(LIMIT) == 3
    with pytest.raises(SystemExit):
        executor.submit(exit, 3).result(LIMIT)
    assert list(executor.map(abs, [-1, 2, -3])) == [1, 2, 3]


def test_threads_start_as_needed(executor: DaemonExecutor) -> None:
    """
    The executor reuses idle threads; all are daemons, for which the interpreter does not wait.
    """
    assert not executor.has_threads
    threads = []
    for _ in range(3):
        threads.append(executor.submit(threading.current_thread).result(LIMIT))
        executor._idle.put(executor._idle.get(timeout=LIMIT))  # waits until the thread is idle
    assert len(set(threads)) == 1
    both = threading.Barrier(2)
    arrived = [executor.submit(both.wait, LIMIT) for _ in range(4)]
    assert sorted(future.result(LIMIT) for future in arrived) == [0, 0, 1, 1]
    assert len(executor._workers) == 2
    assert all(worker.daemon for worker in executor._workers)


def test_shutdown_finishes_queued_calls(executor: DaemonExecutor) -> None:
    """After shutdown() the executor still runs queued calls, and submit() raises RuntimeError."""
    go = threading.Event()
    busy = [executor.submit(go.wait, LIMIT) for _ in range(2)]
    queued = executor.submit(abs, -1)
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit(abs, 1)
    go.set()
    assert queued.result(LIMIT) == 1
    executor.shutdown()
    assert all(future.result(0) for future in busy)
    assert not any(worker.is_alive() for worker in executor._workers)


def test_shutdown_that_cancels_queued_calls(executor: DaemonExecutor) -> None:
    go = threading.Event()
    started = threading.Barrier(3)
    busy = [executor.submit(lambda: (started.wait(LIMIT), go.wait(LIMIT))) for _ in range(2)]
    started.wait(LIMIT)
    queued = executor.submit(abs, -1)
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        queued.result(LIMIT)
    go.set()
    assert all(future.result(LIMIT) for future in busy)


def test_threads_that_cannot_start(
    executor: DaemonExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    If no thread can start, submit() queues the call for an existing thread, or raises if none
    exists.
    """

    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="can't start"):
            executor.submit(abs, -1)
    go = threading.Event()
    busy = executor.submit(go.wait, LIMIT)
    with monkeypatch.context() as broken:
        broken.setattr(threading.Thread, "start", fail)
        queued = executor.submit(abs, -1)
    go.set()
    assert (busy.result(LIMIT), queued.result(LIMIT)) == (True, 1)


def test_threads_of_event_loop_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the loop ends its threads and starts no thread, because none can start at exit."""

    async def choose() -> str:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1, "chosen"))
        return (await asyncio.to_thread(threading.current_thread)).name

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        assert runner.run(choose()) == "chosen_0"

    async def main() -> list[threading.Thread]:
        threads = [await asyncio.to_thread(threading.current_thread) for _ in range(3)]
        monkeypatch.setattr(threading.Thread, "start", None)
        return threads

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        threads = runner.run(main())
    assert all(thread.name == "django-tasks-sync" for thread in threads)
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()


@pytest.mark.filterwarnings("ignore:.*event_loop_policy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*DefaultEventLoopPolicy:DeprecationWarning")
@pytest.mark.parametrize("module", ["asyncio.unix_events", "a_project"])
def test_event_loop_policy_chooses_the_loop(module: str) -> None:
    """A project on Windows sets a policy of asyncio, because psycopg needs another loop there."""

    class ChosenLoop(asyncio.SelectorEventLoop):
        pass

    class Policy(asyncio.DefaultEventLoopPolicy):
        __module__ = module

        def new_event_loop(self) -> asyncio.AbstractEventLoop:
            return ChosenLoop()

    async def main() -> tuple[bool, str]:
        thread = await asyncio.to_thread(threading.current_thread)
        return isinstance(asyncio.get_running_loop(), ChosenLoop), thread.name

    before = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(Policy())
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            assert runner.run(main()) == (True, "django-tasks-sync")
    finally:
        asyncio.set_event_loop_policy(before)
