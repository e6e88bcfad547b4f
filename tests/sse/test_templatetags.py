"""Tests of the HTML that `{% task_progress %}` and `{% task_progress_media %}` render."""

from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.tasks import TaskResultStatus
from django.template import Context, Template
from django.template.backends.django import DjangoTemplates
from django.test import RequestFactory, override_settings
from django.utils import translation
from django.utils.csp import CSP, LazyNonce

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

if TYPE_CHECKING:
    from playwright.async_api import Page as BrowserPage

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
    """Parse HTML; keep its text and, by element name, the attributes of the last element."""

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
def test_details_match_those_of_the_widget(status: str, fields: Any, expected: str) -> None:
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


def test_running_task(gate: str) -> None:
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


def test_states_of_other_tasks(gate: str) -> None:
    waiting = tasks.noop.using(backend="dummy").enqueue()
    data_state, value, page = state(waiting)
    assert (data_state, value) == ("waiting", "0")
    assert "Waiting" in page.text
    assert page.elements["progress"]["aria-valuetext"] == "Waiting"
    done = finished(tasks.add.enqueue(1))
    assert state(done)[:2] == ("done", "100")
    failed = finished(tasks.fail.enqueue())
    assert state(failed)[0] == "failed"
    assert "bad value" not in render(failed), "the error message is exposed"
    cancelled = running(tasks.until_cancelled.enqueue(gate))
    cancel(cancelled.id)
    assert state(finished(cancelled))[0] == "cancelled"


def test_unknown_total(gate: str) -> None:
    result = running(tasks.report.enqueue([1234567, None], {}, gate))
    data_state, value, page = state(result)
    assert (data_state, value) == ("running", None)
    assert "1,234,567" in page.text
    assert page.elements["progress"]["aria-valuetext"] == "1,234,567"


def test_value_is_not_localized(gate: str) -> None:
    result = running(tasks.report.enqueue([1, 3], {}, gate))
    with translation.override("de"):
        _, value, page = state(result)
    assert value == "33.333333333333336"
    assert "33 %" in page.text


def test_message_is_escaped(gate: str) -> None:
    result = running(tasks.report.enqueue([1, 2, "<script>alert(1)</script>"], {}, gate))
    html = render(result, "label=result.args.0.2")
    assert "<script>" not in html
    assert "<script>alert(1)</script>" in Page(html).text


TAGS = MEDIA + BAR


@pytest.mark.parametrize(
    ("autoescape", "source"),
    [(True, "{% autoescape off %}" + TAGS + "{% endautoescape %}"), (False, TAGS)],
)
def test_message_is_escaped_without_autoescape(autoescape: bool, source: str, gate: str) -> None:
    markup = '<img src="x" onerror=alert(1)>'
    result = running(tasks.report.enqueue([1, None, markup], {}, gate))
    template = engine(autoescape=autoescape).from_string(source)
    html = template.render({"result": result}, RequestFactory().get("/"))
    assert "<img" not in html
    assert markup in Page(html).text


def test_href_and_label() -> None:
    html = render(finished(tasks.noop.enqueue()), 'href="/done/?a=1&b=2" label="Import"')
    elements = Page(html).elements
    assert elements["task-progress"]["href"] == "/done/?a=1&b=2"
    assert elements["task-progress"]["label"] == "Import"
    assert "href" not in Page(render(finished(tasks.noop.enqueue()))).elements["task-progress"]


def test_result_that_the_hub_has_released() -> None:
    result = finished(tasks.noop.enqueue())
    hub.release(hub.find(result.id))
    assert state(result)[0] == "done"


@pytest.mark.parametrize(
    ("status", "expected"), [("RUNNING", "running"), ("SUCCESSFUL", "done"), ("FAILED", "failed")]
)
def test_status_from_store_of_another_process(status: str, expected: str) -> None:
    # The dummy backend never runs a task, so the hub only has the status READY.
    enqueued = tasks.noop.using(backend="dummy").enqueue()
    read_from_a_store = replace(enqueued, status=TaskResultStatus(status))
    assert state(read_from_a_store)[0] == expected
    assert state(enqueued)[0] == "waiting"


def test_sequence_of_rendered_state() -> None:
    enqueued = tasks.noop.using(backend="dummy").enqueue()
    done = replace(enqueued, status=TaskResultStatus.SUCCESSFUL)
    with override_settings(USE_THOUSAND_SEPARATOR=True):
        sequences = [
            Page(render(result)).elements["task-progress"]["data-sequence"]
            for result in (enqueued, done)
        ]
    assert sequences == ["1", str(LAST_SEQUENCE)]


@pytest.mark.parametrize("wrong", [None, "", "an id", 7, [1]])
def test_tag_requires_a_result(wrong: Any) -> None:
    with pytest.raises(TypeError, match="TaskResult that enqueue"):
        render(wrong)


def test_tag_requires_a_request() -> None:
    template = Template(BAR)
    with pytest.raises(ImproperlyConfigured, match=r"render\(request, "):
        template.render(Context({"result": finished(tasks.noop.enqueue())}))


@pytest.mark.parametrize("processors", [["request"], []])
@pytest.mark.parametrize(
    "include", ["{% include bar %}", "{% include bar with result=result only %}"]
)
def test_request_in_included_template(include: str, processors: list[str]) -> None:
    names = [f"django.template.context_processors.{name}" for name in processors]
    templates = engine(context_processors=names)
    context = {"result": finished(tasks.noop.enqueue()), "bar": templates.from_string(BAR)}
    html = templates.from_string(include).render(context, RequestFactory().get("/"))
    assert 'data-state="done"' in html


LINK = {"rel": "stylesheet", "href": "/static/django_tasks_local_sse/task-progress.css"}
SCRIPT = {"type": "module", "src": "/static/django_tasks_local_sse/task-progress.js"}


@pytest.mark.parametrize("without", [{}, {"csp_nonce": None}])
def test_media_without_nonce(without: dict[str, Any]) -> None:
    elements = Page(Template(MEDIA).render(Context(without))).elements
    assert elements == {"link": LINK, "script": SCRIPT}


def test_media_with_a_nonce() -> None:
    nonce = LazyNonce()
    elements = Page(Template(MEDIA).render(Context({"csp_nonce": nonce}))).elements
    assert nonce, "Django sends a nonce only if it was read"
    assert elements["link"] == {**LINK, "nonce": str(nonce)}
    assert elements["script"] == {**SCRIPT, "nonce": str(nonce)}


async def test_strict_content_security_policy(page: "BrowserPage", server: str, gate: str) -> None:
    from playwright.async_api import expect

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


def test_rendering_samples_tracked_loop(gate: str) -> None:
    result = tasks.tracked.enqueue(10, gate)
    wait_for_event(result.id, lambda event: event.progress and event.progress.message == "half-way")
    assert state(result)[1] == "50.0"


def test_lone_surrogate_is_replaced(gate: str) -> None:
    result = running(tasks.report.enqueue([1, 2, "caf\udce9.txt"], {}, gate))
    assert "caf?.txt" in render(result).encode().decode()
