"""`{% task_progress %}` and `{% task_progress_media %}`, as the server renders them."""

from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.tasks import TaskResultStatus
from django.template import Context, Template
from django.template.backends.django import DjangoTemplates
from django.test import RequestFactory, override_settings
from django.utils import translation
from django.utils.csp import CSP, LazyNonce
from playwright.async_api import Page as BrowserPage
from playwright.async_api import expect

from django_tasks_local import cancel
from django_tasks_local.events import (
    LAST_SEQUENCE,
    EventKind,
    FailureReason,
    Progress,
    TaskEvent,
    TaskFailure,
)
from django_tasks_local.hub import hub
from django_tasks_local_sse import rendering
from tests.project import tasks
from tests.support.waiting import AnyResult, finished, running, wait_for_event

BAR = "{% load django_tasks_local_sse %}{% task_progress result %}"
MEDIA = "{% load django_tasks_local_sse %}{% task_progress_media %}"


def render(result: Any, arguments: str = "") -> str:
    template = Template(
        "{% load django_tasks_local_sse %}{% task_progress result " + arguments + " %}"
    )
    return template.render(Context({"result": result, "request": RequestFactory().get("/")}))


def engine(**options: Any) -> DjangoTemplates:
    return DjangoTemplates({"NAME": "test", "DIRS": [], "APP_DIRS": True, "OPTIONS": options})


