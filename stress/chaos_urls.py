"""The URL configuration of the server that stress/chaos.py starts."""

from django.urls import include, path

urlpatterns = [path("tasks/", include("django_tasks_local_sse.urls"))]
