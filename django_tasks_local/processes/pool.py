"""Run the tasks of a ProcessPoolBackend: a Pool whose workers are processes."""

from __future__ import annotations

import threading
from contextvars import Context
from typing import TYPE_CHECKING, Any, override

from django.utils import timezone

from .. import shutdown
from ..conf import ProcessOptions
from ..identifiers import new_id
from ..pools import signals
from ..pools.base import Pool
from .child import in_worker_process
from .dispatcher import Dispatcher
from .settings import SettingsWatch, capture_settings, refuse_databases_in_memory
from .task import ProcessTask
from .wire import encode_task

if TYPE_CHECKING:
    from ..aliases import AnyTask
    from ..context import Carried
    from ..execution import Outcome
    from .settings import DjangoSettings
    from .worker_process import WorkerProcess


class ProcessPool(Pool[ProcessOptions, ProcessTask]):
    """
    Runs tasks in processes with the names `django-tasks-<alias>-<n>`.

    Its dispatcher starts a process when a task waits and no idle process can run it.
    """

    def __init__(self, sender: type, alias: str, options: ProcessOptions) -> None:
        super().__init__(sender, alias, options)
        # Guards: changes of the attributes below, so that only one thread starts the dispatcher.
        # Reentrant, because a finalizer that runs while this thread holds it may enqueue a task.
        self._dispatcher_lock = threading.RLock()
        self._dispatcher: Dispatcher | None = None
        # The settings that the workers get, and the watch that notices that they have changed.
        self._settings: DjangoSettings | None = None
        self._watch: SettingsWatch | None = None

    def workers(self) -> list[WorkerProcess]:
        """Return the worker processes, also those that are starting or ending."""
        return [] if self._dispatcher is None else self._dispatcher.workers()

    @property
    def dispatcher(self) -> Dispatcher | None:
        """Return the Dispatcher, which sends tasks to the workers; None before the first task."""
        return self._dispatcher

    @override
    def count_workers(self) -> int:
        return len(self.workers())

    @override
    def waiting_in_workers(self) -> int:
        return 0 if self._dispatcher is None else self._dispatcher.waiting_in_workers()

    @override
    def _make_record(
        self, task: AnyTask, args: list[Any], kwargs: dict[str, Any], carried: Carried | None
    ) -> ProcessTask:
        if in_worker_process():
            raise RuntimeError(
                f"Task {task.module_path} was not enqueued: a worker process cannot "
                f"enqueue tasks of a ProcessPoolBackend. Enqueue what follows a task in a receiver "
                f"of task_finished; AppConfig.ready() runs in worker processes too, where "
                f"django_tasks_local.in_worker_process() returns True."
            )
        dispatcher = self._dispatcher
        has_dispatcher = dispatcher is not None and not dispatcher.has_failed
        if dispatcher is not None and has_dispatcher:
            dispatcher.starter.raise_if_broken()
        if self._watch is None or self._watch.has_changed():
            self._update_settings()
        id, enqueued_at = new_id(), timezone.now()
        try:
            body = encode_task(id, task, args, kwargs, enqueued_at, carried)
        except Exception as error:
            raise ValueError(f"The arguments of a task must be pickleable: {error}") from error
        if not has_dispatcher:
            self._start_dispatcher()
        interval = self.options.progress_interval
        return ProcessTask(task, id, args, kwargs, self.alias, enqueued_at, interval, body, carried)

    def _update_settings(self) -> None:
        """
        Send the present settings to later workers, and replace the present workers.

        Raises ImproperlyConfigured for a database in memory, and for a setting that cannot be sent.
        """
        with self._dispatcher_lock:
            if self._watch is not None and not self._watch.has_changed():
                return  # Another thread has replaced the workers concurrently.
            watch = SettingsWatch()  # First: a change during the next lines must be noticed.
            refuse_databases_in_memory()
            settings = capture_settings()
            # A test that overrides a setting and enqueues no task leaves the settings equal.
            if self._dispatcher is not None and settings != self._settings:
                self._dispatcher.replace_workers(settings)
            # Set last: until then, other threads wait for the lock instead of giving their tasks to
            # workers that still use the former settings.
            self._settings, self._watch = settings, watch

    def _start_dispatcher(self) -> None:
        with self._dispatcher_lock:
            # Start no dispatcher if the pool is closed, or if the process shuts down and so would
            # not close it. enqueue() then refuses the task.
            present = self._dispatcher
            if present is not None and not present.has_failed:
                return
            if self.closed or not shutdown.register(self):
                return
            assert self._settings is not None
            try:
                dispatcher = Dispatcher(self, self._settings)
            except (OSError, RuntimeError) as error:
                raise RuntimeError(
                    f"The task backend {self.alias!r} cannot start the thread that starts "
                    f"its worker processes, so no task was enqueued: {error}"
                ) from error
            if self._dispatcher is present:
                self._dispatcher = dispatcher
            else:  # A finalizer that ran during Dispatcher() has set another.
                dispatcher.close()

    @override
    def _submit(self, record: ProcessTask) -> None:
        self.queue.append(record)
        dispatcher = self._dispatcher
        assert dispatcher is not None
        dispatcher.task_added()
        if dispatcher.has_failed:
            self._replace_dispatcher(record)

    def _replace_dispatcher(self, record: ProcessTask) -> None:
        """Let another dispatcher run a task that enqueue() has queued while the first one ended."""
        try:
            self._start_dispatcher()
        except RuntimeError as error:
            self.fail_waiting(record, error)
            return
        assert self._dispatcher is not None
        self._dispatcher.task_added()

    @override
    def fail_waiting(self, record: ProcessTask, error: BaseException) -> bool:
        # A task that was sent to a worker may have started although its Started has not arrived.
        while record.claim():
            if super().fail_waiting(record, error):
                return True
            # enqueue() has not published the task yet, so it is in no queue and no worker has it.
            record.unclaim()
            if record.position is None or record.is_finished:
                return False
            # Race: enqueue() published the task after super().fail_waiting() had returned. A thread
            # that found the task claimed may have dropped it, so try to fail it again.
        return False

    @override
    def _stop(self, record: ProcessTask) -> None:
        if self._dispatcher is not None:
            self._dispatcher.stop(record)

    @override
    def _send_started(self, record: ProcessTask) -> None:
        state = signals.state_of_started(record)
        if state is not None:
            record.context = Context()
            self.notifier.post(
                record.id, record.context, signals.send_started, self.sender, state, record.carried
            )

    @override
    def _send_finished(self, record: ProcessTask, outcome: Outcome) -> None:
        self._completion.post(record, outcome, record.context)

    @override
    def _close_workers(self) -> None:
        with self._dispatcher_lock:
            dispatcher = self._dispatcher
        if dispatcher is not None:
            dispatcher.close()
