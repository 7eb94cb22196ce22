"""Fragments that are handed over in parts, as DQN and SAC want them: cut, named, and put into RLlib's buffers."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from ray.rllib.connectors.common.add_observations_from_episodes_to_batch import AddObservationsFromEpisodesToBatch
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.prioritized_episode_buffer import PrioritizedEpisodeReplayBuffer
from test_episodes import ACT, OBS, lease

from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import Segment
from rllink_zmq.rllib.episodes import EpisodeBuilder, Piece, cut
from rllink_zmq.session_runner import Lease

BUFFERS = {
    "uniform": lambda: EpisodeReplayBuffer(capacity=10_000),
    "prioritized": lambda: PrioritizedEpisodeReplayBuffer(capacity=10_000),
}


def builder_of(**options: Any) -> EpisodeBuilder:
    return EpisodeBuilder(OBS, ACT, None, needs_logp=False, outputs=False, **options)


def checked(builder: EpisodeBuilder, one: Lease) -> list[Piece]:
    good, refused = builder.check([one])
    for refusal in refused:
        raise refusal.error
    return good


def flow(steps: int, seed: int = 0, dropped: tuple[int, ...] = ()) -> list[Lease]:
    """The fragments of one episode after the other, 1 to 9 steps each, so many in all; without those `dropped`."""
    rng = random.Random(seed)
    values = np.random.default_rng(seed)
    found: list[Lease] = []
    number = t0 = episode = 0
    last = values.standard_normal(4).astype(np.float32)
    total = 0.0
    while steps > 0:
        count = min(steps, rng.randint(1, 9))
        ends = "terminated" if rng.random() < 0.2 else "no"
        rows = np.vstack([last, values.standard_normal((count, 4)).astype(np.float32)])
        rewards = values.standard_normal(count).astype(np.float32)
        number += 1
        one = lease(
            count, t0, ends, episode=f"e{episode}", number=number, obs=rows, rewards=rewards, return_so_far=total,
            action_logp=None, action_dist_inputs=None, seconds=0.1 * (t0 + count),
        )  # fmt: skip
        if number not in dropped:
            found.append(one)
        steps -= count
        total, t0, last = total + float(rewards.sum()), t0 + count, rows[-1]
        if ends != "no":
            episode, t0, total = episode + 1, 0, 0.0
            last = values.standard_normal(4).astype(np.float32)
    return found


def answers(builder: EpisodeBuilder, fragments: list[Lease], share: int) -> list[list[Any]]:
    """What calls of `share` steps would return: the chunks of each."""
    stock = [(piece, 0) for one in fragments for piece in checked(builder, one)]
    found = []
    while sum(piece.message.steps - first for piece, first in stock) >= share:
        missing, pieces = share, []
        while missing:
            piece, first = stock.pop(0)
            count = min(missing, piece.message.steps - first)
            pieces += cut([piece], first, count)
            missing -= count
            if first + count < piece.message.steps:
                stock.insert(0, (piece, first + count))
        found.append(builder.join(pieces))
    return found


@pytest.mark.parametrize("share", [1, 4, 13])
def test_each_answer_has_its_share_and_nothing_is_lost(share: int) -> None:
    fragments = flow(200)
    whole = [chunk.episode for chunk in builder_of().build(fragments)[0]]
    parts = answers(builder_of(), fragments, share)
    assert {sum(len(chunk.episode) for chunk in answer) for answer in parts} == {share}
    joined: dict[str, list[Any]] = {}
    for answer in parts:
        for chunk in answer:
            joined.setdefault(chunk.episode.id_, []).append(chunk.episode)
    for episode in whole:
        mine = joined.get(episode.id_, [])
        if sum(map(len, mine)) < len(episode):
            continue  # the last one, whose rest no call has asked for
        for what in ("get_rewards", "get_actions"):
            got = np.concatenate([np.asarray(getattr(chunk, what)()) for chunk in mine])
            np.testing.assert_array_equal(got, np.asarray(getattr(episode, what)()))
        seen = [np.asarray(chunk.get_observations())[:-1] for chunk in mine]
        np.testing.assert_array_equal(np.concatenate(seen), np.asarray(episode.get_observations())[:-1])
        assert [chunk.t_started for chunk in mine] == [sum(map(len, mine[:i])) for i in range(len(mine))]
        assert mine[-1].is_terminated == episode.is_terminated


def test_an_episodes_return_and_length_are_told_with_its_last_part() -> None:
    fragments = flow(300)
    whole = {c.episode.id_: c.finished for c in builder_of().build(fragments)[0] if c.finished}
    parts = {c.episode.id_: c.finished for answer in answers(builder_of(), fragments, 3) for c in answer if c.finished}
    assert len(parts) >= 3
    for name, finished in parts.items():
        assert (finished.length, finished.seconds) == (whole[name].length, whole[name].seconds)
        assert finished.total == pytest.approx(whole[name].total, abs=1e-4)


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("share", [1, 4])
def test_rllibs_replay_buffers_take_the_parts_of_episodes_that_have_gaps(kind: str, share: int) -> None:
    """Fragments were dropped: by a limit on lag, say, or with a runner that had them."""
    buffer = BUFFERS[kind]()
    fragments = flow(400, seed=2, dropped=(3, 4, 9, 20, 33, 34, 50))
    builder = builder_of()
    added = 0
    for answer in answers(builder, fragments, share):
        buffer.add([chunk.episode for chunk in answer])
        added += share
    assert added > 300
    assert buffer.get_num_timesteps() == added


@pytest.mark.parametrize("kind", BUFFERS)
def test_after_an_answer_that_may_be_lost_no_episode_goes_on_under_its_id(kind: str) -> None:
    buffer, builder = BUFFERS[kind](), builder_of()
    (piece,) = checked(builder, lease(9, action_logp=None, action_dist_inputs=None))
    first, lost, rest = (builder.join(piece.cut(i, 3) for i in (at,)) for at in (0, 3, 6))
    assert first[0].episode.id_ == lost[0].episode.id_ == rest[0].episode.id_
    buffer.add([chunk.episode for chunk in first])
    with pytest.raises(AssertionError):
        BUFFERS[kind]().add([chunk.episode for chunk in (*first, *rest)])  # what RLlib says of a gap
    builder.forget()
    (named,) = builder.join([piece.cut(6, 3)])
    assert named.episode.id_.endswith("@6") and named.episode.t_started == 6
    buffer.add([named.episode])


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("together", [False, True], ids=["two answers", "one answer"])
def test_where_the_row_that_two_fragments_share_differs_the_rest_is_another_episode(kind: str, together: bool) -> None:
    """A filter has learned between the two, say: RLlib's buffers would stop the training."""
    buffer, builder = BUFFERS[kind](), builder_of()
    rows = np.random.default_rng(0).standard_normal((13, 4)).astype(np.float32)
    parts = [rows[:5], rows[4:9] * np.float32(1.01), rows[8:] * np.float32(1.01)]
    pieces = [
        checked(builder, lease(4, t0, number=i + 1, obs=obs, action_logp=None, action_dist_inputs=None))[0]
        for i, (t0, obs) in enumerate(zip((0, 4, 8), parts, strict=True))
    ]
    answers_ = [pieces] if together else [[piece] for piece in pieces]
    episodes = [chunk.episode for answer in answers_ for chunk in builder.join(answer)]
    buffer.add(episodes)
    assert buffer.get_num_timesteps() == 12
    ids = [episode.id_.partition("@")[2] for episode in episodes]
    assert ids == (["", "4"] if together else ["", "4", "4"])


