"""PPO for HalfCheetah: a broker first, then this, then the simulators."""

import sys
from pathlib import Path

from ray.rllib.algorithms.ppo import PPOConfig

sys.path.append(str(Path(__file__).parent.parent))
from recorded import parser, train


def config() -> PPOConfig:
    return (
        PPOConfig()
        .env_runners(num_env_runners=1)
        .training(
            train_batch_size_per_learner=4000, minibatch_size=250, num_epochs=8, lr=3e-4, gamma=0.99, lambda_=0.95,
            clip_param=0.2, use_kl_loss=False, vf_clip_param=1000.0, vf_loss_coeff=0.5, grad_clip=0.5,
        )
        .rl_module(
            model_config={
                "fcnet_hiddens": [64, 64], "fcnet_activation": "tanh", "vf_share_layers": False, "free_log_std": True,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    train(config(), parser(__doc__, minutes=8).parse_args())
