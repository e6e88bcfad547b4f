"""The URLs of the server in stress/chaos.py."""

from django.urls import include, path

urlpatterns = [path("tasks/", include("django_tasks_local_sse.urls"))]
