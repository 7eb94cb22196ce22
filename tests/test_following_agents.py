"""Connectors that look at other agents: a runner follows the episode, against RLlib's own on the same env steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from test_agents_episodes import RUN, assert_same, sent
from test_agents_pipelines import (
    ACTIONS,
    MODULE_OF,
    NUMBERS,
    STEPS,
    VERSION,
    Apart,
    Env,
    Others,
    Shared,
    batch_of,
    config,
    mapping,
    seen,
)

from rllink_zmq.arrays import to_buffers
from rllink_zmq.client_agents_followed import AskedStep, PendingSeenAgents, store
from rllink_zmq.client_agents_remote import chosen_of
from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.errors import PolicyError
from rllink_zmq.fragments_agents import AgentsBuilder, AgentsOrigin, Member, Turn, whole
from rllink_zmq.messages import ACT, AgentId, Place, Told
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.following_agents import FollowedAgents, FollowingAgents, seen_of
from rllink_zmq.rllib.multi_agent_episodes import MultiAgentEpisodeBuilder
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of
from rllink_zmq.rllib.pieces import pipeline_of
from rllink_zmq.session_runner import Lease

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Opponents(ConnectorV2):
    """All see what the others have done last, and how long the episode is."""

    def __call__(self, *, episodes: Any, batch: Any, **kwargs: Any) -> Any:
        for episode in episodes:
            singles = episode.agent_episodes
            last = {agent: int(one.get_actions(-1)) for agent, one in singles.items() if len(one.actions)}
            for agent in episode.get_agents_that_stepped():
                others = sum(action for other, action in last.items() if other != agent)
                told = np.array([others / 4, episode.env_t / STEPS, 0], np.float32)
                singles[agent].set_observations(at_indices=-1, new_data=singles[agent].get_observations(-1) + told)
        return batch


class Watches(ConnectorV2):
    """All see who is there, how many have ended, and their own rewards."""

    def __call__(self, *, episodes: Any, batch: Any, **kwargs: Any) -> Any:
        for episode in episodes:
            singles = episode.agent_episodes
            ended = sum(single.is_done for single in singles.values())
            for agent in episode.get_agents_that_stepped():
                mine = singles[agent]
                told = np.array([len(singles) + ended, episode.env_t, sum(mine.rewards) / 10 + len(mine)], np.float32)
                mine.set_observations(at_indices=-1, new_data=mine.get_observations(-1) / 2 + told / STEPS)
        return batch


def lstm(made: PPOConfig) -> PPOConfig:
    return made.rl_module(model_config={"use_lstm": True, "lstm_cell_size": 3, "fcnet_hiddens": [4], "max_seq_len": 4})


CASES: dict[str, Callable[[], PPOConfig]] = {
    "shared": lambda: config(NUMBERS, Shared),
    "opponents": lambda: config(NUMBERS, Opponents),
    "apart": lambda: config(NUMBERS, to_env=Apart),
    "recurrent": lambda: lstm(config(NUMBERS, Shared, Opponents)),
    "watched": lambda: config(NUMBERS, Shared, Watches),
    "watched by lstm": lambda: lstm(config(NUMBERS, Watches)),
}


class Plan:
    """An episode in which agents come, wait, are given rewards and end at random. `gaps`: there are env steps in which
    nobody is given an observation; `last`: what ends all of them."""

    def __init__(self, seed: int, gaps: bool, last: str) -> None:
        random = np.random.default_rng(seed)
        self.last = last
        self.observed: list[list[AgentId]] = []
        self.ends: list[dict[AgentId, str]] = []
        self.rewarded: list[dict[AgentId, float]] = []
        enters = {"a": 0, "b": int(random.choice([0, 2, 5])), "c": int(random.choice([0, 3, 7]))}
        leaves = {"a": int(random.choice([4, 6, 9])), "b": int(random.choice([7, 9, 99])), "c": 99}
        there: list[AgentId] = []
        for t in range(STEPS + 1):
            rewards = {agent: round(random.random(), 2) for agent in there if random.random() < 0.8}
            given = [agent for agent in there if random.random() < 0.6 or t == STEPS]
            ends = {agent: "truncated" if agent in given and random.random() < 0.5 else "terminated"
                    for agent in there if leaves[str(agent)] <= t < STEPS and len(there) > 1}  # fmt: skip
            there = [agent for agent in there if agent not in ends]
            if not gaps and there and not set(given) & set(there):
                given.append(there[0])
            new = [agent for agent, entered in enters.items() if entered == t]
            self.observed.append([*given, *new])
            self.ends.append(ends)
            self.rewarded.append(rewards | {agent: rewards.get(agent, 0.25) for agent in given})
            there += new

    def look(self, t: int) -> dict[AgentId, Any]:
        return {agent: seen(agent, t, NUMBERS) for agent in self.observed[t]}

    def flags(self, t: int, end: str) -> dict[Any, bool]:
        """Which agents have ended in this way."""
        return {agent: True for agent, how in self.ends[t].items() if how == end}


class InTurn:
    """The same of the environment in which all act together, or one after the other."""

    last = "terminated"

    def __init__(self, turns: bool) -> None:
        self.look = Env(NUMBERS, turns).look
        self.rewarded = [dict.fromkeys(self.look(max(0, t - 1)), 0.5 + t) for t in range(STEPS + 1)]

    def flags(self, t: int, end: str) -> dict[Any, bool]:
        return {}


class Planned(Env):
    """Goes by a plan."""

    def __init__(self, plan: Plan | InTurn) -> None:
        super().__init__(NUMBERS, False)
        self.plan, self.look = plan, plan.look  # type: ignore[method-assign]

    def step(self, actions: Any) -> Any:
        self._t += 1
        t, plan, over = self._t, self.plan, self._t == STEPS
        flags = [plan.flags(t, end) | {"__all__": over and plan.last == end} for end in ("terminated", "truncated")]
        return self.look(t), plan.rewarded[t], *flags, {}


class Side(NamedTuple):
    """RLlib's runner with an episode of it, and what is ours."""

    config: PPOConfig
    modules: Any
    theirs: MultiAgentEpisode
    manifest: CrewManifest
    plan: Plan | InTurn

    def following(self) -> FollowingAgents:
        actors = {}
        for name, about in self.manifest.modules.items():
            actors[name] = ModuleActor(self.modules[name], about, ACTIONS, False, False)
            actors[name].apply(VERSION, weights_body(about, self.modules.get_state(), name))
        return FollowingAgents(self.config, actors, self.manifest.agents, pipeline_of(self.config), threading.Lock())


