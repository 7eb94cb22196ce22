"""Columns of a vector beside episodes that go one by one: memory and several parts, with the same noise."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import parted_env
import pytest
import torch
import tree
from fake_training import Training, broker, training, until
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from parted_env import Parted
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core import DEFAULT_MODULE_ID
from test_recurrent_acting import ACTIONS, OBSERVATIONS, Counts, acting, blob, body, check

from rllink_zmq import connect
from rllink_zmq.client import Client
from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.errors import EpisodeError
from rllink_zmq.fragments import Origin
from rllink_zmq.fragments_block import BlockBuilder
from rllink_zmq.policy import unpack_policy
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.policies import policy_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
N = 3
STEPS = 50
PARTED = parted_env.OBSERVATIONS, parted_env.ACTIONS
SPACES = OBSERVATIONS, ACTIONS


class Policy(NamedTuple):
    """An exported policy, its weights, the spaces that it is of, and environments."""

    blob: bytes
    body: bytes
    spaces: tuple[Any, Any]
    envs: list[Any]


@cache
def parted() -> Policy:
    """RLlib's own model of several parts, with a memory."""
    config = PPOConfig().environment(observation_space=PARTED[0], action_space=PARTED[1])
    config.env_runners(env_to_module_connector=lambda env, spaces, device: FlattenObservations())
    config.rl_module(model_config={"fcnet_hiddens": [8], "use_lstm": True, "lstm_cell_size": 6, "max_seq_len": 5})
    torch.manual_seed(0)
    spaces = {DEFAULT_MODULE_ID: (Pipelines(config).to_module.observation_space, PARTED[1])}
    module = config.get_rl_module_spec(spaces=spaces, inference_only=True).build()
    made = policy_of(config, module)
    return Policy(made, weights_body(made, module.get_state()), PARTED, [Parted] * N)


def policy_with(what: str) -> Policy:
    if what == "memory":
        return Policy(blob(), body(1), SPACES, [lambda n=n: Counts(n) for n in (3, 5, 7)])
    return parted()


def by_episodes(client: Client, envs: list[Any]) -> None:
    """What `drive_vector` does, without columns."""
    observations = [env.reset(seed=i)[0] for i, env in enumerate(envs)]
    episodes = [client.start_episode() for _ in envs]

    def one(actions: Any, i: int) -> Any:
        if isinstance(actions, dict):
            return {key: one(inner, i) for key, inner in actions.items()}
        return tuple(one(inner, i) for inner in actions) if isinstance(actions, tuple) else actions[i]

    for _ in range(STEPS):
        actions = client.get_actions(episodes, observations)
        for i, env in enumerate(envs):
            observations[i], reward, terminated, truncated, _ = env.step(one(actions, i))
            episodes[i].log_returns(float(reward))
            if terminated or truncated:
                episodes[i].end_episode(observations[i], truncated=not terminated)
                observations[i], episodes[i] = env.reset()[0], client.start_episode()
    for episode, observation in zip(episodes, observations, strict=True):
        if episode.steps:
            episode.end_episode(observation, truncated=True)


def episodes_of(learner: Training) -> list[dict[str, Any]]:
    """Whole episodes, in an order that only what they hold decides."""
    found: defaultdict[str, list[Any]] = defaultdict(list)
    for header, arrays in sorted(learner.taken, key=lambda taken: (taken[0].episode, taken[0].t0)):
        found[header.episode].append((header, arrays))
    whole = []
    for parts in found.values():
        t0 = 0
        for header, _ in parts:
            assert (header.t0, header.end == "no") == (t0, header is not parts[-1][0])
            t0 += header.steps
        columns = {
            name: np.concatenate([*(a[name][: h.steps] for h, a in parts), parts[-1][1][name][parts[-1][0].steps :]])
            for name in parts[0][1]
        }
        whole.append({"end": parts[-1][0].end, **columns})
    return sorted(whole, key=lambda episode: episode["obs"].tobytes() + episode["actions"].tobytes())


