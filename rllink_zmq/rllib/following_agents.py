"""Episodes of several agents that a runner follows: a request is of one env step, with what that has brought to each of
them. All modules act at once, as in RLlib's own runner, so that connectors may look at all agents.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule

from rllink_zmq.arrays import Buffer, from_body
from rllink_zmq.errors import PolicyError, ProtocolError
from rllink_zmq.messages import ACT, STATE_OUT, AgentId, Place, Told
from rllink_zmq.policy import PolicyManifest
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.drawn import moderate, seeded
from rllink_zmq.rllib.exploration import forward
from rllink_zmq.rllib.following import (
    ACTIONS,
    Answer,
    Asked,
    Followed,
    FollowedFragments,
    Follower,
    LostError,
    SeenRows,
    alike,
    copy_state,
    longest_of,
    space_of,
    stacked,
)
from rllink_zmq.rllib.pieces import cant_act, seen_spaces
from rllink_zmq.rllib.pipelines_agents import AgentsPipelines, agents_of
from rllink_zmq.spaces import from_wire

MOST_WAITING = 10_000
"""Env steps, one after the other, in which no agent is given an observation."""


class Brought(NamedTuple):
    """What an env step has brought: observations, and of each agent its reward and whether it has ended."""

    observations: Mapping[AgentId, Any]
    told: Sequence[Told]


class AgentsFollower(Follower):
    """Of several agents. `seen`: how what the pieces make of each agent's observations travels."""

    pipelines: AgentsPipelines

    def __init__(
        self, pipelines: AgentsPipelines, seen: Mapping[AgentId, SeenRows], longest: float, horizon: int
    ) -> None:
        super().__init__(pipelines, longest, horizon)
        self._rows = seen

    def _begun(self, known: Followed, brought: Brought) -> Any:
        self._know(known, brought)
        episode = self.pipelines.episode_of(lambda agent: known.modules[agent])
        episode.add_env_reset(observations=dict(brought.observations))
        return episode

    def _know(self, known: Followed, brought: Brought) -> None:
        known.modules |= {told.agent: told.module for told in brought.told}
        known.observed = list(brought.observations)

    def _tells_more(self, known: Followed, place: Place, brought: Brought) -> bool:
        mine, before = brought.observations, known.brought.observations  # who has ended may be left out now
        told = set(brought.told) == set(known.brought.told) and place.end == known.place.end
        return not (told and all(agent in before and alike(mine[agent], before[agent]) for agent in mine))

    def _begins_anew(self, known: Followed, brought: Brought) -> bool:
        return bool(brought.observations.keys() != known.brought.observations.keys())

    def _has_acted(self, known: Followed) -> bool:
        return True  # perhaps nobody was to act

    def _go_on(self, known: Followed, place: Place, brought: Brought) -> None:
        waiting = place.t - known.t - 1
        if waiting > MOST_WAITING:
            raise LostError(f"episode '{place.episode}' is at step {known.t} here, not at {place.t}")
        self._know(known, brought)
        actions, outputs = known.acted or ({}, {})
        for t in range(known.t + 1, place.t + 1):
            now = [told for told in brought.told if (told.t if told.t >= 0 else place.t) == t]
            ends: dict[str, dict[Any, bool]] = {
                end: {told.agent: True for told in now if told.end == end} for end in ("terminated", "truncated")
            }
            if t == place.t and place.end != "no":
                ends[place.end]["__all__"] = True
            known.episode.add_env_step(
                dict(brought.observations) if t == place.t else {}, actions, {told.agent: told.reward for told in now},
                terminateds=ends["terminated"], truncateds=ends["truncated"], extra_model_outputs=outputs,
            )  # fmt: skip
            actions, outputs = {}, {}

    def _again(self, known: Followed, brought: Brought) -> None:
        rewards = {told.agent: told.reward for told in brought.told}
        for agent, observation in brought.observations.items():
            single = known.episode.agent_episodes.get(agent)
            if single is None:
                continue  # it had ended with the step that brought it
            single.observations.data[-1] = observation
            if len(single.rewards):
                single.rewards.data[-1] = rewards[agent]

    def _may_cut(self, episode: Any) -> bool:
        """RLlib's chunks lose what an agent has begun and not completed."""
        return not episode._hanging_actions_end

    def _seen(self, known: Followed) -> dict[AgentId, dict[str, NDArray[Any]]]:
        episodes = known.episode.agent_episodes
        found = {}
        for agent in known.observed:
            if agent in episodes:
                single = episodes[agent]
                reward = single.rewards.data[-1] if len(single.rewards) else 0.0
                found[agent] = self._rows[agent].both(single.get_observations(-1), reward)
        return found

    def _acted(
        self, episodes: Sequence[Followed], batch: Any, module: Any, explore: bool, sampled: int
    ) -> list[dict[AgentId, dict[str, Any]]]:
        """For each episode what RLlib's pipelines answer of each agent, by column."""
        answer: Any = {}
        if batch:
            out = {name: dict(forward(module[name], each, explore, sampled)) for name, each in batch.items()}
            to_env: Any = self.pipelines.to_env
            answer = to_env(
                rl_module=module, batch=out, episodes=[known.episode for known in episodes], explore=explore,
                shared_data=self._shared,
            )  # fmt: skip
        told = []
        for i, known in enumerate(episodes):
            each: dict[AgentId, dict[str, Any]] = {}
            for column, several in answer.items():
                for agent, value in several[i].items():
                    each.setdefault(agent, {})[column] = value
            actions = {agent: columns[Columns.ACTIONS] for agent, columns in each.items()}
            outputs = {
                agent: {name: value for name, value in columns.items() if name not in ACTIONS}
                for agent, columns in each.items()
            }
            known.acted = actions, outputs
            told.append(each)
        return told


