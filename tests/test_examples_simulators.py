"""The examples with real simulators: what they train is exported, and their simulators act by it.

SUMO's wheels are too large to be installed for that: of its crossing the rules are tested, with a stand-in for TraCI.
"""

from __future__ import annotations

import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from fake_training import Restartable
from processes import ROOT, environment, process, rllink
from ray.rllib.core.columns import Columns
from test_examples import Learner, learning

from rllink_zmq.policy import unpack_policy
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import export_policy, weights_body

EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Any]]:
    """`example("atari", "game")` imports `examples/atari/game.py`, as a script of that directory does."""
    path = list(sys.path)

    def of(directory: str, name: str) -> Any:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.syspath_prepend(str(EXAMPLES / directory))
        sys.modules.pop("train", None)  # each has one
        return importlib.import_module(name)

    yield of
    sys.path[:] = path


def module_of(config: Any, spaces: tuple[gym.Space, gym.Space]) -> Any:
    config.environment(observation_space=spaces[0], action_space=spaces[1])
    torch.manual_seed(1)
    return config.get_rl_module_spec(env=None, spaces={"default_policy": spaces}, inference_only=True).build()


class Simulator(NamedTuple):
    """`spaces(example)`: of its environment. `start(address)`: a process that runs it until it is stopped."""

    spaces: Callable[[Any], tuple[gym.Space, gym.Space]]
    start: Callable[[str], AbstractContextManager[Any]]


def spaces_of(env: gym.Env) -> tuple[gym.Space, gym.Space]:
    env.close()
    return env.observation_space, env.action_space


def simulate(address: str, env: str, directory: Path, *more: str) -> AbstractContextManager[Any]:
    return rllink(
        "simulate", "--env", env, "--broker", address, *more, stdout=subprocess.DEVNULL,
        env=environment(PYTHONPATH=f"{directory}:{ROOT}"),
    )  # fmt: skip


SIMULATORS = {
    "atari": Simulator(
        lambda example: spaces_of(example("atari", "game").Game("RoadRunner")),
        lambda address: simulate(address, "game:RoadRunner-84-v0", EXAMPLES / "atari", "--compression", "zstd"),
    ),
    "mujoco": Simulator(
        lambda example: spaces_of(gym.make("HalfCheetah-v5")),
        lambda address: simulate(address, "HalfCheetah-v5", EXAMPLES / "mujoco"),
    ),
    "vizdoom": Simulator(
        lambda example: (example("vizdoom", "doom").OBSERVATIONS, gym.spaces.Discrete(3)),
        lambda address: process(str(EXAMPLES / "vizdoom" / "simulate.py"), "--broker", address),
    ),
}


