"""PPO with an LSTM on StatelessCartPole: simulators that act by themselves, simulators that ask for each action, and
RLlib's own runners; and a network without a memory beside them.

The same algorithm for all, and a budget of env steps. Simulators are processes of their own; RLlib's own runners step
as many environments in theirs. The mean return after each iteration; they take turns; a plot goes beside the JSON.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure
from curves import Curve, Curves, Point
from processes import Helper, broker, command, helpers

SIMULATORS = 16
STEPS = 60_000
LATE = 20_000
"""Env steps at the end whose mean return is compared."""
RUNNERS = 2
EXAMPLES = Path(__file__).parent.parent / "examples"
ENV = "stateless_cartpole:StatelessCartPole-v0"
WAYS = ("local", "remote", "RLlib", "no memory")


def config(simulators: int, memory: bool) -> Any:
    """PPO for this environment; with RLlib's own runners as it is, with `attach` from simulators."""
    import stateless_cartpole
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.tune.registry import register_env

    register_env("stateless", lambda _: stateless_cartpole.make())
    model = {"fcnet_hiddens": [32], "fcnet_activation": "tanh", "vf_share_layers": False}
    if memory:
        model |= {"use_lstm": True, "lstm_cell_size": 64, "max_seq_len": 20}
    else:
        model |= {"fcnet_hiddens": [64, 64]}
    return (
        PPOConfig()
        .environment("stateless")
        .env_runners(num_env_runners=RUNNERS, num_envs_per_env_runner=simulators // RUNNERS)
        .training(
            train_batch_size_per_learner=2000, minibatch_size=250, num_epochs=6, lr=1e-3, gamma=0.99, lambda_=0.95,
            vf_loss_coeff=0.01, entropy_coeff=0.0,
        )
        .rl_module(model_config=model)
    )  # fmt: skip


def train(pipe: Any, backend: str | None, simulators: int, memory: bool, seed: int, steps: int) -> None:
    """A training in a process of its own, with its points as the answer."""
    import logging

    import ray

    from rllink_zmq.cli.output import prepare_ray
    from rllink_zmq.rllib import attach

    prepare_ray()
    logging.disable(logging.WARNING)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    wanted = config(simulators, memory).debugging(seed=seed)
    algorithm = (attach(wanted, backend) if backend else wanted).build_algo()
    pipe.send("ready")
    points: Curve = []
    began = time.monotonic()
    while not points or points[-1].steps < steps:
        result = algorithm.train().get("env_runners", {})
        if "episode_return_mean" in result:
            points.append(Point(int(result["num_env_steps_sampled_lifetime"]), float(result["episode_return_mean"])))
    took = time.monotonic() - began
    algorithm.stop()
    ray.shutdown()
    pipe.send((points, took))


@contextmanager
def simulating(addresses: dict[str, Any], inference: str, simulators: int, seed: int) -> Iterator[None]:
    with command(
        "simulate", "--env", ENV, "--broker", addresses["frontend"], "--num", str(simulators), "--inference", inference,
        "--seed", str(seed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ):  # fmt: skip
        yield


def curve(way: str, seed: int, steps: int, simulators: int) -> tuple[Curve, float]:
    """The learning curve of one training, and its seconds."""
    memory = way != "no memory"
    patience = 60 + steps / 50

    def points(backend: str | None) -> Any:
        with helpers((train, backend, simulators, memory, seed, steps)) as (training,):
            assert isinstance(training, Helper)
            return training.answer(patience)

    if way == "RLlib":
        return points(None)  # type: ignore[no-any-return]
    with broker() as addresses, simulating(addresses, "remote" if way == "remote" else "local", simulators, seed):
        return points(addresses["backend"])  # type: ignore[no-any-return]


def main() -> None:
    sys.path.insert(0, str(EXAMPLES))
    # Of simulators and of RLlib's runners, too.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = measure.options(__doc__)
    report = measure.Report("recurrent", options)
    steps, simulators, seeds = (4_000, 4, 1) if options.quick else (STEPS, SIMULATORS, 2)
    curves = Curves(WAYS, seeds, lambda way, seed: curve(way, seed, steps, simulators))
    title = f"PPO, StatelessCartPole, {simulators} simulators, {steps:,} env steps, {seeds} seeds"
    late = curves.report(report, title, "late return", "late_return", _late)
    for way in ("local", "remote"):
        report.targets.append(measure.Target(f"late return, {way}", measure.median(late[way]), "at least", 150.0))
    if not options.quick:
        curves.plot(report, "PPO with an LSTM, StatelessCartPole")
    report.show()


def _late(points: Curve) -> float:
    """The median of what the iterations of the last `LATE` steps returned."""
    return measure.median([p.episode_return for p in points if p.steps > points[-1].steps - LATE])


if __name__ == "__main__":
    main()
