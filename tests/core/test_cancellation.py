"""The class Cancellation delivers a request once to each thread and asyncio task of a task."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest

from django_tasks_local.cancellation import Cancellation
from django_tasks_local.exceptions import TaskCancelled
from tests.support.waiting import LIMIT


@pytest.fixture
def cancellation() -> Cancellation:
    return Cancellation()


def raises(cancellation: Cancellation) -> bool:
    """Return whether the next step of track() would raise TaskCancelled in this context."""
    try:
        cancellation.raise_if_requested()
    except TaskCancelled:
        return True
    return False


def test_it_is_delivered_once(cancellation: Cancellation) -> None:
    assert not cancellation.requested
    cancellation.raise_if_requested()
    cancellation.request()
    cancellation.request()
    assert cancellation.requested
    with pytest.raises(TaskCancelled, match="The task was cancelled"):
        cancellation.raise_if_requested()
    cancellation.request()
    cancellation.raise_if_requested()


def test_each_thread_receives_it_once(cancellation: Cancellation) -> None:
    """
    A thread that has started before the delivery receives the request, even if another thread has
    received it first; a thread that starts for the clean-up does not.
    """
    start = threading.Barrier(8)
    raised: list[bool] = []

    def raise_twice() -> None:
        start.wait(LIMIT)
        cancellation.request()
        raised.extend(raises(cancellation) for _ in range(2))

    threads = [threading.Thread(target=copy_context().run, args=(raise_twice,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(raised) == [False] * 8 + [True] * 8
    assert raises(cancellation)
    with ThreadPoolExecutor(1) as executor:
        assert not executor.submit(copy_context().run, raises, cancellation).result(LIMIT)


def test_code_that_handles_the_exception_of_an_inner_context(cancellation: Cancellation) -> None:
    """A `finally` block may report although asyncio.run() has raised from another context."""

    async def step() -> None:
        cancellation.raise_if_requested()

    cancellation.request()
    try:
        asyncio.run(step())
    except TaskCancelled:
        cancellation.raise_if_requested()
    else:
        pytest.fail("The coroutine did not receive the request.")
    cancellation.raise_if_requested()


def test_interrupt_raises_in_synchronous_code(cancellation: Cancellation) -> None:
    with pytest.raises(TaskCancelled):
        copy_context().run(cancellation.interrupt)
    cancellation.interrupt()


def run_watched(cancellation: Cancellation, coroutine: Any) -> Any:
    """
    Run `coroutine` in an asyncio task that `cancellation` watches, as a worker runs a coroutine.
    """

    async def watch() -> Any:
        task = asyncio.current_task()
        assert task is not None
        cancellation.watch(asyncio.get_running_loop(), task)
        try:
            return await coroutine
        finally:
            cancellation.unwatch()

    return asyncio.run(watch())


async def wait_to_be_cancelled() -> None:
    await asyncio.wait_for(asyncio.Event().wait(), LIMIT)


@pytest.mark.parametrize("method", ["request", "interrupt"])
def test_a_coroutine_is_cancelled_from_another_thread(
    cancellation: Cancellation, method: str
) -> None:
    async def ask_a_thread() -> None:
        await asyncio.to_thread(getattr(cancellation, method))
        await wait_to_be_cancelled()

    with pytest.raises(asyncio.CancelledError):
        run_watched(cancellation, ask_a_thread())
    assert cancellation.has_cancelled_coroutine


def test_a_coroutine_that_was_cancelled_before_it_begins(cancellation: Cancellation) -> None:
    cancellation.request()
    with pytest.raises(asyncio.CancelledError):
        run_watched(cancellation, wait_to_be_cancelled())
    assert cancellation.has_cancelled_coroutine


def test_a_coroutine_is_cancelled_once(cancellation: Cancellation) -> None:
    async def clean_up() -> str:
        try:
            await wait_to_be_cancelled()
        except asyncio.CancelledError:
            cancellation.request()
            await asyncio.sleep(0)  # would raise a second CancelledError
        return "cleaned up"

    cancellation.request()
    assert run_watched(cancellation, clean_up()) == "cleaned up"


def test_a_step_may_be_faster_than_the_event_loop(cancellation: Cancellation) -> None:
    """
    If raise_if_requested() delivers a request first, the event loop does not cancel the coroutine.
    """

    async def report() -> str:
        cancellation.request()
        with pytest.raises(TaskCancelled):
            cancellation.raise_if_requested()
        await asyncio.sleep(0)
        return "goes on"

    assert run_watched(cancellation, report()) == "goes on"
    assert not cancellation.has_cancelled_coroutine


def test_after_the_end_of_a_coroutine_nothing_is_delivered(cancellation: Cancellation) -> None:
    assert run_watched(cancellation, asyncio.sleep(0, "done")) == "done"
    cancellation.interrupt()
    assert not cancellation.has_cancelled_coroutine


def test_a_loop_that_is_closed_concurrently(cancellation: Cancellation) -> None:
    loop = asyncio.new_event_loop()
    task = loop.create_task(asyncio.sleep(0))
    loop.run_until_complete(task)
    cancellation.watch(loop, task)
    loop.close()
    cancellation.request()
    assert not cancellation.has_cancelled_coroutine
