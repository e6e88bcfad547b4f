"""Make frames, and split the bytes of a socket into frames. A frame is a header and a body."""

from __future__ import annotations

import struct

HEADER = struct.Struct("!Q")  # the length of the body in bytes
# The largest body in bytes. A longer length is invalid: it would make the reader wait, and buffer
# all bytes that follow. A return value of this size belongs into a file.
MAX_BODY = 1 << 30
READ_SIZE = 1 << 16  # bytes of one recv(), so that a fast worker does not delay the other workers

_unpack_header = HEADER.unpack_from
_pack_header = HEADER.pack


def frame(body: bytes) -> bytes:
    """Return the frame of a body. Raises ValueError if it is longer than MAX_BODY."""
    if len(body) > MAX_BODY:
        raise ValueError(f"A message of {len(body):,} bytes is longer than {MAX_BODY:,} bytes.")
    return _pack_header(len(body)) + body


CANCEL = frame(b"")  # asks a worker to cancel its task and to end


class FrameReader:
    """Splits the bytes that a socket receives into the bodies of frames."""

    def __init__(self) -> None:
        self._partial = bytearray()  # the beginning of a frame that is not complete
        self._wanted = HEADER.size  # the length of `_partial` at which feed() parses it

    @property
    def incomplete(self) -> int:
        """Return the number of bytes received of a frame that is not complete."""
        return len(self._partial)

    def feed(self, data: bytes) -> list[memoryview]:
        """
        Add received bytes; return the bodies of all frames that are complete now.

        In place of a frame with an invalid length and of all bytes after it, returns an empty body,
        which decode() does not accept.
        """
        stream: bytes | bytearray = data
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                # Parse a long frame once, and not again for each of its thousand pieces.
                return []
            stream, self._partial = self._partial, bytearray()
        view = memoryview(stream)
        bodies = []
        start, size = 0, len(view)
        self._wanted = HEADER.size
        while size - start >= HEADER.size:
            length = _unpack_header(view, start)[0]
            if length > MAX_BODY:
                bodies.append(view[:0])
                return bodies
            end = start + HEADER.size + length
            if size < end:
                self._wanted = end - start
                break
            bodies.append(view[start + HEADER.size : end])
            start = end
        if start < size:
            self._partial += view[start:]
        return bodies
