"""Import the hub from this documented module; the package `pubsub` implements it."""

from .pubsub.facade import Hub, hub

__all__ = ["Hub", "hub"]
