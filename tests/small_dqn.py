"""DQN and SAC with a small network, for tests that train."""

from __future__ import annotations

from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.sac import SACConfig


def dqn(runners: int = 2, learns_from: int = 100) -> DQNConfig:
    config = (
        DQNConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=runners, sample_timeout_s=6, rollout_fragment_length=4)
        .training(num_steps_sampled_before_learning_starts=learns_from, epsilon=[(0, 1.0), (1000, 0.1)])
        .rl_module(model_config={"fcnet_hiddens": [16], "head_fcnet_hiddens": []})
    )
    config.min_sample_timesteps_per_iteration = 200
    return config


def sac(runners: int = 1) -> SACConfig:
    config = (
        SACConfig()
        .environment("Pendulum-v1")
        .env_runners(num_env_runners=runners, sample_timeout_s=6, rollout_fragment_length=8)
        .training(num_steps_sampled_before_learning_starts=100, train_batch_size_per_learner=32)
        .rl_module(model_config={"fcnet_hiddens": [16], "head_fcnet_hiddens": []})
    )
    config.min_sample_timesteps_per_iteration = 200
    return config
