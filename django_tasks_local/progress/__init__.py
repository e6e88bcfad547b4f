"""Offer the code of a task current_result_id, report_progress() and track()."""

from typing import Any

from ..aliases import Number
from .reporter import current_reporting, current_result_id
from .tracking import track
from .values import MAX_INT, UNSET, Unset, check_message, check_number, check_total, copy_json

__all__ = ["current_result_id", "report_progress", "track"]


def report_progress(
    current: Number | Unset | None = UNSET,
    total: Number | Unset | None = UNSET,
    message: str | Unset | None = UNSET,
    **data: Any,
) -> None:
    """
    Report the progress of the running task. Called from: any thread that has the task's context.

    asyncio.to_thread() and sync_to_async() pass the task's context to the thread that they use.
    threading.Thread and ThreadPoolExecutor do not, so a call in one of their threads counts as
    outside of a task, unless the task passes its context itself with contextvars.copy_context():
    `executor.submit(copy_context().run, function, argument)`. From Python 3.14, a new thread
    inherits the context on builds without a GIL.

    An omitted argument keeps its last value; None means unknown. `total` starts as 100, so
    `current` alone is a percentage. `data` must be JSON and replaces the data of the last report.
    Outside of a task, report_progress() only checks its arguments.

    Raises TypeError or ValueError, naming the argument, for a value that is not a finite number,
    a total that is not above zero, a message that is not text, and data that is not JSON.
    Raises TaskCancelled, once, after the task was cancelled.
    """
    # These lines check the usual types themselves, because calling check_number() and
    # check_total() would take longer than the rest of a throttled report.
    if not (current is UNSET or (type(current) is int and 0 <= current < MAX_INT)):
        current = check_number("current", current)
    if not (total is UNSET or (type(total) is int and 0 < total < MAX_INT)):
        total = check_total(total)
    if message is not UNSET and type(message) is not str:
        message = check_message(message)
    run = current_reporting.get(None)
    copied = copy_json(data) if data else UNSET
    if run is not None:
        (run.reporter or run.get_reporter()).report(current, total, message, copied)
