"""A web server whose pages, files and event streams a test controls."""

import asyncio
import json
import mimetypes
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.paths import ROOT

STATIC = ROOT / "static"
TIMEOUT = 20.0  # seconds that a wait may take at most
SLOW = "<!-- slow -->"  # The server sends the rest of the page after the test sets `released`.

type Payload = Mapping[str, Any]


class Stream:
    """
    A request for events that the server answers with 200 and keeps open until either side closes
    it.
    """

    def __init__(self, target: str, headers: Mapping[str, str], writer: asyncio.StreamWriter):
        self.target = target
        self.headers = headers
        self.tasks = _tasks(target)
        self.closed = asyncio.Event()  # set when the browser or end() closes the stream
        self._writer = writer

    async def send(self, *payloads: Payload) -> None:
        for payload in payloads:
            await self.raw(f"event: {payload['kind']}\ndata: {json.dumps(payload)}\n\n")

    async def raw(self, text: str) -> None:
        self._writer.write(text.encode())
        await self._writer.drain()

    async def end(self) -> None:
        self._writer.close()
        self.closed.set()

    async def wait_closed(self) -> None:
        async with asyncio.timeout(TIMEOUT):
            await self.closed.wait()


class ScriptedServer:
    """
    A web server that puts each request under `/events/` into a queue, as a Stream for
    next_stream().

    The next number in `answers`, or `status` if there is none, is the status of the response. A
    status other than 200 ends the request without a Stream.
    """

    def __init__(self) -> None:
        self.url = ""
        self.pages: dict[str, str] = {}
        self.page_headers: dict[str, str] = {}
        self.requests: list[str] = []  # targets of all requests for event streams
        self.open = 0  # the number of open streams
        self.status = 200
        self.answers: deque[int] = deque()
        self.released = asyncio.Event()
        self._streams: asyncio.Queue[Stream] = asyncio.Queue()
        self._writers: set[asyncio.StreamWriter] = set()
        self._arrived = asyncio.Condition()

    async def next_stream(self) -> Stream:
        async with asyncio.timeout(TIMEOUT):
            return await self._streams.get()

    async def wait_requests(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT), self._arrived:
            await self._arrived.wait_for(lambda: len(self.requests) >= count)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["ScriptedServer"]:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.url = f"http://{host}:{port}"
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.close()
            async with asyncio.timeout(TIMEOUT):
                await server.wait_closed()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            pairs = (line.split(": ", 1) for line in lines if line)
            headers = {name.lower(): value for name, value in pairs}
            await self._answer(request.split()[1], headers, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # Browsers open connections in advance and close some without a request.
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(
        self,
        target: str,
        headers: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        path = urlsplit(target).path
        if path.startswith("/events/"):
            await self._events(target, headers, reader, writer)
        elif path in self.pages:
            kind = mimetypes.guess_type(path)[0] or "text/html; charset=utf-8"
            _respond(writer, 200, kind, self.page_headers)
            at_once, slow, rest = self.pages[path].partition(SLOW)
            writer.write(at_once.encode())
            if slow:
                await self.released.wait()
            writer.write(rest.encode())
        elif path.startswith("/static/"):
            file = STATIC / path.removeprefix("/static/")
            _respond(writer, 200, mimetypes.guess_type(file)[0] or "text/plain")
            writer.write(file.read_bytes())
        else:
            _respond(writer, 204 if path == "/favicon.ico" else 404)

    async def _events(
        self,
        target: str,
        headers: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        status = self.answers.popleft() if self.answers else self.status
        async with self._arrived:
            self.requests.append(target)
            self._arrived.notify_all()
        if status != 200:
            _respond(writer, status)
            return
        _respond(writer, 200, "text/event-stream", {"Cache-Control": "no-cache"})
        stream = Stream(target, headers, writer)
        await stream.raw("retry: 50\n\n")
        self.open += 1
        self._streams.put_nowait(stream)
        try:
            await reader.read()  # returns when the browser or end() closes the connection
        finally:
            self.open -= 1
            stream.closed.set()


def _respond(
    writer: asyncio.StreamWriter,
    status: int,
    content_type: str = "text/plain",
    headers: Mapping[str, str] | None = None,
) -> None:
    lines = [f"HTTP/1.1 {status} Scripted", f"Content-Type: {content_type}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())


def _tasks(target: str) -> list[str]:
    tokens = parse_qs(urlsplit(target).query).get("task", [])
    return [unquote(token.split(".")[0]) for token in tokens]
