"""Recurrent policies beside RLlib's own runner: the same steps must be the same to the learner."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

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
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.examples.envs.classes.stateless_cartpole import StatelessCartPole
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.errors import ProtocolError
from rllink_zmq.fragments import Cut, FragmentBuilder, Origin
from rllink_zmq.fragments_block import BlockBuilder
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.policy import Policy, unpack_policy
from rllink_zmq.policy_batch import BatchPolicy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.session_runner import Lease
from rllink_zmq.wire import pack, unpack

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CALLS, STEPS = 3, 45
"""Calls of `sample()`, and env steps of each: chunks begin in the middle of episodes, too."""


class Rllib(NamedTuple):
    """RLlib's own side: a runner's samples, call by call, the module they were made with, and a learner of it."""

    config: Any
    samples: list[list[SingleAgentEpisode]]
    module: Any
    learner: Any
    blob: bytes
    body: bytes


def config_of(max_seq_len: int, **model: Any) -> PPOConfig:
    return (
        PPOConfig()
        .environment(StatelessCartPole)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, rollout_fragment_length=STEPS // 2)
        .rl_module(
            model_config={
                "use_lstm": True, "lstm_cell_size": 6, "fcnet_hiddens": [8], "max_seq_len": max_seq_len,
                "vf_share_layers": False, **model,
            }
        )
        .debugging(seed=4)
    )  # fmt: skip


def sampled(config: Any) -> Rllib:
    torch.manual_seed(5)
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    module = runner.module.unwrapped()
    with torch.no_grad():
        for parameter in module.parameters():  # RLlib's own start is nearly the same at all observations
            parameter += 0.3 * torch.randn(parameter.shape)
    samples = [runner.sample(num_timesteps=STEPS) for _ in range(CALLS)]
    spaces = runner.env.single_observation_space, runner.env.single_action_space
    learner = config.build_learner(spaces={DEFAULT_MODULE_ID: spaces})
    learner.module[DEFAULT_MODULE_ID].set_state(module.get_state())
    blob = export_policy(module, *spaces)
    body = weights_body(blob, module.get_state())
    runner.stop()
    return Rllib(config, samples, module, learner, blob, body)


@pytest.fixture(scope="module", params=["apart", "shared"])
def rllib(request: pytest.FixtureRequest) -> Rllib:
    return sampled(config_of(7, vf_share_layers=request.param == "shared"))


def as_fragment(cut: Cut, name: str, end: str) -> Lease:
    """A fragment as it comes out of the wire."""
    columns, body = to_buffers(cut.arrays)
    message = FRAGMENT(
        b"s" * 16, 1, 1, name, cut.t0, cut.steps, end, "run", 3, cut.return_so_far, columns,  # type: ignore[arg-type]
        segments=cut.segments,
    )  # fmt: skip
    read, frames = unpack(pack(message, body))
    assert isinstance(read, FRAGMENT)
    return Lease(read, frames)


class Simulated:
    """A simulator that goes through the steps of RLlib's runner, and remembers by the exported policy."""

    def __init__(self, rllib: Rllib, length: int) -> None:
        self._policy = Policy.load(rllib.blob, seed=0)
        self._policy.apply(0, rllib.body)
        self._layout = layout_of_policy(self._policy.manifest)
        self._length = length
        self._builders: dict[str, FragmentBuilder] = {}

    def fragments(self, episode: SingleAgentEpisode) -> list[Lease]:
        """A chunk of RLlib's, in fragments of `length`."""
        builder = self._builders.setdefault(episode.id_, FragmentBuilder(episode.id_))
        observations = np.asarray(episode.get_observations())
        actions, rewards = episode.get_actions(), episode.get_rewards()
        logps = np.zeros(len(episode))
        if Columns.ACTION_LOGP in episode.extra_model_outputs:  # not with DQN
            logps = episode.get_extra_model_outputs(Columns.ACTION_LOGP)
        leases = []
        for t in range(len(episode)):
            if not builder.steps:
                builder.begin(self._layout, "acted", Origin("run", 3), self._length)
            row = builder.observe(observations[t])
            acted = self._policy.act_one(row, True, builder.state)
            builder.act(actions[t], float(logps[t]), acted.action_dist_inputs, acted.state)
            builder.reward(float(rewards[t]))
            last = t + 1 == len(episode)
            if last or builder.steps == self._length:
                builder.observe(observations[t + 1])
                end = "terminated" if last and episode.is_terminated else "no"
                leases.append(as_fragment(builder.cut(), episode.id_, end))
        return leases


