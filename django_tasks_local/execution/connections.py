"""Close old database connections and caches, as Django does at the end of a request."""

from __future__ import annotations

import logging
import select
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from django.core.cache import close_caches
from django.db import close_old_connections, connections
from django.db.backends.signals import connection_created
from django.dispatch import receiver

from ..progress.reporter import current_reporting, current_result_id

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class _Thread(threading.local):
    """State of the calling thread."""

    has_connected = False  # Whether it has opened a database connection, ever.


_thread = _Thread()


@receiver(connection_created, dispatch_uid="django_tasks_local.connection_created")
def _on_connection_created(**kwargs: Any) -> None:
    _thread.has_connected = True


def close_old_resources() -> None:
    """
    Close the calling thread's old connections and its context's caches, as after a request.

    An error is logged and not raised: it must not hide how the task ended.
    """
    if _thread.has_connected:  # Checking each alias takes as long as the rest of a task's end.
        try_to(close_old_connections)
    # An open cache is a variable of the context (asgiref's Local). Asking for one takes a lock
    # that all threads share and wait for, so first check whether the context has any variable
    # besides this package's own two.
    context = copy_context()
    if len(context) > (current_result_id in context) + (current_reporting in context):
        try_to(close_caches)


def drop_stale_connections() -> None:
    """
    Close the calling thread's connections that the database server has closed, as at its restart.

    Django notices a closed connection when a query fails, and then a task would fail with it.
    CONN_HEALTH_CHECKS costs a query for each task. This checks the socket, which has unread data
    only if the server has closed the connection.
    """
    if _thread.has_connected:
        try_to(_drop_stale_connections)


def _drop_stale_connections() -> None:
    for connection in connections.all(initialized_only=True):
        if _has_unread_data(connection.connection) and not connection.is_usable():
            connection.close()


def _has_unread_data(driver_connection: Any) -> bool:
    """Whether the server has sent data without a query: most likely that it closes."""
    # PostgreSQL's drivers have fileno(). Other drivers, and Windows, need CONN_HEALTH_CHECKS.
    fileno = getattr(driver_connection, "fileno", None)
    if fileno is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        poll.register(fileno(), select.POLLIN)
    except Exception:  # noqa: BLE001 - each driver raises its own for a closed connection
        return True
    return bool(poll.poll(0))


def close_thread_resources() -> None:
    """Close all connections of the calling thread, which is about to end, and the caches."""
    if _thread.has_connected:
        try_to(connections.close_all)
    try_to(close_caches)


def try_to(close: Callable[[], None]) -> None:
    """Call one of Django's functions that close something; log its error."""
    try:
        close()
    except Exception:
        logger.exception("%s() failed around a task.", close.__name__)
