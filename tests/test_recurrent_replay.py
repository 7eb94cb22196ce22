"""Recurrent policies and replay buffers: what DQN's learner gets of parts of fragments, beside RLlib's own runner.

RLlib's runner has one environment here: with several its DQN can't act by a recurrent module.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.examples.envs.classes.stateless_cartpole import StatelessCartPole
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from test_cutting import answers
from test_pipelines import BOX, DISCRETE, Halved, actor_of, samples
from test_pipelines import rllib as rllib_episode
from test_recurrent import CALLS, STEPS, Rllib, Simulated, learned_from, sampled

from rllink_zmq.arrays import from_body
from rllink_zmq.policy import Policy, unpack_policy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.session_runner import Lease

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def rllib() -> Rllib:
    return sampled(
        DQNConfig()
        .environment(StatelessCartPole)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=1, rollout_fragment_length=STEPS)
        .training(replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 1000}, epsilon=0.4)
        .rl_module(model_config={"use_lstm": True, "lstm_cell_size": 6, "fcnet_hiddens": [8], "max_seq_len": 7})
        .debugging(seed=4)
    )


def builder_of(rllib: Rllib) -> EpisodeBuilder:
    space = StatelessCartPole().observation_space
    return EpisodeBuilder(space, gym.spaces.Discrete(2), rllib.module, needs_logp=False, outputs=False)


def fragments_of(rllib: Rllib, length: int) -> list[Lease]:
    simulated = Simulated(rllib, length)
    return [lease for call in rllib.samples for episode in call for lease in simulated.fragments(episode)]


def drawn(samples: list[list[SingleAgentEpisode]], max_seq_len: int, shortest: int = 0) -> list[SingleAgentEpisode]:
    """What DQN draws from RLlib's buffer for an update, after all of these."""
    buffer = EpisodeReplayBuffer(capacity=1000)
    for episodes in samples:
        buffer.add(episodes)
    buffer.rng = np.random.default_rng(4)
    found: list[SingleAgentEpisode] = buffer.sample(
        num_items=200, n_step=1, batch_length_T=max_seq_len, lookback=1, min_batch_length_T=shortest, gamma=0.99,
        sample_episodes=True,
    )  # fmt: skip
    return found


@pytest.mark.parametrize(("max_seq_len", "shortest"), [(1, 0), (4, 0), (20, 3)])
@pytest.mark.parametrize(("length", "share"), [(1, 1), (5, 9), (64, 1), (64, 9), (16, STEPS)])
def test_the_learner_gets_what_rllibs_own_runner_gives_it(
    rllib: Rllib, length: int, share: int, max_seq_len: int, shortest: int
) -> None:
    parts = answers(builder_of(rllib), fragments_of(rllib, length), share)
    assert {sum(len(chunk.episode) for chunk in answer) for answer in parts} == {share}
    assert len(parts) * share == CALLS * STEPS
    mine = [[chunk.episode for chunk in answer] for answer in parts]
    theirs = drawn(rllib.samples, max_seq_len, shortest)
    assert {episode.t_started > 0 for episode in theirs} == {True, False}
    found = learned_from(rllib, drawn(mine, max_seq_len, shortest), max_seq_len)
    expected = learned_from(rllib, theirs, max_seq_len)
    memory = {f"/{column}/{name}" for column in ("state_in", "next_state_in") for name in Memory(rllib.module).names}
    assert {"/obs", "/actions", "/new_obs", "/rewards", "/terminateds", "/loss_mask"} | memory <= expected.keys()
    assert all(np.abs(expected[name]).max() > 0.1 for name in memory)
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"/weights_seq_no"}:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
        assert found[name].dtype.kind == expected[name].dtype.kind, name