class FollowingAgents:
    """Acts by the modules of `actors` behind connectors that see whole episodes. `agents`: for whom each acts. The rest
    is as of `FollowingActor`."""

    def __init__(
        self,
        config: AlgorithmConfig,
        actors: Mapping[str, ModuleActor],
        agents: Mapping[str, Sequence[AgentId]],
        lives: Any,
        lock: threading.Lock,
        device: Any = "cpu",
        sampled: Callable[[], int] = lambda: 0,
    ) -> None:
        self._actors, self._agents = actors, agents
        self._lives, self._lock, self._sampled = lives, lock, sampled
        self._taught = -1
        around = AgentsPipelines(config, device, lives=lives)
        self._around = {name: around.of(name, mine) for name, mine in agents.items() if mine}
        self._modules = MultiRLModule()
        for name, actor in actors.items():
            self._modules.add_module(name, actor.module)
        seen = {
            agent: SeenRows(space)
            for agent, space in seen_of({name: actor.manifest for name, actor in actors.items()}, agents).items()
        }
        terms = longest_of(config), config.episode_lookback_horizon
        self._trains = AgentsFollower(around, seen, *terms)
        self._evaluates = AgentsFollower(AgentsPipelines(config, device), seen, *terms)

    def follow(self, message: ACT, body: Sequence[Buffer]) -> list[Followed]:
        """The episode that goes on with this request. Raises `LostError`, and `ProtocolError` for what nobody can act
        by."""
        if len(message.places) != 1:
            raise ProtocolError(f"expected one of 'places', of the env step, got {len(message.places)}")
        (place,) = message.places
        brought = Brought(self._observations(message, from_body(message.columns, body)), message.told)
        follower = self._trains
        if message.evaluation:
            follower = self._evaluates
            version = max(actor.version for actor in self._actors.values())
            if place.t == 0 and self._taught != version:
                self._taught = version
                with self._lock:
                    copy_state(self._lives, follower.pipelines.to_module)
        return [follower.place(message.session, place, brought)]

    def _observations(self, message: ACT, arrays: Mapping[str, NDArray[Any]]) -> dict[AgentId, Any]:
        modules = {told.agent: told.module for told in message.told}
        if len(message.agents) != message.rows or not set(message.agents) <= modules.keys():
            raise ProtocolError(
                f"expected in 'agents' whose each of the {message.rows} rows is, and all of them in 'told'"
            )
        for agent, name in modules.items():
            if name not in self._actors or agent not in self._agents.get(name, ()):
                raise ProtocolError(f"module '{name}' doesn't act for agent {agent!r} (any more)", "no_module")
        found: dict[AgentId, Any] = {}
        for name in dict.fromkeys(modules[agent] for agent in message.agents):
            actor, mine = self._actors[name], [agent for agent in message.agents if modules[agent] == name]
            rows = arrays.get(f"{name}/obs")
            if rows is None or rows.shape != (len(mine), *actor.shape) or rows.dtype != actor.dtype:
                came = "none" if rows is None else f"{rows.dtype}{list(rows.shape)}"
                raise ProtocolError(
                    f"expected '{name}/obs' of {actor.dtype}{[len(mine), *actor.shape]}, got {came}: start the "
                    f"simulator with the trainer's environment"
                )
            bad = actor.not_finite(rows)
            if bad.any():
                raise ProtocolError(f"the observation of agent {mine[int(bad.argmax())]!r} holds NaN or infinity")
            found |= zip(mine, self._around[name].each(rows), strict=True)
        return found

    def answer(self, some: Sequence[Asked], explore: bool) -> list[Answer]:
        """As of `FollowingActor`."""
        first = some[0][0]
        follower = self._evaluates if first.evaluation else self._trains
        episodes = [known for _, (known,) in some]
        acted: list[dict[AgentId, dict[str, Any]]] = [{} for _ in some]
        with self._lock, torch.no_grad():
            if not first.acts:
                seen = [follower.see(known, self._modules, explore) for known in episodes]
            else:
                for indices, told in follower.act(episodes, self._modules, explore, self._sampled()):
                    for i, each in zip(indices, told, strict=True):
                        acted[i] = each
                seen = [follower.newest(known) for known in episodes]
        return [self._answer(message, acts, saw) for (message, _), acts, saw in zip(some, acted, seen, strict=True)]

    def _answer(
        self,
        message: ACT,
        acted: Mapping[AgentId, dict[str, Any]],
        seen: Mapping[AgentId, Mapping[str, NDArray[Any]]],
    ) -> Answer:
        """The columns of each module, its agents in the order of the request's."""
        modules = {told.agent: told.module for told in message.told}
        ended = {told.agent for told in message.told if told.end != "no"}
        columns: dict[str, NDArray[Any]] = {}
        versions: dict[str, int] = {}
        for name in dict.fromkeys(modules[agent] for agent in message.agents):
            mine = [agent for agent in message.agents if modules[agent] == name]
            gone = [agent for agent in mine if agent not in seen]
            if gone:
                raise PolicyError(f"agent {gone[0]!r} came as all others ended, with which RLlib's episode is over")
            made = stacked([seen[agent] for agent in mine])
            versions[name] = self._actors[name].version
            acting = [agent for agent in mine if agent not in ended] if message.acts else []
            if acting:
                made |= self._columns(name, acting, acted)
            columns |= {f"{name}/{column}": array for column, array in made.items()}
        return Answer(columns, max(versions.values(), default=-1), versions)

    def _columns(
        self, name: str, agents: Sequence[AgentId], acted: Mapping[AgentId, dict[str, Any]]
    ) -> dict[str, NDArray[Any]]:
        missing = [agent for agent in agents if Columns.ACTIONS not in acted.get(agent, {})]
        if missing:
            raise PolicyError(f"the configured connectors give no action for agent {missing[0]!r}, which is to act")
        actor = self._actors[name]
        told = {
            column: [acted[agent][column] for agent in agents]
            for column in acted[agents[0]]
            if column != Columns.STATE_OUT
        }
        columns = self._around[name].columns_of(told, len(agents), actor.module)
        states = [actor.memory.flat(acted[agent][Columns.STATE_OUT]) for agent in agents] if actor.memory else []
        for i, part in enumerate(actor.memory.names):
            columns[STATE_OUT + part] = np.stack([np.asarray(state[i]) for state in states])
        return columns


