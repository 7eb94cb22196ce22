"""`rllink_zmq.rllib.export` against RLlib itself: the same weights must act the same."""

import logging
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.connectors.module_to_env import GetActions
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchDeterministic
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action

from rllink_zmq.errors import PolicyError
from rllink_zmq.policy import Policy, policy_hash, unpack_policy
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.rllib.export_connectors import check_connectors


def ppo_module(observation_space, action_space, inference_only=True, **model_config):
    config = PPOConfig().environment(observation_space=observation_space, action_space=action_space)
    config.rl_module(model_config=model_config)
    spaces = {DEFAULT_MODULE_ID: (observation_space, action_space)}
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    return config.get_rl_module_spec(spaces=spaces, inference_only=inference_only).build()


SMALL = {"fcnet_hiddens": [16, 16]}
UNBOUNDED = Box(-np.inf, np.inf, (2,))
TINY_CNN = {"conv_filters": [[4, 3, 2], [8, 3, 2]], "head_fcnet_hiddens": [8]}
CARTPOLE = gym.spaces.Box(np.float32([-4.8, -np.inf, -0.4, -np.inf]), np.float32([4.8, np.inf, 0.4, np.inf]))

# name -> observation space, action space, model config, how actions go to the env
CASES = {
    "discrete": (CARTPOLE, Discrete(3, start=5), {}, {}),
    "multi_discrete": (Box(-1, 1, (3,)), MultiDiscrete([2, 4]), SMALL, {}),
    "bounded": (Box(-1, 1, (3,)), Box(np.float32([-2, 0]), np.float32([2, 100])), SMALL, {}),
    "bounded_float64": (Box(-1, 1, (3,), np.float64), Box(-3, 1, (2,), np.float64), SMALL, {}),
    "unbounded": (Box(-1, 1, (3,)), UNBOUNDED, SMALL | {"vf_share_layers": True}, {}),
    "clipped_free_std": (
        Box(-1, 1, (3,)),
        Box(np.float32([-0.5, -np.inf]), np.float32([0.5, 1])),
        SMALL | {"free_log_std": True},
        {"normalize_actions": False, "clip_actions": True},
    ),
    "atari": (Box(-1, 1, (84, 84, 4)), Discrete(4), {}, {}),
    "small_image": (Box(0, 1, (12, 12, 3)), Box(-1, 1, (1,)), TINY_CNN, {}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """(module with weights that matter, blob, policy with those weights, the case)."""
    torch.manual_seed(1)
    observation_space, action_space, model_config, to_env = CASES[request.param]
    module = ppo_module(observation_space, action_space, **model_config)
    blob = export_policy(module, observation_space, action_space, **to_env)
    # Weights that were not there at the export, and make all outputs matter (RLlib starts with tiny heads).
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape) / parameter[0].numel() ** 0.5
    policy = Policy.load(blob, seed=3)
    policy.apply(1, weights_body(blob, module.get_state()))
    return module, blob, policy, CASES[request.param]


def observations_of(space, count=64):
    shape = (count, *space.shape)
    return np.random.default_rng(2).normal(size=shape).astype(space.dtype)


def test_it_acts_as_rllib_does(case):
    module, _, policy, (observation_space, action_space, _, to_env) = case
    observations = observations_of(observation_space)
    acted = policy.act(observations)
    logits = module.forward_exploration({Columns.OBS: torch.from_numpy(observations).float()})[
        Columns.ACTION_DIST_INPUTS
    ]
    np.testing.assert_allclose(acted.action_dist_inputs, logits.numpy(), atol=1e-5, rtol=1e-5)

    ours = torch.from_numpy(acted.action_dist_inputs)
    distribution = module.get_exploration_action_dist_cls().from_logits(ours)
    logp = distribution.logp(torch.from_numpy(acted.actions))
    np.testing.assert_allclose(acted.action_logp, logp.numpy(), atol=1e-5, rtol=1e-5)
    sample = distribution.sample().numpy()
    assert (acted.actions.dtype, acted.actions.shape) == (sample.dtype, sample.shape)

    change = clip_action if to_env else unsquash_action
    for action, env_action in zip(acted.actions, acted.env_actions, strict=True):
        expected = np.asarray(change(action, action_space))
        assert env_action.dtype == expected.dtype
        np.testing.assert_allclose(env_action, expected, rtol=1e-6, atol=1e-6)
        if isinstance(action_space, Box):
            assert action_space.contains(env_action.astype(action_space.dtype))


def test_act_one_is_act(case):
    _, blob, policy, (observation_space, _, _, _) = case
    other = Policy.load(blob, seed=11)
    other.apply(1, weights_body(blob, case[0].get_state()))
    policy = Policy.load(blob, seed=11)
    policy.apply(1, weights_body(blob, case[0].get_state()))
    observations = observations_of(observation_space, 20)
    together = other.act(observations)
    for row, observation in enumerate(observations):
        for one, of_all in zip(policy.act_one(observation)[:4], together[:4], strict=True):
            np.testing.assert_allclose(one, of_all[row], atol=1e-5, rtol=1e-5)


def test_actions_follow_the_distribution(case):
    module, _, policy, (observation_space, action_space, _, _) = case
    if len(observation_space.shape) == 3:
        pytest.skip("the head is the same as of vectors")
    rows = 20_000
    acted = policy.act(np.repeat(observations_of(observation_space, 1), rows, 0))
    inputs = torch.from_numpy(acted.action_dist_inputs[:1])
    if isinstance(action_space, Box):
        mean, log_std = inputs[0].numpy().reshape(2, -1)
        z = (acted.actions - mean) / np.exp(log_std)
        np.testing.assert_allclose(z.mean(0), 0, atol=4 / np.sqrt(rows))
        np.testing.assert_allclose(z.std(0), 1, atol=4 / np.sqrt(2 * rows))
        assert abs((z[:, 0] * z[:, 1]).mean()) < 4 / np.sqrt(rows)
    else:
        distribution = module.get_exploration_action_dist_cls().from_logits(inputs)
        kinds, counts = np.unique(acted.actions.reshape(rows, -1), axis=0, return_counts=True)
        shaped = torch.from_numpy(kinds).reshape(len(kinds), *acted.actions.shape[1:])
        expected = rows * np.exp(np.array([float(distribution.logp(kind[None])) for kind in shaped]))
        assert expected.sum() == pytest.approx(rows, rel=1e-4)
        freedom = len(kinds) - 1
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_the_manifest_says_what_travels(case):
    module, blob, policy, (observation_space, _, _, _) = case
    manifest, graph = unpack_policy(blob)
    assert manifest.module == "DefaultPPOTorchRLModule"
    assert (manifest.observation.dtype, manifest.observation.shape) == ("float32", observation_space.shape)
    state = module.get_state()
    assert {weight.name for weight in manifest.weights} <= set(state)
    assert {name for name, _ in module.named_parameters()} <= {weight.name for weight in manifest.weights}
    assert policy.weights_bytes == sum(state[weight.name].nbytes for weight in manifest.weights)
    assert len(graph) < 10_000  # no weights in it
    for leaked in (b"rllink_zmq", b".py", b"torch", b"pkg."):
        assert leaked not in graph


PRINT_HASH = """
import sys
sys.path.insert(0, {here!r})
import test_export, torch
from rllink_zmq.policy import policy_hash
torch.manual_seed(99)
spaces = test_export.CARTPOLE, test_export.Discrete(2)
module = test_export.ppo_module(*spaces, **test_export.SMALL)
print("hash", policy_hash(test_export.export_policy(module, *spaces)))
"""


@pytest.fixture(scope="module", autouse=True)
def elsewhere(request):
    """Another process that exports, started first: it takes as long as a third of this file."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRINT_HASH.format(here=str(request.path.parent))],
        cwd=request.config.rootpath,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        yield process
        process.kill()


def test_the_hash_names_the_architecture(elsewhere):
    """The same in another process, with other weights, and for the learner's module; another for another network."""
    spaces = CARTPOLE, Discrete(2)
    here = export_policy(ppo_module(*spaces, inference_only=False, **SMALL), *spaces)
    other = export_policy(ppo_module(*spaces, fcnet_hiddens=[16, 17]), *spaces)
    relu = export_policy(ppo_module(*spaces, fcnet_activation="relu", **SMALL), *spaces)
    out, err = elsewhere.communicate(timeout=120)
    assert elsewhere.returncode == 0, err
    assert "torchvision" not in err  # the exporter's chatter
    assert out.split()[-2:] == ["hash", policy_hash(here)]
    assert len({policy_hash(here), policy_hash(other), policy_hash(relu)}) == 3


def test_weights_come_from_any_of_rllibs_states(case):
    module, blob, _, (observation_space, action_space, model_config, _) = case
    state = module.get_state()
    body = weights_body(blob, state)
    assert weights_body(unpack_policy(blob)[0], {DEFAULT_MODULE_ID: state}) == body
    assert weights_body(blob, {"mine": state}, module_id="mine") == body
    assert weights_body(blob, module.state_dict()) == body
    learners = ppo_module(observation_space, action_space, inference_only=False, **model_config)
    learners.load_state_dict({**learners.state_dict(), **module.state_dict()})
    assert weights_body(blob, learners.get_state()) == body
    assert weights_body(blob, learners.get_state(inference_only=True)) == body

    name = unpack_policy(blob)[0].weights[0].name
    with pytest.raises(PolicyError, match=f"lacks {name}"):
        weights_body(blob, {key: value for key, value in state.items() if key != name})
    for wrong in (state[name][..., :-1], state[name].astype(np.float64)):
        with pytest.raises(PolicyError, match=name):
            weights_body(blob, {**state, name: wrong})


# ---- what is refused ----------------------------------------------------------------------------------------------


class Custom(TorchRLModule):
    def setup(self):
        self.net = torch.nn.Linear(3, 2)

    def _forward(self, batch, **kwargs):
        return {Columns.ACTION_DIST_INPUTS: self.net(batch[Columns.OBS])}


class Branches(Custom):
    def _forward(self, batch, **kwargs):
        sign = 1.0 if float(batch[Columns.OBS].sum()) > 0 else -1.0
        return {Columns.ACTION_DIST_INPUTS: sign * self.net(batch[Columns.OBS])}


class Acts(Custom):
    def _forward(self, batch, **kwargs):
        return {Columns.ACTIONS: self.net(batch[Columns.OBS]).argmax(-1)}


class Random(Custom):
    def _forward(self, batch, **kwargs):
        logits = self.net(batch[Columns.OBS])
        return {Columns.ACTION_DIST_INPUTS: logits + torch.rand_like(logits)}


class Counts(Custom):
    calls = 0

    def _forward(self, batch, **kwargs):
        Counts.calls += 1
        return {Columns.ACTION_DIST_INPUTS: self.net(batch[Columns.OBS]) * float(Counts.calls)}


class Wide(Custom):
    def setup(self):
        self.net = torch.nn.Linear(3, 5)


class Other(Custom):
    def get_exploration_action_dist_cls(self):
        return TorchDeterministic


class Bytes(Custom):
    """What a module for raw pixels does: it casts by itself, and keeps statistics that are no parameters."""

    def setup(self):
        super().setup()
        self.norm = torch.nn.BatchNorm1d(3)

    def _forward(self, batch, **kwargs):
        return {Columns.ACTION_DIST_INPUTS: self.net(self.norm(batch[Columns.OBS].float() / 255.0))}


THREE = Box(-1, 1, (3,))


def custom(cls, observation_space=THREE):
    return cls(observation_space=observation_space, action_space=Discrete(2))


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Branches, "can't be exported: .*data-dependent"),
        (Acts, "answers with .*actions"),
        (Random, "differs from the module in action_dist_inputs"),
        (Counts, "differs from the module in action_dist_inputs"),
        (Wide, r"wants torch.float32\[2\]"),
        (Other, "TorchDeterministic"),
    ],
)
def test_a_module_the_graph_cant_hold_is_refused(cls, why, capfd):
    module = custom(cls).train()
    with pytest.raises(PolicyError, match=rf"(?s){cls.__name__}.*{why}") as refused:
        export_policy(module, THREE, Discrete(2))
    assert len(str(refused.value).splitlines()) == 1
    assert module.training
    assert capfd.readouterr() == ("", "")


