"""Several agents: PPO on RLlib's MultiAgentCartPole, from simulators and by RLlib's own MultiAgentEnvRunner; and
PettingZoo's rock-paper-scissors against a frozen policy, in its parallel and in its AEC form.

The same config for all, and a budget of env steps. Simulators are processes of their own, which sample the next batch
while the learner learns, or in lockstep rest meanwhile (`attach(steps_ahead=1)`); RLlib's own runner steps as many
environments in its. The mean return (of all agents together) after each iteration; they take turns; a plot goes
beside the JSON. Each curve is kept in `results/agents` and not made again: a run that was ended goes on from there.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import measure
from curves import Curve, Curves, Point
from processes import Helper, broker, command, helpers

SIMULATORS = 8
STEPS = 25_000
LATE = 5_000
"""Env steps at the end whose mean return is compared."""
GAME_STEPS = 9_000
"""Of rock-paper-scissors: rounds, or moves of its AEC form."""
SEEDS = 2
GAME_SEEDS = 1
EXAMPLES = Path(__file__).parent.parent / "examples"
WAYS = ("simulators", "lockstep", "RLlib")
GAMES = ("together", "in_turn")


def train(pipe: Any, backend: str | None, ahead: int, game: str, simulators: int, seed: int, steps: int) -> None:
    """A training in a process of its own, with its points as the answer. `ahead`: steps ahead, 0 = the default; `game`:
    of rock-paper-scissors, or ''."""
    import logging

    import multi_agent_cartpole
    import ray
    import rock_paper_scissors

    from rllink_zmq.cli.output import prepare_ray
    from rllink_zmq.rllib import attach

    prepare_ray()
    logging.disable(logging.WARNING)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    config = (rock_paper_scissors if game else multi_agent_cartpole).config().debugging(seed=seed)
    config.env_runners(num_envs_per_env_runner=simulators)
    algorithm = (attach(config, backend, steps_ahead=ahead) if backend else config).build_algo()
    pipe.send("ready")
    points: Curve = []
    began = time.monotonic()
    while not points or points[-1].steps < steps:
        result = algorithm.train().get("env_runners", {})
        if "episode_return_mean" in result:
            told = result["agent_episode_returns_mean"]["player_0"] if game else result["episode_return_mean"]
            if not math.isnan(told):  # no episode has ended
                points.append(Point(int(result["num_env_steps_sampled_lifetime"]), float(told)))
    took = time.monotonic() - began
    algorithm.stop()
    ray.shutdown()
    pipe.send((points, took))


def kept(folder: Path, env: str, game: str, way: str, seed: int, steps: int, simulators: int) -> tuple[Curve, float]:
    """`curve`, from its file if there is one."""
    path = folder / f"{game or 'poles'}-{way}-{seed}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(curve(env, game, way, seed, steps, simulators)))
        print(f"{path.stem}: done", flush=True)
    points, took = json.loads(path.read_text())
    return [Point(*point) for point in points], took


def curve(env: str, game: str, way: str, seed: int, steps: int, simulators: int) -> tuple[Curve, float]:
    """The learning curve of one training, and its seconds."""
    patience = 60 + steps / 50

    def points(backend: str | None) -> Any:
        ahead = 1 if way == "lockstep" else 0
        with helpers((train, backend, ahead, game, simulators, seed, steps)) as (training,):
            assert isinstance(training, Helper)
            return training.answer(patience)

    if way == "RLlib":
        return points(None)  # type: ignore[no-any-return]
    with broker() as addresses, command(
        "simulate", "--env", env, "--broker", addresses["frontend"], "--num", str(simulators), "--seed", str(seed),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ):  # fmt: skip
        return points(addresses["backend"])  # type: ignore[no-any-return]


def main() -> None:
    sys.path.insert(0, str(EXAMPLES))
    # Of simulators and of RLlib's runners, too.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    options = measure.options(__doc__)
    report = measure.Report("agents", options)
    steps, game_steps, simulators, seeds = (
        (2_000, 1_200, 2, 1) if options.quick else (STEPS, GAME_STEPS, SIMULATORS, SEEDS)
    )
    poles, folder = "multi_agent_cartpole:make", options.results / "agents"
    curves = Curves(WAYS, seeds, lambda way, seed: kept(folder, poles, "", way, seed, steps, simulators))
    title = f"PPO, MultiAgentCartPole, 2 agents, {simulators} environments, {steps:,} env steps, {seeds} seeds"
    late = curves.report(report, title, "late return", "late_return", _late)
    games = {
        game: [
            kept(folder, f"rock_paper_scissors:{game}", game, "simulators", seed, game_steps, simulators)[0]
            for seed in range(GAME_SEEDS)
        ]
        for game in GAMES
    }
    last = {game: [_late(points) for points in some] for game, some in games.items()}
    report.table(
        f"PPO, rock-paper-scissors against a frozen policy, {game_steps:,} env steps; random play: 0",
        ("", "late return", "lowest", "highest"),
        [(game, measure.median(found), min(found), max(found)) for game, found in last.items()],
    )
    report.figures |= {game: {"late_return": found} for game, found in last.items()}
    for way in WAYS[:-1]:
        ratio = measure.median(late[way]) / measure.median(late["RLlib"])
        report.targets.append(measure.Target(f"late return, {way} / RLlib", ratio, "at least", 0.8))
    for game in GAMES:
        report.targets.append(measure.Target(f"late return, {game}", measure.median(last[game]), "at least", 8.0))
    if not options.quick:
        curves.plot(report, "PPO, MultiAgentCartPole: mean return of both agents")
    report.show()


def _late(points: Curve) -> float:
    """The median of what the last iterations returned."""
    from_ = points[-1].steps - min(LATE, points[-1].steps / 4)
    return measure.median([p.episode_return for p in points if p.steps > from_])


if __name__ == "__main__":
    main()
