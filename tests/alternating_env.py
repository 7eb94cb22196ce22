"""An environment that shows nothing, and rewards another action than the last one."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

SPACES = gym.spaces.Box(0.0, 1.0, (1,), np.float32), gym.spaces.Discrete(2)
STEPS = 20


class Alternating(gym.Env[NDArray[np.float32], int]):
    """Who doesn't know what was done gets half of the rewards, at random."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = SPACES
        self._t = self._last = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._t, self._last = 0, int(self.np_random.integers(2))
        return np.zeros(1, np.float32), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        reward = float(action != self._last)
        self._t, self._last = self._t + 1, int(action)
        return np.zeros(1, np.float32), reward, self._t == STEPS, False, {}


gym.register("Alternating-v0", Alternating)
