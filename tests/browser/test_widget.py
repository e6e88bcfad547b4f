"""Tests of the widget's script and stylesheet in Chromium, which a ScriptedServer serves."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import pytest
from playwright.async_api import Page, expect

from tests.support.browser import allow_errors
from tests.support.scripted_server import SLOW, TIMEOUT, Payload, ScriptedServer, Stream

SCRIPT = "/static/django_tasks_local_sse/task-progress.js"
STYLE = "/static/django_tasks_local_sse/task-progress.css"
CSP = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"


@pytest.fixture
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer().running() as scripted_server:
        scripted_server.page_headers["Content-Security-Policy"] = CSP
        yield scripted_server


def src(*ids: str, path: str = "/events/") -> str:
    return path + "?" + "&".join(f"task={quote(f'{quote(id)}.default.1abc.S-g_n')}" for id in ids)


def element(id: str = "a", attributes: str = "", inner: str = "") -> str:
    return f'<task-progress id="{id}" src="{src(id)}" {attributes}>{inner}</task-progress>'


def rendered(state: str, bar: str = 'value="30"', detail: str = "30 %", message: str = "") -> str:
    """Return the HTML that the template renders for a running task."""
    inner = f"""
      <label class="task-progress-label">
        <span class="task-progress-name">resize</span>
        <progress class="task-progress-bar" max="100" {bar}></progress>
      </label>
      <span class="task-progress-detail">{detail}</span>
      <span class="task-progress-message">{message}</span>
      <span class="task-progress-status" role="status"></span>"""
    return element("a", f'data-state="{state}"', inner)


def payload(kind: str = "progress", sequence: int = 3, **changes: Any) -> Payload:
    statuses = {"enqueued": "READY", "finished": "SUCCESSFUL", "unknown": None}
    return {
        "id": "a",
        "sequence": sequence,
        "kind": kind,
        "status": statuses.get(kind, "RUNNING"),
        "name": "resize",
        "position": None,
        "progress": None,
        "enqueued_at": "2026-01-01T00:00:00Z",
        "started_at": None,
        "finished_at": None,
        "error": None,
        "result": None,
    } | changes


def progress(percent: float | None = 30.0, **changes: Any) -> Payload:
    return {
        "current": percent,
        "total": 100,
        "percent": percent,
        "message": "",
        "data": {},
        "rate": None,
        "eta": None,
    } | changes


def failure(reason: str = "failed", **changes: Any) -> Payload:
    error = {"reason": reason, "type": None, "message": None} | changes
    return payload(
        "finished", 9, status="FAILED", error=error, progress=progress(66.0, message="m")
    )


async def visit(page: Page, server: ScriptedServer, body: str, scripts: str = "") -> None:
    """Open a page with this body; its script records every widget event in `window.seen`."""
    server.pages["/recorder.js"] = """
        window.seen = [];
        for (const type of ["task-progress", "task-finished"])
            document.addEventListener(type, ({ target, detail }) => {
                window.seen.push(`${type} ${target.id} ${detail.kind} ${detail.sequence}`);
                document.documentElement.dataset.seen = window.seen.length;
            });"""
    server.pages["/"] = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>
        <link rel="stylesheet" href="{STYLE}"><script src="/recorder.js"></script>
        <script type="module" src="{SCRIPT}"></script>{scripts}<body>{body}</body></html>"""
    await page.goto(server.url + "/")


async def show(page: Page, server: ScriptedServer, body: str = element()) -> Stream:
    await visit(page, server, body)
    return await server.next_stream()


async def expect_state(page: Page, state: str, detail: str | None = None, id: str = "a") -> None:
    await expect(page.locator(f"#{id}")).to_have_attribute("data-state", state)
    if detail is not None:
        await expect(page.locator(f"#{id} .task-progress-detail")).to_have_text(detail)


async def expect_bar(
    page: Page, value: str | None, id: str = "a", attribute: str = "value"
) -> None:
    bar = page.locator(f"#{id} progress")
    if value is None:
        await expect(bar).not_to_have_attribute(attribute, re.compile(""))
    else:
        await expect(bar).to_have_attribute(attribute, value)


async def expect_value_text(page: Page, text: str | None, id: str = "a") -> None:
    """Check the text that a screen reader announces instead of the bar's value."""
    await expect_bar(page, text, id, "aria-valuetext")


# Tests of the bar, texts and styles that the widget displays.


async def test_bare_element_builds_same_markup_as_template(
    page: Page, scripted_server: ScriptedServer
) -> None:
    outline = """() => [...document.querySelectorAll("task-progress")].map(host =>
        [...host.querySelectorAll("*")].map(e =>
            [e.tagName, e.className, e.role, e.max, e.parentElement.className].join()).join(";"))"""
    await show(page, scripted_server, element("b") + rendered("running"))
    await expect_state(page, "waiting", "Waiting", id="b")
    built, template = await page.evaluate(outline)
    assert built == template


