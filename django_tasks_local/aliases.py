"""Type aliases that several modules use. Imports nothing of this package."""

from typing import Any

from django.tasks import Task, TaskResult

type AnyTask = Task[Any, Any]
type AnyResult = TaskResult[Any, Any]
type Number = int | float
type TaskKey = tuple[str, str]  # the backend's alias and the result's id
