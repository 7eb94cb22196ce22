"""An environment in which an episode's first observation alone tells what to do."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

STEPS = 30
SPACES = gym.spaces.Box(-1.0, 1.0, (2,), np.float32), gym.spaces.Discrete(2)


class Cue(gym.Env[np.ndarray[Any, Any], int]):
    """A reward of 1 for the action that the first observation named; chance gives 15 of 30."""

    observation_space, action_space = SPACES

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._wanted, self._t = int(self.np_random.integers(2)), 0
        return np.array([2.0 * self._wanted - 1.0, 0.0], np.float32), {}

    def step(self, action: int) -> Any:
        self._t += 1
        return np.array([0.0, self._t / STEPS], np.float32), float(action == self._wanted), self._t == STEPS, False, {}


gym.register("Cue-v0", Cue)
