"""Connectors of the user's own with several agents, for single actions and in fragments, against RLlib's own runner on
the same env steps."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
import tree  # dm_tree, which RLlib needs
from gymnasium.spaces import Box, Dict, Discrete
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.connectors.env_to_module import (
    AddObservationsFromEpisodesToBatch,
    AgentToModuleMapping,
    BatchIndividualItems,
    FlattenObservations,
    MeanStdFilter,
    NumpyToTensor,
    PrevActionsPrevRewards,
)
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.connectors.env_to_module.observation_preprocessor import (
    MultiAgentObservationPreprocessor,
    SingleAgentObservationPreprocessor,
)
from ray.rllib.connectors.learner import AddOneTsToEpisodesAndTruncate
from ray.rllib.connectors.learner.frame_stacking import FrameStackingLearner
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO
from test_agents_episodes import RUN, assert_same, sent, with_columns
from test_pipelines import Steps, Undoes

from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.client_remote import before_of
from rllink_zmq.errors import EpisodeError, PolicyError, SettingsError
from rllink_zmq.fragments import Before
from rllink_zmq.fragments_agents import AgentsBuilder, AgentsOrigin, Member, Turn, whole
from rllink_zmq.messages import ACT, BEFORE, OBS_BEFORE, STEPS_BEFORE, AgentId, Column
from rllink_zmq.rllib import attach
from rllink_zmq.rllib.actors import PipelineActor
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.multi_agent_episodes import MultiAgentEpisodeBuilder
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of, stand_in
from rllink_zmq.rllib.multi_agent_runner import ZmqMultiAgentEnvRunner
from rllink_zmq.rllib.pieces import pipeline_of, seen_spaces, state_bytes
from rllink_zmq.rllib.pipelines_agents import AgentsConnectors, AgentsPipelines, agents_of
from rllink_zmq.rllib.rewriting import Filters, UnknownFilter
from rllink_zmq.rllib.service_agents import AgentsActService
from rllink_zmq.rllib.trainable import check_trainable
from rllink_zmq.session_runner import Lease

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STEPS = 12
VERSION = 4
MODULE_OF: dict[AgentId, str] = {"a": "p", "b": "p", "c": "q"}
NUMBERS = Box(-1.0, 1.0, (3,), np.float32)
FRAMES = Box(0.0, 1.0, (4, 4, 1), np.float32)
ACTIONS = Discrete(3)


def mapping(agent: AgentId, *_: Any, **__: Any) -> str:
    return MODULE_OF[agent]


class ByAgent(SingleAgentObservationPreprocessor):
    """Each agent sees another fraction of what there is."""

    def preprocess(self, observation: Any, episode: Any) -> Any:
        return observation * np.float32(1 / (2 + "abc".index(episode.agent_id)))


class Sorted(MultiAgentObservationPreprocessor):
    """Each of the agents that see something now, on its own."""

    def preprocess(self, observations: Any, episode: Any) -> Any:
        return {agent: np.sort(observation) for agent, observation in observations.items()}


class Shared(MultiAgentObservationPreprocessor):
    """All see what all see."""

    def preprocess(self, observations: Any, episode: Any) -> Any:
        mean = np.mean(list(observations.values()), axis=0) if observations else None
        return dict.fromkeys(observations, mean)


class Others(MultiAgentObservationPreprocessor):
    """Fails for an agent that is alone."""

    def preprocess(self, observations: Any, episode: Any) -> Any:
        return {agent: observation + observations["b"] for agent, observation in observations.items()}


class Turned(ConnectorV2):
    """Module-to-env: the next action instead."""

    def __call__(self, *, batch: Any, **kwargs: Any) -> Any:
        acted = batch[Columns.ACTIONS]
        batch[Columns.ACTIONS] = {key: [(action + 1) % 3 for action in actions] for key, actions in acted.items()}
        return batch


def seen(agent: AgentId, t: int, space: Any) -> NDArray[np.float32]:
    random = np.random.default_rng([t, *str(agent).encode()])
    values: NDArray[np.float32] = random.uniform(0, 1, space.shape).astype(np.float32)
    return values


class Env(MultiAgentEnv):
    """All act together, or one after the other."""

    def __init__(self, space: Any, turns: bool) -> None:
        super().__init__()
        self.possible_agents = self.agents = list(MODULE_OF)
        self.observation_spaces = dict.fromkeys(self.agents, space)
        self.action_spaces = dict.fromkeys(self.agents, ACTIONS)
        self._space, self._turns = space, turns
        self._t = 0

    def look(self, t: int) -> dict[AgentId, Any]:
        agents = [self.agents[t % 3]] if self._turns and t < STEPS else self.agents
        return {agent: seen(agent, t, self._space) for agent in agents}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._t = 0
        return self.look(0), {}

    def step(self, actions: Any) -> Any:
        self._t += 1
        rewards = {agent: float(action) + self._t for agent, action in actions.items()}
        return self.look(self._t), rewards, {"__all__": self._t == STEPS}, {"__all__": False}, {}


def config(space: Any, *pieces: Callable[[], Any], to_env: type | None = None, **more: Any) -> PPOConfig:
    model: dict[str, Any] = {"fcnet_hiddens": [4]}
    if len(space.shape) == 3:
        model |= {"conv_filters": [[2, 2, 2]], "head_fcnet_hiddens": [4]}
    return (
        PPOConfig()
        .environment(
            observation_space=Dict(dict.fromkeys(MODULE_OF, space)),  # type: ignore[arg-type]
            action_space=Dict(dict.fromkeys(MODULE_OF, ACTIONS)),  # type: ignore[arg-type]
        )
        .multi_agent(policies={"p", "q"}, policy_mapping_fn=mapping)
        .env_runners(
            num_env_runners=0,
            env_to_module_connector=(lambda env, spaces, device: [make() for make in pieces]) if pieces else None,
            module_to_env_connector=(lambda env, spaces: [to_env()]) if to_env else None,
            **more,
        )
        .rl_module(model_config=model)
    )


def stacked() -> PPOConfig:
    frames = partial(FrameStackingEnvToModule, num_frames=3, multi_agent=True)
    made = config(FRAMES, frames, episode_lookback_horizon=3)
    return made.learners(learner_connector=lambda *_: FrameStackingLearner(num_frames=3, multi_agent=True))


def filtered() -> PPOConfig:
    return config(NUMBERS, partial(MeanStdFilter, multi_agent=True, update_stats=False))


CASES: dict[str, tuple[Callable[[], PPOConfig], Any, int]] = {
    "by agent": (lambda: config(NUMBERS, ByAgent), NUMBERS, 0),
    "each alone": (lambda: config(NUMBERS, Sorted), NUMBERS, 0),
    "filtered": (filtered, NUMBERS, 0),
    "frames": (stacked, FRAMES, 2),
    "what was done": (
        lambda: config(
            NUMBERS,
            partial(PrevActionsPrevRewards, multi_agent=True, n_prev_actions=2),
            partial(FlattenObservations, multi_agent=True),
        ),
        NUMBERS,
        2,
    ),
    "other actions": (lambda: config(NUMBERS, to_env=Turned), NUMBERS, 0),
    "recurrent": (
        lambda: config(NUMBERS, ByAgent).rl_module(
            model_config={"use_lstm": True, "lstm_cell_size": 3, "fcnet_hiddens": [4], "max_seq_len": 4}
        ),
        NUMBERS,
        0,
    ),
}


class Side(NamedTuple):
    """RLlib's runner with an episode of it, and what is ours: the policies as they are told, those that act."""

    config: PPOConfig
    modules: Any
    theirs: MultiAgentEpisode
    manifest: CrewManifest
    actors: dict[str, PipelineActor]
    state: bytes
    env: Env


