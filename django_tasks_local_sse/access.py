"""
Links to tasks, and the decision which tasks the client of a request may watch or cancel.

The tokens in links prove that a page of this site gave them to the client (module `tokens`). After
them the application's channel manager decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import urlencode

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.tasks import TaskResult
from django.urls import reverse

from .conf import sse_settings
from .eventstream import allowed_by_channel_manager
from .tokens import (
    Purpose,
    Token,
    claimed_key,
    make_token,
    read_token,
    user_digests,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.http import HttpRequest

    from django_tasks_local.aliases import AnyResult, TaskKey

MAX_TASKS_IN_LINK = 30  # tasks; gunicorn accepts a URL of at most 4,094 bytes
MAX_TASKS_IN_GET = 200
MAX_TASKS_IN_POST = 2_000

UNKNOWN_USER = (
    "Links to tasks are made for the user of a request, and request.user cannot be looked up in an "
    "async view. Render {% task_progress %} with `await sync_to_async(render)(...)`, or set "
    "`request.user = await request.auser()` before. For events_url(), cancel_token() and "
    "task_links() there are `await aevents_url(...)`, `await acancel_token(...)` and "
    "`await atask_links(...)`."
)


class TooManyTasksError(Exception):
    """A request names more tasks than its method allows."""


class Denial(StrEnum):
    """The reason why a client may not see a task."""

    # The link is too old, or it was made for another user.
    EXPIRED = "expired"
    OTHER_USER = "other_user"
    # The token is forged, or the channel manager forbids the task. Clients cannot distinguish the
    # two from a task that does not exist.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class TaskRef:
    """A task in a request. `token` is None if its signature is invalid."""

    alias: str
    id: str
    token: Token | None = None
    denial: Denial | None = None

    @property
    def key(self) -> TaskKey:
        """The alias and the id, which is no key alone: two backends may both have a task "1"."""
        return self.alias, self.id

    @property
    def allowed(self) -> bool:
        """Whether the client may watch or cancel the task."""
        return self.denial is None

    def renewal_time(self, max_age: float) -> float:
        """Return the time, in seconds since the epoch, after which the client needs a new token."""
        if self.token is None or not self.token.user or not self.allowed:
            return math.inf  # Bearer links are not renewed.
        return self.token.made_at + max_age / 2

    def renewed_token(self) -> str:
        """Return a new token for the same task and user."""
        assert self.token is not None
        return make_token(Purpose.WATCH, self.alias, self.id, self.token.user)


class TaskLinks(TypedDict):
    """The URLs and the token with which a client watches and cancels one task."""

    backend: str
    id: str
    events_url: str
    status_url: str
    cancel_url: str
    cancel_token: str


def events_url(request: HttpRequest, *results: AnyResult) -> str:
    """
    Return the URL of one event stream for these tasks, for the user of this request.

    The response to `request` is then not stored by Django's cache, which would give the link to
    other visitors. Raises TypeError for an argument that is not a TaskResult, ValueError without
    arguments and with more than MAX_TASKS_IN_LINK, and SynchronousOnlyOperation in an async view
    that has not loaded `request.user`.
    """
    return _events_url(request, _user(request), results)


async def aevents_url(request: HttpRequest, *results: AnyResult) -> str:
    """Return the URL that events_url() returns; for async views, because it may use the ORM."""
    return _events_url(request, await _auser(request), results)


def cancel_token(request: HttpRequest, result: AnyResult) -> str:
    """
    Return the token that lets the user of this request cancel a task, by POST to `cancel/`.

    See events_url() for the cache, TypeError and SynchronousOnlyOperation.
    """
    return _make_token(request, Purpose.CANCEL, _user(request), result)


async def acancel_token(request: HttpRequest, result: AnyResult) -> str:
    """Return a token like cancel_token(); for async views, because it may use the ORM."""
    return _make_token(request, Purpose.CANCEL, await _auser(request), result)


def task_links(request: HttpRequest, result: AnyResult, bearer: bool = False) -> TaskLinks:
    """
    Return the URLs and the token with which a client watches and cancels a task.

    They are valid for the user of this request; with `bearer` they are valid for every client that
    has them, and cancelling needs no CSRF token. See events_url() for the cache and for errors.
    """
    return _task_links(request, None if bearer else _user(request), result, bearer)


async def atask_links(request: HttpRequest, result: AnyResult, bearer: bool = False) -> TaskLinks:
    """Return links like task_links(); for async views, because it may use the ORM."""
    return _task_links(request, None if bearer else await _auser(request), result, bearer)


def watch_tokens(request: HttpRequest) -> list[str]:
    """Return the tokens in a request to watch tasks. Raises TooManyTasksError."""
    if request.method == "POST":
        tokens, limit = request.POST.get("tasks", "").split(), MAX_TASKS_IN_POST
    else:
        tokens, limit = request.GET.getlist("task"), MAX_TASKS_IN_GET
    if len(tokens) > limit:
        raise TooManyTasksError(
            f"A {request.method} request may name {limit:,} tasks, and this one names "
            f"{len(tokens):,}."
        )
    return tokens


def watched_tasks(request: HttpRequest) -> list[TaskRef]:
    """
    Return the tasks in a request, each of them once. May use the ORM. Raises TooManyTasksError.

    If several tokens name one task, the one that allows most counts.
    """
    user = _user(request)
    max_age = sse_settings().token_max_age
    digests = (*user_digests(user), "")  # A logged-in user may also use a bearer link.
    refs: dict[TaskKey, TaskRef] = {}
    for text in dict.fromkeys(watch_tokens(request)):
        ref = _ref(text, read_token(Purpose.WATCH, text), digests, max_age)
        known = refs.get(ref.key)
        if known is None or _rank(ref) < _rank(known):
            refs[ref.key] = ref
    return _ask_channel_manager(user, list(refs.values()))


def cancelled_task(request: HttpRequest) -> TaskRef:
    """Return the task that a POST request wants to cancel. May use the ORM."""
    user = _user(request)
    text = request.POST.get("task", "")
    token = read_token(Purpose.CANCEL, text)
    digests = user_digests(user)
    if token is None:
        token = read_token(Purpose.CANCEL_BEARER, text)
        digests = ("",)
    ref = _ref(text, token, digests, sse_settings().token_max_age)
    return _ask_channel_manager(user, [ref])[0]


def has_bearer_token(request: HttpRequest) -> bool:
    """Return whether a request to cancel a task has a bearer token, valid except for its age."""
    return read_token(Purpose.CANCEL_BEARER, request.POST.get("task", "")) is not None


def claimed_keys(request: HttpRequest) -> set[TaskKey]:
    """Return the keys of the tasks in a request, authorized or not. Raises TooManyTasksError."""
    return set(map(claimed_key, watch_tokens(request)))


def _ref(text: str, token: Token | None, digests: tuple[str, ...], max_age: float) -> TaskRef:
    if token is None:
        return TaskRef(*claimed_key(text), None, Denial.UNKNOWN)
    denial = None
    if token.user not in digests:
        denial = Denial.OTHER_USER
    elif token.age > max_age:
        denial = Denial.EXPIRED
    elif token.user:
        # A renewed token must stay valid when its old key leaves SECRET_KEY_FALLBACKS.
        token = token._replace(user=digests[0])
    return TaskRef(token.alias, token.id, token, denial)


def _rank(ref: TaskRef) -> int:
    """Return a smaller number for a reference that allows the client more."""
    return -1 if ref.denial is None else list(Denial).index(ref.denial)


def _ask_channel_manager(user: Any, refs: list[TaskRef]) -> list[TaskRef]:
    ids = {ref.id for ref in refs if ref.allowed}
    if not ids:
        return refs
    allowed = allowed_by_channel_manager(user, ids)
    return [
        ref if not ref.allowed or ref.id in allowed
        else TaskRef(ref.alias, ref.id, ref.token, Denial.UNKNOWN)
        for ref in refs
    ]  # fmt: skip


def _events_url(request: HttpRequest, user: Any, results: Iterable[AnyResult]) -> str:
    tokens = [_make_token(request, Purpose.WATCH, user, result) for result in results]
    if not tokens:
        raise ValueError("events_url() needs at least one TaskResult.")
    if len(tokens) > MAX_TASKS_IN_LINK:
        raise ValueError(
            f"events_url() makes a URL for at most {MAX_TASKS_IN_LINK} tasks, not {len(tokens)}, "
            f"because servers limit the length of a URL. For more, make several URLs and POST "
            f"their tokens to the view `events`, in one field `tasks`, separated by spaces."
        )
    return _watch_url("events", *tokens)


def _task_links(request: HttpRequest, user: Any, result: AnyResult, bearer: bool) -> TaskLinks:
    token = _make_token(request, Purpose.WATCH, user, result)
    cancel_purpose = Purpose.CANCEL_BEARER if bearer else Purpose.CANCEL
    return {
        "backend": result.backend,
        "id": result.id,
        "events_url": _watch_url("events", token),
        "status_url": _watch_url("status", token),
        "cancel_url": reverse("django_tasks_local_sse:cancel"),
        "cancel_token": _make_token(request, cancel_purpose, user, result),
    }


def _watch_url(view: str, *tokens: str) -> str:
    query = urlencode([("task", token) for token in tokens])
    return f"{reverse(f'django_tasks_local_sse:{view}')}?{query}"


def _make_token(request: HttpRequest, purpose: Purpose, user: Any, result: AnyResult) -> str:
    if not isinstance(result, TaskResult):
        raise TypeError(
            f"A link to a task needs the TaskResult that enqueue() or get_result() returned, "
            f"not {result!r:.200}."
        )
    _keep_out_of_cache(request)
    return make_token(purpose, result.backend, result.id, user_digests(user)[0])


def _keep_out_of_cache(request: Any) -> None:
    """
    Forbid Django's cache to store the response to this request, because it contains a link.

    The flag belongs on Django's own request. Django REST framework passes another object, which
    wraps Django's request, to its views.
    """
    while (wrapped := getattr(request, "_request", None)) is not None:
        request = wrapped
    request._cache_update_cache = False  # noqa: SLF001 - no public name exists


def _user(request: HttpRequest) -> Any:
    """Return the logged-in user, or None, as django-eventstream expects it. May use the ORM."""
    user = getattr(request, "user", None)
    try:
        return user if user is not None and user.is_authenticated else None
    except SynchronousOnlyOperation as error:
        # `await request.auser()` alone does not help: Django caches its user in another attribute
        # than the one that request.user reads.
        raise SynchronousOnlyOperation(UNKNOWN_USER) from error


async def _auser(request: HttpRequest) -> Any:
    """
    Return the logged-in user, or None, without blocking the event loop.

    This function does not call request.auser(), because a middleware that replaces `request.user`
    does not replace that method.
    """
    return await sync_to_async(_user)(request)