@pytest.mark.parametrize(
    ("state", "bar", "detail", "same"),
    [
        ("running", 'value="30"', "30 %", payload(progress=progress(30.0, message="at work"))),
        (
            "running",
            'aria-valuetext="1,500"',
            "1,500",
            payload(progress=progress(None, current=1500, message="at work")),
        ),
        (
            "waiting",
            'value="0" aria-valuetext="Waiting, 2 before it"',
            "Waiting, 2 before it",
            payload("enqueued", position=2, progress=progress(None, message="at work")),
        ),
    ],
)
async def test_rendered_markup_is_taken_over_unchanged(
    state: str, bar: str, detail: str, same: Payload, page: Page, scripted_server: ScriptedServer
) -> None:
    markup = rendered(state, bar, detail, message="at work")
    stream = await show(page, scripted_server, markup)
    assert await page.evaluate("document.body.innerHTML") == markup
    await page.evaluate("""() => {
        window.mutations = 0;
        new MutationObserver(list => window.mutations += list.length).observe(document.body,
            { subtree: true, childList: true, attributes: true, characterData: true });
    }""")
    await stream.send(same)
    await expect(page.locator("html")).to_have_attribute("data-seen", "1")
    await page.evaluate("new Promise(requestAnimationFrame)")
    assert await page.evaluate("window.mutations") == 0
    await stream.send(payload(sequence=4, progress=progress(31.0)))
    await expect_state(page, "running", "31 %")
    await expect_bar(page, "31")
    await expect_value_text(page, None)


STATES: list[tuple[Payload, str, str, str | None]] = [
    (payload("enqueued", 1), "waiting", "Waiting", "0"),
    (payload("enqueued", 1, position=0), "waiting", "Waiting", "0"),
    (payload("enqueued", 1, position=1234), "waiting", "Waiting, 1,234 before it", "0"),
    (payload("started", 2), "running", "Running", None),
    (payload(progress=progress(42.9)), "running", "42 %", "42.9"),
    (payload(progress=progress(0)), "running", "0 %", "0"),
    (payload(progress=progress(99.99, eta=0.5)), "running", "99 %", "99.99"),
    (payload(progress=progress(42, eta=8.2)), "running", "42 % · 8 s left", "42"),
    (payload(progress=progress(42, eta=240)), "running", "42 % · 4 min left", "42"),
    (payload(progress=progress(42, eta=9000)), "running", "42 % · 2.5 h left", "42"),
    (payload(progress=progress(None, current=1500)), "running", "1,500", None),
    (payload(progress=progress(None)), "running", "Running", None),
    (payload("finished", 5), "done", "Done", "100"),
    (payload("finished", 5, progress=progress(None, current=7)), "done", "Done", "100"),
    (failure(), "failed", "Failed", "66"),
    (failure("lost"), "failed", "Lost", "66"),
    (failure("died"), "failed", "Crashed", "66"),
    (failure("timeout"), "failed", "Timed out", "66"),
    (failure("news"), "failed", "Failed", "66"),
    (failure("cancelled"), "cancelled", "Cancelled", "66"),
    (payload("finished", 5, status="FAILED"), "failed", "Failed", "0"),
    (payload("unknown", 0, name=None), "unknown", "Unknown task", "0"),
]


async def test_state_of_each_payload(page: Page, scripted_server: ScriptedServer) -> None:
    ids = [f"t{n}" for n in range(len(STATES))]
    stream = await show(page, scripted_server, "".join(map(element, ids)))
    await stream.send(*({**event, "id": id} for id, (event, *_) in zip(ids, STATES, strict=True)))
    for id, (_, state, detail, value) in zip(ids, STATES, strict=True):
        await expect_state(page, state, detail, id)
        await expect_bar(page, value, id)
        has_no_value = value is None or state == "waiting"
        await expect_value_text(page, detail if has_no_value else None, id)


async def test_message_of_failed_task(page: Page, scripted_server: ScriptedServer) -> None:
    stream = await show(page, scripted_server, element("a") + element("b") + element("c"))
    await stream.send(
        {**failure(type="app.errors.BadRow", message="row 3"), "id": "a"},
        {**failure(type="ValueError", message=""), "id": "b"},
        # If the server does not expose the error, the widget keeps the task's last message.
        {**failure(), "id": "c"},
    )
    for id, text in {"a": "BadRow: row 3", "b": "ValueError", "c": "m"}.items():
        await expect(page.locator(f"#{id} .task-progress-message")).to_have_text(text)


