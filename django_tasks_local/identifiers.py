"""new_id() creates random ids for task results."""

from __future__ import annotations

import os
from collections import deque

from .forking import reset_in_child

BATCH = 128  # One call of os.urandom() makes this many ids.

# Masks that set the version 4 and the variant (RFC 9562, sections 4.1 and 4.2) in all ids of a
# batch at once.
_FIXED_MASK = int.from_bytes(bytes.fromhex("000000000000f000c000000000000000") * BATCH)
_FIXED_BITS = int.from_bytes(bytes.fromhex("00000000000040008000000000000000") * BATCH)

# Ids that new_id() has not returned yet. os.urandom() releases the GIL, and up to ten worker
# threads then compete for it: with one call per id, enqueue() took 112 instead of 78 µs.
_unused: deque[str] = deque()

# A child of fork() must not return the ids that its parent also returns, so it drops its copy.
reset_in_child(_unused.clear)


def new_id() -> str:
    """
    Return a random UUID of version 4 as text. May be called from any thread.

    The format is that of RFC 9562, section 5.4. The id cannot be guessed, like that of
    uuid.uuid4(), because 122 of its bits come from os.urandom().
    """
    try:
        return _unused.pop()
    except IndexError:
        first, *others = _new_batch()
        _unused.extend(others)
        return first


def _new_batch() -> list[str]:
    bits = int.from_bytes(os.urandom(16 * BATCH)) & ~_FIXED_MASK | _FIXED_BITS
    digits = bits.to_bytes(16 * BATCH).hex()
    starts = range(0, len(digits), 32)
    return [
        f"{digits[at : at + 8]}-{digits[at + 8 : at + 12]}-{digits[at + 12 : at + 16]}-"
        f"{digits[at + 16 : at + 20]}-{digits[at + 20 : at + 32]}"
        for at in starts
    ]