@pytest.mark.parametrize("what", ["memory", "memory and parts"])
def test_fragments_are_those_of_an_episode_for_each_world(what: str) -> None:
    policy = policy_with(what)
    spaces: dict[str, Any] = dict(zip(("observation_space", "action_space"), policy.spaces, strict=True))
    gone = []
    for together in (True, False):
        with (
            broker() as server,
            training(server, blob=policy.blob, body=policy.body, fragment_steps=4, **spaces) as learner,
            connect(server.frontend, episodes=N, seed=7, **spaces) as client,
        ):
            if together:
                envs = SyncVectorEnv(policy.envs, autoreset_mode=AutoresetMode.SAME_STEP)
                drive_vector(client, envs, steps=STEPS * N, seed=0)
            else:
                by_episodes(client, [make() for make in policy.envs])
            assert client.close() == 0
            assert {bool(header.number) for header, _ in learner.taken} == {True}
            names = {header.episode for header, _ in learner.taken}
            assert all(name.startswith("w") for name in names) is together
            gone.append(episodes_of(learner))
    columns, alone = gone
    assert len(columns) == len(alone) >= N * STEPS // 10
    for one, other in zip(columns, alone, strict=True):
        assert one.keys() == other.keys() and one["end"] == other["end"]
        assert any(name.startswith("state_in/") for name in one) is True
        for name in one.keys() - {"end"}:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("inference", ["local", "remote"])
def test_each_world_remembers_its_own_episode(inference: Any, mode: AutoresetMode) -> None:
    envs = SyncVectorEnv([lambda n=n: Counts(n) for n in (3, 5, 7)], autoreset_mode=mode)
    with (
        acting(inference) as (address, learner),
        connect(address, inference=inference, episodes=N, observation_space=OBSERVATIONS, action_space=ACTIONS) as one,
    ):
        assert drive_vector(one, envs, steps=90).steps >= 90
        until(lambda: learner.steps == one.stats.steps, "all is taken")
        assert len(check(learner, {0: 1})) > 15
        assert {header.episode[0] for header, _ in learner.taken} == {"w"}


@pytest.mark.parametrize("inference", ["local", "remote"])
def test_it_remembers_across_new_weights(inference: Any) -> None:
    with (
        acting(inference) as (address, learner),
        connect(address, inference=inference, episodes=2, observation_space=OBSERVATIONS, action_space=ACTIONS) as one,
    ):
        vector, random, never = one.vector(2), np.random.default_rng(5), np.zeros(2, bool)

        def step() -> int:
            vector.get_actions(random.normal(size=(2, 3)).astype(np.float32))
            vector.log_step(np.ones(2), never, never)
            return vector._block.origin.version

        for _ in range(6):
            step()
        learner.publish(1, body(2))
        until(lambda: step() == 1, "it acts by the new weights")
        for _ in range(6):
            step()
        vector.end(np.zeros((2, 3), np.float32))
        vector.abandon()
        until(lambda: learner.steps == one.stats.steps, "all is taken")
    assert {header.version for header, _ in learner.taken} == {0, 1}
    assert len(check(learner, {0: 1, 1: 2})) == 2


def test_another_policys_memory_is_none() -> None:
    """A block that goes on by a policy with another memory begins with what that one starts with."""
    layout = layout_of_policy(unpack_policy(blob())[0])
    first, *rest = layout.state
    other = layout._replace(state=(first._replace(name="other"), *rest))
    zeros, block = np.zeros((2, 3), np.float32), BlockBuilder("worlds", 2)
    after = [np.full((2, *state.row.shape), 5.0, np.float32) for state in layout.state]
    for given, fresh in ((layout, True), (layout, False), (other, True)):
        block.begin(given, "acted", Origin("run", 1), 4)
        block.observe(zeros)
        assert block.fresh.tolist() == [fresh, fresh]
        for column, start, kept in zip(block.memory, layout.starts, after, strict=True):
            np.testing.assert_array_equal(column, np.stack([start, start]) if fresh else kept)
        block.act(np.zeros(2), np.zeros(2), np.zeros((2, 2)), 0.0, after)
        block.log(np.zeros(2), np.zeros(2, bool), np.zeros(2, bool), None, 0.0)
        block.observe(zeros)
        (cut,) = block.cuts(1 << 20)
        assert len(cut.segments) == 2


