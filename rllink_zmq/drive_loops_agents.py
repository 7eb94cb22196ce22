"""Loops for environments of several agents: RLlib's `MultiAgentEnv`, PettingZoo's `ParallelEnv` and `AECEnv`.

They are told apart by what they have, and nothing of RLlib or PettingZoo is imported. Agents of an AEC environment act
in turn: one env step is one agent's action.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from importlib import import_module
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, cast

import gymnasium as gym

from rllink_zmq.client_agents import AgentsClient, AgentsEpisode, AgentsFlow
from rllink_zmq.client_flow import WAIT_SLICE, Waiting, listen
from rllink_zmq.drive_loops import TURN_SECONDS, Idle, Stop, Summary, Tally
from rllink_zmq.errors import RemovedError, SettingsError
from rllink_zmq.fragments_agents import ALL
from rllink_zmq.messages import AgentId

log = logging.getLogger("rllink_zmq")

Spaces: TypeAlias = Mapping[AgentId, gym.Space[Any]]


class Outcome(NamedTuple):
    """What an env step brought, by agent."""

    observations: Mapping[AgentId, Any]
    rewards: Mapping[AgentId, float]
    terminateds: Mapping[AgentId, bool]
    truncateds: Mapping[AgentId, bool]

    @property
    def over(self) -> bool:
        """For all agents."""
        return bool(self.terminateds.get(ALL) or self.truncateds.get(ALL))


class Agents(Protocol):
    """An environment of several agents. Spaces are of all that there may be, by agent."""

    observation_spaces: Spaces
    action_spaces: Spaces

    def reset(self, seed: int | None) -> Mapping[AgentId, Any]:
        """A new episode; the first observations."""

    def step(self, actions: Mapping[AgentId, Any]) -> Outcome:
        """One env step."""

    def close(self) -> None:
        """Nothing more is wanted of it."""


def agents_env(env: Any) -> Agents:
    """`env` in these ways. Raises SettingsError for what is none of the three."""
    if hasattr(env, "agent_iter") and hasattr(env, "last"):
        return _InTurn(env)
    names = list(getattr(env, "possible_agents", None) or [])
    if not names:
        raise SettingsError(
            f"expected an environment of several agents (RLlib's MultiAgentEnv, PettingZoo's ParallelEnv or AECEnv) "
            f"with possible_agents, got {type(env).__name__}"
        )
    return _Together(env, names)


def find_agents_env(name: str) -> Callable[[], Any] | None:
    """What makes the environment of several agents that a command line names: `pettingzoo:classic/rps_v2`, or a
    function or class, `module:name`. None for a name that is Gymnasium's. Raises SettingsError, with what is missing.
    """
    module, _, what = name.rpartition(":")
    if not module:
        return None
    if module == "pettingzoo":
        module, what = f"pettingzoo.{what.replace('/', '.')}", ""
    elif not what.isidentifier():
        return None
    try:
        found = import_module(module)
    except ImportError as e:
        raise SettingsError(f"--env {name}: the module can't be imported ({e})") from e
    if not what:
        make = getattr(found, "parallel_env", None) or getattr(found, "env", None)
        if make is None:
            raise SettingsError(f"--env {name}: {module} has no parallel_env and no env")
        return cast(Callable[[], Any], make)
    made = getattr(found, what, None)
    return cast(Callable[[], Any], made) if callable(made) else None


class _Together:
    """RLlib's, or a ParallelEnv: `step` takes a dict, and returns five."""

    def __init__(self, env: Any, names: list[AgentId]) -> None:
        self._env = env
        if hasattr(env, "get_observation_space"):
            observation, action = env.get_observation_space, env.get_action_space
        else:
            observation, action = env.observation_space, env.action_space
        self._rllib = hasattr(env, "get_observation_space")
        self.observation_spaces: Spaces = {name: observation(name) for name in names}
        self.action_spaces: Spaces = {name: action(name) for name in names}

    def reset(self, seed: int | None) -> Mapping[AgentId, Any]:
        observations, _ = self._env.reset(seed=seed)
        return dict(observations)

    def step(self, actions: Mapping[AgentId, Any]) -> Outcome:
        observations, rewards, terminateds, truncateds, _ = self._env.step(dict(actions))
        if not self._rllib and not self._env.agents:
            # PettingZoo says that an episode is over by having no agents left.
            cut_short = bool(truncateds) and not any(terminateds.values())
            truncateds = {**truncateds, ALL: cut_short}
            terminateds = {**terminateds, ALL: not cut_short}
        return Outcome(observations, rewards, terminateds, truncateds)

    def close(self) -> None:
        self._env.close()


