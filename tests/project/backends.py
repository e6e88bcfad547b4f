"""A task backend that does not belong to this package, for tests of what works with any backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, override

from django.tasks.backends.immediate import ImmediateBackend
from django.tasks.exceptions import TaskResultDoesNotExist

if TYPE_CHECKING:
    from django_tasks_local.aliases import AnyResult


class StoringBackend(ImmediateBackend):
    """
    Runs a task in enqueue() and stores its result.

    get_result() takes the results in `unfinished` from there, one at each call, before it returns
    the stored one: so a test decides how long a task seems to run.
    """

    supports_get_result = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        self.results: dict[str, AnyResult] = {}
        self.unfinished: list[AnyResult] = []

    @override
    def enqueue(self, task: Any, args: Any, kwargs: Any) -> AnyResult:
        result = super().enqueue(task, args, kwargs)
        self.results[result.id] = result
        return result

    @override
    def get_result(self, result_id: str) -> AnyResult:
        if self.unfinished:
            return self.unfinished.pop(0)
        try:
            return self.results[result_id]
        except KeyError:
            raise TaskResultDoesNotExist(result_id) from None
