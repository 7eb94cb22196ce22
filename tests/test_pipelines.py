"""The user's connectors: at the action service, in fragments, and in RLlib's own runner beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter, PrevActionsPrevRewards
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.connectors.env_to_module.observation_preprocessor import SingleAgentObservationPreprocessor
from ray.rllib.connectors.learner.frame_stacking import FrameStackingLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from test_packed_policies import fragment

from rllink_zmq.arrays import to_buffers
from rllink_zmq.errors import PolicyError, SettingsError
from rllink_zmq.fragments import Before, Cut, FragmentBuilder, Origin, Row, StateRow, layout_of_spaces
from rllink_zmq.messages import FRAGMENT, STATE_IN, STATE_OUT
from rllink_zmq.packing import Packing
from rllink_zmq.policy import Policy, PolicyManifest, unpack_policy
from rllink_zmq.rllib.actors import ModuleActor, PipelineActor
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import connectors_state, weights_body
from rllink_zmq.rllib.export_connectors import check_connectors, own_flattening
from rllink_zmq.rllib.flattening import Came
from rllink_zmq.rllib.pieces import has_own_connectors, pipeline_of, state_bytes
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.rewriting import Filters, FragmentConnectors
from rllink_zmq.rllib.runner import Held, ZmqEnvRunner
from rllink_zmq.rllib.states import from_bytes, to_bytes
from rllink_zmq.session_runner import Lease
from rllink_zmq.wire import check_body

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

MIXED = gym.spaces.Dict(
    {"where": gym.spaces.Box(-1, 1, (2,)), "which": gym.spaces.Discrete(3), "on": gym.spaces.MultiBinary(2)}
)
BOX = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
DISCRETE = gym.spaces.Discrete(2)


class Halved(SingleAgentObservationPreprocessor):
    def preprocess(self, observation: Any, episode: Any) -> Any:
        return observation / 2


class Steps(ConnectorV2):
    """Adds how many steps there have been: what a request alone can't tell."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            self.add_batch_item(batch, "steps", np.float32(len(episode)), single_agent_episode=episode)
        return batch


class InPlace(SingleAgentObservationPreprocessor):
    def preprocess(self, observation: Any, episode: Any) -> Any:
        observation /= 2
        return observation


class AsksTheModule(Halved):
    def __call__(self, *, rl_module: Any, **kwargs: Any) -> Any:
        assert rl_module.action_space == DISCRETE
        return super().__call__(rl_module=rl_module, **kwargs)


class Picky(Halved):
    def preprocess(self, observation: Any, episode: Any) -> Any:
        if observation[0] > 50:
            raise ValueError("out of the map")
        return observation / 2


class Counting(Halved):
    """Its state moves with each call."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = 0

    def preprocess(self, observation: Any, episode: Any) -> Any:
        self.seen += 1
        return observation / 2

    def get_state(self, *args: Any, **kwargs: Any) -> Any:
        return {"seen": self.seen} if self.seen else {}

    def set_state(self, state: Any) -> None:
        self.seen = state["seen"]


class Broken(ConnectorV2):
    def __call__(self, **kwargs: Any) -> Any:
        raise ValueError("no such sensor")


class Opaque(Halved):
    def get_state(self, *args: Any, **kwargs: Any) -> Any:
        return {"lock": object()}

    def set_state(self, state: Any) -> None: ...


class Turned(ConnectorV2):
    """Module-to-env: does the other thing."""

    def __call__(self, *, batch: Any, **kwargs: Any) -> Any:
        acted = batch[Columns.ACTIONS]
        batch[Columns.ACTIONS] = {key: [1 - action for action in actions] for key, actions in acted.items()}
        return batch


class ByReturn(ConnectorV2):
    """Module-to-env: another action where the return is below zero."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            if episode.get_return() < 0:
                key = (episode.id_,)
                batch[Columns.ACTIONS][key] = [1 - action for action in batch[Columns.ACTIONS][key]]
        return batch


class Drawn(ConnectorV2):
    """Module-to-env: any action."""

    def __call__(self, *, batch: Any, **kwargs: Any) -> Any:
        acted = batch[Columns.ACTIONS]
        batch[Columns.ACTIONS] = {key: [DISCRETE.sample() for _ in actions] for key, actions in acted.items()}
        return batch


