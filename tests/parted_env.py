"""An environment whose observations and actions are of several parts. A wrong action ends the simulator."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

STEPS = 10

OBSERVATIONS = Dict(
    {"goal": Discrete(3), "scene": Dict({"lamps": MultiBinary(2), "aim": Tuple((Box(-1.0, 1.0, (2,)), Discrete(2)))})}
)
ACTIONS = Dict({"pick": Discrete(3), "body": Tuple((Box(-2.0, 2.0, (1,)), MultiDiscrete([2, 2])))})


class Parted(gym.Env[Any, Any]):
    """1 for the right pick, up to 1 for the arm where the aim's first number is, 0.5 for each switch like its lamp."""

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def __init__(self) -> None:
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._steps = 0
        return self._look(), {}

    def _look(self) -> Any:
        random = self.np_random
        self._seen = {
            "goal": int(random.integers(3)),
            "scene": {
                "lamps": random.integers(0, 2, 2).astype(np.int8),
                "aim": (random.uniform(-1, 1, 2).astype(np.float32), int(random.integers(2))),
            },
        }
        return self._seen

    def step(self, action: Any) -> Any:
        assert ACTIONS.contains(action), action
        arm, switches = action["body"]
        scene = self._seen["scene"]
        reward = float(action["pick"] == self._seen["goal"])
        reward += max(0.0, 1.0 - abs(float(arm[0]) - float(scene["aim"][0][0])))
        reward += 0.5 * float((switches == scene["lamps"]).sum())
        self._steps += 1
        return self._look(), reward, False, self._steps == STEPS, {}


gym.register("Parted-v0", Parted)
