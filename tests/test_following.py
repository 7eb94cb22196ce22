"""Connectors that need more of an episode than a request brings: a runner follows it, against RLlib's own runner."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.connectors.env_to_module.observation_preprocessor import SingleAgentObservationPreprocessor
from ray.rllib.core.columns import Columns
from test_packed_policies import fragment
from test_pipelines import BOX, DISCRETE, MIXED, Counting, Halved, Opaque, config, module_of, rllib, rows, samples

from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.errors import PolicyError
from rllink_zmq.fragments import Cut, FragmentBuilder, Origin
from rllink_zmq.messages import ACT, ACTION, SEEN, SEEN_REWARD, STATE_IN, STATE_OUT, Column, Place, Told
from rllink_zmq.policy import PolicyManifest, unpack_policy
from rllink_zmq.rllib import following as following_room
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.following import FollowedFragments, FollowingActor, LostError
from rllink_zmq.rllib.pieces import pipeline_of
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.service import ActService
from rllink_zmq.session_runner import Lease
from rllink_zmq.spaces import from_wire

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Since(ConnectorV2):
    """Adds how long the episode is to its observations, and the mean of all that has been in it."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            mean = np.mean([np.mean(one) for one in episode.get_observations()])
            episode.set_observations(at_indices=-1, new_data=episode.get_observations(-1) + np.float32(len(episode)))
            episode.set_observations(at_indices=-1, new_data=episode.get_observations(-1) + np.float32(mean))
        return batch


class Remembers(SingleAgentObservationPreprocessor):
    """Keeps in itself what it has seen, and tells nobody."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sum = 0.0

    def preprocess(self, observation: Any, episode: Any) -> Any:
        self.sum += float(np.sum(observation))
        return observation + np.float32(self.sum)


class Noisy(SingleAgentObservationPreprocessor):
    def preprocess(self, observation: Any, episode: Any) -> Any:
        return observation + np.random.normal(size=observation.shape).astype(np.float32)


class Rewarded(ConnectorV2):
    """Module-to-env: another action where the episode's return is large."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            key = (episode.id_,)
            if episode.get_return() > 1.0:
                batch[Columns.ACTIONS][key] = [1 - action for action in batch[Columns.ACTIONS][key]]
        return batch


class Opaques(Opaque):
    """Has a state that can't travel."""

    def set_state(self, state: Any) -> None: ...


def lstm(made: PPOConfig) -> PPOConfig:
    return made.rl_module(model_config={"fcnet_hiddens": [8], "use_lstm": True, "max_seq_len": 4})


CASES: dict[str, tuple[gym.Space[Any], Callable[[], PPOConfig]]] = {
    "the whole episode": (BOX, lambda: config(BOX, Since)),
    "its own memory": (BOX, lambda: config(BOX, Remembers)),
    "a state": (BOX, lambda: config(BOX, Counting, Remembers)),
    "a state that can't travel": (BOX, lambda: config(BOX, Opaques)),
    "a filter that learns": (BOX, lambda: config(BOX, Remembers, MeanStdFilter)),
    "several parts": (MIXED, lambda: config(MIXED, FlattenObservations, Since)),
    "frames": (
        gym.spaces.Box(0, 1, (10, 10, 1)),
        lambda: config(gym.spaces.Box(0, 1, (10, 10, 1)), lambda: FrameStackingEnvToModule(num_frames=18)),  # type: ignore[arg-type]
    ),
    "recurrent": (BOX, lambda: lstm(config(BOX, Since))),
    "actions by what was": (BOX, lambda: config(BOX, Since, to_env=Rewarded)),
    "rewards": (BOX, lambda: config(BOX, Rewarding)),
}