async def test_message_is_not_interpreted_as_html(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server)
    markup = "<img src=x onerror=alert(1)><b>bold</b> &amp; 🎉\nsecond line"
    await stream.send(payload(name="<i>n</i>", progress=progress(message=markup)))
    await expect(page.locator("html")).to_have_attribute("data-seen", "1")
    message = page.locator(".task-progress-message")
    await expect(message).to_contain_text("second line")
    assert await message.evaluate("e => e.textContent") == markup
    await expect(page.locator(".task-progress-name")).to_have_text("<i>n</i>")
    assert await page.locator("task-progress :is(img, b, i)").count() == 0


async def test_long_message_does_not_break_the_layout(
    page: Page, scripted_server: ScriptedServer
) -> None:
    texts = {"a": "word " * 200_000, "b": "x" * 1_000_000, "c": "line\n" * 200_000}
    stream = await show(page, scripted_server, "".join(map(element, texts)))
    for id, text in texts.items():
        event = payload(id=id, name="n" * 5000, progress=progress(message=text))
        await stream.send(event)
        await expect_state(page, "running", "30 %", id)
        box = await page.locator(f"#{id}").bounding_box()
        assert box is not None
        assert box["height"] < 120
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert await page.evaluate("document.documentElement.scrollHeight <= innerHeight")
    # The widget truncates the text, because the browser would lay out a million characters at
    # each event, although the bar shows only two lines of them.
    assert (
        await page.locator("#b .task-progress-message").evaluate("e => e.textContent.length") < 5000
    )


async def test_label_attribute(page: Page, scripted_server: ScriptedServer) -> None:
    labels = element("a", 'label="Import"') + element("b") + element("c", 'label=""')
    stream = await show(page, scripted_server, labels)
    await stream.send(payload(), payload(id="b"), payload(id="c"))
    # The locators use role and name, as screen readers do, so they also find hidden labels.
    await expect(page.locator("#a").get_by_role("progressbar", name="Import")).to_be_visible()
    await expect(page.locator("#b").get_by_role("progressbar", name="resize")).to_be_visible()
    await expect(page.locator("#c").get_by_role("progressbar", name="resize")).to_be_visible()
    name = await page.locator("#c .task-progress-name").bounding_box()
    assert name is not None
    assert name["width"] <= 1
    await page.locator("#a").evaluate("e => e.setAttribute('label', 'Export')")
    await expect(page.get_by_role("progressbar", name="Export")).to_be_visible()


async def test_status_announces_states_only(page: Page, scripted_server: ScriptedServer) -> None:
    stream = await show(page, scripted_server, element("a", 'label="Import"'))
    status = page.locator("#a").get_by_role("status")
    await expect(status).to_have_text("")
    await page.evaluate("""() => {
        window.said = [];
        const status = document.querySelector("#a [role=status]");
        new MutationObserver(() => window.said.push(status.textContent))
            .observe(status, { childList: true, characterData: true, subtree: true });
    }""")
    await stream.send(payload("started", 2))
    await expect(status).to_have_text("Import: Running")
    for n in range(3, 8):
        await stream.send(payload(sequence=n, progress=progress(n * 10, eta=n + 2)))
        await expect_bar(page, str(n * 10))
    await stream.send(failure("timeout"))
    await expect(status).to_have_text("Import: Timed out")
    assert await page.evaluate("window.said") == ["Import: Running", "Import: Timed out"]


async def test_page_styles_override_stylesheet(page: Page, scripted_server: ScriptedServer) -> None:
    scripted_server.pages["/site.css"] = """
        progress { height: 30px }
        :root { --task-progress-color: rgb(1, 2, 3) }"""
    site = '<link rel="stylesheet" href="/site.css">'
    await visit(
        page,
        scripted_server,
        site + rendered("running", "", "") + f'<link rel="stylesheet" href="{STYLE}">',
    )
    bar = page.locator("progress")
    # The page's rule wins although the page loads the widget's stylesheet after its own.
    await expect(bar).to_have_css("height", "30px")
    await expect(bar).to_have_css("background-image", re.compile(r"rgb\(1, 2, 3\)"))


# Tests of the events that the widget receives and fires.


async def test_events_bubble_and_task_finished_fires_once(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server)
    finished = payload("finished", 5)
    with suppress(ConnectionResetError):  # The page closes the stream at the first `finished`.
        await stream.send(payload("started", 2), payload(), finished, finished, payload(sequence=9))
    await stream.wait_closed()
    await expect_state(page, "done")
    assert await page.evaluate("window.seen") == [
        "task-progress a started 2",
        "task-progress a progress 3",
        "task-progress a finished 5",
        "task-finished a finished 5",
    ]


