"""The table of `docs/spaces.md`, walked: each cell against what RLlib's own runner computes, with the same weights.

RLlib's `SingleAgentEnvRunner` steps through given observations, drawing its actions. The exported policy is then given
the noise that makes it draw the very same ones. Where RLlib raises an error, `attach()` has to have said so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
import tree
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.utils.spaces.space_utils import get_base_struct_from_space, unsquash_action
from test_packed_policies import fragment

from rllink_zmq.arrays import to_buffers
from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.errors import SpaceError
from rllink_zmq.fragments import Origin, layout_of_spaces
from rllink_zmq.fragments_block import BlockBuilder
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.policy import Policy, unpack_policy
from rllink_zmq.policy_batch import BatchPolicy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.attach import attach
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.export_connectors import own_flattening
from rllink_zmq.rllib.pieces import has_own_connectors
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.rewriting import Filters, FragmentConnectors
from rllink_zmq.session_runner import Lease

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

DOC = (Path(__file__).parent.parent / "docs" / "spaces.md").read_text()
ACTS = "local, remote"
CNN = {"conv_filters": [[4, 3, 2], [8, 3, 2]], "head_fcnet_hiddens": [8]}


class Observed(NamedTuple):
    """A row of the table of observations. `plain`, `flattened`: '' where RLlib trains it without, or with
    FlattenObservations; else what the refusal says."""

    space: gym.Space[Any]
    plain: str = "its models take a Box"
    flattened: str = ""


OBSERVATIONS = {
    "Box, one dimension, float": Observed(Box(-1, 1, (3,), np.float64), ""),
    "Box, one dimension, uint8 or other integers": Observed(Box(0, 255, (5,), np.uint8), "its models take floats"),
    "Box, image, float": Observed(Box(0, 1, (10, 10, 3)), ""),
    "Box, image, uint8": Observed(Box(0, 255, (10, 10, 3), np.uint8), "its models take floats"),
    "Box, other dimensions": Observed(Box(-1, 1, (2, 3)), "of one dimension, or of three"),
    "Discrete": Observed(Discrete(4)),
    "Discrete that starts elsewhere than at 0": Observed(Discrete(4, start=2), flattened="counts the values of obs"),
    "MultiDiscrete": Observed(MultiDiscrete([2, 3])),
    "MultiBinary": Observed(MultiBinary(4)),
    "Tuple": Observed(Tuple((Box(-1, 1, (2,)), Discrete(3)))),
    "Dict, nested": Observed(
        Dict(
            {
                "z": Discrete(3),
                "a": Dict({"y": MultiDiscrete([2, 3]), "x": Tuple((Box(-1, 1, (2, 2)), MultiBinary(3)))}),
            }
        )
    ),
}

ACTIONS = {
    "Discrete": (Discrete(3, start=1), ""),
    "MultiDiscrete": (MultiDiscrete([2, 3]), ""),
    "Box with bounds": (Box(np.float32([-2, 0]), np.float32([2, 10])), ""),
    "Box without bounds, or with some": (Box(np.float32([-1, -np.inf]), np.float32([np.inf, 5])), ""),
    "Box of integers": (Box(-2, 2, (2,), np.int32), "its distributions are of floats"),
    "Box, other dimensions": (Box(-1, 1, (2, 2)), "its distribution has one dimension"),
    "MultiBinary": (MultiBinary(3), "RLlib has no distribution for MultiBinary"),
    "Tuple of these": (Tuple((Discrete(2), Box(-2, 2, (2,), np.float64))), ""),
    "Dict of these, nested": (
        Dict({"z": Tuple((MultiDiscrete([2, 3]), Box(-2, 2, (1,)))), "a": Dict({"k": Discrete(3)})}),
        "",
    ),
    "Dict with a part that isn't": (Dict({"k": Discrete(3), "z": Box(-1, 1, (2, 2))}), "action['z'] is a Box of shape"),
}


class World(gym.Env[Any, Any]):
    """Gives recorded observations, one after the other, and keeps the actions that it gets."""

    def __init__(self, seen: gym.Space[Any], acted: gym.Space[Any], observations: list[Any]) -> None:
        self.observation_space, self.action_space = seen, acted
        self._observations = observations
        self.actions: list[Any] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.actions.clear()
        return self._observations[0], {}

    def step(self, action: Any) -> Any:
        self.actions.append(tree.map_structure(np.array, action))
        at = len(self.actions)
        return self._observations[at], 1.0, False, at == len(self._observations) - 1, {}


class Cell:
    """RLlib's own runner in one cell: `episode`, and the actions that its environment `got`. Raises what RLlib does."""

    def __init__(self, seen: gym.Space[Any], acted: gym.Space[Any], flattened: bool) -> None:
        self.seen, self.acted, self.flattened = seen, acted, flattened
        seen.seed(5)
        self.observations = [seen.sample() for _ in range(7)]
        world = World(seen, acted, self.observations)
        config = self.config()
        config.environment(env=lambda _: world)
        runner = SingleAgentEnvRunner(config=config)
        try:
            torch.manual_seed(3)
            with torch.no_grad():
                for parameter in runner.module.parameters():
                    parameter += 0.3 * torch.randn(parameter.shape)
            (self.episode,) = runner.sample(num_episodes=1, explore=True)
            self.module = runner.module
            self.got = world.actions[:6]
        finally:
            runner.stop()
        self.episode = self.episode.to_numpy()

    def config(self) -> PPOConfig:
        model = {"fcnet_hiddens": [8]} | (CNN if len(self.seen.shape or ()) == 3 and not self.flattened else {})
        made = PPOConfig().environment(observation_space=self.seen, action_space=self.acted)
        made.rl_module(model_config=model).env_runners(num_env_runners=0)
        return made.env_runners(env_to_module_connector=flatten) if self.flattened else made

    @property
    def dist_inputs(self) -> NDArray[Any]:
        return np.asarray(self.episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS))

    @property
    def logp(self) -> NDArray[Any]:
        return np.asarray(self.episode.get_extra_model_outputs(Columns.ACTION_LOGP))