class Explores(Drawn):
    """Any action, where actions are drawn."""

    def __call__(self, *, batch: Any, explore: bool, **kwargs: Any) -> Any:
        return super().__call__(batch=batch) if explore else batch


class AddsLength(SingleAgentObservationPreprocessor):
    """In place."""

    def preprocess(self, observation: Any, episode: Any) -> Any:
        observation += np.float32(len(episode))
        return observation


class Undoes(ConnectorV2):
    """Makes another action of the last one."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            if len(episode):
                episode.set_actions(at_indices=-1, new_data=1 - episode.get_actions(-1))
        return batch


class Doubles(ConnectorV2):
    """Each reward counts twice."""

    def __call__(self, *, batch: Any, episodes: Any, **kwargs: Any) -> Any:
        for episode in self.single_agent_episode_iterator(episodes):
            if len(episode):
                episode.set_rewards(at_indices=-1, new_data=2 * episode.get_rewards(-1))
        return batch


def config(space: gym.Space[Any], *pieces: type, to_env: type | None = None, **more: Any) -> PPOConfig:
    return (
        PPOConfig()
        .environment(observation_space=space, action_space=DISCRETE)
        .env_runners(
            env_to_module_connector=(lambda env, spaces, device: [p() for p in pieces]) if pieces else None,
            module_to_env_connector=(lambda env, spaces: [to_env()]) if to_env else None,
            num_env_runners=0,
            **more,
        )
        .rl_module(model_config={"fcnet_hiddens": [8]})
    )


def module_of(made: PPOConfig) -> Any:
    torch.manual_seed(3)
    seen = Pipelines(made).to_module.observation_space
    return made.get_rl_module_spec(spaces={DEFAULT_MODULE_ID: (seen, DISCRETE)}, inference_only=True).build()


def actor_of(made: PPOConfig, state: bytes = b"") -> tuple[PipelineActor, PolicyManifest]:
    module = module_of(made)
    manifest = unpack_policy(policy_of(made, module))[0]
    actor = PipelineActor(module, manifest, Pipelines(made))
    actor.apply(0, weights_body(manifest, module.get_state(), connectors=state))
    return actor, manifest


class Replayed(gym.Env[Any, int]):
    """Gives recorded observations, one after the other."""

    def __init__(self, space: gym.Space[Any], observations: list[Any]) -> None:
        self.observation_space, self.action_space = space, DISCRETE
        self._observations = observations
        self._at = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._at = 0
        return self._observations[0], {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._at += 1
        return self._observations[self._at], 0.5 * self._at - 1.0, False, self._at == len(self._observations) - 1, {}


def rllib(made: PPOConfig, observations: list[Any], explore: bool = False) -> Any:
    """The episode that RLlib's own runner makes of these observations, by the weights of `module_of`."""
    copy = made.copy(copy_frozen=False)
    copy.environment(env=lambda _: Replayed(made.observation_space, observations))
    runner = SingleAgentEnvRunner(config=copy)
    try:
        runner.module.set_state(module_of(made).get_state())
        (episode,) = runner.sample(num_episodes=1, explore=explore)
        return episode.to_numpy()
    finally:
        runner.stop()


def samples(space: gym.Space[Any], count: int = 6) -> list[Any]:
    space.seed(5)
    return [space.sample() for _ in range(count)]


def rows(space: gym.Space[Any], observations: list[Any]) -> NDArray[Any]:
    if not isinstance(space, gym.spaces.Dict):
        return np.stack(observations)
    packing = Packing(space)
    return np.stack([packing.pack(o, lambda v, w, s, d: np.asarray(v, d)) for o in observations])