class _InTurn:
    """An AECEnv. An agent's observation is the one that it is to act on; its reward what it was given since it acted
    last. An agent that has ended gets its last observation when its turn comes, and steps with None."""

    def __init__(self, env: Any) -> None:
        self._env = env
        names = list(env.possible_agents)
        self.observation_spaces: Spaces = {name: env.observation_space(name) for name in names}
        self.action_spaces: Spaces = {name: env.action_space(name) for name in names}

    def reset(self, seed: int | None) -> Mapping[AgentId, Any]:
        self._env.reset(seed=seed)
        return self._next({}, {}, {}).observations

    def step(self, actions: Mapping[AgentId, Any]) -> Outcome:
        ((_, action),) = actions.items() or (("", None),)
        self._env.step(action)
        return self._next({}, {}, {})

    def _next(
        self, rewards: dict[AgentId, float], terminateds: dict[AgentId, bool], truncateds: dict[AgentId, bool]
    ) -> Outcome:
        """Whose turn it is now, past those that have ended."""
        env = self._env
        observations: dict[AgentId, Any] = {}
        while env.agents:
            name = env.agent_selection
            observation, reward, terminated, truncated, _ = env.last()
            observations[name] = observation
            rewards[name] = float(reward)
            if not (terminated or truncated):
                return Outcome(observations, rewards, terminateds, truncateds)
            (terminateds if terminated else truncateds)[name] = True
            env.step(None)
        cut_short = bool(truncateds) and not terminateds
        return Outcome(observations, rewards, {**terminateds, ALL: not cut_short}, {**truncateds, ALL: cut_short})

    def close(self) -> None:
        self._env.close()


def drive_agents(
    client: AgentsClient,
    env: Any,
    *,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    training_enabled: bool | None = None,
    tally: Tally | None = None,
) -> Summary:
    """Run `env` (RLlib's `MultiAgentEnv`, PettingZoo's `ParallelEnv` or `AECEnv`) with the client's policies for so
    many `episodes`, or env `steps`, or until `stop()`; for ever with none. Returns count all agents' rewards.

    `seed`: of the first reset. An episode that is cut off by `steps` is ended as truncated where every agent has an
    observation to end with, and is abandoned otherwise; so is one in which an agent's policy is removed.
    `training_enabled`: as of `drive`. Raises what `AgentsEpisode.get_action` does, and SettingsError for another
    environment."""
    return drive_agents_many(
        [(client, env)], episodes=episodes, steps=steps, seed=seed, stop=stop, training_enabled=training_enabled,
        tally=tally,
    )  # fmt: skip


def drive_agents_many(
    pairs: Iterable[tuple[AgentsClient, Any]],
    *,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    training_enabled: bool | None = None,
    tally: Tally | None = None,
) -> Summary:
    """`drive_agents` for many clients with an environment each, in turn, in this thread. `episodes` and `steps` are for
    each of them; the i-th environment's first reset has `seed` + i."""
    count = tally or Tally()
    pairs = list(pairs)
    loops = {
        i: _Seat(client, env, count, episodes, steps, None if seed is None else seed + i, training_enabled).run()
        for i, (client, env) in enumerate(pairs)
    }
    waiting: Waiting | None = None
    try:
        while loops and not (stop is not None and stop()):
            waits = {i: next(loop, None) for i, loop in loops.items()}
            loops = {i: loop for i, loop in loops.items() if waits[i] is not None}
            if not loops or any(waits[i] == "goes on" for i in loops):
                waiting = None
                continue
            now = time.monotonic()
            busy = [pairs[i][0].flow for i in loops if waits[i] == "waits"]
            waiting = (waiting or Waiting(now)) if busy else None
            if waiting is not None:
                waiting.say(lambda flow=busy[0]: _why(flow), now)  # type: ignore[misc]
            listen([pairs[i][0].flow for i in loops], WAIT_SLICE)
    finally:
        for loop in loops.values():
            loop.close()
    return count.summary()


