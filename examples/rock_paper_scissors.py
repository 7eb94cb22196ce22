"""PettingZoo's rock-paper-scissors against a frozen policy that can be beaten: it likes rock.

Start a broker and some simulators first (this directory is on their `PYTHONPATH`)::

    rllink-zmq broker
    rllink-zmq simulate --env rock_paper_scissors:together --num 4   # or :in_turn, PettingZoo's other form

then this script. A game has 15 rounds. A random player's return is 0; who always plays paper comes to 11.
"""

from __future__ import annotations

import argparse
from typing import Any

import gymnasium as gym
import numpy as np

MOVES, ROUNDS = 3, 15
SEEN = gym.spaces.Box(0.0, 1.0, (MOVES + 1,), np.float32)
"""The other one's last move, one-hot; the last entry: there was none yet."""


def together() -> Any:
    """PettingZoo's parallel form: both move at once."""
    from pettingzoo.classic import rps_v2
    from pettingzoo.utils.wrappers import BaseParallelWrapper

    class OneHot(BaseParallelWrapper):
        def observation_space(self, agent: str) -> gym.Space[Any]:
            return SEEN

        def reset(self, seed: int | None = None, options: Any = None) -> Any:
            observations, infos = self.env.reset(seed=seed, options=options)
            return one_hot(observations), infos

        def step(self, actions: Any) -> Any:
            observations, *rest = self.env.step(actions)
            return one_hot(observations), *rest

    return OneHot(rps_v2.parallel_env(max_cycles=ROUNDS))


def in_turn() -> Any:
    """PettingZoo's AEC form: one after the other, and a round is judged when both have moved."""
    from pettingzoo.classic import rps_v2
    from pettingzoo.utils.wrappers import BaseWrapper

    class OneHot(BaseWrapper):
        def observation_space(self, agent: str) -> gym.Space[Any]:
            return SEEN

        def observe(self, agent: str) -> Any:
            return one_hot({agent: self.env.observe(agent)})[agent]

    return OneHot(rps_v2.env(max_cycles=ROUNDS))


def one_hot(observations: Any) -> dict[str, Any]:
    return {agent: np.eye(MOVES + 1, dtype=np.float32)[int(move)] for agent, move in observations.items()}


def config() -> Any:
    """One policy learns, the other one is frozen."""
    import torch
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.core.rl_module.torch import TorchRLModule

    class LikesRock(TorchRLModule):
        """Rock in five of six rounds, whatever the other one does."""

        def setup(self) -> None:
            self.logits = torch.nn.Parameter(torch.tensor([2.3, 0.0, 0.0]), requires_grad=False)

        def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
            return {Columns.ACTION_DIST_INPUTS: self.logits + 0.0 * batch[Columns.OBS][:, :MOVES]}

    return (
        PPOConfig()
        .environment(
            observation_space=gym.spaces.Dict(player_0=SEEN, player_1=SEEN),
            action_space=gym.spaces.Dict(player_0=gym.spaces.Discrete(MOVES), player_1=gym.spaces.Discrete(MOVES)),
        )
        .multi_agent(
            policies={"learner", "likes_rock"},
            policies_to_train=["learner"],
            policy_mapping_fn=lambda agent, *_, **__: "learner" if agent == "player_0" else "likes_rock",
        )
        .env_runners(num_env_runners=1)
        .training(train_batch_size_per_learner=600, minibatch_size=150, num_epochs=8, lr=1e-3, gamma=0.0)
        .rl_module(
            rl_module_spec=MultiRLModuleSpec(
                rl_module_specs={
                    "learner": RLModuleSpec(model_config={"fcnet_hiddens": [32], "fcnet_activation": "tanh"}),
                    "likes_rock": RLModuleSpec(module_class=LikesRock),
                }
            )
        )
    )


def main() -> None:
    from rllink_zmq.rllib import attach

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="tcp://127.0.0.1:5556", help="the broker's backend")
    parser.add_argument("--iterations", type=int, default=30)
    args = parser.parse_args()
    algorithm = attach(config(), args.broker).build_algo()
    try:
        for _ in range(args.iterations):
            sampled = algorithm.train().get("env_runners", {})
            each = sampled.get("agent_episode_returns_mean", {})
            print(", ".join(f"{agent}: {float(r):+.1f}" for agent, r in sorted(each.items())), flush=True)
    finally:
        algorithm.stop()


if __name__ == "__main__":
    main()
