"""DQN and SAC with a small network, for tests that train."""

from __future__ import annotations

from typing import Any

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


def several(config: Any = None, runners: int = 1) -> Any:
    """MultiAgentCartPole, two agents with a policy each; DQN by default."""
    from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole

    config = config or dqn(runners)
    buffer = {"type": "MultiAgentPrioritizedEpisodeReplayBuffer", "capacity": 10_000, "alpha": 0.6, "beta": 0.4}
    return (
        config.environment(MultiAgentCartPole, env_config={"num_agents": 2})
        .multi_agent(policies={"pole_0", "pole_1"}, policy_mapping_fn=lambda agent, *_, **__: f"pole_{agent}")
        .training(replay_buffer_config=buffer)
    )
