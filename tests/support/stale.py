"""
Containers whose length is read too early, as a processor may do without a GIL.

Without a GIL, len() and the truth of a container order nothing: a thread that stores a flag and
then reads a length may read the length of the moment before the store, and another thread that
changes the container and then reads the flag may read the old flag. Operations that lock the
container, such as popleft(), pop() and list(), return what it contains.
"""

from collections import deque


class SeeminglyEmptyDeque[T](deque[T]):
    """A deque that has entries although its length is read as 0."""

    def __len__(self) -> int:
        return 0


class SeeminglyEmptyDict[K, V](dict[K, V]):
    """A dict that has entries although its length is read as 0."""

    def __len__(self) -> int:
        return 0


class SeeminglyFilledDict[K, V](dict[K, V]):
    """A dict whose length is read as 1 although its last entry was removed."""

    def __len__(self) -> int:
        return super().__len__() or 1


class SeeminglyFilledDeque[T](deque[T]):
    """A deque whose length is read as 1 although its last entry was taken."""

    def __len__(self) -> int:
        return super().__len__() or 1
