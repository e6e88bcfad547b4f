"""Tests of the event streams that a server sends, from the first byte to the last."""

import asyncio
import dataclasses
import json
import logging
import re
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from datetime import timedelta
from typing import Any

import httpx
import pytest
from asgiref.sync import SyncToAsync, ThreadSensitiveContext, sync_to_async
from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created
from django.tasks import task_backends
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.exceptions import TaskResultDoesNotExist
from django.test import AsyncClient, Client, override_settings
from django.utils import timezone

from django_tasks_local import cancel
from django_tasks_local.events import EventKind, TaskEvent
from django_tasks_local.hub import hub
from django_tasks_local_sse import encoding, request_thread, streams
from django_tasks_local_sse.access import Denial, TaskRef, events_url
from django_tasks_local_sse.conf import sse_settings
from django_tasks_local_sse.conversation import Conversation
from django_tasks_local_sse.request_thread import release_request_thread
from tests.project import tasks
from tests.support.backends import settings_with
from tests.support.factories import anonymous_request
from tests.support.links import watch_token, with_tokens
from tests.support.sse_client import Message, messages, read_all, stream
from tests.support.waiting import LIMIT, AnyResult, finished, running, wait_until


def stream_url(server: str, *results: AnyResult) -> str:
    return server + events_url(anonymous_request(), *results)


def kinds(received: list[Message]) -> list[str]:
    return [message.event for message in received]


