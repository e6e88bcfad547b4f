"""The same stream under every server; and what several web workers that share nothing can say."""

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
from tests.support.browser import LISTEN
from tests.support.servers import ASGI, WSGI, Server, serve
from tests.support.sse_client import event_source, stream
from tests.support.waiting import LIMIT, wait_until

SETTINGS = {"TASKS_SSE": {"RETRY": 20, "EXPOSE_RESULTS": True}}
ORDER = ["enqueued", "started", "progress", "finished"]


@pytest.mark.parametrize("name", [*ASGI, *WSGI])
def test_from_the_first_event_to_the_last(name: str, tmp_path: Path, gate: str) -> None:
    with serve(name, tmp_path, settings=SETTINGS) as server:
        task = server.start_task("burst", 500, gate)
        connections, payloads = 0, []
        for message in event_source(server.url + task["events"]):
            connections += message.retry is not None
            if message.data:
                payloads.append(message.payload)
                assert message.event == message.payload["kind"]
                if (message.payload["progress"] or {}).get("current") == 500:
                    # Seen while the task still runs.
                    tasks.gates[gate].set()
        positions = [ORDER.index(payload["kind"]) for payload in payloads]
        assert positions == sorted(positions)
        sequences = [payload["sequence"] for payload in payloads]
        assert sequences == sorted(set(sequences)), "an event came twice"
        assert (payloads[-1]["kind"], payloads[-1]["status"]) == ("finished", "SUCCESSFUL")
        # With async views, and under the development server, it is one stream; else it is polled.
        assert (connections == 1) == (name in ASGI or name == "runserver")
        assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize("name", ["gunicorn-sync", "gunicorn-gthread"])
def test_twenty_bars_lock_no_worker(name: str, tmp_path: Path, gate: str) -> None:
    """One sync worker serves pages while each of 20 bars has a stream of its own."""
    with serve(name, tmp_path, settings=SETTINGS) as server:
        started = [server.start_task("gated", gate) for _ in range(20)]
        urls = [server.url + task["events"] for task in started]
        begun: set[str] = set()

        def last_kind(url: str) -> str:
            kinds = []
            for message in event_source(url):
                begun.add(url)
                kinds += [message.event] if message.data else []
            return kinds[-1]

        with ThreadPoolExecutor(len(urls)) as threads:
            watching = [threads.submit(last_kind, url) for url in urls]
            try:
                wait_until(lambda: len(begun) == 20, "a bar has no stream")
                with httpx.Client(timeout=LIMIT) as client:
                    for _ in range(20):
                        assert client.get(server.url).status_code == 200
                assert not any(future.done() for future in watching)
            finally:
                tasks.gates[gate].set()
            assert [future.result(LIMIT) for future in watching] == ["finished"] * 20


@pytest.mark.parametrize("name", ["runserver-daphne"])
def test_a_stream_tells_that_its_task_is_lost(name: str, tmp_path: Path, gate: str) -> None:
    """The stream lives as long as its task may; Daphne sends nothing more when it ends."""
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


# Several web workers


@pytest.fixture
def two_workers(tmp_path: Path) -> Iterator[Server]:
    with serve("uvicorn-workers", tmp_path, settings=SETTINGS) as server:
        yield server


def tasks_of_both(server: Server, *args: Any) -> list[dict[str, Any]]:
    """Return the same number of tasks of each worker: each request is a connection of its own."""
    started: dict[int, list[dict[str, Any]]] = {}
    while len(started) < 2 or min(map(len, started.values())) < 8:
        task = server.start_task(*args)
        started.setdefault(task["pid"], []).append(task)
        assert sum(map(len, started.values())) < 200, "all connections go to one worker"
    return [task for of_worker in started.values() for task in of_worker[:8]]


async def test_a_stream_that_lands_on_the_wrong_worker(
    page: Page, two_workers: Server, gate: str
) -> None:
    """It says `unknown` and ends; a plain EventSource does not come back again and again."""
    mixed = tasks_of_both(two_workers, "noop")
    requests: list[int] = []
    page.on("response", lambda r: requests.append(r.status) if "/events/" in r.url else None)
    await page.goto(two_workers.url)
    kinds = set()
    for task in mixed:
        seen = await asyncio.wait_for(page.evaluate(LISTEN, task["events"]), LIMIT)
        assert [kind for kind, _ in seen] in (["finished"], ["unknown"])
        kinds.add(seen[0][0])
    # A connection is kept alive, so all requests may come to one worker: half are unknown to it.
    assert kinds == {"finished", "unknown"}
    assert requests == [200, 204] * len(mixed)


async def test_one_stream_of_tasks_of_both_workers(
    page: Page, two_workers: Server, gate: str
) -> None:
    """Those it does not know are `unknown` at once, and the others live on."""
    first, second = tasks_of_both(two_workers, "gated", gate)[::8]
    token = second["events"].partition("?")[2]
    await page.goto(two_workers.url)
    watching = asyncio.create_task(page.evaluate(LISTEN, f"{first['events']}&{token}"))
    # Two tasks have been told of, and one of them still runs.
    await page.wait_for_function(
        "window.seen && new Set(window.seen.map(([kind]) => kind === 'unknown')).size === 2",
        timeout=LIMIT * 1000,
    )
    tasks.gates[gate].set()
    seen = await asyncio.wait_for(watching, LIMIT)
    kinds = [kind for kind, _ in seen]
    assert kinds.count("unknown") == 1
    assert kinds.count("finished") == 1


# A restart


async def test_a_bar_over_a_restart(page: Page, tmp_path: Path, gate: str) -> None:
    """
    It says that it is reconnecting, and then the truth: the new process knows no such task.

    The old process is killed, or else its stream would have told that the task is lost.
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
    # One a second, as `retry:` says, until the new process is there.
    assert len(requests) <= 3 + (requests[-1] - requests[0])
