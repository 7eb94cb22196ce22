"""Arrays on the wire: an ndarray is (name, dtype, shape) in the header and its bytes in the body.

The dtypes below are all there are. Bytes are little endian, C order. Nothing here can run code: an object array
is refused in both directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import MAX_BODY_BYTES, Column

Array = npt.NDArray[np.generic]
Buffer = bytes | bytearray | memoryview

ITEM_BYTES: dict[str, int] = {
    "|b1": 1, "|i1": 1, "|u1": 1, "<i2": 2, "<u2": 2, "<i4": 4, "<u4": 4, "<i8": 8, "<u8": 8,
    "<f2": 2, "<f4": 4, "<f8": 8,
}  # fmt: skip
"""NumPy's name of each dtype that may travel -> bytes of one item."""


def column_of(name: str, array: Array) -> Column:
    """The header's entry for `array`. Raises `ProtocolError` for a dtype that doesn't travel."""
    dtype = array.dtype.str
    if dtype not in ITEM_BYTES:
        raise ProtocolError(f"array '{name}' has dtype {array.dtype}; these travel: {', '.join(ITEM_BYTES)}")
    return Column(name, dtype, array.shape)


def column_bytes(column: Column) -> int:
    """Bytes of one column. Raises `ProtocolError` for an unknown dtype or more than `MAX_BODY_BYTES`."""
    size = ITEM_BYTES.get(column.dtype, 0)
    if not size:
        raise ProtocolError(f"column '{column.name}' has dtype {column.dtype!r}; known: {', '.join(ITEM_BYTES)}")
    for n in column.shape:
        size *= n
    if size > MAX_BODY_BYTES or (not size and _claimed(column) > MAX_BODY_BYTES):
        text = f"column '{column.name}' of shape {list(column.shape)} is over the limit of {MAX_BODY_BYTES} bytes"
        raise ProtocolError(text, "too_large")
    return size


def _claimed(column: Column) -> int:
    """Bytes but for the dimensions of length 0. NumPy refuses what this doesn't, though the array has no bytes."""
    return ITEM_BYTES[column.dtype] * math.prod(n for n in column.shape if n)


def to_buffers(arrays: Mapping[str, Array]) -> tuple[tuple[Column, ...], list[memoryview]]:
    """Columns and one buffer each, in the mapping's order. Copies only what is not C-contiguous."""
    columns = []
    buffers = []
    for name, array in arrays.items():
        columns.append(column_of(name, array))
        flat = np.ascontiguousarray(array).reshape(-1)
        buffers.append(flat.view(np.uint8).data if flat.size else memoryview(b""))
    return tuple(columns), buffers


def from_body(columns: Iterable[Column], body: Sequence[Buffer]) -> dict[str, Array]:
    """The arrays of a body. Where the frames are cut carries no meaning: they count as one run of bytes.

    Arrays are views into `body` (read-only where it is) unless their bytes lie in several frames or are not aligned.
    Raises `ProtocolError` when the columns don't add up to the body, for an unknown dtype and for two columns of one
    name.
    """
    columns = tuple(columns)
    sizes = [column_bytes(c) for c in columns]
    total = sum(len(b) for b in body)
    if sum(sizes) != total:
        raise ProtocolError(f"the header's columns claim {sum(sizes)} bytes, the body has {total}")
    if len(body) == len(columns) and all(len(b) == n for b, n in zip(body, sizes, strict=True)):
        views = [memoryview(b) for b in body]
    else:
        joined = memoryview(body[0] if len(body) == 1 else b"".join(body))
        views, at = [], 0
        for n in sizes:
            views.append(joined[at : at + n])
            at += n
    arrays: dict[str, Array] = {}
    for column, view in zip(columns, views, strict=True):
        if column.name in arrays:
            raise ProtocolError(f"two columns are called '{column.name}'")
        array: Array = np.frombuffer(view, dtype=column.dtype).reshape(column.shape)
        arrays[column.name] = array if array.flags.aligned else array.copy()
    return arrays