@pytest.mark.parametrize(
    ("space", "pieces"),
    [
        (MIXED, (FlattenObservations,)),
        (BOX, (Halved,)),
        (BOX, (Halved, Halved)),
        (BOX, (InPlace,)),
        (BOX, (AsksTheModule,)),
    ],
)
def test_actions_and_episodes_are_those_of_rllibs_own_runner(space: gym.Space[Any], pieces: tuple[type, ...]) -> None:
    made, observations = config(space, *pieces), samples(space)
    theirs = rllib(made, observations)
    actor, _ = actor_of(made)
    ours = actor.act(rows(space, observations[:-1]), False)
    np.testing.assert_array_equal(ours["actions"], theirs.get_actions())
    expected = theirs.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
    np.testing.assert_allclose(ours["action_dist_inputs"], expected, rtol=1e-5, atol=1e-6)
    connectors = FragmentConnectors(Pipelines(made, module=actor._module), Filters(2))
    builder = EpisodeBuilder(space, DISCRETE, actor._module, connectors=connectors)
    (built,), refused = builder.build([fragment(rows(space, observations))])
    assert not refused
    np.testing.assert_allclose(built.episode.get_observations(), theirs.get_observations(), rtol=1e-6)
    filled_in = built.episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
    np.testing.assert_allclose(filled_in, expected, rtol=1e-5, atol=1e-6)
    assert built.episode.observation_space == theirs.observation_space


@pytest.mark.parametrize("removed", [None, ["where"]])
def test_flattening_is_done_by_the_graph(removed: list[str] | None) -> None:
    flatten = partial(FlattenObservations, MIXED, DISCRETE, keys_to_remove=removed)
    made, observations = config(MIXED, flatten), samples(MIXED)
    theirs = rllib(made, observations)
    module = module_of(made)
    blob = policy_of(made, module)
    manifest = unpack_policy(blob)[0]
    assert not manifest.remote_only and len(manifest.parts) == 3, "the graph gets all parts"
    policy = Policy.load(blob, seed=0)
    policy.apply(0, weights_body(manifest, module.get_state()))
    given = rows(MIXED, observations)
    acted = policy.act(given[:-1], explore=False)
    np.testing.assert_array_equal(acted.actions, theirs.get_actions())
    expected = theirs.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
    np.testing.assert_allclose(acted.action_dist_inputs, expected, rtol=1e-5, atol=1e-6)
    actor = ModuleActor(module, manifest, DISCRETE, True, False, flattening=own_flattening(made))
    actor.apply(0, weights_body(manifest, module.get_state()))
    asked = actor.act(given[:-1], explore=False)
    np.testing.assert_allclose(asked["action_dist_inputs"], expected, rtol=1e-5, atol=1e-6)
    builder = EpisodeBuilder(
        MIXED, DISCRETE, module, connectors=FragmentConnectors(Pipelines(made, module=module), Filters(2))
    )
    (built,), refused = builder.build([fragment(given, actions=acted.actions)])
    assert not refused
    np.testing.assert_array_equal(built.episode.get_observations(), theirs.get_observations())


def test_flattening_and_more_is_not_for_the_graph() -> None:
    made = config(MIXED, FlattenObservations, Halved)
    assert own_flattening(made) is None
    with pytest.raises(PolicyError, match="adds FlattenObservations, Halved"):
        check_connectors(made)


def test_a_piece_that_fails_on_one_fragment_costs_that_one() -> None:
    made = config(BOX, Picky)
    connectors = FragmentConnectors(Pipelines(made), Filters(2))
    builder = EpisodeBuilder(BOX, DISCRETE, module_of(made), connectors=connectors)
    good = np.stack(samples(BOX))
    bad = good.copy()
    bad[2, 0] = 60
    built, (refusal,) = builder.build([fragment(bad), fragment(good)])
    assert len(built) == 1 and "the configured connectors fail on it: ValueError: out of the map" in str(refusal.error)


