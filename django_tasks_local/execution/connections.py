"""Close old database connections and caches, as Django does at the end of a request."""

from __future__ import annotations

import select
import sys
import threading
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from django.core.cache import close_caches
from django.db import close_old_connections, connections
from django.db.backends.signals import connection_created
from django.dispatch import receiver

from ..databases import is_test_run
from ..logs import get_logger
from ..progress.reporter import current_reporting, current_result_id

if TYPE_CHECKING:
    from collections.abc import Callable

logger = get_logger(__name__)


class _Thread(threading.local):
    """Holds state that each thread has for itself."""

    has_connected = False  # True once the thread has opened a database connection.


_thread = _Thread()


@receiver(connection_created, dispatch_uid="django_tasks_local.connection_created")
def _on_connection_created(**kwargs: Any) -> None:
    _thread.has_connected = True


def close_old_resources() -> None:
    """
    Close the calling thread's old connections and its context's caches, as after a request.

    In a test run it closes all connections, because the test database could not be dropped while
    one is open.
    Logs an error instead of raising it, because the error must not replace the task's outcome.
    """
    if _thread.has_connected:  # Without connections, skip the slow check of each alias.
        try_to(close_or_reset_connections)
    # Django stores an open cache in a context variable (asgiref's Local). close_caches() takes a
    # lock that all threads share, so call it only if the context has any variable besides this
    # package's own two.
    context = copy_context()
    if len(context) > (current_result_id in context) + (current_reporting in context):
        try_to(close_caches)


def close_or_reset_connections() -> None:
    """
    Close old connections, and prevent that a later task gets the state of a connection.

    A task may have chosen the schema of a tenant, for example. Django keeps such state in the
    connection's wrapper also after it has closed the connection, so the wrapper is discarded.
    """
    close_old_connections()
    closes_all = is_test_run()
    for connection in connections.all(initialized_only=True):
        if connection.in_atomic_block:
            continue
        if closes_all or connection.execute_wrappers or connection.force_debug_cursor:
            # A receiver of connection_created may have added wrappers, which must stay. Nothing
            # distinguishes them from those of the task, but a new connection has only the former.
            connection.close()
        if connection.connection is None:
            del connections[connection.alias]
        elif hasattr(connection, "set_schema_to_public"):  # django-tenants has this method.
            connection.set_schema_to_public()


def close_pools_of_test_run() -> None:
    """
    Close Django's connection pools in a test run. Called from: a worker process, after a task.

    In the process of the test runner, Django closes them when it drops the test database.
    """
    if is_test_run():
        for connection in connections.all():
            if hasattr(connection, "close_pool"):  # The backends of PostgreSQL and Oracle have it.
                try_to(connection.close_pool)


def drop_stale_connections() -> None:
    """
    Close the calling thread's database connections that the server has closed, e.g. at a restart.

    It also forgets the queries that Django has recorded with DEBUG, as before a request.

    Without this call, Django would notice a closed connection only when a query of the task fails.
    CONN_HEALTH_CHECKS would cost a query for each task. This function polls the socket, and sends
    a query only if the socket has unread data: the end of the connection, or a notice.
    """
    if _thread.has_connected:
        try_to(_drop_stale_connections)


def _drop_stale_connections() -> None:
    for connection in connections.all(initialized_only=True):
        connection.queries_log.clear()  # Django does this before a request, for DEBUG.
        if _has_unread_data(connection.connection) and not connection.is_usable():
            connection.close()


def _has_unread_data(driver_connection: Any) -> bool:
    """Return whether the socket has unread data, most likely because the server has closed it."""
    # The drivers psycopg and mysqlclient have fileno(), and PyMySQL has a socket. With another one,
    # and on Windows, which has no poll(), only CONN_HEALTH_CHECKS finds a closed connection.
    fileno = getattr(driver_connection, "fileno", None)
    if fileno is None:  # PyMySQL
        fileno = getattr(getattr(driver_connection, "_sock", None), "fileno", None)
    if fileno is None or sys.platform == "win32":
        return False
    poll = select.poll()
    try:
        poll.register(fileno(), select.POLLIN)
    except Exception:  # noqa: BLE001 - closed connections raise various errors
        return True
    return bool(poll.poll(0))


def close_thread_resources() -> None:
    """Close all database connections and caches of the calling thread, which is about to end."""
    if _thread.has_connected:
        try_to(connections.close_all)
    try_to(close_caches)


def try_to(close: Callable[[], None]) -> None:
    """Call one of Django's functions that close connections or caches; log its error."""
    try:
        close()
    except Exception:
        logger.exception("%s() failed before or after a task.", close.__name__)