Waits: TypeAlias = Literal["goes on", "waits", "idle"]
"""Of a loop that gives others their turn; idle: it waits for the next evaluation."""


class _Seat:
    """One client and its environment."""

    def __init__(
        self,
        client: AgentsClient,
        env: Any,
        tally: Tally,
        episodes: int | None,
        steps: int | None,
        seed: int | None,
        training_enabled: bool | None,
    ) -> None:
        self._client = client
        self._agents: Agents = env if isinstance(env, _Together | _InTurn) else agents_env(env)
        self._tally = tally
        self._episodes_left = float("inf") if episodes is None else episodes
        self._steps_left = float("inf") if steps is None else steps
        self._seed = seed
        self._training_enabled = training_enabled
        self._idle = Idle(client)
        self._until = 0.0

    def run(self) -> Generator[Waits, None, None]:
        """All episodes. Yields when it has to wait, or has had its turn."""
        client = self._client
        self._until = time.monotonic() + TURN_SECONDS
        while self._episodes_left > 0 and self._steps_left > 0:
            while self._training_enabled is False and self._idle.waits():
                client.flow.look_if_due()
                yield from self._pause("idle")
            while client.flow.remote is None and not client.ready:
                yield from self._pause("waits")
            self._idle.begins()
            episode = client.start_episode(training_enabled=self._training_enabled)
            first = Outcome(self._agents.reset(self._seed), {}, {}, {})
            self._seed = None
            try:
                with episode:
                    yield from self._play(episode, first)
            except RemovedError as e:
                log.warning("%s", e)

    def _play(self, episode: AgentsEpisode, outcome: Outcome) -> Generator[Waits, None, None]:
        """One episode, to its end, or until it is to be left as it is."""
        client, tally = self._client, self._tally
        while not self._worthless(episode):
            while not episode.can_act(*_turn(outcome)):
                if self._worthless(episode) or self._may_serve(episode):
                    return
                yield from self._pause("waits")
            if client.flow.remote is None:
                actions = episode.get_action(*_turn(outcome))
            else:
                asked = episode.get_action_async(*_turn(outcome))
                while not asked.done():
                    if self._worthless(episode):
                        return
                    yield from self._pause("waits")
                actions = asked.result()
            outcome = self._agents.step(actions)
            episode.log_returns(outcome.rewards)
            tally.steps += 1
            self._steps_left -= 1
            if outcome.over or episode.all_ended(*_turn(outcome)):
                ending = episode.ending(*_turn(outcome))
                while not ending.done():
                    yield from self._pause("waits")
                ending.result()
                tally.ended(episode.episode_return)
                self._episodes_left -= 1
                if self._episodes_left <= 0:
                    client.flow.look()  # nobody calls it any more: what is queued leaves now
                return
            if self._steps_left <= 0:
                if episode.training_enabled and episode.waiting <= outcome.observations.keys():
                    ending = episode.ending(
                        outcome.observations, outcome.terminateds, {**outcome.truncateds, ALL: True}
                    )
                    while not ending.done():
                        yield from self._pause("waits")
                    ending.result()
                return
            if time.monotonic() >= self._until:
                yield from self._pause("goes on")

    def _pause(self, state: Waits) -> Generator[Waits, None, None]:
        yield state
        self._until = time.monotonic() + TURN_SECONDS

    def _worthless(self, episode: AgentsEpisode) -> bool:
        return self._training_enabled is False and self._idle.worthless([episode])

    def _may_serve(self, episode: AgentsEpisode) -> bool:
        """Whether it is to evaluate, and can't go on with what it does: training stands still meanwhile."""
        trains = self._training_enabled is None and episode.training_enabled
        unsent = episode.builder.follows and episode.builder.steps
        return trains and self._client.evaluates and self._client.flow.credit <= 0 and not unsent


def _why(flow: AgentsFlow) -> str:
    """What it waits for."""
    remote = flow.remote
    return remote.why() if remote is not None and remote.session.open_acts else flow.why("acted")


def _turn(outcome: Outcome) -> tuple[Any, Any, Any]:
    return outcome.observations, outcome.terminateds, outcome.truncateds