def test_stream_from_first_to_last_event(server: str, gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with stream(stream_url(server, result)) as received:
        first = next(received)
        assert (first.event, first.retry) == ("progress", 1000)
        tasks.gates[gate].set()
        rest = [message for message in received if message.data]
    assert kinds(rest) == ["finished"]
    payload = rest[-1].payload
    assert set(payload) == {
        "backend", "id", "run", "sequence", "kind", "status", "name", "position",
        "retried_from", "progress", "enqueued_at", "started_at", "finished_at", "error", "result",
    }  # fmt: skip
    identity = {key: payload[key] for key in ("backend", "id", "run", "kind", "status")}
    assert identity == {
        "backend": "default",
        "id": result.id,
        "run": 1,
        "kind": "finished",
        "status": "SUCCESSFUL",
    }
    assert payload["name"] == "gated"
    assert payload["progress"] == {
        "current": 10, "total": 100, "percent": 10.0, "message": "waiting for the test",
        "unit": "", "data": {}, "levels": [], "rate": None, "eta": None,
    }  # fmt: skip
    assert payload["sequence"] > first.payload["sequence"] > 2
    assert payload["enqueued_at"] <= payload["started_at"] <= payload["finished_at"]
    assert payload["result"] is None, "the return value is exposed"
    assert rest[-1].last_event_id.startswith("end-")


def test_events_are_ordered_and_end_with_finished(server: str) -> None:
    result = tasks.steps.enqueue(100, 0.002)
    received = read_all(stream_url(server, result))
    order = ["enqueued", "started", "progress", "finished"]
    positions = [order.index(kind) for kind in kinds(received)]
    assert positions == sorted(positions)
    assert kinds(received)[-1] == "finished"
    assert kinds(received).count("finished") == 1
    sequences = [message.payload["sequence"] for message in received]
    assert sequences == sorted(set(sequences))


def test_finished_task_is_sent_immediately(server: str) -> None:
    result = finished(tasks.add.enqueue(1))
    [message] = read_all(stream_url(server, result))
    assert message.payload["status"] == "SUCCESSFUL"


def test_stream_of_four_tasks(server: str, gate: str) -> None:
    done = finished(tasks.add.enqueue(1))
    busy = [running(tasks.gated.enqueue(gate)) for _ in range(3)]
    with stream(stream_url(server, done, *busy)) as received:
        states = {}
        while len(states) < 4:
            message = next(received)
            if message.data:
                states[message.payload["id"]] = message.event
        assert states == {done.id: "finished", **{result.id: "progress" for result in busy}}
        tasks.gates[gate].set()
        rest = [message for message in received if message.data]
    assert sorted(message.payload["id"] for message in rest) == sorted(r.id for r in busy)
    assert set(kinds(rest)) == {"finished"}
    assert [m.last_event_id.startswith("end-") for m in rest][-1]


def test_stream_of_200_tasks(server: str) -> None:
    results = [tasks.noop.enqueue() for _ in range(200)]
    received = read_all(server + with_tokens("events", *map(watch_token, results)))
    ended = {m.payload["id"] for m in received if m.event == "finished"}
    assert ended == {result.id for result in results}


# Tests of clients that reconnect with the header Last-Event-ID.


def test_reconnecting_while_the_task_runs(server: str, gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    url = stream_url(server, result)
    with stream(url) as received:
        last_event_id = next(received).last_event_id
    assert re.fullmatch("[0-9a-f]{32}", last_event_id)
    with stream(url, headers={"Last-Event-ID": last_event_id}) as received:
        tasks.gates[gate].set()
        [message] = received
    assert (message.event, message.retry) == ("finished", 1000)


def test_reconnecting_after_the_end(server: str) -> None:
    results = [finished(tasks.noop.enqueue()) for _ in range(2)]
    url = stream_url(server, *results)
    last_event_id = read_all(url)[-1].last_event_id
    for same in (url, stream_url(server, *reversed(results))):
        response = httpx.get(same, headers={"Last-Event-ID": last_event_id}, timeout=LIMIT)
        assert (response.status_code, response.content) == (204, b"")
    # The view compares Last-Event-ID with the task ids in the URL. It answers with 204 although
    # the hub has released the tasks.
    for result in results:
        hub.release(hub.find(result.id))
    headers = {"Last-Event-ID": last_event_id}
    assert httpx.get(url, headers=headers, timeout=LIMIT).status_code == 204
    other = stream_url(server, results[0])
    assert httpx.get(other, headers=headers, timeout=LIMIT).status_code == 200


@pytest.mark.parametrize("last_event_id", ["x" * 30_000, "-1", "end-", "1e400", "a:b,c:d", "\xff"])
def test_invalid_last_event_id(server: str, last_event_id: str) -> None:
    result = finished(tasks.noop.enqueue())
    headers = {"Last-Event-ID": last_event_id.encode("latin-1")}
    assert kinds(read_all(stream_url(server, result), headers=headers)) == ["finished"]


def test_last_event_id_of_a_megabyte(server: str) -> None:
    """uvicorn refuses the header, maybe before it has read all of it; the view accepts it."""
    result = finished(tasks.noop.enqueue())
    headers = {"Last-Event-ID": "x" * 1_000_000}
    with suppress(httpx.NetworkError, httpx.RemoteProtocolError):
        response = httpx.get(stream_url(server, result), headers=headers, timeout=LIMIT)
        assert response.status_code in {400, 431}
    assert kinds(read_all(stream_url(server, result))) == ["finished"]
    response = Client().get(events_url(anonymous_request(), result), headers=headers)
    assert b"event: finished" in b"".join(response.streaming_content)


def test_stream_of_2000_tasks(server: str) -> None:
    with settings_with(MAX_RESULTS=2000):
        results = [tasks.noop.enqueue() for _ in range(2000)]
        data = {"tasks": " ".join(map(watch_token, results))}
        received = read_all(server + "/tasks/events/", data=data)
    ended = [message.payload["id"] for message in received if message.event == "finished"]
    assert sorted(ended) == sorted(result.id for result in results)


def test_clock_set_back(server: str, gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the system clock is set back, links stay valid and events stay in order."""
    result = running(tasks.gated.enqueue(gate))
    url = stream_url(server, result)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 7200)
    with stream(url) as received:
        assert next(received).event == "progress"
        with monkeypatch.context() as patch:
            earlier = timezone.now() - timedelta(hours=2)
            patch.setattr(timezone, "now", lambda: earlier)
            tasks.gates[gate].set()
            rest = [message for message in received if message.data]
    assert kinds(rest) == ["finished"]
    assert rest[-1].payload["finished_at"] < rest[-1].payload["started_at"]
    assert kinds(read_all(stream_url(server, result))) == ["finished"]


# Tests of tasks that the server does not know, or that only another process knows.


def test_evicted_task_is_unknown(server: str, gate: str) -> None:
    busy = running(tasks.gated.enqueue(gate))
    with override_settings(TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"}}):
        [message] = read_all(stream_url(server, busy))
    assert message.event == "unknown"
    assert message.payload == encoding.denied_payload(("default", busy.id), Denial.UNKNOWN)
    assert message.last_event_id.startswith("end-")


def test_task_released_during_stream(server: str, gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with (
        override_settings(TASKS_SSE={"RECHECK_INTERVAL": 0.05}),
        stream(stream_url(server, result)) as received,
    ):
        assert next(received).event == "progress"
        hub.release(hub.find(result.id))
        received_rest = [message for message in received if message.data]
    assert kinds(received_rest) == ["unknown"]


def test_task_evicted_during_recheck() -> None:
    """recheck() sends `finished` of a task that the hub released after its last event."""
    known, done, missing = (hub.snapshot(finished(tasks.noop.enqueue()).id) for _ in range(3))
    started = {event.key: as_enqueued(event) for event in (known, done, missing)}
    refs = [TaskRef("default", event.id) for event in (known, done, missing)]
    conversation = Conversation(refs, "", sse_settings())
    conversation.initial(started.values())
    found = {known.key: started[known.key], done.key: None, missing.key: None}
    content = conversation.recheck(found, [done]).decode()
    sent = {m.payload["id"]: m.event for m in messages(iter(content.splitlines())) if m.data}
    assert sent == {done.id: "finished", missing.id: "unknown"}


class StoringBackend(BaseTaskBackend):
    """A backend that stores results outside of the hub, like one with a database."""

    supports_get_result = True
    results: dict[str, AnyResult] = {}  # noqa: RUF012

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> AnyResult:
        raise NotImplementedError

    def get_result(self, result_id: str) -> AnyResult:
        try:
            return self.results[result_id]
        except KeyError:
            raise TaskResultDoesNotExist(result_id) from None


def test_task_of_another_process(server: str) -> None:
    path = f"{__name__}.{StoringBackend.__qualname__}"
    with override_settings(
        TASKS={"default": {"BACKEND": path}},
        TASKS_SSE={"RECHECK_INTERVAL": 0.02, "EXPOSE_RESULTS": True},
    ):
        with override_settings(
            TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"}}
        ):
            done = finished(tasks.add.enqueue(41))
        wait_until(lambda: hub.snapshot(done.id) is None, "the hub keeps a discarded task")
        ready = object.__new__(type(done))
        for name in type(done).__slots__:
            object.__setattr__(ready, name, getattr(done, name))
        object.__setattr__(ready, "status", "READY")
        StoringBackend.results = {done.id: ready}
        with stream(stream_url(server, done)) as received:
            seen = [next(message for message in received if message.data)]
            StoringBackend.results = {done.id: done}
            seen += [message for message in received if message.data]
        assert kinds(seen) == ["enqueued", "finished"]
        assert seen[-1].payload["result"] == 42
        StoringBackend.results = {}
        assert kinds(read_all(stream_url(server, done))) == ["unknown"]


# Tests of which values of a task its stream exposes.


@pytest.mark.parametrize("exposed", [True, False])
def test_exposed_errors_and_results(server: str, exposed: bool) -> None:
    results = [finished(task) for task in (tasks.fail.enqueue(), tasks.echo.enqueue(float("nan")))]
    sse = {"EXPOSE_ERRORS": exposed, "EXPOSE_RESULTS": exposed}
    with override_settings(TASKS_SSE=sse):
        received = read_all(stream_url(server, *results))
        failed, echoed = (message.payload for message in received)
    assert failed["error"] == {
        "reason": "failed",
        "type": "builtins.ValueError" if exposed else None,
        "message": "bad value\nin two lines" if exposed else None,
    }
    assert echoed["result"] == ({"args": [None], "kwargs": {}} if exposed else None)
    assert "bad value" in str(received[0].data) or not exposed


def test_errors_are_exposed_with_debug(server: str) -> None:
    result = finished(tasks.fail.enqueue())
    with override_settings(DEBUG=True):
        [message] = read_all(stream_url(server, result))
    assert message.payload["error"]["type"] == "builtins.ValueError"


def test_error_of_cancelled_task(server: str, gate: str) -> None:
    result = running(tasks.until_cancelled.enqueue(gate))
    assert cancel(result.id)
    error = read_all(stream_url(server, result))[-1].payload["error"]
    assert error == {"reason": "cancelled", "type": None, "message": None}


@pytest.mark.parametrize(
    "message",
    ["two\nlines\r\nand\rmore", "data: x\n\nevent: finished", "<b>\u2028🙂\x00", "é" * 1_000_000],
)
def test_messages_arrive_unchanged(server: str, gate: str, message: str) -> None:
    result = running(tasks.report.enqueue([1, 2, message], {"data": {"key": message[:50]}}, gate))
    tasks.gates[gate].set()
    payload = read_all(stream_url(server, result))[-1].payload
    assert payload["progress"]["message"] == message
    assert payload["progress"]["data"] == {"key": message[:50]}


def test_lone_surrogate_does_not_end_stream(server: str, gate: str) -> None:
    result = running(tasks.report.enqueue([1, 2, "a\ud800b"], {}, gate))
    tasks.gates[gate].set()
    assert read_all(stream_url(server, result))[-1].payload["progress"]["message"] == "a?b"


# Tests of the HTTP connection of a stream.


def test_burst_is_coalesced(server: str, gate: str) -> None:
    result = tasks.burst.enqueue(20_000, gate)
    seen = []
    with stream(stream_url(server, result)) as received:
        for message in received:
            if message.data:
                seen.append(message.payload)
                if (message.payload["progress"] or {}).get("current") == 20_000:
                    tasks.gates[gate].set()
    assert len(seen) < 60
    assert (seen[-2]["progress"]["current"], seen[-2]["status"]) == (20_000, "RUNNING")
    assert seen[-1]["kind"] == "finished"


def test_keepalive_comments(server: str, gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with (
        override_settings(TASKS_SSE={"KEEPALIVE": 0.02}),
        httpx.stream("GET", stream_url(server, result), timeout=LIMIT) as response,
    ):
        lines = response.iter_lines()
        assert next(lines) == ": keepalive=0.02"
        first = next(messages(lines))
        assert (first.event, first.comments) == ("progress", 0)
        assert [next(lines) for _ in range(3)] == [":"] * 3
        tasks.gates[gate].set()
        [last] = messages(lines)
        assert last.event == "finished"


def test_response_headers(server: str, gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    headers = {"Accept-Encoding": "gzip"}
    with (
        override_settings(EVENTSTREAM_ALLOW_ORIGIN="https://other.example"),
        httpx.stream("GET", stream_url(server, result), headers=headers, timeout=LIMIT) as response,
    ):
        assert response.headers["Cache-Control"] == "private, no-store, no-transform"
        assert response.headers["X-Accel-Buffering"] == "no"
        assert response.headers["Access-Control-Allow-Origin"] == "https://other.example"
        # GZipMiddleware is active, and compression would delay events in its buffer.
        assert response.headers["Content-Encoding"] == "identity"
        lines = response.iter_lines()
        assert next(message for message in messages(lines) if message.data).event == "progress"
        tasks.gates[gate].set()


def test_disconnect_closes_subscription(server: str, gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with stream(stream_url(server, result)) as received:
        next(received)
        assert hub.statistics().event_loops == 1
    wait_until(lambda: hub.statistics().event_loops == 0, "the subscription stays open")


def test_client_that_does_not_read(server: str, gate: str) -> None:
    """A client that stops reading delays no other stream; it later receives the final state."""
    result = running(tasks.report.enqueue([1, 2, "x" * 1_000_000], {}, gate))
    path = events_url(anonymous_request(), result)
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as lazy:
        lazy.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        tasks.gates[gate].set()
        assert kinds(read_all(server + path))[-1] == "finished"
        lazy.settimeout(LIMIT)
        content = b"".join(iter(lambda: lazy.recv(65536), b""))
    assert b"event: finished" in content


def test_streams_hold_no_thread_and_no_connection(
    server: str, gate: str, transactional_db: None
) -> None:
    get_user_model().objects.create_user("anna")
    with httpx.Client(timeout=LIMIT) as browser:
        assert browser.get(f"{server}/login/anna/").text == "logged in"
        cookies = dict(browser.cookies)
    result = running(tasks.gated.enqueue(gate))
    url = stream_url(server, result)
    # The database connections that requests open, because Django queries the logged-in user.
    used: list[BaseDatabaseWrapper] = []

    def note(connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
        used.append(connection)

    def resources_are_released() -> bool:
        threads = threading.active_count() - before
        return threads <= 6 and not any(connection.connection for connection in used)

    async def open_many() -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(timeout=LIMIT, limits=limits, cookies=cookies) as client,
            asyncio.TaskGroup() as group,
        ):
            ready = asyncio.Semaphore(0)

            async def read() -> str:
                async with client.stream("GET", url) as response:
                    content = ""
                    async for chunk in response.aiter_text():
                        if "progress" in chunk and "progress" not in content:
                            ready.release()
                        content += chunk
                    return content

            readers = [group.create_task(read()) for _ in range(50)]
            for _ in readers:
                await asyncio.wait_for(ready.acquire(), LIMIT)
            # Wait until the threads that the requests have released end. The event loop stays free
            # to read the streams, because another thread polls.
            await asyncio.to_thread(
                wait_until, resources_are_released, "streams hold threads or connections"
            )
            tasks.gates[gate].set()
        has_end.extend("event: finished" in reader.result() for reader in readers)

    before = threading.active_count()
    has_end: list[bool] = []
    client = threading.Thread(target=lambda: asyncio.run(open_many()))
    connection_created.connect(note)
    try:
        client.start()
        client.join(2 * LIMIT)
    finally:
        connection_created.disconnect(note)
    assert has_end == [True] * 50
    assert len(used) == 50
    wait_until(lambda: threading.active_count() <= before, "threads stay alive")


async def test_request_thread_is_released_only_within_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a request's thread release_request_thread() leaves the test's connections open."""
    closed_in: list[threading.Thread] = []
    monkeypatch.setattr(
        request_thread.connections,
        "close_all",
        lambda: closed_in.append(threading.current_thread()),
    )
    assert SyncToAsync.thread_sensitive_context.get(None) is None
    await release_request_thread()
    async with ThreadSensitiveContext() as context:
        await release_request_thread()
        assert closed_in == []
        first = await sync_to_async(threading.current_thread)()
        assert context in SyncToAsync.context_to_thread_executor
        await release_request_thread()
        assert closed_in == [first]
        assert context not in SyncToAsync.context_to_thread_executor
        assert await sync_to_async(threading.current_thread)() is not first


async def test_content_is_closed_on_disconnect() -> None:
    """A disconnect closes the content generator at once, before it is garbage collected."""
    closed = []

    async def content() -> AsyncIterator[bytes]:
        try:
            yield b"state"
            yield b"news"
        finally:
            closed.append(True)

    conversation = Conversation([], "", sse_settings())
    response = streams.EventStreamResponse(
        content(), conversation, content_type="text/event-stream"
    )
    # Django's ASGI handler also closes the iterator of the response at a disconnect.
    async with aclosing(aiter(response)) as parts:
        assert await anext(parts) == b"state"
    assert closed == [True]

    async def shout(parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
        async for part in parts:
            yield part.decode().upper()

    response = streams.EventStreamResponse(content(), conversation)
    # A middleware such as GZipMiddleware replaces the content in the same way.
    response.streaming_content = shout(response.streaming_content)
    assert [part async for part in response] == [b"STATE", b"NEWS"]


async def test_async_client() -> None:
    result = await tasks.add.aenqueue(1)
    async with hub.subscribe(result.id) as subscription:
        async for _ in subscription:
            pass
    response = await AsyncClient().get(events_url(anonymous_request(), result))
    content = b"".join([chunk async for chunk in response.streaming_content])
    assert b"event: finished" in content


# Tests of streams under WSGI.


def test_wsgi_stream_ends_after_states(gate: str) -> None:
    """A WSGI stream ends after it has sent the current states; the client then reconnects."""
    result = running(tasks.gated.enqueue(gate))
    client, url = Client(), events_url(anonymous_request(), result)
    content = b"".join(client.get(url).streaming_content).decode()
    received = list(messages(iter(content.splitlines())))
    assert [(message.event, message.retry) for message in received] == [("progress", 1000)]
    headers = {"Last-Event-ID": received[-1].last_event_id}
    content = b"".join(client.get(url, headers=headers).streaming_content).decode()
    assert content == ": keepalive=15\n"
    tasks.gates[gate].set()
    finished(result)
    content = b"".join(client.get(url, headers=headers).streaming_content).decode()
    assert "event: finished" in content


def test_position_on_streams(server: str, gate: str) -> None:
    """A stream sends a task's new position; a client that polls receives each event once."""
    with override_settings(
        TASKS={
            "default": {
                "BACKEND": "django_tasks_local.ThreadPoolBackend",
                "OPTIONS": {"MAX_WORKERS": 1},
            }
        }
    ):
        running(tasks.gated.enqueue(gate))
        before, result = (tasks.noop.enqueue() for _ in range(2))
        url = events_url(anonymous_request(), result)

        def poll(last_event_id: str) -> list[Message]:
            headers = {"Last-Event-ID": last_event_id}
            content = b"".join(Client().get(url, headers=headers).streaming_content).decode()
            return [message for message in messages(iter(content.splitlines())) if message.data]

        with stream(server + url) as received:
            first = next(received)
            assert (first.payload["kind"], first.payload["position"]) == ("enqueued", 1)
            [polled] = poll("")
            assert poll(polled.last_event_id) == []
            cancel(before.id)
            moved = next(received)
            assert (moved.payload["sequence"], moved.payload["position"]) == (1, 0)
            [polled] = poll(first.last_event_id)
            assert polled.payload["position"] == 0
            assert polled.last_event_id == moved.last_event_id != first.last_event_id
            assert poll(polled.last_event_id) == []
            status = httpx.get(server + url.replace("events", "status"), timeout=LIMIT).json()
            assert status["tasks"][0]["position"] == 0
            tasks.gates[gate].set()
            assert [m.payload["position"] for m in received if m.data][-1] is None


def test_wsgi_stream_with_hold(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with override_settings(TASKS_SSE={"WSGI_HOLD": LIMIT, "KEEPALIVE": 0.01}):
        content = iter(Client().get(events_url(anonymous_request(), result)).streaming_content)
        assert b"event: progress" in next(content)
        assert next(content) == encoding.KEEPALIVE
        tasks.gates[gate].set()
        assert b"event: finished" in b"".join(content)


def test_long_stream_ends_to_check_access_again(
    server: str, gate: str, transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream ends after MAX_STREAM_SECONDS, so that a user who logged out gets 403."""
    monkeypatch.setattr(streams, "MAX_STREAM_SECONDS", 0.2)
    user = get_user_model().objects.create_user("anna")
    result = running(tasks.gated.enqueue(gate))
    request = anonymous_request()
    request.user = user
    url = events_url(request, result)
    with httpx.Client(base_url=server, timeout=LIMIT) as browser:
        browser.get("/login/anna/")
        content = browser.get(url).text
        assert "event: progress" in content
        assert "id: end-" not in content
        [last_event_id] = [line[4:] for line in content.splitlines() if line.startswith("id: ")]
        again = browser.get(url, headers={"Last-Event-ID": last_event_id})
        assert (again.status_code, "event: " in again.text) == (200, False)
        browser.cookies.clear()
        assert browser.get(url).status_code == 403
    with override_settings(TASKS_SSE={"WSGI_HOLD": LIMIT}):
        held = Client().get(events_url(anonymous_request(), result))
        assert b"id: end-" not in b"".join(held.streaming_content)
    tasks.gates[gate].set()


LOGIN_REQUIRED = "django.contrib.auth.middleware.LoginRequiredMiddleware"


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
async def test_atomic_requests_and_login_required(
    client_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The views ignore ATOMIC_REQUESTS (this test has no database) and LoginRequiredMiddleware."""
    monkeypatch.setitem(connections["default"].settings_dict, "ATOMIC_REQUESTS", True)
    result = await sync_to_async(finished)(tasks.noop.enqueue())
    url = events_url(anonymous_request(), result)
    with override_settings(MIDDLEWARE=[*settings.MIDDLEWARE, LOGIN_REQUIRED]):
        client = client_class()
        for path in (url, url.replace("events", "status"), "/tasks/events/?task=forged"):
            get = client.get if client_class is AsyncClient else sync_to_async(client.get)
            response = await get(path)
            assert response.status_code == (403 if "forged" in path else 200)
        post = client.post if client_class is AsyncClient else sync_to_async(client.post)
        assert (await post("/tasks/cancel/", {"task": "forged"})).status_code == 403


def test_wsgi_stream_of_threaded_development_server(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    environ = {"SERVER_SOFTWARE": "WSGIServer/0.2", "wsgi.multithread": True}
    content = iter(
        Client().get(events_url(anonymous_request(), result), **environ).streaming_content
    )
    assert b"event: progress" in next(content)
    tasks.gates[gate].set()
    assert b"event: finished" in b"".join(content)


def test_stream_ends_with_the_process(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ended", True)
    result = running_without_hub(gate)
    # With WSGI_HOLD the server would keep the stream open if the hub had not ended.
    with override_settings(TASKS_SSE={"WSGI_HOLD": LIMIT, "KEEPALIVE": 0.01}):
        content = b"".join(Client().get(events_url(anonymous_request(), result)).streaming_content)
    assert encoding.KEEPALIVE not in content
    assert b"id: end-" not in content
    assert b"event: started" in content or b"event: progress" in content


def running_without_hub(gate: str) -> AnyResult:
    result = tasks.gated.enqueue(gate)
    wait_until(
        lambda: (hub.snapshot(result.id) or result).status == "RUNNING", "the task does not start"
    )
    return result


def test_unserializable_results_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert encoding._json_value("the id", {1: 10**5000}) is None
    assert "the id" in caplog.text
    assert json.dumps(encoding._json_value("x", [float("inf"), 1])) == "[null, 1]"


def test_immediate_backend_keeps_no_results() -> None:
    assert not task_backends["immediate"].supports_get_result


def test_state_of_store_is_newer_than_that_of_hub() -> None:
    """A stream sends the finished state from the store, if the hub only has `enqueued`."""
    done = finished(tasks.add.enqueue(1))
    event = hub.snapshot(done.id)
    hub.release(hub.find(done.id))
    ready = as_enqueued(event)
    hub.publish(ready)
    conversation = Conversation([TaskRef("default", done.id)], "", sse_settings())
    assert b"event: enqueued" in conversation.initial([ready])
    assert b"event: finished" in conversation.recheck({event.key: event}, [ready])
    assert conversation.ended
    hub.release(hub.find(done.id))


def as_enqueued(event: TaskEvent) -> TaskEvent:
    return dataclasses.replace(event, run=0, sequence=1, kind=EventKind.ENQUEUED)


def test_wsgi_stream_with_hold_checks_the_store(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with override_settings(TASKS_SSE={"WSGI_HOLD": LIMIT, "RECHECK_INTERVAL": 0.01}):
        content = iter(Client().get(events_url(anonymous_request(), result)).streaming_content)
        assert b"event: progress" in next(content)
        hub.release(hub.find(result.id))
        assert b"event: unknown" in b"".join(content)
