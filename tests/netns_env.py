"""An environment with observations of 16 KB: 128 steps make a fragment of 2 MB. `--env netns_env:Wide-v0`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

WIDTH = 4096


class Wide(gym.Env[NDArray[np.float32], int]):
    """Noise, 128 steps an episode."""

    observation_space = gym.spaces.Box(-10.0, 10.0, (WIDTH,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 128
        return self._noise(), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self._left -= 1
        return self._noise(), float(action), self._left == 0, False, {}

    def _noise(self) -> NDArray[np.float32]:
        return self.np_random.random(WIDTH, np.float32)


gym.register("Wide-v0", Wide)