def side_of(case: str, plan: Plan | InTurn) -> Side:
    torch.manual_seed(4)
    mine, theirs_config = CASES[case](), CASES[case]()
    theirs_config.environment(env=lambda _: Planned(plan))
    runner = MultiAgentEnvRunner(config=theirs_config, worker_index=0)
    try:
        (theirs,) = runner.sample(num_episodes=1, explore=False)
        manifest = CrewManifest.of(crew_of(mine, runner.module))
        assert all(about.seen is not None for about in manifest.modules.values())
        return Side(mine, runner.module, theirs.to_numpy(), manifest, plan)
    finally:
        runner.stop()


def answered(following: FollowingAgents, one: Any, acts: bool = True) -> dict[str, NDArray[Any]]:
    """What is answered to a request of a client's."""
    arrays, how = (one.columns, one.how) if acts else (one._arrays, {**one._how, "places": [one._place], "acts": False})
    columns, body = to_buffers(arrays)
    message = ACT(
        bytes(16), 1, how["rows"], columns, agents=tuple(how["agents"]), places=tuple(how["places"]),
        told=tuple(how["told"]), acts=how.get("acts", True),
    )  # fmt: skip
    episodes = following.follow(message, [bytes(buffer) for buffer in body])
    (answer,) = following.answer([(message, episodes)], False)
    assert set(answer.modules.values()) <= {VERSION}
    return answer.columns


