"""PPO with 100 simulators: the time of an iteration, against the same training with episodes that cost nothing.

Ours: 100 CartPole simulators that take 60 steps a second each, a broker, and RLlib's PPO with a `ZmqEnvRunner` as a Ray
actor. The floor: the same config with a runner that returns ready-made episodes, RLlib's own of 100 environments. Two
learners: one whose update takes a second or more, and one with a small update. The learning rate is next to nothing, so
that the data of all iterations are alike.

All parts share this machine. The learner has one thread on both sides, and all others a lower priority.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import measure
from processes import broker

SIMULATORS = 100
RATE = 60
RUNNERS_NICENESS = 15
"""Ray's workers'. The broker stands for a host of its own as they do, and must not take the learner's CPU."""
STINT = 6
"""Iterations of one side in a row; the first, which follows a pause, doesn't count."""


class Size(NamedTuple):
    """Of a batch, and how often and in what pieces the learner goes over it."""

    batch: int
    epochs: int
    minibatch: int


SIZES = {"large": Size(4000, 12, 128), "small": Size(1000, 6, 128)}
SIDES = ("rllink-zmq", "ready-made")


def config(size: Size) -> Any:
    """Of both sides, but for where the episodes come from."""
    from learning import ppo

    made = ppo(size.batch).env_runners(num_env_runners=1)
    return made.training(lr=1e-9, num_epochs=size.epochs, minibatch_size=size.minibatch)


def algorithms(size: Size, backend: str) -> dict[str, Any]:
    """Both sides, built."""
    from ready_runner import ReadyRunner

    from rllink_zmq.rllib import attach

    floor = config(size).environment("CartPole-v1")
    floor.env_runners(env_runner_cls=ReadyRunner, num_envs_per_env_runner=SIMULATORS, num_cpus_per_env_runner=0.1)
    return dict(zip(SIDES, (attach(config(size), backend).build_algo(), floor.build_algo()), strict=True))


def measured(size: Size, backend: str, rounds: int, first: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each iteration that counts, and what it was made of."""
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    made = algorithms(size, backend)
    try:
        for side in SIDES:
            for _ in range(first):
                made[side].train()
        for _, side in measure.rounds(rounds, SIDES):
            for i in range(STINT):
                began = time.perf_counter()
                result = made[side].train()
                took = time.perf_counter() - began
                if i:
                    runners, timers = result["env_runners"], result["timers"]
                    found[side].append(
                        {
                            "seconds": took,
                            "update": timers["learner_update_timer"],
                            "sample": timers["env_runner_sampling_timer"],
                            "steps": int(runners["num_env_steps_sampled"]),
                        }
                    )
    finally:
        for algorithm in made.values():
            algorithm.stop()
    return found


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("iteration", options)
    os.environ["OMP_NUM_THREADS"] = "1"
    rounds, first = (1, 2) if options.quick else (6, 5)
    with ExitStack() as stack:
        addresses = stack.enter_context(broker(preexec_fn=lambda: os.nice(RUNNERS_NICENESS)))
        script = Path(__file__).parent / "paced_simulators.py"
        arguments = [sys.executable, str(script), addresses["frontend"], str(SIMULATORS), str(RATE)]
        simulators = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        stack.callback(simulators.wait)
        stack.callback(simulators.terminate)
        with measure.quiet():
            import ray

            ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
            stack.callback(ray.shutdown)
            for name, size in SIZES.items():
                _tell(report, name, size, measured(size, addresses["backend"], rounds, first))
    report.notes.append(
        "An iteration: the time of train(). Update and sampling are RLlib's own timers, smoothed over iterations."
    )
    report.show()


def _tell(report: measure.Report, name: str, size: Size, found: dict[str, list[dict[str, float]]]) -> None:
    medians = {
        side: {key: measure.median([one[key] for one in each]) for key in each[0]} for side, each in found.items()
    }
    report.figures[name] = medians
    report.rounds[name] = found
    report.table(
        f"PPO, {SIMULATORS} simulators, batches of {size.batch:,}, {size.epochs} epochs of {size.minibatch}",
        ("", "iteration s", "update s", "sampling s", "steps"),
        [(side, *(m[key] for key in ("seconds", "update", "sample", "steps"))) for side, m in medians.items()],
    )
    times = medians[SIDES[0]]["seconds"] / medians[SIDES[1]]["seconds"]
    spread = [measure.ratios(*([one["seconds"] for one in found[side]] for side in SIDES))]
    low_high = (min(spread[0]), max(spread[0]))
    what = f"time of an iteration, times ready-made episodes, {name} update"
    report.targets.append(measure.Target(what, times, "at most", 1.05, low_high))


if __name__ == "__main__":
    main()
