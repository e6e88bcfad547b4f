"""Tests of which user may watch or cancel which task by signed links, with real sessions."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urlencode

import httpx
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.conf import settings
from django.contrib.auth import get_user_model
from django.core import signing
from django.core.exceptions import SynchronousOnlyOperation
from django.http import HttpResponse
from django.template import engines
from django.test import (
    AsyncClient,
    AsyncRequestFactory,
    Client,
    RequestFactory,
    override_settings,
)
from django.urls import include, path
from django_eventstream.channelmanager import DefaultChannelManager

from django_tasks_local_sse import views
from django_tasks_local_sse.access import (
    Denial,
    acancel_token,
    aevents_url,
    atask_links,
    cancel_token,
    events_url,
    watched_tasks,
)
from django_tasks_local_sse.tokens import Purpose, claimed_key, read_token, user_digests
from tests.project import tasks
from tests.support.links import request_from, tokens_in, with_tokens
from tests.support.sse_client import messages
from tests.support.waiting import LIMIT, AnyResult, finished, running

type User = Any


def events_path(*tokens: str) -> str:
    return with_tokens("events", *tokens)


@pytest.fixture
def users(transactional_db: None) -> list[User]:
    return [get_user_model().objects.create_user(name) for name in ("anna", "berta")]


@pytest.fixture
def browsers(server: str, users: list[User]) -> Iterator[list[httpx.Client]]:
    """Return three HTTP clients: one logged in as each user, and one without a login."""
    clients = [httpx.Client(base_url=server, timeout=LIMIT) for _ in range(3)]
    for client, user in zip(clients, users, strict=False):
        assert client.get(f"/login/{user.get_username()}/").text == "logged in"
    yield clients
    for client in clients:
        client.close()


def kinds(client: httpx.Client, path: str) -> list[str] | int:
    """Return the kinds of the events in a stream, or the HTTP status if the server refuses it."""
    with client.stream("GET", path) as response:
        if response.status_code != 200:
            return response.status_code
        return [m.event for m in messages(response.iter_lines()) if m.data]


@pytest.fixture
def result() -> AnyResult:
    return finished(tasks.add.enqueue(1))


def test_link_is_valid_for_its_user_only(
    users: list[User], browsers: list[httpx.Client], result: AnyResult
) -> None:
    path = events_url(request_from(users[0]), result)
    anna, berta, anonymous = browsers
    assert kinds(anna, path) == ["finished"]
    assert kinds(berta, path) == 403
    assert kinds(anonymous, path) == 403
    status = path.replace("/events/", "/status/")
    assert anna.get(status).json()["tasks"][0]["status"] == "SUCCESSFUL"
    assert [client.get(status).status_code for client in (berta, anonymous)] == [403, 403]


def test_link_is_invalid_after_logout(
    users: list[User], browsers: list[httpx.Client], result: AnyResult
) -> None:
    path = events_url(request_from(users[0]), result)
    assert kinds(browsers[0], path) == ["finished"]
    browsers[0].cookies.clear()
    assert kinds(browsers[0], path) == 403


def test_anonymous_link_is_a_bearer_link(browsers: list[httpx.Client], result: AnyResult) -> None:
    path = events_url(request_from(), result)
    assert [kinds(browser, path) for browser in browsers] == [["finished"]] * 3


def test_link_made_without_authentication_middleware(server: str, result: AnyResult) -> None:
    request = RequestFactory().get("/")
    assert not hasattr(request, "user")
    with httpx.Client(base_url=server, timeout=LIMIT) as client:
        assert kinds(client, events_url(request, result)) == ["finished"]


def test_invalid_tokens_beside_a_valid_one(
    users: list[User], browsers: list[httpx.Client], result: AnyResult
) -> None:
    other = finished(tasks.add.enqueue(2))
    [mine] = tokens_in(events_url(request_from(users[0]), result))
    [hers] = tokens_in(events_url(request_from(users[1]), other))
    response = browsers[0].get(events_path(mine, hers, "garbage"))
    received = [m.payload for m in messages(iter(response.text.split("\n"))) if m.data]
    assert {(payload["id"], payload["kind"]) for payload in received} == {
        (result.id, "finished"),
        (other.id, "refused"),
        ("garbage", "unknown"),
    }
    assert all(payload["status"] is None for payload in received if payload["kind"] != "finished")
    assert response.text.count("id: end-") == 1
    status = browsers[0].get(events_path(hers, mine).replace("events", "status")).json()
    assert [payload["kind"] for payload in status["tasks"]] == ["refused", "finished"]


def forged_tokens(token: str) -> list[str]:
    result_id, alias, user, time, signature = token.split(".")
    return [
        "",
        ".",
        "...",
        token[:-1],
        token[:10],
        token + "x",
        token.upper(),
        token.replace(".", ":"),
        token + "\n",
        "\n" + token,
        f"{result_id}.{alias}.{user}.{time}",
        f"{result_id}.other.{user}.{time}.{signature}",
        f"{result_id}.{alias}.{user}.zzzzzz.{signature}",
        f"{result_id}.{alias}.another.{time}.{signature}",
        f"{'0' * 36}.{alias}.{user}.{time}.{signature}",
        f"{token}.{signature}",
        "x" * 100_000,
        token * 1000,
        "\x00",
        "%00%ff",
        "🙂",
        signing.Signer(sep=".", key="another key", salt=Purpose.WATCH).sign(
            f"{result_id}.{alias}.{user}.{time}"
        ),
        signing.Signer(sep=".", salt="another salt").sign(f"{result_id}.{alias}.{user}.{time}"),
        signing.dumps({"id": result_id}),
    ]


@pytest.mark.parametrize("view", ["events", "status"])
def test_token_with_surrogate_is_refused(view: str) -> None:
    """The charset of the Content-Type header is one that decodes ASCII text to a surrogate."""
    client = Client(headers={"Content-Type": "text/plain; charset=unicode_escape"})
    response = client.get(rf"/tasks/{view}/?task=a.b.\ud800.c")
    assert response.status_code == 403


def test_renewed_token_outlives_a_fallback_key(users: list[User], result: AnyResult) -> None:
    old_key = settings.SECRET_KEY
    request = RequestFactory().get(events_url(request_from(users[0]), result))
    request.user = users[0]
    with override_settings(SECRET_KEY="new", SECRET_KEY_FALLBACKS=[old_key]):
        [ref] = watched_tasks(request)
        renewed = ref.renewed_token()
    request = RequestFactory().get(events_path(renewed))
    with override_settings(SECRET_KEY="new"):
        for user, denial in ((users[0], None), (users[1], Denial.OTHER_USER)):
            request.user = user
            [ref] = watched_tasks(request)
            assert ref.denial == denial


def test_forged_tokens_are_refused(result: AnyResult) -> None:
    [token] = tokens_in(events_url(request_from(), result))
    client = Client()
    assert client.get(events_path(token)).status_code == 200
    for forged in forged_tokens(token):
        assert client.get(events_path(forged)).status_code == 403, forged[:200]
        content = b"".join(client.get(events_path(token, forged)).streaming_content)
        assert content.count(b"event: finished") == 1
        assert client.post("/tasks/cancel/", {"task": forged}).status_code == 403
    response = client.get("/tasks/events/")
    assert (response.status_code, response.json()) == (403, {"tasks": [], "tokens": []})


def test_repeated_token_is_one_task(result: AnyResult) -> None:
    [token] = tokens_in(events_url(request_from(), result))
    content = b"".join(Client().get(events_path(*[token] * 200)).streaming_content)
    assert content.count(b"event: ") == 1


@pytest.mark.parametrize("name", ["an.id", "with/slash ü", "50%", "a:b", "..", "~"])
def test_ids_and_aliases_with_special_characters(result: AnyResult, name: str) -> None:
    object.__setattr__(result, "id", name)
    object.__setattr__(result, "backend", name)
    [token] = tokens_in(events_url(request_from(), result))
    assert unquote(token.split(".")[0]) == name
    token_content = read_token(Purpose.WATCH, token)
    assert token_content is not None
    assert token_content[:3] == (name, name, "")
    assert claimed_key(token) == (name, name)
    # A token contains no character that a URL must escape, except the percent sign.
    assert quote(token, safe="%~") == token


def test_links_require_results() -> None:
    for wrong in (None, "", "some id", 5, tasks.noop):
        with pytest.raises(TypeError, match="needs the TaskResult"):
            events_url(request_from(), wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="needs the TaskResult"):
            cancel_token(request_from(), wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        events_url(request_from())


async def test_async_functions(result: AnyResult, gate: str) -> None:
    request = request_from()
    assert tokens_in(await aevents_url(request, result))
    assert (await acancel_token(request, result)).startswith(result.id)


def test_async_functions_use_the_user(users: list[User], result: AnyResult) -> None:
    request = request_from(users[0])
    [digest] = user_digests(users[0])
    [watching] = tokens_in(async_to_sync(aevents_url)(request, result))
    links = async_to_sync(atask_links)(request, result)
    assert links["events_url"] == f"/tasks/events/?{urlencode({'task': watching})}"
    assert read_token(Purpose.WATCH, watching)[2] == digest
    for token in (async_to_sync(acancel_token)(request, result), links["cancel_token"]):
        assert read_token(Purpose.CANCEL, token)[2] == digest


async def page_with_link(request: Any, way: str) -> HttpResponse:
    """Call the function that `way` names, as an async view, and return its link or token."""
    result = await tasks.noop.using(backend="dummy").aenqueue()
    template = engines["django"].from_string(
        "{% load django_tasks_local_sse %}{% task_progress result %}"
    )
    if way.startswith("auser"):
        user = await request.auser()
        if way == "auser-assigned":
            request.user = user
    if way == "aevents_url":
        html = await aevents_url(request, result)
    elif way == "cancel_token":
        html = cancel_token(request, result)
    elif way == "thread":
        html = await sync_to_async(template.render)({"result": result}, request)
    else:
        html = template.render({"result": result}, request)
    return HttpResponse(html)


urlpatterns = [
    path("async/<str:way>/", page_with_link),
    path("tasks/", include("django_tasks_local_sse.urls")),
]


@override_settings(ROOT_URLCONF=__name__)
def test_links_of_async_views(users: list[User]) -> None:
    client = AsyncClient()
    client.force_login(users[0])
    for way in ("thread", "auser-assigned", "aevents_url"):
        html = async_to_sync(client.get)(f"/async/{way}/").content.decode()
        found = re.search('task=([^"]+)', html)
        assert found is not None
        assert read_token(Purpose.WATCH, found[1])[2] in user_digests(users[0])


@override_settings(ROOT_URLCONF=__name__)
@pytest.mark.parametrize("way", ["render", "auser-awaited", "cancel_token"])
def test_async_views_with_unresolved_user(users: list[User], way: str) -> None:
    client = AsyncClient()
    assert async_to_sync(client.get)(f"/async/{way}/").status_code == 200, (
        "creating a link for an anonymous user must not query the database"
    )
    client.force_login(users[0])
    with pytest.raises(SynchronousOnlyOperation, match=r"request\.user = await request\.auser"):
        async_to_sync(client.get)(f"/async/{way}/")


# Tests of a channel manager of the application, which may refuse access to a task.


class AnnasChannelManager(DefaultChannelManager):
    """Allow only the user `anna` to read a channel; query the database to find this user."""

    def can_read_channel(self, user: User, channel: str) -> bool:
        assert channel.startswith("task-")
        found = get_user_model().objects.filter(username="anna").first()
        return user is not None and user == found


def test_channel_manager_restricts_access(browsers: list[httpx.Client], gate: str) -> None:
    result = running(tasks.until_cancelled.enqueue(gate))
    path, token = events_url(request_from(), result), cancel_token(request_from(), result)
    rule = f"{__name__}.{AnnasChannelManager.__qualname__}"
    client = Client()
    anna, berta, anonymous = browsers
    with override_settings(EVENTSTREAM_CHANNELMANAGER_CLASS=rule):
        assert anna.get(path.replace("events", "status")).status_code == 200
        assert kinds(berta, path) == 403
        assert kinds(anonymous, path) == 403
        assert client.post("/tasks/cancel/", {"task": token}).status_code == 403
    assert client.post("/tasks/cancel/", {"task": token}).json() == {"cancelled": True}
    finished(result)


# Tests of tokens that allow a client to cancel a task.


def test_watch_and_cancel_tokens_are_distinct(gate: str) -> None:
    result = running(tasks.until_cancelled.enqueue(gate))
    client, request = Client(), request_from()
    [watching] = tokens_in(events_url(request, result))
    assert client.post("/tasks/cancel/", {"task": watching}).status_code == 403
    cancelling = cancel_token(request, result)
    assert client.get(events_path(cancelling)).status_code == 403
    assert client.get("/tasks/cancel/", {"task": cancelling}).status_code == 405
    response = client.post("/tasks/cancel/", {"task": cancelling})
    assert response.json() == {"cancelled": True}
    finished(result)
    assert client.post("/tasks/cancel/", {"task": cancelling}).json() == {"cancelled": False}


def test_cancel_token_is_valid_for_its_user_only(users: list[User], gate: str) -> None:
    result = running(tasks.until_cancelled.enqueue(gate))
    token = cancel_token(request_from(users[0]), result)
    berta = Client()
    berta.force_login(users[1])
    assert berta.post("/tasks/cancel/", {"task": token}).status_code == 403
    assert Client().post("/tasks/cancel/", {"task": token}).status_code == 403
    anna = Client()
    anna.force_login(users[0])
    assert anna.post("/tasks/cancel/", {"task": token}).json() == {"cancelled": True}
    finished(result)


def test_cancel_requires_csrf_token(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[str] = []
    monkeypatch.setattr(
        views, "cancel_task", lambda result_id, backend: cancelled.append(result_id)
    )
    result = running(tasks.gated.enqueue(gate))
    token = cancel_token(request_from(), result)
    client = Client(enforce_csrf_checks=True)
    assert client.post("/tasks/cancel/", {"task": token}).status_code == 403
    assert cancelled == []
    assert Client().post("/tasks/cancel/", {"task": token}).status_code == 200
    assert cancelled == [result.id]


def test_cancel_of_unsupported_or_unknown_task(result: AnyResult) -> None:
    client = Client()
    immediate = tasks.noop.using(backend="immediate").enqueue()
    response = client.post("/tasks/cancel/", {"task": cancel_token(request_from(), immediate)})
    assert response.status_code == 501
    object.__setattr__(result, "id", "gone")
    response = client.post("/tasks/cancel/", {"task": cancel_token(request_from(), result)})
    assert response.status_code == 404
    object.__setattr__(result, "backend", "no longer in TASKS")
    response = client.post("/tasks/cancel/", {"task": cancel_token(request_from(), result)})
    assert response.status_code == 404
    assert b"TASKS" not in response.content


# Tests of the HTTP methods that the views accept.


@pytest.mark.parametrize("path", ["/tasks/events/", "/tasks/status/"])
@pytest.mark.parametrize("method", ["put", "delete", "options", "patch"])
def test_unsupported_methods(path: str, method: str) -> None:
    assert getattr(Client(), method)(path).status_code == 405


def test_head_request(server: str, result: AnyResult) -> None:
    path = events_url(request_from(), result)
    response = httpx.head(server + path, timeout=LIMIT)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["Content-Type"] == "text/event-stream"


async def test_head_response_is_async(result: AnyResult) -> None:
    """A HEAD response has async content, because Django's ASGI handler iterates over it."""
    # The test calls the view itself, because AsyncClient removes the content of HEAD responses.
    request = AsyncRequestFactory().head(events_url(request_from(), result))
    response = views.events(request)
    assert [part async for part in response] == []
