"""What asking for each action costs a training: PPO on CartPole, 64 simulators, remote against local, three seeds.

The same budget of env steps for both. `rllink-zmq broker`, `train` and `simulate`, each in its own process; the mean
return after each iteration is read from what `train` prints. They take turns; a plot goes beside the JSON.
"""

from __future__ import annotations

import re
import subprocess
import time

import measure
from curves import Curve, Curves, Point
from processes import broker, command

SIMULATORS = 64
STEPS = 80_000
ITERATION = re.compile(r"iteration\s+(\d+)\s+steps\s+([\d,]+)\s+return\s+([\d.]+)")
WAYS = ("local", "remote")


def train(inference: str, seed: int, steps: int, simulators: int) -> tuple[Curve, float]:
    """The learning curve of one training, and the seconds between its first and last iteration."""
    points: Curve = []
    with broker() as addresses:
        with (
            command(
                "simulate", "--env", "CartPole-v1", "--broker", addresses["frontend"], "--num", str(simulators),
                "--inference", inference, "--seed", str(seed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            ),
            command(
                "train", "--broker", addresses["backend"], "--env", "CartPole-v1", "--stop-steps", str(steps),
                "--seed", str(seed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            ) as training,
        ):  # fmt: skip
            assert training.stderr is not None
            began = last = 0.0
            for line in training.stderr:
                found = ITERATION.search(line)
                if found:
                    last = time.monotonic()
                    began = began or last
                    points.append(Point(int(found[2].replace(",", "")), float(found[3])))
            if training.wait(60):
                raise measure.BenchmarkError(f"train has ended with {training.returncode}")
            training.stderr.close()
    return points, last - began


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("remote", options)
    steps, simulators, seeds = (6_000, 8, 1) if options.quick else (STEPS, SIMULATORS, 3)
    curves = Curves(WAYS, seeds, lambda way, seed: train(way, seed, steps, simulators))
    title = f"PPO, CartPole, {simulators} simulators, {steps:,} env steps, {seeds} seeds: mean return over all of them"
    means = curves.report(report, title, "median seed", "mean_return", _mean)
    part = measure.median(means["remote"]) / measure.median(means["local"])
    report.targets.append(measure.Target("mean return, remote's part of local's", part, "at least", 0.9))
    apart = min(means["local"]) - max(means["remote"])  # below zero: the seeds' ranges overlap
    report.targets.append(measure.Target("local's worst seed above remote's best", apart, "at most", 0.0))
    if not options.quick:
        curves.plot(report, f"PPO, {SIMULATORS} CartPole simulators, three seeds")
    report.show()


def _mean(points: Curve) -> float:
    """The mean return over the budget: each iteration's, for the steps that it took."""
    before = [0, *(point.steps for point in points[:-1])]
    weighed = sum(p.episode_return * (p.steps - b) for p, b in zip(points, before, strict=True))
    return weighed / points[-1].steps


if __name__ == "__main__":
    main()