class FollowedAgents:
    """Fragments of followed episodes of several agents: what `MultiAgentEpisodeBuilder` asks of connectors."""

    def __init__(self, config: AlgorithmConfig, spaces: Mapping[AgentId, gym.Space[Any]], lookback: int) -> None:
        self._lookback = lookback
        given = seen_spaces(config)
        self._made = {agent: FollowedFragments(space, lookback, given[agent]) for agent, space in spaces.items()}
        self.lookbacks: Mapping[str, int] = {}

    def recast(self, modules: Mapping[str, PolicyManifest]) -> None:
        """These modules act."""
        self.lookbacks = dict.fromkeys(modules, self._lookback)

    def of(self, agent: AgentId, module: str) -> FollowedFragments:
        """Those of `agent`, whatever it acts by."""
        return self._made[agent]

    def check(self, version: int) -> None:
        """Nothing: it is the same with any version."""


def seen_of(
    modules: Mapping[str, PolicyManifest], agents: Mapping[str, Sequence[AgentId]]
) -> dict[AgentId, gym.Space[Any]]:
    """The spaces of what the pieces make of each agent's observations."""
    return {
        agent: from_wire(manifest.seen)
        for name, manifest in modules.items()
        if manifest.seen is not None
        for agent in agents.get(name, ())
    }


