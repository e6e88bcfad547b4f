"""
Signed links: they decide which client may watch a task, and which may cancel it.

A token is `<result id>.<backend alias>.<time>.<signature>`, its first two parts percent-encoded.
It is bound to the user for whom it was made. A token for an anonymous user is a bearer link: it
works for every client that has it. Tokens for watching and for cancelling a task are signed with
different salts, so neither can replace the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlencode

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.signing import BadSignature, TimestampSigner
from django.tasks import TaskResult
from django.urls import reverse

from .conf import sse_settings
from .eventstream import allowed_by_channel_manager

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django.http import HttpRequest

    from django_tasks_local.aliases import AnyResult

# The alias and the id of a task in a request. The alias is None if the client may not see the task.
type RefKey = tuple[str | None, str]

WATCH = "django_tasks_local_sse.watch"
CANCEL = "django_tasks_local_sse.cancel"

UNKNOWN_USER = (
    "Links to tasks are made for the user of a request, and request.user cannot be looked up in an "
    "async view. Render {% task_progress %} with `await sync_to_async(render)(...)`, or set "
    "`request.user = await request.auser()` before. For events_url() and cancel_token() there are "
    "`await aevents_url(...)` and `await acancel_token(...)`."
)
MAX_TOKEN_LENGTH = 1000  # characters; longer than any id and alias


@dataclass(frozen=True, slots=True)
class TaskRef:
    """A task in a request: its id, and its backend's alias if the token is valid."""

    id: str
    alias: str | None

    @property
    def key(self) -> RefKey:
        """The alias and the id, which is no key alone: two backends may both have a task "1"."""
        return self.alias, self.id

    @property
    def allowed(self) -> bool:
        """Whether the client may watch or cancel the task."""
        return self.alias is not None


def events_url(request: HttpRequest, *results: AnyResult) -> str:
    """
    Return the URL of one event stream for these tasks, for the user of this request.

    Raises TypeError for an argument that is not a TaskResult, ValueError without arguments, and
    SynchronousOnlyOperation in an async view that has not loaded `request.user`.
    """
    return _events_url(_user(request), results)


async def aevents_url(request: HttpRequest, *results: AnyResult) -> str:
    """Return the URL that events_url() returns; for async views, because it may use the ORM."""
    return _events_url(await _auser(request), results)


def cancel_token(request: HttpRequest, result: AnyResult) -> str:
    """
    Return the token that lets the user of this request cancel a task, by POST to `cancel/`.

    Raises TypeError and SynchronousOnlyOperation, see events_url().
    """
    return _make_token(CANCEL, _user(request), result)


async def acancel_token(request: HttpRequest, result: AnyResult) -> str:
    """Return a token like cancel_token(); for async views, because it may use the ORM."""
    return _make_token(CANCEL, await _auser(request), result)


def watched_tasks(request: HttpRequest) -> list[TaskRef]:
    """
    Return the tasks in a request, each of them once. Not for the event loop's thread.

    A task is not allowed if its token is forged, too old or bound to another user, or if the
    application's channel manager refuses it.
    """
    user = _user(request)
    tokens = dict.fromkeys(request.GET.getlist("task"))
    refs = dict.fromkeys(_read_token(WATCH, user, token) for token in tokens)
    valid_ids = {ref.id for ref in refs if ref.allowed}
    allowed_ids = allowed_by_channel_manager(user, valid_ids) if valid_ids else set()
    checked = dict.fromkeys(ref if ref.id in allowed_ids else TaskRef(ref.id, None) for ref in refs)
    # If one token allows a task, drop further invalid tokens for the same id, because the client
    # would otherwise receive the task as unknown too.
    return [ref for ref in checked if ref.allowed or ref.id not in allowed_ids]


def cancelled_task(request: HttpRequest) -> TaskRef:
    """Return the task that a POST request wants to cancel. Not for the event loop's thread."""
    user = _user(request)
    ref = _read_token(CANCEL, user, request.POST.get("task", ""))
    if ref.allowed and ref.id in allowed_by_channel_manager(user, [ref.id]):
        return ref
    return TaskRef(ref.id, None)


def claimed_ids(request: HttpRequest) -> list[str]:
    """Return the task ids in a request, authorized or not."""
    return sorted({_claimed_id(token) for token in request.GET.getlist("task")})


def _events_url(user: Any, results: Iterable[AnyResult]) -> str:
    tokens = [_make_token(WATCH, user, result) for result in results]
    if not tokens:
        raise ValueError("events_url() needs at least one TaskResult.")
    query = urlencode([("task", token) for token in tokens])
    return f"{reverse('django_tasks_local_sse:events')}?{query}"


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


def _signer(salt: str, user: Any) -> TimestampSigner:
    bound_salt = salt if user is None else f"{salt}:{user.pk}"
    return TimestampSigner(sep=".", salt=bound_salt)


def _make_token(salt: str, user: Any, result: AnyResult) -> str:
    if not isinstance(result, TaskResult):
        raise TypeError(
            f"A link to a task needs the TaskResult that enqueue() or get_result() returned, "
            f"not {result!r:.200}."
        )
    return _signer(salt, user).sign(f"{_quote(result.id)}.{_quote(result.backend)}")


def _read_token(salt: str, user: Any, token: str) -> TaskRef:
    if len(token) <= MAX_TOKEN_LENGTH:
        max_age = timedelta(seconds=sse_settings().token_max_age)
        # A logged-in user may still have a bearer link that was made before the login.
        for bound_to in (user, None) if user is not None else (None,):
            try:
                value = _signer(salt, bound_to).unsign(token, max_age=max_age)
            except BadSignature:
                continue
            result_id, _, alias = value.partition(".")
            return TaskRef(unquote(result_id), unquote(alias))
    return TaskRef(_claimed_id(token), None)


def _claimed_id(token: str) -> str:
    return unquote(token[:MAX_TOKEN_LENGTH].partition(".")[0])


def _quote(part: str) -> str:
    return quote(part, safe="").replace(".", "%2E")
