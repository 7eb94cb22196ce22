"""What the examples' training scripts share: train for some minutes, and write down how the returns went.

    from recorded import parser, train

The file that is written has all that a plot needs (`plot.py`), and what was run to get it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllink_zmq.rllib import attach


def parser(description: str | None, *, minutes: float) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--broker", default="tcp://127.0.0.1:5556", help="the broker's backend")
    made.add_argument("--minutes", type=float, default=minutes, help="how long to train (default: %(default)s)")
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--output", type=Path, help="write what the returns were to this JSON file")
    return made


def train(config: AlgorithmConfig, args: argparse.Namespace) -> None:
    """Train `config` from the simulators at the broker. Says after each iteration where it stands."""
    # Ray's workers, too, are to find the modules of this directory.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    attach(config, args.broker)
    config.debugging(seed=args.seed)
    algorithm = config.build_algo()
    points: list[tuple[int, float, float]] = []
    started: float | None = None
    try:
        while started is None or time.monotonic() - started < 60 * args.minutes:
            result = algorithm.train()
            now = time.monotonic()
            started = started or now  # before the first data it waits for simulators
            sampled = result.get("env_runners", {})
            steps = int(sampled.get("num_env_steps_sampled_lifetime", 0))
            mean = float(sampled.get("episode_return_mean", math.nan))
            if math.isfinite(mean):
                points.append((steps, now - started, mean))
            print(f"{now - started:4.0f} s, {steps:7d} steps: return {mean:.1f}", flush=True)
            if args.output is not None:
                facts = {
                    "command": shlex.join(["python", *sys.argv]), "algorithm": config.algo_class.__name__,
                    "seed": args.seed, "wall_s": round(now - started, 1),
                    "points": [[n, round(at, 1), round(value, 3)] for n, at, value in points],
                }  # fmt: skip
                args.output.write_text(json.dumps(facts) + "\n")
    finally:
        algorithm.stop()
