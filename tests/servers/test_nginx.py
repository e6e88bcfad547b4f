"""Streams through a real nginx, with its defaults."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import Browser, Page, expect

from tests.project import tasks
from tests.support.browser import allow_errors
from tests.support.nginx import Nginx, nginx
from tests.support.servers import Server, serve
from tests.support.sse_client import event_source
from tests.support.waiting import LIMIT, wait_until

SETTINGS: dict[str, Any] = {"TASKS_SSE": {"RETRY": 20}}

# Resolves with how each of the sources has ended; calls `opened` when all have begun.
WATCH_ALL = """async (urls) => {
  let open = 0;
  return Promise.all(urls.map((url) => new Promise((resolve) => {
    const source = new EventSource(url);
    source.addEventListener("progress", () => ++open === urls.length && opened());
    source.addEventListener("finished", () => { source.close(); resolve("finished"); });
    source.addEventListener("unknown", () => { source.close(); resolve("unknown"); });
  })));
}"""
PROTOCOLS = """() => [...new Set(performance.getEntriesByType("resource")
  .filter((entry) => entry.name.includes("/events/")).map((entry) => entry.nextHopProtocol))]"""


@contextmanager
def behind_nginx(name: str, directory: Path, **settings: Any) -> Iterator[tuple[Nginx, Server]]:
    with (
        serve(name, directory, settings=SETTINGS | settings) as server,
        nginx(directory / "nginx", server.port) as proxy,
    ):
        yield proxy, server


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-sync"])
def test_events_are_not_held_back(name: str, tmp_path: Path, gate: str) -> None:
    """Neither by buffering, nor by gzip."""
    with behind_nginx(name, tmp_path) as (proxy, server):
        task = server.start_task("gated", gate)
        kinds = []
        for message in event_source(proxy.url + task["events"]):
            if message.data:
                kinds.append(message.event)
            if message.event == "progress":
                tasks.gates[gate].set()  # While the task runs; or this test would not end.
        assert kinds[-2:] == ["progress", "finished"]
        # nginx writes its log a little later than it answers.
        wait_until(lambda: 204 in proxy.answers, "the stream was not ended by 204")


def test_behind_a_proxy_that_speaks_tls(tmp_path: Path) -> None:
    settings = {
        "SECURE_SSL_REDIRECT": True,
        "SECURE_PROXY_SSL_HEADER": ["HTTP_X_FORWARDED_PROTO", "https"],
    }
    with behind_nginx("uvicorn", tmp_path, **settings) as (proxy, _):
        with httpx.Client(base_url=proxy.tls_url, verify=False, timeout=LIMIT) as client:
            events = client.get("/start/noop/").json()["events"]
            received = client.get(events).text
            assert "event: finished" in received
        redirect = httpx.get(proxy.url + events, timeout=LIMIT)
        assert (redirect.status_code, redirect.headers["Location"][:8]) == (301, "https://")


@pytest.fixture
async def tls_page(browser: Browser) -> AsyncIterator[Page]:
    """A page that takes a certificate which nobody has signed."""
    context = await browser.new_context(ignore_https_errors=True)
    yield await context.new_page()
    await context.close()


async def test_many_streams_over_http_2(tls_page: Page, tmp_path: Path, gate: str) -> None:
    """Twenty in one page; with HTTP/1.1 the seventh would wait for one of the first six."""
    with behind_nginx("uvicorn", tmp_path, TASKS=_many_threads()) as (proxy, server):
        urls = [server.start_task("gated", gate)["events"] for _ in range(20)]
        await tls_page.goto(proxy.tls_url)
        await tls_page.expose_function("opened", tasks.gates[gate].set)
        ended = await asyncio.wait_for(tls_page.evaluate(WATCH_ALL, urls), LIMIT)
        assert ended == ["finished"] * 20
        assert await tls_page.evaluate(PROTOCOLS) == ["h2"]


def _many_threads() -> dict[str, Any]:
    backend = "django_tasks_local.ThreadPoolBackend"
    return {"default": {"BACKEND": backend, "OPTIONS": {"MAX_WORKERS": 20}}}


@pytest.mark.parametrize("name", ["uvicorn", "gunicorn-sync"])
async def test_under_a_path(name: str, page: Page, tmp_path: Path, gate: str) -> None:
    """The whole page: script and style, the bar, the stream's end."""
    settings = {"FORCE_SCRIPT_NAME": "/app", "STATIC_URL": "/app/static/"}
    with behind_nginx(name, tmp_path, **settings) as (proxy, server):
        task = server.start_task("gated", gate)
        assert task["events"].startswith("/app/tasks/events/")
        await page.goto(f"{proxy.url}/app/?id={task['id']}")
        bar = page.locator("task-progress")
        await expect(bar).to_contain_text("waiting for the test")
        tasks.gates[gate].set()
        await expect(bar).to_have_attribute("data-state", "done")


# Outages


async def test_a_proxy_that_answers_503_for_a_while(page: Page, tmp_path: Path, gate: str) -> None:
    """The browser gives up its source for good; the widget does not, and makes no storm."""
    allow_errors(page, "503")
    with behind_nginx("uvicorn", tmp_path) as (proxy, server):
        task = server.start_task("gated", gate)
        await page.goto(f"{proxy.url}/?id={task['id']}")
        bar = page.locator("task-progress")
        await expect(bar).to_have_attribute("data-state", "running")
        proxy.stop()
        proxy.unavailable = True
        proxy.start()
        # After 3 s without a connection.
        await expect(bar).to_have_attribute("data-state", "reconnecting")
        wait_until(lambda: 503 in proxy.answers, "nginx has refused nothing")
        refused = proxy.answers.count(503)
        proxy.unavailable = False
        tasks.gates[gate].set()
        await expect(bar).to_have_attribute("data-state", "done")
        # After 0.5 to 1 s, then 1 to 2, 2 to 4 and so on: few, however long it takes.
        assert 1 <= refused <= 6
