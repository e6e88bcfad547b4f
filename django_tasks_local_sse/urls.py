"""The URLs of the views; use `path("tasks/", include("django_tasks_local_sse.urls"))`."""

from django.urls import path

from . import views

app_name = "django_tasks_local_sse"

urlpatterns = [
    path("events/", views.events, name="events"),
    path("status/", views.status, name="status"),
    path("cancel/", views.cancel, name="cancel"),
]