@pytest.mark.parametrize("name", SIMULATORS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_its_simulators_act_by_what_is_trained(name: str, example: Callable[[str, str], Any], tmp_path: Path) -> None:
    spaces = SIMULATORS[name].spaces(example)
    config = example(name, "train").config()
    module = module_of(config, spaces)
    blob = export_policy(module, *spaces, normalize_actions=config.normalize_actions, clip_actions=config.clip_actions)
    weights = weights_body(unpack_policy(blob)[0], module.get_state(inference_only=True))
    broker = Restartable()
    try:
        with (
            learning(broker, blob, weights, spaces) as learner,
            SIMULATORS[name].start(broker.server.frontend) as running,
        ):
            sampled(learner, running, 300)
    finally:
        broker.stop()
    built, refused = EpisodeBuilder(*spaces, module).build(learner.leases)
    assert not refused
    for episode in (each.episode for each in built):
        batch = {Columns.OBS: torch.from_numpy(np.array(episode.get_observations()[:-1]))}
        with torch.no_grad():
            found = module.forward_exploration(batch)[Columns.ACTION_DIST_INPUTS]
            drawn = module.get_exploration_action_dist_cls().from_logits(found)
            expected = drawn.logp(torch.from_numpy(np.array(episode.get_actions())))
        np.testing.assert_allclose(episode.get_extra_model_outputs(Columns.ACTION_LOGP), expected, atol=1e-3)
    if name == "atari":
        assert {lease.message.compression for lease in learner.leases} == {"zstd"}


def sampled(learner: Learner, running: Any, steps: int) -> None:
    while learner.steps < steps:
        assert running.poll() is None, f"the simulator has ended with {running.returncode}"
        learner.turn()


@pytest.mark.parametrize("name", sorted(path.parent.name for path in EXAMPLES.glob("*/train.py")))
def test_its_recorded_run_came_to_more_than_chance(name: str) -> None:
    """And its README says how it was made."""
    directory = EXAMPLES / name
    run = json.loads((directory / "returns.json").read_text())
    baselines = [json.loads(line) for line in (directory / "baselines.json").read_text().splitlines()]
    chance = next(each["return_mean"] for each in baselines if each["name"] == "random")
    returns = [value for _, _, value in run["points"]]
    late = statistics.fmean(returns[-max(1, len(returns) // 10) :])
    assert late > max(chance, returns[0]) and late - chance > 2 * abs(returns[0] - chance)
    said = (directory / "README.md").read_text()
    assert run["command"] in said and "returns.png" in said and f"seed {run['seed']}" in said
    assert (directory / "returns.png").read_bytes().startswith(b"\x89PNG")


def test_a_game_is_the_same_from_the_same_seed(example: Callable[[str, str], Any]) -> None:
    """And its newest frame is the last one of its observation."""
    played = []
    for _ in range(2):
        env = example("atari", "game").Game("Boxing")
        first, _ = env.reset(seed=3)
        seen = [np.array(first)]
        for i in range(8):
            observation, *_ = env.step(2 + i)
            assert env.observation_space.contains(observation)
            np.testing.assert_array_equal(observation[..., :-1], seen[-1][..., 1:])
            seen.append(np.array(observation))
        played.append(seen)
        env.close()
    np.testing.assert_array_equal(*played)
    assert any((before[..., -1] != after[..., -1]).any() for before, after in pairwise(seen))


class Roads:
    """What of TraCI the crossing uses: `phases[t]` is the one that was shown in second t."""

    def __init__(self) -> None:
        self.phases: list[int] = []
        self.phase = -1
        self.vehicles: list[str] = []
        self.route = SimpleNamespace(add=lambda name, edges: None)
        self.vehicle = SimpleNamespace(add=lambda name, route, **_: self.vehicles.append(route))
        self.lane = SimpleNamespace(getLastStepHaltingNumber=lambda lane: 3, getLastStepVehicleNumber=lambda lane: 6)
        self.trafficlight = SimpleNamespace(setPhase=self._set_phase)

    def start(self, command: list[str]) -> None:
        assert command[0] == "sumo" and Path(command[2]).is_file()

    def _set_phase(self, light: str, phase: int) -> None:
        self.phase = phase

    def simulationStep(self) -> None:
        self.phases.append(self.phase)

    def close(self) -> None:
        pass


def test_the_lights_of_the_crossing_are_yellow_before_the_other_road_goes(example: Callable[[str, str], Any]) -> None:
    cross = example("sumo", "cross")
    roads = Roads()
    crossing = cross.Crossing(roads)
    crossing.begin(1)
    for green in (0, 1, 1, 0):
        assert crossing.run(green) == 5 * 8 * 3 / 60  # minutes: seconds, lanes, three vehicles that stand on each
    assert roads.phases == [0] * 5 + [1] * 3 + [2] * 7 + [3] * 3 + [0] * 2
    seen = crossing.observe()
    assert cross.OBSERVATIONS.contains(seen)
    np.testing.assert_allclose(seen, [0.1] * 8 + [0.2] * 8 + [0.0, 2 / 60], rtol=1e-6)
    while not crossing.over:
        crossing.run(0)
    busy = {arm: sum(route.startswith(arm) for route in roads.vehicles) for arm in cross.ARMS}
    assert min(sorted(busy.values())[2:]) > 2 * max(sorted(busy.values())[:2]) > 0
    crossing.begin(1)
    again = roads.vehicles[:]
    roads.vehicles.clear()
    while not crossing.over:
        crossing.run(0)
    assert roads.vehicles == again


def test_the_lights_are_trained_on_what_they_see(example: Callable[[str, str], Any]) -> None:
    cross = example("sumo", "cross")
    config = example("sumo", "train").config()
    module = module_of(config, (cross.OBSERVATIONS, cross.ACTIONS))
    assert export_policy(module, cross.OBSERVATIONS, cross.ACTIONS)
