"""Context variables that OPTIONS["CONTEXT"] carries into tasks, and tasks that return them."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from django.tasks import task
from django.utils import translation

request_id: ContextVar[Any] = ContextVar("request_id")
tenant: ContextVar[str | None] = ContextVar("tenant", default=None)


class Tenant:
    """Carries the tenant, as a project does that has a schema for each."""

    def capture(self) -> str | None:
        """Return the tenant. Raises LookupError for the one that does not exist."""
        if tenant.get() == "unknown":
            raise LookupError("no such tenant")
        return tenant.get()

    @contextmanager
    def restore(self, value: str | None) -> Iterator[None]:
        """Set the tenant. Raises LookupError for one that was deleted after enqueue()."""
        if value == "deleted":
            raise LookupError("the tenant was deleted")
        token = tenant.set(value)
        try:
            yield
        finally:
            tenant.reset(token)


class NotACarrier:
    """Has no method capture(), so OPTIONS["CONTEXT"] must not name it."""


def _values() -> list[Any]:
    return [request_id.get("none"), tenant.get(), translation.get_language()]


@task
def read_context() -> list[Any]:
    """Return the values in a sync task."""
    return _values()


@task
async def read_context_async() -> list[Any]:
    """Return the values in a coroutine."""
    return _values()
