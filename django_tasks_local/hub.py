"""
This documented module has the hub; the package `pubsub` implements it.

`from django_tasks_local import hub` returns the object `hub` and not this module: an import of a
submodule stores it as an attribute of its package, but only the first one, and `__init__.py` makes
the first import of this module before it binds the name.
"""

from .pubsub.facade import Hub, hub

__all__ = ["Hub", "hub"]
