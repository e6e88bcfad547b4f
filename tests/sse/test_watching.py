"""`events/` and `status/` over HTTP: methods, limits, refusals, headers, and their payloads."""

import dataclasses
import gc
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AbstractBaseUser, Group
from django.tasks.exceptions import TaskResultDoesNotExist
from django.test import Client, override_settings

from django_tasks_local.hub import hub
from django_tasks_local_sse import encoding, streams, views
from django_tasks_local_sse.access import events_url, task_links
from django_tasks_local_sse.rare_warnings import RareWarnings
from django_tasks_local_sse.tokens import Purpose, read_token, user_digests
from tests.project import tasks
from tests.support.backends import settings_with
from tests.support.broken_backend import BrokenBackend
from tests.support.links import (
    make_tokens_older,
    request_from,
    watch_token,
    with_tokens,
)
from tests.support.sse_client import messages, read_all, stream
from tests.support.waiting import LIMIT, AnyResult, finished, running, wait_until

PAYLOAD_KEYS = {
    "backend", "id", "run", "sequence", "kind", "status", "name", "position",
    "retried_from", "progress", "enqueued_at", "started_at", "finished_at", "error", "result",
}  # fmt: skip


@pytest.fixture
def result() -> AnyResult:
    return finished(tasks.add.enqueue(1))


