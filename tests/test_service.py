"""The action service beside RLlib's own runner and the exported policy: the same module, observations and seed."""

from __future__ import annotations

from functools import cache
from typing import Any

import gymnasium as gym
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllink_zmq.arrays import to_buffers
from rllink_zmq.errors import ProtocolError, RllinkError
from rllink_zmq.messages import ACT, Column
from rllink_zmq.policy import Policy, PolicyManifest, unpack_policy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.rllib.service import ActService
from rllink_zmq.wire import check_body

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

BOX = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
ACTION_SPACES = {
    "discrete": gym.spaces.Discrete(3),
    "multi_discrete": gym.spaces.MultiDiscrete([3, 2]),
    "bounded": gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32)),
    "unbounded": gym.spaces.Box(-np.inf, np.inf, (2,), np.float32),
}


@cache
def exported(name: str, evaluation_explores: bool = True) -> tuple[PPOConfig, Any, bytes]:
    """Config, module and blob for the actions of this name. Nothing changes them."""
    action_space = ACTION_SPACES[name]
    config = (
        PPOConfig()
        .environment(observation_space=BOX, action_space=action_space)
        .rl_module(model_config={"fcnet_hiddens": [16]})
    )
    torch.manual_seed(3)
    spec = config.get_rl_module_spec(spaces={DEFAULT_MODULE_ID: (BOX, action_space)}, inference_only=True)
    module = spec.build()
    return config, module, export_policy(module, BOX, action_space, evaluation_explores=evaluation_explores)


class Made:
    """A PPO module, its export, and the actor of a service."""

    def __init__(self, name: str, **options: Any) -> None:
        self.action_space = ACTION_SPACES[name]
        self.config, self.module, self.blob = exported(name, **options)
        self.manifest: PolicyManifest = unpack_policy(self.blob)[0]
        self.body = weights_body(self.manifest, self.module.get_state())
        self.actor = ModuleActor(self.module, self.manifest, self.action_space, True, False)
        self.actor.apply(0, self.body)

    def rllib(self, observations: NDArray[Any], explore: bool) -> dict[str, Any]:
        """What RLlib's own pipelines make of the observations, one episode each."""
        spaces = {
            INPUT_ENV_SPACES: (BOX, self.action_space), INPUT_ENV_SINGLE_SPACES: (BOX, self.action_space),
            DEFAULT_MODULE_ID: (BOX, self.action_space),
        }  # fmt: skip
        to_module = self.config.build_env_to_module_connector(env=None, spaces=spaces)
        to_env = self.config.build_module_to_env_connector(env=None, spaces=spaces)
        episodes = []
        for row in observations:
            episode = SingleAgentEpisode(observation_space=BOX, action_space=self.action_space)
            episode.add_env_reset(row)
            episodes.append(episode)
        shared: dict[str, Any] = {}
        batch = to_module(rl_module=self.module, batch={}, episodes=episodes, explore=explore, shared_data=shared)
        with torch.no_grad():
            out = (self.module.forward_exploration if explore else self.module.forward_inference)(batch)
        answered: dict[str, Any] = to_env(
            rl_module=self.module, batch=out, episodes=episodes, explore=explore, shared_data=shared
        )
        return answered


@pytest.fixture(params=ACTION_SPACES)
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.param)


def rows(count: int = 5) -> NDArray[Any]:
    return np.random.default_rng(1).uniform(-1, 1, (count, 4)).astype(np.float32)


@pytest.mark.parametrize("explore", [True, False])
def test_it_acts_as_rllibs_own_runner_does(made: Made, explore: bool) -> None:
    torch.manual_seed(7)
    expected = made.rllib(rows(), explore)
    torch.manual_seed(7)
    found = made.actor.act(rows(), explore)
    np.testing.assert_array_equal(found["actions"], np.stack(expected[Columns.ACTIONS]))
    np.testing.assert_allclose(found["action_dist_inputs"], np.stack(expected[Columns.ACTION_DIST_INPUTS]), rtol=1e-6)
    if explore:
        np.testing.assert_allclose(found["action_logp"], np.stack(expected[Columns.ACTION_LOGP]), rtol=1e-6)
    for_env = found.get("env_actions", found["actions"])
    np.testing.assert_array_equal(for_env, np.stack(expected.get(Columns.ACTIONS_FOR_ENV, expected[Columns.ACTIONS])))


