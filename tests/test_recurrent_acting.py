"""The memory of a recurrent policy while simulators act, by themselves or through the service: real sockets, no Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from fake_training import RUNS, Training, broker, training, until
from numpy.typing import NDArray
from recurrent_module import ACT as ACTIONS
from recurrent_module import OBS as OBSERVATIONS
from recurrent_module import Forgetful, Learned, made
from test_service import answered

from rllink_zmq import connect
from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.drive_loops import drive
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.errors import EpisodeError, PolicyError
from rllink_zmq.messages import ACT
from rllink_zmq.policy import Policy, unpack_policy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.rllib.service import ActService

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

NAMES = ["lstm/c", "lstm/h", "trace"]
SPACES: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}


@cache
def blob() -> bytes:
    return export_policy(made(), OBSERVATIONS, ACTIONS)


def body(seed: int) -> bytes:
    return weights_body(blob(), made(seed=seed).get_state())


class Counts(gym.Env[NDArray[Any], int]):
    """Episodes of `length` steps; observations tell the step, the environment and the last action."""

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def __init__(self, length: int) -> None:
        self._length = length
        self._t = 0

    def reset(self, **_: Any) -> tuple[NDArray[Any], dict[str, Any]]:
        self._t = 0
        return self._seen(0), {}

    def step(self, action: int) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        self._t += 1
        return self._seen(action), 1.0, self._t == self._length, False, {}

    def _seen(self, action: int) -> NDArray[Any]:
        return np.array([self._t % 7 / 5, self._length % 9 / 5, action], np.float32)


@contextmanager
def acting(inference: str, fragment_steps: int = 4) -> Iterator[tuple[str, Training]]:
    """Broker and learner's side, and a service where it is asked: (address for simulators, learner's side)."""
    with (
        broker() as server,
        training(
            server, blob=blob(), body=body(1), observation_space=OBSERVATIONS, fragment_steps=fragment_steps
        ) as learner,
    ):
        if inference == "local":
            yield server.frontend, learner
            return
        actor = ModuleActor(made(), unpack_policy(blob())[0], ACTIONS, True, False)
        service = ActService(server.backend, RUNS[0], "service", actor)
        try:
            yield server.frontend, learner
        finally:
            service.stop()


def check(learner: Training, seeds: dict[int, int]) -> dict[str, int]:
    """Goes through all that was taken, step by step, with the module. `seeds`: version -> of its weights. Returns
    episode -> steps."""
    modules = {version: made(seed=seed).eval() for version, seed in seeds.items()}
    memory = Memory(modules[min(modules)])
    last: dict[str, list[NDArray[Any]]] = {}
    steps: dict[str, int] = {}
    for header, arrays in sorted(learner.taken, key=lambda taken: (taken[0].episode, taken[0].t0)):
        columns = [arrays[f"state_in/{name}"] for name in NAMES]
        assert header.t0 == steps.get(header.episode, 0)
        steps[header.episode] = header.t0 + header.steps
        for column, start in zip(columns, last.get(header.episode, memory.start), strict=True):
            np.testing.assert_allclose(column[0], start, atol=1e-6)
        module = modules[header.version]
        with torch.no_grad():
            before = [torch.from_numpy(column[:-1].copy()) for column in columns]
            batch = memory.batch(torch.from_numpy(arrays["obs"][:-1].copy()), before)
            out, after = memory.answer(module.forward_exploration(batch))
        np.testing.assert_allclose(arrays["action_dist_inputs"], out["action_dist_inputs"], atol=1e-5)
        for column, expected in zip(columns, after, strict=True):
            np.testing.assert_allclose(column[1:], expected, atol=1e-5)
        last[header.episode] = [column[-1] for column in columns]
    return steps


@pytest.fixture(params=["local", "remote"])
def inference(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def test_an_episode_remembers_and_the_next_one_begins_anew(inference: str) -> None:
    with acting(inference) as (address, learner), connect(address, inference=inference, **SPACES) as client:  # type: ignore[arg-type]
        drive(client, Counts(11), episodes=2)
        until(lambda: learner.steps == 22, "all is taken")
        assert sorted(check(learner, {0: 1}).values()) == [11, 11]
        assert {header.steps for header, _ in learner.taken} == {4, 3}


def test_a_vector_has_episodes_that_begin_beside_others_that_go_on(inference: str) -> None:
    envs = gym.vector.SyncVectorEnv([lambda n=n: Counts(n) for n in (3, 5, 7)])
    with (
        acting(inference) as (address, learner),
        connect(address, inference=inference, episodes=3, **SPACES) as client,  # type: ignore[arg-type]
    ):
        drive_vector(client, envs, steps=60)
        until(lambda: learner.steps == client.stats.steps, "all is taken")
        assert len(check(learner, {0: 1})) > 9


def test_the_memory_goes_on_where_the_weights_change(inference: str) -> None:
    with acting(inference) as (address, learner), connect(address, inference=inference, **SPACES) as client:  # type: ignore[arg-type]
        env = Counts(1_000_000)
        observation, _ = env.reset()
        with client.start_episode() as episode:

            def step() -> int:
                nonlocal observation
                observation, reward, *_ = env.step(episode.get_action(observation))
                episode.log_returns(reward)
                return episode.builder.origin.version

            for _ in range(6):
                step()
            learner.publish(1, body(2))
            until(lambda: step() == 1, "it acts by the new weights")
            for _ in range(6):
                step()
            episode.end_episode(observation, truncated=True)
        until(lambda: learner.steps == client.stats.steps, "all is taken")
        assert {header.version for header, _ in learner.taken} == {0, 1}
        check(learner, {0: 1, 1: 2})


def test_what_the_simulator_chose_is_refused_with_the_reason(inference: str) -> None:
    with acting(inference) as (address, _), connect(address, inference=inference, **SPACES) as client:  # type: ignore[arg-type]
        env = Counts(9)
        observation, _ = env.reset()
        with client.start_episode() as episode:
            episode.get_action(observation)
            with pytest.raises(EpisodeError, match="recurrent"):
                episode.log_action(observation, 1, -0.5)


def test_one_that_is_not_trained_on_remembers_too(inference: str) -> None:
    with acting(inference) as (address, _), connect(address, inference=inference, **SPACES) as client:  # type: ignore[arg-type]
        module, memory = made().eval(), Memory(made())
        state = [torch.from_numpy(array) for array in memory.starts(1)]
        env = Counts(9)
        observation, _ = env.reset()
        with client.start_episode(training_enabled=False, explore=False) as episode:
            for _ in range(8):
                with torch.no_grad():
                    batch = memory.batch(torch.from_numpy(observation[np.newaxis]), state)
                    out, state = memory.answer(module.forward_inference(batch))
                action = episode.get_action(observation)
                assert action == int(out["action_dist_inputs"].argmax())
                observation, *_ = env.step(action)


# ---- one call


def test_a_policy_that_begins_with_something_else_than_zeros() -> None:
    manifest, _ = unpack_policy(blob())
    assert [(state.name, state.shape) for state in manifest.state] == [
        ("lstm/c", (2, 4)), ("lstm/h", (2, 4)), ("trace", (3,)),
    ]  # fmt: skip
    assert [bool(state.initial) for state in manifest.state] == [False, True, True]
    assert manifest.state[2].start.tolist() == [0, 1, 2]
    policy = Policy.load(blob(), seed=0)
    policy.apply(0, body(1))
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    one = together = None
    for row in rows:
        acted = policy.act_one(row, False, one)
        one = tuple(array.copy() for array in acted.state)
        batch = policy.act(np.stack([row, row]), explore=False, state=together)
        together = batch.state
        for mine, of_all in zip(one, together, strict=True):
            np.testing.assert_allclose(of_all, np.stack([mine, mine]), atol=1e-6)
    with pytest.raises(PolicyError, match="a state of 3 arrays, got 1"):
        policy.act_one(rows[0], state=one[:1])  # type: ignore[index]
    with pytest.raises(PolicyError, match="expected a state of shapes"):
        policy.act_one(rows[0], state=[np.zeros(3, np.float32)] * 3)


def test_what_it_remembered_last_may_be_given_as_it_is() -> None:
    policy, other = Policy.load(blob(), seed=0), Policy.load(blob(), seed=0)
    policy.apply(0, body(1))
    other.apply(0, body(1))
    acted = mine = None
    for row in np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32):
        acted = policy.act_one(row, True, None if acted is None else acted.state)
        mine = other.act_one(row, True, None if mine is None else [array.copy() for array in mine.state])
        np.testing.assert_array_equal(acted.action_dist_inputs, mine.action_dist_inputs)


def test_a_start_that_is_learned_and_a_memory_that_is_none_are_refused() -> None:
    with pytest.raises(PolicyError, match=r"Learned\.get_initial_state changes with the weights"):
        export_policy(made(Learned), OBSERVATIONS, ACTIONS)
    with pytest.raises(PolicyError, match=r"Forgetful\.forward_exploration fails"):
        export_policy(made(Forgetful), OBSERVATIONS, ACTIONS)


class Served:
    """What `test_service.answered` wants."""

    def __init__(self) -> None:
        self.actor = ModuleActor(made(), unpack_policy(blob())[0], ACTIONS, True, False)
        self.actor.apply(0, body(1))


def ask(request: int, arrays: dict[str, NDArray[Any]]) -> tuple[ACT, bytes]:
    columns, buffers = to_buffers(arrays)
    return ACT(b"s" * 16, request, len(arrays["obs"]), columns), b"".join(buffers)


def test_a_request_brings_its_memory_and_gets_the_next() -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(4, 3)).astype(np.float32)
    shapes = {"lstm/c": (2, 4), "lstm/h": (2, 4), "trace": (3,)}
    state = {f"state_in/{name}": rng.normal(size=(4, *shape)).astype(np.float32) for name, shape in shapes.items()}
    mixed = np.array([False, True, False, True])
    said = answered(
        Served(),  # type: ignore[arg-type]
        ask(1, {"obs": rows, **state}),
        ask(2, {"obs": rows, **state, "starts": mixed}),
        ask(3, {"obs": rows}),
        explore=False,
    )
    found = {message.request: from_body(message.columns, [data]) for message, data in said}
    start = [np.stack([array] * 4) for array in Memory(made()).start]
    policy = Policy.load(blob(), seed=0)
    policy.apply(0, body(1))
    given = list(state.values())
    for request, before in (
        (1, given),
        (2, [np.where(mixed.reshape(4, *[1] * (a.ndim - 1)), b, a) for a, b in zip(given, start, strict=True)]),
        (3, start),
    ):
        expected = policy.act(rows, explore=False, state=before)
        np.testing.assert_allclose(found[request]["action_dist_inputs"], expected.action_dist_inputs, atol=1e-5)
        for name, b, after in zip(NAMES, before, expected.state, strict=True):
            np.testing.assert_allclose(found[request][f"state_out/{name}"], after, atol=1e-5)
            if request > 1:  # who begins is told with what
                np.testing.assert_array_equal(found[request][f"state_in/{name}"], b)


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "unknown", "starts"])
def test_a_memory_that_does_not_fit_is_told(change: str) -> None:
    arrays: dict[str, NDArray[Any]] = {
        "obs": np.zeros((1, 3), np.float32), "state_in/lstm/c": np.zeros((1, 2, 4), np.float32),
        "state_in/lstm/h": np.zeros((1, 2, 4), np.float32), "state_in/trace": np.zeros((1, 3), np.float32),
    }  # fmt: skip
    arrays |= {
        "missing": {},
        "shape": {"state_in/trace": np.zeros((1, 4), np.float32)},
        "dtype": {"state_in/trace": np.zeros((1, 3), np.float64)},
        "unknown": {"state_in/other": np.zeros((1, 3), np.float32)},
        "starts": {"starts": np.zeros(1, np.int64)},
    }[change]
    if change == "missing":
        del arrays["state_in/trace"]
    ((message, _),) = answered(Served(), ask(1, arrays))  # type: ignore[arg-type]
    assert message.code == "malformed"
    assert message.text.startswith("expected the policy's memory before this step, state_in/lstm/c float32[2, 4]")
