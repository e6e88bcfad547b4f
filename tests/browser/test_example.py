"""Tests of example.py in Chromium: each button, a reload, ten bars on one stream, its exit."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from playwright.async_api import Locator, Page, expect

from tests.support.paths import ROOT
from tests.support.sse_client import stream
from tests.support.waiting import LIMIT, wait_until

SCREENSHOTS = ROOT / "artifacts"

# A script that records every value of each progress bar in `window.values`, by the task's token.
RECORD_VALUES = """
window.values = new Map();
new MutationObserver((records) => {
  for (const { target } of records) {
    const bar = target.closest("task-progress");
    if (!bar || target.localName !== "progress") continue;
    const key = new URL(bar.getAttribute("src"), location).searchParams.get("task");
    if (!values.has(key)) values.set(key, new Set());
    values.get(key).add(target.getAttribute("value"));
  }
}).observe(document, { subtree: true, attributeFilter: ["value"] });
"""
# A JavaScript expression: the largest number of distinct values that any one bar has shown.
MOST_VALUES = "Math.max(0, ...[...window.values.values()].map((seen) => seen.size))"


@contextmanager
def example_server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "example.py", "--port", str(port)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"},
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_until(lambda: process.poll() is not None or responds(url), "example.py does not start")
        yield url, process
    finally:
        process.kill()
        process.communicate()


def responds(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def example() -> Iterator[str]:
    with example_server() as (url, _):
        yield url


async def press(page: Page, name: str) -> Locator:
    """Click a button and return the newest bar."""
    await page.get_by_role("button", name=name).click()
    return page.locator("task-progress").first


async def expect_state(bar: Locator, state: str) -> None:
    await expect(bar).to_have_attribute("data-state", state)


@pytest.fixture
async def visitor(page: Page, example: str) -> Page:
    await page.add_init_script(RECORD_VALUES)
    await page.goto(example)
    return page


async def test_import_files(visitor: Page) -> None:
    bar = await press(visitor, "Import files")
    await expect(bar.locator(".task-progress-message")).to_contain_text("Reading measurements-")
    await expect(visitor.get_by_role("progressbar", name="Import files")).to_be_visible()
    await visitor.wait_for_function(f"{MOST_VALUES} >= 5")
    # After a reload the HTML from the server already contains the current value.
    shown = float(await bar.locator("progress").get_attribute("value") or 0)
    response = await visitor.reload()
    assert response is not None
    rendered = re.search(r'<progress [^>]*value="([\d.]+)"', await response.text())
    assert rendered is not None
    assert float(rendered[1]) >= shown > 0
    await expect_state(bar, "done")
    await expect(bar.locator("progress")).to_have_attribute("value", "100")
    await expect(bar.locator(".task-progress-message")).to_have_text("Read 24 files")


async def test_download(visitor: Page) -> None:
    bar = await press(visitor, "Download")
    await expect(bar.locator(".task-progress-message")).to_contain_text("MB received")
    # The total is unknown, so the widget sets no value, which makes the bar indeterminate.
    await expect(bar.locator("progress")).not_to_have_attribute("value", re.compile(".*"))
    await expect(bar.locator(".task-progress-detail")).to_have_text(re.compile(r"^\d+,\d{3}"))
    await expect_state(bar, "done")


async def test_tight_loop(visitor: Page) -> None:
    bar = await press(visitor, "Tight loop")
    await visitor.wait_for_function(f"{MOST_VALUES} >= 5")
    await expect_state(bar, "done")


async def test_count_primes(visitor: Page) -> None:
    """The bar shows the progress of a worker process, also after the page is loaded again."""
    bar = await press(visitor, "Count primes")
    await visitor.wait_for_function(f"{MOST_VALUES} >= 5", timeout=LIMIT * 1000)
    await visitor.reload()
    await expect(bar.locator(".task-progress-message")).to_contain_text("Looking for primes")
    await expect_state(bar, "done")


async def test_fail(visitor: Page) -> None:
    bar = await press(visitor, "Fail")
    await expect_state(bar, "failed")
    await expect(bar.locator(".task-progress-message")).to_have_text(
        "ValueError: row 61 has no price"
    )
    await expect(bar.locator("progress")).to_have_attribute("value", "60")


async def test_ten_at_once(visitor: Page) -> None:
    streams: list[str] = []
    visitor.on("request", lambda r: streams.append(r.url) if "/tasks/events/" in r.url else None)
    await press(visitor, "Ten at once")
    bars = visitor.locator("task-progress")
    await expect(bars).to_have_count(10)
    await visitor.wait_for_function(
        "window.values.size === 10 && [...window.values.values()].every((s) => s.size >= 5)"
    )
    SCREENSHOTS.mkdir(exist_ok=True)
    await visitor.screenshot(path=SCREENSHOTS / "ten.png", full_page=True)
    await visitor.emulate_media(color_scheme="dark")
    await visitor.screenshot(path=SCREENSHOTS / "ten-dark.png", full_page=True)
    for number in range(10):
        await expect_state(bars.nth(number), "done")
    assert len(streams) == 1
    assert streams[0].count("task=") == 10


async def test_clear_the_list(visitor: Page, example: str) -> None:
    await press(visitor, "Fail")
    await visitor.get_by_role("button", name="Clear the list").click()
    await expect(visitor.get_by_text("Nothing yet")).to_be_visible()
    assert await visitor.locator("task-progress").count() == 0


def start_action(client: httpx.Client, url: str, action: str) -> str:
    """Start a task as a button of the page does; return the URL of its event stream."""
    token = re.search(r'csrfmiddlewaretoken" value="(\w+)"', client.get(url).text)
    assert token is not None
    response = client.post(f"{url}start/", data={"action": action, "csrfmiddlewaretoken": token[1]})
    assert response.status_code == 302
    source = re.search(r'<task-progress src="/([^"]+)"', client.get(url).text)
    assert source is not None
    return url + source[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_exit_waits_for_running_task(number: signal.Signals) -> None:
    """example.py waits for a task that ends within SHUTDOWN_TIMEOUT, and logs none as lost."""
    with example_server() as (url, process), httpx.Client(timeout=LIMIT) as client:
        events_url = start_action(client, url, "fail")
        with stream(events_url) as received:
            while next(received).event != "progress":
                pass
            process.send_signal(number)
            rest = [message.event for message in received if message.data]
        assert "unknown" not in rest
        _, log = process.communicate(timeout=LIMIT)
        assert "Finished server process" in log
        assert "lost" not in log, (
            "example.py reports a task as lost that ended within SHUTDOWN_TIMEOUT"
        )


def test_exit_names_lost_tasks() -> None:
    """Log and streams report tasks as lost that do not end within SHUTDOWN_TIMEOUT."""
    with example_server() as (url, process), httpx.Client(timeout=LIMIT) as client:
        links = [start_action(client, url, "download") for _ in range(11)]
        waiting_id = re.search(r"task=([\w-]+)", links[-1])
        assert waiting_id is not None
        query = "&".join(link.partition("?")[2] for link in links)
        with stream(links[0].partition("?")[0] + "?" + query) as received:
            states = [next(received) for _ in range(1 + len(links))]
            assert [message.event for message in states].count("enqueued") == 1
            process.send_signal(signal.SIGTERM)
            rest = [message.payload for message in received if message.data]
        ends = {payload["id"]: payload for payload in rest if payload["kind"] == "finished"}
        assert len(ends) == len(links)
        _, log = process.communicate(timeout=LIMIT)
    lost = "\n".join(line for line in log.splitlines() if "lost" in line)
    # A download takes 6 s and SHUTDOWN_TIMEOUT is 5 s. Some downloads may finish, if a busy machine
    # sends the signal more than 1 s after their start.
    failed = {id for id, payload in ends.items() if payload["status"] == "FAILED"}
    assert waiting_id[1] in failed
    assert {ends[id]["error"]["reason"] for id in failed} == {"lost"}
    assert set(re.findall(r"([\w-]+) \(__main__\.download\)", lost)) == failed
