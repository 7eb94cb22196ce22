"""Small environments of images. `--env image_env:Bright-v0`: which half of the picture is bright?
`--env image_env:Moving-v0`: which way has the bar gone since the last picture?"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

SPACES = (gym.spaces.Box(0.0, 1.0, (24, 24, 3), np.float32), gym.spaces.Discrete(2))


class Bright(gym.Env[NDArray[np.float32], int]):
    """Ten pictures an episode; a reward of 1 for each right answer."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = SPACES
        self._left = 0
        self._half = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 10
        return self._picture(), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        reward = float(action == self._half)
        self._left -= 1
        return self._picture(), reward, self._left == 0, False, {}

    def _picture(self) -> NDArray[np.float32]:
        self._half = int(self.np_random.integers(2))
        picture = np.zeros((24, 24, 3), np.float32)
        picture[:, 12 * self._half : 12 * self._half + 12] = 1.0
        return picture


MOVING_SPACES = (gym.spaces.Box(0.0, 1.0, (10, 10, 1), np.float32), gym.spaces.Discrete(2))


class Moving(gym.Env[NDArray[np.float32], int]):
    """Ten answers an episode; a reward of 1 for each right one. One picture alone doesn't tell: half are right then."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = MOVING_SPACES
        self._at = self._way = self._left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 11
        self._at = int(self.np_random.integers(10))
        return self._picture(), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        reward = float(action == self._way) if self._left < 11 else 0.0
        self._left -= 1
        self._way = int(self.np_random.integers(2))
        self._at = (self._at + (3 if self._way else -3)) % 10
        return self._picture(), reward, self._left == 0, False, {}

    def _picture(self) -> NDArray[np.float32]:
        picture = np.zeros((10, 10, 1), np.float32)
        picture[:, self._at] = 1.0
        return picture


gym.register("Bright-v0", Bright)
gym.register("Moving-v0", Moving)
