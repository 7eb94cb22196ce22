"""The connectors that a user configured, as RLlib's own runner would run them: where runners compute actions, and where
fragments become episodes.

A request brings one observation, and of the steps before it as many as the pieces look at (stacked frames, actions and
rewards); `Pipelines.check` finds out how many, and names a piece that needs what no request can bring. A piece that
rewrites observations (a filter, flattening) does so again for the fragment that the simulator sends, with the same
state: the state belongs to a version of the weights, and travels at the end of their bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllink_zmq.errors import PolicyError, SettingsError
from rllink_zmq.fragments import Before
from rllink_zmq.messages import AgentId
from rllink_zmq.packing import Packing, packing_of
from rllink_zmq.packing_actions import action_packing, env_packing
from rllink_zmq.rllib.drawn import counted_from_0, moderate, same, seeded
from rllink_zmq.rllib.exploration import forward
from rllink_zmq.rllib.flattening import Came, flattening_of
from rllink_zmq.rllib.pieces import cant_act, count_own, is_own, state_bytes, state_of
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.rllib.states import from_bytes, to_bytes

TRIED = 24
"""Observations that pieces are tried with at start: what they look at may be one of two values."""

TRIED_TO_ENV = 8
"""Steps that module-to-env pieces are tried with."""

MAX_LOOKBACK = 16
"""The most steps before the newest observation that pieces may look at."""

_OUTPUTS = (Columns.ACTIONS, Columns.ACTION_LOGP, Columns.ACTION_DIST_INPUTS)


class NeedsEpisode(PolicyError):
    """A piece needs more of an episode than a request brings: a runner has to follow the episode."""


class RefusedPiece(PolicyError):
    """A piece does what neither a request nor an episode that is followed can do."""


class Moment(NamedTuple):
    """An observation, and the step that led to it: what was done before (None = it doesn't matter), and its reward."""

    observation: Any
    action: Any = None
    reward: float = 0.0


class Pipelines:
    """A config's env-to-module and module-to-env pipelines. They never learn of what they see (a filter's statistics),
    only from `set_state`. Not for two threads.

    `lives`: an env-to-module pipeline of the same config to use instead of one of its own, which learns of all it sees.
    `module`: the RLModule that pieces are shown where fragments become episodes. `learns`: an env-to-module pipeline of
    the same config that shall learn instead, by `learn`. `lookback`: how many steps before the newest observation the
    pieces look at. `whose`, of some methods: the agent that has these observations, where there are several
    (`AgentsPipelines`).
    """

    def __init__(
        self,
        config: AlgorithmConfig,
        device: Any = None,
        *,
        module: Any = None,
        learns: Any = None,
        lookback: int = 0,
        lives: Any = None,
    ) -> None:
        self.lookback = lookback
        self._module = module
        given = (config.observation_space, config.action_space)
        spaces = dict.fromkeys((INPUT_ENV_SPACES, INPUT_ENV_SINGLE_SPACES), given)
        self.to_module = lives or config.build_env_to_module_connector(env=None, spaces=spaces, device=device)
        self.to_env = config.build_module_to_env_connector(env=None, spaces=spaces)
        made = 0 if config._env_to_module_connector is None else count_own(config, self.to_module)
        self._own: list[ConnectorV2] = self.to_module.connectors[:made]
        for piece in self._own:
            if lives is None and getattr(piece, "_update_stats", None):
                piece._update_stats = False  # RLlib's MeanStdFilter, which has no public name for it
        self._learning: list[ConnectorV2] = [] if learns is None else learns.connectors[:made]
        self.stateful = bool(state_of(self.to_module))
        self._set = [b""]  # which state the pieces have, whoever shares them
        self._be_of(*given)

    def _be_of(self, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        """See and do what is in these spaces."""
        self.observation_space, self.action_space = observation_space, action_space
        self._packing: Packing | None = packing_of(observation_space)
        self._actions, self._env_actions = action_packing(action_space), env_packing(action_space)
        self._flattening = flattening_of(self._own, observation_space)
        self._drawn = seeded(counted_from_0(action_space))
        self._action = self._drawn.sample()

    @property
    def agents(self) -> Collection[AgentId]:
        """Whose observations these may be, where there are several."""
        return ()

    # ---- state

    @property
    def state(self) -> bytes:
        """Of the env-to-module pieces; b'' where they have none. Raises `PolicyError` for what can't travel."""
        return state_bytes(self.to_module)

    def set_state(self, state: bytes) -> None:
        """As of `state`. Raises `PolicyError` for bytes that are none."""
        if state and self._set[0] != state:
            self._set[0] = b""
            self.to_module.set_state(from_bytes(state))
            self._set[0] = state

    def room(self, config: AlgorithmConfig) -> int:
        """Bytes at the end of the weights for the pieces' state, 0 = they have none. Those that learn are there to try
        how large it grows: RLlib compresses the arrays, and those of a filter that has seen nothing are zeros. Raises
        `SettingsError` for settings that a filter can't do with."""
        try:
            state = self.state
        except PolicyError as error:
            raise NeedsEpisode(str(error)) from error
        if not state:
            return 0
        if not (config.merge_env_runner_states and config.broadcast_env_runner_states):
            raise SettingsError(
                "the configured connectors keep a state, and each runner would have one of its own: leave "
                "config.env_runners(merge_env_runner_states=..., broadcast_env_runner_states=...) as they are"
            )
        self._teach_some()
        return 8 + 2 * max(len(state), len(to_bytes([piece.get_state() for piece in self._learning]))) + 4096

    def _teach_some(self, whose: AgentId | None = None) -> None:
        """Let the pieces that learn see some observations."""
        space = seeded(self.observation_space)
        samples = [Moment(tree.map_structure(moderate, space.sample())) for _ in range(TRIED)]
        self._seen(self._learning, self._firsts(samples, whose))

    # ---- acting

    def act(
        self,
        module: Any,
        histories: Sequence[Sequence[Moment]],
        explore: bool,
        memory: Memory,
        before: Sequence[torch.Tensor],
        sampled: int = 0,
        whose: Sequence[AgentId] | None = None,
    ) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any]]]:
        """Columns of an answer for observations, each at the end of those before it: RLlib's pipelines around `module`;
        and its memory after the step, which was `before`. `sampled`: env steps of the training so far. `whose`: of each
        observation."""
        return self._act(module, self._episodes(histories, memory, whose), explore, memory, before, sampled)

    def each(self, rows: NDArray[Any]) -> list[Any]:
        """(n, *row) as they travel -> n observations."""
        return _each(rows, self._packing)

    def history(self, before: Before | None, newest: Any) -> list[Moment]:
        """An observation at the end of the steps before it."""
        if before is None or not len(before.rewards):
            return [Moment(newest)]
        observations = [*self.each(before.observations), newest]
        steps = zip(_each(before.actions, self._actions), before.rewards.tolist(), strict=True)
        told = [(None, 0.0), *steps]
        return [Moment(one, action, reward) for one, (action, reward) in zip(observations, told, strict=True)]

    def _act(
        self,
        module: Any,
        episodes: list[Any],
        explore: bool,
        memory: Memory,
        before: Sequence[torch.Tensor],
        sampled: int,
    ) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any]]]:
        shared: dict[str, Any] = {}
        shown = self._shown(module)
        with torch.no_grad():
            batch = self._batch_of(
                self.to_module(rl_module=shown, batch={}, episodes=episodes, explore=explore, shared_data=shared)
            )
            if memory:
                batch[Columns.STATE_IN] = memory.nested(before)  # to RLlib these episodes begin
            out = forward(module, batch, explore, sampled)
            after = [array.numpy(force=True) for array in memory.flat(out[Columns.STATE_OUT])] if memory else []
            made = self._made_by(dict(out))
            answer = self._rows_of(
                self.to_env(rl_module=shown, batch=made, episodes=episodes, explore=explore, shared_data=shared),
                episodes,
            )
        return self.columns_of(answer, len(episodes), module), after

    def columns_of(self, answer: Any, count: int, module: Any) -> dict[str, NDArray[Any]]:
        """Columns of an answer with `count` rows. Raises `PolicyError` where they can't be had."""
        if Columns.ACTIONS not in answer or Columns.ACTION_DIST_INPUTS not in answer:
            raise PolicyError(
                f"{type(module).__name__} and the module-to-env pieces answer with {sorted(answer)}: a learner of PPO, "
                f"APPO or IMPALA needs {Columns.ACTIONS} and {Columns.ACTION_DIST_INPUTS}; of modules that choose "
                f"actions themselves RLlib's own for DQN is known"
            )
        columns = {name: _stacked(answer[name], count) for name in _OUTPUTS[1:] if name in answer}
        columns[Columns.ACTIONS] = _packed(answer[Columns.ACTIONS], count, self._actions)
        if Columns.ACTION_LOGP not in columns:
            columns[Columns.ACTION_LOGP] = np.zeros(count, np.float32)
        if Columns.ACTIONS_FOR_ENV in answer or self._env_actions is not None:
            for_env = answer.get(Columns.ACTIONS_FOR_ENV, answer[Columns.ACTIONS])
            columns["env_actions"] = _packed(for_env, count, self._env_actions)
        return columns

    # ---- fragments

    def rewritten(self, came: Came, whose: AgentId | None = None) -> tuple[Any, gym.Space[Any]]:
        """What an RLlib runner would have in its episodes for observations that follow each other, and its space: the
        same, unless a piece rewrites them."""
        if not self._own:
            return came.observations, self.observation_space
        if self._flattening is not None:
            return self._flattening.of_rows(came.observations), self._flattening.observation_space
        each = self._moments(came)
        if self.lookback:
            found, space = self._stepped(each, len(each), whose)
        else:
            episodes = self._firsts(each, whose)
            found, space = self._seen(self._own, episodes), self._space_of(episodes[0])
        return tree.map_structure(lambda *leaves: np.stack(leaves), *found), space

    def learn(self, came: Came, first: int, whose: AgentId | None = None) -> None:
        """Let the pipeline that learns see observations `first` and those after it, in their order."""
        if self.stateful and self._learning:
            each = self._moments(came)
            if self.lookback:
                self._stepped(each, first, whose)
            else:
                self._seen(self._learning, self._firsts(each[first:], whose))

    def dist_inputs(self, module: Any, came: Came, whose: AgentId | None = None) -> NDArray[Any]:
        """(steps, k): what the module would have drawn from at each of these steps, after those that came before."""
        each = self._moments(came)
        last = len(each) - 1
        histories = [each[max(0, i - self.lookback) : i + 1] for i in range(came.back, last)]
        agents = None if whose is None else [whose] * len(histories)
        columns, _ = self.act(module, histories, True, Memory(None), (), whose=agents)
        return columns[Columns.ACTION_DIST_INPUTS].reshape(len(histories), -1)

    def _moments(self, came: Came) -> list[Moment]:
        count = len(tree.flatten(came.observations)[0])
        observations = [tree.map_structure(lambda a, i=i: a[i].copy(), came.observations) for i in range(count)]
        if not self.lookback:  # nobody looks at what was done
            return [Moment(one) for one in observations]
        steps = zip(_each(came.actions, self._actions), came.rewards.tolist(), strict=True)
        told = [(None, 0.0), *steps]
        return [Moment(one, action, reward) for one, (action, reward) in zip(observations, told, strict=True)]

    def _stepped(
        self, each: Sequence[Moment], learn_from: int, whose: AgentId | None
    ) -> tuple[list[Any], gym.Space[Any]]:
        """One episode of these observations, step by step; from the given one on by the pieces that learn."""
        episode = self._begun(each[0].observation, whose)
        found = []
        for i, one in enumerate(each):
            if i:
                self._go_on(episode, self._told(one), {})
            found += self._seen(self._own if i < learn_from else self._learning, [episode])
        return found, self._space_of(episode)

    def _seen(self, pieces: Sequence[ConnectorV2], episodes: list[Any]) -> list[Any]:
        """The newest observations of episodes, after these pieces."""
        batch: dict[str, Any] = {}
        shared: dict[str, Any] = {}
        shown = self._shown(self._module)
        for piece in pieces:
            batch = piece(rl_module=shown, batch=batch, episodes=episodes, explore=True, shared_data=shared)
        return [self._single(episode).get_observations(-1) for episode in episodes]

    def _firsts(self, each: Sequence[Moment], whose: AgentId | None) -> list[Any]:
        """An episode that begins with each of these."""
        return [self._begun(one.observation, whose) for one in each]

    def _told(self, moment: Moment) -> Moment:
        """With some action, where nobody looks at which."""
        return moment if moment.action is not None else moment._replace(action=self._action)

    def _episodes(
        self, histories: Sequence[Sequence[Moment]], memory: Memory, whose: Sequence[AgentId] | None
    ) -> list[Any]:
        """One of each history; the pieces have seen all but the newest observations."""
        outputs = {Columns.STATE_OUT: memory.nested(memory.start)} if memory else {}
        episodes: list[Any] = [None] * len(histories)
        for back in range(max(map(len, histories)) - 1, -1, -1):
            there = [i for i, history in enumerate(histories) if len(history) > back]
            for i in there:
                one = histories[i][len(histories[i]) - 1 - back]
                if episodes[i] is None:
                    episodes[i] = self._begun(one.observation, None if whose is None else whose[i])
                else:
                    self._go_on(episodes[i], self._told(one), outputs)
            if back:
                self._seen(self._own, [episodes[i] for i in there])
        return episodes

    # ---- what is another thing with several agents

    def _begun(self, observation: Any, whose: AgentId | None) -> Any:
        """An episode with its first observation."""
        episode = SingleAgentEpisode(observation_space=self.observation_space, action_space=self.action_space)
        episode.add_env_reset(observation)
        return episode

    def _go_on(self, episode: Any, moment: Moment, outputs: dict[str, Any]) -> None:
        episode.add_env_step(*moment, extra_model_outputs=outputs)

    def _single(self, episode: Any) -> SingleAgentEpisode:
        """What pieces see of the one whose observations these are."""
        single: SingleAgentEpisode = episode
        return single

    def _space_of(self, episode: Any) -> gym.Space[Any]:
        """Of the observations that pieces have rewritten."""
        space: gym.Space[Any] = episode.observation_space
        return space

    def _shown(self, module: Any) -> Any:
        """What pieces are shown as the RLModule."""
        return module

    def _batch_of(self, batch: Any) -> Any:
        """The RLModule's part of what the pieces made."""
        return batch

    def _made_by(self, out: dict[str, Any]) -> dict[str, Any]:
        """What the RLModule made, as the pieces behind it are given it."""
        return out

    def _rows_of(self, answer: Any, episodes: Sequence[Any]) -> Any:
        """Columns whose rows are those of `episodes`."""
        return answer

    # ---- at start

    def check(self, module: RLModule, whose: AgentId | None = None) -> int:
        """Try them all, and find `lookback`; returns how many `action_dist_inputs` an action has. Raises `PolicyError`,
        with the name of a piece that fails, and `NeedsEpisode` for one that needs what no request brings."""
        self._module = module
        space = seeded(self.observation_space)
        samples = [tree.map_structure(moderate, space.sample()) for _ in range(MAX_LOOKBACK + TRIED)]
        memory = Memory(module)
        self.lookback = MAX_LOOKBACK
        name = self._differs(module, memory, samples, whose)
        if name:
            raise NeedsEpisode(
                f"the env-to-module piece {name} looks {self._NOT_BROUGHT}further back than {MAX_LOOKBACK} steps, or "
                f"at what is neither an observation, an action nor a reward, or remembers what it has seen, or draws"
            )
        for self.lookback in range(MAX_LOOKBACK + 1):
            if not self._differs(module, memory, samples, whose):
                break
        try:
            before = [torch.from_numpy(array) for array in memory.starts(TRIED)]
            histories = [[Moment(sample)] for sample in samples[:TRIED]]
            agents = None if whose is None else [whose] * TRIED
            answer, _ = self.act(module, histories, True, memory, before, whose=agents)
        except PolicyError:
            raise
        except Exception as error:  # a user's module or piece
            raise cant_act(type(module).__name__, error) from error
        self._check_to_env(module, memory, samples, whose)
        return int(answer[Columns.ACTION_DIST_INPUTS].reshape(TRIED, -1).shape[1])

    def _check_to_env(self, module: RLModule, memory: Memory, samples: list[Any], whose: AgentId | None) -> None:
        """Raises `NeedsEpisode`, with its name, for a module-to-env piece that does something else where it sees all
        that has been in an episode."""
        outputs = {Columns.STATE_OUT: memory.nested(memory.start)} if memory else {}
        past, moments = self._past_begun(copy.deepcopy(samples[0]), whose), [Moment(samples[0])]
        random, differ = np.random.default_rng(1), []
        for left, sample in zip(range(len(samples) - 1, -1, -1), [*samples[1:], None], strict=True):
            if left < TRIED_TO_ENV:
                agents = None if whose is None else [whose]
                histories = [copied(moments[-1 - self.lookback :]) for _ in range(3)]
                alone = [self._episodes([history], memory, agents)[0] for history in histories]
                for episode in alone:
                    self._call_alike(episode, past)
                made = [self._to_env_of(self._shown(module), episode) for episode in (*alone, past)]
                for name, one, *others, mine in zip(self._own_to_env, *made, strict=True):
                    if not all(same(one, other) for other in (*others, mine)):
                        differ.append(name)
            else:
                self._seen(self._own, [past])
            if sample is not None:
                moments.append(Moment(sample, self._drawn.sample(), float(random.normal())))
                self._past_goes_on(past, copy.deepcopy(moments[-1]), outputs)
        if differ:
            raise NeedsEpisode(
                f"the module-to-env piece {differ[0]} looks at {self._MORE} than a request brings, or draws, or "
                f"remembers what it has seen"
            )

    @property
    def _own_to_env(self) -> list[str]:
        """The module-to-env pieces that are the user's."""
        return [type(piece).__name__ for piece in self.to_env.connectors if is_own(piece)]

    _MORE = "more of an episode"

    def _to_env_of(self, shown: Any, episode: Any) -> list[Any]:
        """What each module-to-env piece of the user's makes of an episode's newest actions, for its first agent."""
        shared: dict[str, Any] = {}
        found = []
        with torch.no_grad():
            batch = self.to_module(rl_module=shown, batch={}, episodes=[episode], explore=False, shared_data=shared)
            out = self._forward(shown, batch)
            for piece in self.to_env.connectors:
                own = is_own(piece)  # which may do something where actions are drawn; nothing is drawn by RLlib's
                out = piece(rl_module=shown, batch=out, episodes=[episode], explore=own, shared_data=shared)
                if own:
                    found.append(copy.deepcopy(self._items_of(out, episode)))
        return found

    def _forward(self, shown: Any, batch: Any) -> Any:
        """What the module makes of a batch, not drawn."""
        return dict(forward(shown, batch, False, 0))

    _NOT_BROUGHT = ""
    """What else a piece may look at, and no request brings."""

    def _differs(self, module: RLModule, memory: Memory, samples: list[Any], whose: AgentId | None) -> str:
        """The first piece that answers differently when it sees the last `lookback` steps, instead of all that has been
        in an episode; '' if none does."""
        outputs = {Columns.STATE_OUT: memory.nested(memory.start)} if memory else {}
        past = self._past_begun(copy.deepcopy(samples[0]), whose)
        states = [copy.deepcopy(piece.get_state()) for piece in self.to_module.connectors]

        def run(piece: ConnectorV2, episode: Any, batch: Any, shared: Any, where: str) -> Any:
            try:
                shown = self._shown(module)
                return piece(rl_module=shown, batch=batch, episodes=[episode], explore=True, shared_data=shared)
            except Exception as error:  # a user's piece may raise anything
                raise PolicyError(
                    f"the env-to-module piece {type(piece).__name__} fails {where}: {type(error).__name__}: {error}"
                ) from error

        one, several = "for one observation", "for an episode of several steps"
        random = np.random.default_rng(0)
        rewards: list[float] = []
        moments = [Moment(samples[0])]
        for sample in (*samples[1:], None):
            history = copied(moments[-1 - self.lookback :])
            (alone,) = self._episodes([history], memory, None if whose is None else [whose])
            self._call_alike(alone, past)
            batches: list[dict[str, Any]] = [{}, {}]
            shared: list[dict[str, Any]] = [{}, {}]
            for piece in self._compared():
                for j, (episode, where) in enumerate(((alone, one), (past, several))):
                    batches[j] = run(piece, episode, batches[j], shared[j], one if len(past) == 0 else where)
                newest = [self._single(episode).get_observations(-1) for episode in (alone, past)]
                if not same(*(self._items_of(batch, alone) for batch in batches)) or not same(*newest):
                    return type(piece).__name__
                if not same(list(self._single(past).rewards.data), rewards):
                    raise NeedsEpisode(f"the env-to-module piece {type(piece).__name__} sets rewards")
                if not same(list(self._single(past).actions.data), [moment.action for moment in moments[1:]]):
                    raise RefusedPiece(
                        f"the env-to-module piece {type(piece).__name__} changes actions that have been taken, and "
                        f"fragments have them as the simulator was told: leave that to a module-to-env piece"
                    )
            if sample is not None:
                # Of all signs and sizes: a piece may look at one of these alone.
                reward = float(random.normal() * 10.0 ** random.integers(-1, 3))
                rewards.append(reward)
                moments.append(Moment(sample, self._drawn.sample(), reward))
                self._past_goes_on(past, copy.deepcopy(moments[-1]), outputs)
        for piece, state in zip(self.to_module.connectors, states, strict=True):
            if not same(piece.get_state(), state):
                raise NeedsEpisode(
                    f"the env-to-module piece {type(piece).__name__} changes its state with what it sees (RLlib's "
                    f"MeanStdFilter can be told not to)"
                )
        return ""

    def _past_begun(self, observation: Any, whose: AgentId | None) -> Any:
        """An episode with all that may be in one."""
        return self._begun(observation, whose)

    def _past_goes_on(self, past: Any, moment: Moment, outputs: dict[str, Any]) -> None:
        self._go_on(past, moment, outputs)

    def _call_alike(self, alone: Any, past: Any) -> None:
        """Batches name what is in them by the episode."""
        alone.id_ = past.id_

    def _compared(self) -> Sequence[ConnectorV2]:
        """The env-to-module pieces that could differ."""
        pieces: Sequence[ConnectorV2] = self.to_module.connectors
        return pieces

    def _items_of(self, batch: Any, episode: Any) -> Any:
        """What is in a batch of `episode`."""
        return batch


