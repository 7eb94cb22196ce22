"""An environment that counts, so that what arrives can be told from what happened: `counting_env:Counting-v0`."""

import gymnasium as gym
import numpy as np
from fake_training import ACTIONS, OBSERVATIONS

LONGEST = 9


class Counting(gym.Env):
    """Observation (episode, step, seed). Episode k takes k + 1 steps (at most `LONGEST`); every third is truncated."""

    observation_space = OBSERVATIONS
    action_space = ACTIONS

    def __init__(self):
        self.episode = -1
        self.seed = 0
        self.at = 0

    def _observation(self):
        return np.array([self.episode, self.at, self.seed], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed = seed if seed is not None else self.seed
        self.episode += 1
        self.at = 0
        return self._observation(), {}

    def step(self, action):
        assert action in (0, 1)
        self.at += 1
        over = self.at == min(self.episode + 1, LONGEST)
        cut = self.episode % 3 == 2
        return self._observation(), float(self.at), over and not cut, over and cut, {}


class Talking(Counting):
    """Its observations are text, which doesn't travel."""

    observation_space = gym.spaces.Tuple([gym.spaces.Text(3)])


gym.register("Talking-v0", Talking)
gym.register("Counting-v0", Counting)
