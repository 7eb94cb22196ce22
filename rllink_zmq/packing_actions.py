"""Actions of several parts, and which actions there are at all.

An action has two forms: as the policy has it (`action_packing`), and as `env.step` wants it (`env_packing`). Both are
packed alike, but for the dtype of Boxes: a policy's are float32.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rllink_zmq.errors import SpaceError
from rllink_zmq.packing import Packing, dtype_of


def action_dtype(space: gym.Space[Any]) -> np.dtype[Any]:
    """In which dtype a policy's actions of this space travel. Raises `SpaceError` for a space (none of Dict and Tuple)
    that no policy of RLlib's acts in."""
    if isinstance(space, gym.spaces.Discrete | gym.spaces.MultiDiscrete):
        return np.dtype(np.int64)
    if isinstance(space, gym.spaces.Box):
        return dtype_of(space) if np.dtype(space.dtype).kind != "f" else np.dtype(np.float32)
    if isinstance(space, gym.spaces.MultiBinary):
        raise SpaceError(
            f"actions of {space}: RLlib has no distribution for MultiBinary. MultiDiscrete([2, 2, ...]) are the same "
            f"choices"
        )
    raise SpaceError(
        f"actions of {type(space).__name__}; those of Discrete, MultiDiscrete, Box, and Dict or Tuple of these travel. "
        f"Wrap the environment in one that has such actions"
    )


def env_dtype(space: gym.Space[Any]) -> np.dtype[Any]:
    """The dtype of an action as the environment gets it: that of a Box, at least float32."""
    if isinstance(space, gym.spaces.Box) and np.dtype(space.dtype).kind == "f":
        return np.promote_types(np.float32, np.dtype(space.dtype))
    return action_dtype(space)


def action_packing(space: gym.Space[Any]) -> Packing | None:
    """How actions of this space are packed; None where they are one array anyway. Raises `SpaceError`, with the part's
    name, for what no policy acts in."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        return Packing(space, "action", action_dtype)
    action_dtype(space)
    return None


def env_packing(space: gym.Space[Any]) -> Packing | None:
    """How actions are packed as the environment wants them; None where they are one array anyway."""
    return Packing(space, "action", env_dtype) if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple) else None


def choices_of(space: gym.Space[Any]) -> tuple[int, ...]:
    """How many values each entry of a Discrete's or MultiDiscrete's action has; none of a Box's."""
    if isinstance(space, gym.spaces.Discrete):
        return (int(space.n),)
    return tuple(space.nvec.tolist()) if isinstance(space, gym.spaces.MultiDiscrete) else ()