def flatten(env: Any, spaces: Any, device: Any) -> Any:
    return FlattenObservations()


def leaves(structure: Any) -> list[NDArray[Any]]:
    return [np.asarray(leaf) for leaf in tree.flatten(structure)]


def noise_of(cell: Cell) -> NDArray[np.float32]:
    """What makes the policy draw RLlib's actions: (steps, width)."""
    columns = []
    inputs, at = cell.dist_inputs, 0
    spaces = tree.flatten(get_base_struct_from_space(cell.acted))
    for space, action in zip(spaces, leaves(cell.episode.get_actions()), strict=True):
        if isinstance(space, Box):
            size = space.shape[0]
            mean, log_std = inputs[:, at : at + size], inputs[:, at + size : at + 2 * size]
            columns.append((action - mean) / np.exp(log_std))
            at += 2 * size
            continue
        entries = action.reshape(len(action), -1)
        for entry, count in zip(
            entries.T, np.atleast_1d(space.n if isinstance(space, Discrete) else space.nvec), strict=True
        ):
            columns.append(100.0 * np.eye(count)[entry])
            at += int(count)
    return np.concatenate(columns, 1).astype(np.float32)


def walk(cell: Cell) -> None:
    """Everything that a cell says."""
    made, layout = cell.config(), layout_of_spaces(cell.seen, cell.acted)
    attach(cell.config())
    module = cell.module
    blob = policy_of(made, module)
    manifest = unpack_policy(blob)[0]
    assert not manifest.remote_only
    body = weights_body(manifest, module.get_state())
    rows = np.stack([_row(layout, one) for one in cell.observations])

    policy = Policy.load(blob, seed=0)
    policy.apply(0, body)
    local = policy.act(rows[:-1], noise_of(cell))
    np.testing.assert_allclose(local.action_dist_inputs, cell.dist_inputs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(local.action_logp, cell.logp, rtol=1e-3, atol=1e-4)
    for mine, its in zip(leaves(local.env_actions), leaves(_stacked(cell.got)), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-4)

    actor = ModuleActor(module, manifest, cell.acted, True, False, flattening=own_flattening(made))
    actor.apply(0, body)
    remote = actor.act(rows[:-1], explore=True)
    np.testing.assert_allclose(remote["action_dist_inputs"], cell.dist_inputs, rtol=1e-4, atol=1e-5)
    actions = remote["actions"] if layout.actions is None else layout.actions.unpack(remote["actions"])
    inputs = torch.from_numpy(remote["action_dist_inputs"])
    drawn = module.get_exploration_action_dist_cls().from_logits(inputs)
    np.testing.assert_allclose(
        remote["action_logp"], drawn.logp(tree.map_structure(torch.from_numpy, actions)), rtol=1e-4, atol=1e-4
    )
    for_env = remote.get("env_actions", remote["actions"])
    for_env = for_env if layout.env_actions is None else layout.env_actions.unpack(for_env)
    expected = unsquash_action(actions, get_base_struct_from_space(cell.acted))
    for mine, its in zip(leaves(for_env), leaves(expected), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)

    connectors = None
    if has_own_connectors(made):
        connectors = FragmentConnectors(Pipelines(made, module=module), Filters(2))
    builder = EpisodeBuilder(cell.seen, cell.acted, module, connectors=connectors)
    sent = fragment(
        rows, actions=local.actions, action_logp=local.action_logp, action_dist_inputs=local.action_dist_inputs
    )
    (built,), refused = builder.build([sent])
    assert not refused
    together, refused = builder.build([as_columns(cell, policy)])
    assert not refused and len(together) == 2
    theirs = _learned(cell, cell.episode)
    for episode in (built.episode, *(each.episode for each in together)):
        ours = _learned(cell, episode)
        for column in (Columns.OBS, Columns.ACTIONS, Columns.ACTION_LOGP, Columns.ACTION_DIST_INPUTS):
            tree.assert_same_structure(ours[column], theirs[column])
            for mine, its in zip(leaves(ours[column]), leaves(theirs[column]), strict=True):
                assert mine.shape == its.shape
                np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-4)


