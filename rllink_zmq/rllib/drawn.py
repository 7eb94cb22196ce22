"""Values to try things with, drawn from spaces; and whether two of them are the same."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs


def seeded(space: gym.Space[Any], seed: int = 0) -> gym.Space[Any]:
    """A copy: sampling moves a space's random state, and this one is the user's."""
    space = copy.deepcopy(space)
    space.seed(seed)
    return space


def counted_from_0(space: gym.Space[Any]) -> gym.Space[Any]:
    """Of actions as policies have them: those of Discrete and MultiDiscrete count from 0, whatever the start."""
    if isinstance(space, gym.spaces.Discrete):
        return gym.spaces.Discrete(int(space.n))
    if isinstance(space, gym.spaces.MultiDiscrete):
        return gym.spaces.MultiDiscrete(space.nvec)
    if isinstance(space, gym.spaces.Dict):
        return gym.spaces.Dict({key: counted_from_0(inner) for key, inner in space.spaces.items()})
    if isinstance(space, gym.spaces.Tuple):
        return gym.spaces.Tuple([counted_from_0(inner) for inner in space.spaces])
    return space


def moderate(value: Any) -> Any:
    array = np.asarray(value)
    return np.clip(array, -10.0, 10.0).astype(array.dtype) if array.dtype.kind == "f" else value


def same(one: Any, other: Any) -> bool:
    """Two structures of lists, dicts, arrays and tensors."""
    mine, its = tree.flatten_with_path(one), tree.flatten_with_path(other)
    if [path for path, _ in mine] != [path for path, _ in its]:
        return False
    return all(_equal(a, b) for (_, a), (_, b) in zip(mine, its, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        one, other = one.numpy(force=True), torch.as_tensor(other).numpy(force=True)
    if isinstance(one, np.ndarray | np.generic | float | int):
        a, b = np.asarray(one), np.asarray(other)
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    return type(one) is type(other)  # what else is in a batch: episodes and such
