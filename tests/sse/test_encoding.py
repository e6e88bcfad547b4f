"""Tests of the payloads of task events and of their encoding for streams and channels."""

import gc

import pytest
from django.test import override_settings

from django_tasks_local.events import Progress
from django_tasks_local.hub import hub
from django_tasks_local_sse import encoding
from django_tasks_local_sse.conf import SSESettings
from tests.project import tasks
from tests.support.backends import settings_with
from tests.support.factories import event
from tests.support.waiting import finished, wait_until


def test_event_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    encode = encoding._encode
    monkeypatch.setattr(encoding, "_encode", lambda *args: calls.append(args) or encode(*args))
    event = hub.snapshot(finished(tasks.fail.enqueue()).id)
    hidden = [encoding.encode(event, SSESettings()) for _ in range(3)]
    shown = encoding.encode(event, SSESettings(expose_errors=True))
    assert len(calls) == 2
    assert len(set(hidden)) == 1
    assert b"bad value" in shown
    assert b"bad value" not in hidden[0]


def test_encoding_is_discarded_with_its_event() -> None:
    with settings_with(MAX_RESULTS=1):
        result = finished(tasks.noop.enqueue())
        encoding.encode(hub.snapshot(result.id), SSESettings())
        before = len(encoding._encoded)
        # MAX_RESULTS is 1, so the backend evicts the first result when this one is finished.
        finished(tasks.noop.enqueue())
        wait_until(lambda: hub.snapshot(result.id) is None, "the result is not evicted")
        gc.collect()
        assert len(encoding._encoded) < before


@pytest.mark.parametrize("use_tz", [True, False])
def test_times_include_their_zone(use_tz: bool) -> None:
    with override_settings(USE_TZ=use_tz, TIME_ZONE="America/New_York"):
        event = hub.snapshot(finished(tasks.noop.enqueue()).id)
        payload = encoding.payload(event, SSESettings())
    assert payload["finished_at"].endswith("+00:00" if use_tz else ("-05:00", "-04:00"))


def test_payload_of_nested_loops_and_a_repeated_task() -> None:
    levels = [
        {"message": "outer", "current": 1, "total": 2, "unit": "files"},
        {"message": "inner", "current": 3, "total": None, "unit": "rows"},
    ]
    progress = Progress(current=1, total=2, unit="files", levels=levels)
    content = encoding.payload(
        event("id", 3, progress=progress, retried_from="another"), SSESettings()
    )
    assert content["retried_from"] == "another"
    assert content["progress"]["unit"] == "files"
    assert content["progress"]["levels"] == levels


def test_end_id_ignores_order() -> None:
    a, b = ("default", "a"), ("default", "b")
    assert encoding.end_id([a, b]) == encoding.end_id([b, a])
    assert len({encoding.end_id(keys) for keys in ([a, b], [a], [b], [("other", "a")])}) == 4


def test_lone_surrogate_is_replaced() -> None:
    """to_json() replaces a lone surrogate, which UTF-8 cannot encode, by a question mark."""
    text = encoding.to_json({"message": "a\ud800b"})
    assert text == '{"message":"a?b"}'