@cache
def side_of(case: str, turns: bool) -> Side:
    make, space, lookback = CASES[case]
    torch.manual_seed(4)
    env = Env(space, turns)
    theirs_config = make()
    theirs_config.environment(env=lambda _: Env(space, turns))
    runner = MultiAgentEnvRunner(config=theirs_config, worker_index=0)
    try:
        if case == "filtered":
            (piece,) = runner._env_to_module.connectors[:1]
            piece.set_state(_statistics(piece, space))
        state = state_bytes(runner._env_to_module)
        (theirs,) = runner.sample(num_episodes=1, explore=False)
        mine = make()
        check_trainable(mine)
        manifest = CrewManifest.of(crew_of(mine, runner.module))
        around, actors = AgentsPipelines(mine), {}
        for name, about in manifest.modules.items():
            assert about.remote_only and about.lookback == lookback
            pipelines = around.of(name, manifest.agents[name], about.lookback).apart()
            actors[name] = PipelineActor(runner.module[name], about, pipelines)
            body = weights_body(about, runner.module.get_state(), name, connectors=state)
            actors[name].apply(VERSION, body)
        return Side(mine, runner.module, theirs.to_numpy(), manifest, actors, state, env)
    finally:
        runner.stop()


def _statistics(piece: Any, space: Any) -> dict[AgentId, Any]:
    """Of a filter that has seen some observations, other ones of each agent."""
    piece._update_stats = True
    piece.get_state()
    for i, (agent, one) in enumerate(piece._filters.items()):
        for t in range(5):
            one(seen(agent, 100 + t, space) * (1 + i))
    piece._update_stats = False
    state: dict[AgentId, Any] = piece.get_state()
    return state