async def test_stale_events_are_ignored(page: Page, scripted_server: ScriptedServer) -> None:
    stream = await show(page, scripted_server)
    await stream.send(
        payload(sequence=5, progress=progress(50)),
        payload(sequence=5, progress=progress(55)),
        payload(sequence=4, progress=progress(40)),
        payload("enqueued", 1),
        payload("finished", 2),  # The widget accepts `finished` with any sequence.
    )
    await expect_state(page, "done")
    assert await page.evaluate("window.seen") == [
        "task-progress a progress 5",
        "task-progress a finished 2",
        "task-finished a finished 2",
    ]


async def test_position_in_queue_never_increases(
    page: Page, scripted_server: ScriptedServer
) -> None:
    markup = rendered("waiting", 'value="0"', "Waiting, 3 before it")
    stream = await show(page, scripted_server, markup)
    await expect_state(page, "waiting", "Waiting, 3 before it")
    for position in (3, 1, 2, 1, None):  # The widget ignores a position that is not smaller.
        await stream.send(payload("enqueued", 1, position=position))
    await expect_state(page, "waiting", "Waiting, 1 before it")
    await stream.send(payload("enqueued", 1, position=0))
    await expect_state(page, "waiting", "Waiting")
    await stream.send(payload("started", 2), payload("enqueued", 1, position=0))
    await expect_state(page, "running", "Running")
    assert await page.evaluate("window.seen") == [
        *["task-progress a enqueued 1"] * 3,
        "task-progress a started 2",
    ]
    # To screen readers the status element announces changes of the state, not of the position.
    await expect(page.locator("#a").get_by_role("status")).to_have_text("resize: Running")


async def test_element_shows_final_state_before_task_finished(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server)
    await page.evaluate("""() => document.addEventListener("task-finished", ({ target }) => {
        window.shown = target.dataset.state;
        target.remove();
    })""")
    await stream.send(payload("finished", 5))
    await expect(page.locator("task-progress")).to_have_count(0)
    assert await page.evaluate("window.shown") == "done"


async def test_invalid_data_is_skipped(page: Page, scripted_server: ScriptedServer) -> None:
    stream = await show(page, scripted_server)
    for data in ("{", "null", "7", '"text"', "[]", "{}"):
        await stream.raw(f"event: progress\ndata: {data}\n\n")
    await stream.send(payload("started", 2))
    await expect_state(page, "running")


async def test_invalid_src_is_skipped(page: Page, scripted_server: ScriptedServer) -> None:
    bad = ("", "src=''", "src='/events/'", "src='http://['", "src='?task=%25'")
    body = "".join(f"<task-progress {src}></task-progress>" for src in bad)
    stream = await show(page, scripted_server, body + element())
    assert stream.tasks == ["a"]
    await stream.send(payload("started", 2))
    await expect_state(page, "running")


async def test_href_is_followed_on_success(page: Page, scripted_server: ScriptedServer) -> None:
    scripted_server.pages["/done/"] = "<title>done</title>"
    scripted_server.pages["/start/"] = "<title>start</title>"
    await page.goto(scripted_server.url + "/start/")
    stream = await show(page, scripted_server, element("a", 'href="/done/"'))
    await stream.send(payload("finished", 5))
    await page.wait_for_url("**/done/")
    # The widget replaced the progress page in the history, because that would redirect again.
    await page.go_back()
    await expect(page).to_have_title("start")


async def test_href_is_not_followed_without_success(
    page: Page, scripted_server: ScriptedServer
) -> None:
    ends = {"a": failure(), "b": failure("cancelled"), "c": payload("unknown", 0)}
    body = "".join(element(id, 'href="/done/"') for id in ends)
    stream = await show(page, scripted_server, body + element("d"))
    await stream.send(*({**event, "id": id} for id, event in ends.items()))
    await stream.send(payload("started", 2, id="d"))
    await expect_state(page, "running", id="d")
    assert page.url == scripted_server.url + "/"


async def test_href_can_be_prevented_and_never_runs_a_script(
    page: Page, scripted_server: ScriptedServer
) -> None:
    # The Content-Security-Policy would also block the script in `href`, so remove it.
    scripted_server.page_headers.clear()
    body = element("a", 'href="/done/"') + element("b", 'href="javascript:window.evil=1"')
    stream = await show(page, scripted_server, body)
    await page.evaluate("""document.querySelector("#a").addEventListener("task-finished",
        event => event.preventDefault())""")
    await stream.send(payload("finished", 5), payload("finished", 5, id="b"))
    await expect_state(page, "done", id="a")
    await expect_state(page, "done", id="b")
    assert page.url == scripted_server.url + "/"
    assert await page.evaluate("window.evil") is None