def as_columns(cell: Cell, policy: Policy) -> Lease:
    """The fragment of a vector of two such worlds, which see the same and draw the same."""
    block, batch, noise = BlockBuilder("worlds", 2), BatchPolicy(policy, 2), noise_of(cell)
    block.begin(layout_of_policy(policy.manifest), "acted", Origin("r", 0), len(noise))
    both = [tree.map_structure(lambda part: np.stack([part, part]), one) for one in cell.observations]
    for t, row in enumerate(noise):
        policy.draw = lambda drawn, row=row: np.copyto(drawn, row)  # type: ignore[method-assign, misc]
        acted = batch.act(block.observe(both[t]))
        block.act(acted.actions, acted.action_logp, acted.action_dist_inputs, 0.0)
        for mine, its in zip(leaves(acted.env_actions), leaves(cell.got[t]), strict=True):
            np.testing.assert_allclose(mine, np.stack([its, its]), rtol=1e-4, atol=1e-4)
        ends = np.full(2, t == len(noise) - 1)
        block.log(np.ones(2), ends, np.zeros(2, bool), both[t + 1], 0.0)
    block.observe(both[-1])
    (cut,) = block.cuts(1 << 20)
    columns, body = to_buffers(cut.arrays)
    message = FRAGMENT(b"s" * 16, 1, 1, "worlds", 0, cut.steps, "no", "r", 0, 0.0, columns, segments=cut.segments)
    return Lease(message, tuple(body))