def fragments(side: Side, cuts: Sequence[int]) -> list[Lease]:
    """Those of a simulator that asks for each action, cut after these env steps. Answers are held against RLlib's."""
    layouts = {name: layout_of_policy(about) for name, about in side.manifest.modules.items()}
    builder = AgentsBuilder("e", MODULE_OF)
    builder.recast({agent: Member(module, layouts[module]) for agent, module in MODULE_OF.items()}, {})
    origin = AgentsOrigin.of(RUN, VERSION, dict.fromkeys(layouts, VERSION))
    measure = whole(layouts[module] for module in MODULE_OF.values())
    builder.begin(measure, "acted", origin, 100)
    leases: list[Lease] = []
    taken = dict.fromkeys(MODULE_OF, 0)
    for t in range(STEPS):
        builder.observe(Turn(side.env.look(t)))
        for module, agents in builder.to_act().items():
            answer = asked(side.actors[module], builder, agents)
            for i, agent in enumerate(agents):
                single, n = side.theirs.agent_episodes[agent], taken[agent]
                logits = single.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS, n)
                np.testing.assert_allclose(answer["action_dist_inputs"][i], logits, rtol=1e-4, atol=1e-6)
                assert answer["actions"][i] == single.get_actions(n)
                memory = [answer[f"state_out/{state.name}"][i] for state in layouts[module].state]
                builder.took(agent, answer["actions"][i], float(answer["action_logp"][i]), logits, memory)
                taken[agent] += 1
        builder.stepped()
        done = side.theirs.agent_episodes
        acted = list(side.env.look(t))
        builder.rewards({agent: done[agent].get_rewards(taken[agent] - 1) for agent in acted})
        last = t + 1 == STEPS
        if t + 1 in cuts or last:
            builder.observe(Turn(side.env.look(t + 1)))
            if last:
                builder.finish("terminated")
            leases.append(sent(builder.cut(), len(leases) + 1, "terminated" if last else "no"))
            builder.begin(measure, "acted", origin, 100)
    assert sum(taken.values()) == sum(len(single) for single in side.theirs.agent_episodes.values())
    return leases


def asked(actor: PipelineActor, builder: AgentsBuilder, agents: list[AgentId]) -> Mapping[str, NDArray[Any]]:
    """The answer for these agents, with all that a request brings."""
    rows = np.stack(builder.rows_of(agents))
    state = builder.memories(agents) if actor.memory else None
    earlier = None
    if actor.lookback:
        brought = before_of(builder.before_each(agents), actor.lookback)
        first = actor.lookback - brought[STEPS_BEFORE]
        earlier = [Before(*(brought[name][i, first[i] :] for name in BEFORE)) for i in range(len(agents))]
    return actor.act(rows, False, state, None if state is None else np.zeros(len(rows), bool), earlier, agents)


def builder_of(side: Side, filters: Filters | None = None) -> MultiAgentEpisodeBuilder:
    if filters is None:
        filters = Filters(10)
        filters.published(VERSION, side.state)
    connectors = AgentsConnectors(side.config, side.modules, pipeline_of(side.config), filters)
    connectors.recast({name: about.lookback for name, about in side.manifest.modules.items()})
    spaces = (dict(side.config.observation_space.spaces), dict(side.config.action_space.spaces))
    made = MultiAgentEpisodeBuilder(*spaces, side.modules, mapping, connectors=connectors)
    made.dist_inputs = dict.fromkeys(side.manifest.modules, 3)
    return made