class Page(HTMLParser):
    """The elements of a page, by name, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: dict[str, dict[str, str | None]] = {}
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] = dict(attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def state(result: AnyResult) -> tuple[str | None, str | None, Page]:
    page = Page(render(result))
    return (
        page.elements["task-progress"]["data-state"],
        page.elements["progress"].get("value"),
        page,
    )


@pytest.mark.parametrize(
    ("status", "fields", "expected"),
    [
        ("READY", {}, "Waiting"),
        ("READY", 0, "Waiting"),
        ("READY", 1234, "Waiting, 1,234 before it"),
        ("RUNNING", {}, "Running"),
        ("RUNNING", {"current": 1500, "total": None}, "1,500"),
        ("RUNNING", {"current": 99.9, "percent": 99.9, "eta": 0.5}, "99 %"),
        ("RUNNING", {"current": 1, "percent": 1.0, "eta": 8.0}, "1 % · 8 s left"),
        ("RUNNING", {"current": 1, "percent": 1.0, "eta": 240.0}, "1 % · 4 min left"),
        ("RUNNING", {"current": 1, "percent": 1.0, "eta": 9000.0}, "1 % · 2.5 h left"),
        ("FAILED", "lost", "Lost"),
        ("FAILED", "died", "Crashed"),
        ("FAILED", "timeout", "Timed out"),
    ],
)
def test_the_words_are_those_of_the_widget(status: str, fields: Any, expected: str) -> None:
    error = position = None
    if isinstance(fields, int):
        position, fields = fields, {}
    if isinstance(fields, str):
        error = TaskFailure(reason=FailureReason(fields), type="a.Error", message="because")
        fields = {}
    event = TaskEvent(
        id="id",
        sequence=1,
        kind=EventKind.PROGRESS,
        status=TaskResultStatus(status),
        name="task",
        backend="default",
        position=position,
        progress=Progress(**fields) if fields else None,
        error=error,
    )
    assert rendering.detail(event) == expected
    assert rendering.message(event, expose_errors=False) == ""
    assert rendering.message(event, expose_errors=True) == ("Error: because" if error else "")


def test_a_running_task(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    data_state, value, page = state(result)
    assert (data_state, value) == ("running", "10.0")
    assert page.elements["task-progress"]["src"].startswith(
        f"/tasks/events/?task={result.id}.default."
    )
    assert page.elements["progress"]["max"] == "100"
    assert "aria-valuetext" not in page.elements["progress"]
    for text in ("gated", "10 %", "waiting for the test"):
        assert text in page.text


def test_every_other_state(gate: str) -> None:
    waiting = tasks.noop.using(backend="dummy").enqueue()
    data_state, value, page = state(waiting)
    assert (data_state, value) == ("waiting", "0")
    assert "Waiting" in page.text
    assert page.elements["progress"]["aria-valuetext"] == "Waiting"
    done = finished(tasks.add.enqueue(1))
    assert state(done)[:2] == ("done", "100")
    failed = finished(tasks.fail.enqueue())
    assert state(failed)[0] == "failed"
    assert "bad value" not in render(failed), "the text of an error stays on the server"
    cancelled = running(tasks.until_cancelled.enqueue(gate))
    cancel(cancelled.id)
    assert state(finished(cancelled))[0] == "cancelled"


def test_of_unknown_length(gate: str) -> None:
    result = running(tasks.report.enqueue([1234567, None], {}, gate))
    data_state, value, page = state(result)
    assert (data_state, value) == ("running", None)
    assert "1,234,567" in page.text
    assert page.elements["progress"]["aria-valuetext"] == "1,234,567"


def test_a_fraction_keeps_its_point_in_every_language(gate: str) -> None:
    result = running(tasks.report.enqueue([1, 3], {}, gate))
    with translation.override("de"):
        _, value, page = state(result)
    assert value == "33.333333333333336"
    assert "33 %" in page.text


def test_markup_in_a_message_is_text(gate: str) -> None:
    result = running(tasks.report.enqueue([1, 2, "<script>alert(1)</script>"], {}, gate))
    html = render(result, "label=result.args.0.2")
    assert "<script>" not in html
    assert "<script>alert(1)</script>" in Page(html).text


TAGS = MEDIA + BAR


@pytest.mark.parametrize(
    ("autoescape", "source"),
    [(True, "{% autoescape off %}" + TAGS + "{% endautoescape %}"), (False, TAGS)],
)
def test_markup_in_a_message_is_text_also_where_a_page_escapes_nothing(
    autoescape: bool, source: str, gate: str
) -> None:
    markup = '<img src="x" onerror=alert(1)>'
    result = running(tasks.report.enqueue([1, None, markup], {}, gate))
    template = engine(autoescape=autoescape).from_string(source)
    html = template.render({"result": result}, RequestFactory().get("/"))
    assert "<img" not in html
    assert markup in Page(html).text


def test_arguments() -> None:
    html = render(finished(tasks.noop.enqueue()), 'href="/done/?a=1&b=2" label="Import"')
    elements = Page(html).elements
    assert elements["task-progress"]["href"] == "/done/?a=1&b=2"
    assert elements["task-progress"]["label"] == "Import"
    assert "href" not in Page(render(finished(tasks.noop.enqueue()))).elements["task-progress"]


def test_a_result_that_the_hub_has_forgotten() -> None:
    result = finished(tasks.noop.enqueue())
    hub.release(result.id)
    assert state(result)[0] == "done"


@pytest.mark.parametrize(
    ("status", "expected"), [("RUNNING", "running"), ("SUCCESSFUL", "done"), ("FAILED", "failed")]
)
def test_a_task_that_runs_in_another_process(status: str, expected: str) -> None:
    enqueued = tasks.noop.using(backend="dummy").enqueue()  # all that the hub hears of it
    read_from_a_store = replace(enqueued, status=TaskResultStatus(status))
    assert state(read_from_a_store)[0] == expected
    assert state(enqueued)[0] == "waiting"


def test_the_widget_knows_how_late_the_rendered_state_is() -> None:
    enqueued = tasks.noop.using(backend="dummy").enqueue()
    done = replace(enqueued, status=TaskResultStatus.SUCCESSFUL)
    with override_settings(USE_THOUSAND_SEPARATOR=True):
        sequences = [
            Page(render(result)).elements["task-progress"]["data-sequence"]
            for result in (enqueued, done)
        ]
    assert sequences == ["1", str(LAST_SEQUENCE)]


@pytest.mark.parametrize("wrong", [None, "", "an id", 7, [1]])
def test_what_is_not_a_result(wrong: Any) -> None:
    with pytest.raises(TypeError, match="TaskResult that enqueue"):
        render(wrong)


def test_without_a_request() -> None:
    template = Template(BAR)
    with pytest.raises(ImproperlyConfigured, match=r"render\(request, "):
        template.render(Context({"result": finished(tasks.noop.enqueue())}))


@pytest.mark.parametrize("processors", [["request"], []])
@pytest.mark.parametrize(
    "include", ["{% include bar %}", "{% include bar with result=result only %}"]
)
def test_where_the_request_comes_from(include: str, processors: list[str]) -> None:
    names = [f"django.template.context_processors.{name}" for name in processors]
    templates = engine(context_processors=names)
    context = {"result": finished(tasks.noop.enqueue()), "bar": templates.from_string(BAR)}
    html = templates.from_string(include).render(context, RequestFactory().get("/"))
    assert 'data-state="done"' in html


LINK = {"rel": "stylesheet", "href": "/static/django_tasks_local_sse/task-progress.css"}
SCRIPT = {"type": "module", "src": "/static/django_tasks_local_sse/task-progress.js"}


@pytest.mark.parametrize("without", [{}, {"csp_nonce": None}])
def test_media(without: dict[str, Any]) -> None:
    elements = Page(Template(MEDIA).render(Context(without))).elements
    assert elements == {"link": LINK, "script": SCRIPT}


def test_media_with_a_nonce() -> None:
    nonce = LazyNonce()
    elements = Page(Template(MEDIA).render(Context({"csp_nonce": nonce}))).elements
    assert nonce, "Django sends only a nonce that has been looked at"
    assert elements["link"] == {**LINK, "nonce": str(nonce)}
    assert elements["script"] == {**SCRIPT, "nonce": str(nonce)}


async def test_a_strict_content_security_policy(page: BrowserPage, server: str, gate: str) -> None:
    policy = {
        "default-src": [CSP.NONE],
        "script-src": [CSP.NONCE, CSP.STRICT_DYNAMIC],
        "style-src": [CSP.NONCE],
        "connect-src": [CSP.SELF],
        "img-src": ["data:"],
    }
    result = await tasks.gated.aenqueue(gate)
    with override_settings(SECURE_CSP=policy):
        response = await page.goto(f"{server}/?id={result.id}")
    assert response is not None
    assert "strict-dynamic" in response.headers["content-security-policy"]
    bar = page.locator("task-progress")
    await expect(bar).to_have_css("display", "grid")
    await expect(bar).to_have_attribute("data-state", "running")
    tasks.gates[gate].set()
    await expect(bar).to_have_attribute("data-state", "done")


def test_progress_moves_on_between_two_renderings(gate: str) -> None:
    result = tasks.tracked.enqueue(10, gate)
    wait_for_event(result.id, lambda event: event.progress and event.progress.message == "half-way")
    assert state(result)[1] == "50.0"


def test_half_a_character_does_not_break_the_page(gate: str) -> None:
    result = running(tasks.report.enqueue([1, 2, "caf\udce9.txt"], {}, gate))
    assert "caf?.txt" in render(result).encode().decode()
