"""Tests of streams that Chromium reads with a plain `new EventSource(url)`, without the widget."""

import asyncio
from pathlib import Path
from typing import Any

import django_eventstream
import httpx
import httpx_sse
import pytest
from django.test import override_settings
from playwright.async_api import Page

from django_tasks_local.hub import hub
from django_tasks_local_sse.access import events_url
from tests.project import tasks
from tests.support.browser import RECEIVE_EVENTS, allow_errors
from tests.support.factories import anonymous_request
from tests.support.waiting import LIMIT, AnyResult, running


async def listen(page: Page, server: str, *results: AnyResult) -> tuple[list[Any], list[int]]:
    """Return the events that the browser received, and the statuses of its requests."""
    answers: list[int] = []
    page.on("response", lambda r: answers.append(r.status) if "/events/" in r.url else None)
    await page.goto(server + "/")
    path = events_url(anonymous_request(), *results)
    return await asyncio.wait_for(page.evaluate(RECEIVE_EVENTS, path), LIMIT), answers


async def test_event_source_ends_after_last_event(page: Page, server: str) -> None:
    result = await tasks.steps.aenqueue(200, 0.005)
    seen, answers = await listen(page, server, result)
    order = ["enqueued", "started", "progress", "finished"]
    positions = [order.index(kind) for kind, _ in seen]
    assert positions == sorted(positions)
    assert seen[-1][0] == "finished"
    assert [kind for kind, _ in seen].count("finished") == 1
    sequences = [sequence for _, sequence in seen]
    assert sequences == sorted(set(sequences))
    # An EventSource reconnects whenever its stream ends; the server's answer 204 ends that.
    assert answers == [200, 204]


async def test_event_source_of_known_and_unknown_tasks(page: Page, server: str) -> None:
    results = [await tasks.noop.aenqueue() for _ in range(3)]
    async with hub.subscribe(*(result.id for result in results)) as subscription:
        async for _ in subscription:
            pass
    hub.release(hub.find(results[0].id))
    seen, answers = await listen(page, server, *results)
    assert sorted(kind for kind, _ in seen) == ["finished", "finished", "unknown"]
    assert answers == [200, 204]


async def test_event_source_with_invalid_token(page: Page, server: str) -> None:
    allow_errors(page, "403")
    result = await tasks.noop.aenqueue()
    object.__setattr__(result, "id", "another")
    good = events_url(anonymous_request(), result)
    await page.goto(server + "/")
    seen = await asyncio.wait_for(page.evaluate(RECEIVE_EVENTS, good[:-1]), LIMIT)
    assert seen == []


# Opens an EventSource to another origin; resolves with "finished", or "refused" at an error.
OTHER_ORIGIN = """(url) => new Promise((resolve) => {
  const source = new EventSource(url);
  source.addEventListener("finished", () => { source.close(); resolve("finished"); });
  source.onerror = () => resolve("refused");
})"""


@pytest.mark.parametrize("allowed", ["string", "list", "none"])
async def test_event_source_from_another_origin(page: Page, server: str, allowed: str) -> None:
    """A page of another origin may read a stream if EVENTSTREAM_ALLOW_ORIGIN names the origin."""
    setting: Any = {"string": server, "list": ["https://www.example", server], "none": ""}
    result = await tasks.noop.aenqueue()
    async with hub.subscribe(result.id) as subscription:
        async for _ in subscription:
            pass
    allow_errors(page, "CORS|ERR_FAILED")
    await page.goto(server + "/")
    url = server.replace("127.0.0.1", "localhost") + events_url(anonymous_request(), result)
    with override_settings(EVENTSTREAM_ALLOW_ORIGIN=setting[allowed]):
        answer = await asyncio.wait_for(page.evaluate(OTHER_ORIGIN, url), LIMIT)
    assert answer == ("refused" if allowed == "none" else "finished")


# Other clients


async def test_reconnecting_event_source_receives_finished_again(page: Page, server: str) -> None:
    """
    django-eventstream's client reconnects after a 204, and sends the last id as a parameter.

    It makes a new EventSource each time, which does not have the id for the header.
    """
    result = await tasks.noop.aenqueue()
    statuses: list[int] = []
    enough = asyncio.Event()

    def note(status: int) -> None:
        statuses.append(status)
        if len(statuses) >= 5:
            enough.set()

    page.on("response", lambda r: note(r.status) if "/events/" in r.url else None)
    await page.goto(server + "/")
    folder = Path(django_eventstream.__file__).parent / "static" / "django_eventstream"
    await page.add_script_tag(path=folder / "reconnecting-eventsource.js")
    await page.evaluate(
        """(url) => {
          window.finished = 0;
          const source = new ReconnectingEventSource(url, {max_retry_time: 50});
          source.addEventListener("finished", () => window.finished++);
        }""",
        events_url(anonymous_request(), result),
    )
    await asyncio.wait_for(enough.wait(), LIMIT)
    assert await page.evaluate("window.finished") == 1
    assert (statuses[0], set(statuses[1:])) == (200, {204})


def test_httpx_sse_receives_empty_events(server: str, gate: str) -> None:
    """Each event of this client has data: neither `retry:` nor a comment makes an empty one."""
    result = running(tasks.gated.enqueue(gate))
    url = server + events_url(anonymous_request(), result)
    lines: list[str] = []
    with (
        override_settings(TASKS_SSE={"KEEPALIVE": 0.01}),
        httpx.stream("GET", url, timeout=LIMIT) as response,
    ):
        for line in response.iter_lines():
            lines.append(line)
            if lines[-3:] == [":"] * 3:
                tasks.gates[gate].set()
    content = "".join(line + "\n" for line in lines)
    headers = {"Content-Type": "text/event-stream"}
    replay = httpx.MockTransport(lambda _: httpx.Response(200, headers=headers, text=content))
    with (
        httpx.Client(transport=replay) as client,
        httpx_sse.connect_sse(client, "GET", url) as source,
    ):
        received = [(event.event, event.retry, event.data != "") for event in source.iter_sse()]
    assert received == [("progress", 1000, True), ("finished", None, True)]
