"""A player in Doom that asks for what to do: ViZDoom's engine runs its own loop, and this script is a part of it.

With a broker and `train.py` it learns; without, it can be compared with chance::

    python simulate.py --seed 1
    python simulate.py --policy random --episodes 100
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import statistics
from contextlib import closing, suppress

import numpy as np
from doom import OBSERVATIONS, Doom

from rllink_zmq import connect

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--broker", default="tcp://127.0.0.1:5555", help="the broker's frontend")
parser.add_argument("--scenario", default="defend_the_center", help="one of those that ViZDoom brings")
parser.add_argument("--policy", choices=["learned", "random"], default="learned")
parser.add_argument("--episodes", type=int, help="of each; without it until Ctrl-C")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--window", action="store_true", help="show what the player sees")
parser.add_argument("--compression", choices=["zstd"], help="of what is sent (needs rllink-zmq[zstd])")


def learned(args: argparse.Namespace) -> None:
    """The player is told what to do, and tells what came of it."""
    rounds = itertools.count() if args.episodes is None else range(args.episodes)
    with (
        closing(Doom(args.scenario, args.seed, window=args.window)) as doom,
        connect(
            args.broker, observation_space=OBSERVATIONS, action_space=doom.actions, timeout=None,
            compression=args.compression,
        ) as client,
        suppress(KeyboardInterrupt),
    ):  # fmt: skip
        for _ in rounds:
            with client.start_episode() as episode:
                doom.begin()
                while not doom.over:
                    button = episode.get_action(doom.see())
                    episode.log_returns(doom.press(int(button)))
                episode.end_episode(doom.see(), truncated=doom.out_of_time)


def at_random(args: argparse.Namespace) -> None:
    """The returns to compare with, as a line of JSON."""
    doom, rng = Doom(args.scenario, args.seed, window=args.window), np.random.default_rng(args.seed)
    returns = []
    for _ in range(args.episodes or 50):
        doom.begin()
        total = 0.0
        while not doom.over:
            total += doom.press(int(rng.integers(doom.actions.n)))
        returns.append(total)
    doom.close()
    print(json.dumps({"name": "random", "episodes": len(returns), "return_mean": statistics.fmean(returns)}))


def main() -> None:
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.policy == "learned":
        learned(args)
    else:
        at_random(args)


if __name__ == "__main__":
    main()
