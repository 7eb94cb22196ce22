"""Traffic lights that ask for what to do: SUMO runs its own loop, and this script is a part of it.

With a broker and `train.py` they learn; without, they can be compared with programs that don't::

    python simulate.py --seed 1
    python simulate.py --program fixed --episodes 20      # half a minute of green each
    python simulate.py --program longest --episodes 20    # green where more vehicles stand
    python simulate.py --program random --episodes 20
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import signal
import statistics
from collections.abc import Callable
from contextlib import closing, suppress

import numpy as np
from cross import ACTIONS, OBSERVATIONS, Crossing
from numpy.typing import NDArray

from rllink_zmq import connect

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--broker", default="tcp://127.0.0.1:5555", help="the broker's frontend")
parser.add_argument("--program", choices=["learned", "fixed", "longest", "random"], default="learned")
parser.add_argument("--episodes", type=int, help="of each; without it until Ctrl-C")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--traci", action="store_true", help="SUMO as a process of its own, over TraCI, not as a library")
parser.add_argument("--gui", action="store_true", help="the same, and with its window")


def crossing_of(args: argparse.Namespace) -> Crossing:
    if args.traci or args.gui:
        command = importlib.import_module("sumolib").checkBinary("sumo-gui" if args.gui else "sumo")
        return Crossing(importlib.import_module("traci"), command)
    return Crossing(importlib.import_module("libsumo"))


def learned(args: argparse.Namespace) -> None:
    """The lights are told what to do, and tell what came of it."""
    rounds = itertools.count() if args.episodes is None else range(args.episodes)
    with (
        closing(crossing_of(args)) as crossing,
        connect(args.broker, observation_space=OBSERVATIONS, action_space=ACTIONS, timeout=None) as client,
        suppress(KeyboardInterrupt),
    ):
        for i in rounds:
            with client.start_episode() as episode:
                crossing.begin(args.seed + i)
                while not crossing.over:
                    green = episode.get_action(crossing.observe())
                    episode.log_returns(-crossing.run(int(green)))
                episode.end_episode(crossing.observe(), truncated=True)


def unlearned(args: argparse.Namespace) -> None:
    """The same traffic with lights that never learn: the returns to compare with, as a line of JSON."""
    crossing, rng = crossing_of(args), np.random.default_rng(args.seed)
    programs: dict[str, Callable[[NDArray[np.float32]], int]] = {
        "random": lambda seen: int(rng.integers(2)),
        "fixed": lambda seen: crossing.time // 30 % 2,
        "longest": lambda seen: int(seen[[2, 3, 6, 7]].sum() > seen[[0, 1, 4, 5]].sum()),
    }
    choose, returns = programs[args.program], []
    for i in range(args.episodes or 20):
        crossing.begin(args.seed + i)
        total = 0.0
        while not crossing.over:
            total -= crossing.run(choose(crossing.observe()))
        returns.append(total)
    crossing.close()
    print(json.dumps({"name": args.program, "episodes": len(returns), "return_mean": statistics.fmean(returns)}))


def main() -> None:
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if args.program == "learned":
        learned(args)
    else:
        unlearned(args)


if __name__ == "__main__":
    main()