class Followed:
    """A simulator's episode, whose requests an actor answers."""

    def __init__(self, made: PPOConfig, space: gym.Space[Any]) -> None:
        self.config, self.module = made, module_of(made)
        self.manifest: PolicyManifest = unpack_policy(policy_of(made, self.module))[0]
        assert self.manifest.seen is not None
        self.lives: Any = pipeline_of(made)
        self.actor = FollowingActor(self.module, self.manifest, made, self.lives, threading.Lock())
        self.actor.apply(0, weights_body(self.manifest, self.module.get_state()))
        self.space = space

    def asked(
        self, observations: Sequence[Any], places: Sequence[Place], acts: bool = True, evaluation: bool = False
    ) -> dict[str, NDArray[Any]]:
        columns, body = to_buffers({"obs": rows(self.space, list(observations))})
        message = ACT(
            bytes(16), 1, len(places), columns, evaluation=evaluation, places=tuple(places), acts=acts
        )  # fmt: skip
        episodes = self.actor.follow(message, [bytes(buffer) for buffer in body])
        (answer,) = self.actor.answer([(message, episodes)], False)
        assert answer.version == 0
        return answer.columns

    def fragments(self, theirs: Any, observations: list[Any], cuts: Sequence[int]) -> list[Lease]:
        """Cut after these steps; some with the answer to the next request, some with one for just that."""
        layout = layout_of_policy(self.manifest)
        builder = FragmentBuilder("e")
        builder.begin(layout, "acted", Origin("", 0), 100)
        leases = []

        def cut(end: str = "no") -> None:
            made: Cut = builder.cut()
            leases.append(lease(made, len(leases) + 1, end))
            builder.begin(layout, "acted", Origin("", 0), 100)

        for t, observation in enumerate(observations[:-1]):
            given = builder.observe(observation)
            place = Place("e", t, builder.last_reward)
            if t in cuts and t % 2:
                looked = self.asked([observation], [place], acts=False)
                builder.saw(looked[SEEN][0])
                builder.rewarded(float(looked[SEEN_REWARD][0]))
                cut()
                builder.observe(observation)
            np.testing.assert_array_equal(builder.given, given)
            answer = self.asked([observation], [place])
            builder.saw(answer[SEEN][0])
            builder.rewarded(float(answer[SEEN_REWARD][0]))
            if t in cuts and not t % 2:
                cut()
                builder.observe(observation)
                builder.saw(answer[SEEN][0])
            logits = theirs.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS, t)
            np.testing.assert_allclose(answer["action_dist_inputs"][0], logits, rtol=1e-4, atol=1e-5)
            assert answer["actions"][0] == theirs.get_actions(t)
            memory = [answer[STATE_OUT + part.name][0] for part in self.manifest.state]
            assert (STATE_IN + self.manifest.state[0].name in answer if memory else True) is (t == 0 or not memory)
            builder.act(answer["actions"][0], float(answer["action_logp"][0]), answer["action_dist_inputs"][0], memory)
            builder.reward(0.5 * (t + 1) - 1.0)  # as `Replayed` gives it
        last = len(observations) - 1
        builder.observe(observations[-1])
        end = Place("e", last, builder.last_reward, "terminated")
        answer = self.asked([observations[-1]], [end], acts=False)
        builder.saw(answer[SEEN][0])
        builder.rewarded(float(answer[SEEN_REWARD][0]))
        cut("terminated")
        return leases

    def builder(self) -> EpisodeBuilder:
        assert self.manifest.seen is not None
        space = from_wire(self.manifest.seen)
        connectors = FollowedFragments(space, self.manifest.lookback)
        return EpisodeBuilder(space, DISCRETE, self.module, connectors=connectors)


def lease(cut: Cut, number: int, end: str) -> Lease:
    arrays = dict(cut.arrays)
    made = fragment(arrays.pop("obs"), **arrays)
    header = msgspec.structs.replace(made.message, t0=cut.t0, number=number, end=end)
    return made._replace(message=header)


