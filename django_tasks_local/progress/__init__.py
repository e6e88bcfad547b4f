"""Offer the code of a task current_result_id, report_progress() and track()."""

from typing import Any

from ..aliases import Number
from .reporter import current_reporting, current_result_id
from .tracking import track
from .values import MAX_INT, UNSET, Unset, check_number, check_text, check_total, copy_data

__all__ = ["current_result_id", "report_progress", "track"]


def report_progress(
    current: Number | Unset | None = UNSET,
    total: Number | Unset | None = UNSET,
    message: str | Unset | None = UNSET,
    *,
    data: dict[str, Any] | Unset | None = UNSET,
    unit: str | Unset | None = UNSET,
) -> None:
    """
    Report the progress of the running task. Called from: any thread that has the task's context.

    asyncio.to_thread() and sync_to_async() pass the task's context to the thread that they use.
    threading.Thread and ThreadPoolExecutor do not, so a call in one of their threads counts as
    outside of a task, unless the task passes its context itself with contextvars.copy_context():
    `executor.submit(copy_context().run, function, argument)`. From Python 3.14, a new thread
    inherits the context on builds without a GIL.

    An omitted argument keeps its last value; None means unknown, and no message, unit or data.
    `total` starts as 100, so `current` alone is a percentage; a total of 0 means that there is
    nothing to do, which is 100 %. `unit` names what `current` counts. `data` replaces the data of
    the last report. It is encoded with DjangoJSONEncoder; a value that cannot be encoded is
    dropped, and one warning per task is logged. Outside of a task, report_progress() only checks
    its arguments.

    Raises TypeError or ValueError, naming the argument, for a value that is not a finite number, a
    negative total, a message or unit that is not text, and data that is not a dict.
    Raises TaskCancelled, once, after the task was cancelled.
    """
    # These lines check the usual types themselves, because calling check_number() and
    # check_total() would take longer than the rest of a throttled report.
    if not (current is UNSET or (type(current) is int and 0 <= current < MAX_INT)):
        current = check_number("current", current)
    if not (total is UNSET or (type(total) is int and 0 <= total < MAX_INT)):
        total = check_total(total)
    if message is not UNSET and type(message) is not str:
        message = check_text("message", message)
    run = current_reporting.get(None)
    if unit is UNSET and data is UNSET:
        if run is not None:
            (run.reporter or run.get_reporter()).report(current, total, message)
        return
    if unit is not UNSET:
        unit = check_text("unit", unit)
    if data is not UNSET and not isinstance(data, dict):
        if data is not None:
            raise TypeError(f"data must be a dict or None, not {data!r:.100}.")
        data = {}
    if run is None:
        return
    reporter = run.reporter or run.get_reporter()
    if data is not UNSET and data:
        data, dropped = copy_data(data)
        if dropped:
            reporter.warn_of_dropped_data(dropped)
    reporter.report(current, total, message, unit, data)
