"""SAC on Pendulum, with its simulators behind a broker. In three terminals:

rllink-zmq broker
rllink-zmq simulate --env Pendulum-v1 --num 2
python examples/train_sac.py
"""

from __future__ import annotations

import argparse

from ray.rllib.algorithms.sac import SACConfig

from rllink_zmq.rllib import attach


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--broker", default="tcp://127.0.0.1:5556", help="the broker's backend")
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()

    config = (
        SACConfig()
        .environment("Pendulum-v1")
        .env_runners(num_env_runners=1, rollout_fragment_length=4)  # an update for every four steps
        .training(
            actor_lr=2e-3,
            critic_lr=2e-3,
            alpha_lr=2e-3,
            train_batch_size_per_learner=128,
            tau=0.01,
            gamma=0.97,
            num_steps_sampled_before_learning_starts=500,
        )
        .rl_module(model_config={"fcnet_hiddens": [64], "head_fcnet_hiddens": [64]})
    )
    config.min_sample_timesteps_per_iteration = 500
    attach(config, options.broker)

    algorithm = config.build_algo()
    try:
        for i in range(options.iterations):
            result = algorithm.train()
            mine = result["env_runners"]
            print(
                f"iteration {i + 1:3}  steps {mine['num_env_steps_sampled_lifetime']:,.0f}"
                f"  return {mine.get('episode_return_mean', float('nan')):.0f}"
                f"  {result['rllink']['simulators']} simulators",
                flush=True,
            )
    finally:
        algorithm.stop()


if __name__ == "__main__":
    main()