@pytest.fixture(params=["events", "status"])
def view(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def payloads(response: Any) -> list[dict[str, Any]]:
    """Return the payloads in a response of `events/` or `status/`."""
    if not response.streaming:
        content: list[dict[str, Any]] = response.json()["tasks"]
        return content
    text = b"".join(response.streaming_content).decode()
    return [message.payload for message in messages(iter(text.splitlines()))]


# Methods and limits


def test_post_has_same_answer_as_get(view: str, result: AnyResult) -> None:
    other = finished(tasks.add.enqueue(2))
    texts = [watch_token(result), watch_token(other)]
    got = Client().get(with_tokens(view, *texts))
    # Without a CSRF token: neither view changes anything.
    posted = Client(enforce_csrf_checks=True).post(f"/tasks/{view}/", {"tasks": " ".join(texts)})
    assert got.status_code == posted.status_code == 200
    assert payloads(got) == payloads(posted)


def test_link_names_any_number_of_invented_ids(view: str, result: AnyResult) -> None:
    token = watch_token(result)
    invented = [token.replace(result.id, f"invented-{number}") for number in range(1999)]
    client = Client()
    response = client.get(with_tokens(view, token, *invented[:200]))
    assert response.status_code == 400
    assert b"A GET request may name 200 tasks, and this one names 201" in response.content
    assert len(payloads(client.get(with_tokens(view, token, *invented[:199])))) == 200
    data = {"tasks": " ".join([token, *invented])}
    assert len(payloads(client.post(f"/tasks/{view}/", data))) == 2000
    response = client.post(f"/tasks/{view}/", {"tasks": data["tasks"] + " one.more"})
    assert response.status_code == 400
    assert b"may name 2,000 tasks, and this one names 2,001" in response.content


def test_events_url_refuses_more_tasks_than_a_url_holds() -> None:
    results = [tasks.noop.using(backend="dummy").enqueue() for _ in range(31)]
    user = get_user_model()(pk=10**9)
    # gunicorn accepts 4,094 bytes.
    assert len(events_url(request_from(user), *results[:30])) < 4000
    with pytest.raises(ValueError, match=r"at most 30 tasks, not 31.*POST"):
        events_url(request_from(), *results)


# Refusals


def refusals(response: Any) -> list[tuple[str, str, Any]]:
    """Return the kind, the id and the reason of each payload, and check the payloads' form."""
    found = []
    for payload in payloads(response):
        assert payload.keys() == PAYLOAD_KEYS
        error = payload["error"]
        if error is not None:
            assert error.keys() == {"reason", "type", "message"}
            assert error["type"] is None
            assert error["message"].endswith(".")
        assert (payload["status"] is None) == (payload["kind"] in {"unknown", "refused"})
        found.append((payload["kind"], payload["id"], error and error["reason"]))
    return found


def test_expired_link_is_unknown(
    view: str, result: AnyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that is too old is refused with the reason; it is not reported as unknown."""
    other = finished(tasks.add.enqueue(2))
    with monkeypatch.context() as patch:
        make_tokens_older(patch, 86_400 + 10)
        old = watch_token(result)
    response = Client().get(with_tokens(view, old))
    assert response.status_code == 403
    assert response.json()["tokens"] == []
    assert refusals(response) == [("refused", result.id, "expired")]
    response = Client().get(with_tokens(view, old, watch_token(other)))
    assert response.status_code == 200
    assert set(refusals(response)) == {
        ("refused", result.id, "expired"),
        ("finished", other.id, None),
    }


def test_link_of_another_user_is_unknown(view: str, result: AnyResult) -> None:
    """A link that was made for another user is refused with that reason."""
    anna = get_user_model()(pk=1)
    response = Client().get(with_tokens(view, watch_token(result, anna)))
    assert response.status_code == 403
    assert refusals(response) == [("refused", result.id, "other_user")]


def test_forged_link_is_unknown(view: str, result: AnyResult) -> None:
    forged = watch_token(result)[:-1]
    response = Client().get(with_tokens(view, forged))
    assert response.status_code == 403
    assert refusals(response) == [("unknown", result.id, None)]
    hub.release(hub.find(result.id))
    gone = Client().get(with_tokens(view, watch_token(result)))
    assert gone.status_code == 200
    assert payloads(gone) == payloads(response), "a forged link is distinguishable"


def test_refusal_reads_no_task(
    view: str, result: AnyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a task was looked up")

    monkeypatch.setattr(streams, "find_newest_event", fail)
    monkeypatch.setattr(streams, "Subscription", fail)
    assert Client().get(with_tokens(view, watch_token(result)[:-1])).status_code == 403


def test_best_of_several_tokens_of_a_task_counts(view: str, result: AnyResult) -> None:
    good = watch_token(result)
    others = [watch_token(result, get_user_model()(pk=1)), good[:-1]]
    for texts in ([good, *others], [*others, good]):
        assert refusals(Client().get(with_tokens(view, *texts))) == [("finished", result.id, None)]
    for texts in (others, others[::-1]):
        response = Client().get(with_tokens(view, *texts))
        assert refusals(response) == [("refused", result.id, "other_user")]


def test_users_of_two_models_share_links(result: AnyResult) -> None:
    """A user's link is no link of the object of another model that has the same primary key."""
    user = get_user_model()(pk=1)

    class Customer(AbstractBaseUser):
        class Meta:
            app_label = "shop"

    digests = {user_digests(owner) for owner in (user, Customer(pk=1), Group(pk=1))}
    assert len(digests) == 3
    content = read_token(Purpose.WATCH, watch_token(result, user))
    assert content is not None
    assert content.user not in user_digests(Customer(pk=1))


def test_links_outlive_a_change_of_the_secret_key(result: AnyResult) -> None:
    user = get_user_model()(pk=1)
    token = watch_token(result, user)
    with override_settings(SECRET_KEY="another", SECRET_KEY_FALLBACKS=["only for tests"]):
        content = read_token(Purpose.WATCH, token)
        assert content is not None
        assert content.user in user_digests(user)
        assert content.user != user_digests(user)[0]
    with override_settings(SECRET_KEY="another"):
        assert read_token(Purpose.WATCH, token) is None


def test_user_without_a_model(result: AnyResult) -> None:
    class TokenUser:
        """A user as libraries for JSON Web Tokens make it."""

        pk = 7
        is_authenticated = True

    content = read_token(Purpose.WATCH, watch_token(result, TokenUser()))
    assert content is not None
    assert content.user in user_digests(TokenUser())
    assert content.user not in user_digests(get_user_model()(pk=7))


# status/


def test_status_has_payloads_and_tokens(result: AnyResult) -> None:
    response = Client().get(task_links(request_from(), result)["status_url"])
    content = response.json()
    assert content.keys() == {"tasks", "tokens"}
    [payload] = content["tasks"]
    assert payload.keys() == PAYLOAD_KEYS
    assert (payload["backend"], payload["id"], payload["run"]) == ("default", result.id, 1)
    assert content["tokens"] == []


def test_shared_cache_stores_status(view: str, result: AnyResult) -> None:
    """No cache may store an answer: it belongs to one user, and is old at the next event."""
    for text in (watch_token(result), "forged"):
        response = Client().get(with_tokens(view, text))
        assert response["Cache-Control"] == "private, no-store, no-transform"


@pytest.fixture
def stored(result: AnyResult) -> Iterator[type[BrokenBackend]]:
    """The class of a backend with one finished task, and with a store that a test can break."""
    object.__setattr__(result, "backend", "stored")
    BrokenBackend.result, BrokenBackend.error = result, None
    with override_settings(
        TASKS={
            "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
            "stored": {"BACKEND": "tests.support.broken_backend.BrokenBackend"},
        },
        TASKS_SSE={"RECHECK_INTERVAL": 0.02},
    ):
        yield BrokenBackend
    BrokenBackend.result = BrokenBackend.error = None


def test_status_while_a_store_raises(stored: Any, caplog: pytest.LogCaptureFixture) -> None:
    other = finished(tasks.add.enqueue(1))
    texts = [watch_token(stored.result), watch_token(other)]
    stored.error = ConnectionError("the database restarts")
    with caplog.at_level(logging.WARNING):
        response = Client().get(with_tokens("status", *texts))
        assert [payload["id"] for payload in response.json()["tasks"]] == [other.id]
        response = Client().get(with_tokens("status", texts[0]))
    assert (response.status_code, response["Retry-After"]) == (503, "10")
    # The hub has a state of a task that was enqueued in this process.
    started = dataclasses.replace(hub.snapshot(other), backend="stored", id=stored.result.id)
    hub.publish(started)
    [payload] = Client().get(with_tokens("status", texts[0])).json()["tasks"]
    assert (payload["backend"], payload["kind"]) == ("stored", "finished")
    hub.release(hub.find(started))
    stored.error = TaskResultDoesNotExist("gone")
    [payload] = Client().get(with_tokens("status", texts[0])).json()["tasks"]
    assert payload["kind"] == "unknown"
    stored.error = None
    [payload] = Client().get(with_tokens("status", texts[0])).json()["tasks"]
    assert (payload["backend"], payload["kind"]) == ("stored", "finished")


def test_stream_while_a_store_raises(server: str, stored: Any) -> None:
    """The stream first sends the states that are certain, and later those of the store."""
    busy = finished(tasks.add.enqueue(1))
    stored.error = ConnectionError("the database restarts")
    url = events_url(request_from(), stored.result, busy)
    with stream(server + url) as received:
        first = next(received)
        assert (first.payload["backend"], first.event) == ("default", "finished")
        assert not first.last_event_id.startswith("end-")
        stored.error = None
        [last] = received
    assert (last.payload["backend"], last.event) == ("stored", "finished")
    assert last.last_event_id.startswith("end-")


def test_polling_a_store_repeats_nothing(stored: Any) -> None:
    object.__setattr__(stored.result, "status", "RUNNING")
    url = events_url(request_from(), stored.result)
    first = b"".join(Client().get(url).streaming_content).decode()
    [message] = messages(iter(first.splitlines()))
    assert message.event == "started"
    again = Client().get(url, headers={"Last-Event-ID": message.last_event_id})
    assert b"".join(again.streaming_content) == b": keepalive=15\n"


# Headers


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_allow_origin_as_a_tuple_is_a_server_error(view: str, result: AnyResult, kind: Any) -> None:
    """django-eventstream raises TypeError for all but a list."""
    url = with_tokens(view, watch_token(result))
    origins = kind(["https://one.example", "https://two.example"])
    with override_settings(
        EVENTSTREAM_ALLOW_ORIGIN=origins,
        EVENTSTREAM_ALLOW_CREDENTIALS=True,
        EVENTSTREAM_ALLOW_HEADERS="X-Custom",
    ):
        response = Client().get(url, headers={"Origin": "https://two.example"})
        assert response["Access-Control-Allow-Origin"] == "https://two.example"
        assert response["Access-Control-Allow-Credentials"] == "true"
        assert response["Access-Control-Allow-Headers"] == "X-Custom"
        assert "Origin" in response["Vary"]
        for headers in ({"Origin": "https://three.example"}, {}):
            response = Client().get(url, headers=headers)
            assert "Access-Control-Allow-Origin" not in response.headers


# MAX_STREAMS


@pytest.fixture
def fresh_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget which warnings were logged in the last minute."""
    monkeypatch.setattr(views, "_warnings", RareWarnings(logging.getLogger(views.__name__)))


@pytest.fixture
def no_streams() -> None:
    """Wait until the streams of earlier tests, which may have dropped responses, are over."""
    gc.collect()
    wait_until(lambda: not streams.open_streams, "a stream of an earlier test is open")


def test_process_accepts_any_number_of_streams(
    server: str,
    gate: str,
    caplog: pytest.LogCaptureFixture,
    fresh_warnings: None,
    no_streams: None,
) -> None:
    url = server + events_url(request_from(), running(tasks.gated.enqueue(gate)))
    with override_settings(TASKS_SSE={"MAX_STREAMS": 3}), ExitStack() as opened:
        # httpx closes a response when nothing refers to its iterator.
        received = [opened.enter_context(stream(url)) for _ in range(3)]
        assert [next(messages).event for messages in received] == ["progress"] * 3
        with caplog.at_level(logging.WARNING, "django_tasks_local_sse"):
            for _ in range(5):
                response = httpx.get(url, timeout=LIMIT)
                assert (response.status_code, response.headers["Retry-After"]) == (503, "10")
        [record] = [record for record in caplog.records if record.name == views.__name__]
        assert "refused with 503, because 3 streams are open in this process" in record.getMessage()
        assert httpx.get(url.replace("events", "status"), timeout=LIMIT).status_code == 200
        opened.close()
        wait_until(lambda: not streams.open_streams, "closed streams are counted")
        tasks.gates[gate].set()
        assert read_all(url)[-1].event == "finished"


def test_streams_under_wsgi_are_counted(
    gate: str, fresh_warnings: None, no_streams: None, caplog: pytest.LogCaptureFixture
) -> None:
    url = events_url(request_from(), running(tasks.gated.enqueue(gate)))
    with override_settings(TASKS_SSE={"MAX_STREAMS": 1, "WSGI_HOLD": LIMIT}):
        held = Client().get(url).streaming_content
        assert b"event: progress" in next(held)
        assert Client().get(url).status_code == 503
        tasks.gates[gate].set()
        assert b"event: finished" in b"".join(held)
        response = Client().get(url)
        assert response.status_code == 200
        response.close()


def test_stream_is_counted_before_it_starts(
    gate: str, fresh_warnings: None, no_streams: None
) -> None:
    """An accepted stream counts until its response is closed or dropped; HEAD has no stream."""
    url = events_url(request_from(), running(tasks.gated.enqueue(gate)))
    with override_settings(TASKS_SSE={"MAX_STREAMS": 1}):
        for _ in range(2):
            head = Client().head(url)
            assert head.status_code == 200
            unread = Client().get(url)
            assert (unread.status_code, Client().get(url).status_code) == (200, 503)
            unread.close()
            head.close()
        dropped = Client().get(url)
        assert dropped.status_code == 200
        del dropped
        gc.collect()
        assert not streams.open_streams
    tasks.gates[gate].set()


def test_default_of_max_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource", reason="Windows has no limit of open files")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1000, 2000))
    assert views._default_max_streams() == 800
    infinite = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (infinite, infinite))
    assert views._default_max_streams() == float("inf")


# Last-Event-ID


@pytest.mark.parametrize("way", ["header", "query", "field"])
def test_last_event_id_as_header_query_and_field(gate: str, way: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    token, client = watch_token(result), Client()

    def read(last_event_id: str) -> Any:
        if way == "field":
            data = {"tasks": token, "lastEventId": last_event_id}
            return client.post("/tasks/events/", data)
        if way == "query":
            query = {"task": token, "lastEventId": ["stale", last_event_id]}
            return client.get("/tasks/events/", query)
        headers = {"Last-Event-ID": last_event_id}
        return client.get("/tasks/events/?lastEventId=stale", {"task": token}, headers=headers)

    def last_id(response: Any) -> str:
        text = b"".join(response.streaming_content).decode()
        return [message.last_event_id for message in messages(iter(text.splitlines()))][-1]

    state_id = last_id(read("x"))
    assert b"".join(read(state_id).streaming_content) == b": keepalive=15\n"
    tasks.gates[gate].set()
    finished(result)
    end_id = last_id(read(state_id))
    assert end_id.startswith("end-")
    assert read(end_id).status_code == 204


def test_id_is_a_sum_of_one_hash_for_each_task(gate: str) -> None:
    results = [running(tasks.gated.enqueue(gate)) for _ in range(3)]

    def last_id(*some: AnyResult) -> str:
        text = b"".join(Client().get(events_url(request_from(), *some)).streaming_content).decode()
        return [message.last_event_id for message in messages(iter(text.splitlines()))][-1]

    ids = [last_id(result) for result in results]
    assert len(set(ids)) == 3
    total = sum(int(id, 16) for id in ids) % 2**128
    assert last_id(*results) == last_id(*reversed(results)) == f"{total:032x}"
    # An event of one task replaces its hash in the sum.
    event = hub.snapshot(results[0])
    assert event is not None
    assert encoding.state_id(encoding.state_hash(event)) == ids[0]


def test_two_backends_with_the_same_id() -> None:
    with settings_with():
        results = [finished(tasks.add.using(backend=alias).enqueue(1)) for alias in
                   ("default", "threads")]  # fmt: skip
        for result in results:
            event = hub.snapshot(result)
            assert event is not None
        url = events_url(request_from(), *results)
        received = payloads(Client().get(url))
        assert {(p["backend"], p["id"]) for p in received} == {(r.backend, r.id) for r in results}
        # A link names the alias: with another alias it names a task that does not exist.
        object.__setattr__(results[0], "backend", "threads")
        [payload] = payloads(Client().get(events_url(request_from(), results[0])))
        assert (payload["backend"], payload["kind"]) == ("threads", "unknown")


# Renewed tokens


def test_stream_renews_token_of_a_user_only(
    server: str, gate: str, transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = get_user_model().objects.create_user("anna")
    busy = running(tasks.gated.enqueue(gate))
    done = finished(tasks.add.enqueue(1))
    bearer = running(tasks.gated.enqueue(gate))
    with monkeypatch.context() as patch:
        make_tokens_older(patch, 50_000)
        old = [watch_token(busy, user), watch_token(done, user), watch_token(bearer)]
    young = watch_token(busy, user)
    with httpx.Client(base_url=server, timeout=LIMIT) as browser:
        browser.get("/login/anna/")
        [renewed] = browser.get(with_tokens("status", *old)).json()["tokens"]
        assert (renewed["backend"], renewed["id"]) == ("default", busy.id)
        content = read_token(Purpose.WATCH, renewed["token"])
        assert content is not None
        assert content.user == user_digests(user)[0]
        assert content.age < LIMIT
        assert browser.get(with_tokens("status", young)).json()["tokens"] == []
        with browser.stream("GET", with_tokens("events", *old)) as response:
            received = []
            for message in messages(response.iter_lines()):
                received.append(message)
                if message.event == "token":
                    tasks.gates[gate].set()
    sent = [message for message in received if message.event == "token"]
    assert [message.payload.keys() for message in sent] == [{"backend", "id", "token"}]
    assert sent[0].payload["id"] == busy.id
    # The block has no line `id:`: the id is that of the event before.
    before = received[received.index(sent[0]) - 1]
    assert sent[0].last_event_id == before.last_event_id
    assert [m.event for m in received][-2:] == ["finished", "finished"]


def test_short_stream_under_wsgi_renews_token(
    gate: str, transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = get_user_model().objects.create_user("anna")
    result = running(tasks.gated.enqueue(gate))
    with monkeypatch.context() as patch:
        make_tokens_older(patch, 50_000)
        url = events_url(request_from(user), result)
    client = Client()
    client.force_login(user)
    text = b"".join(client.get(url).streaming_content).decode()
    received = list(messages(iter(text.splitlines())))
    assert [message.event for message in received] == ["progress", "token"]


def test_token_is_renewed_during_a_stream(server: str, gate: str, transactional_db: None) -> None:
    user = get_user_model().objects.create_user("anna")
    result = running(tasks.gated.enqueue(gate))
    with (
        httpx.Client(base_url=server, timeout=LIMIT) as browser,
        # Neither a comment nor a recheck wakes the stream before the token needs a successor.
        override_settings(
            TASKS_SSE={"TOKEN_MAX_AGE": 3, "KEEPALIVE": 10 * LIMIT, "RECHECK_INTERVAL": 10 * LIMIT}
        ),
    ):
        browser.get("/login/anna/")
        with browser.stream("GET", events_url(request_from(user), result)) as response:
            received = messages(response.iter_lines())
            assert next(received).event == "progress"
            renewed = next(received)
            assert renewed.event == "token"
            tasks.gates[gate].set()
            assert next(received).event == "finished"
