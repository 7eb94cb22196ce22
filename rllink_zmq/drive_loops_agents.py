"""Loops for environments of several agents: RLlib's `MultiAgentEnv`, PettingZoo's `ParallelEnv` and `AECEnv`.

They are told apart by what they have, and nothing of RLlib or PettingZoo is imported. Agents of an AEC environment act
in turn: one env step is one agent's action.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from importlib import import_module
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import gymnasium as gym

from rllink_zmq.client_agents import AgentsClient, AgentsFlow
from rllink_zmq.client_flow import WAIT_SLICE, Waiting, listen
from rllink_zmq.drive_loops import TURN_SECONDS, Stop, Summary, Tally
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
    training_enabled: bool = True,
    tally: Tally | None = None,
) -> Summary:
    """Run `env` (RLlib's `MultiAgentEnv`, PettingZoo's `ParallelEnv` or `AECEnv`) with the client's policies for so
    many `episodes`, or env `steps`, or until `stop()`; for ever with none. Returns count all agents' rewards.

    `seed`: of the first reset. An episode that is cut off by `steps` is ended as truncated where every agent has an
    observation to end with, and is abandoned otherwise; so is one in which an agent's policy is removed. Raises what
    `AgentsEpisode.get_action` does, and SettingsError for another environment."""
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
    training_enabled: bool = True,
    tally: Tally | None = None,
) -> Summary:
    """`drive_agents` for many clients with an environment each, in turn, in this thread. `episodes` and `steps` are for
    each of them; the i-th environment's first reset has `seed` + i."""
    count = tally or Tally()
    pairs = list(pairs)
    loops = {
        i: _seat(client, env, count, episodes, steps, None if seed is None else seed + i, training_enabled)
        for i, (client, env) in enumerate(pairs)
    }
    waiting: Waiting | None = None
    try:
        while loops and not (stop is not None and stop()):
            waits = {i: next(loop, None) for i, loop in loops.items()}
            loops = {i: loop for i, loop in loops.items() if waits[i] is not None}
            if not loops or not all(waits[i] for i in loops):
                waiting = None
                continue
            now = time.monotonic()
            waiting = waiting or Waiting(now)
            flows = [pairs[i][0].flow for i in loops]
            waiting.say(lambda flow=flows[0]: _why(flow), now)  # type: ignore[misc]
            listen(flows, WAIT_SLICE)
    finally:
        for loop in loops.values():
            loop.close()
    return count.summary()


def _seat(
    client: AgentsClient,
    env: Any,
    count: Tally,
    episodes: int | None,
    steps: int | None,
    seed: int | None,
    training_enabled: bool,
) -> Generator[bool, None, None]:
    """One client's loop. Yields whether it has to wait; else it has only had its turn."""
    agents: Agents = env if isinstance(env, _Together | _InTurn) else agents_env(env)
    left = [float("inf") if n is None else n for n in (episodes, steps)]
    until = time.monotonic() + TURN_SECONDS
    while left[0] > 0 and left[1] > 0:
        episode = client.start_episode(training_enabled=training_enabled)
        outcome = Outcome(agents.reset(seed), {}, {}, {})
        seed = None
        try:
            with episode:
                while True:
                    while not episode.can_act(*_turn(outcome)):
                        yield True
                        until = time.monotonic() + TURN_SECONDS
                    if client.flow.remote is None:
                        actions = episode.get_action(*_turn(outcome))
                    else:
                        asked = episode.get_action_async(*_turn(outcome))
                        while not asked.done():
                            yield True
                            until = time.monotonic() + TURN_SECONDS
                        actions = asked.result()
                    outcome = agents.step(actions)
                    episode.log_returns(outcome.rewards)
                    count.steps += 1
                    left[1] -= 1
                    if outcome.over or episode.all_ended(*_turn(outcome)):
                        episode.finish(*_turn(outcome))
                        count.ended(episode.episode_return)
                        left[0] -= 1
                        if left[0] <= 0:
                            client.flow.look()  # nobody calls it any more: what is queued leaves now
                        break
                    if left[1] <= 0:
                        if episode.waiting <= outcome.observations.keys():
                            episode.finish(outcome.observations, outcome.terminateds, {**outcome.truncateds, ALL: True})
                        return
                    if time.monotonic() >= until:
                        yield False
                        until = time.monotonic() + TURN_SECONDS
        except RemovedError as e:
            log.warning("%s", e)


def _why(flow: AgentsFlow) -> str:
    """What it waits for."""
    remote = flow.remote
    return remote.why() if remote is not None and remote.session.open_acts else flow.why("acted")


def _turn(outcome: Outcome) -> tuple[Any, Any, Any]:
    return outcome.observations, outcome.terminateds, outcome.truncateds
