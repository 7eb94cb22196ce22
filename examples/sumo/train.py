"""PPO for the traffic lights of `simulate.py`: a broker first, then this, then the simulators."""

import sys
from pathlib import Path

from ray.rllib.algorithms.ppo import PPOConfig

sys.path.append(str(Path(__file__).parent.parent))
from cross import ACTIONS, OBSERVATIONS
from recorded import parser, train


def config() -> PPOConfig:
    return (
        PPOConfig()
        .environment(observation_space=OBSERVATIONS, action_space=ACTIONS)
        .env_runners(num_env_runners=1)
        .training(
            train_batch_size_per_learner=2160, minibatch_size=180, num_epochs=8, lr=5e-4, gamma=0.97, lambda_=0.95,
            entropy_coeff=0.005, vf_clip_param=1000.0, vf_loss_coeff=0.05,
        )
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"})
    )  # fmt: skip


if __name__ == "__main__":
    train(config(), parser(__doc__, minutes=5).parse_args())
