"""Two agents, each of which is told what the other one is to do."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.connectors.env_to_module.observation_preprocessor import MultiAgentObservationPreprocessor
from ray.rllib.env.multi_agent_env import MultiAgentEnv

AGENTS = ("a", "b")
SEES, DOES = gym.spaces.Box(-1.0, 1.0, (1,), np.float32), gym.spaces.Discrete(2)
STEPS = 20


class Secrets(MultiAgentEnv):
    """A reward of 1 for each agent and step in which it does what the other one was told; chance gives 10 of 20."""

    def __init__(self) -> None:
        super().__init__()
        self.possible_agents = self.agents = list(AGENTS)
        self.observation_spaces = dict.fromkeys(AGENTS, SEES)
        self.action_spaces = dict.fromkeys(AGENTS, DOES)
        self._random = np.random.default_rng()

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._t = 0
        return self._tell(), {}

    def _tell(self) -> dict[str, Any]:
        self._told = {agent: int(self._random.integers(2)) for agent in AGENTS}
        return {agent: np.array([2.0 * told - 1.0], np.float32) for agent, told in self._told.items()}

    def step(self, actions: dict[str, int]) -> Any:
        rewards = {agent: float(action == self._told[AGENTS[agent == "a"]]) for agent, action in actions.items()}
        self._t += 1
        over = self._t == STEPS
        return self._tell(), rewards, {"__all__": over}, {"__all__": False}, {}


class Shares(MultiAgentObservationPreprocessor):
    """Each agent sees what the other one was told."""

    def preprocess(self, observations: Any, episode: Any) -> Any:
        return {agent: observations[AGENTS[agent == "a"]] for agent in observations}
