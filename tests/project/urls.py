"""URL patterns of the tests' project: its own views, django-eventstream and this package."""

from django.urls import include, path

from . import views

urlpatterns = [
    path("", views.page, name="page"),
    path("start/<str:name>/", views.start, name="start"),
    path("run/", views.run_in_worker, name="run"),
    path("readers/", views.readers, name="readers"),
    path("login/<str:username>/", views.login_as, name="login"),
    path("stream/", include("django_eventstream.urls")),
    path("publish/<str:channel>/<str:text>/", views.publish, name="publish"),
    path("tasks/", include("django_tasks_local_sse.urls")),
]
