"""The documented import path of the hub; see `pubsub`."""

from .pubsub.facade import Hub, hub

__all__ = ["Hub", "hub"]