async def test_invalid_href_is_skipped(page: Page, scripted_server: ScriptedServer) -> None:
    stream = await show(page, scripted_server, element("a", 'href="http://["') + element("b"))
    async with page.expect_console_message(lambda message: message.type == "warning") as warning:
        await stream.send(payload("finished", 5), payload("finished", 5, id="b"))
    assert "not a page's href http://[" in (await warning.value).text
    await expect_state(page, "done", id="a")
    await expect_state(page, "done", id="b")


# Tests of how many streams the widgets of a page open, and when they close them.


async def test_ten_elements_share_a_connection(page: Page, scripted_server: ScriptedServer) -> None:
    ids = [f"t{n}" for n in range(10)]
    stream = await show(page, scripted_server, "".join(map(element, ids)))
    assert stream.tasks == ids
    await stream.send(*(payload(id=id, progress=progress(n)) for n, id in enumerate(ids)))
    for n, id in enumerate(ids):
        await expect_bar(page, str(n), id=id)
    await stream.send(*(payload("finished", 9, id=id) for id in ids[1:]))
    await stream.send(payload("unknown", 0, id=ids[0]))
    await stream.wait_closed()
    assert len(scripted_server.requests) == 1


async def test_task_ids_are_decoded_and_other_parameters_kept(
    page: Page, scripted_server: ScriptedServer
) -> None:
    url = src("ü/?&%41") + "&amp;lang=de#x"
    stream = await show(
        page, scripted_server, f'<task-progress id="a" src="{url}"></task-progress>'
    )
    assert stream.tasks == ["ü/?&%41"]
    assert "lang=de" in stream.target
    await stream.send(payload("started", 2, id="ü/?&%41"))
    await expect_state(page, "running")


async def test_long_urls_are_split(page: Page, scripted_server: ScriptedServer) -> None:
    ids = [f"{n:036d}" for n in range(150)]
    await visit(page, scripted_server, "".join(element(id) for id in ids))
    streams = [await scripted_server.next_stream() for _ in range(3)]
    assert sorted(id for stream in streams for id in stream.tasks) == ids
    assert all(len(scripted_server.url + stream.target) < 4000 for stream in streams)
    for stream in streams:
        await stream.send(*(payload("finished", 5, id=id) for id in stream.tasks))
        await stream.wait_closed()
    assert len(scripted_server.requests) == 3


async def test_elements_of_one_task_share_its_events(
    page: Page, scripted_server: ScriptedServer
) -> None:
    twin = element().replace('id="a"', 'id="b"')
    stream = await show(page, scripted_server, element() + twin)
    assert stream.tasks == ["a"]
    await stream.send(payload())
    await expect_state(page, "running", id="a")
    await expect_state(page, "running", id="b")


async def test_each_path_has_its_own_connection(
    page: Page, scripted_server: ScriptedServer
) -> None:
    other = f'<task-progress id="b" src="{src("b", path="/events/x/")}"></task-progress>'
    await visit(page, scripted_server, element() + other)
    streams = [await scripted_server.next_stream(), await scripted_server.next_stream()]
    assert sorted(stream.tasks for stream in streams) == [["a"], ["b"]]


async def test_elements_inserted_later(page: Page, scripted_server: ScriptedServer) -> None:
    await visit(page, scripted_server, '<div id="box"></div>')
    insert = "html => document.querySelector('#box').insertAdjacentHTML('beforeend', html)"
    await page.evaluate(insert, element("a"))
    first = await scripted_server.next_stream()
    await first.send(payload(progress=progress(30)))
    await expect_bar(page, "30")
    await page.evaluate(insert, element("b") + element("c"))
    second = await scripted_server.next_stream()
    await first.wait_closed()
    assert second.tasks == ["a", "b", "c"]
    assert scripted_server.open == 1
    await expect_bar(page, "30")
    assert await page.evaluate("window.seen") == ["task-progress a progress 3"]


async def test_removed_elements_close_the_connection(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server, element("a") + element("b"))
    await page.evaluate("document.querySelector('#a').remove()")
    await stream.send(payload("started", 2), payload("started", 2, id="b"))
    await expect_state(page, "running", id="b")
    assert not stream.closed.is_set()  # The element `b` still needs the connection.
    await page.evaluate("document.querySelector('#b').remove()")
    await stream.wait_closed()
    assert len(scripted_server.requests) == 1


