"""Send the fields of a Task to a worker process, where load_task() makes an equal Task of them."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from inspect import unwrap
from sys import modules
from typing import TYPE_CHECKING, Any

from django.tasks import Task, task_backends
from django.tasks.exceptions import InvalidTask
from django.utils.module_loading import import_string

if TYPE_CHECKING:
    from types import ModuleType

    from ..aliases import AnyTask

    type TaskOptions = tuple[Any, ...]  # the values of the fields in option_names()


# Code that a user types at a prompt, or gives to `python -c` or `manage.py shell -c`, belongs to
# one of these modules. Workers cannot import it, but they import a script that is `__main__`.
_INTERACTIVE = ("__main__", "django.core.management.commands.shell")


# Called from: the parent


def raise_if_not_importable(task: AnyTask) -> None:
    """
    Raise InvalidTask if workers cannot import the function of a task.

    This is so for a function that was defined in a shell or a notebook. Each worker would fail with
    an ImportError, after the view that has enqueued the task has returned.
    """
    name = task.func.__module__
    try:
        import_string(task.module_path)
        is_importable = name not in _INTERACTIVE or _is_in_file(task, modules[name])
    except ImportError:
        is_importable = False
    if not is_importable:
        raise InvalidTask(
            f"A worker process cannot import the function of task {task.module_path}, because the "
            f"function was defined in a shell, a notebook or a program without a file. Define it "
            f"in a module, or give the task to a ThreadPoolBackend."
        )


def _is_in_file(task: AnyTask, module: ModuleType) -> bool:
    code = getattr(unwrap(task.func), "__code__", None)
    typed = code is not None and code.co_filename.startswith("<")  # such as "<stdin>"
    return not typed and hasattr(module, "__file__")


def task_options(task: AnyTask) -> TaskOptions:
    """Return the values of the fields of a Task but `func`; `Task.using()` can change them."""
    return tuple([getattr(task, name) for name in option_names(type(task))])


_option_names: dict[type[AnyTask], tuple[str, ...]] = {}


def option_names(task_class: type[AnyTask]) -> tuple[str, ...]:
    """Return the names of the fields of a Task class but `func`. A subclass may add fields."""
    names = _option_names.get(task_class)
    if names is None:
        names = tuple(f.name for f in fields(task_class) if f.init and f.name != "func")
        _option_names[task_class] = names
    return names


# Called from: a worker process


def is_imported(path: str) -> bool:
    """Return whether this process has imported the module of the function at this dotted path."""
    return path.rpartition(".")[0] in modules


def load_task(path: str, options: TaskOptions) -> AnyTask:
    """Return the Task with the function at this dotted path and these options."""
    try:
        return _cached_task(path, options)
    except TypeError:  # A field of the project's own Task class has a value that is not hashable.
        pass
    # Outside of the `except` block, so that the TypeError is not part of the traceback of an error
    # in the task's module.
    return _make_task(path, options)


def _make_task(path: str, options: TaskOptions) -> AnyTask:
    found = import_string(path)
    if isinstance(found, Task):
        return replace(found, **dict(zip(option_names(type(found)), options, strict=True)))
    # In its module this name belongs to the function, and another name to the Task.
    alias = options[option_names(Task).index("backend")]
    task_class: type[AnyTask] = task_backends[alias].task_class
    return task_class(func=found, **dict(zip(option_names(task_class), options, strict=True)))


_cached_task = lru_cache(_make_task)
