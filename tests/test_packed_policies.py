"""Observations of several parts: the exported policy, the action service, RLlib's own pipelines beside each other."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule

from rllink_zmq.arrays import to_buffers
from rllink_zmq.errors import PolicyError, ProtocolError
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.packing import Packing
from rllink_zmq.policy import Policy, pack_policy, unpack_policy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.session_runner import Lease

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

OBSERVATIONS = gym.spaces.Dict(
    {"observations": gym.spaces.Box(-1.0, 1.0, (3,), np.float64), "action_mask": gym.spaces.Box(0.0, 1.0, (4,))}
)
ACTIONS = gym.spaces.Discrete(4)


def cast(value: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.asarray(value, dtype)


def observed(count: int) -> list[dict[str, NDArray[Any]]]:
    random = np.random.default_rng(1)
    masks = np.eye(4, dtype=np.float32)[random.permutation(4)] + np.eye(4, dtype=np.float32)
    return [
        {"observations": random.uniform(-1, 1, 3), "action_mask": masks[i % 4].clip(0, 1)} for i in range(count)
    ]  # fmt: skip


class Masked:
    """RLlib's module for action masks, its export, and the actor of a service."""

    def __init__(self) -> None:
        self.config = (
            PPOConfig()
            .environment(observation_space=OBSERVATIONS, action_space=ACTIONS)
            .rl_module(
                rl_module_spec=RLModuleSpec(
                    module_class=ActionMaskingTorchRLModule, model_config={"head_fcnet_hiddens": [8]}
                )
            )
        )
        torch.manual_seed(3)
        spaces = {DEFAULT_MODULE_ID: (OBSERVATIONS, ACTIONS)}
        self.module = self.config.get_rl_module_spec(spaces=spaces, inference_only=True).build()
        self.blob = export_policy(self.module, OBSERVATIONS, ACTIONS)
        self.manifest = unpack_policy(self.blob)[0]
        self.packing = Packing(OBSERVATIONS)
        body = weights_body(self.manifest, self.module.get_state())
        self.actor = ModuleActor(self.module, self.manifest, ACTIONS, True, False)
        self.actor.apply(0, body)
        self.policy = Policy.load(self.blob, seed=0)
        self.policy.apply(0, body)

    def rows(self, count: int) -> NDArray[np.uint8]:
        return np.stack([self.packing.pack(one, cast) for one in observed(count)])


@pytest.fixture(scope="module")
def masked() -> Masked:
    return Masked()


@pytest.mark.parametrize("explore", [True, False])
def test_the_service_acts_as_rllibs_own_pipelines_do(masked: Masked, explore: bool) -> None:
    spaces = dict.fromkeys((INPUT_ENV_SPACES, INPUT_ENV_SINGLE_SPACES, DEFAULT_MODULE_ID), (OBSERVATIONS, ACTIONS))
    to_module = masked.config.build_env_to_module_connector(env=None, spaces=spaces)
    to_env = masked.config.build_module_to_env_connector(env=None, spaces=spaces)
    episodes = []
    for one in observed(4):
        episodes.append(SingleAgentEpisode(observation_space=OBSERVATIONS, action_space=ACTIONS))
        episodes[-1].add_env_reset(one)
    shared: dict[str, Any] = {}
    torch.manual_seed(7)
    batch = to_module(rl_module=masked.module, batch={}, episodes=episodes, explore=explore, shared_data=shared)
    with torch.no_grad():
        out = (masked.module.forward_exploration if explore else masked.module.forward_inference)(batch)
    expected = to_env(rl_module=masked.module, batch=out, episodes=episodes, explore=explore, shared_data=shared)
    torch.manual_seed(7)
    found = masked.actor.act(masked.rows(4), explore)
    np.testing.assert_array_equal(found["actions"], np.stack(expected[Columns.ACTIONS]))
    np.testing.assert_allclose(found["action_dist_inputs"], np.stack(expected[Columns.ACTION_DIST_INPUTS]), rtol=1e-6)


