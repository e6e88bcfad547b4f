"""A task backend with one stored result, whose store a test can break."""

from typing import Any, ClassVar

from django.tasks.backends.base import BaseTaskBackend
from django.tasks.exceptions import TaskResultDoesNotExist

from tests.support.waiting import AnyResult


class BrokenBackend(BaseTaskBackend):
    """get_result() raises `error` if there is one."""

    supports_get_result = True
    result: ClassVar[AnyResult | None] = None
    error: ClassVar[Exception | None] = None

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> AnyResult:
        raise NotImplementedError

    def get_result(self, result_id: str) -> AnyResult:
        if self.error is not None:
            raise self.error
        if self.result is None or self.result.id != result_id:
            raise TaskResultDoesNotExist(result_id)
        return self.result
