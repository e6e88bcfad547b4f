"""Tests of one stream under every server, and of streams of web workers that share no state."""

import asyncio
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Page, expect

from tests.project import tasks
from tests.support.browser import RECEIVE_EVENTS
from tests.support.servers import ASGI, WSGI, Server, serve
from tests.support.sse_client import event_source, stream
from tests.support.waiting import LIMIT, wait_until

SETTINGS = {"TASKS_SSE": {"RETRY": 0.02, "EXPOSE_RESULTS": True}}
ORDER = ["enqueued", "started", "progress", "finished"]


@pytest.mark.parametrize("name", [*ASGI, *WSGI])
def test_stream_from_first_to_last_event(name: str, tmp_path: Path, gate: str) -> None:
    with serve(name, tmp_path, settings=SETTINGS) as server:
        task = server.start_task("burst", 500, gate)
        connections, payloads = 0, []
        for message in event_source(server.url + task["events"]):
            connections += message.retry is not None
            payloads.append(message.payload)
            assert message.event == message.payload["kind"]
            if (message.payload["progress"] or {}).get("current") == 500:
                # The task waits until the gate is set, so the server sent this event while the
                # task ran.
                tasks.gates[gate].set()
        positions = [ORDER.index(payload["kind"]) for payload in payloads]
        assert positions == sorted(positions)
        sequences = [payload["sequence"] for payload in payloads]
        assert sequences == sorted(set(sequences)), "the client received an event twice"
        assert (payloads[-1]["kind"], payloads[-1]["status"]) == ("finished", "SUCCESSFUL")
        # ASGI servers and the development server keep one stream open. Other WSGI servers end each
        # response after the current state, so the client connects again.
        assert (connections == 1) == (name in ASGI or name == "runserver")
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("name", ["gunicorn-gevent", "tornado"])
def test_polling_in_thread_of_event_loop(name: str, tmp_path: Path) -> None:
    """`events/` and `status/` need no event loop: a loop runs already in the request's thread."""
    with serve(name, tmp_path, settings=SETTINGS) as server:
        # The task waits in time.sleep(), during which gevent runs other greenlets.
        task = server.start_task("steps", 20, 0.02)
        received = [m.payload for m in event_source(server.url + task["events"]) if m.data]
        assert (received[-1]["kind"], received[-1]["status"]) == ("finished", "SUCCESSFUL")
        # gevent has a running loop only while it serves another request concurrently.
        url = server.url + task["events"].replace("events/", "status/")
        with ThreadPoolExecutor(10) as threads:
            responses = list(threads.map(lambda _: httpx.get(url, timeout=LIMIT), range(50)))
        assert [response.status_code for response in responses] == [200] * 50
        assert [payload["status"] for payload in responses[0].json()["tasks"]] == ["SUCCESSFUL"]
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("name", ["gunicorn-sync", "gunicorn-gthread"])
def test_twenty_streams_block_no_worker(name: str, tmp_path: Path, gate: str) -> None:
    """One sync worker serves pages while each of 20 bars has its own stream."""
    with serve(name, tmp_path, settings=SETTINGS) as server:
        started = [server.start_task("gated", gate) for _ in range(20)]
        urls = [server.url + task["events"] for task in started]
        begun: set[str] = set()

        def last_kind(url: str) -> str:
            kinds = []
            for message in event_source(url):
                begun.add(url)
                kinds.append(message.event)
            return kinds[-1]

        with ThreadPoolExecutor(len(urls)) as threads:
            watching = [threads.submit(last_kind, url) for url in urls]
            try:
                wait_until(lambda: len(begun) == 20, "a stream has not started")
                with httpx.Client(timeout=LIMIT) as client:
                    for _ in range(20):
                        assert client.get(server.url).status_code == 200
                assert not any(future.done() for future in watching)
            finally:
                tasks.gates[gate].set()
            assert [future.result(LIMIT) for future in watching] == ["finished"] * 20


