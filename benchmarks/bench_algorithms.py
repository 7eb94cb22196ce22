"""Every algorithm through the broker, against RLlib's own `SingleAgentEnvRunner` with the very same config.

PPO, APPO, IMPALA and DQN on CartPole, SAC on Pendulum; three seeds. The only difference is the line `attach(config,
...)` and where environments run: in RLlib's runner, or in `rllink-zmq simulate`, which acts itself (local) or asks for
each action (remote). PPO also in lockstep: local, with `attach(steps_ahead=1)`, so that simulators rest while the
learner learns, as they do in RLlib's own runner. Each run has a process of its own, with a Ray of its own. A plot goes
beside the JSON.

    python benchmarks/bench_algorithms.py --only SAC --seeds 1     # a part; what is there already is not run again
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import measure
from curves import Curve, Point
from processes import broker, command

WAYS = ("RLlib", "local", "remote")
LOCKSTEP = "lockstep"
COLORS = {"RLlib": "tab:gray", "local": "tab:blue", "remote": "tab:orange", LOCKSTEP: "tab:green"}
SIMULATORS = 4
AT_ONCE = 2
"""Runs at the same time."""

WITHIN = 600.0
"""Seconds that one run may take."""


class Task(NamedTuple):
    """`steps`: of the whole run. `quick`: of one that shows that it runs. `config`: makes RLlib's."""

    env: str
    steps: int
    quick: int
    config: Callable[[], Any]
    ways: tuple[str, ...] = WAYS


def _ppo() -> Any:
    from ray.rllib.algorithms.ppo import PPOConfig

    config = PPOConfig().env_runners(num_env_runners=1, num_envs_per_env_runner=SIMULATORS)
    return config.training(
        train_batch_size_per_learner=1000, minibatch_size=250, num_epochs=6, lr=1e-3, grad_clip=0.5,
        vf_loss_coeff=0.01, vf_clip_param=1e6, use_kl_loss=False,
    )  # fmt: skip


def _stream(config: Any) -> Any:
    config.env_runners(num_env_runners=1, num_envs_per_env_runner=SIMULATORS).learners(num_learners=0)
    config.training(train_batch_size_per_learner=200, vf_loss_coeff=0.05, entropy_coeff=0.0)
    config.min_time_s_per_iteration = 0.5
    return config


def _appo() -> Any:
    from ray.rllib.algorithms.appo import APPOConfig

    return _stream(APPOConfig()).training(lr=1e-3)


def _impala() -> Any:
    from ray.rllib.algorithms.impala import IMPALAConfig

    return _stream(IMPALAConfig()).training(lr=3e-3)


def _dqn() -> Any:
    from ray.rllib.algorithms.dqn import DQNConfig

    config = DQNConfig().env_runners(num_env_runners=1, rollout_fragment_length=2)
    config.min_sample_timesteps_per_iteration = 500
    return config.training(
        lr=1e-3, train_batch_size_per_learner=64, n_step=2, target_network_update_freq=200,
        num_steps_sampled_before_learning_starts=500, epsilon=[(0, 1.0), (3000, 0.05)],
    )  # fmt: skip


def _sac() -> Any:
    from ray.rllib.algorithms.sac import SACConfig

    config = SACConfig().env_runners(num_env_runners=1, rollout_fragment_length=4)
    config.min_sample_timesteps_per_iteration = 500
    return config.training(
        actor_lr=2e-3, critic_lr=2e-3, alpha_lr=2e-3, train_batch_size_per_learner=128, tau=0.01, gamma=0.97,
        num_steps_sampled_before_learning_starts=500,
    )  # fmt: skip


TASKS = {
    "PPO": Task("CartPole-v1", 30_000, 1_000, _ppo, (*WAYS, LOCKSTEP)),
    "APPO": Task("CartPole-v1", 60_000, 400, _appo),
    "IMPALA": Task("CartPole-v1", 60_000, 400, _impala),
    "DQN": Task("CartPole-v1", 8_000, 400, _dqn),
    "SAC": Task("Pendulum-v1", 8_000, 800, _sac),  # the first episodes of four simulators end with the 800th
}
NETWORKS: dict[str, dict[str, Any]] = {
    "DQN": {"fcnet_hiddens": [64, 64], "fcnet_activation": "relu", "head_fcnet_hiddens": []},
    "SAC": {"fcnet_hiddens": [64], "head_fcnet_hiddens": [64]},
}
NETWORK = {"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"}


