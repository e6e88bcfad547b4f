"""run_coroutine() runs the coroutine of a task and cancels it at most once."""

import asyncio

import pytest

from django_tasks_local.cancellation import Cancellation
from django_tasks_local.exceptions import TaskCancelled
from django_tasks_local.execution.coroutines import run_coroutine
from tests.support.interruptions import each_call
from tests.support.waiting import LIMIT


async def wait_to_be_cancelled() -> None:
    await asyncio.wait_for(asyncio.Event().wait(), LIMIT)


def test_a_signal_handler_interrupts_the_start_of_a_coroutine() -> None:
    """A signal handler that cancels the task before the loop runs leaves no coroutine unawaited."""
    for interruption in each_call(("django_tasks_local.", "asyncio.runners")):
        cancellation = Cancellation()

        async def cancel_itself(cancellation: Cancellation = cancellation) -> None:
            cancellation.interrupt()  # This has no effect if `interruption` came before it.
            await wait_to_be_cancelled()

        with pytest.raises(TaskCancelled), interruption.by(cancellation.interrupt):
            run_coroutine(cancel_itself, cancellation)
        assert cancellation.requested


def test_a_coroutine_function_that_raises_before_its_coroutine_exists() -> None:
    """run_coroutine() raises the error of a call with wrong arguments."""
    with pytest.raises(TypeError, match="positional argument"):
        run_coroutine(lambda: wait_to_be_cancelled("unexpected"), Cancellation())  # type: ignore[call-arg]
