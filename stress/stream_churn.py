"""
Read streams with clients of which some stop reading and some reconnect again and again.

    uv run stress/stream_churn.py [--readers 1000] [--seconds 30] [--seed 1]

Ten tasks report progress. One reader in ten stops reading at its first event, and one in ten
reconnects at random moments. Then the tasks finish and the stalled readers continue to read. The
exit status is 1 if a reader does not receive the final state of its task, if the server does not
close a socket, or if the server's memory grows in the last third of the run. The program runs on
Linux only.
"""

import argparse
import asyncio
import json
import random
import socket
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common.stream_server import Server, allow_descriptors, create_user
from benchmarks.common.tables import print_verdict

TASKS = 10
LIMIT = 60.0  # Within this number of seconds after the tasks' end each reader must receive it.
PATIENCE = 20.0  # Seconds within which the server must close the sockets of its readers.
# A reader that reconnects keeps each connection for a time between these numbers of seconds.
STAY = (0.1, 2.0)
RECEIVE_BUFFER = 4096  # The size in bytes of the receive buffer of a reader that stalls.
# The sizes in bytes of the server's send buffers for readers that stall and for other readers. With
# the system's default the kernel accepts megabytes before the server notices that a reader stalls.
SMALL_BUFFER, LARGE_BUFFER = 16_384, 1_048_576
SAMPLE_INTERVAL = 2.0  # Seconds between two samples of the server's memory.
MEMORY_BUDGET = 2.0  # The MiB by which the server's memory may grow in the last third of a run.
# The value of SO_LINGER with which close() sends RST, as the kernel does when a client crashes.
RESET = struct.pack("ii", 1, 0)


class Reader(asyncio.Protocol):
    """A client of one stream, with a new connection after each that it has closed."""

    def __init__(self, port: int, path: str, cookie: str, *, stalls: bool) -> None:
        self.port, self.path, self.cookie = port, path, cookie
        self.stalls = stalls  # Whether the reader stops reading at its first event.
        self.events = 0
        self.connections = 0
        self.last = b""  # The last event that the reader has received completely.
        self.buffer = b""
        self.transport: asyncio.Transport
        self.begun = asyncio.Event()  # Set when the reader has received its first event.
        self.ended = asyncio.Event()  # Set when the current connection is closed.

    async def connect(self) -> None:
        """Open a connection; after the first, request the events after the last one received."""
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
        # The request uses HTTP/1.0, because a server splits its response to HTTP/1.1 into chunks.
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
        """Return a field of the last event, as `id` or `data`, or an empty string."""
        for line in self.last.decode().splitlines():
            found, _, value = line.partition(": ")
            if found == name:
                return value
        return ""

    @property
    def has_final_state(self) -> bool:
        """Return whether the last event ends the stream and reports success with all steps done."""
        if not self.field("id").startswith("end-"):
            return False
        payload: dict[str, Any] = json.loads(self.field("data"))
        progress = payload["progress"]
        return payload["status"] == "SUCCESSFUL" and progress["current"] == progress["total"]

    async def drop(self, *, abruptly: bool) -> None:
        """Close the connection and wait until it is closed; send RST if `abruptly`."""
        if abruptly and not self.transport.is_closing():
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()
        await self.ended.wait()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The figures of one run, which run() prints and checks."""

    readers: int
    without_end: int
    connections: int
    events: int  # The number of events that one reader received that never stalled.
    # The largest number of events that any stalled reader received. It must be lower than `events`,
    # or the readers did not stall.
    stalled_events: int
    memory: list[float]  # The memory of the server in KiB, once for each SAMPLE_INTERVAL.


async def churn(
    readers: Sequence[Reader], server: Server, seconds: float, rng: random.Random
) -> Outcome:
    """Run the readers for `seconds`, let the tasks finish, and wait until all streams end."""
    stalled = [reader for reader in readers if reader.stalls]
    others = [reader for reader in readers if not reader.stalls]
    server.ask("set_send_buffer", SMALL_BUFFER)
    await connect_all(stalled)
    server.ask("set_send_buffer", LARGE_BUFFER)
    await connect_all(others)
    memory = []
    deadline = asyncio.get_running_loop().time() + seconds
    async with asyncio.TaskGroup() as group:
        for reader in others[: len(readers) // 10]:
            group.create_task(reconnect(reader, deadline, random.Random(rng.random())))
        while asyncio.get_running_loop().time() < deadline:
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
    """Connect all readers, at most 50 at a time, and wait for the first event of each."""
    opening = asyncio.Semaphore(50)

    async def connect(reader: Reader) -> None:
        async with opening:
            await reader.connect()
            await reader.begun.wait()

    async with asyncio.timeout(LIMIT), asyncio.TaskGroup() as group:
        for reader in readers:
            group.create_task(connect(reader))


async def reconnect(reader: Reader, deadline: float, rng: random.Random) -> None:
    """Drop the connection and connect again until the deadline, then stay connected."""
    loop = asyncio.get_running_loop()
    while loop.time() < deadline:
        await asyncio.sleep(min(rng.uniform(*STAY), deadline - loop.time()))
        await reader.drop(abruptly=rng.random() < 0.5)
        await reader.connect()


def run(count: int, seconds: float, seed: int) -> bool:
    """Run once, print the figures, and return whether there is no violation."""
    rng = random.Random(seed)
    with TemporaryDirectory() as directory:
        cookie = create_user(Path(directory) / "db.sqlite3")
        with Server("ours", Path(directory) / "db.sqlite3") as server:
            before = server.sockets()
            paths = server.ask("start_tasks", TASKS)
            readers = [
                # Every tenth reader stalls; rng draws the task of each reader independently.
                Reader(server.port, path, cookie, stalls=number % 10 == 0)
                for number, path in zip(range(count), rng.choices(paths, k=count), strict=True)
            ]
            outcome = asyncio.run(churn(readers, server, seconds, rng))
            deadline = time.monotonic() + PATIENCE
            while (left := server.sockets() - before) and time.monotonic() < deadline:
                time.sleep(0.05)
    print(
        f"Seed {seed}: {outcome.readers} readers, {outcome.connections} connections; "
        f"{outcome.without_end} readers are without the final state.",
        f"A reader that never stalled saw {outcome.events} events, a stalled one at most "
        f"{outcome.stalled_events}.",
        sep="\n",
    )
    print(f"The server has {left} sockets left. Its memory in MiB, every two seconds:")
    print(*(f"{kibibytes / 1024:.0f}" for kibibytes in outcome.memory))
    return outcome.without_end == 0 and left == 0 and is_flat(outcome.memory)


def is_flat(samples: Sequence[float]) -> bool:
    """Return whether memory grew by at most MEMORY_BUDGET from the second to the last third.

    With fewer than 15 samples the result is always True.
    """
    third = len(samples) // 3
    if third < 5:
        return True
    growth = (median(samples[-third:]) - median(samples[third:-third])) / 1024
    print_verdict("growth of memory in the last third", growth, MEMORY_BUDGET, "MiB")
    return growth <= MEMORY_BUDGET


def main() -> None:
    """Run once with the options of the command line; exit with 1 after a violation."""
    parser = argparse.ArgumentParser(description="Readers that stall, disconnect and reconnect.")
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    allow_descriptors(options.readers)
    sys.exit(0 if run(options.readers, options.seconds, options.seed) else 1)


if __name__ == "__main__":
    main()
