"""
The signals that are sent where a task runs: in its process, its thread and its context.

Django's task_started and task_finished are sent in the web process also for a task that runs in a
worker process. Libraries that bind a context to the current thread or contextvars.Context, such as
structlog or a tracing library, need to be called around the task's function. Both signals have the
task as `sender`, and `task_result`, whose status is RUNNING in both. An exception of a receiver is
logged, and affects neither the task nor other receivers.
"""

from django.dispatch import Signal

task_prerun = Signal()
task_postrun = Signal()
