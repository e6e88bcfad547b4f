"""Release the thread that Django's ASGI handler keeps for a request."""

from __future__ import annotations

from asgiref.sync import SyncToAsync, sync_to_async
from django.db import connections


async def release_request_thread() -> None:
    """
    Release the thread that Django keeps for this request, and close its database connections.

    Django's ASGI handler creates an executor with one thread for each request and keeps it until
    the response ends, up to MAX_STREAM_SECONDS here. Code that needs a thread later gets a new one
    automatically. Outside of such a request, as under Django's AsyncClient, this does nothing: the
    connections there belong to the caller.
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    if context is None or context not in SyncToAsync.context_to_thread_executor:
        return
    await sync_to_async(connections.close_all)()
    executor = SyncToAsync.context_to_thread_executor.pop(context, None)
    if executor is not None:
        executor.shutdown(wait=False)
