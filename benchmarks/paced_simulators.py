"""CartPole simulators for `bench_iteration.py` that take their steps by the clock, as real ones do.

    python paced_simulators.py tcp://127.0.0.1:5555 100 60    # so many, so many steps a second each

Each has a connection and an episode of its own. One whose room is used up misses its turn. They run at a lower
priority: on a machine that they share with the learner they stand for hosts of their own.
"""

import logging
import os
import signal
import sys
import time
from typing import Any


def main(address: str, number: int, rate: float) -> None:
    """Until SIGTERM."""
    import gymnasium as gym

    from rllink_zmq import connect
    from rllink_zmq.client import Client

    logging.getLogger("rllink_zmq").setLevel(logging.ERROR)
    os.nice(19)
    envs = [gym.make("CartPole-v1") for _ in range(number)]
    spaces = {"observation_space": envs[0].observation_space, "action_space": envs[0].action_space}
    clients: list[Client] = [connect(address, timeout=60, **spaces) for _ in envs]
    episodes = [client.start_episode() for client in clients]
    observations: list[Any] = [env.reset(seed=i)[0] for i, env in enumerate(envs)]
    due = time.monotonic()
    while True:
        for i, episode in enumerate(episodes):
            if not clients[i].ready or not episode.can_act(observations[i]):
                continue
            observation, reward, terminated, truncated, _ = envs[i].step(episode.get_action(observations[i]))
            episode.log_returns(float(reward))
            if terminated or truncated:
                episode.end_episode(observation, truncated=truncated)
                observation, _ = envs[i].reset()
                episodes[i] = clients[i].start_episode()
            observations[i] = observation
        due = max(due + 1 / rate, time.monotonic())
        time.sleep(max(0.0, due - time.monotonic()))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