@pytest.mark.parametrize(
    ("t0", "before", "text"),
    [
        (5, None, "begins at step 5 needs 2 rows of 'obs_before'"),
        (5, np.zeros((1, 10, 10, 1), np.float32), "needs 2 rows"),
        (5, np.zeros((2000, 10, 10, 1), np.float32), "needs 2 rows"),
        (5, np.zeros((2, 10, 10, 1), np.float64), "like 'obs'"),
        (5, np.zeros((2, 10, 9, 1), np.float32), "'obs_before' has rows of shape"),
        (5, np.full((2, 10, 10, 1), np.nan, np.float32), "'obs_before' holds NaN"),
        (5, {"actions_before": np.zeros(1, np.int64)}, "needs 2 rows of 'actions_before', like 'actions'"),
        (5, {"actions_before": np.array([0, 2], np.int64)}, "'actions_before' must be integers from 0 to 1"),
        (5, {"rewards_before": np.array([0, np.nan], np.float32)}, "'rewards_before' must be one finite number"),
        (1, np.zeros((2, 10, 10, 1), np.float32), "begins at step 1 needs 1 rows"),
    ],
)
def test_earlier_steps_that_do_not_fit_are_refused(t0: int, before: Any, text: str) -> None:
    made = stacked()
    connectors = FragmentConnectors(Pipelines(made, lookback=2), Filters(2))
    builder = EpisodeBuilder(PIXELS, DISCRETE, module_of(made), connectors=connectors)
    fitting = {
        "obs_before": np.zeros((2, 10, 10, 1), np.float32),
        "actions_before": np.zeros(2, np.int64),
        "rewards_before": np.zeros(2, np.float32),
    }
    changed = before if isinstance(before, dict) else {"obs_before": before}
    lease = fragment(np.stack(samples(PIXELS)), **({} if before is None else fitting | changed))
    lease = lease._replace(message=msgspec.structs.replace(lease.message, t0=t0))
    built, (refusal,) = builder.build([lease])
    assert not built and text in str(refusal.error)


@pytest.mark.parametrize(
    "inputs", [np.zeros((5, 3), np.float32), np.zeros(5, np.float32), np.full((5, 2), np.inf, np.float32)], ids=str
)
def test_dist_inputs_that_do_not_fit_are_refused(inputs: NDArray[Any]) -> None:
    builder = EpisodeBuilder(BOX, DISCRETE, module_of(config(BOX)))
    builder.dist_inputs = 2
    built, (refusal,) = builder.build([fragment(np.stack(samples(BOX)), action_dist_inputs=inputs)])
    assert not built and "'action_dist_inputs'" in str(refusal.error)


def test_module_to_env_pieces_have_the_last_word() -> None:
    turned = actor_of(config(BOX, to_env=Turned))[0].act(np.stack(samples(BOX)), False)
    plain = actor_of(config(BOX, Halved))[0]
    straight = plain.act(np.stack(samples(BOX)) * 2, False)
    np.testing.assert_array_equal(turned["actions"], 1 - straight["actions"])
    np.testing.assert_array_equal(turned["env_actions"], turned["actions"])


def test_a_filters_state_is_the_versions_and_does_not_learn_from_requests() -> None:
    made = config(BOX, MeanStdFilter)
    learning = made.build_env_to_module_connector(
        spaces=dict.fromkeys(("__env__", "__env_single__"), (BOX, DISCRETE))
    )  # fmt: skip
    live = Pipelines(made, learns=learning)
    before = state_bytes(learning)
    data = np.random.default_rng(1).normal(3.0, 2.0, (200, 3)).astype(np.float32)
    nothing = np.zeros(0)
    live.learn(Came(data, nothing, nothing), 0)
    after = state_bytes(learning)
    assert live.stateful and after != before
    actor, manifest = actor_of(made, before)
    module = module_of(made)
    body = weights_body(manifest, module.get_state(), connectors=after)
    assert len(body) == manifest.weights_bytes and connectors_state(manifest, body) == after
    told: list[tuple[int, bytes]] = []
    actor._on_state = lambda version, state: told.append((version, state))
    actor.apply(1, body)
    assert told == [(1, after)]
    mean, std = data.mean(0), data.std(0, ddof=1)
    with torch.no_grad():
        expected = module.forward_inference({Columns.OBS: torch.from_numpy((data[:5] - mean) / std)})
    for _ in range(2):
        ours = actor.act(data[:5], False)
        np.testing.assert_allclose(
            ours["action_dist_inputs"], expected[Columns.ACTION_DIST_INPUTS], rtol=1e-3, atol=1e-4
        )
    live.set_state(after)
    seen, _ = live.rewritten(Came(data[:5], nothing, nothing))
    np.testing.assert_allclose(seen, (data[:5] - mean) / std, rtol=1e-3, atol=1e-4)
    assert state_bytes(learning) == after


