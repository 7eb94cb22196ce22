"""Large things in pieces: weights and policies travel as separate messages of at most 512 KB, asked for by offset.

A large multipart in somebody's pipe would delay every acknowledgement behind it; pieces on request don't, and a
transfer goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Sequence

from rllink_zmq.messages import MAX_FRAME_BYTES

CHUNK_BYTES = MAX_FRAME_BYTES
OUTSTANDING = 2
"""Pieces asked for and not yet there: one on the way while one is handled."""


def chunk(data: bytes | memoryview, offset: int) -> memoryview:
    """The piece of `data` from byte `offset` on; empty past its end."""
    return memoryview(data)[offset : offset + CHUNK_BYTES]


class Download:
    """The receiving end of one transfer of `size` bytes. `moved` is the time of the last progress."""

    __slots__ = ("_asked", "data", "moved", "size")

    def __init__(self, size: int, now: float) -> None:
        self.size = size
        self.data = bytearray()
        self._asked = 0
        self.moved = now

    @property
    def done(self) -> bool:
        return len(self.data) >= self.size

    def wants(self) -> list[int]:
        """Offsets to ask for now. Each is returned once."""
        offsets = []
        while self._asked < self.size and self._asked < len(self.data) + OUTSTANDING * CHUNK_BYTES:
            offsets.append(self._asked)
            self._asked += CHUNK_BYTES
        return offsets

    def add(self, offset: int, body: Sequence[bytes | memoryview | bytearray], now: float) -> bool:
        """Append a piece. False for one that is not the next (a repeat, or a hole: ask again from `restart()`) or that
        goes past the end."""
        if offset != len(self.data) or offset + sum(map(len, body)) > self.size:
            return False
        for frame in body:
            self.data += frame
        self.moved = now
        return True

    def restart(self, now: float) -> None:
        """Forget what was asked for: the connection it was asked on is gone. What has come is kept."""
        self._asked = len(self.data)
        self.moved = now
