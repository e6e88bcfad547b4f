"""
This module knows whether this process serves requests.

At the end of a script or a management command the waiting tasks run. A process that serves fails
and reports them: a web worker that a server replaces must not run hundreds of tasks first. Under a
test runner they would work on the real databases, whose names are back at the end.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from django.core.signals import request_started
from django.dispatch import receiver

from .databases import has_test_environment

# The keys of sys.modules that a project's asgi.py or wsgi.py adds.
_SERVER_MODULES = {"django.core.asgi", "django.core.wsgi"}


class _State:
    """Holds whether this process was seen to serve; it then serves for the rest of its life."""

    is_serving = False


_state = _State()


@receiver(request_started, dispatch_uid="django_tasks_local.serving")
def _on_request(**kwargs: Any) -> None:
    _state.is_serving = True


def note_new_backend() -> None:
    """Check whether this process serves. Called from: the thread that creates a task backend."""
    if _state.is_serving:
        return
    # During a request get_urlconf() has a value. The first request may import this module, with the
    # URLconf, after it has sent request_started.
    urls = sys.modules.get("django.urls")
    has_urlconf = urls is not None and urls.get_urlconf() is not None
    if has_urlconf or os.environ.get("RUN_MAIN") == "true":
        _state.is_serving = True
    note_enqueue()


def note_enqueue() -> None:
    """Check whether a test environment is active. Called by each enqueue(), so it must be fast."""
    if not _state.is_serving and has_test_environment():
        _state.is_serving = True


def is_serving() -> bool:
    """Return whether this process serves requests, or runs tests."""
    return _state.is_serving


def may_serve() -> bool:
    """Return whether this process serves, or has loaded an application and so may be a server."""
    return _state.is_serving or not _SERVER_MODULES.isdisjoint(sys.modules)