def test_the_episodes_of_a_vector_are_cut_one_by_one() -> None:
    """A fragment may hold steps of several episodes."""
    several = lease(7, obs=np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32))
    parts = (Segment("a", 0, 3, "no", 0.0, 1.0), Segment("b", 4, 4, "terminated", 0.0, 1.0))
    message = msgspec.structs.replace(several.message, segments=parts, episode="a")
    builder = builder_of()
    pieces = checked(builder, Lease(message, several.body))
    shown = [[(p.message.episode, p.message.t0, p.message.steps, p.message.end) for p in cut(pieces, first, 3)]
             for first in (0, 2, 4)]  # fmt: skip
    assert shown == [
        [("a", 0, 3, "no")],
        [("a", 2, 1, "no"), ("b", 4, 2, "no")],
        [("b", 5, 3, "terminated")],
    ]


def test_log_probabilities_are_asked_for_where_the_algorithm_needs_them() -> None:
    unknown = lease(3, action_logp=None)
    with pytest.raises(ProtocolError, match="give it to log_action, or train with DQN or SAC"):
        checked(EpisodeBuilder(OBS, ACT, None), unknown)
    builder = EpisodeBuilder(OBS, ACT, None, needs_logp=False)  # SAC's: RLlib's own runner has the columns
    (chunk,) = builder.join(checked(builder, unknown))
    assert np.isnan(chunk.episode.get_extra_model_outputs("action_logp")).all()
    (chunk,) = builder_of().join(checked(builder_of(), lease(3)))
    assert set(chunk.episode.extra_model_outputs) == {"weights_seq_no"}


def test_samples_of_one_episode_stay_apart_in_a_learners_batch() -> None:
    """RLlib tells them apart by numbers after their ids, if these have no underscore."""
    fragments = [
        Lease(msgspec.structs.replace(one.message, episode=f"my_{one.message.episode}%"), one.body)
        for one in flow(100, seed=4)
    ]
    buffer = BUFFERS["uniform"]()
    for answer in answers(builder_of(), fragments, 4):
        buffer.add([chunk.episode for chunk in answer])
    drawn = buffer.sample(num_items=60, n_step=1, sample_episodes=True)
    expected = [np.asarray(episode.get_observations(0)) for episode in drawn]
    piece = AddObservationsFromEpisodesToBatch(as_learner_connector=True)
    batch = piece(rl_module=None, batch={}, episodes=drawn, shared_data={})  # type: ignore[arg-type]
    assert len(batch["obs"]) == 60
    for (one,), observation in zip(batch["obs"].values(), expected, strict=True):
        np.testing.assert_array_equal(one, observation)
