"""One simulator process for `bench_simulator.py`: CartPole, acting by the policy it is sent, until it is stopped.

    python simulator_client.py ours tcp://127.0.0.1:5555    # this package's client
    python simulator_client.py ours tcp://127.0.0.1:5555 CartPole-v0    # of another length
    python simulator_client.py vector tcp://127.0.0.1:5555 64    # so many environments together
    python simulator_client.py peer 5556 [torch threads]    # RLlib's own dummy client, as it ships

A script of its own, so that the process holds what a simulator's holds and nothing of the benchmark.
"""

import logging
import signal
import sys


def ours(address: str, name: str = "CartPole-v1") -> None:
    """The loop of the README."""
    import gymnasium as gym

    from rllink_zmq import connect

    logging.getLogger("rllink_zmq").setLevel(logging.ERROR)
    env = gym.make(name)
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    with connect(address, timeout=30, **spaces) as client:
        while True:
            with client.start_episode() as episode:
                observation, _ = env.reset()
                while True:
                    action = episode.get_action(observation)
                    observation, reward, terminated, truncated, _ = env.step(action)
                    episode.log_returns(reward)
                    if terminated or truncated:
                        episode.end_episode(observation, truncated=truncated)
                        break


def vector(address: str, number: int) -> None:
    """Gymnasium's own vector form of CartPole."""
    import gymnasium as gym

    from rllink_zmq import connect, drive_vector

    logging.getLogger("rllink_zmq").setLevel(logging.ERROR)
    envs = gym.make_vec("CartPole-v1", num_envs=number, vectorization_mode="vector_entry_point")
    spaces = {"observation_space": envs.single_observation_space, "action_space": envs.single_action_space}
    with connect(address, episodes=number, timeout=30, **spaces) as client:
        drive_vector(client, envs)


def peer(port: int, threads: int | None) -> None:
    """`ray.rllib`'s function, called as RLlib's example calls it."""
    from ray.rllib.examples.envs.classes.utils.dummy_external_client import _dummy_external_client

    logging.disable(logging.WARNING)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    _dummy_external_client(port)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if sys.argv[1] == "ours":
        ours(*sys.argv[2:])
    elif sys.argv[1] == "vector":
        vector(sys.argv[2], int(sys.argv[3]))
    else:
        peer(int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
