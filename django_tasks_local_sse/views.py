"""
The three views. `access` decides about permissions, `streams` has the content of a stream.

The views are sync functions, because an async view needs an event loop in the request's thread: a
WSGI server would create one for each poll, and gevent and tornado refuse it, because a loop runs in
that thread already. Under ASGI the stream itself is async and occupies no thread.
"""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING, Any

from django.contrib.auth.decorators import login_not_required
from django.core.handlers.asgi import ASGIRequest
from django.db import connections, transaction
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseBadRequest,
    HttpResponseForbidden,
    HttpResponseRedirect,
    JsonResponse,
)
from django.tasks.exceptions import InvalidTaskBackend, TaskResultDoesNotExist
from django.utils.http import url_has_allowed_host_and_scheme
from django.views.decorators.csrf import csrf_exempt, csrf_protect
from django.views.decorators.http import require_http_methods, require_POST

from django_tasks_local import cancel as cancel_task
from django_tasks_local.logs import get_logger

from . import access, encoding
from .conf import SSESettings, sse_settings
from .conversation import Conversation
from .eventstream import set_headers
from .rare_warnings import RareWarnings
from .streams import (
    EventStreamResponse,
    find_events,
    open_streams,
    stream_async,
    stream_sync,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Iterator

    from django.http.response import HttpResponseBase

    from .access import TaskRef
    from .conversation import FoundEvents
    from .encoding import Payload

CANNOT_CANCEL = (
    "You may not cancel this task: the link is missing, was changed, is too old, or was made for "
    "another user. Reload the page that contains it."
)
RETRY_AFTER = "10"  # seconds
# Streams may use this share of the files that the process may open. It needs the others for
# ordinary requests, databases and its own files.
MAX_FILES_SHARE = 0.8

_warnings = RareWarnings(get_logger(__name__))


def _authorized_by_link[ViewT: Callable[..., Any]](view: ViewT) -> ViewT:
    """
    Exempt a view from LoginRequiredMiddleware, because the link authorizes it, from CSRF checks,
    and from ATOMIC_REQUESTS, because reading states needs no transaction.
    """
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return csrf_exempt(login_not_required(view))


@_authorized_by_link
@require_http_methods(["GET", "HEAD", "POST"])
def events(request: HttpRequest) -> HttpResponseBase:
    """
    Stream the events of the tasks that the tokens name, until all are finished.

    Source: WHATWG HTML, section 9.2, "Server-sent events".
    """
    last_event_id = _last_event_id(request)
    try:
        if last_event_id == encoding.end_id(access.claimed_keys(request)):
            # The client has received the last event. EventSource does not reconnect after a 204.
            return _finish(HttpResponse(status=204), request)
        refs = access.watched_tasks(request)
    except access.TooManyTasksError as error:
        return _finish(HttpResponseBadRequest(error, content_type="text/plain"), request)
    if not any(ref.allowed for ref in refs):
        return _finish(_refusal(refs), request)
    settings = sse_settings()
    if _has_too_many_streams(settings):
        text = "This server has too many open streams."
        return _finish(_unavailable(text), request)
    conversation = Conversation(refs, last_event_id, settings)
    if request.method != "HEAD":
        # Not when the stream starts: after a restart many requests arrive at once, and all of them
        # would be accepted before the first stream starts.
        open_streams.add(conversation)
    content: AsyncIterator[bytes] | Iterator[bytes]
    if isinstance(request, ASGIRequest):
        content = _empty_content() if request.method == "HEAD" else stream_async(conversation)
    else:
        hold = _hold_seconds(request, settings)
        content = iter(()) if request.method == "HEAD" else stream_sync(conversation, hold)
    response = EventStreamResponse(content, conversation, content_type="text/event-stream")
    # A middleware that compresses would buffer events. It skips a response with this header.
    response["Content-Encoding"] = "identity"
    return _finish(response, request)


@_authorized_by_link
@require_http_methods(["GET", "HEAD", "POST"])
def status(request: HttpRequest) -> HttpResponseBase:
    """
    Return the states of the tasks that the tokens name, and new tokens for some of them.

    A task whose store raises an error is omitted; the answer is 503 if no state is known.
    """
    try:
        refs = access.watched_tasks(request)
    except access.TooManyTasksError as error:
        return _finish(HttpResponseBadRequest(error, content_type="text/plain"), request)
    if not any(ref.allowed for ref in refs):
        return _finish(_refusal(refs), request)
    settings = sse_settings()
    found = find_events(ref for ref in refs if ref.allowed)
    content = _states(refs, found, settings)
    if not content["tasks"]:
        return _finish(_unavailable("The states cannot be determined now."), request)
    return _finish(JsonResponse(content), request)


@_authorized_by_link
@require_POST
def cancel(request: HttpRequest) -> HttpResponse:
    """
    Cancel the task that the token `task` names, made by cancel_token() or task_links().

    The answer is {"cancelled": true}, or false if the task has finished already; for a form a
    redirect to its field `next`, or one sentence. 403 for an invalid token, 404 for an unknown
    task, 501 for a backend that cannot cancel, 503 if the process with the task does not answer.
    """
    view = _cancel if access.has_bearer_token(request) else _cancel_with_csrf_token
    response: HttpResponse = view(request)
    response["Cache-Control"] = "private, no-store"
    return response


def _cancel(request: HttpRequest) -> HttpResponse:
    ref = access.cancelled_task(request)
    if not ref.allowed:
        return HttpResponseForbidden(CANNOT_CANCEL, content_type="text/plain")
    try:
        cancelled = cancel_task(ref.id, backend=ref.alias)
    except (InvalidTaskBackend, TaskResultDoesNotExist):
        return HttpResponse("No such task.", status=404, content_type="text/plain")
    except NotImplementedError:
        return HttpResponse("It cannot be cancelled.", status=501, content_type="text/plain")
    except TimeoutError:
        return _unavailable("The process that has the task does not answer.")
    if not _is_form(request):
        return JsonResponse({"cancelled": cancelled})
    next_url = request.POST.get("next", "")
    hosts = {request.get_host()}
    if url_has_allowed_host_and_scheme(next_url, hosts, require_https=request.is_secure()):
        # 303, so that the browser loads the page with GET (RFC 9110, section 15.4.4).
        return HttpResponseRedirect(next_url, status=303)
    text = "The task was cancelled." if cancelled else "The task had finished already."
    return HttpResponse(text, content_type="text/plain")


_cancel_with_csrf_token = csrf_protect(_cancel)


def _is_form(request: HttpRequest) -> bool:
    """Return whether a browser sent the request by submitting a form."""
    if "next" in request.POST:
        return True
    try:
        return request.get_preferred_type(["application/json", "text/html"]) == "text/html"
    except (LookupError, ValueError):
        return False  # Django raises these for an Accept header that it cannot parse.


def _finish(response: HttpResponseBase, request: HttpRequest) -> HttpResponseBase:
    set_headers(response, request)
    return response


def _refusal(refs: Iterable[TaskRef]) -> HttpResponse:
    """Return the answer to a request without a token that gives access."""
    return JsonResponse(_states(refs, {}, sse_settings()), status=403)


def _states(refs: Iterable[TaskRef], found: FoundEvents, settings: SSESettings) -> Payload:
    payloads, tokens = [], []
    for ref in refs:
        event = found.get(ref.key)
        if event is not None:
            payloads.append(encoding.payload(event, settings))
        elif ref.denial is not None or ref.key in found:
            payloads.append(encoding.denied_payload(ref.key, ref.denial or access.Denial.UNKNOWN))
        is_open = not event.is_last if event is not None else ref.key not in found
        if is_open and time.time() >= ref.renewal_time(settings.token_max_age):
            tokens.append(encoding.token_payload(ref.key, ref.renewed_token()))
    return {"tasks": payloads, "tokens": tokens}


def _unavailable(text: str) -> HttpResponse:
    headers = {"Retry-After": RETRY_AFTER}
    return HttpResponse(text, status=503, content_type="text/plain", headers=headers)


def _last_event_id(request: HttpRequest) -> str:
    """
    Return the id of the last event that the client has received.

    A script that replaces EventSource cannot set the header for another origin; the one of
    django-eventstream sends a query parameter.
    """
    values = [*request.GET.getlist("lastEventId"), request.POST.get("lastEventId", "")]
    return request.headers.get("Last-Event-ID") or next(filter(None, reversed(values)), "")


def _has_too_many_streams(settings: SSESettings) -> bool:
    limit = settings.max_streams or _default_max_streams()
    if len(open_streams) < limit:
        return False
    _warnings.warn(
        "streams",
        "A stream is refused with 503, because %d streams are open in this process; "
        "TASKS_SSE['MAX_STREAMS'] sets the limit.",
        len(open_streams),
    )
    return True


def _default_max_streams() -> float:
    if sys.platform == "win32":
        return math.inf  # Windows limits sockets by memory only.
    import resource  # Not imported at the top, because Windows does not have this module.

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else soft * MAX_FILES_SHARE


async def _empty_content() -> AsyncIterator[bytes]:
    """Return the content of an answer to HEAD: Django's ASGI handler iterates over it too."""
    return
    yield b""  # This unreachable yield makes the function an async generator.


def _hold_seconds(request: HttpRequest, settings: SSESettings) -> float:
    # Django's threaded development server has a thread for every connection.
    is_development_server = request.META.get("SERVER_SOFTWARE", "").startswith("WSGIServer/")
    if is_development_server and request.META.get("wsgi.multithread"):
        return math.inf
    return settings.wsgi_hold