class SimulatedTogether:
    """The same by columns: a world for each of the runner's episodes, which rests before it begins and when it has
    ended. A call ends a block; `fragment_bytes` make several fragments of it."""

    def __init__(self, rllib: Rllib, length: int, fragment_bytes: int = 4000) -> None:
        self._worlds = list({episode.id_: None for call in rllib.samples for episode in call})
        policy = Policy.load(rllib.blob, seed=0)
        policy.apply(0, rllib.body)
        self._layout = layout_of_policy(policy.manifest)
        self._policy = BatchPolicy(policy, len(self._worlds))
        self._block = BlockBuilder("worlds", len(self._worlds))
        self._length = length
        self._fragment_bytes = fragment_bytes

    def fragments(self, call: list[SingleAgentEpisode]) -> list[Lease]:
        block, width, leases = self._block, len(self._worlds), []
        rows = max(map(len, call))
        # Who goes on does so in the first row; who goes on after this call, in its last one.
        begins = {self._worlds.index(e.id_): 0 if e.t_started else rows - len(e) for e in call}
        chunks = {self._worlds.index(e.id_): e for e in call}
        observations = np.zeros((width, 2), np.float32)
        actions, logps, rewards = np.zeros(width, np.int64), np.zeros(width, np.float32), np.zeros(width)
        for row in range(rows):
            resting, ends, last = np.ones(width, bool), np.zeros(width, bool), np.zeros((width, 2), np.float32)
            for world, episode in chunks.items():
                t = row - begins[world]
                if 0 <= t < len(episode):
                    resting[world] = False
                    observations[world], last[world] = episode.get_observations(t), episode.get_observations(t + 1)
                    actions[world], rewards[world] = episode.get_actions(t), episode.get_rewards(t)
                    logps[world] = episode.get_extra_model_outputs(Columns.ACTION_LOGP, t)
                    ends[world] = t + 1 == len(episode) and episode.is_terminated
            block.rest(resting)
            if not block.begun:
                block.begin(self._layout, "acted", Origin("run", 3), self._length)
            acted = self._policy.act(block.observe(observations), block.memory)
            block.act(actions, logps, acted.action_dist_inputs, 0.0, acted.state)
            block.log(rewards, ends, np.zeros(width, bool), last, 0.0)
            if block.full or row == rows - 1:
                block.observe(last)
                leases += [as_fragment(cut, "worlds", "no") for cut in block.cuts(self._fragment_bytes)]
        return leases


def ours(rllib: Rllib, length: int, *, together: bool = False) -> list[list[SingleAgentEpisode]]:
    alone, block = Simulated(rllib, length), SimulatedTogether(rllib, length)
    builder = EpisodeBuilder(StatelessCartPole().observation_space, gym.spaces.Discrete(2), rllib.module)
    calls = []
    for call in rllib.samples:
        if together:
            leases = block.fragments(call)
        else:
            leases = [lease for episode in call for lease in alone.fragments(episode)]
        built, refused = builder.build(leases)
        assert not refused
        calls.append([chunk.episode for chunk in built])
    return calls


def by_contents(episodes: list[SingleAgentEpisode]) -> list[SingleAgentEpisode]:
    """In an order that names and times don't change."""
    return sorted(episodes, key=lambda episode: np.asarray(episode.get_observations()).tobytes())


def learned_from(rllib: Rllib, episodes: list[SingleAgentEpisode], max_seq_len: int) -> dict[str, NDArray[Any]]:
    """What the learner's own pipeline makes of the episodes, GAE with the critic's values included."""
    learner = rllib.learner
    for module in (learner.module[DEFAULT_MODULE_ID], learner.module[DEFAULT_MODULE_ID].unwrapped()):
        module.model_config["max_seq_len"] = max_seq_len
    batch = learner._learner_connector(
        rl_module=learner.module, batch={}, episodes=copy.deepcopy(episodes), shared_data={}, metrics=MetricsLogger()
    )[DEFAULT_MODULE_ID]
    flat: dict[str, NDArray[Any]] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                put(f"{name}/{key}", inner)
        else:
            flat[name] = value.detach().numpy()

    put("", batch)
    return flat