async def test_moved_element_keeps_its_connection(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server, element() + '<div id="box"></div>')
    await stream.send(payload(progress=progress(30)))
    await expect_bar(page, "30")
    await page.evaluate("""async () => {
        const element = document.querySelector("#a");
        element.remove();
        await null;
        document.querySelector("#box").append(element);
    }""")
    await stream.send(payload(sequence=4, progress=progress(31)))
    await expect_bar(page, "31")
    assert len(scripted_server.requests) == 1


async def test_element_removed_and_inserted_again(
    page: Page, scripted_server: ScriptedServer
) -> None:
    first = await show(page, scripted_server)
    await first.send(payload(progress=progress(30)))
    await expect_bar(page, "30")
    await page.evaluate("(window.kept = document.querySelector('#a')).remove()")
    await first.wait_closed()
    await page.evaluate("document.body.append(window.kept)")
    second = await scripted_server.next_stream()
    await second.send(payload(progress=progress(30)), payload(sequence=4, progress=progress(40)))
    await expect_bar(page, "40")
    assert len(await page.evaluate("window.seen")) == 2


INSERT = "html => document.body.insertAdjacentHTML('beforeend', html)"


def twin(id: str) -> str:
    """Return another element for the task `a`."""
    return element("a").replace('id="a"', f'id="{id}"')


async def test_inserted_element_shows_state_known_to_page(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server, element("a") + element("b"))
    await stream.send(payload(sequence=7, progress=progress(30)), payload("started", 2, id="b"))
    await expect_state(page, "running", id="b")
    await page.evaluate(INSERT, twin("late"))
    await expect_state(page, "running", "30 %", id="late")
    await expect_bar(page, "30", id="late")
    await page.evaluate(
        "src => document.querySelector('#b').setAttribute('src', src)",
        src("a"),
    )
    await expect_state(page, "running", "30 %", id="b")
    # For the inserted elements the page made no request and fired no event.
    assert len(scripted_server.requests) == 1
    assert await page.evaluate("window.seen") == [
        "task-progress a progress 7",
        "task-progress b started 2",
    ]
    await stream.send(payload(sequence=8, progress=progress(40)))
    await expect_bar(page, "40", id="late")


async def test_newer_rendered_state_is_kept(page: Page, scripted_server: ScriptedServer) -> None:
    # With a third-party backend the server renders a page with the state in the store. The stream
    # polls the store, so the state in the page may be newer than the last event of the stream.
    stream = await show(page, scripted_server)
    await stream.send(payload(sequence=5, progress=progress(30)))
    await expect_bar(page, "30")
    for id, sequence in {"later": 6, "earlier": 4}.items():
        html = rendered("running", 'value="50"', "50 %").replace('id="a"', f'id="{id}"')
        html = html.replace("data-state", f'data-sequence="{sequence}" data-state')
        await page.evaluate(INSERT, html)
    await expect_state(page, "running", "30 %", id="earlier")
    await expect_state(page, "running", "50 %", id="later")
    # The widget compares sequences only between events of the same task.
    await page.evaluate(INSERT, element("b"))
    again = await scripted_server.next_stream()
    await again.send(payload(sequence=2, id="b", progress=progress(10)))
    await expect_bar(page, "10", id="b")
    await page.locator("#later").evaluate("(e, src) => e.setAttribute('src', src)", src("b"))
    await expect_state(page, "running", "10 %", id="later")


async def test_page_that_re_renders_at_each_event(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server, f"<div>{element()}</div>")
    await page.evaluate(
        """html => {
            window.renderings = 0;
            const render = () => {
                window.renderings++;
                const elements = new DOMParser().parseFromString(html, "text/html").body;
                document.querySelector("div").replaceChildren(...elements.children);
            };
            document.addEventListener("task-progress", render);
            document.addEventListener("task-finished", render);
        }""",
        element(),
    )
    for n in (3, 4):
        await stream.send(payload(sequence=n, progress=progress(n * 10)))
        await expect_bar(page, f"{n * 10}")
    # A new element that shows the known state fires no event, because the page would render at
    # that event again, without end.
    assert await page.evaluate("window.renderings") == 2
    await stream.send(payload("finished", 5))
    await expect_state(page, "done", "Done")
    await stream.wait_closed()
    assert len(scripted_server.requests) == 1
    # The page replaces the first element before that fires `task-finished`, so the new element
    # fires this event.
    assert (await page.evaluate("window.seen"))[-2:] == [
        "task-progress a finished 5",
        "task-finished a finished 5",
    ]
    assert await page.evaluate("window.renderings") == 4


