"""Fragments become RLlib's episodes."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import FRAGMENT, Segment
from rllink_zmq.rllib.episodes import Built, EpisodeBuilder, cut
from rllink_zmq.session_runner import Lease

OBS = gym.spaces.Box(-5.0, 5.0, (4,), np.float32)
ACT = gym.spaces.Discrete(2)


def lease(steps: int = 3, t0: int = 0, end: str = "no", **changes: Any) -> Lease:
    rng = np.random.default_rng(steps + t0)
    columns: dict[str, Any] = {
        "obs": rng.standard_normal((steps + 1, 4)).astype(np.float32),
        "actions": rng.integers(0, 2, steps),
        "rewards": np.arange(t0, t0 + steps, dtype=np.float32),
        "action_logp": np.full(steps, -0.5, np.float32),
        "action_dist_inputs": rng.standard_normal((steps, 2)).astype(np.float32),
    }
    header = {
        "session": b"s" * 16,
        "number": 1,
        "base": 1,
        "episode": "e",
        "run": "r",
        "version": 7,
        "return_so_far": float(sum(range(t0))),
    }
    for name, value in changes.items():
        if name in header or name == "seconds":
            header[name] = value
        elif value is None:
            del columns[name]
        else:
            columns[name] = value
    described, body = to_buffers(columns)
    return Lease(FRAGMENT(t0=t0, steps=steps, end=end, columns=described, **header), body)  # type: ignore[arg-type]


def one_chunk(builder: EpisodeBuilder, one: Lease) -> Built:
    """The chunk of a fragment that comes alone. Raises what it is refused with."""
    chunks, refused = builder.build([one])
    for refusal in refused:
        raise refusal.error
    (chunk,) = chunks
    return chunk


@pytest.fixture
def builder() -> EpisodeBuilder:
    return EpisodeBuilder(OBS, ACT, None)


def test_a_fragment_is_a_chunk_with_its_columns(builder: EpisodeBuilder) -> None:
    one = lease()
    episode, finished, *_ = one_chunk(builder, one)
    assert finished is None and not episode.is_done
    assert len(episode) == 3 and episode.t_started == 0
    assert np.asarray(episode.get_observations()).shape == (4, 4)
    assert list(episode.get_rewards()) == [0.0, 1.0, 2.0]
    assert list(episode.get_extra_model_outputs("weights_seq_no")) == [7, 7, 7]
    assert np.asarray(episode.get_extra_model_outputs("action_dist_inputs")).shape == (3, 2)


def test_the_last_fragment_tells_the_whole_episode(builder: EpisodeBuilder) -> None:
    _, finished, *_ = one_chunk(builder, lease(steps=2, t0=4, end="terminated", seconds=1.5))
    assert finished is not None
    assert (finished.length, finished.total, finished.seconds) == (6, 0 + 1 + 2 + 3 + 4 + 5, 1.5)
    episode, finished, *_ = one_chunk(builder, lease(steps=1, end="truncated"))
    assert episode.is_truncated and not episode.is_terminated and finished is not None


def test_chunks_that_follow_each_other_share_an_id(builder: EpisodeBuilder) -> None:
    ids = [one_chunk(builder, lease(steps=3, t0=t0))[0].id_ for t0 in (0, 3, 6)]
    assert len(set(ids)) == 1


def test_a_gap_begins_a_new_id_that_then_goes_on(builder: EpisodeBuilder) -> None:
    first, after, next_ = (one_chunk(builder, lease(steps=3, t0=t0))[0].id_ for t0 in (0, 6, 9))
    assert after != first and after.endswith("@6") and next_ == after


def test_a_repeat_or_a_swap_never_continues_an_id(builder: EpisodeBuilder) -> None:
    ids = [one_chunk(builder, lease(steps=3, t0=t0))[0].id_ for t0 in (0, 6, 3)]
    assert len(set(ids)) == 3


def test_two_simulators_with_one_episode_name_are_two_episodes(builder: EpisodeBuilder) -> None:
    a = one_chunk(builder, lease())[0].id_
    b = one_chunk(builder, lease(session=b"t" * 16))[0].id_
    assert a != b


def test_a_name_that_is_used_again_is_another_episode(builder: EpisodeBuilder) -> None:
    """A replay buffer still holds the one that has ended."""
    ids = [one_chunk(builder, lease(end="terminated", number=number))[0].id_ for number in (1, 2)]
    assert ids[0] != ids[1]


def test_seconds_of_a_step_are_known_where_the_fragment_before_came_here(builder: EpisodeBuilder) -> None:
    assert one_chunk(builder, lease(steps=2, seconds=1.0)).step_seconds == 0.5
    assert one_chunk(builder, lease(steps=2, t0=2, seconds=1.5)).step_seconds == 0.25
    assert one_chunk(builder, lease(steps=2, t0=8, seconds=9.0)).step_seconds is None


def test_missing_distribution_inputs_are_filled_in_by_the_module() -> None:
    torch.manual_seed(0)
    spec = RLModuleSpec(
        DefaultPPOTorchRLModule, observation_space=OBS, action_space=ACT, model_config={"fcnet_hiddens": [8]}
    )
    builder = EpisodeBuilder(OBS, ACT, spec.build())
    one = lease(action_dist_inputs=None)
    filled = np.asarray(one_chunk(builder, one)[0].get_extra_model_outputs("action_dist_inputs"))
    assert filled.shape == (3, 2) and filled.dtype == np.float32 and np.isfinite(filled).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"actions": None}, "no 'actions'"),
        ({"action_logp": None}, "needs 'action_logp': give it to log_action"),
        ({"obs": np.zeros((4, 5), np.float32)}, r"rows of shape \[5\], the space has \[4\]"),
        ({"obs": np.full((4, 4), np.nan, np.float32)}, "'obs' holds NaN"),
        ({"rewards": np.array([0, np.inf, 0], np.float32)}, "'rewards' must be one finite number a step"),
        ({"action_logp": np.zeros((3, 1), np.float32)}, "'action_logp' must be one finite number a step"),
        ({"actions": np.array([0, 2, 1])}, "integers from 0 to 1"),
        ({"actions": np.zeros(3, np.float32)}, "integers from 0 to 1"),
        ({"action_dist_inputs": None}, "no RLModule to fill in"),
    ],
)
def test_bad_columns_are_refused_in_words(builder: EpisodeBuilder, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ProtocolError, match=says):
        one_chunk(builder, lease(**changes))


def test_fragments_that_follow_each_other_are_one_chunk(builder: EpisodeBuilder) -> None:
    pieces = [
        lease(steps=2, t0=0, seconds=1.0),
        lease(session=b"t" * 16, steps=2),
        lease(steps=3, t0=2, version=8, number=2, seconds=2.0),
        lease(steps=1, t0=5, end="terminated", number=3, seconds=3.0),
    ]
    (one, other), refused = builder.build(pieces)
    assert not refused and other.finished is None and other.episode.id_ != one.episode.id_
    episode = one.episode
    assert len(episode) == 6 and episode.is_terminated
    assert list(episode.get_rewards()) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert list(episode.get_extra_model_outputs("weights_seq_no")) == [7, 7, 8, 8, 8, 7]
    assert one.finished == (6, 15.0, 3.0) and one.step_seconds == 0.5
    observations = np.asarray(episode.get_observations())
    parts = [np.frombuffer(p.body[0], np.float32).reshape(-1, 4) for p in (pieces[0], pieces[2], pieces[3])]
    assert np.array_equal(observations, np.concatenate([parts[0][:-1], parts[1][:-1], parts[2]]))


def test_a_gap_an_end_or_the_limit_begins_a_new_chunk() -> None:
    builder = EpisodeBuilder(OBS, ACT, None, longest=4)

    def lengths(*leases: Lease) -> list[int]:
        return [len(chunk.episode) for chunk in builder.build(leases)[0]]

    assert lengths(lease(steps=2), lease(steps=2, t0=3)) == [2, 2]
    assert lengths(lease(steps=2, end="truncated"), lease(steps=2, t0=2)) == [2, 2]
    assert lengths(lease(steps=2), lease(steps=2, t0=2), lease(steps=1, t0=4)) == [4, 1]
    ids = [c.episode.id_ for c in builder.build([lease(steps=2), lease(steps=2, t0=2), lease(steps=1, t0=4)])[0]]
    assert ids[0] == ids[1], "the rest goes on under the same id"


def test_a_bad_fragment_leaves_its_neighbours(builder: EpisodeBuilder) -> None:
    chunks, refused = builder.build([lease(steps=2), lease(steps=3, t0=2, actions=None, number=5), lease(2, t0=5)])
    assert [len(c.episode) for c in chunks] == [2, 2] and chunks[1].episode.id_.endswith("@5")
    assert [r.message.number for r in refused] == [5] and "no 'actions'" in str(refused[0].error)


def several(*parts: tuple[str, int, int, str], number: int = 1, **changes: Any) -> Lease:
    """One fragment of pieces (episode, t0, steps, end), each with the columns that `lease` gives it."""
    alone = [lease(steps, t0) for _, t0, steps, _ in parts]
    arrays = [from_body(one.message.columns, one.body) for one in alone]
    columns = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]} | changes
    described, body = to_buffers(columns)
    segments = tuple(Segment(name, t0, n, end, float(sum(range(t0))), 0.5 * (t0 + n)) for name, t0, n, end in parts)  # type: ignore[arg-type]
    steps = sum(n for _, _, n, _ in parts)
    header = FRAGMENT(b"s" * 16, number, 1, "worlds", 0, steps, "no", "r", 7, 0.0, described, segments=segments)
    return Lease(header, body)


def test_a_fragment_of_several_episodes_is_what_its_pieces_are_alone(builder: EpisodeBuilder) -> None:
    parts = [("a", 0, 3, "terminated"), ("b", 0, 2, "no"), ("c", 0, 1, "truncated"), ("d", 4, 4, "no")]
    together, refused = builder.build([several(*parts)])
    assert not refused
    alone = EpisodeBuilder(OBS, ACT, None)
    for built, (name, t0, steps, end) in zip(together, parts, strict=True):
        one = one_chunk(alone, lease(steps, t0, end, episode=name, seconds=0.5 * (t0 + steps)))
        assert built.finished == one.finished and built.step_seconds == one.step_seconds
        assert built.episode.id_ == one.episode.id_
        assert built.episode.get_state().keys() == one.episode.get_state().keys()
        for key, value in one.episode.get_state().items():
            np.testing.assert_equal(built.episode.get_state()[key], value, err_msg=key)


def test_pieces_of_later_fragments_go_on_with_their_episodes(builder: EpisodeBuilder) -> None:
    chunks, _ = builder.build([
        several(("a", 0, 2, "no"), ("b", 0, 1, "terminated"), ("c", 0, 1, "no")),
        several(("a", 2, 3, "terminated"), ("c", 1, 2, "no"), number=2),
    ])  # fmt: skip
    assert [len(chunk.episode) for chunk in chunks] == [5, 1, 3]
    assert chunks[0].finished == (5, 10.0, 2.5) and chunks[0].step_seconds == 0.5
    (after,), _ = builder.build([several(("c", 3, 1, "no"), number=3)])
    assert after.episode.id_ == chunks[2].episode.id_
    chunks[2].episode.validate()


def test_columns_that_disagree_with_the_segments_cost_that_fragment_alone(builder: EpisodeBuilder) -> None:
    bad = several(("a", 0, 2, "no"), ("b", 0, 2, "no"), number=5, rewards=np.zeros(5, np.float32))
    chunks, refused = builder.build([several(("a", 0, 2, "no")), bad, lease()])
    assert len(chunks) == 2
    (refusal,) = refused
    assert refusal.message.number == 5
    assert "column 'rewards' of a fragment of 4 steps in 2 segments must have 4 rows" in str(refusal.error)
    short = lease(rewards=np.zeros(2, np.float32))
    assert "'rewards' of a fragment of 3 steps must have 3 rows" in str(builder.build([short])[1][0].error)


def test_segments_are_cut_to_fit_like_fragments(builder: EpisodeBuilder) -> None:
    one = several(("a", 0, 3, "terminated"), ("b", 0, 2, "no"), ("c", 5, 4, "no"))
    (good, refused), whole = builder.check([one]), EpisodeBuilder(OBS, ACT, None).build([one])[0]
    assert not refused
    chunks = builder.join([*cut(good, 0, 4), *cut(good, 4, 3), *cut(good, 7, 2)])
    assert [len(chunk.episode) for chunk in chunks] == [3, 2, 4]
    for chunk, other in zip(chunks, whole, strict=True):
        assert chunk.finished == other.finished and chunk.episode.id_ == other.episode.id_
        assert np.array_equal(chunk.episode.get_observations(), other.episode.get_observations())
        assert np.array_equal(chunk.episode.get_rewards(), other.episode.get_rewards())


def test_an_episode_is_what_rllibs_constructor_would_make(builder: EpisodeBuilder) -> None:
    episode = one_chunk(builder, lease(steps=3, t0=2, end="truncated")).episode
    copy = SingleAgentEpisode.from_state(episode.get_state())
    assert copy.get_state().keys() == episode.get_state().keys()
    made = SingleAgentEpisode(
        id_=episode.id_, observation_space=OBS, action_space=ACT, observations=episode.observations,
        actions=episode.actions, rewards=episode.rewards, infos=episode.infos, truncated=True, t_started=2,
        extra_model_outputs=episode.extra_model_outputs, len_lookback_buffer=0,
    )  # fmt: skip
    for name in SingleAgentEpisode.__slots__:
        assert getattr(episode, name) == getattr(made, name), name
    assert len(episode) == 3 and episode.is_numpy and episode.is_truncated and episode.t == 5
    assert episode.custom_data is not one_chunk(builder, lease()).episode.custom_data


@pytest.mark.parametrize("bad", [{}, {"rewards": np.full(3, np.nan, np.float32)}])
def test_what_was_prepared_is_what_checking_says(builder: EpisodeBuilder, bad: dict[str, Any]) -> None:
    one = lease(**bad)
    prepared = builder.prepare(one.message, one.body)
    assert prepared is not None
    pieces, refusals = builder.check([one])
    again, refused = builder.check([one._replace(prepared=prepared)])
    assert [str(r.error) for r in refused] == [str(r.error) for r in refusals]
    assert len(again) == len(pieces) == (not bad)
    for mine, theirs in zip(again, pieces, strict=True):
        assert mine.observations.tobytes() == theirs.observations.tobytes()
        assert mine.outputs.keys() == theirs.outputs.keys()


def test_what_needs_the_module_or_memory_is_not_prepared(builder: EpisodeBuilder) -> None:
    """The module's distributions of what a simulator chose itself; and what is compressed stays small."""
    given = lease(action_dist_inputs=None)
    assert builder.prepare(given.message, given.body) is None
    one = lease()
    compressed = FRAGMENT(
        one.message.session, 1, 1, "e", 0, 3, "no", "r", 7, 0.0, one.message.columns, compression="zstd"
    )
    assert builder.prepare(compressed, one.body) is None
    replayed = EpisodeBuilder(OBS, ACT, None, needs_logp=False, outputs=False)  # DQN's episodes have none of them
    assert replayed.prepare(given.message, given.body) is not None