def try_following_agents(
    config: AlgorithmConfig, modules: MultiRLModule, casts: Sequence[Mapping[AgentId, str]]
) -> tuple[dict[AgentId, gym.Space[Any]], dict[str, int]]:
    """Of each agent the space of what the pieces make of its observations, and of each module how many
    `action_dist_inputs` an action has. `casts`: by which module agents act, in several episodes. Raises `PolicyError`
    for what can't act in that way either."""
    spaces: dict[AgentId, gym.Space[Any]] = {}
    inputs: dict[str, int] = {}
    observation_spaces, _ = agents_of(config)
    drawn = {agent: seeded(space, i) for i, (agent, space) in enumerate(observation_spaces.items())}
    for cast in casts:
        pipelines = AgentsPipelines(config, lives=AgentsPipelines(config).to_module)
        try:
            episode = pipelines.episode_of(cast.__getitem__)
            begins = {agent: tree.map_structure(moderate, drawn[agent].sample()) for agent in cast}
            episode.add_env_reset(observations=begins)
            shared: dict[str, Any] = {}
            with torch.no_grad():
                batch = pipelines.to_module(
                    rl_module=modules, batch={}, episodes=[episode], explore=True, shared_data=shared
                )
                for agent in cast:
                    seen = episode.agent_episodes[agent].get_observations(-1)
                    spaces[agent] = space_of(pipelines.space_of(episode, agent), seen)
                out = {name: dict(forward(modules[name], each, True, 0)) for name, each in batch.items()}
                answer = pipelines.to_env(
                    rl_module=modules, batch=out, episodes=[episode], explore=True, shared_data=shared
                )
            for agent, row in answer[Columns.ACTION_DIST_INPUTS][0].items():
                inputs[cast[agent]] = int(np.size(row))
        except PolicyError:
            raise
        except Exception as error:  # a user's module or piece
            raise cant_act("the policies", error) from error
    return spaces, inputs


__all__ = ["FollowedAgents", "FollowingAgents", "seen_of", "try_following_agents"]