@pytest.mark.parametrize("together", [False, True], ids=["episodes", "columns"])
@pytest.mark.parametrize("max_seq_len", [1, 4, 20])
@pytest.mark.parametrize("length", [1, 5, 64])
def test_the_learner_gets_what_rllibs_own_runner_gives_it(
    rllib: Rllib, length: int, max_seq_len: int, together: bool
) -> None:
    calls = ours(rllib, length, together=together)
    starts = {episode.t_started > 0 for call in rllib.samples for episode in call}
    assert starts == {True, False}  # or the chunks that begin in the middle of an episode weren't tried
    for theirs, mine in zip(map(by_contents, rllib.samples), map(by_contents, calls), strict=True):
        assert [(len(e), e.t_started, e.is_done) for e in mine] == [(len(e), e.t_started, e.is_done) for e in theirs]
        expected = learned_from(rllib, theirs, max_seq_len)
        found = learned_from(rllib, mine, max_seq_len)
        assert found.keys() == expected.keys()
        names = set(expected)
        assert {"/obs", "/actions", "/action_logp", "/loss_mask", "/advantages", "/value_targets"} <= names
        assert {f"/state_in/{name}" for name in Memory(rllib.module).names} <= names
        for name in sorted(names - {"/weights_seq_no"}):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
            assert found[name].dtype.kind == expected[name].dtype.kind, name  # RLlib: an int32 action


@pytest.mark.parametrize("explore", [True, False], ids=["drawn", "greedy"])
def test_service_policy_and_rllibs_own_pipelines_act_the_same(rllib: Rllib, explore: bool) -> None:
    """In the middle of episodes, and at their starts beside them."""
    space = StatelessCartPole().observation_space
    spaces = dict.fromkeys(
        (INPUT_ENV_SPACES, INPUT_ENV_SINGLE_SPACES, DEFAULT_MODULE_ID), (space, gym.spaces.Discrete(2))
    )
    to_module = rllib.config.build_env_to_module_connector(env=None, spaces=spaces)
    to_env = rllib.config.build_module_to_env_connector(env=None, spaces=spaces)
    memory, starts = Memory(rllib.module), np.array([True, False, True, False, False])
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(5, 2)).astype(np.float32)
    state = [rng.normal(size=(5, *start.shape)).astype(np.float32) for start in memory.start]
    episodes = []
    for i, row in enumerate(rows):
        episode = SingleAgentEpisode(observation_space=space, action_space=gym.spaces.Discrete(2))
        episode.add_env_reset(row)
        if not starts[i]:
            outputs = {Columns.STATE_OUT: memory.nested([array[i] for array in state])}
            episode.add_env_step(row, 0, 1.0, extra_model_outputs=outputs)
        episodes.append(episode)
    shared: dict[str, Any] = {}
    torch.manual_seed(7)
    batch = to_module(rl_module=rllib.module, batch={}, episodes=episodes, explore=explore, shared_data=shared)
    with torch.no_grad():
        out = (rllib.module.forward_exploration if explore else rllib.module.forward_inference)(batch)
    theirs = to_env(rl_module=rllib.module, batch=out, episodes=episodes, explore=explore, shared_data=shared)

    manifest, _ = unpack_policy(rllib.blob)
    actor = ModuleActor(rllib.module, manifest, gym.spaces.Discrete(2), True, False)
    actor.apply(0, rllib.body)
    torch.manual_seed(7)
    remote = actor.act(rows, explore, state, starts)
    np.testing.assert_array_equal(remote["actions"], np.stack(theirs[Columns.ACTIONS]))
    policy = Policy.load(rllib.blob, seed=0)
    policy.apply(0, rllib.body)
    before = [np.where(starts.reshape(5, *[1] * (a.ndim - 1)), 0.0, a).astype(np.float32) for a in state]
    local = policy.act(rows, explore=explore, state=before)
    if not explore:
        np.testing.assert_array_equal(local.actions, remote["actions"])
    expected = np.stack(theirs[Columns.ACTION_DIST_INPUTS])
    for found in (remote["action_dist_inputs"], local.action_dist_inputs):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    rows_out = [memory.flat(each) for each in theirs[Columns.STATE_OUT]]
    for j, name in enumerate(memory.names):
        after = np.stack([row[j] for row in rows_out])
        np.testing.assert_allclose(remote[f"state_out/{name}"], after, atol=1e-6)
        np.testing.assert_allclose(local.state[j], after, atol=1e-6)