def test_a_sequence_after_a_gap_begins_with_the_memory_that_the_policy_had(rllib: Rllib) -> None:
    fragments = fragments_of(rllib, 3)
    remembered: dict[bytes, list[NDArray[Any]]] = {}
    memory = Memory(rllib.module)
    for lease in fragments:
        arrays = from_body(lease.message.columns, lease.body)
        for i, row in enumerate(arrays["obs"]):
            remembered[row.tobytes()] = [arrays[f"state_in/{name}"][i] for name in memory.names]
    kept = [lease for i, lease in enumerate(fragments) if i % 4 != 1]
    mine = [[chunk.episode for chunk in answer] for answer in answers(builder_of(rllib), kept, 2)]
    found = drawn(mine, 8)
    assert len({episode.id_ for call in mine for episode in call if "@" in episode.id_}) > 3
    assert {"@" in episode.id_ and episode.t_started > 0 for episode in found} == {True, False}
    batch = learned_from(rllib, found, 8)
    for j, name in enumerate(memory.names):
        expected = [remembered[np.asarray(episode.get_observations(0)).tobytes()][j] for episode in found]
        np.testing.assert_array_equal(batch[f"/state_in/{name}"], np.stack(expected))


def test_service_policy_and_module_act_the_same(rllib: Rllib) -> None:
    """In the middle of episodes, and at their starts beside them; several at once, which RLlib's runner can't."""
    memory, starts = Memory(rllib.module), np.array([True, False, True, False, False])
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(5, 2)).astype(np.float32)
    state = [rng.normal(size=(5, *start.shape)).astype(np.float32) for start in memory.start]
    before = [np.where(starts.reshape(5, *[1] * (a.ndim - 1)), 0.0, a).astype(np.float32) for a in state]
    with torch.no_grad():
        batch = memory.batch(torch.from_numpy(rows), [torch.from_numpy(array) for array in before])
        module, after = memory.answer(rllib.module.forward_inference(batch))
        values = rllib.module.compute_q_values(batch)["qf_preds"].squeeze(1)
    manifest, _ = unpack_policy(rllib.blob)
    actor = ModuleActor(rllib.module, manifest, gym.spaces.Discrete(2), True, False)
    actor.apply(0, rllib.body)
    remote = actor.act(rows, False, state, starts)
    policy = Policy.load(rllib.blob, seed=0)
    policy.apply(0, rllib.body)
    local = policy.act(rows, explore=False, state=before)
    np.testing.assert_array_equal(local.actions, module["actions"])
    np.testing.assert_array_equal(remote["actions"], module["actions"])
    for found in (remote["action_dist_inputs"], local.action_dist_inputs):
        np.testing.assert_allclose(found, values, atol=1e-6)
    for j, name in enumerate(memory.names):
        np.testing.assert_allclose(remote[f"state_out/{name}"], after[j], atol=1e-6)
        np.testing.assert_allclose(local.state[j], after[j], atol=1e-6)
    policy.epsilon = 0.5
    chosen = np.stack([policy.act(rows, state=before).actions for _ in range(60)])
    assert (chosen != local.actions).any(0).all(), "each is sometimes another than the best one"


@pytest.mark.parametrize("explore", [True, False], ids=["drawn", "greedy"])
def test_behind_connectors_it_remembers_as_rllibs_own_runner_does(explore: bool) -> None:
    """Two rows at once, of which one is RLlib's episode, step by step."""
    made = (
        DQNConfig()
        .environment(observation_space=BOX, action_space=DISCRETE)
        .env_runners(env_to_module_connector=lambda env, spaces, device: [Halved()], num_env_runners=0)
        .rl_module(model_config={"fcnet_hiddens": [8], "use_lstm": True, "lstm_cell_size": 6, "max_seq_len": 4})
    )
    observations = samples(BOX)
    theirs = rllib_episode(made, observations)
    actor, manifest = actor_of(made)
    state, starts = None, np.array([False, True])
    for t, observation in enumerate(observations[:-1]):
        answer = actor.act(np.stack([observation, observations[0]]), explore, state, starts if t else None)
        kept = Memory(actor._module).flat(theirs.get_extra_model_outputs("state_out", t))
        first = Memory(actor._module).flat(theirs.get_extra_model_outputs("state_out", 0))
        for part, mine, begins in zip(manifest.state, kept, first, strict=True):
            np.testing.assert_allclose(answer[f"state_out/{part.name}"], np.stack([mine, begins]), atol=1e-6)
        if not explore:
            assert answer["actions"][0] == theirs.get_actions(t)
            assert answer["actions"].tolist() == answer["action_dist_inputs"].argmax(1).tolist()
        state = [answer[f"state_out/{part.name}"] for part in manifest.state]
