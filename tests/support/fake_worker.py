"""FakeWorker replaces a worker process in tests of the parent's code."""

import multiprocessing
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from multiprocessing import Pipe
from typing import Any

from django_tasks_local.processes import facilities
from django_tasks_local.processes.connection import WorkerConnection
from django_tasks_local.processes.task import ProcessTask
from django_tasks_local.processes.tickets import TicketReader, Tickets
from django_tasks_local.processes.wire import encode_task
from django_tasks_local.processes.worker_process import WorkerProcess
from tests.project import tasks


class FakeProcess:
    """A stand-in for a process that records the names of the methods that are called."""

    def __init__(self, exitcode: int | None = 0) -> None:
        self.exitcode = exitcode
        self.pid: int | None = None
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args: self.calls.append(name)


class FakeWorker:
    """
    A WorkerProcess with a FakeProcess, the worker's end of its socket, and a clock that tests set.
    """

    def __init__(self, exitcode: int | None = 0) -> None:
        self.now = 100.0
        self.process = FakeProcess(exitcode)
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.lifeline, lifeline = Pipe(duplex=False)
        process: Any = self.process
        tickets = None
        if facilities.HAS_TICKETS:
            tickets = self.tickets = Tickets(multiprocessing.get_context("spawn"))
            self.reader = TicketReader(self.tickets.pipe.fileno())
        connection = WorkerConnection(ours, lifeline, tickets)
        self.parent = WorkerProcess("fake@1", process, connection, clock=lambda: self.now)

    def close(self) -> None:
        """Close all descriptors of the parent and of the worker."""
        self.parent.connection.close()
        self.sock.close()
        self.lifeline.close()


def new_task(id: str = "id", *args: Any) -> ProcessTask:
    """Return the record of a task that no worker has received."""
    now = datetime.now(UTC)
    body = encode_task(id, tasks.noop, list(args), {}, now)
    return ProcessTask(tasks.noop, id, list(args), {}, "default", now, 0.05, body)
