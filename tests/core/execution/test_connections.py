"""The check for database connections that the server has closed."""

import socket
import sys

import pytest

from django_tasks_local.execution.connections import _has_unread_data


class PyMySQLConnection:
    """Has the one attribute of a connection of PyMySQL that the check reads."""

    def __init__(self, sock: socket.socket | None) -> None:
        self._sock = sock


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no poll()")
def test_closed_connection_of_pymysql_is_not_noticed() -> None:
    ours, servers = socket.socketpair()
    with ours, servers:
        connection = PyMySQLConnection(ours)
        assert not _has_unread_data(connection)
        servers.close()
        assert _has_unread_data(connection)
    assert not _has_unread_data(PyMySQLConnection(None))