def batch_of(side: Side, episodes: Sequence[MultiAgentEpisode]) -> dict[str, Any]:
    """What a learner trains on, each module's rows in the order of their observations."""
    pipeline = side.config.build_learner_connector(side.config.observation_space, side.config.action_space)
    pipeline.prepend(AddOneTsToEpisodesAndTruncate())
    episodes = copy.deepcopy(episodes)  # the pipeline changes them
    batch = pipeline(rl_module=side.modules, batch={}, episodes=episodes, explore=False, shared_data={})
    found = {}
    for name, columns in batch.items():
        arrays = {
            column: np.asarray(values)
            for column, values in columns.items()
            if column not in (Columns.INFOS, Columns.STATE_IN, "weights_seq_no")
        }
        order = np.lexsort(arrays[Columns.OBS].reshape(len(arrays[Columns.OBS]), -1).T)
        found[name] = {column: array[order] for column, array in arrays.items()}
    return found


@pytest.mark.parametrize("turns", [False, True], ids=["together", "turns"])
@pytest.mark.parametrize("case", list(CASES))
def test_actions_and_what_is_learned_from_are_those_of_rllibs_own_runner(case: str, turns: bool) -> None:
    side = side_of(case, turns)
    theirs = batch_of(side, [side.theirs])
    for cuts in ((), (5,), (1, 2, 7, 11)):
        builder = builder_of(side)
        built, refused = builder.build(fragments(side, cuts))
        assert not refused, refused
        chunks = [chunk.episode for chunk in built if chunk.episode is not None]
        assert_same(batch_of(side, chunks), theirs)


def test_each_call_brings_what_the_next_one_looks_back_at() -> None:
    """Fragments that are built one by one, as if each came to another runner: the stacks are the same."""
    side = side_of("frames", True)
    theirs = batch_of(side, [side.theirs])
    chunks = []
    for one in fragments(side, (4, 6, 9)):
        built, refused = builder_of(side).build([one])
        assert not refused, refused
        chunks += [chunk.episode for chunk in built if chunk.episode is not None]
    assert len(chunks) == 4
    mine = batch_of(side, chunks)
    for name, columns in theirs.items():
        # Each cut has one row more, which no loss counts, and its own episode's end: what was seen is the same.
        counted = mine[name]["loss_mask"].astype(bool)
        expected = columns["loss_mask"].astype(bool)
        for column in (Columns.OBS, Columns.ACTIONS, Columns.REWARDS, Columns.ACTION_DIST_INPUTS):
            np.testing.assert_allclose(mine[name][column][counted], columns[column][expected], rtol=1e-5)


def test_a_filter_learns_of_each_step_once_and_of_each_agent_apart() -> None:
    side = side_of("filtered", False)
    builder, learned = taught(side)
    built, refused = builder.build(fragments(side, (3, 4, 9)))
    assert built and not refused
    for agent in MODULE_OF:
        (stats,) = tree.flatten(learned._filters[agent].running_stats)
        observations = np.stack([seen(agent, t, NUMBERS) for t in range(STEPS + 1)])
        assert stats.num_pushes == STEPS + 1
        np.testing.assert_allclose(stats.mean, observations.mean(0), rtol=1e-5)


def test_a_fragment_of_a_filter_that_nobody_knows_is_stale_and_teaches_nothing() -> None:
    side = side_of("filtered", False)
    builder = builder_of(side, Filters(10))
    built, (refusal,) = builder.build(fragments(side, ()))
    assert not built and isinstance(refusal.error, UnknownFilter)


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (lambda: config(NUMBERS, Shared), "the env-to-module piece Shared looks at other agents"),
        (lambda: config(NUMBERS, Steps), "piece Steps looks at other agents, further back than 16 steps, or at"),
        (lambda: config(NUMBERS, Others), "the connectors fail where an agent is alone in its episode"),
        (
            lambda: config(NUMBERS, to_env=Apart),
            "module-to-env piece Apart looks at other agents, or more of an episode",
        ),
    ],
)
def test_what_a_request_cannot_feed_is_named_at_start(made: Callable[[], Any], text: str) -> None:
    """And runners follow episodes then, with all of their modules."""
    mine = made()
    manifest = CrewManifest.of(crew_of(mine, modules_of(mine)))
    assert all(text in about.remote_only and about.seen is not None for about in manifest.modules.values())
    assert {about.action_dist_inputs for about in manifest.modules.values()} == {3}


