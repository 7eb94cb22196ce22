"""Bodies of fragments as one zstd frame, for simulators that ask for it.

Whoever unpacks one knows its size from the columns before it looks at a byte, and gives it no more memory than that. A
frame's own header is no bound: it is what a stranger says.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal, TypeAlias

from rllink_zmq.arrays import Array, Buffer, from_body
from rllink_zmq.errors import ProtocolError, SettingsError
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.wire import check_columns

if TYPE_CHECKING:
    from backports import zstd

Compression: TypeAlias = Literal["zstd"]

LEVEL = 1
"""zstd's. Of frames of Atari games level 3 makes a twentieth less, for a third more CPU time."""


def check_compression(compression: str | None) -> None:
    """Raises SettingsError for one that is not known, or that this host can't do."""
    if compression not in (None, "zstd"):
        raise SettingsError(f"expected compression 'zstd' or None, got {compression!r}")
    if compression is not None:
        try:
            _compressor()
        except ImportError:
            raise SettingsError(
                "compression='zstd' needs the package backports.zstd here (part of Python itself from 3.14 on): "
                "pip install 'rllink-zmq[zstd]'"
            ) from None


def compress(body: Sequence[Buffer]) -> bytes | None:
    """The body as one zstd frame, or None if that is not smaller."""
    whole = body[0] if len(body) == 1 else b"".join(body)
    compressor = _compressor()
    # In one call: so the frame's header has the size of what is in it, and another thread can't come between.
    packed = compressor.compress(whole, compressor.FLUSH_FRAME)
    return packed if len(packed) < len(whole) else None


def decompress(body: Sequence[Buffer], size: int) -> bytes:
    """What a body of one zstd frame holds, which must be `size` bytes. Raises `ProtocolError` for anything else."""
    try:
        zstd = _zstd()
    except ImportError:
        raise ProtocolError(
            "its body is compressed with zstd, and this host lacks the package backports.zstd: pip install "
            "'rllink-zmq[train]'"
        ) from None
    packed = body[0] if len(body) == 1 else b"".join(body)
    try:
        said = zstd.get_frame_info(packed).decompressed_size
        if said != size:
            raise ProtocolError(f"the header's columns claim {size} bytes, its body's zstd frame says {said}")
        decompressor = zstd.ZstdDecompressor()
        found: bytes = decompressor.decompress(packed, max_length=size + 1)
    except zstd.ZstdError as e:
        raise ProtocolError(f"its body is no zstd frame: {e}") from None
    if len(found) != size or not decompressor.eof or decompressor.unused_data:
        raise ProtocolError(f"its body is more or less than one zstd frame of {size} bytes")
    return found


def arrays_of(message: FRAGMENT, body: Sequence[Buffer]) -> dict[str, Array]:
    """The columns of a fragment, unpacked if it is compressed. Raises `ProtocolError`."""
    if not message.compression:
        return from_body(message.columns, body)
    if message.compression != "zstd":
        raise ProtocolError(f"its body is compressed with '{message.compression}', known is 'zstd'")
    return from_body(message.columns, [decompress(body, check_columns(message))])


@cache
def _compressor() -> zstd.ZstdCompressor:
    """One for all simulators of this process: each has a megabyte of tables."""
    made: zstd.ZstdCompressor = _zstd().ZstdCompressor(level=LEVEL)
    return made


def _zstd() -> ModuleType:
    """Python's own module from 3.14 on, which backports.zstd is before. Raises ImportError."""
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
