"""PPO with a small network and batch, for tests that train."""

from __future__ import annotations

from typing import Any

from ray.rllib.algorithms.ppo import PPOConfig


def ppo(runners: int = 2, batch: int = 500) -> PPOConfig:
    return (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=runners, sample_timeout_s=6)
        .training(train_batch_size_per_learner=batch, minibatch_size=125, num_epochs=2)
        .rl_module(model_config={"fcnet_hiddens": [16]})
    )


def only_staleness(ledger: dict[str, Any]) -> bool:
    return set(ledger["dropped"]) <= {"stale", "old_run"}
