"""
Readers that stall, and readers that come and go. See `uv run benchmarks/streams.py --churn`.

Tasks report while one reader in ten does not read, and one in ten connects anew at random. In the
end the tasks finish, all who have stalled read on, and everybody must have the final state.
"""

import asyncio
import json
import random
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

LIMIT = 60.0  # seconds for all readers to have the end, once the tasks are finished
STAY = (0.1, 2.0)  # seconds that a reader which comes and goes stays
RECEIVE_BUFFER = 4096  # bytes, of a reader that stalls
SMALL_BUFFER, LARGE_BUFFER = 16_384, 1_048_576  # bytes, for sending to those that stall and others
SAMPLE_INTERVAL = 2.0  # seconds between two looks at the server's memory
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST, as if the client had crashed


class Reader(asyncio.Protocol):
    """One client, over all of its connections."""

    def __init__(self, port: int, path: str, cookie: str, stalls: bool) -> None:
        self.port, self.path, self.cookie = port, path, cookie
        self.stalls = stalls  # It stops to read at its first event.
        self.events = 0
        self.connections = 0
        self.last = b""  # the last complete event
        self.buffer = b""
        self.transport: asyncio.Transport
        self.begun = asyncio.Event()  # There was an event.
        self.ended = asyncio.Event()  # The present connection is closed.

    async def connect(self) -> None:
        """Open a connection, and go on where the one before has ended."""
        connection = socket.socket()
        connection.setblocking(False)
        if self.stalls:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, ("127.0.0.1", self.port))
        self.buffer = b""
        self.ended = asyncio.Event()
        self.connections += 1
        await loop.create_connection(lambda: self, sock=connection)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        # HTTP/1.0, so that the response comes as it is and not in chunks.
        lines = [f"GET {self.path} HTTP/1.0", "Host: localhost", f"Cookie: {self.cookie}"]
        if self.last:
            lines.append(f"Last-Event-ID: {self.field('id')}")
        transport.write("\r\n".join([*lines, "", ""]).encode())

    def data_received(self, data: bytes) -> None:
        *blocks, self.buffer = (self.buffer + data).split(b"\n\n")
        for block in blocks:
            if b"data: " in block:
                self.events += 1
                self.last = block
                if self.stalls and not self.begun.is_set():
                    self.transport.pause_reading()
                self.begun.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.ended.set()

    def field(self, name: str) -> str:
        """Return a field of the last event."""
        for line in self.last.decode().splitlines():
            found, _, value = line.partition(": ")
            if found == name:
                return value
        return ""

    @property
    def has_final_state(self) -> bool:
        """Whether the last event says that the task is done, with all of its steps, and no more."""
        if not self.field("id").startswith("end-"):
            return False
        payload: dict[str, Any] = json.loads(self.field("data"))
        progress = payload["progress"]
        return payload["status"] == "SUCCESSFUL" and progress["current"] == progress["total"]

    async def drop(self, abruptly: bool) -> None:
        """Close the connection, abruptly or not."""
        if abruptly and not self.transport.is_closing():
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()
        await self.ended.wait()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the readers have fared."""

    readers: int
    without_end: int
    connections: int
    events: int  # seen by a reader that reads all the time
    stalled_events: int  # seen by one that stalled: fewer, or it did not stall
    memory: list[float]  # KiB of the server, at each SAMPLE_INTERVAL


class Server(Protocol):
    """What is needed of the server."""

    def ask(self, command: str, *arguments: object) -> Any:
        """Give a command and return its answer."""

    def kibibytes(self) -> float:
        """Return the resident memory."""


async def churn(
    readers: Sequence[Reader], server: Server, seconds: float, rng: random.Random
) -> Outcome:
    """Let the readers read, stall, come and go for some seconds, and the tasks finish then."""
    stalled = [reader for reader in readers if reader.stalls]
    others = [reader for reader in readers if not reader.stalls]
    # With the system's own buffer, one that does not read is not noticed before some megabytes.
    server.ask("set_send_buffer", SMALL_BUFFER)
    await connect_all(stalled)
    server.ask("set_send_buffer", LARGE_BUFFER)
    await connect_all(others)
    memory = []
    over = asyncio.get_running_loop().time() + seconds
    async with asyncio.TaskGroup() as group:
        for reader in others[: len(readers) // 10]:
            group.create_task(come_and_go(reader, over, random.Random(rng.random())))
        while asyncio.get_running_loop().time() < over:
            server.ask("collect_garbage")
            memory.append(server.kibibytes())
            await asyncio.sleep(SAMPLE_INTERVAL)
    server.ask("finish_tasks")
    for reader in stalled:
        reader.transport.resume_reading()
    ends = [asyncio.create_task(reader.ended.wait()) for reader in readers]
    await asyncio.wait(ends, timeout=LIMIT)
    return Outcome(
        readers=len(readers),
        without_end=sum(not reader.has_final_state for reader in readers),
        connections=sum(reader.connections for reader in readers),
        events=others[-1].events,
        stalled_events=max(reader.events for reader in stalled),
        memory=memory,
    )


async def connect_all(readers: Sequence[Reader]) -> None:
    """Connect everybody, a few at a time, and wait for their first events."""
    opening = asyncio.Semaphore(50)

    async def connect(reader: Reader) -> None:
        async with opening:
            await reader.connect()
            await reader.begun.wait()

    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(connect(reader))


async def come_and_go(reader: Reader, over: float, rng: random.Random) -> None:
    """Connect again and again until it is over, and then stay."""
    loop = asyncio.get_running_loop()
    while loop.time() < over:
        await asyncio.sleep(min(rng.uniform(*STAY), over - loop.time()))
        await reader.drop(abruptly=rng.random() < 0.5)
        await reader.connect()
