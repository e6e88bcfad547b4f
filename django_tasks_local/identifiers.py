"""Random ids for task results."""

from __future__ import annotations

import os
from collections import deque

from .forking import reset_in_child

BATCH = 128  # ids; one call of os.urandom() for each batch

# The bits of version 4 and of the variant (RFC 9562, sections 4.1 and 4.2), for a whole batch.
_FIXED_MASK = int.from_bytes(bytes.fromhex("000000000000f000c000000000000000") * BATCH)
_FIXED_BITS = int.from_bytes(bytes.fromhex("00000000000040008000000000000000") * BATCH)

# Ids that have not been used. os.urandom() releases the GIL, and up to ten waiting worker threads
# take it: with one call per id, enqueue() cost 112 instead of 78 µs.
_unused: deque[str] = deque()

# A child of fork() must not create the ids that its parent creates.
reset_in_child(_unused.clear)


def new_id() -> str:
    """
    Return a random UUID of version 4 as text. May be called from any thread.

    Source: RFC 9562, section 5.4. Unguessable, as uuid.uuid4() is: 122 bits of os.urandom().
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