def test_it_and_the_exported_policy_agree(made: Made) -> None:
    """The same distribution, and of its most likely actions the same ones."""
    policy = Policy.load(made.blob, seed=0)
    policy.apply(0, made.body)
    local = policy.act(rows(), np.zeros((5, *made.manifest.noise_shape), np.float32))
    remote = made.actor.act(rows(), explore=False)
    np.testing.assert_allclose(local.action_dist_inputs, remote["action_dist_inputs"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(local.actions, remote["actions"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(local.action_logp, remote["action_logp"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        local.env_actions, remote.get("env_actions", remote["actions"]), rtol=1e-4, atol=1e-5
    )  # fmt: skip


def test_new_weights_act_and_the_module_they_were_copied_from_does_not_change(made: Made) -> None:
    before = {name: value.clone() for name, value in made.module.state_dict().items()}
    old = made.actor.act(rows(), explore=False)["action_dist_inputs"]
    made.actor.apply(1, np.frombuffer(made.body, "<f4").__mul__(2.0).astype("<f4").tobytes())
    assert made.actor.version == 1
    assert not np.allclose(old, made.actor.act(rows(), explore=False)["action_dist_inputs"])
    assert all(torch.equal(value, before[name]) for name, value in made.module.state_dict().items())
    with pytest.raises(RllinkError, match="weights 2 have 4 bytes"):
        made.actor.apply(2, b"four")
    assert made.actor.version == 1


# ---- batches, without a broker


class Said(list[tuple[Any, bytes]]):
    """Stands for the session: keeps what is answered."""

    def answer(self, message: Any, body: list[bytes], now: float) -> None:
        self.append((message, b"".join(body)))


def answered(made: Made, *asked: tuple[ACT, bytes], explore: bool = True) -> Said:
    service = ActService.__new__(ActService)
    service.actor, service.run, service._columns = made.actor, "run", {}
    service.batches = service.rows = 0
    said = service.session = Said()  # type: ignore[assignment]
    service._answer([(message, [body]) for message, body in asked], explore, 0.0)
    return said  # type: ignore[return-value]


def act(request: int, count: int, **changes: Any) -> tuple[ACT, bytes]:
    fields: dict[str, Any] = {"columns": (Column("obs", "<f4", (count, 4)),)}
    return ACT(b"s" * 16, request, count, **(fields | changes)), rows(count).tobytes()


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 3)], ids=["one each", "several each"])
def test_a_batch_is_cut_as_it_was_asked_for(made: Made, counts: tuple[int, ...]) -> None:
    said = answered(made, *(act(i, count) for i, count in enumerate(counts)), explore=False)
    from rllink_zmq.arrays import from_body

    for (message, body), count in zip(said, counts, strict=True):
        arrays = from_body(message.columns, [body])
        expected = made.actor.act(rows(count), explore=False)
        assert list(arrays) == list(expected) and message.version == 0
        for name, array in arrays.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_told_and_the_rest_is_answered() -> None:
    made = Made("discrete")
    said = answered(
        made,
        act(1, 1),
        act(2, 1, columns=(Column("obs", "<f4", (1, 2, 2)),)),
        act(3, 1, columns=(Column("obs", "<f8", (1, 2)),)),
        act(4, 1, columns=(Column("pixels", "<f4", (1, 4)),)),
        act(5, 1, module="other"),
    )
    by_request = {message.request: message for message, _ in said}
    assert by_request[1].code == "" and by_request[1].columns
    assert by_request[2].text.startswith("expected observations of float32[4], got float32[2, 2]")
    assert by_request[3].text.startswith("expected observations of float32[4], got float64[2]")
    assert by_request[4].text == "expected one column 'obs', got pixels"
    assert by_request[5].text == "there is no module 'other' here: leave it out"
    assert {m.code for r, m in by_request.items() if r > 1} == {"malformed"}


def test_what_comes_beside_the_observations_is_checked() -> None:
    """Of a policy that looks at two observations before the newest one."""
    made = Made("discrete")
    service = ActService.__new__(ActService)
    service.actor = ModuleActor(
        made.module, msgspec.structs.replace(made.manifest, lookback=2), made.action_space, True, False
    )  # fmt: skip
    obs, before = np.zeros((3, 4), np.float32), np.zeros((3, 2, 4), np.float32)
    counts = np.array([0, 1, 2], np.int32)
    done = {"actions_before": np.zeros((3, 2), np.int64), "rewards_before": np.zeros((3, 2), np.float32)}
    infinite = done | {"rewards_before": np.full((3, 2), np.inf, np.float32)}
    unknown = done | {"actions_before": np.full((3, 2), -1, np.int64)}
    dark = np.full((3, 2, 4), np.nan, np.float32)
    for beside, text in (
        ({}, ""),
        ({"obs_before": before, **done, "steps_before": counts}, ""),
        (
            {"obs_before": before[:, :1], **done, "steps_before": counts},
            "expected obs_before float32[2, 4], actions_before int64[2], rewards_before float32[2], steps",
        ),
        ({"obs_before": before}, "got obs_before float32[2, 4]"),
        ({"obs_before": before, "steps_before": counts}, "got obs_before float32[2, 4], steps_before"),
        ({"obs_before": before, **done, "steps_before": counts + 1}, "'steps_before' must be from 0 to 2"),
        ({"obs_before": before, **done, "steps_before": counts - 1}, "'steps_before' must be from 0 to 2"),
        ({"obs_before": before, **infinite, "steps_before": counts}, "'rewards_before' holds NaN or infinity"),
        ({"obs_before": before, **unknown, "steps_before": counts}, "'actions_before' must be integers from 0 to"),
        ({"obs_before": dark, **done, "steps_before": counts}, "'obs_before' holds NaN or infinity"),
        ({"obs_before": dark, **unknown, "steps_before": 0 * counts}, ""),
        ({"state_in/h": before}, "expected the policy's memory"),
    ):
        columns, body = to_buffers({"obs": obs, **beside})
        said = service._misfit(ACT(b"s" * 16, 1, 3, columns), body)
        assert said == text if not text else text in said, (said, text)


def test_two_columns_of_one_name_do_not_reach_a_service() -> None:
    columns, body = to_buffers({"obs": np.zeros((1, 4), np.float32)})
    message = ACT(b"s" * 16, 1, 1, columns * 2)
    with pytest.raises(ProtocolError, match="two columns of request 1 have one name"):
        check_body(message, body * 2)


def test_many_that_overflow_are_sorted_out_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made("discrete")
    calls = []
    acts = made.actor.act
    monkeypatch.setattr(made.actor, "act", lambda *given, **more: calls.append(1) or acts(*given, **more))
    asked = [act(i, 1) for i in range(40)]
    for i in (3, 30):
        asked[i] = (asked[i][0], np.full((1, 4), np.inf, np.float32).tobytes())
    said = answered(made, *asked)
    codes = {m.request: (m.code, m.text) for m, _ in said}
    assert len(codes) == 40 and len(calls) == 1
    assert {r for r, (code, _) in codes.items() if code} == {3, 30}
    assert codes[3] == ("malformed", "the observation in row 0 holds NaN or infinity")


def test_a_module_that_raises_is_told_to_all_who_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made("discrete")

    def fails(*args: Any) -> Any:
        raise ValueError("no GPU left")

    monkeypatch.setattr(made.actor, "act", fails)
    said = answered(made, act(1, 1), act(2, 3))
    assert [(m.request, m.code, m.text) for m, _ in said] == [
        (1, "failed", "ValueError: no GPU left"), (2, "failed", "ValueError: no GPU left"),
    ]  # fmt: skip


def test_what_nobody_says_is_as_training_or_evaluation_does() -> None:
    made = Made("discrete")
    service = ActService.__new__(ActService)
    service.actor, service._explores = made.actor, True
    greedy = Made("discrete", evaluation_explores=False).actor
    for actor, evaluation, said, expected in (
        (made.actor, False, None, True), (made.actor, True, None, True), (greedy, True, None, False),
        (greedy, False, None, True), (greedy, True, True, True), (made.actor, False, False, False),
    ):  # fmt: skip
        service.actor = actor
        assert service._draws(ACT(b"s" * 16, 1, 1, (), explore=said, evaluation=evaluation)) is expected


def test_one_observation_that_overflows_is_its_own_askers_trouble() -> None:
    made = Made("discrete")
    message, _ = act(2, 1)
    said = answered(made, act(1, 1), (message, np.full((1, 4), np.nan, np.float32).tobytes()), act(3, 2))
    assert sorted((m.request, m.code) for m, _ in said) == [(1, ""), (2, "malformed"), (3, "")]
