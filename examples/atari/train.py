"""PPO for a game of `game.py`: a broker first, then this, then the simulators."""

import sys
from pathlib import Path

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

sys.path.append(str(Path(__file__).parent.parent))
from pixels import PixelModule
from recorded import parser, train


def config() -> PPOConfig:
    return (
        PPOConfig()
        .env_runners(num_env_runners=1)
        .training(
            train_batch_size_per_learner=2048, minibatch_size=256, num_epochs=3, lr=4e-4, gamma=0.99, lambda_=0.95,
            entropy_coeff=0.01, vf_clip_param=10.0, vf_loss_coeff=0.5, grad_clip=0.5, clip_param=0.2,
        )
        .rl_module(
            rl_module_spec=RLModuleSpec(
                module_class=PixelModule,
                model_config={
                    "conv_filters": [[16, 6, 4], [32, 3, 2], [32, 3, 2]], "head_fcnet_hiddens": [256],
                    "vf_share_layers": True,
                },
            )
        )
    )  # fmt: skip


if __name__ == "__main__":
    train(config(), parser(__doc__, minutes=10).parse_args())
