"""The connectors that a user configured, of several agents: around the module that acts for some of them.

A request is of one module, and names the agent of each row. To the pieces each row is an episode in which this agent
alone takes part: a piece that looks at other agents is found out at start, and runners follow the episodes then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, Self

import gymnasium as gym
import tree  # dm_tree, which RLlib needs
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.common.agent_to_module_mapping import AgentToModuleMapping
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllink_zmq.messages import AgentId
from rllink_zmq.rllib.drawn import counted_from_0, moderate, seeded
from rllink_zmq.rllib.exploration import forward
from rllink_zmq.rllib.pieces import seen_spaces, state_of
from rllink_zmq.rllib.pipelines import Moment, Pipelines
from rllink_zmq.rllib.rewriting import Filters, FragmentConnectors

TRIED_AGENTS = 16
"""Agents of a module that pieces are tried with at start, each of them."""

OTHERS = 8
"""Other agents that are there when one is tried."""


class AgentsPipelines(Pipelines):
    """The pipelines around one module at a time (`of`). `module`: all modules, which pieces are shown where fragments
    become episodes. Everything else as of `Pipelines`."""

    _NOT_BROUGHT = "at other agents, "

    def __init__(
        self,
        config: AlgorithmConfig,
        device: Any = None,
        *,
        module: Any = None,
        learns: Any = None,
        lives: Any = None,
    ) -> None:
        self._observation_spaces, self._action_spaces = agents_of(config)
        super().__init__(config, device, module=module, learns=learns, lives=lives)
        self._config, self._device = config, device
        self._room: list[int] = []  # of all copies
        self._module_id = ""
        self._agents: frozenset[AgentId] = frozenset()
        self._others: dict[AgentId, str] = {}
        self._drawn_of: dict[AgentId, tuple[gym.Space[Any], gym.Space[Any]]] = {}
        self._around: dict[int, MultiRLModule] = {}

    def of(self, module_id: str, agents: Sequence[AgentId], lookback: int = 0) -> Self:
        """The same pieces, with one state, for a module and its agents, whose spaces are alike."""
        mine = copy.copy(self)
        mine._module_id, mine._agents, mine.lookback = module_id, frozenset(agents), lookback
        mine._be_of(self._observation_spaces[agents[0]], self._action_spaces[agents[0]])
        return mine

    def apart(self) -> Self:
        """Pieces of its own, which have another state: copies, where they can be copied, for RLlib's constructors of a
        pipeline's pieces take 0.1 s."""
        mine = copy.copy(self)
        own = len(self._own)
        try:
            mine.to_module, mine.to_env = copy.deepcopy((self.to_module, self.to_env))
        except Exception:  # a piece of the user's that holds a lock, say
            made = type(self)(self._config, self._device)
            mine.to_module, mine.to_env = made.to_module, made.to_env
        mine._own = mine.to_module.connectors[:own]
        mine._set = [b""]
        return mine

    def room(self, config: AlgorithmConfig) -> int:
        if not self._room:
            self._room.append(super().room(config))
        return self._room[0]

    def _teach_some(self, whose: AgentId | None = None) -> None:
        for agent in self._observation_spaces:
            super(AgentsPipelines, self.of("", [agent]))._teach_some(agent)

    @property
    def agents(self) -> Collection[AgentId]:
        return self._agents

    def check_agents(self, modules: MultiRLModule, cast: Mapping[AgentId, str]) -> int:
        """`check`, for each of its agents. `modules`: all; `cast`: by which of them agents act in an episode."""
        lookback = inputs = 0
        for agent in sorted(self._agents, key=str)[:TRIED_AGENTS]:
            there = [(other, module) for other, module in cast.items() if other != agent]
            self._others = dict(there[:OTHERS])
            self._drawn_of = {
                other: (
                    seeded(self._observation_spaces[other], i),
                    seeded(counted_from_0(self._action_spaces[other]), i),
                )
                for i, other in enumerate(self._others, 1)
            }
            module = modules[self._module_id]
            self._around = {id(module): modules}
            inputs = self.check(module, agent)
            lookback = max(lookback, self.lookback)
        self.lookback = lookback
        self._others, self._around = {}, {}
        return inputs

    _MORE = "other agents, or more of an episode"

    def _forward(self, shown: Any, batch: Any) -> Any:
        return {name: dict(forward(shown[name], each, False, 0)) for name, each in batch.items()}

    # ---- episodes of one agent

    def _begun(self, observation: Any, whose: AgentId | None) -> MultiAgentEpisode:
        return self._new({whose: observation}, {})

    def _new(self, observations: dict[Any, Any], others: Mapping[AgentId, str]) -> MultiAgentEpisode:
        episode = self.episode_of(lambda agent: others.get(agent, self._module_id))
        episode.add_env_reset(observations=observations)
        return episode

    def episode_of(self, module_of: Callable[[AgentId], str]) -> MultiAgentEpisode:
        """One that hasn't begun yet, in which each agent acts by this module."""
        return MultiAgentEpisode(
            observation_space=self._observation_spaces,
            action_space=self._action_spaces,
            agent_to_module_mapping_fn=lambda agent, episode, **_: module_of(agent),
        )

    def _go_on(self, episode: Any, moment: Moment, outputs: dict[str, Any]) -> None:
        agent = self._single(episode).agent_id
        episode.add_env_step(*({agent: value} for value in moment), extra_model_outputs={agent: outputs})

    def _single(self, episode: Any) -> SingleAgentEpisode:
        """The first agent's: it came first."""
        single: SingleAgentEpisode = next(iter(episode.agent_episodes.values()))
        return single

    def _space_of(self, episode: Any) -> gym.Space[Any]:
        return self.space_of(episode, self._single(episode).agent_id)

    def space_of(self, episode: MultiAgentEpisode, agent: AgentId) -> gym.Space[Any]:
        """Of what the pieces have made of this agent's observations. RLlib's leave the spaces of all agents in the
        episode of one that they have rewritten."""
        single = episode.agent_episodes[agent]
        told = [single.observation_space, episode.observation_space]
        for piece in reversed(self._own):
            if any(space is piece.observation_space for space in told):
                space: gym.Space[Any] = piece.observation_space[single.agent_id]
                return space
        its: gym.Space[Any] = self._observation_spaces[single.agent_id]
        return its

    def _shown(self, module: Any) -> Any:
        if module is None or isinstance(module, MultiRLModule):
            return module
        if id(module) not in self._around:
            alone = MultiRLModule()
            alone.add_module(self._module_id, module)
            self._around = {id(module): alone}
        return self._around[id(module)]

    def _batch_of(self, batch: Any) -> Any:
        return batch[self._module_id]

    def _made_by(self, out: dict[str, Any]) -> dict[str, Any]:
        return {self._module_id: out}

    def _rows_of(self, answer: Any, episodes: Sequence[Any]) -> Any:
        agents = [self._single(episode).agent_id for episode in episodes]
        return {
            column: [row[agent] for row, agent in zip(rows, agents, strict=True)] for column, rows in answer.items()
        }

    # ---- at start

    def _past_begun(self, observation: Any, whose: AgentId | None) -> MultiAgentEpisode:
        return self._new({whose: observation, **self._drawn_by_others(0)}, self._others)

    def _past_goes_on(self, past: Any, moment: Moment, outputs: dict[str, Any]) -> None:
        agent = self._single(past).agent_id
        others = self._drawn_by_others(0), self._drawn_by_others(1), dict.fromkeys(self._others, 1.0)
        told = ({agent: value, **rest} for value, rest in zip(moment, others, strict=True))
        past.add_env_step(*told, extra_model_outputs={agent: outputs})

    def _drawn_by_others(self, which: int) -> dict[AgentId, Any]:
        """Observations (0) or actions (1) of the other agents."""
        return {agent: tree.map_structure(moderate, spaces[which].sample()) for agent, spaces in self._drawn_of.items()}

    def _call_alike(self, alone: Any, past: Any) -> None:
        alone.id_ = past.id_
        for single in alone.agent_episodes.values():
            single.multi_agent_episode_id = past.id_

    def _compared(self) -> Sequence[ConnectorV2]:
        """Behind RLlib's AgentToModuleMapping nobody knows any more which agent's a row is."""
        return list(takewhile(lambda piece: not isinstance(piece, AgentToModuleMapping), self.to_module.connectors))

    def _items_of(self, batch: Any, episode: Any) -> Any:
        agent = self._single(episode).agent_id
        return {
            column: {key: value for key, value in items.items() if len(key) < 2 or key[1] == agent}
            if isinstance(items, dict) and all(isinstance(key, tuple) for key in items)
            else items
            for column, items in batch.items()
        }


