"""
The three views. `access` decides about permissions, `streams` has the content of a stream.

The views are sync functions, because an async view needs an event loop in the request's thread: a
WSGI server would create one for each poll, and gevent and tornado refuse it, because a loop runs in
that thread already. Under ASGI the stream itself is async and occupies no thread.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from django.contrib.auth.decorators import login_not_required
from django.core.handlers.asgi import ASGIRequest
from django.db import connections, transaction
from django.http import (
    HttpRequest,
    HttpResponse,
    HttpResponseForbidden,
    JsonResponse,
)
from django.tasks.exceptions import InvalidTaskBackend, TaskResultDoesNotExist
from django.views.decorators.csrf import csrf_protect
from django.views.decorators.http import require_POST, require_safe

from django_tasks_local import cancel as cancel_task

from . import access, encoding
from .conf import SSESettings, sse_settings
from .conversation import Conversation
from .eventstream import set_headers
from .streams import EventStreamResponse, find_events, stream_async, stream_sync

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from django.http.response import HttpResponseBase

FORBIDDEN = (
    "No task that you may see: the link is missing, was changed, is too old, or was made for "
    "another user. Reload the page that contains it."
)


def _authorized_by_link[ViewT: Callable[..., Any]](view: ViewT) -> ViewT:
    """
    Exempt a view from LoginRequiredMiddleware, because the link authorizes it, and from
    ATOMIC_REQUESTS, because reading states needs no transaction.
    """
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return login_not_required(view)


@_authorized_by_link
@require_safe
def events(request: HttpRequest) -> HttpResponseBase:
    """
    Stream the events of the tasks that the tokens `task=...` name, until all are finished.

    Source: WHATWG HTML, section 9.2, "Server-sent events".
    """
    last_event_id = request.headers.get("Last-Event-ID", "")
    if last_event_id == encoding.end_id(access.claimed_ids(request)):
        # The client has received the last event. EventSource does not reconnect after a 204.
        return _finish(HttpResponse(status=204), request)
    refs = access.watched_tasks(request)
    if not any(ref.allowed for ref in refs):
        return _finish(HttpResponseForbidden(FORBIDDEN, content_type="text/plain"), request)
    settings = sse_settings()
    conversation = Conversation(refs, find_events(refs), last_event_id, settings)
    content: AsyncIterator[bytes] | Iterator[bytes]
    if isinstance(request, ASGIRequest):
        content = stream_async(conversation) if request.method == "GET" else _empty_content()
    else:
        hold = _hold_seconds(request, settings)
        content = stream_sync(conversation, hold) if request.method == "GET" else iter(())
    # A middleware that compresses would buffer events. It compresses only if the request has this
    # header.
    request.META.pop("HTTP_ACCEPT_ENCODING", None)
    return _finish(EventStreamResponse(content, content_type="text/event-stream"), request)


@_authorized_by_link
@require_safe
def status(request: HttpRequest) -> HttpResponseBase:
    """Return the payloads of the tasks that the tokens `task=...` name, as a JSON array."""
    refs = access.watched_tasks(request)
    if not any(ref.allowed for ref in refs):
        return _finish(HttpResponseForbidden(FORBIDDEN, content_type="text/plain"), request)
    settings = sse_settings()
    found = find_events(refs)
    payloads = [
        encoding.payload(found[ref.key], settings)
        if ref.key in found
        else encoding.unknown_payload(ref.id)
        for ref in refs
    ]
    return _finish(JsonResponse(payloads, safe=False), request)


@_authorized_by_link
@require_POST
@csrf_protect
def cancel(request: HttpRequest) -> HttpResponse:
    """
    Cancel the task that the token `task` names; it must have been made by cancel_token().

    The answer is {"cancelled": true}, or false if the task has finished already; 403 for an invalid
    token, 404 for an unknown task, 501 for a backend that cannot cancel.
    """
    ref = access.cancelled_task(request)
    if ref.alias is None:
        return HttpResponseForbidden(FORBIDDEN, content_type="text/plain")
    try:
        cancelled = cancel_task(ref.id, backend=ref.alias)
    except (InvalidTaskBackend, TaskResultDoesNotExist):
        return HttpResponse("No such task.", status=404, content_type="text/plain")
    except NotImplementedError:
        return HttpResponse("It cannot be cancelled.", status=501, content_type="text/plain")
    return JsonResponse({"cancelled": cancelled})


def _finish(response: HttpResponseBase, request: HttpRequest) -> HttpResponseBase:
    set_headers(response, request)
    return response


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
