"""Actions of several parts: drawn, packed, given to the environment, and in the episodes that a learner gets."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import tree
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from test_packed_policies import fragment

from rllink_zmq.drive_loops_vector import _blank_actions, _put
from rllink_zmq.errors import EpisodeError, PolicyError, ProtocolError, SpaceError
from rllink_zmq.fragments import FragmentBuilder, Origin, layout_of_spaces
from rllink_zmq.policy import Policy, pack_policy, unpack_policy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import export_policy, weights_body

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SEEN = Box(-1.0, 1.0, (3,))
ACTIONS = Dict(
    {
        "steer": Box(np.float32([-2, 0]), np.float32([2, 10])),
        "arm": Tuple((Discrete(3), Box(-np.inf, np.inf, (1,)))),
        "lamps": MultiDiscrete([2, 4]),
    }
)
"""In the order of its parts: arm[0], arm[1], lamps, steer."""


class Parted:
    def __init__(self) -> None:
        torch.manual_seed(2)
        config = PPOConfig().rl_module(model_config={"fcnet_hiddens": [8]})
        config.environment(observation_space=SEEN, action_space=ACTIONS)
        spec = config.get_rl_module_spec(spaces={DEFAULT_MODULE_ID: (SEEN, ACTIONS)}, inference_only=True)
        self.module = spec.build()
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
        self.blob = export_policy(self.module, SEEN, ACTIONS)
        body = weights_body(self.blob, self.module.get_state())
        self.policy = Policy.load(self.blob, seed=4)
        self.policy.apply(0, body)
        self.actor = ModuleActor(self.module, unpack_policy(self.blob)[0], ACTIONS, True, False)
        self.actor.apply(0, body)


@pytest.fixture(scope="module")
def parted() -> Parted:
    return Parted()


@pytest.fixture
def seen() -> Any:
    return np.random.default_rng(1).uniform(-1, 1, (6, 3)).astype(np.float32)


def flat(structure: Any, row: int) -> list[Any]:
    return [np.asarray(leaf)[row] for leaf in tree.flatten(structure)]


def test_an_action_has_the_environments_structure(parted: Parted, seen: Any) -> None:
    one = parted.policy.act_one(seen[0])
    assert ACTIONS.contains(one.env_actions) and type(one.env_actions["arm"][0]) is int
    kept = one.env_actions["steer"]
    before = kept.copy()
    parted.policy.act_one(seen[1])
    np.testing.assert_array_equal(kept, before, "what the environment got is its own")


def test_one_by_one_or_together_is_the_same(parted: Parted, seen: Any) -> None:
    first, second = Policy.load(parted.blob, seed=9), Policy.load(parted.blob, seed=9)
    for policy in (first, second):
        policy.apply(0, weights_body(parted.blob, parted.module.get_state()))
    together = first.act(seen)
    for row, observation in enumerate(seen):
        alone = second.act_one(observation)
        for mine, its in zip(tree.flatten(alone.env_actions), flat(together.env_actions, row), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)
        packing = layout_of_spaces(SEEN, ACTIONS).actions
        pairs = zip(packing.arrays(alone.actions[None]), packing.arrays(together.actions[row : row + 1]), strict=True)
        for mine, its in pairs:
            np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)
        assert alone.action_logp == pytest.approx(together.action_logp[row], rel=1e-5)


def test_each_part_follows_its_own_distribution(parted: Parted, seen: Any) -> None:
    rows = 20_000
    acted = parted.policy.act(np.repeat(seen[:1], rows, 0))
    arm, lean, lamps, _ = layout_of_spaces(SEEN, ACTIONS).actions.arrays(acted.actions)
    inputs = torch.from_numpy(acted.action_dist_inputs[0])
    at = 0
    for drawn, choices in ((arm, 3), (lamps[:, 0], 2), (lamps[:, 1], 4)):
        probable = torch.softmax(inputs[at : at + choices], 0).numpy()
        found = np.bincount(drawn, minlength=choices) / rows
        np.testing.assert_allclose(found, probable, atol=4 * np.sqrt(0.25 / rows))
        at += choices if choices != 3 else 5  # behind the first Discrete come mean and log std of the Box beside it
    z = (lean[:, 0] - float(inputs[3])) / float(inputs[4].exp())
    assert abs(z.mean()) < 4 / np.sqrt(rows) and abs(z.std() - 1) < 4 / np.sqrt(2 * rows)
    assert abs(np.corrcoef(z, arm)[0, 1]) < 4 / np.sqrt(rows), "the parts are drawn independently"


def test_the_service_answers_with_the_same(parted: Parted, seen: Any) -> None:
    zeros = np.zeros((6, *parted.policy.manifest.noise_shape), np.float32)
    local, remote = parted.policy.act(seen, zeros), parted.actor.act(seen, explore=False)
    np.testing.assert_allclose(local.action_dist_inputs, remote["action_dist_inputs"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(local.action_logp, remote["action_logp"], rtol=1e-4, atol=1e-4)
    layout = layout_of_spaces(SEEN, ACTIONS)
    theirs = layout.env_actions.unpack(remote["env_actions"])
    for mine, its in zip(tree.flatten(local.env_actions), tree.flatten(theirs), strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-5, atol=1e-5)


def test_a_learner_gets_the_structure(parted: Parted, seen: Any) -> None:
    acted = parted.policy.act(seen[:-1])
    builder = EpisodeBuilder(SEEN, ACTIONS, parted.module)
    (built,), refused = builder.build([fragment(seen, actions=acted.actions, action_logp=acted.action_logp)])
    assert not refused
    episode = built.episode
    assert len(episode) == 5 and episode.get_actions().keys() == {"arm", "lamps", "steer"}
    given = tree.map_structure(torch.from_numpy, episode.get_actions())
    inputs = torch.from_numpy(episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS))
    logp = parted.module.get_train_action_dist_cls().from_logits(inputs).logp(given)
    np.testing.assert_allclose(logp, acted.action_logp, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("part", "value", "text"),
    [(0, 3, r"action\['arm'\]\[0\]' must be integers from 0 to 2"), (3, np.nan, r"action\['steer'\]' holds NaN")],
)
def test_a_part_that_does_not_fit_is_named(parted: Parted, seen: Any, part: int, value: Any, text: str) -> None:
    packing = layout_of_spaces(SEEN, ACTIONS).actions
    arrays = packing.arrays(parted.policy.act(seen[:-1]).actions)
    arrays[part][1] = value
    broken = packing.join(packing.structure(arrays), 5)
    builder = EpisodeBuilder(SEEN, ACTIONS, parted.module)
    for actions, said in ((broken, text), (broken[:, :-1].copy(), r"actions of this space are packed as uint8\[36\]")):
        built, (refusal,) = builder.build([fragment(seen, actions=actions)])
        assert not built
        with pytest.raises(ProtocolError, match=said):
            raise refusal.error


def logged() -> FragmentBuilder:
    builder = FragmentBuilder("e")
    builder.begin(layout_of_spaces(SEEN, ACTIONS), "logged", Origin("r", 0), 10)
    builder.observe(np.zeros(3, np.float32))
    return builder


def test_actions_of_ones_own_are_packed_alike() -> None:
    builder = logged()
    action = {"arm": (2, [0.5]), "steer": np.float32([1, -1]), "lamps": np.array([1, 3])}
    builder.log(action, -0.5)
    builder.observe(np.zeros(3, np.float32))
    arm, lean, lamps, steer = layout_of_spaces(SEEN, ACTIONS).actions.arrays(builder.cut().arrays["actions"])
    assert (arm.tolist(), lean.tolist(), lamps.tolist(), steer.tolist()) == ([2], [[0.5]], [[1, 3]], [[1, -1]])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"arm": (3, [0.5])}, r"an action\['arm'\]\[0\] of 0 to 2, got 3"),
        ({"arm": (1,)}, r"an action has no action\['arm'\]\[1\]"),
        ({"arm": (1, [np.inf])}, r"a finite action\['arm'\]\[1\]"),
        ({"steer": np.zeros(3, np.float32)}, r"one action\['steer'\] of shape \(2,\)"),
    ],
)
def test_actions_of_ones_own_that_do_not_fit_are_refused(change: dict[str, Any], text: str) -> None:
    action = {"arm": (2, [0.5]), "steer": np.float32([1, -1]), "lamps": np.array([1, 3])} | change
    with pytest.raises(EpisodeError, match=text):
        logged().log(action, -0.5)


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (Dict({"a": Discrete(2), "b": Tuple((MultiBinary(2),))}), r"action\['b'\]\[0\]: actions of MultiBinary"),
        (Tuple((Discrete(2), Text(3))), r"action\[1\]: actions of Text"),
        (MultiBinary(3), "RLlib has no distribution for MultiBinary"),
    ],
)
def test_parts_that_nobody_acts_in_are_refused_by_name(parted: Parted, space: gym.Space[Any], text: str) -> None:
    with pytest.raises(SpaceError, match=text):
        layout_of_spaces(SEEN, space)
    with pytest.raises(PolicyError, match=text):
        export_policy(parted.module, SEEN, space)


def test_a_manifest_whose_parts_do_not_fit_is_refused(parted: Parted) -> None:
    import msgspec

    manifest, graph = unpack_policy(parted.blob)
    for change, text in (
        ({"action_parts": manifest.action_parts[:2]}, "the 2 parts of an action take 12 bytes"),
        ({"packed_action": None}, "parts of an action take"),
        ({"noise_runs": manifest.noise_runs[1:]}, "a row of noise is"),
    ):
        with pytest.raises(PolicyError, match=text):
            unpack_policy(pack_policy(msgspec.structs.replace(manifest, **change), graph))


def test_a_vector_of_environments_takes_them(parted: Parted, seen: Any) -> None:
    class World(gym.Env[Any, Any]):
        observation_space, action_space = SEEN, ACTIONS
        given: list[Any] = []  # noqa: RUF012

        def reset(self, **_: Any) -> Any:
            return np.zeros(3, np.float32), {}

        def step(self, action: Any) -> Any:
            self.given.append(action)
            assert ACTIONS.contains(action)
            return np.zeros(3, np.float32), 0.0, False, False, {}

    envs = gym.vector.SyncVectorEnv([World, World, World])
    envs.reset()
    room = _blank_actions(ACTIONS, 3)
    acted = parted.policy.act(seen[:2]).env_actions
    _put(room, [0, 2], acted)
    envs.step(room)
    for mine, its in zip(tree.flatten(World.given[2]), flat(acted, 1), strict=True):
        np.testing.assert_allclose(mine, its)