def modules_of(mine: PPOConfig) -> Any:
    torch.manual_seed(5)
    return mine.get_multi_rl_module_spec(spaces=dict.fromkeys(("p", "q"), (NUMBERS, ACTIONS))).build()


def test_a_piece_that_fails_among_all_agents_is_refused_by_its_name() -> None:
    for mine, text in (
        (config(NUMBERS, to_env=Raising), "in the piece Raising: ValueError: no such actuator"),
        (config(NUMBERS, Raising), "in the piece Raising: ValueError: no such actuator"),
        (config(NUMBERS, Undoes), "the env-to-module piece Undoes changes actions that have been taken"),
    ):
        with pytest.raises(PolicyError, match=text):
            crew_of(mine, modules_of(mine))


def test_a_piece_for_a_single_agent_is_refused_in_words() -> None:
    with pytest.raises(SettingsError, match=r"adds MeanStdFilter, which can't be built for these agents.*multi_agent="):
        check_trainable(config(NUMBERS, MeanStdFilter))


def test_a_filter_that_runners_do_not_merge_is_refused() -> None:
    mine = config(NUMBERS, partial(MeanStdFilter, multi_agent=True), merge_env_runner_states=False)
    modules = mine.get_multi_rl_module_spec(spaces=dict.fromkeys(("p", "q"), (NUMBERS, ACTIONS))).build()
    with pytest.raises(SettingsError, match="keep a state"):
        crew_of(mine, modules)


def test_a_policy_without_agents_is_acted_by_as_before() -> None:
    """Behind frames it takes stacks of them: an agent that sees these stands in."""
    side = side_of("frames", False)
    mine = side.config.multi_agent(policy_mapping_fn=lambda *_, **__: "p")
    assert stand_in(mine, side.modules["q"]) == ["a"]
    manifest = CrewManifest.of(crew_of(mine, side.modules))
    assert manifest.agents["q"] == [] and manifest.modules["q"].lookback == 2


def test_requests_name_their_agents() -> None:
    side = side_of("by agent", False)
    service = AgentsActService.__new__(AgentsActService)
    service.module, service.actor, service.actors = "p", side.actors["p"], dict(side.actors)
    obs = Column("obs", "<f4", (2, 3))
    request = ACT(bytes(16), 1, 2, (obs,), module="p", agents=("a", "b"))
    assert service._misfit(request, []) == "" == service._acts_no_more(request)
    nameless = msgspec.structs.replace(request, agents=())
    assert service._misfit(nameless, []).startswith("expected 'agents', whose each of the 2 rows is")
    strange = msgspec.structs.replace(request, agents=("a", "c"))
    assert service._acts_no_more(strange) == "module 'p' doesn't act for agent 'c' (any more)"


@pytest.mark.parametrize("name", ["p", "q"])
def test_a_fragment_without_the_observations_before_it_is_refused_by_the_agents_name(name: str) -> None:
    side = side_of("frames", False)
    second = fragments(side, (4,))[1]

    def forget(arrays: dict[str, NDArray[Any]]) -> None:
        del arrays[f"{name}/{OBS_BEFORE}"]

    (refusal,) = builder_of(side).build([with_columns(second, forget)])[1]
    agent = "a" if name == "p" else "c"
    assert f"agent '{agent}' (module '{name}')" in str(refusal.error)
    assert f"needs 2 rows of '{OBS_BEFORE}'" in str(refusal.error)


def test_an_action_of_the_simulators_own_is_refused_for_a_policy_that_looks_back() -> None:
    layout = layout_of_policy(side_of("frames", False).manifest.modules["p"])
    builder = AgentsBuilder("e", MODULE_OF)
    builder.recast({"a": Member("p", layout)}, {})
    builder.begin(whole([layout]), "logged", AgentsOrigin.of(RUN, 4, {"p": 4}), 10)
    builder.observe(Turn({"a": seen("a", 0, FRAMES)}))
    with pytest.raises(EpisodeError, match="agent 'a' acts by the policy 'p', which looks at earlier observations"):
        builder.check_logged("a", 0, -1.0)


# ---- what several agents make different