def test_a_chunk_after_a_gap_begins_with_the_memory_it_had(rllib: Rllib) -> None:
    episode = max((e for call in rllib.samples for e in call if not e.t_started), key=len)
    first, gone, third, *_ = Simulated(rllib, 4).fragments(episode)
    builder = EpisodeBuilder(StatelessCartPole().observation_space, gym.spaces.Discrete(2), rllib.module)
    one, after = (builder.build([lease])[0][0].episode for lease in (first, third))
    assert after.id_ != one.id_ and after.t_started == 8
    memory = Memory(rllib.module)
    kept = memory.flat(after.get_extra_model_outputs(Columns.STATE_OUT, indices=-1, neg_index_as_lookback=True))
    told = from_body(gone.message.columns, gone.body)
    for name, array in zip(memory.names, kept, strict=True):
        np.testing.assert_array_equal(array, told[f"state_in/{name}"][-1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state_in/0": None}, r"needs its memory of each step: no 'state_in/"),
        ({"state_in/0": lambda a: a[..., :3]}, r"has rows of float32\[1, 3\], the module's state is float32\[1, 6\]"),
        ({"state_in/0": lambda a: a * np.float32(np.nan)}, "holds NaN"),
        ({"action_dist_inputs": None}, "recurrent, and 'action_dist_inputs' can't be filled in"),
    ],
    ids=["none", "shape", "NaN", "logged"],
)
def test_a_fragment_without_its_memory_is_refused(rllib: Rllib, changes: dict[str, Any], reason: str) -> None:
    lease = Simulated(rllib, 4).fragments(rllib.samples[0][0])[0]
    arrays = from_body(lease.message.columns, lease.body)
    for name, change in changes.items():
        name = name.replace("0", Memory(rllib.module).names[0])
        value = arrays.pop(name)
        if change is not None:
            arrays[name] = change(value)
    columns, body = to_buffers(arrays)
    builder = EpisodeBuilder(StatelessCartPole().observation_space, gym.spaces.Discrete(2), rllib.module)
    built, refused = builder.build([Lease(msgspec.structs.replace(lease.message, columns=columns), body)])
    assert not built and len(refused) == 1
    with pytest.raises(ProtocolError, match=reason):
        raise refused[0].error


def test_two_learners_get_the_memory_where_they_cut_an_episode(rllib: Rllib) -> None:
    """RLlib slices episodes for several learners; a slice that begins in the middle looks back, too."""
    episodes = [e for call in ours(rllib, 5) for e in call]
    longest = max((e for e in episodes if not e.t_started), key=len)
    memory = Memory(rllib.module)
    states = memory.flat(longest.get_extra_model_outputs(Columns.STATE_OUT))
    piece = copy.deepcopy(longest)[6:10]
    found = memory.flat(piece.get_extra_model_outputs(Columns.STATE_OUT, indices=-1, neg_index_as_lookback=True))
    for whole, array in zip(states, found, strict=True):
        np.testing.assert_array_equal(array, whole[5])


def test_the_example_is_rllibs_environment_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its observations; and it ends at 500 steps, which RLlib's doesn't."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples")
    env, theirs = gym.make("stateless_cartpole:StatelessCartPole-v0"), StatelessCartPole()
    np.testing.assert_array_equal(env.reset(seed=3)[0], theirs.reset(seed=3)[0])
    for t in range(12):
        mine, expected = env.step(t % 2), theirs.step(t % 2)
        np.testing.assert_array_equal(mine[0], expected[0])
        assert mine[1:3] == expected[1:3]
    assert env.observation_space.shape == theirs.observation_space.shape