def test_a_module_that_takes_bytes_is_given_bytes():
    space = Box(0, 255, (3,), np.uint8)
    module = custom(Bytes, space)
    blob = export_policy(module, space, Discrete(2))
    names = {weight.name for weight in unpack_policy(blob)[0].weights}
    assert names == {f"{a}.{b}" for a in ("net", "norm") for b in ("weight", "bias")} | {
        "norm.running_mean",
        "norm.running_var",
    }
    policy = Policy.load(blob)
    policy.apply(0, weights_body(blob, module.get_state()))
    observations = np.arange(12, dtype=np.uint8).reshape(4, 3) * 20
    with torch.no_grad():
        expected = module.forward_exploration({Columns.OBS: torch.from_numpy(observations)})
    np.testing.assert_allclose(
        policy.act(observations).action_dist_inputs, expected[Columns.ACTION_DIST_INPUTS].numpy(), atol=1e-5
    )


def test_what_rllibs_own_module_refuses_is_refused():
    space = Box(0, 255, (3,), np.uint8)
    with pytest.raises(PolicyError, match=r"fails on .* of uint8"):
        export_policy(ppo_module(space, Discrete(2), **SMALL), space, Discrete(2))


@pytest.mark.parametrize(
    "space",
    [Box(-1, 1, (2, 2)), Box(-1, 1, ()), Box(0, 3, (2,), np.int64), gym.spaces.Tuple([Discrete(2), Discrete(2)])],
)
def test_other_action_spaces_are_refused(space):
    with pytest.raises(PolicyError, match=r"Custom(: the action space .* is not supported| draws actions of several)"):
        export_policy(custom(Custom), THREE, space)