PIXELS = gym.spaces.Box(0.0, 1.0, (10, 10, 1), np.float32)


def earlier_of(episode: Any, rows: NDArray[Any], t: int, lookback: int) -> Before:
    """The steps before the t-th observation of RLlib's episode; `rows`: the observations as they travel."""
    steps = slice(max(0, t - lookback), t)
    actions, rewards = np.asarray(episode.get_actions()), np.asarray(episode.get_rewards(), np.float32)
    return Before(rows[steps], actions[steps], rewards[steps])


def stacked(**more: Any) -> PPOConfig:
    """Three frames, halved before: a piece that rewrites, and one that looks back at what it made."""
    made = config(PIXELS, Halved, partial(FrameStackingEnvToModule, num_frames=3), episode_lookback_horizon=3, **more)
    return made.learners(num_learners=0).learners(learner_connector=lambda *_: FrameStackingLearner(num_frames=3))


def test_frames_are_stacked_of_what_a_request_brings() -> None:
    made, observations = stacked(), samples(PIXELS, 7)
    theirs = rllib(made, observations)
    actor, manifest = actor_of(made)
    assert manifest.lookback == actor.lookback == 2
    rows = np.stack(observations)
    earlier = [earlier_of(theirs, rows, t, 2) for t in range(6)]
    ours = actor.act(rows[:-1], False, earlier=earlier)
    expected = theirs.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
    np.testing.assert_allclose(ours["action_dist_inputs"], expected, rtol=1e-4, atol=1e-6)


def sent(cut: Cut, number: int, end: Any) -> Lease:
    """A fragment as it comes to a runner."""
    columns, body = to_buffers(cut.arrays)
    message = FRAGMENT(
        session=b"s" * 16, number=number, episode="e", t0=cut.t0, steps=cut.steps, run="r", version=0, base=1,
        return_so_far=cut.return_so_far, columns=columns, end=end,
    )  # fmt: skip
    check_body(message, body)
    return Lease(message, tuple(body))


@pytest.mark.parametrize("lengths", [(6,), (2, 4), (1, 1, 4), (5, 1)], ids=str)
def test_a_learner_gets_the_stacks_that_rllibs_own_runner_makes(lengths: tuple[int, ...]) -> None:
    """Fragments of these lengths, each built alone as if it had come to another runner, and all by the same one."""
    made, observations = stacked(), samples(PIXELS, 7)
    module = module_of(made)

    def batch(episodes: list[Any]) -> NDArray[Any]:
        """What RLlib's learner stacks of them."""
        pipeline = made.build_learner_connector(PIXELS, DISCRETE)
        found = pipeline(rl_module=module, batch={}, episodes=episodes, shared_data={})
        taken = found.get(DEFAULT_MODULE_ID, found)[Columns.OBS]
        return np.asarray(taken)

    expected = batch([rllib(made, observations)])
    builder = FragmentBuilder("e")
    layout = layout_of_spaces(PIXELS, DISCRETE)._replace(dist_inputs=2, lookback=2)
    leases, t = [], 0
    for i, length in enumerate(lengths):
        builder.begin(layout, "acted", Origin("r", 0), length)
        for observation in observations[t : t + length]:
            builder.observe(observation)
            builder.act(0, -1.0, np.zeros(2, np.float32))
        t += length
        builder.observe(observations[t])
        leases.append(sent(builder.cut(), i + 1, "no" if t < 6 else "truncated"))
    for together in (True, False):
        episodes = []
        for some in [leases] if together else [[lease] for lease in leases]:
            connectors = FragmentConnectors(Pipelines(made, lookback=2), Filters(2))
            built, refused = EpisodeBuilder(PIXELS, DISCRETE, module, connectors=connectors).build(some)
            assert not refused
            episodes += [one.episode for one in built]
        assert len(episodes) == 1 if together else len(lengths)
        np.testing.assert_allclose(batch(episodes), expected, rtol=1e-6)


