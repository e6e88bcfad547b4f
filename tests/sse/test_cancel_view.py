"""`cancel/` over HTTP: tokens, CSRF, bearer links, redirects of forms, and errors."""

from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from django_tasks_local_sse import views
from django_tasks_local_sse.access import cancel_token, task_links
from tests.project import tasks
from tests.support.links import make_tokens_older, request_from, watch_token, with_tokens
from tests.support.waiting import AnyResult, finished, running

FORM = "text/html,application/xhtml+xml,*/*;q=0.8"  # what a browser accepts that loads a page


@pytest.fixture
def cancelled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Replace core's cancel(); return the alias and the id of each task it was called with."""
    calls: list[tuple[str, str]] = []

    def cancel(result_id: str, backend: str) -> bool:
        calls.append((backend, result_id))
        return len(calls) == 1

    monkeypatch.setattr(views, "cancel_task", cancel)
    return calls


@pytest.fixture
def result() -> AnyResult:
    return tasks.noop.using(backend="dummy").enqueue()


def post(token: str, client: Client | None = None, **data: str) -> Any:
    return (client or Client()).post("/tasks/cancel/", {"task": token, **data})


def client_of(user: Any) -> Client:
    client = Client()
    client.force_login(user)
    return client


def test_cancel_bearer_token_needs_neither_csrf_token_nor_user(
    transactional_db: None, result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    user = get_user_model().objects.create_user("anna")
    links = task_links(request_from(user), result, bearer=True)
    client = Client(enforce_csrf_checks=True)
    assert links["cancel_url"] == "/tasks/cancel/"
    assert post(links["cancel_token"], client).json() == {"cancelled": True}
    client.force_login(user)
    assert post(links["cancel_token"], client).json() == {"cancelled": False}
    assert cancelled == [("dummy", result.id)] * 2
    # The URLs for watching are bearer links too.
    for view in ("events", "status"):
        assert Client().get(links[f"{view}_url"]).status_code == 200  # type: ignore[literal-required]


def test_links_of_a_user(
    transactional_db: None, result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    anna, berta = (get_user_model().objects.create_user(name) for name in ("anna", "berta"))
    links = task_links(request_from(anna), result)
    assert links.keys() == {
        "backend", "id", "events_url", "status_url", "cancel_url", "cancel_token",
    }  # fmt: skip
    assert (links["backend"], links["id"]) == ("dummy", result.id)
    for client, allowed in ((client_of(anna), True), (client_of(berta), False), (Client(), False)):
        expected = 200 if allowed else 403
        assert client.get(links["events_url"]).status_code == expected
        assert client.get(links["status_url"]).status_code == expected
        assert post(links["cancel_token"], client).status_code == expected
    assert cancelled == [("dummy", result.id)]


def test_cancel_token_of_anonymous_visitor_is_no_bearer_token(
    transactional_db: None, result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    token = cancel_token(request_from(), result)
    user = get_user_model().objects.create_user("anna")
    assert post(token, Client(enforce_csrf_checks=True)).status_code == 403
    assert post(token, client_of(user)).status_code == 403
    assert cancelled == []
    assert post(token).status_code == 200


def test_csrf_token_is_accepted(result: AnyResult, cancelled: list[tuple[str, str]]) -> None:
    client = Client(enforce_csrf_checks=True)
    client.cookies["csrftoken"] = secret = "x" * 32
    token = cancel_token(request_from(), result)
    assert post(token, client, csrfmiddlewaretoken=secret).status_code == 200


def test_no_token_replaces_one_of_another_purpose(
    result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    watching = watch_token(result)
    cancelling = cancel_token(request_from(), result)
    bearer = task_links(request_from(), result, bearer=True)["cancel_token"]
    assert post(watching).status_code == 403
    for token in (cancelling, bearer):
        assert Client().get(with_tokens("events", token)).status_code == 403
        assert Client().get(f"/tasks/cancel/?task={token}").status_code == 405
        assert Client().post(f"/tasks/cancel/?task={token}").status_code == 403
    assert cancelled == []


@pytest.mark.parametrize("bearer", [True, False])
def test_expired_cancel_token(
    result: AnyResult,
    bearer: bool,
    cancelled: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        make_tokens_older(patch, 86_400 + 10)
        token = task_links(request_from(), result, bearer=bearer)["cancel_token"]
    response = post(token)
    assert (response.status_code, cancelled) == (403, [])
    assert b"too old" in response.content


@pytest.mark.parametrize(
    ("next_url", "redirects"),
    [
        ("/reports/?a=1", True),
        ("http://testserver/reports/", True),
        ("https://evil.example/", False),
        ("//evil.example/", False),
        ("javascript:alert(1)", False),
        ("", False),
    ],
)
def test_form_is_redirected_to_next_only(
    next_url: str, redirects: bool, result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    """The Referer, which another site may choose, is never the target."""
    client = Client(headers={"Accept": FORM, "Referer": "https://evil.example/"})
    response = post(cancel_token(request_from(), result), client, next=next_url)
    assert response["Cache-Control"] == "private, no-store"
    if redirects:
        assert (response.status_code, response["Location"]) == (303, next_url)
    else:
        assert response.status_code == 200
        assert response.content == b"The task was cancelled."
    response = post(cancel_token(request_from(), result), client)
    assert response.content == b"The task had finished already."


def test_https_form_is_not_redirected_to_http(
    result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    data = {"task": cancel_token(request_from(), result), "next": "http://testserver/"}
    response = Client().post("/tasks/cancel/", data, secure=True)
    assert response.status_code == 200


def test_field_next_makes_a_form_of_any_request(
    result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    token = cancel_token(request_from(), result)
    assert post(token, next="").content == b"The task was cancelled."
    assert post(token, next="/reports/").status_code == 303


@pytest.mark.parametrize("accept", ["*/*", "application/json", "application/json, text/plain, */*"])
def test_script_gets_json(accept: str, result: AnyResult, cancelled: list[tuple[str, str]]) -> None:
    response = post(cancel_token(request_from(), result), Client(headers={"Accept": accept}))
    assert response.json() == {"cancelled": True}


@pytest.mark.parametrize("accept", ["text/html; a*=bogus''x", "text/html;" + "a" * 20_000])
def test_malformed_accept_header_is_answered_with_json(
    accept: str, result: AnyResult, cancelled: list[tuple[str, str]]
) -> None:
    """An error after the cancellation would report to the client that the request failed."""
    response = post(cancel_token(request_from(), result), Client(headers={"Accept": accept}))
    assert response.json() == {"cancelled": True}


def test_process_with_the_task_does_not_answer(
    result: AnyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cancel(result_id: str, backend: str) -> bool:
        raise TimeoutError("the process 123 of host a.example does not answer")

    monkeypatch.setattr(views, "cancel_task", cancel)
    response = post(cancel_token(request_from(), result))
    assert (response.status_code, response["Retry-After"]) == (503, "10")
    assert b"a.example" not in response.content


def test_cancelling_a_running_task_with_a_bearer_link(gate: str) -> None:
    result = running(tasks.until_cancelled.enqueue(gate))
    links = task_links(request_from(), result, bearer=True)
    client = Client(enforce_csrf_checks=True)
    assert post(links["cancel_token"], client).json() == {"cancelled": True}
    finished(result)
    [payload] = client.get(links["status_url"]).json()["tasks"]
    assert payload["error"]["reason"] == "cancelled"