async def test_src_changed_to_another_task(page: Page, scripted_server: ScriptedServer) -> None:
    first = await show(page, scripted_server)
    await first.send(payload("finished", 50, progress=progress(message="old")))
    await expect_state(page, "done")
    await page.evaluate("src => document.querySelector('#a').setAttribute('src', src)", src("b"))
    second = await scripted_server.next_stream()
    assert second.tasks == ["b"]
    await expect_state(page, "waiting", "Waiting")
    await expect(page.locator(".task-progress-message")).to_have_text("")
    await second.send(payload("started", 2, id="b"))
    await expect_state(page, "running")
    await second.send(payload("finished", 3, id="b"))
    await expect_state(page, "done")
    assert (await page.evaluate("window.seen"))[-1] == "task-finished a finished 3"


async def test_src_changed_to_new_link_to_same_task(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server)
    await stream.send(payload(progress=progress(30)))
    await expect_bar(page, "30")
    fresh = src("a").replace("1abc", "2abc")
    await page.evaluate("src => document.querySelector('#a').setAttribute('src', src)", fresh)
    await stream.send(payload(sequence=4, progress=progress(31)))
    await expect_bar(page, "31")
    assert len(scripted_server.requests) == 1


async def test_task_finished_fires_for_rendered_final_state(
    page: Page, scripted_server: ScriptedServer
) -> None:
    # A task may end before the server renders the page. The widget fires `task-finished` also
    # then, because the page's listeners need this event.
    stream = await show(page, scripted_server, rendered("done", 'value="100"', "Done"))
    await stream.send(payload("finished", 5))
    await stream.wait_closed()
    assert len(await page.evaluate("window.seen")) == 2


async def test_unknown_task_that_becomes_known(page: Page, scripted_server: ScriptedServer) -> None:
    stream = await show(page, scripted_server, element("a") + element("b"))
    await stream.send(payload(sequence=7), payload("unknown", 0), payload("unknown", 0))
    await expect_state(page, "unknown")
    await stream.send(payload("started", 2))
    # After `started` the task is no longer unknown, so the widget waits for its end again.
    again = await scripted_server.next_stream()
    assert sorted(again.tasks) == ["a", "b"]
    await expect_state(page, "running")
    assert len(await page.evaluate("window.seen")) == 3


# Tests of connection errors, after which the widget connects again.


async def test_polling_is_not_reconnecting(page: Page, scripted_server: ScriptedServer) -> None:
    await page.clock.install()
    await visit(page, scripted_server, element())
    await page.evaluate("""() => {
        window.states = [];
        new MutationObserver(() => window.states.push(document.querySelector("#a").dataset.state))
            .observe(document.querySelector("#a"), { attributeFilter: ["data-state"] });
    }""")
    # The widget shows `reconnecting` after 3 s without a connection. Each gap is shorter than that,
    # and their sum is longer.
    for n in range(3, 9):
        stream = await scripted_server.next_stream()
        await stream.send(payload(sequence=n, progress=progress(n)))
        await expect_bar(page, str(n))
        await stream.end()
        await page.clock.run_for(1000)
    stream = await scripted_server.next_stream()
    await stream.send(payload("finished", 9))
    await expect_state(page, "done")
    assert await page.evaluate("window.states") == ["running", "done"]


async def test_reconnecting_state_appears_and_disappears(
    page: Page, scripted_server: ScriptedServer
) -> None:
    allow_errors(page, "status of 503")
    await page.clock.install()
    body = rendered("running", detail="30 %") + element("b")
    stream = await show(page, scripted_server, body)
    await stream.send(payload(id="b", progress=progress(55)))
    await expect_bar(page, "55", id="b")
    scripted_server.status = 503
    await stream.end()
    await scripted_server.wait_requests(2)
    # The widget shows `reconnecting` only after 3 s without a connection.
    await expect_state(page, "running", "30 %")
    await page.clock.run_for(3100)
    await expect_state(page, "reconnecting", "Reconnecting…")
    await expect_state(page, "reconnecting", "Reconnecting…", id="b")
    await expect_bar(page, "55", id="b")
    scripted_server.status = 200
    await page.clock.run_for(10_000)
    await scripted_server.next_stream()
    # An open connection ends the state `reconnecting`, because the server may send no event.
    await page.clock.run_for(100)
    await expect_state(page, "running", "30 %")
    await expect_state(page, "running", "55 %", id="b")


async def test_back_off_until_server_recovers(page: Page, scripted_server: ScriptedServer) -> None:
    allow_errors(page, "status of 503")
    scripted_server.answers.extend([503] * 3)
    await page.clock.install()
    await visit(page, scripted_server, element())
    for n in range(1, 4):
        await scripted_server.wait_requests(n)
        await page.clock.run_for(1000 * 2 ** (n - 1))
    stream = await scripted_server.next_stream()
    await stream.send(payload("finished", 5))
    await expect_state(page, "done")
    assert len(scripted_server.requests) == 4