def told_what_was_done(*more: type, **options: Any) -> PPOConfig:
    return config(BOX, partial(PrevActionsPrevRewards, n_prev_actions=2, n_prev_rewards=3), *more, **options)


@pytest.mark.parametrize("memory", [False, True], ids=["", "recurrent"])
@pytest.mark.parametrize("lengths", [(6,), (2, 4), (1, 1, 4)], ids=str)
def test_pieces_may_look_at_what_was_done_before(lengths: tuple[int, ...], memory: bool) -> None:
    """RLlib's PrevActionsPrevRewards: what the module sees and a learner gets is what RLlib's own runner has, wherever
    fragments are cut."""
    made = told_what_was_done(FlattenObservations)
    if memory:
        made.rl_module(model_config={"use_lstm": True, "lstm_cell_size": 3, "fcnet_hiddens": [8], "max_seq_len": 4})
    observations = samples(BOX, 7)
    theirs = rllib(made, observations)
    actor, manifest = actor_of(made)
    assert manifest.lookback == 3
    layout = layout_of_spaces(BOX, DISCRETE)._replace(
        dist_inputs=2, lookback=3,
        state=tuple(StateRow(s.name, Row(s.shape, np.dtype(s.dtype))) for s in manifest.state),
        starts=tuple(s.start for s in manifest.state),
    )  # fmt: skip
    builder, leases, t = FragmentBuilder("e"), [], 0
    for i, length in enumerate(lengths):
        builder.begin(layout, "acted", Origin("r", 0), length)
        for _ in range(length):
            builder.observe(observations[t])
            state = [array[np.newaxis] for array in builder.state] if memory else None
            earlier = [builder.before()]
            answer = actor.act(observations[t][np.newaxis], False, state, np.zeros(1, bool), earlier)
            expected = theirs.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS, t)
            np.testing.assert_allclose(answer["action_dist_inputs"][0], expected, rtol=1e-4, atol=1e-6)
            after = [answer[STATE_OUT + s.name][0] for s in manifest.state]
            builder.act(theirs.get_actions(t), -1.0, expected, after)
            builder.reward(theirs.get_rewards(t))
            t += 1
        builder.observe(observations[t])
        leases.append(sent(builder.cut(), i + 1, "no" if t < 6 else "truncated"))
    for together in (True, False):
        singles = []
        for some in [leases] if together else [[lease] for lease in leases]:
            connectors = FragmentConnectors(Pipelines(made, lookback=3), Filters(2))
            built, refused = EpisodeBuilder(BOX, DISCRETE, actor._module, connectors=connectors).build(some)
            assert not refused, refused
            singles += [one.episode for one in built]
        mine = [single.get_observations(slice(0, len(single))) for single in singles]
        np.testing.assert_allclose(np.concatenate(mine), theirs.get_observations(slice(0, 6)), rtol=1e-5)
        np.testing.assert_allclose(singles[-1].get_observations(-1), theirs.get_observations(-1), rtol=1e-5)


class Looks(SingleAgentObservationPreprocessor):
    """Makes a number of what has been done so far."""

    def __init__(self, number: Callable[[Any], float]) -> None:
        super().__init__()
        self._number = number

    def preprocess(self, observation: Any, episode: Any) -> Any:
        return np.full(3, self._number(episode), np.float32)


def last(values: Any, back: int) -> float:
    return float(values[-back]) if len(values) >= back else 0.0


@pytest.mark.parametrize(
    ("number", "lookback"),
    [
        (lambda episode: last(episode.get_rewards(), 1) < 0, 1),
        (lambda episode: last(episode.get_rewards(), 13), 13),
        (lambda episode: last(episode.get_actions(), 3), 3),
        (lambda episode: last(episode.get_actions(), 16), 16),
        (lambda episode: sum(episode.get_actions()[-4:]), 4),
        (lambda episode: last(episode.get_actions(), 17), None),
        (lambda episode: sum(episode.get_rewards()), None),
        (lambda episode: max([0.0, *episode.get_rewards()]), None),
    ],
    ids=["sign", "reward 13", "action 3", "action 16", "how often", "action 17", "all rewards", "best reward"],
)
def test_how_far_a_piece_looks_back_is_found_out(number: Callable[[Any], float], lookback: int | None) -> None:
    made = config(BOX, partial(Looks, number))
    pipelines = Pipelines(made)
    if lookback is None:
        with pytest.raises(PolicyError, match="Looks looks further back than 16 steps"):
            pipelines.check(module_of(made))
    else:
        pipelines.check(module_of(made))
        assert pipelines.lookback == lookback


