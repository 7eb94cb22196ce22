"""Actions that aren't always allowed: observations of two parts, and RLlib's own module for action masks.

The simulator's side, from this directory, on a host without ray::

    rllink-zmq broker
    rllink-zmq simulate --env action_masking:Auction-v0 --num 8

with ``--inference remote`` too, if the policy is not to run there. The learner's side: ``python action_masking.py``.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np

LOTS = 6


class Auction(gym.Env[dict[str, Any], int]):
    """Ten times: of six lots, take the most valuable one that is for sale. The reward is its value.

    Observations: `observations` (6,) float32, the lots' values from 0 to 1; `action_mask` (6,) float32, 1 where a lot
    is for sale. A lot that is not raises ValueError: a policy that keeps the mask never sees that.
    """

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Dict(
            {
                "action_mask": gym.spaces.Box(0.0, 1.0, (LOTS,), np.float32),
                "observations": gym.spaces.Box(0.0, 1.0, (LOTS,), np.float32),
            }
        )
        self.action_space = gym.spaces.Discrete(LOTS)
        self._for_sale = self._values = np.zeros(LOTS, np.float32)
        self._left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        self._left = 10
        return self._offer(), {}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        if not self._for_sale[action]:
            raise ValueError(f"lot {action} is not for sale, the mask was {self._for_sale.tolist()}")
        reward = float(self._values[action])
        self._left -= 1
        return self._offer(), reward, not self._left, False, {}

    def _offer(self) -> dict[str, Any]:
        self._values = self.np_random.random(LOTS, np.float32)
        self._for_sale = self.np_random.integers(2, size=LOTS).astype(np.float32)
        self._for_sale[self.np_random.integers(LOTS)] = 1.0
        return {"action_mask": self._for_sale, "observations": self._values}


gym.register("Auction-v0", Auction)


def main() -> None:
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule

    from rllink_zmq.rllib import attach

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="tcp://127.0.0.1:5556", help="the broker's backend")
    parser.add_argument("--runners", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=20)
    args = parser.parse_args()
    env = Auction()
    config = (
        PPOConfig()
        .environment(observation_space=env.observation_space, action_space=env.action_space)
        .env_runners(num_env_runners=args.runners)
        .training(train_batch_size_per_learner=1000, minibatch_size=125, num_epochs=8, lr=1e-3)
        .training(gamma=0.5, use_kl_loss=False)  # an offer has nothing to do with the ones before
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=ActionMaskingTorchRLModule, model_config={"head_fcnet_hiddens": [32]}
            )
        )
    )
    algorithm = attach(config, args.broker).build_algo()
    try:
        for _ in range(args.iterations):
            result = algorithm.train()
            mean = result.get("env_runners", {}).get("episode_return_mean", float("nan"))
            print(f"iteration {result['training_iteration']}: return {mean:.2f}", flush=True)
    finally:
        algorithm.stop()


if __name__ == "__main__":
    main()
