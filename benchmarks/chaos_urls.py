"""What the server of benchmarks/chaos.py serves."""

from django.urls import include, path

urlpatterns = [path("tasks/", include("django_tasks_local_sse.urls"))]