def test_actions_count_from_0_for_pieces_too() -> None:
    made = told_what_was_done(FlattenObservations).environment(action_space=gym.spaces.Discrete(3, start=5))
    assert Pipelines(made).check(module_of(made)) == 2


def test_a_piece_that_can_not_learn_of_a_fragment_costs_no_fragment(caplog: pytest.LogCaptureFixture) -> None:
    made = config(BOX, MeanStdFilter)
    learning: Any = pipeline_of(made)
    filters = Filters(2)
    filters.own(0, state_bytes(learning))
    learning.connectors[0]._filters = {}
    connectors = FragmentConnectors(Pipelines(made, learns=learning), filters)
    built, refused = EpisodeBuilder(BOX, DISCRETE, module_of(made), connectors=connectors).build(
        [fragment(np.stack(samples(BOX)))]
    )
    assert len(built) == 1 and not refused and "a connector could not learn of a fragment: KeyError" in caplog.text


def test_what_was_done_before_is_kept_apart_for_a_module_of_ones_own() -> None:
    """Not flattened: dicts, as RLlib's episodes have them; and filled in for a simulator that chose its own actions."""
    made = told_what_was_done()
    observations = samples(BOX, 6)
    pipelines = Pipelines(made, lookback=3)
    actions, rewards = np.array([1, 0, 1, 1, 0]), np.arange(5, dtype=np.float32)
    seen, space = pipelines.rewritten(Came(np.stack(observations), actions, rewards))
    assert set(seen) == set(space.spaces) == {"_orig_obs", "prev_n_actions", "prev_n_rewards"}
    assert seen["prev_n_rewards"].tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
    assert seen["prev_n_actions"][5].tolist() == [[0, 1], [1, 0]], "actions 1 and 0"


def test_filters_are_known_by_version_for_a_while() -> None:
    filters = Filters(2)
    for version in range(5):
        filters.own(version, f"own {version}".encode())
    filters.published(4, b"published")
    assert [filters.at(version) for version in range(6)] == [None, None, b"own 2", b"own 3", b"published", None]
    filters.restart()
    assert filters.at(4) is None


@pytest.mark.parametrize(
    ("space", "piece", "text"),
    [
        (BOX, Steps, "Steps looks further back than 16 steps, or at what is neither an observation"),
        (gym.spaces.Box(0, 1, (10, 10, 1)), lambda: FrameStackingEnvToModule(num_frames=18), "FrameStacking looks fu"),
        (BOX, Counting, "Counting changes its state with what it sees"),
        (BOX, Opaque, "state['Opaque']['lock'] is a object, which can't travel"),
    ],
)
def test_what_a_request_cannot_feed_is_named_at_start(space: gym.Space[Any], piece: Any, text: str) -> None:
    """And runners follow episodes then."""
    made = config(space, piece)
    manifest = unpack_policy(policy_of(made, module_of(made)))[0]
    assert text in manifest.remote_only and manifest.seen is not None


@pytest.mark.parametrize("to_env", [ByReturn, Drawn, Explores])
def test_a_module_to_env_piece_that_looks_back_is_found(to_env: type) -> None:
    """And one that draws: it may remember what it has drawn. Also where it does so only as actions are drawn."""
    made = config(BOX, to_env=to_env)
    manifest = unpack_policy(policy_of(made, module_of(made)))[0]
    assert f"piece {to_env.__name__} looks at more of an episode" in manifest.remote_only
    assert manifest.seen is not None


def test_a_piece_that_works_in_place_is_found() -> None:
    made = config(BOX, AddsLength)
    assert "piece AddsLength looks further back" in unpack_policy(policy_of(made, module_of(made)))[0].remote_only


