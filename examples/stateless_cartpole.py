"""CartPole whose velocities are hidden: a policy without a memory can't balance it for long, a recurrent one can.

As RLlib's example environment of this name, and cut at 500 steps. Importing this module registers it, so that a
simulator host needs this file on its `PYTHONPATH` and no Ray::

    rllink-zmq simulate --env stateless_cartpole:StatelessCartPole-v0 --num 16
"""

from typing import Any

import gymnasium as gym
import numpy as np

ID = "StatelessCartPole-v0"
SEEN = [0, 2]
"""Of CartPole's observation: the cart's position and the pole's angle."""


def make(**options: Any) -> gym.Env[Any, Any]:
    """Observations of float32[2]."""
    env = gym.make("CartPole-v1", **options)
    whole = env.observation_space
    seen = gym.spaces.Box(whole.low[SEEN], whole.high[SEEN], dtype=np.float32)
    return gym.wrappers.TransformObservation(env, lambda observation: observation[SEEN], seen)


if ID not in gym.registry:
    gym.register(ID, entry_point=make)
