"""Gymnasium spaces <-> the protocol's spaces."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rllink_zmq.arrays import ITEM_BYTES
from rllink_zmq.errors import SpaceError
from rllink_zmq.messages import BoxSpace, DiscreteSpace, Space, Spaces


def to_wire(space: gym.Space[Any]) -> Space:
    """A Gymnasium space as it travels. Raises `SpaceError` for one that this version can't carry."""
    if isinstance(space, gym.spaces.Discrete):
        return DiscreteSpace(int(space.n), int(space.start))
    if isinstance(space, gym.spaces.Box):
        dtype = np.dtype(space.dtype)
        if dtype.str not in ITEM_BYTES:
            raise SpaceError(f"a Box of dtype {dtype}; these travel: {', '.join(ITEM_BYTES)}")
        return BoxSpace(space.shape, dtype.str, _bounds(space.low), _bounds(space.high))
    raise SpaceError(f"a {type(space).__name__} space; this version carries Box and Discrete. {_WRAP}")


_WRAP = "Wrap the environment, for example in gymnasium.wrappers.FlattenObservation."


def from_wire(space: Space) -> gym.Space[Any]:
    """The Gymnasium space of a wire space. Raises `SpaceError` when its parts don't fit each other."""
    if isinstance(space, DiscreteSpace):
        return gym.spaces.Discrete(space.n, start=space.start)
    if space.dtype not in ITEM_BYTES:
        raise SpaceError(f"a Box of dtype {space.dtype!r}; these travel: {', '.join(ITEM_BYTES)}")
    dtype = np.dtype(space.dtype)
    size = int(np.prod(space.shape, dtype=np.int64))
    if any(len(b) not in (1, size) for b in (space.low, space.high)):
        raise SpaceError(f"a Box of shape {list(space.shape)} needs 1 or {size} bounds, not {len(space.low)}")

    def bound(values: tuple[float, ...]) -> Any:
        return np.broadcast_to(np.array(values).reshape(space.shape if len(values) > 1 else ()), space.shape).astype(
            dtype
        )

    return gym.spaces.Box(bound(space.low), bound(space.high), space.shape, dtype.type)


def spaces_to_wire(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Spaces:
    """Both spaces of an environment as they travel. Raises `SpaceError`."""
    return Spaces(to_wire(observation_space), to_wire(action_space))


def _bounds(values: Any) -> tuple[float, ...]:
    flat = [float(v) for v in np.asarray(values).reshape(-1)]
    if flat and all(v == flat[0] for v in flat):
        return (flat[0],)
    return tuple(flat) if flat else (0.0,)