def agents_of(config: AlgorithmConfig) -> tuple[dict[AgentId, gym.Space[Any]], dict[AgentId, gym.Space[Any]]]:
    """Observation and action spaces of all agents there may be, by their ids."""
    return dict(config.observation_space.spaces), dict(config.action_space.spaces)


class AgentsConnectors:
    """What a runner needs a config's pipelines for where fragments of several agents become episodes: for each agent
    and module, made when it is asked for. `modules`: all that there are; `learns`, `filters`: as of `Pipelines` and
    `FragmentConnectors`. `lookbacks`: how far each module looks back."""

    def __init__(self, config: AlgorithmConfig, modules: MultiRLModule, learns: Any, filters: Filters | None) -> None:
        self.lookbacks: Mapping[str, int] = {}
        self._filters = filters
        self._seen = seen_spaces(config)
        self._rewrites_by_version = filters is not None and learns is not None and bool(state_of(learns))
        self._pipelines = AgentsPipelines(config, module=modules, learns=learns)
        self._made: dict[tuple[AgentId, str], AgentConnectors] = {}

    def recast(self, lookbacks: Mapping[str, int]) -> None:
        """The modules look back so far; there may be others than before."""
        self.lookbacks = lookbacks
        self._made.clear()

    def of(self, agent: AgentId, module: str) -> AgentConnectors:
        """Those of `agent` where it acts by `module`."""
        key = (agent, module)
        if key not in self._made:
            pipelines = self._pipelines.of(module, [agent], self.lookbacks.get(module, 0))
            self._made[key] = AgentConnectors(pipelines, self._filters, agent, self._seen[agent])
        return self._made[key]

    def check(self, version: int) -> None:
        """Raises `UnknownFilter` where fragments of this version can't be rewritten."""
        if self._filters is not None and self._rewrites_by_version:
            self._filters.known(version)


class AgentConnectors(FragmentConnectors):
    """`FragmentConnectors` of one agent. `seen_space`: of what its module is given."""

    def __init__(
        self, pipelines: AgentsPipelines, filters: Filters | None, agent: AgentId, seen_space: gym.Space[Any]
    ) -> None:
        super().__init__(pipelines, filters, agent)
        self.seen_space = seen_space


__all__ = ["AgentConnectors", "AgentsConnectors", "AgentsPipelines", "agents_of"]