@pytest.mark.parametrize("name", ["runserver-daphne"])
def test_stream_reports_lost_task(name: str, tmp_path: Path, gate: str) -> None:
    """A stream reports its task as lost after SHUTDOWN_TIMEOUT, before Daphne exits."""
    backend = "django_tasks_local.ThreadPoolBackend"
    options = {"default": {"BACKEND": backend, "OPTIONS": {"SHUTDOWN_TIMEOUT": 0.5}}}
    with serve(name, tmp_path, settings={"TASKS": options}) as server:
        task = server.start_task("gated", gate)
        with stream(server.url + task["events"]) as received:
            while next(received).event != "progress":
                pass
            server.process.send_signal(signal.SIGINT)
            last = [message.payload for message in received if message.data][-1]
        assert (last["status"], last["error"]["reason"]) == ("FAILED", "lost")
        server.process.wait(LIMIT)
        assert f"{task['id']} (tests.project.tasks.gated)" in server.log.read_text()


# Tests of two web workers, of which each knows only its own tasks.


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[Server]:
    with serve("uvicorn-workers", tmp_path, settings=SETTINGS) as server:
        yield server


def tasks_of_both(server: Server, *args: Any) -> list[dict[str, Any]]:
    """Start tasks by requests, each on its own connection, until both workers have eight."""
    started: dict[int, list[dict[str, Any]]] = {}
    while len(started) < 2 or min(map(len, started.values())) < 8:
        task = server.start_task(*args)
        started.setdefault(task["pid"], []).append(task)
        assert sum(map(len, started.values())) < 200, "all connections go to one worker"
    return [task for of_worker in started.values() for task in of_worker[:8]]


async def test_stream_of_task_in_another_worker(page: Page, two_workers: Server, gate: str) -> None:
    """The stream sends `unknown` and ends, and a plain EventSource does not reconnect again."""
    mixed = tasks_of_both(two_workers, "noop")
    requests: list[int] = []
    page.on("response", lambda r: requests.append(r.status) if "/events/" in r.url else None)
    await page.goto(two_workers.url)
    kinds = set()
    for task in mixed:
        seen = await asyncio.wait_for(page.evaluate(RECEIVE_EVENTS, task["events"]), LIMIT)
        assert [kind for kind, _ in seen] in (["finished"], ["unknown"])
        kinds.add(seen[0][0])
    # Chromium reuses its connection, so all requests may reach one worker, which knows half of
    # the tasks.
    assert kinds == {"finished", "unknown"}
    assert requests == [200, 204] * len(mixed)


async def test_stream_of_tasks_in_both_workers(page: Page, two_workers: Server, gate: str) -> None:
    """A stream reports tasks of another worker as `unknown` at once; it continues for the rest."""
    first, second = tasks_of_both(two_workers, "gated", gate)[::8]
    token = second["events"].partition("?")[2]
    await page.goto(two_workers.url)
    watching = asyncio.create_task(page.evaluate(RECEIVE_EVENTS, f"{first['events']}&{token}"))
    # Wait until the stream has sent events of both tasks, of which one still runs.
    await page.wait_for_function(
        "window.seen && new Set(window.seen.map(([kind]) => kind === 'unknown')).size === 2",
        timeout=LIMIT * 1000,
    )
    tasks.gates[gate].set()
    seen = await asyncio.wait_for(watching, LIMIT)
    kinds = [kind for kind, _ in seen]
    assert kinds.count("unknown") == 1
    assert kinds.count("finished") == 1


# A test of a server that restarts.


async def test_widget_after_server_restart(page: Page, tmp_path: Path, gate: str) -> None:
    """
    The widget shows `reconnecting`, then `unknown`, because the new process has no such task.

    The test kills the old process, because at a normal exit the server would send `finished`, with
    the reason `lost`, and the widget would not reconnect.
    """
    requests: list[float] = []
    page.on("request", lambda r: requests.append(time.monotonic()) if "/events/" in r.url else None)
    with serve("uvicorn", tmp_path) as server:
        task = server.start_task("gated", gate)
        await page.goto(f"{server.url}/?id={task['id']}")
        bar = page.locator("task-progress")
        await expect(bar).to_have_attribute("data-state", "running")
        server.stop(signal.SIGKILL)
    await expect(bar).to_have_attribute("data-state", "reconnecting")
    with serve("uvicorn", tmp_path, port=server.port):
        await expect(bar).to_have_attribute("data-state", "unknown")
    # The browser retries once per second, as `retry:` demands, until the new process answers.
    assert len(requests) <= 3 + (requests[-1] - requests[0])