def test_a_piece_that_changes_actions_is_refused() -> None:
    with pytest.raises(PolicyError, match="Undoes changes actions that have been taken"):
        made = config(BOX, Undoes)
        policy_of(made, module_of(made))


def test_a_piece_that_sets_rewards_is_found() -> None:
    made = config(BOX, Doubles)
    manifest = unpack_policy(policy_of(made, module_of(made)))[0]
    assert "piece Doubles sets rewards" in manifest.remote_only and manifest.seen is not None


def test_what_cannot_work_is_named_at_start() -> None:
    made = config(BOX, Broken)
    with pytest.raises(PolicyError, match="piece Broken fails for one observation: ValueError: no such sensor"):
        policy_of(made, module_of(made))


def test_a_filter_of_each_runners_own_is_refused() -> None:
    made = config(BOX, MeanStdFilter, broadcast_env_runner_states=False)
    with pytest.raises(SettingsError, match="each runner would have one of its own"):
        policy_of(made, module_of(made))


def test_a_simulator_is_told_why_it_has_to_ask(caplog: pytest.LogCaptureFixture) -> None:
    made = config(BOX, Halved)
    assert has_own_connectors(made) and not has_own_connectors(config(BOX))
    blob = policy_of(made, module_of(made))
    assert "simulators have to ask for the actions" in caplog.text and "Halved" in caplog.text
    with pytest.raises(PolicyError, match=r"can only be asked for its actions \(connect\(inference='remote'\).*Halved"):
        Policy.load(blob)


def test_states_go_over_the_wire_and_nothing_else_does() -> None:
    state = {None: {"shape": np.array([3]), "list": [1, 2.5, True, "x", b"y"], "tuple": (np.float32(1.5), None)}}
    back = from_bytes(to_bytes(state))
    assert list(back) == [None] and back[None]["list"] == state[None]["list"] and back[None]["tuple"] == (1.5, None)
    np.testing.assert_array_equal(back[None]["shape"], [3])
    for bad in (b"\xc1", to_bytes({})[:-1], b"\x92\xa1z\x01", b"\x93\xa1a\xa3|O8\x90", b"\x94\xa1a\xa3|O8\x90\xc4\x00"):
        with pytest.raises(PolicyError, match="came damaged"):
            from_bytes(bad)
    with pytest.raises(PolicyError, match=r"state\['a'\]\[0\] is a set"):
        to_bytes({"a": [{1}]})


def test_a_recurrent_policy_keeps_its_memory_behind_connectors() -> None:
    """Step by step by requests, as RLlib's own runner steps through the episode."""
    made = config(BOX, Halved).rl_module(model_config={"fcnet_hiddens": [8], "use_lstm": True, "max_seq_len": 4})
    observations = samples(BOX)
    theirs = rllib(made, observations)
    actor, manifest = actor_of(made)
    assert [part.name for part in manifest.state] == actor.memory.names != []
    state = None
    for t, observation in enumerate(observations[:-1]):
        answer = actor.act(observation[np.newaxis], False, state)
        expected = theirs.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS, t)
        np.testing.assert_allclose(answer["action_dist_inputs"][0], expected, rtol=1e-5, atol=1e-6)
        assert (STATE_IN + manifest.state[0].name in answer) is (t == 0), "who begins is told with what"
        state = [answer[STATE_OUT + part.name] for part in manifest.state]


def test_a_state_that_has_outgrown_its_room_is_not_offered(caplog: pytest.LogCaptureFixture) -> None:
    manifest = actor_of(config(BOX, MeanStdFilter))[1]
    runner = ZmqEnvRunner.__new__(ZmqEnvRunner)
    offered: list[int] = []
    runner._link = SimpleNamespace(offer=lambda version, size, load: offered.append(version))
    runner._manifest, runner._own_connectors = manifest, True
    runner.config = SimpleNamespace(in_evaluation=False)
    runner._offer(Held(1, {}, b"x" * (manifest.connectors - 8)))
    runner._offer(Held(2, {}, b"x" * (manifest.connectors - 7)))
    assert offered == [1] and "version 2 can't travel" in caplog.text
