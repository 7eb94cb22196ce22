"""PPO and APPO with a small network and batch, for tests that train."""

from __future__ import annotations

from typing import Any

from processes import until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.ppo import PPOConfig


def ppo(runners: int = 2, batch: int = 500) -> PPOConfig:
    return (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=runners, sample_timeout_s=6)
        .training(train_batch_size_per_learner=batch, minibatch_size=125, num_epochs=2)
        .rl_module(model_config={"fcnet_hiddens": [16]})
    )


def appo(batch: int = 250) -> APPOConfig:
    config = (
        APPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2)
        .training(train_batch_size_per_learner=batch)
        .learners(num_learners=0)
        .rl_module(model_config={"fcnet_hiddens": [16]})
    )
    config.min_time_s_per_iteration = 1
    return config


def streams(algorithm: Algorithm) -> list[dict[str, Any]]:
    """Train APPO until 1,000 steps have come and some updates were made: the results."""
    results: list[dict[str, Any]] = []

    def learned() -> bool:
        results.append(algorithm.train())
        steps = results[-1].get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0)
        return bool(steps > 1000 and results[-1]["rllink"]["version"] > 2)

    until(learned, "1,000 steps and some updates")
    return results


def only_staleness(ledger: dict[str, Any]) -> bool:
    return set(ledger["dropped"]) <= {"stale", "old_run"}