def test_the_exported_policy_agrees_and_keeps_the_mask(masked: Masked) -> None:
    zeros = np.zeros((4, *masked.manifest.noise_shape), np.float32)
    local, remote = masked.policy.act(masked.rows(4), zeros), masked.actor.act(masked.rows(4), explore=False)
    np.testing.assert_allclose(local.action_dist_inputs, remote["action_dist_inputs"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(local.actions, remote["actions"])
    np.testing.assert_allclose(local.action_logp, remote["action_logp"], rtol=1e-4, atol=1e-5)
    allowed = np.stack([one["action_mask"] for one in observed(4)]).astype(bool)
    for i, row in enumerate(masked.rows(4)):
        taken = {masked.policy.act_one(row).actions for _ in range(60)}
        assert taken == set(np.flatnonzero(allowed[i])), "drawn actions are the allowed ones, and all of them"


def test_a_manifest_whose_parts_do_not_fill_a_row_is_refused(masked: Masked) -> None:
    import msgspec

    manifest, graph = unpack_policy(masked.blob)
    with pytest.raises(PolicyError, match="take 16 bytes, a row is"):
        unpack_policy(pack_policy(msgspec.structs.replace(manifest, parts=manifest.parts[:1]), graph))


def fragment(rows: NDArray[Any], **changes: NDArray[Any]) -> Lease:
    steps = len(rows) - 1
    arrays = {
        "obs": rows, "actions": np.zeros(steps, np.int64), "rewards": np.ones(steps, np.float32),
        "action_logp": np.full(steps, -1.0, np.float32),
    } | changes  # fmt: skip
    columns, body = to_buffers(arrays)
    message = FRAGMENT(
        session=b"s" * 16, number=1, episode="e", t0=0, steps=steps, end="terminated", run="r", version=0,
        return_so_far=0.0, columns=columns, base=1,
    )  # fmt: skip
    return Lease(message, tuple(body))


def test_fragments_become_episodes_with_the_observations_structure(masked: Masked) -> None:
    builder = EpisodeBuilder(OBSERVATIONS, ACTIONS, masked.module)
    (built,), refused = builder.build([fragment(masked.rows(4))])
    assert not refused
    episode = built.episode
    assert len(episode) == 3
    for i, one in enumerate(observed(4)):
        found = episode.get_observations(i)
        assert found.keys() == one.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(found[key], value.astype(np.float32))
    expected = masked.actor.act(masked.rows(4)[:-1], explore=False)["action_dist_inputs"]
    filled_in = episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
    np.testing.assert_allclose(filled_in, expected, rtol=1e-5, atol=1e-6)
    batch = masked.config.build_learner_connector(OBSERVATIONS, ACTIONS)(
        rl_module=masked.module, batch={}, episodes=[episode], shared_data={}
    )
    taken = batch[DEFAULT_MODULE_ID][Columns.OBS] if DEFAULT_MODULE_ID in batch else batch[Columns.OBS]
    assert {key: tuple(value.shape) for key, value in taken.items()} == {"observations": (3, 3), "action_mask": (3, 4)}


def test_rows_that_do_not_fit_are_refused_by_the_parts_name(masked: Masked) -> None:
    builder = EpisodeBuilder(OBSERVATIONS, ACTIONS, masked.module)
    broken = masked.rows(4)
    broken[2, :4] = 255  # NaN, in the mask: it is the first by name
    for rows, text in (
        (masked.rows(4)[:, :-1].copy(), r"packed as uint8\[28\]"),
        (masked.rows(4).astype(np.float32), r"rows of float32\[28\]"),
        (broken, r"obs\['action_mask'\]' holds NaN"),
    ):
        built, (refusal,) = builder.build([fragment(rows)])
        assert not built and isinstance(refusal.error, ProtocolError)
        with pytest.raises(ProtocolError, match=text):
            raise refusal.error