def taught(side: Side) -> tuple[MultiAgentEpisodeBuilder, Any]:
    """A builder whose filter learns, and the filter."""
    made = config(NUMBERS, partial(MeanStdFilter, multi_agent=True))
    filters = Filters(10)
    filters.own(VERSION, side.state)
    learns: Any = pipeline_of(made)
    state_bytes(learns)
    connectors = AgentsConnectors(made, side.modules, learns, filters)
    builder = MultiAgentEpisodeBuilder(*agents_of(made), side.modules, mapping, connectors=connectors)
    return builder, learns.connectors[0]


def test_a_refused_fragment_teaches_nothing() -> None:
    """Also not of the agents that were checked before the one for which it is refused."""
    side = side_of("filtered", False)
    builder, learned = taught(side)

    def spoil(arrays: dict[str, NDArray[Any]]) -> None:
        arrays["q/rewards"] = np.full_like(arrays["q/rewards"], np.nan)

    (good,) = fragments(side, ())
    built, (refusal,) = builder.build([with_columns(good, spoil)])
    assert not built and "agent 'c' (module 'q')" in str(refusal.error)
    pushes = [tree.flatten(one.running_stats)[0].num_pushes for one in learned._filters.values()]
    assert pushes == [0, 0, 0]


def test_a_step_that_began_behind_an_older_filter_is_seen_through_that() -> None:
    """The agent has acted, and the weights changed before its next observation came."""
    side = side_of("filtered", False)
    second = fragments(side, (4,))[1]
    agents = tuple(
        msgspec.structs.replace(rows, first=VERSION - 1 if rows.agent == "a" else -1) for rows in second.message.agents
    )
    second = second._replace(message=msgspec.structs.replace(second.message, agents=agents))
    filters = Filters(10)
    older: Any = pipeline_of(side.config)
    filters.published(VERSION - 1, state_bytes(older))
    filters.published(VERSION, side.state)
    ((built,), refused) = builder_of(side, filters).build([second])
    assert not refused and built.episode is not None
    mine, theirs = built.episode.agent_episodes["a"], side.theirs.agent_episodes["a"]
    expected = older.connectors[0]._filters["a"](seen("a", 4, NUMBERS), update=False)
    np.testing.assert_allclose(mine.get_observations(0), expected, rtol=1e-5)
    assert not np.allclose(expected, theirs.get_observations(4), rtol=1e-2)
    np.testing.assert_allclose(mine.get_observations(1), theirs.get_observations(5), rtol=1e-5)
    built, (refusal,) = builder_of(side).build([second])
    assert not built and isinstance(refusal.error, UnknownFilter), "which filter that was isn't known here"


def test_too_many_earlier_observations_are_refused() -> None:
    side = side_of("frames", False)
    second = fragments(side, (4,))[1]

    def repeat(arrays: dict[str, NDArray[Any]]) -> None:
        arrays[f"p/{OBS_BEFORE}"] = np.concatenate([arrays[f"p/{OBS_BEFORE}"]] * 2)

    (refusal,) = builder_of(side).build([with_columns(second, repeat)])[1]
    assert f"'p/{OBS_BEFORE}' has 8 rows" in str(refusal.error)