# ---- one run, in a process of its own


def run(algorithm: str, way: str, seed: int, steps: int) -> None:
    """Train, and print the curve as JSON."""
    if way == "RLlib":
        print(json.dumps(train(algorithm, seed, steps, None)))
        return
    task, inference = TASKS[algorithm], "remote" if way == "remote" else "local"
    with (
        broker() as addresses,
        command(
            "simulate", "--env", task.env, "--broker", addresses["frontend"], "--num", str(SIMULATORS), "--inference",
            inference, "--seed", str(seed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ),
    ):  # fmt: skip
        ahead = 1 if way == LOCKSTEP else 0
        print(json.dumps(train(algorithm, seed, steps, addresses["backend"], ahead)))


def train(algorithm: str, seed: int, steps: int, backend: str | None, steps_ahead: int = 0) -> Curve:
    """The mean return of the last 20 episodes after each iteration. `backend`: the broker's; None = RLlib's runner."""
    from rllink_zmq.cli.output import prepare_ray

    prepare_ray()  # as `rllink-zmq train`: who computes actions for others must not have the lowest priority
    import ray
    import torch

    torch.set_num_threads(1)
    task = TASKS[algorithm]
    with measure.quiet():
        ray.init(num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
        config = task.config().environment(task.env).debugging(seed=seed, log_level="ERROR")
        config.rl_module(model_config=NETWORKS.get(algorithm, NETWORK))
        config.reporting(metrics_num_episodes_for_smoothing=20)
        if steps <= task.quick and hasattr(config, "num_steps_sampled_before_learning_starts"):
            # An update for each few steps is what takes the time: some of them show that it learns.
            config.training(num_steps_sampled_before_learning_starts=steps - 100)
            config.min_sample_timesteps_per_iteration = 100
        if backend is not None:
            from rllink_zmq.rllib import attach

            attach(config, backend, steps_ahead=steps_ahead)
        trained = config.build_algo()
        points: Curve = []
        while not points or points[-1].steps < steps:
            mine = trained.train().get("env_runners", {})
            value = mine.get("episode_return_mean")
            if value is not None and not math.isnan(value):
                points.append(Point(int(mine["num_env_steps_sampled_lifetime"]), float(value)))
        trained.stop()
        ray.shutdown()
    return points


# ---- all of them


def parts(options: argparse.Namespace) -> Path:
    """Where the curves of single runs are kept."""
    folder: Path = options.parts or options.results / "algorithms"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measured(options: argparse.Namespace, algorithm: str, way: str, seed: int) -> Curve:
    """The curve of one run: from its file, or else of a new process."""
    path = parts(options) / f"{algorithm}-{way}-{seed}.json"
    if not path.exists():
        task = TASKS[algorithm]
        steps = task.quick if options.quick else task.steps
        done = subprocess.run(
            [sys.executable, __file__, "--run", algorithm, way, str(seed), str(steps)],
            stdout=subprocess.PIPE, text=True, timeout=WITHIN, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if done.returncode:
            raise measure.BenchmarkError(f"{algorithm}, {way}, seed {seed} has ended with {done.returncode}")
        path.write_text(done.stdout.splitlines()[-1] + "\n")
        print(f"{algorithm}, {way}, seed {seed}: {json.loads(path.read_text())[-1][1]:.1f} at the end", flush=True)
    return [Point(*point) for point in json.loads(path.read_text())]


def _mean(points: Curve) -> float:
    """The mean return over the budget: each iteration's, for the steps that it took."""
    before = [0, *(point.steps for point in points[:-1])]
    weighed = sum(p.episode_return * (p.steps - b) for p, b in zip(points, before, strict=True))
    return weighed / points[-1].steps


def complete(options: argparse.Namespace, seeds: int) -> dict[tuple[str, str, int], Curve]:
    """The curves that are there, of seeds that have all ways. Raises BenchmarkError if an algorithm has none."""
    curves = {}
    for algorithm, task in TASKS.items():
        for seed in range(seeds):
            paths = {way: parts(options) / f"{algorithm}-{way}-{seed}.json" for way in task.ways}
            if all(path.exists() for path in paths.values()):
                curves |= {(algorithm, way, seed): measured(options, algorithm, way, seed) for way in task.ways}
        if not any(key[0] == algorithm for key in curves):
            raise measure.BenchmarkError(f"{algorithm} has no seed that has run in all ways: {', '.join(task.ways)}")
    return curves


def report(options: argparse.Namespace, curves: dict[tuple[str, str, int], Curve]) -> None:
    """Tables, the plot, and the targets: no algorithm learns less than with RLlib's own runner, beyond its seeds."""
    found = measure.Report("algorithms", options)
    rows: list[tuple[object, ...]] = []
    for algorithm, task in TASKS.items():
        seeds = sorted({key[2] for key in curves if key[0] == algorithm})
        means = {way: [_mean(curves[algorithm, way, seed]) for seed in seeds] for way in task.ways}
        found.figures[algorithm] = {way: {"mean_return": values} for way, values in means.items()}
        found.rounds[algorithm] = {
            way: [[tuple(point) for point in curves[algorithm, way, seed]] for seed in seeds] for way in task.ways
        }
        for way, values in means.items():
            rows.append((algorithm, task.env, way, len(seeds), measure.median(values), min(values), max(values)))
        worst = min(means["RLlib"])
        for way in task.ways[1:]:
            # Below zero: the best seed is no better than RLlib's worst one.
            found.targets.append(
                measure.Target(
                    f"{algorithm}, {way}: best seed less RLlib's worst", max(means[way]) - worst, "at least", 0.0
                )
            )
    title = "Mean return over the budget"
    found.table(title, ("", "task", "runner", "seeds", "median seed", "lowest", "highest"), rows)
    if not options.quick:
        _plot(found.path.with_suffix(".png"), curves)
    found.show()


def _plot(path: Path, curves: dict[tuple[str, str, int], Curve]) -> None:
    """A picture with one part for each algorithm."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, parts_of_it = pyplot.subplots(1, len(TASKS), figsize=(18, 3.6))
    for axes, (algorithm, task) in zip(parts_of_it, TASKS.items(), strict=True):
        for way in task.ways:
            lines = [line for key, line in curves.items() if key[:2] == (algorithm, way)]
            for i, line in enumerate(lines):
                axes.plot(*zip(*line, strict=True), color=COLORS[way], alpha=0.7, label=None if i else way)
        axes.set(xlabel="env steps", title=f"{algorithm}, {task.env}")
        axes.grid(alpha=0.3)
    parts_of_it[0].set(ylabel="mean return")
    parts_of_it[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few short rounds, to see that it runs")
    parser.add_argument("--results", type=Path, help="where the JSON goes (benchmarks/results; results/quick if quick)")
    parser.add_argument("--only", choices=TASKS, action="append", help="these algorithms alone, and no report")
    parser.add_argument("--seeds", type=int, help="how many (3; 1 if quick)")
    parser.add_argument("--parts", type=Path, help="where single curves are kept, to go on from (results/algorithms)")
    parser.add_argument("--report", action="store_true", help="run nothing: report the seeds that have run in all ways")
    parser.add_argument("--run", nargs=4, metavar=("ALGORITHM", "WAY", "SEED", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        algorithm, way, seed, steps = options.run
        run(algorithm, way, int(seed), int(steps))
        return
    if options.results is None:
        options.results = measure.RESULTS / "quick" if options.quick else measure.RESULTS
    seeds = options.seeds or (1 if options.quick else 3)
    if options.report:
        report(options, complete(options, seeds))
        return
    wanted = [(a, way, seed) for a in options.only or TASKS for seed, way in measure.rounds(seeds, TASKS[a].ways)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        curves = dict(zip(wanted, pool.map(lambda one: measured(options, *one), wanted), strict=True))
    if not options.only:
        report(options, curves)


if __name__ == "__main__":
    main()
