"""
Define the Django project of benchmarks/streams.py and its four ways to stream.

Every side sends the same payload (that of this package), encodes it once per event, and begins
each stream with the current state. The three sides that run on Django have the usual middleware
and load the logged-in user, so each request uses the database.
"""

from __future__ import annotations

import asyncio
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application
from django.db import connections
from django.http import HttpRequest, StreamingHttpResponse
from django.tasks import TaskResult, TaskResultStatus, task
from django.test import RequestFactory
from django.urls import include, path
from django.utils import timezone
from django_eventstream import send_event

from benchmarks.sides.stream_client import STAMP
from django_tasks_local import report_progress
from django_tasks_local.events import EventKind, Progress, TaskEvent
from django_tasks_local.hub import hub
from django_tasks_local_sse import encoding
from django_tasks_local_sse.access import events_url
from django_tasks_local_sse.conf import SSESettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

TASK_ID = "2f1c8f7e-0000-4000-8000-000000000000"
HEADERS = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]

type Message = dict[str, Any]


def make_event(sequence: int) -> TaskEvent:
    """Return a TaskEvent whose message is stamp(), the current time."""
    now = timezone.now()
    return TaskEvent(
        id=TASK_ID,
        sequence=sequence,
        kind=EventKind.PROGRESS,
        status=TaskResultStatus.RUNNING,
        name="resize",
        backend="default",
        progress=Progress(current=3, total=10, percent=30.0, message=stamp(), rate=1.5, eta=4.7),
        enqueued_at=now,
        started_at=now,
    )


def stamp() -> str:
    """Return the current time in the form in which stream_client.py searches for it."""
    return f"{STAMP}{time.monotonic_ns():020d}"


def payload(event: TaskEvent) -> dict[str, Any]:
    """Return the payload of an event as a dict."""
    return encoding.payload(event, SSESettings())


def encode(event: TaskEvent) -> bytes:
    """Return the bytes of a server-sent event, with an id as long as the ids of this package."""
    message = encoding.encode(event, SSESettings())
    return encoding.with_id("0" * 32, message)


class Side(Protocol):
    """Declares the attributes and methods of each way to stream."""

    path: str  # The path of the stream's URL.

    def prepare(self) -> None:
        """Prepare this side. Called in the main thread before the server starts."""

    def application(self) -> Any:
        """Return the ASGI application. Called in the event loop."""

    def publish(self, event: TaskEvent) -> None:
        """Send an event to all streams. Called in a thread."""


class DjangoSide:
    """Provides the methods that the sides with a Django view have in common."""

    path = ""

    def prepare(self) -> None:
        """Do nothing, because this side needs no preparation."""

    def application(self) -> Any:
        """Return Django's ASGI application."""
        return get_asgi_application()


class Ours(DjangoSide):
    """Streams with the view of this package; publishes events to the hub directly."""

    def prepare(self) -> None:
        self.publish(make_event(1))  # Without an event the stream would report an unknown task.
        # events_url() reads only the two attributes of the result that are set below.
        result = object.__new__(TaskResult)
        object.__setattr__(result, "id", TASK_ID)
        object.__setattr__(result, "backend", "default")
        self.path = events_path(result)

    def publish(self, event: TaskEvent) -> None:
        hub.publish(event, keep=True)  # The backends of this package also set keep=True.


class Reported(Ours):
    """Streams with the view of this package; a real task calls report_progress()."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[None] = SimpleQueue()

    def prepare(self) -> None:
        self.path = events_path(task(report).enqueue())

    def publish(self, event: TaskEvent) -> None:
        self.calls.put(None)


class EventStream(DjangoSide):
    """Streams with the view of django-eventstream, without storage."""

    path = "/eventstream/"

    def publish(self, event: TaskEvent) -> None:
        send_event("task", str(event.kind), payload(event))


class Plain(DjangoSide):
    """Streams in the simplest way in Django: an async view with one asyncio.Queue per stream."""

    path = "/plain/"

    def __init__(self) -> None:
        self.queues: set[asyncio.Queue[bytes]] = set()

    def application(self) -> Any:
        self.loop = asyncio.get_running_loop()
        return super().application()

    def publish(self, event: TaskEvent) -> None:
        self.loop.call_soon_threadsafe(self._put, encode(event))

    def _put(self, message: bytes) -> None:
        for listener in self.queues:
            listener.put_nowait(message)

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the current state, then each published event."""
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.queues.add(queue)
        try:
            yield encode(make_event(1))
            while True:
                yield await queue.get()
        finally:
            self.queues.discard(queue)


class Bare:
    """Streams with an ASGI application without Django, whose cost is the lower limit."""

    path = "/"

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future[bytes]] = []

    def application(self) -> Any:
        self.loop = asyncio.get_running_loop()
        return self._serve

    def prepare(self) -> None:
        """Do nothing, because this side needs no preparation."""

    def publish(self, event: TaskEvent) -> None:
        self.loop.call_soon_threadsafe(self._wake, encode(event))

    def _wake(self, message: bytes) -> None:
        waiting, self.waiting = self.waiting, []
        for future in waiting:
            if not future.done():
                future.set_result(message)

    async def _serve(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        async def stream() -> None:
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            message = encode(make_event(1))
            while True:
                await send({"type": "http.response.body", "body": message, "more_body": True})
                future = self.loop.create_future()
                self.waiting.append(future)
                message = await future

        await receive()  # This message has the empty body of the request.
        streaming = self.loop.create_task(stream())
        await receive()  # This call returns when the client disconnects.
        streaming.cancel()


def report() -> None:
    """Report progress once for each call of Reported.publish(): the task of that side."""
    report_progress(3, 10)
    while True:
        reported.calls.get()
        report_progress(3, 10, stamp())


working = threading.Event()
REPORT_INTERVAL = 0.25  # Seconds between two reports of work().
# The message of each report has 16 KiB, so that a few events fill the socket buffers of a client
# that does not read.
TEXT = "x" * 16_384


def work() -> None:
    """Report progress until `working` is cleared: the task of stress/stream_churn.py."""
    step = 0
    while working.is_set():
        step += 1
        report_progress(step, None, TEXT)
        time.sleep(REPORT_INTERVAL)
    report_progress(step, step, "done")


plain = Plain()
reported = Reported()
SIDES: dict[str, Side] = {
    "ours": Ours(),
    "reported": reported,
    "eventstream": EventStream(),
    "plain": plain,
    "bare": Bare(),
}


async def plain_view(request: HttpRequest) -> StreamingHttpResponse:
    """Load the logged-in user, then return the stream of the side Plain."""
    user = await request.auser()
    assert user.is_authenticated
    return StreamingHttpResponse(plain.stream(), content_type="text/event-stream")


def events_path(result: TaskResult[Any, Any]) -> str:
    """Return the URL of this package's stream for this result and the only user."""
    request = RequestFactory().get("/")
    request.user = User.objects.get()
    # Close the connection that the query above opened, because the benchmark counts connections.
    connections.close_all()
    return events_url(request, result)


urlpatterns = [
    path("tasks/", include("django_tasks_local_sse.urls")),
    path("eventstream/", include("django_eventstream.urls"), {"channels": ["task"]}),
    path("plain/", plain_view),
]
