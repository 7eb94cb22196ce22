"""The table of connectors in `docs/rllib.md`, row by row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from processes import ROOT
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter, PrevActionsPrevRewards
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from test_agents_pipelines import ACTIONS, NUMBERS, Shared
from test_agents_pipelines import config as agents_config
from test_following import Noisy, Remembers, Since
from test_pipelines import BOX, MIXED, Broken, ByReturn, Doubles, Drawn, Halved, Turned, config, module_of

from rllink_zmq.errors import PolicyError
from rllink_zmq.policy import PolicyManifest, unpack_policy
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of
from rllink_zmq.rllib.policies import policy_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

FRAMES = gym.spaces.Box(0.0, 1.0, (10, 10, 1), np.float32)


def stacked(frames: int) -> PPOConfig:
    return config(FRAMES, partial(FrameStackingEnvToModule, num_frames=frames))  # type: ignore[arg-type]


def previous() -> PPOConfig:
    return config(BOX, PrevActionsPrevRewards, FlattenObservations)


CASES: dict[str, list[Callable[[], PPOConfig]]] = {
    "nothing": [lambda: config(BOX)],
    "`FlattenObservations`": [lambda: config(MIXED, FlattenObservations)],
    "`MeanStdFilter`": [lambda: config(BOX, MeanStdFilter)],
    "`FrameStackingEnvToModule`, up to 17 frames": [lambda: stacked(2), lambda: stacked(17)],
    "`PrevActionsPrevRewards`": [previous],
    "a `SingleAgentObservationPreprocessor` that computes": [lambda: config(BOX, Halved)],
    "a module-to-env piece that computes": [lambda: config(BOX, to_env=Turned)],
    "`FrameStackingEnvToModule`, 18 frames and more": [lambda: stacked(18)],
    "a `SingleAgentObservationPreprocessor` that remembers, or draws": [
        lambda: config(BOX, Remembers), lambda: config(BOX, Noisy),
    ],
    "a `MultiAgentObservationPreprocessor` that looks at other agents": [lambda: agents_config(NUMBERS, Shared)],
    "a piece that looks at how long the episode is": [lambda: config(BOX, Since)],
    "a piece that sets rewards": [lambda: config(BOX, Doubles)],
    "a module-to-env piece that draws, or looks at the episode's return": [
        lambda: config(BOX, to_env=Drawn), lambda: config(BOX, to_env=ByReturn),
    ],
    "a piece that raises": [lambda: config(BOX, Broken)],
}  # fmt: skip


def table() -> dict[str, str]:
    """What is added -> who acts."""
    text = (ROOT / "docs" / "rllib.md").read_text()
    rows = text.split("| the config adds | who acts |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows]
    return {cell[0]: cell[1] for cell in cells}


def manifests(made: PPOConfig) -> list[PolicyManifest]:
    if not made.is_multi_agent:
        return [unpack_policy(policy_of(made, module_of(made)))[0]]
    specs = {name: RLModuleSpec(observation_space=NUMBERS, action_space=ACTIONS) for name in ("p", "q")}
    modules = made.get_multi_rl_module_spec(spaces=dict.fromkeys(specs, (NUMBERS, ACTIONS)))
    return list(CrewManifest.of(crew_of(made, modules.build())).modules.values())


def test_every_row_is_tried() -> None:
    assert list(table()) == list(CASES)


@pytest.mark.parametrize("added", list(CASES))
def test_who_acts(added: str) -> None:
    for make in CASES[added]:
        try:
            about = manifests(make())
        except PolicyError as error:
            found = f"nobody: the trainer names it at start{'' if 'Broken' in str(error) else ' not'}"
        else:
            (found,) = {
                "runners that follow episodes" if each.seen is not None
                else "runners, by what requests bring" if each.remote_only
                else "simulators, or runners for those that ask"
                for each in about
            }  # fmt: skip
        assert found == table()[added], added
