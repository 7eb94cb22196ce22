"""Observations and actions of several parts (Dict, Tuple) as one row of bytes: a fragment has one column of each in any
case.

The parts stand back to back in the space's order (a Dict's by name), each in C order, little endian: as
`docs/protocol.md` says under "Packed observations" and "Packed actions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import msgspec
import numpy as np
from numpy.typing import NDArray

from rllink_zmq.arrays import ITEM_BYTES, Array
from rllink_zmq.errors import SpaceError
from rllink_zmq.policy import Tensor, split_rows

Cast = Callable[[Any, str, tuple[int, ...], np.dtype[Any]], Array]
"""(value, what it is, shape, dtype) -> an array like that. Raises for what doesn't fit."""


class Part(NamedTuple):
    """One array of an observation: where it stands in the structure (`keys`), its space, its bytes (`at` .. `end`).
    `name`: for messages: `obs['camera'][0]`."""

    name: str
    keys: tuple[str | int, ...]
    space: gym.Space[Any]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    at: int
    end: int


def dtype_of(space: gym.Space[Any]) -> np.dtype[Any]:
    """The dtype in which values of a space travel. Floats wider than float32 become float32, as RLlib does it before a
    module sees them. Raises `SpaceError` for one that doesn't travel."""
    dtype = np.dtype(space.dtype)
    if dtype == np.float64:
        dtype = np.dtype(np.float32)
    if dtype.str not in ITEM_BYTES:
        raise SpaceError(f"a space of dtype {dtype}; these travel: {', '.join(ITEM_BYTES)}")
    return dtype


class Packing:
    """How values of `space`, a Dict or Tuple, are packed. `parts`: in the order of their bytes; `nbytes`: of a
    row. `name`: what they are, for messages; `dtype`: of a part's values. Raises `SpaceError` for parts that don't
    travel."""

    def __init__(
        self,
        space: gym.spaces.Dict | gym.spaces.Tuple,
        name: str = "obs",
        dtype: Callable[[gym.Space[Any]], np.dtype[Any]] = dtype_of,
    ) -> None:
        self.space = space
        self._name = name
        self._dtype = dtype
        self.parts: list[Part] = []
        self.nbytes = 0
        self._add(space, ())

    def __eq__(self, other: object) -> bool:
        """Whether rows of one are rows of the other."""
        return isinstance(other, Packing) and self.parts == other.parts

    __hash__ = object.__hash__

    def _add(self, space: gym.Space[Any], keys: tuple[str | int, ...]) -> None:
        for key, inner in children(space):
            if isinstance(inner, gym.spaces.Dict | gym.spaces.Tuple):
                self._add(inner, (*keys, key))
                continue
            path = (*keys, key)
            name = self._name + "".join(f"[{k!r}]" for k in path)
            try:
                dtype, shape = self._dtype(inner), tuple(inner.shape or ())
            except SpaceError as error:
                raise SpaceError(f"{name}: {error}") from None
            end = self.nbytes + dtype.itemsize * math.prod(shape)
            self.parts.append(Part(name, path, inner, shape, dtype, self.nbytes, end))
            self.nbytes = end

    def pack(self, given: Any, cast: Cast) -> NDArray[np.uint8]:
        """(nbytes,) of one value. Raises what `cast` does, which is given each part's name, and `KeyError`,
        with the part's name, where one is missing."""
        row = np.empty(self.nbytes, np.uint8)
        for part in self.parts:
            array = np.ascontiguousarray(cast(_value_of(part, given), part.name, part.shape, part.dtype))
            row[part.at : part.end] = array.reshape(-1).view(np.uint8)
        return row

    def pack_rows(self, given: Any, rows: int, cast: Cast) -> NDArray[np.uint8]:
        """(rows, nbytes) of a structure of arrays of `rows` rows each, as Gymnasium's vectors have it. `cast` makes
        (rows, *shape) of each part's. Raises as `pack` does."""
        packed = np.empty((rows, self.nbytes), np.uint8)
        for part in self.parts:
            array = np.ascontiguousarray(cast(_value_of(part, given), part.name, part.shape, part.dtype))
            if array.size:
                packed[:, part.at : part.end] = array.reshape(rows, -1).view(np.uint8)
        return packed

    def join(self, structure: Any, rows: int) -> NDArray[np.uint8]:
        """The inverse of `unpack`: a structure of arrays of (n, ...) -> (n, nbytes). They are cast."""
        packed = np.empty((rows, self.nbytes), np.uint8)
        for part in self.parts:
            value = structure
            for key in part.keys:
                value = value[key]
            array = np.ascontiguousarray(value, part.dtype).reshape(rows, -1)
            packed[:, part.at : part.end] = array.view(np.uint8)
        return packed

    def arrays(self, rows: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """(n, nbytes) -> an array of (n, *shape) for each part, copied."""
        return split_rows(rows, self.tensors)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """dtype and shape of each part."""
        return tuple(msgspec.convert((part.dtype.name, part.shape), Tensor) for part in self.parts)

    def unpack(self, rows: NDArray[np.uint8]) -> Any:
        """(n, nbytes) -> the space's structure, of arrays of (n, ...): dicts and tuples."""
        return self.structure(self.arrays(rows))

    def structure(self, leaves: list[Any]) -> Any:
        """One thing for each part -> dicts and tuples of them, as the space has it."""
        rest = iter(leaves)

        def build(space: gym.Space[Any]) -> Any:
            if isinstance(space, gym.spaces.Dict):
                return {key: build(inner) for key, inner in children(space)}
            if isinstance(space, gym.spaces.Tuple):
                return tuple(build(inner) for _, inner in children(space))
            return next(rest)

        return build(self.space)


def _value_of(part: Part, given: Any) -> Any:
    """Where `part` stands in a structure. Raises `KeyError` with its name where it is missing."""
    value = given
    for key in part.keys:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise KeyError(part.name) from None
    return value


def children(space: gym.Space[Any]) -> list[tuple[str | int, gym.Space[Any]]]:
    """The spaces inside of a Dict, by name, or Tuple."""
    if isinstance(space, gym.spaces.Dict):
        inner: Mapping[str, gym.Space[Any]] = space.spaces
        return [(key, inner[key]) for key in sorted(inner)]
    assert isinstance(space, gym.spaces.Tuple)
    return list(enumerate(space.spaces))


def packing_of(space: gym.Space[Any]) -> Packing | None:
    """How observations of this space are packed; None where they are one array anyway. Raises `SpaceError`."""
    return Packing(space) if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple) else None
