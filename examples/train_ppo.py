"""A plain RLlib script that trains from simulators: one line is different, `attach(config, broker)`.

Start a broker and some simulators first, on this host or on others::

    rllink-zmq broker
    rllink-zmq simulate --env CartPole-v1 --num 16

then this script: ``python examples/train_ppo.py --stop-return 450``.
"""

import argparse

from ray.rllib.algorithms.ppo import PPOConfig

from rllink_zmq.rllib import attach

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--broker", default="tcp://127.0.0.1:5556", help="the broker's backend")
parser.add_argument("--env", default="CartPole-v1")
parser.add_argument("--runners", type=int, default=2)
parser.add_argument("--stop-return", type=float, default=450.0)
parser.add_argument("--iterations", type=int, default=300)


def main() -> None:
    args = parser.parse_args()
    config = (
        PPOConfig()
        .environment(args.env)  # for its spaces alone: nobody steps it here
        .env_runners(num_env_runners=args.runners)
        .training(train_batch_size_per_learner=2000, minibatch_size=256, num_epochs=6, lr=3e-4, vf_loss_coeff=0.01)
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"})
    )
    attach(config, args.broker)

    algorithm = config.build_algo()
    try:
        for _ in range(args.iterations):
            result = algorithm.train()
            sampled = result.get("env_runners", {})
            mean = sampled.get("episode_return_mean", float("nan"))
            print(
                f"iteration {result['training_iteration']}: return {mean:.1f}, "
                f"{result['rllink']['simulators']} simulators, weights version {result['rllink']['version']}",
                flush=True,
            )
            if mean >= args.stop_return:
                break
    finally:
        algorithm.stop()


if __name__ == "__main__":
    main()
