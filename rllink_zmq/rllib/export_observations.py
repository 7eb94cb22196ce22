"""Observations as the graph takes them, to trace and to try it with."""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import gymnasium as gym
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from rllink_zmq.errors import PolicyError, SpaceError
from rllink_zmq.packing import packing_of
from rllink_zmq.policy import Tensor

Observed: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
"""(B, *shape) observations; of packed ones each part."""


class Example:
    """Observations to trace and to try with."""

    def __init__(self, module: str, space: gym.Space[Any]) -> None:
        one_array = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
        try:
            self.packing = packing_of(space)
            if self.packing is None and not isinstance(space, one_array):
                raise SpaceError(f"{type(space).__name__} is none of Box, Discrete, MultiDiscrete, MultiBinary")
            self.parts = self.packing.tensors if self.packing else ()
            if self.packing:
                self.tensor = Tensor("uint8", (self.packing.nbytes,))
            else:
                # RLlib's NumpyToTensor (convert_to_torch_tensor): every float but float16 becomes float32.
                dtype = np.dtype(space.dtype)
                if dtype.kind == "f" and dtype != np.float16:
                    dtype = np.dtype(np.float32)
                self.tensor = msgspec.convert((dtype.name, space.shape or ()), Tensor)
        except (SpaceError, msgspec.ValidationError) as error:
            raise PolicyError(f"{module}: observations of {space} can't travel: {error}") from error
        # A copy: sampling moves a space's random state, and this one is the user's.
        self._space = copy.deepcopy(space)
        self._space.seed(0)

    def rows(self, count: int) -> NDArray[Any]:
        """(count, *shape) observations of moderate size: samples of a huge Box would overflow any network."""
        samples = [self._space.sample() for _ in range(count)]
        if self.packing is not None:
            return np.stack([self.packing.pack(sample, _moderate) for sample in samples])
        return np.stack([_moderate(sample, "", self.tensor.shape, np.dtype(self.tensor.dtype)) for sample in samples])

    def given(self, rows: NDArray[Any]) -> Observed:
        """Rows as the graph takes them."""
        if self.packing is None:
            return torch.from_numpy(rows)
        return tuple(torch.from_numpy(array) for array in self.packing.arrays(rows))


def _moderate(value: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    array = np.asarray(value)
    return (np.clip(array, -10.0, 10.0) if array.dtype.kind == "f" else array).astype(dtype)
