"""The state of connector pieces as bytes: what RLlib keeps in dicts, lists and arrays. None of it can run code."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from rllink_zmq.errors import PolicyError

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder()


def to_bytes(state: Any) -> bytes:
    """Dicts (of any plain keys), lists, tuples, numbers, text, bytes, None and arrays. Raises `PolicyError`, which says
    where what else there is stands."""
    return _encoder.encode(_plain(state, ""))


def from_bytes(data: bytes) -> Any:
    """What `to_bytes` was given. Raises `PolicyError` for other bytes."""
    try:
        return _structured(_decoder.decode(data))
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise PolicyError(f"the connectors' state came damaged: {error}") from error


def _plain(value: Any, where: str) -> Any:
    """Containers become [kind, content]: msgpack has neither tuples nor None as a key."""
    match value:
        case None | bool() | int() | float() | str() | bytes():
            return value
        case np.generic():
            return _plain(value.item(), where)
        case np.ndarray() if value.dtype.kind in "biuf":
            little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
            return ["a", little.dtype.str, list(value.shape), little.tobytes()]
        case dict():
            return ["d", [[_plain(k, where), _plain(v, f"{where}[{k!r}]")] for k, v in value.items()]]
        case list():
            return ["l", [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]]
        case tuple():
            return ["t", [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]]
    raise PolicyError(
        f"the connectors' state{where} is a {type(value).__name__}, which can't travel with the weights: numbers, "
        f"text, arrays, and dicts, lists and tuples of them do"
    )


def _structured(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, *content = value
    if kind == "a":
        dtype, shape, data = content
        if np.dtype(dtype).kind not in "biuf":
            raise ValueError(f"an array of dtype {dtype}")
        return np.frombuffer(data, dtype).reshape(shape).copy()
    (inner,) = content
    if kind == "d":
        return {_structured(k): _structured(v) for k, v in inner}
    if kind not in ("l", "t"):
        raise ValueError(f"a container of kind {kind!r}")
    made = [_structured(v) for v in inner]
    return tuple(made) if kind == "t" else made