def test_other_observation_spaces_are_refused():
    for space in (gym.spaces.Text(3), gym.spaces.Dict({"a": THREE, "b": gym.spaces.Text(3)})):
        with pytest.raises(PolicyError, match=r"observations of .* can't travel"):
            export_policy(custom(Custom), space, Discrete(2))
    with pytest.raises(PolicyError, match=r"Custom\.forward_exploration fails"):
        export_policy(custom(Custom), gym.spaces.Dict({"a": THREE}), Discrete(2))


def test_default_connectors_are_fine():
    check_connectors(PPOConfig())
    check_connectors(PPOConfig().environment(observation_space=THREE, action_space=Discrete(2)))


def needs_an_env(env, *_):
    return MeanStdFilter(env.observation_space)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"env_to_module_connector": lambda *_: MeanStdFilter()}, "adds MeanStdFilter"),
        ({"env_to_module_connector": needs_an_env}, "adds needs_an_env"),
        (
            {"module_to_env_connector": lambda *_: [GetActions(), GetActions()]},
            "module_to_env_connector=.* adds GetActions, GetActions",
        ),
        ({"add_default_connectors_to_env_to_module_pipeline": False}, "add_default_connectors_to_env_to_module"),
        ({"add_default_connectors_to_module_to_env_pipeline": False}, "add_default_connectors_to_module_to_env"),
    ],
)
def test_user_connectors_are_refused_by_name(settings, named):
    with pytest.raises(PolicyError, match=named):
        check_connectors(PPOConfig().env_runners(**settings))