async def test_permanently_refused_requests_back_off(
    page: Page, scripted_server: ScriptedServer
) -> None:
    allow_errors(page, "status of 403")
    scripted_server.status = 403
    await page.clock.install()
    await page.clock.pause_at("2100-01-01")
    await visit(page, scripted_server, element())
    await page.clock.run_for(50)
    for _ in range(60):  # Let ten minutes pass, in steps of 10 s.
        count = len(scripted_server.requests)
        await page.clock.run_for(10_000)
        # The server receives this request after all that the widget has made before.
        await page.evaluate("fetch('/favicon.ico')")
        assert len(scripted_server.requests) - count <= 5
    # The widget retries after at most 1, 2, 4, 8 and 16 s, then every 15 to 30 s.
    assert 10 <= len(scripted_server.requests) <= 6 + 600 / 15
    await expect_state(page, "reconnecting")
    await page.evaluate("document.querySelector('#a').remove()")
    await page.clock.run_for(100)
    count = len(scripted_server.requests)
    await page.clock.run_for(120_000)
    await page.evaluate("fetch('/favicon.ico')")
    assert len(scripted_server.requests) == count


async def test_online_event_reconnects_immediately(
    page: Page, scripted_server: ScriptedServer
) -> None:
    allow_errors(page, "status of 503")
    scripted_server.answers.append(503)
    await page.clock.install()
    # The page's clock stands still, so only the event `online` can end the back-off.
    await page.clock.pause_at("2100-01-01")
    await visit(page, scripted_server, element())
    await page.clock.run_for(50)
    await scripted_server.wait_requests(1)
    await page.evaluate("dispatchEvent(new Event('online'))")
    stream = await scripted_server.next_stream()
    await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await stream.send(payload("finished", 5))
    await expect_state(page, "done")
    assert len(scripted_server.requests) == 2


async def test_visibility_change_reconnects_immediately(
    page: Page, scripted_server: ScriptedServer
) -> None:
    allow_errors(page, "status of 503")
    scripted_server.answers.append(503)
    await page.clock.install()
    await page.clock.pause_at("2100-01-01")
    await visit(page, scripted_server, element())
    await page.clock.run_for(50)
    await scripted_server.wait_requests(1)
    async with asyncio.timeout(TIMEOUT):
        # The widget ignores the event until the browser has received the answer 503.
        while len(scripted_server.requests) < 2:
            await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    await scripted_server.next_stream()


async def test_no_content_ends_reconnecting(page: Page, scripted_server: ScriptedServer) -> None:
    await page.clock.install()
    stream = await show(page, scripted_server)
    scripted_server.status = 204
    await stream.send(payload("finished", 5))
    await stream.end()
    await expect_state(page, "done")
    await page.clock.run_for(120_000)
    await page.evaluate("fetch('/favicon.ico')")
    assert len(scripted_server.requests) == 1


async def test_page_restored_from_back_forward_cache(
    page: Page, scripted_server: ScriptedServer
) -> None:
    stream = await show(page, scripted_server)
    await stream.send(payload(progress=progress(30)))
    await expect_bar(page, "30")
    await page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")
    await stream.wait_closed()
    await page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    again = await scripted_server.next_stream()
    await again.send(payload(sequence=4, progress=progress(40)))
    await expect_bar(page, "40")


async def test_module_loaded_twice(page: Page, scripted_server: ScriptedServer) -> None:
    again = f'<script type="module" src="{SCRIPT}?again"></script>'
    await visit(page, scripted_server, element(), again)
    stream = await scripted_server.next_stream()
    await stream.send(payload("started", 2))
    await expect_state(page, "running")
    same = f"import('{SCRIPT}').then(m => m.TaskProgressElement.define() === \
        customElements.get('task-progress'))"
    assert await page.evaluate(same) is True
    assert len(scripted_server.requests) == 1


async def test_module_that_runs_before_the_elements_are_parsed(
    page: Page, scripted_server: ScriptedServer
) -> None:
    first, second = rendered("running").split("<progress")
    html = f"""<!doctype html><script type="module" async src="{SCRIPT}"></script>
        <body>{first}{SLOW}<progress{second}{element("b")}</body>"""
    scripted_server.pages["/"] = html
    await page.goto(scripted_server.url + "/", wait_until="commit")
    await expect(page.locator("task-progress:defined")).to_have_count(1)
    scripted_server.released.set()
    stream = await scripted_server.next_stream()
    assert stream.tasks == ["a", "b"]
    await expect(page.locator("#a > *")).to_have_count(4)
    await expect(page.locator("#a")).to_have_attribute("data-state", "running")