def fragments(side: Side, cuts: Sequence[int], *, early: bool = False) -> list[Lease]:
    """Those of a simulator whose episode is followed, cut after these env steps: with the answer to the next request,
    or `early`, by one for just that. Answers are held against RLlib's."""
    following = side.following()
    layouts = {name: layout_of_policy(about) for name, about in side.manifest.modules.items()}
    builder = AgentsBuilder("e", MODULE_OF)
    builder.recast({agent: Member(module, layouts[module]) for agent, module in MODULE_OF.items()}, {})
    origin = AgentsOrigin.of(RUN, VERSION, dict.fromkeys(layouts, VERSION))
    measure = whole(layouts[module] for module in MODULE_OF.values())
    builder.begin(measure, "acted", origin, 100)
    leases: list[Lease] = []
    taken = dict.fromkeys(MODULE_OF, 0)

    def cut(end: str = "no") -> None:
        leases.append(sent(builder.cut(), len(leases) + 1, end))
        builder.begin(measure, "acted", origin, 100)

    plan = side.plan
    for t in range(STEPS):
        turn = Turn(plan.look(t), plan.flags(t, "terminated"), plan.flags(t, "truncated"))
        builder.observe(turn)
        if early and t in cuts:
            see(following, PendingSeenAgents(None, builder))  # type: ignore[arg-type]
            cut()
            builder.observe(turn)
        observed, acting = builder.newly_observed(), builder.to_act()
        answer = answered(following, AskedStep(builder, observed)) if observed else {}
        store(builder, observed, answer)
        if t in cuts and not early:
            cut()
            builder.observe(turn)
        for module, agents in acting.items():
            mine = {name.removeprefix(f"{module}/"): array for name, array in answer.items() if name[0] == module}
            told = chosen_of(mine, len(agents), layouts[module], module)
            for i, agent in enumerate(agents):
                single, n = side.theirs.agent_episodes[agent], taken[agent]
                logits = single.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS, n)
                np.testing.assert_allclose(told.dist_inputs[i], logits, rtol=1e-4, atol=1e-6)
                assert told.actions[i] == single.get_actions(n)
                builder.took(agent, told.actions[i], told.logps[i], logits, [array[i] for array in told.state])
                taken[agent] += 1
        builder.stepped()
        builder.rewards(plan.rewarded[t + 1])
    ends = plan.flags(STEPS, "truncated")
    if plan.last == "truncated":
        ends |= dict.fromkeys(builder.agents, True)
    builder.observe(Turn(plan.look(STEPS), plan.flags(STEPS, "terminated"), ends))
    builder.finish(plan.last)  # type: ignore[arg-type]
    see(following, PendingSeenAgents(None, builder, plan.last))  # type: ignore[arg-type]
    cut(plan.last)
    return leases


def see(following: FollowingAgents, looked: PendingSeenAgents) -> None:
    if looked._observed:
        looked._store(answered(following, looked, acts=False))


def builder_of(side: Side) -> MultiAgentEpisodeBuilder:
    spaces: dict[AgentId, Any] = seen_of(side.manifest.modules, side.manifest.agents)
    connectors = FollowedAgents(side.config, spaces, 0)
    connectors.recast(side.manifest.modules)
    made = MultiAgentEpisodeBuilder(
        spaces, dict(side.config.action_space.spaces), side.modules, mapping, connectors=connectors
    )
    made.dist_inputs = dict.fromkeys(side.manifest.modules, 3)
    return made


