"""Requests for which links are made, the tokens in links, and tokens of another age."""

from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from django.contrib.auth.models import AnonymousUser
from django.test import RequestFactory

from django_tasks_local_sse import tokens
from django_tasks_local_sse.access import events_url
from tests.support.waiting import AnyResult

type User = Any


def request_from(user: User = None) -> Any:
    """Return a request of a logged-in user, or of an anonymous visitor."""
    request = RequestFactory().get("/")
    request.user = user or AnonymousUser()
    return request


def tokens_in(url: str) -> list[str]:
    """Return the tokens in a URL of events_url() or task_links()."""
    return parse_qs(urlsplit(url).query)["task"]


def watch_token(result: AnyResult, user: User = None) -> str:
    """Return the token in a link to watch a task."""
    [token] = tokens_in(events_url(request_from(user), result))
    return token


def with_tokens(view: str, *texts: str) -> str:
    """Return the URL of `events` or `status` with these tokens."""
    return f"/tasks/{view}/?" + urlencode([("task", text) for text in texts])


def make_tokens_older(patch: pytest.MonkeyPatch, seconds: int) -> None:
    """Let tokens that are made from now on be `seconds` older."""
    encode = tokens.b62_encode
    patch.setattr(tokens, "b62_encode", lambda made_at: encode(made_at - seconds))
