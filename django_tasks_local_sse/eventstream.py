"""Use the parts of django-eventstream for access to channels, CORS settings and headers."""

from collections.abc import Iterable
from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.cache import patch_vary_headers
from django_eventstream.channelmanager import DefaultChannelManager
from django_eventstream.utils import get_channelmanager, get_cors_from_settings


def channel_name(result_id: str) -> str:
    """Return the name of a task's channel."""
    return f"task-{result_id}"


def allowed_by_channel_manager(user: Any, result_ids: Iterable[str]) -> set[str]:
    """
    Ask the application's channel manager which of these tasks `user` may see.

    `user` is None for an anonymous visitor, as django-eventstream expects it. May use the ORM, so
    it must not run in the event loop's thread.

    Source: django-eventstream's README, "Authorization".
    """
    manager = get_channelmanager()
    return {id for id in result_ids if manager.can_read_channel(user, channel_name(id))}


def anyone_may_read() -> bool:
    """Whether the channel manager is the default one, which lets anyone read every channel."""
    read = type(get_channelmanager()).can_read_channel
    return read is DefaultChannelManager.can_read_channel


def set_headers(response: HttpResponseBase, request: HttpRequest) -> None:
    """
    Set the headers that forbid caching and buffering, and CORS headers by the settings.

    The settings are those of django-eventstream. Its own function compares their origins with the
    Referer, which under Django's default Referrer-Policy browsers do not send to another origin;
    the right header is Origin (Fetch standard, "CORS protocol").
    """
    # no-transform: a proxy that compresses a stream collects it first (RFC 9111, section 5.2.2.6).
    response["Cache-Control"] = "private, no-store, no-transform"
    response["X-Accel-Buffering"] = "no"
    origins = get_cors_from_settings()
    if isinstance(origins, str):
        allowed = origins
    else:
        patch_vary_headers(response, ["Origin"])
        origin = request.headers.get("Origin", "")
        allowed = origin if origin in origins else ""
    if allowed:
        response["Access-Control-Allow-Origin"] = allowed
    if getattr(settings, "EVENTSTREAM_ALLOW_CREDENTIALS", False):
        response["Access-Control-Allow-Credentials"] = "true"
    if headers := getattr(settings, "EVENTSTREAM_ALLOW_HEADERS", ""):
        response["Access-Control-Allow-Headers"] = headers
