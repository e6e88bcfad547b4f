"""Django's caches store no page with a link: the next visitor would get it."""

import itertools
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.cache import cache
from django.http import HttpRequest, HttpResponse
from django.template import engines
from django.template.response import TemplateResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import include, path
from django.views.decorators.cache import cache_page
from rest_framework.decorators import api_view
from rest_framework.response import Response

from django_tasks_local_sse.access import aevents_url, cancel_token, events_url, task_links
from tests.project import tasks

WIDGET = engines["django"].from_string(
    "{% load django_tasks_local_sse %}{% task_progress result %}"
)
visits = itertools.count(1)


def enqueue() -> Any:
    return tasks.noop.using(backend="dummy").enqueue()


def without_link(request: HttpRequest) -> HttpResponse:
    return HttpResponse(f"visit {next(visits)}")


def with_events_url(request: HttpRequest) -> HttpResponse:
    return HttpResponse(events_url(request, enqueue()))


def with_cancel_token(request: HttpRequest) -> HttpResponse:
    return HttpResponse(cancel_token(request, enqueue()))


def with_bearer_links(request: HttpRequest) -> HttpResponse:
    return HttpResponse(task_links(request, enqueue(), bearer=True)["cancel_token"])


def with_widget(request: HttpRequest) -> HttpResponse:
    return TemplateResponse(request, WIDGET, {"result": enqueue()})


@api_view()
def with_rest_framework(request: Any) -> Response:
    assert not isinstance(request, HttpRequest)
    return Response(task_links(request, enqueue()))


# The decorator calls all its views "view".
with_rest_framework.__name__ = "with_rest_framework"


async def with_async_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(await aevents_url(request, enqueue()))


VIEWS = [
    with_events_url,
    with_cancel_token,
    with_bearer_links,
    with_widget,
    with_rest_framework,
    with_async_view,
]
urlpatterns = [
    path("tasks/", include("django_tasks_local_sse.urls")),
    *(path(f"page/{view.__name__}/", cache_page(60)(view)) for view in [*VIEWS, without_link]),
    *(path(f"site/{view.__name__}/", view) for view in [*VIEWS, without_link]),
]
SITE_CACHE = [
    "django.middleware.cache.UpdateCacheMiddleware",
    *settings.MIDDLEWARE,
    "django.middleware.cache.FetchFromCacheMiddleware",
]


@pytest.fixture(autouse=True)
def caches() -> Any:
    """Settings with the cache of the site, which also holds pages of cache_page()."""
    with override_settings(
        ROOT_URLCONF=__name__, CACHES={"default": {"BACKEND": LOCAL}}, MIDDLEWARE=SITE_CACHE
    ):
        cache.clear()
        yield


LOCAL = "django.core.cache.backends.locmem.LocMemCache"


def visit_twice(url: str, client_class: Any) -> set[bytes]:
    get = client_class().get
    if client_class is AsyncClient:
        get = async_to_sync(get)
    return {get(url).content for _ in range(2)}


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("kind", ["page", "site"])
def test_cached_page_hands_links_of_one_visitor_to_the_next(
    kind: str, view: Any, client_class: Any
) -> None:
    assert len(visit_twice(f"/{kind}/{view.__name__}/", client_class)) == 2
    assert len(visit_twice(f"/{kind}/without_link/", client_class)) == 1, "the cache is off"
