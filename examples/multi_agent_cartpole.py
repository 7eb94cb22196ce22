"""Several agents, a policy for each: RLlib's MultiAgentCartPole, whose agents each balance a pole of their own.

Start a broker and some simulators first (this directory is on their `PYTHONPATH`)::

    rllink-zmq broker
    rllink-zmq simulate --env multi_agent_cartpole:make --num 8

then this script. An agent whose pole has fallen leaves the episode, which goes on until none is left.
"""

from __future__ import annotations

import argparse
from typing import Any

AGENTS = 2


def make() -> Any:
    """The environment; its agents are 0 and 1."""
    from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole

    return MultiAgentCartPole({"num_agents": AGENTS})


def config() -> Any:
    """A plain multi-agent config."""
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole

    return (
        PPOConfig()
        .environment(MultiAgentCartPole, env_config={"num_agents": AGENTS})  # for its agents' spaces alone
        .multi_agent(
            policies={f"pole_{i}" for i in range(AGENTS)},
            policy_mapping_fn=lambda agent, *_, **__: f"pole_{agent}",
        )
        .env_runners(num_env_runners=1)
        .training(train_batch_size_per_learner=1000, minibatch_size=250, num_epochs=8, lr=1e-3, vf_loss_coeff=0.01)
        .rl_module(model_config={"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"})
    )


def main() -> None:
    from rllink_zmq.rllib import attach

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--broker", default="tcp://127.0.0.1:5556", help="the broker's backend")
    parser.add_argument("--stop-return", type=float, default=600.0, help="of all agents together")
    parser.add_argument("--iterations", type=int, default=100)
    args = parser.parse_args()
    algorithm = attach(config(), args.broker).build_algo()
    try:
        for _ in range(args.iterations):
            sampled = algorithm.train().get("env_runners", {})
            mean = sampled.get("episode_return_mean", float("nan"))
            each = {agent: round(float(r)) for agent, r in sampled.get("agent_episode_returns_mean", {}).items()}
            print(f"return {mean:.1f}, of each agent {each}", flush=True)
            if mean >= args.stop_return:
                break
    finally:
        algorithm.stop()


if __name__ == "__main__":
    main()
