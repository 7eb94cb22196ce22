"""Gymnasium spaces <-> the protocol's spaces."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np

from rllink_zmq.arrays import ITEM_BYTES
from rllink_zmq.errors import SpaceError
from rllink_zmq.messages import (
    MAX_BOUNDS,
    MAX_DIMENSIONS,
    MAX_SPACE_BYTES,
    BoxSpace,
    DiscreteSpace,
    Space,
    Spaces,
)

MOST = 1 << 53
"""Integers below it are the same in every language."""


def to_wire(space: gym.Space[Any]) -> Space:
    """A Gymnasium space as it travels. Raises `SpaceError` for one that this version can't carry."""
    if isinstance(space, gym.spaces.Discrete):
        n, start = int(space.n), int(space.start)
        if not -MOST <= start < MOST or n >= MOST:
            raise SpaceError(f"a Discrete of {n} values from {start} on; numbers below 2**53 travel")
        return DiscreteSpace(n, start)
    if isinstance(space, gym.spaces.Box):
        _check_box(space.shape, np.dtype(space.dtype).str)
        low, high = _bounds(space.low), _bounds(space.high)
        if max(len(low), len(high)) > MAX_BOUNDS:
            raise SpaceError(
                f"a Box with {space.low.size} bounds that differ; {MAX_BOUNDS} travel: give it one low and one high "
                f"for all entries, for example by scaling the observations"
            )
        return BoxSpace(space.shape, np.dtype(space.dtype).str, low, high)
    raise SpaceError(f"a {type(space).__name__} space; this version carries Box and Discrete. {_WRAP}")


_WRAP = "Wrap the environment, for example in gymnasium.wrappers.FlattenObservation."


def from_wire(space: Space) -> gym.Space[Any]:
    """The Gymnasium space of a wire space. Raises `SpaceError` when its parts don't fit each other.

    Bounds travel as float64: those of integers past 2**53 come rounded, the dtype's own ends exact.
    """
    if isinstance(space, DiscreteSpace):
        return gym.spaces.Discrete(space.n, start=space.start)
    _check_box(space.shape, space.dtype)
    dtype = np.dtype(space.dtype)
    size = math.prod(space.shape)
    for bounds in (space.low, space.high):
        if len(bounds) not in (1, size):
            raise SpaceError(f"a Box of shape {list(space.shape)} needs 1 or {size} bounds, not {len(bounds)}")
        if any(math.isnan(b) for b in bounds):
            raise SpaceError("a bound of a Box is NaN")
    low, high = (
        np.broadcast_to(_in_dtype(b, dtype).reshape(space.shape if len(b) > 1 else ()), space.shape)
        for b in (space.low, space.high)
    )
    try:
        return gym.spaces.Box(low, high, space.shape, dtype.type)
    except ValueError as e:
        raise SpaceError(f"a Box that Gymnasium refuses: {e}") from None


def spaces_to_wire(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Spaces:
    """Both spaces of an environment as they travel. Raises `SpaceError`."""
    return Spaces(to_wire(observation_space), to_wire(action_space))


def _check_box(shape: tuple[int, ...], dtype: str) -> None:
    """Raises `SpaceError` for a Box that can't travel, before anything of its size is made."""
    if dtype not in ITEM_BYTES:
        raise SpaceError(f"a Box of dtype {dtype}; these travel: {', '.join(ITEM_BYTES)}")
    size = ITEM_BYTES[dtype] * math.prod(n for n in shape if n)
    if len(shape) > MAX_DIMENSIONS or size > MAX_SPACE_BYTES:
        raise SpaceError(
            f"a Box of shape {list(shape)} and dtype {dtype}; at most {MAX_DIMENSIONS} dimensions and "
            f"{MAX_SPACE_BYTES} bytes travel"
        )


def _bounds(values: Any) -> tuple[float, ...]:
    """One number where all are the same."""
    flat = np.asarray(values).reshape(-1)
    if not flat.size:
        return (0.0,)
    return (float(flat[0]),) if (flat == flat[0]).all() else tuple(map(float, flat))


def _in_dtype(values: tuple[float, ...], dtype: np.dtype[Any]) -> Any:
    """Bounds as an array. What lies outside of the dtype becomes its end: float64 can't hold 2**63 - 1."""
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        lowest, highest = int(ends.min), int(ends.max)
        whole = [lowest if v <= lowest else highest if v >= highest else int(v) for v in values]
        return np.array(whole, dtype)
    with np.errstate(over="ignore"):
        return np.array(values).astype(dtype)
