"""
Run the clients of benchmarks/streams.py: many connections in one process.

Each line of stdin is a command with its arguments in JSON, each line of stdout its answer. There
are two kinds. `epoll` is one loop around raw sockets that only searches for time stamps: it takes
little CPU time from the server, so differences between servers are visible. `asyncio` is the usual
client in Python: one asyncio task for each connection, which reads one event after the other.
"""

import asyncio
import json
import select
import socket
import sys
import time

# This character precedes the time at which an event was published: time.monotonic_ns(), in 20
# digits. It occurs nowhere else in a response, so the clients count it to count events.
STAMP = "~"
DIGITS = 20

OPENING = 50  # At most this number of connections wait for their first event at the same time.
PATIENCE = 60.0  # Seconds within which all connections must receive their first event.
SIZE = 65536  # The maximum number of bytes of one recv().


class EpollClients:
    """Holds all connections, and the latencies since the last command `expect`."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        self.latencies: list[int] = []  # Nanoseconds from the publication of an event to recv().
        self.received = 0
        self.last = 0

    def run(self) -> None:
        """Receive events and answer commands until stdin ends."""
        self.epoll.register(sys.stdin.fileno(), select.EPOLLIN)
        while True:
            for descriptor, _ in self.epoll.poll():
                if descriptor != sys.stdin.fileno():
                    self.receive(descriptor)
                elif line := sys.stdin.readline():
                    command, *arguments = json.loads(line)
                    print(json.dumps(getattr(self, command)(*arguments)), flush=True)
                else:
                    return

    def connect(self, count: int, port: int, path: str, cookie: str) -> None:
        """Open `count` streams and wait until each has received its first event."""
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode()
        deadline = time.monotonic() + PATIENCE
        opening: set[int] = set()
        while len(self.sockets) < count or opening:
            if len(self.sockets) < count and len(opening) < OPENING:
                opening.add(self._open(port, request))
                continue
            for descriptor, _ in self.epoll.poll(max(0.0, deadline - time.monotonic())):
                if b"event: " in self.sockets[descriptor].recv(SIZE):
                    opening.discard(descriptor)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(opening)} streams received no event in {PATIENCE} s")

    def _open(self, port: int, request: bytes) -> int:
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(request)
        connection.setblocking(False)
        self.sockets[connection.fileno()] = connection
        self.epoll.register(connection.fileno(), select.EPOLLIN)
        return connection.fileno()

    def expect(self) -> None:
        """Clear the latencies and the number of events before the next events are published."""
        self.latencies.clear()
        self.received = 0

    def receive(self, descriptor: int) -> None:
        """Read from one connection; count its events and record the latency of the first."""
        try:
            data = self.sockets[descriptor].recv(SIZE)
        except BlockingIOError:
            return  # A command in the same poll has already read the data.
        now = time.monotonic_ns()
        if not data:
            raise ConnectionError("the server closed a stream")
        found = data.count(STAMP.encode())
        if not found:
            return
        self.received += found
        self.last = now
        start = data.index(STAMP.encode()) + 1
        digits = data[start : start + DIGITS]
        if len(digits) == DIGITS:
            self.latencies.append(now - int(digits))

    def wait(self, events: int, silence: float) -> list[object]:
        """
        Receive until `events` events have arrived, or none has for `silence` seconds.

        Returns the number of events, the arrival time of the last one, and the latencies. Times are
        in nanoseconds.
        """
        while self.received < events:
            before = self.received
            for descriptor, _ in self.epoll.poll(silence):
                self.receive(descriptor)
            if self.received == before:
                break
        return [self.received, self.last, self.latencies]


class AsyncioClients:
    """Carries out the same commands as EpollClients, with one asyncio task per connection."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []
        self.latencies: list[int] = []  # Nanoseconds from the publication of an event to its read.
        self.begun = self.received = self.last = 0
        self.arrived = asyncio.Event()

    def run(self) -> None:
        """Run answer() in a new event loop."""
        asyncio.run(self.answer())

    async def answer(self) -> None:
        """Read commands from stdin and print their answers until stdin ends."""
        while line := await asyncio.to_thread(sys.stdin.readline):
            command, *arguments = json.loads(line)
            print(json.dumps(await getattr(self, command)(*arguments)), flush=True)

    async def connect(self, count: int, port: int, path: str, cookie: str) -> None:
        """Do the same as EpollClients.connect()."""
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode()
        async with asyncio.timeout(PATIENCE):
            for number in range(1, count + 1):
                self.tasks.append(asyncio.create_task(self.read(port, request)))
                while number - self.begun >= OPENING or (number == count and self.begun < count):
                    await self.wait_for_arrival()

    async def read(self, port: int, request: bytes) -> None:
        """Open one stream; count its events and record the latency of each."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        while b"event: " not in await reader.readuntil(b"\n\n"):
            pass
        self.begun += 1
        self.arrived.set()
        while True:
            data = await reader.readuntil(b"\n\n")
            now = time.monotonic_ns()
            _, found, rest = data.partition(STAMP.encode())
            if found:
                self.received += 1
                self.last = now
                self.latencies.append(now - int(rest[:DIGITS]))
                self.arrived.set()

    async def wait_for_arrival(self) -> None:
        """Wait until any stream has received an event."""
        self.arrived.clear()
        await self.arrived.wait()

    async def expect(self) -> None:
        """Do the same as EpollClients.expect()."""
        self.latencies.clear()
        self.received = 0

    async def wait(self, events: int, silence: float) -> list[object]:
        """Do the same as EpollClients.wait()."""
        while self.received < events:
            try:
                async with asyncio.timeout(silence):
                    await self.wait_for_arrival()
            except TimeoutError:
                break
        return [self.received, self.last, self.latencies]


if __name__ == "__main__":
    {"epoll": EpollClients, "asyncio": AsyncioClients}[sys.argv[1]]().run()