class Locked(ByAgent):
    """Can't be copied."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lock = threading.Lock()


def test_a_piece_that_can_not_be_copied_is_made_again() -> None:
    around = AgentsPipelines(config(NUMBERS, Locked)).of("p", ["a", "b"])
    apart = around.apart()
    assert apart._own[0] is apart.to_module.connectors[0] is not around._own[0]
    assert type(apart._own[0]) is Locked


class Apart(ConnectorV2):
    """Module-to-env: no two agents of an episode take the same action."""

    def __call__(self, *, batch: Any, **kwargs: Any) -> Any:
        taken: dict[Any, list[int]] = {}
        for key, (action,) in batch[Columns.ACTIONS].items():
            others = taken.setdefault(key[0], [])
            others.append(next((int(action) + i) % 3 for i in range(3) if (int(action) + i) % 3 not in others))
            batch[Columns.ACTIONS][key] = [np.int64(others[-1])]
        return batch


class Raising(ConnectorV2):
    def __call__(self, **kwargs: Any) -> Any:
        raise ValueError("no such actuator")


class NeedsAnEnv(ConnectorV2):
    def __init__(self, env: Any = None) -> None:
        super().__init__(env.single_observation_space)

    def __call__(self, *, batch: Any, **kwargs: Any) -> Any:
        return batch


def test_a_piece_that_needs_an_environment_is_refused_in_words() -> None:
    with pytest.raises(SettingsError, match=r"adds .*, which can't be built where there is no environment"):
        check_trainable(config(NUMBERS, to_env=NeedsAnEnv))


@pytest.mark.parametrize(("agents", "size"), [(1, 128), (8, 50)])
def test_a_filter_that_has_learned_has_room_behind_the_weights(agents: int, size: int) -> None:
    space = Box(-1.0, 1.0, (size,), np.float32)
    spaces: dict[Any, Any] = dict.fromkeys(range(agents), space)
    made = config(NUMBERS, partial(MeanStdFilter, multi_agent=True)).environment(
        observation_space=Dict(spaces), action_space=Dict(dict.fromkeys(spaces, ACTIONS))
    )
    room = AgentsPipelines(made, learns=pipeline_of(made)).room(made)
    learned: Any = pipeline_of(made)
    state_bytes(learned)
    random = np.random.default_rng(0)
    for one in learned.connectors[0]._filters.values():
        for _ in range(50):
            one(random.normal(size=size).astype(np.float32))
    assert len(state_bytes(learned)) + 8 <= room


def test_a_frozen_policy_behind_a_filter_that_does_not_move_stays_known() -> None:
    """It is published once, and its version gets older than any filter that is kept."""
    made = attach(filtered().multi_agent(policies_to_train=["p"]), "tcp://127.0.0.1:1", lag_limit=2)
    runner = ZmqMultiAgentEnvRunner(config=made, worker_index=0)
    manifest = CrewManifest.of(crew_of(made, runner.module))
    runner._take_manifest(manifest)
    offered: list[tuple[str, int]] = []
    runner._link = SimpleNamespace(offer=lambda version, size, load, name: offered.append((name, version)))
    weights = runner.module.get_state()
    for version in range(1, 12):
        learned = {"p": {key: value + version for key, value in weights["p"].items()}}
        runner.set_state({COMPONENT_RL_MODULE: learned if version > 1 else weights, WEIGHTS_SEQ_NO: version})
    assert [version for name, version in offered if name == "q"] == [0]
    connectors = runner._behind
    connectors.check(0), connectors.check(11)
    with pytest.raises(UnknownFilter):
        connectors.check(3)


class Padded(SingleAgentObservationPreprocessor):
    """Makes other observations of them."""

    def recompute_output_observation_space(self, input_observation_space: Any, input_action_space: Any) -> Any:
        return Dict(dict.fromkeys(input_observation_space.spaces, Box(-1.0, 1.0, (5,), np.float32)))

    def preprocess(self, observation: Any, episode: Any) -> Any:
        return np.resize(observation, 5).astype(np.float32)


def test_pieces_of_ones_own_instead_of_rllibs_default_ones() -> None:
    padded = Box(-1.0, 1.0, (5,), np.float32)
    specs = {name: RLModuleSpec(observation_space=padded, action_space=ACTIONS) for name in ("p", "q")}
    mine = config(
        NUMBERS, Padded, AddObservationsFromEpisodesToBatch,
        partial(AgentToModuleMapping, rl_module_specs=specs, agent_to_module_mapping_fn=mapping),
        partial(BatchIndividualItems, multi_agent=True), NumpyToTensor,
        add_default_connectors_to_env_to_module_pipeline=False,
    )  # fmt: skip
    assert set(map(str, seen_spaces(mine).values())) == {str(padded)}
    modules = mine.get_multi_rl_module_spec(spaces=dict.fromkeys(("p", "q"), (padded, ACTIONS))).build()
    manifest = CrewManifest.of(crew_of(mine, modules))
    actor = PipelineActor(modules["p"], manifest.modules["p"], AgentsPipelines(mine).of("p", ["a", "b"]))
    rows = np.stack([seen("a", 0, NUMBERS), seen("b", 0, NUMBERS)])
    found = actor.act(rows, False, agents=["a", "b"])["action_dist_inputs"]
    with torch.no_grad():
        given = torch.from_numpy(np.stack([np.resize(row, 5) for row in rows]))
        expected = modules["p"].forward_inference({Columns.OBS: given})[Columns.ACTION_DIST_INPUTS]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)