def seen(**changes: Any) -> Any:
    """Observations of three `Parted`."""
    made: Any = {
        "goal": np.array([0, 1, 2]),
        "scene": {"lamps": np.zeros((3, 2), np.int8), "aim": (np.zeros((3, 2), np.float32), np.array([0, 1, 0]))},
    }
    made["scene"] |= changes
    return made


LAMPS = r"expected observations obs\['scene'\]\['lamps'\] of 3 worlds, int8 of shape \(3, 2\), got int64 of shape"


@pytest.mark.parametrize(
    ("observations", "says"),
    [
        (seen(lamps=np.zeros((2, 2), np.int64)), LAMPS),
        (seen(aim=(np.float32([[0, 0], [0, np.nan], [0, 0]]), np.zeros(3, np.int64))), r"world 1's is nan \(entry 1"),
        (seen(aim=(np.zeros((3, 2)),)), r"observations have no obs\['scene'\]\['aim'\]\[1\]: give them as Gymnasium's"),
        (np.zeros((3, 4)), r"observations have no obs\['goal'\]"),
        (seen(lamps=np.full((3, 2), 0.5)), "float64 that it can't hold without loss"),
    ],
)
def test_parts_that_do_not_fit(observations: Any, says: str) -> None:
    policy = parted()
    spaces: dict[str, Any] = dict(zip(("observation_space", "action_space"), policy.spaces, strict=True))
    with (
        broker() as server,
        training(server, blob=policy.blob, body=policy.body, **spaces) as learner,
        connect(server.frontend, episodes=3, **spaces) as client,
    ):
        vector = client.vector(3)
        with pytest.raises(EpisodeError, match=says):
            vector.get_actions(observations)
        actions = vector.get_actions(seen())
        assert actions["body"][0].shape == (3, 1) and actions["pick"].shape == (3,)
        over, never = np.array([False, True, False]), np.zeros(3, bool)
        spoiled = np.float32([[0, 0], [np.inf, 0], [0, 0]])
        with pytest.raises(EpisodeError, match=r"expected finite last observations obs\['scene'\].*world 1's is inf"):
            vector.log_step(np.ones(3), over, never, seen(aim=(spoiled, np.zeros(3, np.int64))))
        # Rows of worlds whose episodes go on aren't looked at.
        vector.log_step(np.ones(3), over, never, seen(aim=(np.roll(spoiled, 1, 0), np.zeros(3, np.int64))))
        vector.end(seen())
        vector.abandon()
        assert client.close() == 0
    assert sorted(header.end for header, _ in learner.taken) == ["terminated", "truncated", "truncated"]


class Recorded(Parted):
    """Keeps the observations of each of its episodes."""

    seen: ClassVar[list[list[Any]]] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self.seen.append([])
        return super().reset(seed=seed, options=options)

    def _look(self) -> Any:
        self.seen[-1].append(super()._look())
        return self.seen[-1][-1]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_observations_of_several_parts_are_those_of_the_environment(mode: AutoresetMode) -> None:
    policy = parted()
    spaces: dict[str, Any] = dict(zip(("observation_space", "action_space"), policy.spaces, strict=True))
    Recorded.seen.clear()
    with (
        broker() as server,
        training(server, blob=policy.blob, body=policy.body, **spaces) as learner,
        connect(server.frontend, episodes=1, **spaces) as client,
    ):
        assert drive_vector(client, SyncVectorEnv([Recorded], autoreset_mode=mode), episodes=6).episodes >= 6
        assert client.close() == 0
        layout = client.flow.reader.layout
        assert layout is not None and layout.packing is not None
        for header, arrays in learner.taken:
            episode = Recorded.seen[int(header.episode.removeprefix("w")) - 1]
            rows = layout.packing.unpack(arrays["obs"])
            for i, seen_there in enumerate(episode[header.t0 : header.t0 + header.steps + 1]):
                for column, value in zip(tree.flatten(rows), tree.flatten(seen_there), strict=True):
                    np.testing.assert_array_equal(column[i], value)
            assert header.t0 + header.steps < len(episode) or header.end == "truncated"