def _learned(cell: Cell, episode: Any) -> Any:
    """What a learner makes of an episode."""
    pipeline = cell.config().build_learner_connector(episode.observation_space, cell.acted)
    batch = pipeline(rl_module=cell.module, batch={}, episodes=[episode], shared_data={})
    return batch.get(DEFAULT_MODULE_ID, batch)


def _row(layout: Any, observation: Any) -> NDArray[Any]:
    if layout.packing is None:
        return np.asarray(observation).astype(layout.obs.dtype)
    row: NDArray[Any] = layout.packing.pack(observation, lambda value, what, shape, dtype: np.asarray(value, dtype))
    return row


def _stacked(actions: list[Any]) -> Any:
    return tree.map_structure(lambda *parts: np.stack(parts), *actions)


# ---- the walk --------------------------------------------------------------------------------------------------------

TRAINED = [(name, False) for name, row in OBSERVATIONS.items() if not row.plain]
TRAINED += [(name, True) for name, row in OBSERVATIONS.items() if not row.flattened]
ACTED = [name for name, (_, reason) in ACTIONS.items() if not reason]
CELLS = [(name, flat, ACTED[i % len(ACTED)]) for i, (name, flat) in enumerate(TRAINED)]
"""Each kind of observations and of actions, the latter in turn."""


def test_every_kind_of_actions_is_in_the_walk() -> None:
    assert {acted for _, _, acted in CELLS} == set(ACTED)


@pytest.mark.parametrize(("seen", "flattened", "acted"), CELLS)
def test_a_cell_is_what_rllibs_own_runner_does(seen: str, flattened: bool, acted: str) -> None:
    walk(Cell(OBSERVATIONS[seen].space, ACTIONS[acted][0], flattened))


REFUSED = [(row.space, Discrete(2), False, row.plain) for row in OBSERVATIONS.values() if row.plain]
REFUSED += [(row.space, Discrete(2), True, row.flattened) for row in OBSERVATIONS.values() if row.flattened]
REFUSED += [(Box(-1, 1, (3,)), space, False, reason) for space, reason in ACTIONS.values() if reason]


@pytest.mark.parametrize(("seen", "acted", "flattened", "reason"), REFUSED)
def test_what_rllib_does_not_train_is_refused(
    seen: gym.Space[Any], acted: gym.Space[Any], flattened: bool, reason: str
) -> None:
    with pytest.raises(Exception):  # noqa: B017 - whatever RLlib raises, of many kinds
        Cell(seen, acted, flattened)
    cell = Cell.__new__(Cell)
    cell.seen, cell.acted, cell.flattened = seen, acted, flattened
    with pytest.raises(SpaceError) as refused:
        attach(cell.config())
    assert reason in str(refused.value)


def test_the_document_has_this_table() -> None:
    for name, row in OBSERVATIONS.items():
        cells = [ACTS if not reason else f"refused: {_meaning(reason)}" for reason in (row.plain, row.flattened)]
        assert f"| {name} | {cells[0]} | {cells[1]} |\n" in DOC
    for name, (_, reason) in ACTIONS.items():
        assert f"| {name} | {ACTS if not reason else f'refused: {_meaning(reason)}'} |\n" in DOC


MEANINGS = {
    "its models take a Box": "RLlib's models take a Box",
    "its models take floats": "RLlib's models take floats",
    "of one dimension, or of three": "RLlib's models take one dimension, or three",
    "counts the values of obs": "its one-hot counts from 0",
    "its distributions are of floats": "RLlib's distributions are of floats; use MultiDiscrete",
    "its distribution has one dimension": "RLlib's distribution has one dimension",
    "RLlib has no distribution for MultiBinary": "RLlib has no distribution for it; use MultiDiscrete",
    "action['z'] is a Box of shape": "the part is named",
}


def _meaning(reason: str) -> str:
    return MEANINGS[reason]