@pytest.mark.parametrize("turns", [False, True], ids=["together", "turns"])
@pytest.mark.parametrize("case", list(CASES))
def test_actions_and_what_is_learned_from_are_those_of_rllibs_own_runner(case: str, turns: bool) -> None:
    side = side_of(case, InTurn(turns))
    theirs = batch_of(side, [side.theirs])  # type: ignore[arg-type]
    for cuts, early in (((), False), ((5,), False), ((1, 2, 7, 11), False), ((1, 6, 7), True)):
        built, refused = builder_of(side).build(fragments(side, cuts, early=early))
        assert not refused, refused
        chunks = [chunk.episode for chunk in built if chunk.episode is not None]
        assert_same(batch_of(side, chunks), theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("last", ["terminated", "truncated"])
@pytest.mark.parametrize("gaps", [False, True])
def test_agents_that_come_and_go_are_those_of_rllibs_own_runner(gaps: bool, last: str) -> None:
    """In the learner's batch as in the episode itself: who was there, and how each has ended."""
    for seed in range(4):
        side = side_of(("watched", "watched by lstm")[seed % 2], Plan(seed, gaps, last))
        every = tuple(range(1, STEPS))
        for cuts, early in (((), False), ((1, 2, 7, 11), False), (every, False), (every, True)):
            built, refused = builder_of(side).build(fragments(side, cuts, early=early))
            assert not refused, refused
            (mine,) = [chunk.episode for chunk in built if chunk.episode is not None]
            theirs = side.theirs
            assert (mine.is_terminated, mine.is_truncated, mine.env_t) == (
                theirs.is_terminated, theirs.is_truncated, theirs.env_t,
            )  # fmt: skip
            there = {agent for agent, single in theirs.agent_episodes.items() if len(single)}
            assert {agent for agent, single in mine.agent_episodes.items() if len(single)} == there
            for agent in there:
                one, other = mine.agent_episodes[agent], theirs.agent_episodes[agent]
                assert (one.is_terminated, one.is_truncated) == (other.is_terminated, other.is_truncated)
                used = len(other) + (not other.is_terminated)  # what a terminated agent saw last is never used
                np.testing.assert_allclose(one.get_observations()[:used], other.get_observations()[:used], rtol=1e-5)
                np.testing.assert_allclose(one.get_rewards(), other.get_rewards(), rtol=1e-5)
                assert list(one.get_actions()) == list(other.get_actions())


@pytest.mark.parametrize("space", [ACTIONS, Box(-1.0, 1.0, (2,), np.float32)], ids=["discrete", "box"])
def test_a_long_episode_is_cut_where_nobody_waits(space: Any) -> None:
    """RLlib's chunks lose what has begun, whatever the action is."""
    made = config(NUMBERS, Opponents) if space is ACTIONS else config(NUMBERS, Shared)
    made.environment(action_space=Dict(dict.fromkeys(MODULE_OF, space)))  # type: ignore[arg-type]
    made.env_runners(rollout_fragment_length=3)
    modules = made.get_multi_rl_module_spec(spaces=dict.fromkeys(("p", "q"), (NUMBERS, space))).build()
    with torch.no_grad():
        for module in modules.values():
            for parameter in module.parameters():
                parameter.zero_()  # the most likely action is the first one
    manifest = CrewManifest.of(crew_of(made, modules))
    actors = {name: ModuleActor(modules[name], about, space, False, False) for name, about in manifest.modules.items()}
    for name, actor in actors.items():
        actor.apply(VERSION, weights_body(manifest.modules[name], modules.get_state(), name))
    following = FollowingAgents(made, actors, manifest.agents, pipeline_of(made), threading.Lock())
    for turns in (True, False):
        env, name = Env(NUMBERS, turns), f"{turns}"
        for t in range(STEPS):
            looks = env.look(t)
            told = tuple(Told(agent, MODULE_OF[agent]) for agent in looks)
            rows = {f"{m}/obs": np.stack([looks[a] for a in looks if MODULE_OF[a] == m]) for m in
                    dict.fromkeys(MODULE_OF[agent] for agent in looks)}  # fmt: skip
            columns, body = to_buffers(rows)
            message = ACT(bytes(16), 1, len(looks), columns, agents=tuple(looks), places=(Place(name, t),), told=told)
            following.answer([(message, following.follow(message, [bytes(buffer) for buffer in body]))], False)
        episode = following._trains._episodes[bytes(16), name].episode
        assert len(episode) == (STEPS - 1 if turns else 2) and episode.env_t == STEPS - 1


def test_a_policy_that_acts_for_nobody_is_tried_among_the_others() -> None:
    made = config(NUMBERS, Others).multi_agent(policies={"p", "q", "spare"})
    modules = made.get_multi_rl_module_spec(spaces=dict.fromkeys(("p", "q", "spare"), (NUMBERS, ACTIONS))).build()
    manifest = CrewManifest.of(crew_of(made, modules))
    assert manifest.agents["spare"] == [] and manifest.modules["spare"].seen is not None
    assert {about.remote_only for about in manifest.modules.values()} == {manifest.modules["p"].remote_only}
    assert "'p'" not in manifest.modules["p"].remote_only, "other policies would make it another one"


def test_who_comes_as_all_others_end_is_said_in_words() -> None:
    following = side_of("shared", InTurn(False)).following()
    for t, told in enumerate([(Told("a", "p"),), (Told("a", "p", 0.0, "terminated"), Told("c", "q"))]):
        rows = {f"{one.module}/obs": seen(one.agent, t, NUMBERS)[np.newaxis] for one in told}
        columns, body = to_buffers(rows)
        agents = tuple(one.agent for one in told)
        message = ACT(bytes(16), t, len(agents), columns, agents=agents, places=(Place("e", t),), told=told)
        asked = [(message, following.follow(message, [bytes(buffer) for buffer in body]))]
        if not t:
            following.answer(asked, False)
        else:
            with pytest.raises(PolicyError, match="agent 'c' came as all others ended"):
                following.answer(asked, False)