def _each(rows: NDArray[Any], packing: Packing | None) -> list[Any]:
    """(n, *row) as they travel -> n observations or actions."""
    if packing is None:
        return [row.copy() for row in rows]  # a piece may work in place
    unpacked = packing.arrays(rows)
    return [packing.structure([array[i] for array in unpacked]) for i in range(len(rows))]


def _packed(values: Any, count: int, packing: Packing | None) -> NDArray[Any]:
    """Actions as they travel, of `count` rows: a list of one for each, or a batch of them."""
    if packing is None:
        return _stacked(values, count)
    if isinstance(values, list):
        values = tree.map_structure(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *values)
    return packing.join(values, count)


def _stacked(values: Any, count: int) -> NDArray[Any]:
    """A column of `count` rows out of what a pipeline made: a list of rows, or an array of them."""
    array: NDArray[Any] = np.stack([np.asarray(v) for v in values]) if isinstance(values, list) else np.asarray(values)
    if len(array) != count:
        raise PolicyError(f"the module-to-env pieces make {len(array)} rows of {count} observations")
    return np.ascontiguousarray(array)


def copied(moments: Sequence[Moment]) -> list[Moment]:
    """To be shown to pieces, which may work in place."""
    return copy.deepcopy(list(moments))


__all__ = ["Moment", "NeedsEpisode", "Pipelines", "RefusedPiece"]