@pytest.mark.parametrize("case", list(CASES))
def test_actions_and_what_is_learned_from_are_those_of_rllibs_own_runner(case: str) -> None:
    space, make = CASES[case]
    observations = samples(space, 12)
    theirs = rllib(make(), observations)
    for cuts in ((), (4,), (1, 2, 5, 8)):
        followed = Followed(make(), space)
        builder = followed.builder()
        chunks, refused = builder.build(followed.fragments(theirs, observations, cuts))
        assert not refused, refused
        (chunk,) = chunks
        np.testing.assert_allclose(chunk.episode.get_observations(), theirs.get_observations(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(chunk.episode.get_rewards(), theirs.get_rewards())
        assert chunk.episode.is_terminated


def test_a_later_chunk_has_what_was_before_it() -> None:
    """As far as RLlib's own runner lets a learner look back."""
    space, make = CASES["the whole episode"]
    observations = samples(space, 12)
    theirs = rllib(make(), observations)
    followed = Followed(make().env_runners(episode_lookback_horizon=3), space)
    first, second = followed.fragments(theirs, observations, (7,))
    builder = followed.builder()
    for one, t0, back in ((first, 0, 0), (second, 7, 3)):
        ((chunk,), refused) = builder.build([one])
        assert not refused
        found = chunk.episode.get_observations(slice(-back, None), neg_index_as_lookback=True)
        np.testing.assert_allclose(found, theirs.get_observations(slice(t0 - back, t0 + len(chunk.episode) + 1)))


def test_what_is_drawn_is_what_is_learned_from() -> None:
    """Nobody could make the same noise again: the answer tells what the policy saw."""
    followed = Followed(config(BOX, Noisy), BOX)
    (observation,) = samples(BOX, 1)
    for t in range(5):
        answer = followed.asked([observation], [Place("e", t)])
        seen = answer[SEEN]
        assert np.abs(seen[0] - observation).max() > 1e-3
        out = followed.module.forward_inference({Columns.OBS: torch.from_numpy(seen)})
        logits = out[Columns.ACTION_DIST_INPUTS].detach().numpy()
        np.testing.assert_allclose(answer["action_dist_inputs"], logits, rtol=1e-5)


def test_requests_are_of_one_batch_and_some_were_looked_at_before() -> None:
    """Three episodes at other steps; one whose observation has been seen already, without an action."""
    followed, alone = (Followed(config(BOX, Since), BOX) for _ in range(2))
    observations = samples(BOX, 9)
    names = ("a", "b", "c")
    for t in range(3):
        mine = observations[3 * t : 3 * t + 3]
        places = [Place(name, t, 0.5) for name in names]
        if t == 1:
            looked = followed.asked([mine[1]], [places[1]], acts=False)[SEEN]
            again = followed.asked([mine[1]], [places[1]], acts=False)[SEEN]
            np.testing.assert_array_equal(looked, again)
        together = followed.asked(mine, places)
        each = [alone.asked([one], [place]) for one, place in zip(mine, places, strict=True)]
        for column, array in together.items():
            np.testing.assert_allclose(array, np.concatenate([one[column] for one in each]), rtol=1e-5, err_msg=column)
        if t == 1:
            np.testing.assert_array_equal(together[SEEN][1], looked[0])


class Picky(Halved):
    """Halves in place, and fails behind that once for what is far out."""

    failed = False

    def preprocess(self, observation: Any, episode: Any) -> Any:
        observation /= 2
        if observation[0] > 3 and not self.failed:
            self.failed = True
            raise ValueError("out of the map")
        return observation


def test_what_a_piece_fails_for_is_shown_to_it_again_as_it_came() -> None:
    """And to those who were asked for with it."""
    followed = Followed(config(BOX, Noisy, Picky), BOX)
    followed.lives.connectors.pop(0)
    observations = [np.full(3, value, np.float32) for value in (0.5, 8.0)]
    places = [Place("a", 0), Place("b", 0)]
    with pytest.raises(ValueError, match="out of the map"):
        followed.asked(observations, places)
    for _ in range(2):
        np.testing.assert_array_equal(followed.asked(observations, places)[SEEN], np.stack(observations) / 2)


class Session:
    """Keeps what a service answers."""

    session = b"s" * 16

    def __init__(self) -> None:
        self.told: dict[int, tuple[str, dict[str, NDArray[Any]]]] = {}

    def answer(self, told: ACTION, body: Sequence[Any], now: float) -> None:
        arrays = from_body(told.columns, [bytes(buffer) for buffer in body])
        self.told[told.request] = told.code or told.follower.decode(), arrays


def served(followed: Followed, *requests: tuple[str, Any, Place, bool]) -> dict[int, tuple[str, dict[str, Any]]]:
    """What a service answers to these in one batch, of (session, observation, place, acts)."""
    service = ActService.__new__(ActService)
    service.session = session = Session()  # type: ignore[assignment]
    service.actor, service.run, service.batches, service.rows = followed.actor, "r", 0, 0
    batch = []
    for i, (name, observation, place, acts) in enumerate(requests):
        columns, body = to_buffers({"obs": rows(followed.space, [observation])})
        message = ACT(name.encode() * 16, i, 1, columns, places=(place,), acts=acts)
        batch.append((message, [bytes(buffer) for buffer in body]))
    service._answer(batch, False, 0.0)
    return session.told  # type: ignore[no-any-return]


@pytest.mark.parametrize("acts_first", [False, True])
def test_what_is_looked_at_in_the_batch_that_acts_is_seen_once(acts_first: bool) -> None:
    """Whatever comes before them: another simulator's request, or the action itself."""
    followed, alone = (Followed(config(BOX, Since), BOX) for _ in range(2))
    first, second = samples(BOX, 2)
    right = [alone.asked([one], [Place("e", t)]) for t, one in enumerate((first, second))]
    followed.asked([first], [Place("e", 0)])
    session = "\0"  # of `asked`
    mine = [(session, second, Place("e", 1), acts) for acts in (acts_first, not acts_first)]
    told = served(followed, ("o", first, Place("other", 0), True), *mine)
    for request in (1, 2):
        np.testing.assert_allclose(told[request][1][SEEN], right[1][SEEN])
    assert told[1][0] == told[2][0] == "s" * 16


def test_one_episode_in_a_batch_twice_is_answered_twice_and_spoils_nothing() -> None:
    """An action that was given up and is asked for again."""
    followed, alone = (Followed(config(BOX, Since), BOX) for _ in range(2))
    first, second = samples(BOX, 2)
    told = served(followed, *(("m", first, Place("e", 0), True), ("o", second, Place("e", 0), True)) * 2)
    for i, one in enumerate((first, second)):
        right = alone.asked([one], [Place(f"{i}", 0)])
        for request in (i, i + 2):
            for name in (SEEN, "action_dist_inputs"):
                np.testing.assert_allclose(told[request][1][name], right[name], rtol=1e-5)


def test_what_does_not_belong_together_is_refused_and_the_service_goes_on() -> None:
    followed = Followed(config(BOX, Since), BOX)
    (observation,) = samples(BOX, 1)
    nan = np.full(3, np.nan, np.float32)
    service: Any = ActService.__new__(ActService)
    service.session = session = Session()
    service.actor, service.module, service.run, service.batches, service.rows = followed.actor, "", "r", 0, 0
    (obs,), body = to_buffers({"obs": observation[np.newaxis]})
    place = Place("e", 0)
    for i, message in enumerate([
        ACT(b"m" * 16, 0, 1, (obs,)),
        ACT(b"m" * 16, 1, 1, (obs,), places=(place, place)),
        ACT(b"m" * 16, 2, 1, (obs,), places=(place,), told=(Told("a", "m"),)),
        ACT(b"m" * 16, 3, 1, (obs, *followed_before(observation)), places=(place,)),
        ACT(b"m" * 16, 4, 1, (obs,), places=(place,)),
    ]):  # fmt: skip
        service._answer([(message, [bytes(body[0]) if i != 4 else nan.tobytes()])], False, 0.0)
    assert [code for code, _ in session.told.values()] == ["follows"] + ["malformed"] * 4
    assert served(followed, ("m", observation, place, True))[0][0] == "s" * 16


def followed_before(observation: NDArray[Any]) -> tuple[Column, ...]:
    """Descriptions of columns for which there are no bytes."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "obs_before": ("<f4", (1, 1, 3)), "actions_before": ("<i8", (1, 1)), "rewards_before": ("<f4", (1, 1)),
        "steps_before": ("<i4", (1,)),
    }  # fmt: skip
    return tuple(Column(name, dtype, shape) for name, (dtype, shape) in shapes.items())


@pytest.mark.parametrize("end", ["no", "terminated"])
def test_an_episode_that_begins_anew_has_nothing_of_the_one_before(end: Any) -> None:
    """Its name was used before, and the last one was looked at, or ended, where this one acts."""
    followed, alone = (Followed(config(BOX, Since), BOX) for _ in range(2))
    observations = samples(BOX, 4)
    followed.asked([observations[0]], [Place("e", 0)])
    followed.asked([observations[1]], [Place("e", 1, 0.0, end)], acts=False)
    for one in (followed, alone):
        one.asked([observations[2]], [Place("e", 0)])
    mine, right = (one.asked([observations[3]], [Place("e", 1)]) for one in (followed, alone))
    np.testing.assert_array_equal(mine[SEEN], right[SEEN])


def test_more_that_is_told_of_a_step_counts() -> None:
    """A reward after an action was given up."""
    followed, alone = (Followed(config(BOX, Rewarding), BOX) for _ in range(2))
    first, second = samples(BOX, 2)
    for one in (followed, alone):
        one.asked([first], [Place("e", 0)])
    followed.asked([second], [Place("e", 1, 1.0)])
    followed.asked([second], [Place("e", 1, 2.0)], acts=False)
    mine, right = (one.asked([second], [Place("e", 1, 6.0)]) for one in (followed, alone))
    np.testing.assert_array_equal(mine[SEEN], right[SEEN])
    assert mine[SEEN_REWARD] == right[SEEN_REWARD] == [12.0]


def test_who_ends_with_another_observation_than_was_asked_for_ends_with_that() -> None:
    """The action for the one before was given up when it had come."""
    followed, alone = (Followed(config(BOX, Since), BOX) for _ in range(2))
    first, second, third = samples(BOX, 3)
    for one in (followed, alone):
        one.asked([first], [Place("e", 0)])
    followed.asked([second], [Place("e", 1)])
    end = Place("e", 1, 0.0, "terminated")
    mine, right = (one.asked([third], [end], acts=False) for one in (followed, alone))
    np.testing.assert_array_equal(mine[SEEN], right[SEEN])
    assert not followed.actor._trains._episodes


@pytest.mark.parametrize(("piece", "what"), [("Infinite", "a reward of inf"), ("Nowhere", "that holds NaN")])
def test_what_is_not_finite_is_told_by_the_runner(piece: str, what: str) -> None:
    """No fragment could bring it."""
    followed = Followed(config(BOX, {"Infinite": Infinite, "Nowhere": Nowhere}[piece]), BOX)
    first, second, third = samples(BOX, 3)
    for t, one in enumerate((first, second)):
        followed.asked([one], [Place("e", t, 1.0)])
    with pytest.raises(PolicyError, match=what):
        followed.asked([third], [Place("e", 2, 100.0)])


class Infinite(ConnectorV2):
    """Makes much of a large reward."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            if len(episode):
                reward = episode.get_rewards(-1)
                episode.set_rewards(at_indices=-1, new_data=float("inf") if reward > 99 else reward + 1)
        return batch


class Nowhere(ConnectorV2):
    """And sees nothing then."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            seen = episode.get_observations(-1) + np.float32(len(episode))
            lost = len(episode) and episode.get_rewards(-1) > 99
            episode.set_observations(at_indices=-1, new_data=seen * np.float32("nan") if lost else seen)
        return batch


class Rewarding(ConnectorV2):
    """Sees the last reward, and doubles it."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            if len(episode):
                reward = np.float32(episode.get_rewards(-1))
                episode.set_observations(at_indices=-1, new_data=episode.get_observations(-1) + reward)
                episode.set_rewards(at_indices=-1, new_data=2 * episode.get_rewards(-1))
        return batch


class Scaled(SingleAgentObservationPreprocessor):
    """Makes floats of bytes, and tells no space."""

    def preprocess(self, observation: Any, episode: Any) -> Any:
        return (observation / 255 + len(episode)).astype(np.float32)


def test_what_pieces_make_travels_as_it_is() -> None:
    """Also where the space that they tell is another one."""
    space = gym.spaces.Box(0, 255, (3,), np.uint8)
    made = config(space, Scaled)
    theirs = rllib(made, samples(space, 4))
    followed = Followed(config(space, Scaled), space)
    builder = followed.builder()
    ((chunk,), refused) = builder.build(followed.fragments(theirs, samples(space, 4), (2,)))
    assert not refused and chunk.episode.get_observations().dtype == np.float32
    np.testing.assert_allclose(chunk.episode.get_observations(), theirs.get_observations(), rtol=1e-6)


def test_what_no_policy_has_seen_is_not_taken_for_it() -> None:
    followed = Followed(config(BOX, Since), BOX)
    one = fragment(np.stack(samples(BOX, 4)))
    ((_), (refusal,)) = followed.builder().build([one])
    assert "nobody has seen the observations of a simulator that chooses its actions itself" in str(refusal.error)


def test_an_answer_that_was_lost_is_given_again() -> None:
    followed = Followed(config(BOX, Since), BOX)
    observations = samples(BOX, 4)
    for t, observation in enumerate(observations):
        answer = followed.asked([observation], [Place("e", t, 1.0)])
        again = followed.asked([observation], [Place("e", t, 1.0)])
        for column, array in answer.items():
            np.testing.assert_array_equal(array, again[column])
    end = Place("e", 4, 1.0, "truncated")
    answer = followed.asked([observations[0]], [end], acts=False)
    np.testing.assert_array_equal(answer[SEEN], followed.asked([observations[0]], [end], acts=False)[SEEN])


@pytest.mark.parametrize("place", [Place("other", 1), Place("e", 3), Place("e", 0, 1.0), Place("e", 1)])
def test_an_episode_that_is_not_followed_is_lost(place: Place) -> None:
    """One that nobody has begun, that goes on elsewhere, or that goes back; step 0 begins anew."""
    followed = Followed(config(BOX, Since), BOX)
    observations = samples(BOX, 4)
    for t, observation in enumerate(observations[:3]):
        followed.asked([observation], [Place("e", t)])
    if place.t:
        with pytest.raises(LostError, match=f"episode '{place.episode}' is"):
            followed.asked([observations[3]], [place if place.t != 3 else Place("e", 5)])
    else:
        fresh = Followed(config(BOX, Since), BOX)
        one = followed.asked([observations[3]], [place])
        np.testing.assert_array_equal(one[SEEN], fresh.asked([observations[3]], [place])[SEEN])


def test_an_episode_of_which_nothing_is_heard_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    followed = Followed(config(BOX, Since), BOX)
    (observation,) = samples(BOX, 1)
    followed.asked([observation], [Place("e", 0)])
    later = time.monotonic() + following_room.FORGOTTEN + 1
    monkeypatch.setattr(following_room.time, "monotonic", lambda: later)
    followed.asked([observation], [Place("f", 0)])
    assert followed.asked([observation], [Place("f", 1)])
    with pytest.raises(LostError, match="episode 'e' is not followed here"):
        followed.asked([observation], [Place("e", 1)])


def test_an_evaluation_begins_with_what_was_learned_and_teaches_nothing() -> None:
    """And another episode of it doesn't disturb those that go on."""
    followed = Followed(config(BOX, Counting, Remembers), BOX)
    piece = followed.lives.connectors[0]
    observations = samples(BOX, 3)
    for t, observation in enumerate(observations):
        followed.asked([observation], [Place("e", t)])
    assert piece.seen == 3
    for t, observation in enumerate(observations[:2]):
        followed.asked([observation], [Place("v", t)], evaluation=True)
    followed.asked([observations[0]], [Place("w", 0)], evaluation=True)
    evaluating = followed.actor._evaluates.pipelines.to_module.connectors[0]
    assert (piece.seen, evaluating.seen) == (3, 6)


def test_a_long_episode_is_cut_as_rllibs_own_runner_does() -> None:
    """What the pieces may look back at is bounded: by the fragment's length, and `episode_lookback_horizon`."""
    made = config(BOX, Since, rollout_fragment_length=5, episode_lookback_horizon=2)
    followed = Followed(made, BOX)
    observations = samples(BOX, 40)
    for t, observation in enumerate(observations):
        followed.asked([observation], [Place("e", t)])
    (known,) = followed.actor._trains._episodes.values()
    assert known.t == known.episode.t == 39 and len(known.episode.observations.data) <= 5 + 2 + 1


def test_pieces_that_a_request_can_feed_are_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    made = config(BOX, Halved)
    assert unpack_policy(policy_of(made, module_of(made)))[0].seen is None
    assert "follow" not in caplog.text
    made = config(BOX, Noisy)
    manifest = unpack_policy(policy_of(made, module_of(made)))[0]
    assert "runners follow its episodes: the env-to-module piece Noisy looks" in manifest.remote_only
    assert "runners follow each episode" in caplog.text
