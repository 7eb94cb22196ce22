"""The learner's side without learning: a runner whose `sample()` is called in this process, and its trainer.

Imports ray and torch: for the processes that are the learner's side, and no other.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

CARTPOLE = gym.spaces.Box(float("-inf"), float("inf"), (4,), np.float32), gym.spaces.Discrete(2)
"""The spaces as RLlib's example of an external environment has them."""


def ppo(batch: int) -> PPOConfig:
    """PPO with RLlib's default network, 256x256: what RLlib's example of an external environment trains."""
    config = (
        PPOConfig()
        .environment(observation_space=CARTPOLE[0], action_space=CARTPOLE[1])
        .env_runners(num_env_runners=0)
        .rl_module(model_config=DefaultModelConfig(vf_share_layers=True))
    )
    return config.training(train_batch_size_per_learner=batch)


def balancing(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of `ppo()`'s network, changed so that it balances the pole: one unit of each layer carries a linear
    controller, and the action follows it alone. Episodes are 500 steps long, as they are at the end of training."""
    changed = {name: np.array(value) for name, value in state.items()}
    first, second = sorted(n for n in changed if n.startswith("encoder.") and n.endswith("weight"))[:2]
    for layer in (first, second):
        changed[layer][0] = 0.0
        changed[layer.replace("weight", "bias")][0] = 0.0
    changed[first][0] = 0.1 * np.array([0.05, 0.2, 1.0, 0.5], np.float32)
    changed[second][0, 0] = 1.0
    head = next(n for n in changed if n.startswith("pi.") and n.endswith("weight"))
    changed[head][:] = 0.0
    changed[head][:, 0] = -1000.0, 1000.0
    changed[head.replace("weight", "bias")][:] = 0.0
    return changed


class Versions:
    """What RLlib does after a learner update, without the learner: `offer` sets the next version of the weights."""

    def __init__(self, runners: list[Any]) -> None:
        self._runners = runners
        untrained = runners[0].module.get_state()
        self._policies = {"untrained": untrained, "balancing": balancing(untrained)}
        self.version = 0

    def offer(self, policy: str = "untrained") -> None:
        self.version += 1
        for runner in self._runners:
            runner.set_state({"rl_module": self._policies[policy], "weights_seq_no": self.version})


class _Runners:
    """Stands in for RLlib's `EnvRunnerGroup`, without actors: the runners are in this process."""

    _worker_manager = None

    def num_remote_env_runners(self) -> int:
        return 0

    def num_healthy_remote_env_runners(self) -> int:
        return 0


class _Learners:
    """Stands in for RLlib's `LearnerGroup`: the weights of its first runner."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def get_state(self, **_: Any) -> dict[str, Any]:
        return {"learner": {"rl_module": self._runner.module.get_state()}}


class _Algorithm:
    """Stands in for RLlib's `Algorithm`: what the trainer's side of this package asks of one."""

    def __init__(self, config: Any, runners: list[Any]) -> None:
        self.config = config
        self.env_runner_group = _Runners()
        self.eval_env_runner_group = None
        self.learner_group = _Learners(runners[0])
        self.env_runner = runners[0]


class LearnerSide:
    """The package's own `ZmqEnvRunner` and `Trainer`, joined to the broker. No Ray is started."""

    def __init__(self, backend: str, batch: int, runners: int = 1) -> None:
        from rllink_zmq.rllib import ZmqEnvRunner, attach
        from rllink_zmq.rllib.trainer import Trainer

        config = attach(ppo(batch), backend)
        self.runners = [ZmqEnvRunner(config=config, worker_index=i, num_workers=runners) for i in range(runners)]
        self.trainer = Trainer(_Algorithm(config, self.runners))  # type: ignore[arg-type]
        for runner in self.runners[1:]:
            runner.join(self.trainer.run, self.trainer.manifest)
        self.versions = Versions(self.runners)
        self.versions.offer()

    def stop(self) -> None:
        for runner in self.runners:
            runner.stop()
        self.trainer.stop()
