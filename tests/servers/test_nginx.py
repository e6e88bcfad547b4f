"""Tests of streams behind nginx with its default settings."""

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

SETTINGS: dict[str, Any] = {"TASKS_SSE": {"RETRY": 0.02}}

# Opens an EventSource for each URL, and calls `opened` once all have received `progress`. Resolves
# with the kind of each last event.
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
def test_nginx_does_not_delay_events(name: str, tmp_path: Path, gate: str) -> None:
    """nginx forwards each event at once, although its proxy buffering and gzip are active."""
    with behind_nginx(name, tmp_path) as (proxy, server):
        task = server.start_task("gated", gate)
        kinds = []
        for message in event_source(proxy.url + task["events"]):
            if message.data:
                kinds.append(message.event)
            if message.event == "progress":
                # If nginx kept `progress` until the task ends, the task would never end.
                tasks.gates[gate].set()
        assert kinds[-2:] == ["progress", "finished"]
        # nginx writes its access log shortly after it sends the response.
        wait_until(lambda: 204 in proxy.answers, "no request was answered with 204")


def test_tls_proxy(tmp_path: Path) -> None:
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
    """Open a browser page that accepts nginx's self-signed certificate."""
    context = await browser.new_context(ignore_https_errors=True)
    yield await context.new_page()
    await context.close()


async def test_twenty_streams_over_http_2(tls_page: Page, tmp_path: Path, gate: str) -> None:
    """Over HTTP/2 twenty streams are open at once; with HTTP/1.1 browsers open only six."""
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
async def test_application_under_a_path(name: str, page: Page, tmp_path: Path, gate: str) -> None:
    """Under the path /app the page loads the widget's files, and the widget shows the result."""
    settings = {"FORCE_SCRIPT_NAME": "/app", "STATIC_URL": "/app/static/"}
    with behind_nginx(name, tmp_path, **settings) as (proxy, server):
        task = server.start_task("gated", gate)
        assert task["events"].startswith("/app/tasks/events/")
        await page.goto(f"{proxy.url}/app/?id={task['id']}")
        bar = page.locator("task-progress")
        await expect(bar).to_contain_text("waiting for the test")
        tasks.gates[gate].set()
        await expect(bar).to_have_attribute("data-state", "done")


# Tests of outages of the server behind nginx.


async def test_widget_recovers_from_503(page: Page, tmp_path: Path, gate: str) -> None:
    """An EventSource gives up permanently after a 503; the widget retries with back-off."""
    allow_errors(page, "503")
    with behind_nginx("uvicorn", tmp_path) as (proxy, server):
        task = server.start_task("gated", gate)
        await page.goto(f"{proxy.url}/?id={task['id']}")
        bar = page.locator("task-progress")
        await expect(bar).to_have_attribute("data-state", "running")
        proxy.stop()
        proxy.unavailable = True
        proxy.start()
        # The widget shows the state `reconnecting` after 3 s without a connection.
        await expect(bar).to_have_attribute("data-state", "reconnecting")
        wait_until(lambda: 503 in proxy.answers, "nginx has not answered with 503")
        refused = proxy.answers.count(503)
        proxy.unavailable = False
        tasks.gates[gate].set()
        await expect(bar).to_have_attribute("data-state", "done")
        # The widget requests again after 0.5 to 1 s, then 1 to 2 s, 2 to 4 s and so on, so nginx
        # refuses few of its requests during the outage.
        assert 1 <= refused <= 6
