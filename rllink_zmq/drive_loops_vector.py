"""Loops for vectors of Gymnasium environments: one (`drive_vector`), many clients a thread (`drive_vectors`).

As those of `drive_loops` they never block on a client.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from rllink_zmq.client import Client, Episode
from rllink_zmq.client_flow import WAIT_SLICE, Waiting, listen
from rllink_zmq.client_followed import Ending
from rllink_zmq.client_remote import PendingActions
from rllink_zmq.drive_loops import Idle, Stop, Summary, Tally
from rllink_zmq.errors import RemovedError, SettingsError, VectorError

log = logging.getLogger("rllink_zmq")


def drive_vector(
    client: Client,
    envs: gym.vector.VectorEnv[Any, Any, Any],
    *,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    tally: Tally | None = None,
    training_enabled: bool = True,
) -> Summary:
    """Run a vector of environments, with one forward pass of the policy for all. `episodes` and `steps` are totals.
    `tally`: counts that a caller wants to watch. What can't be done in columns (`Client.vector`: a policy that stacks
    frames, evaluation) is done with an episode for each environment.
    All of its episodes are trained on, or with `training_enabled=False` none: they are for evaluations, as in `drive`,
    and where they are left the environments are all reset.

    Every `autoreset_mode` of Gymnasium is understood. The client must have been connected for as many `episodes` as
    there are environments. Raises SettingsError otherwise, and what `Client.get_actions` does.
    """
    return drive_vectors(
        [(client, envs)], episodes=episodes, steps=steps, seed=seed, stop=stop, tally=tally,
        training_enabled=training_enabled,
    )  # fmt: skip


def drive_vectors(
    seats: Iterable[tuple[Client, gym.vector.VectorEnv[Any, Any, Any]]],
    *,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    tally: Tally | None = None,
    training_enabled: bool = True,
) -> Summary:
    """`drive_vector` for several clients with a vector each, in turn, in this thread. `episodes` and `steps` are for
    each of them; the i-th vector's first reset has `seed` + i times its length."""
    count = tally or Tally()
    lanes: list[_Lane] = []
    waiting: Waiting | None = None
    try:
        for client, envs in seats:
            first = None if seed is None else seed + sum(lane.width for lane in lanes)
            lanes.append(_Lane(client, envs, first, training_enabled, episodes, steps))
        active = [lane for lane in lanes if not lane.done]
        while active and not (stop is not None and stop()):
            moved = [lane for lane in active if lane.turn(count)]
            active = [lane for lane in active if not lane.done]
            if moved or not active:
                waiting = None
                continue
            now = time.monotonic()
            busy = [lane for lane in active if not lane.idle]
            waiting = (waiting or Waiting(now)) if busy else None
            if waiting is not None:
                waiting.say(busy[0].why, now)
            listen([lane.flow for lane in active], WAIT_SLICE)
        for lane in lanes:
            lane.cut_off(count, stopped=True)
    finally:
        for lane in lanes:
            lane.leave()
    return count.summary()


class _Lane:
    """One client and its vector of environments, done in columns if the policy allows it. `idle`: it waits for the next
    evaluation, and for nothing else."""

    def __init__(
        self,
        client: Client,
        envs: gym.vector.VectorEnv[Any, Any, Any],
        seed: int | None,
        training_enabled: bool,
        episodes: int | None,
        steps: int | None,
    ) -> None:
        self.flow = client.flow
        self.width = envs.num_envs
        self._client = client
        self._envs = envs
        self._mode = _mode(client, envs)
        self._seed = seed
        self._training_enabled = training_enabled
        self._episodes_left = math.inf if episodes is None else episodes
        self._steps_left = math.inf if steps is None else steps
        self._vector: _Columns | _Vector = (
            _Columns(client, envs, self._mode, seed) if training_enabled else self._of_episodes()
        )

    def _of_episodes(self) -> _Vector:
        seed, self._seed = self._seed, None
        return _Vector(self._client, self._envs, self._mode, seed, self._training_enabled)

    @property
    def done(self) -> bool:
        return self._episodes_left <= 0 or self._steps_left <= 0

    @property
    def idle(self) -> bool:
        return self._vector.idle

    def why(self) -> str:
        """What it waits for."""
        return self._vector.why()

    def turn(self, tally: Tally) -> bool:
        """One step of all environments, unless it would have to wait."""
        episodes, steps = tally.episodes, tally.steps
        try:
            moved = self._vector.ready()
            if moved:
                self._vector.step(tally)
        except (VectorError, RemovedError) as e:
            if isinstance(e, RemovedError):
                log.warning("%s", e)
            self._vector.leave()
            self._vector = self._of_episodes()
            moved = True
        self._episodes_left -= tally.episodes - episodes
        self._steps_left -= tally.steps - steps
        if self.done:
            self.cut_off(tally)
            self.flow.look()  # nobody calls it any more: what is queued leaves now
        return moved

    def cut_off(self, tally: Tally, *, stopped: bool = False) -> None:
        """End all episodes where they are."""
        self._vector.cut_off(tally, stopped=stopped)

    def leave(self) -> None:
        self._vector.leave()


def _mode(client: Client, envs: gym.vector.VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """When environments reset themselves. Raises SettingsError if that isn't known, or they are too many."""
    mode = envs.metadata.get("autoreset_mode")
    if not isinstance(mode, AutoresetMode):
        raise SettingsError(
            f"expected a vector environment whose metadata['autoreset_mode'] is one of Gymnasium's, got {mode!r}"
        )
    if client.flow.session.episodes < envs.num_envs:
        raise SettingsError(
            f"{envs.num_envs} environments need as many episodes at once, the client was connected for "
            f"{client.flow.session.episodes}: connect(..., episodes={envs.num_envs})"
        )
    return mode


class _Columns:
    """Environments that are stepped by the client's vector form. `_resting`: those that reset themselves with the next
    step (`NEXT_STEP`)."""

    def __init__(
        self, client: Client, envs: gym.vector.VectorEnv[Any, Any, Any], mode: AutoresetMode, seed: int | None
    ) -> None:
        self._flow = client.flow
        self._envs = envs
        self._mode = mode
        self._observations = envs.reset(seed=seed)[0]
        self._resting = np.zeros(envs.num_envs, bool)
        self._vector = client.vector(envs.num_envs)
        self._asked: PendingActions | None = None

    idle = False

    def ready(self) -> bool:
        """Whether `step` will not wait; with the service: its answer is there."""
        vector = self._vector
        if self._asked is None:
            if not vector.can_act(self._observations, self._resting):
                return False
            if self._flow.remote is None:
                return True
            self._asked = vector.get_actions_async(self._observations, self._resting)
        return self._asked.done()

    def why(self) -> str:
        """What it waits for."""
        flow = self._flow
        return flow.remote.why() if flow.remote is not None and self._asked is not None else flow.why("acted")

    def step(self, tally: Tally) -> None:
        """One step of all environments."""
        asked, self._asked = self._asked, None
        vector, resting = self._vector, self._resting
        actions = vector.get_actions(self._observations, resting) if asked is None else asked.results()
        observations, rewards, terminated, truncated, infos = self._envs.step(actions)
        last = observations
        ended = (terminated | truncated) & ~resting
        tally.steps += len(resting) - int(np.count_nonzero(resting))
        if ended.any():
            if self._mode is AutoresetMode.SAME_STEP:
                last = _copied(observations)
                for i in np.flatnonzero(ended).tolist():
                    _put(last, i, _at(infos["final_obs"], i))
            tally.ended(*vector.log_step(rewards, terminated, truncated, last).tolist())
            if self._mode is AutoresetMode.DISABLED:
                observations = self._envs.reset(options={"reset_mask": ended})[0]
        else:
            vector.log_step(rewards, terminated, truncated, last)
        if self._mode is AutoresetMode.NEXT_STEP:
            self._resting = ended
        self._observations = observations

    def cut_off(self, tally: Tally, *, stopped: bool = False) -> None:
        """End all episodes where they are."""
        self._asked = None
        if self._vector.open:
            self._vector.end(self._observations)
            self._vector.abandon()

    def leave(self) -> None:
        self._vector.abandon()


class _Vector:
    """An episode for each environment. `_episodes[i]` is None while environment i waits for its reset to be stepped
    over (`NEXT_STEP`)."""

    def __init__(
        self,
        client: Client,
        envs: gym.vector.VectorEnv[Any, Any, Any],
        mode: AutoresetMode,
        seed: int | None,
        training_enabled: bool,
    ) -> None:
        self._client = client
        self._envs = envs
        self._training_enabled = training_enabled
        self._mode = mode
        self._observations = self._each(envs.reset(seed=seed)[0])
        space = envs.single_action_space
        self._actions = _blank_actions(space, envs.num_envs)
        self._episodes: list[Episode | None] = [self._start() for _ in range(envs.num_envs)]
        self._asked: PendingActions | None = None
        self._endings: list[tuple[Episode, Ending]] = []
        self._to_start: list[int] = []
        self._tally = Tally()
        self._idle = Idle(client)
        self.idle = False
        if not training_enabled:
            self._idle.begins()

    def _each(self, observations: Any) -> Any:
        """One observation for each environment. Of a Dict or Tuple Gymnasium gives a structure of arrays."""
        if isinstance(self._envs.single_observation_space, gym.spaces.Dict | gym.spaces.Tuple):
            return list(gym.vector.utils.iterate(self._envs.observation_space, observations))
        return observations

    def _start(self) -> Episode:
        return self._client.start_episode(training_enabled=self._training_enabled)

    def _acting(self) -> tuple[list[int], list[Episode]]:
        acting = [(i, episode) for i, episode in enumerate(self._episodes) if episode is not None]
        return [i for i, _ in acting], [episode for _, episode in acting]

    def ready(self) -> bool:
        """Whether there is room for a step of all, and something to do."""
        if self._endings:
            self._end_those(self._tally)
            self._begin_those()
            if self._endings:
                return False
        self.idle = not self._training_enabled and self._rests()
        return not self.idle and self._ready(*self._acting())

    def _rests(self) -> bool:
        """Whether there is nothing to do until the next evaluation. When that comes all begin anew."""
        self._client.flow.look_if_due()
        episodes = self._acting()[1]
        if not self._idle.worthless(episodes):
            return False
        if self._idle.waits():
            return True
        if self._asked is not None:
            self._asked.forget()
            self._asked = None
        self.leave()
        self._observations = self._each(self._envs.reset()[0])
        self._episodes = [self._start() for _ in self._episodes]
        self._idle.begins()
        return False

    def why(self) -> str:
        """What it waits for."""
        flow = self._client.flow
        waits = self._asked is not None or self._endings
        return flow.remote.why() if flow.remote is not None and waits else flow.why("acted")

    def _ready(self, at: list[int], episodes: list[Episode]) -> bool:
        """Whether `step` will not wait; with the service: its answer is there."""
        if not episodes:
            return True
        if self._asked is None:
            observations = [self._observations[i] for i in at]
            if not self._client.can_act(episodes, observations):
                return False
            if self._client.flow.remote is None:
                return True
            self._asked = self._client.get_actions_async(episodes, observations)
        return self._asked.done()

    def step(self, tally: Tally) -> None:
        """One step of all environments."""
        self._tally = tally
        at, episodes = self._acting()
        if episodes and self._asked is not None:
            asked, self._asked = self._asked, None
            _put(self._actions, at, asked.results())
        elif episodes:
            _put(self._actions, at, self._client.get_actions(episodes, [self._observations[i] for i in at]))
        batch, rewards, terminated, truncated, infos = self._envs.step(self._actions)
        observations = self._each(batch)
        tally.steps += len(at)
        ended = np.zeros(len(self._episodes), bool)
        for i, episode in zip(at, episodes, strict=True):
            episode.log_returns(float(rewards[i]))
            if terminated[i] or truncated[i]:
                last = _at(infos["final_obs"], i) if self._mode is AutoresetMode.SAME_STEP else observations[i]
                self._endings.append((episode, episode.ending(last, truncated=not terminated[i])))
                ended[i] = True
        self._end_those(tally)
        if self._mode is AutoresetMode.DISABLED and ended.any():
            observations = self._each(self._envs.reset(options={"reset_mask": ended})[0])
        later = self._mode is AutoresetMode.NEXT_STEP
        for i, before in enumerate(self._episodes):
            if ended[i]:
                self._episodes[i] = None
            if before is None or (ended[i] and not later):
                self._to_start.append(i)
        self._observations = observations
        self._begin_those()

    def _begin_those(self) -> None:
        """Where others are still ending these have to wait: a client has so many episodes and no more."""
        if not self._endings:
            for i in self._to_start:
                self._episodes[i] = self._start()
            self._to_start = []

    def _end_those(self, tally: Tally, *, wait: bool = False) -> None:
        """Count the episodes that have ended: where a runner follows them, when it has said what it saw at the end."""
        waiting = []
        for episode, ending in self._endings:
            if not (wait or ending.done()):
                waiting.append((episode, ending))
                continue
            try:
                ending.result()
            except RemovedError as e:
                log.warning("%s", e)
            else:
                tally.ended(episode.episode_return)
        self._endings = waiting

    def cut_off(self, tally: Tally, *, stopped: bool = False) -> None:
        """End all episodes where they are. What a runner follows is left as it is where the loop was `stopped`: that
        runner may be gone, too."""
        if self._asked is not None:
            self._asked.forget()
            self._asked = None
        if not stopped:
            self._end_those(tally, wait=True)
        cut = []
        for i, episode in enumerate(self._episodes):
            if episode is None or not (episode.open and episode.steps and self._training_enabled):
                continue
            if not (stopped and episode.builder.follows):
                cut.append(episode.ending(self._observations[i], truncated=True))
        for ending in cut:  # all of them have been asked about
            try:
                ending.result()
            except RemovedError as e:
                log.warning("%s", e)
        self._client.flow.connection.flush()
        self.leave()

    def leave(self) -> None:
        for _, ending in self._endings:
            ending.give_up()
        self._endings, self._to_start = [], []
        for episode in self._episodes:
            if episode is not None:
                episode.abandon()


def _blank_actions(space: gym.Space[Any], count: int) -> Any:
    """Room for the actions of `count` environments: dicts and tuples of arrays, as Gymnasium's vectors take them."""
    if isinstance(space, gym.spaces.Dict):
        return {key: _blank_actions(inner, count) for key, inner in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(_blank_actions(inner, count) for inner in space.spaces)
    return np.zeros((count, *(space.shape or ())), space.dtype)


def _copied(batch: Any) -> Any:
    """A batch as NumPy's arrays, which may be written."""
    if isinstance(batch, dict):
        return {key: _copied(inner) for key, inner in batch.items()}
    return tuple(map(_copied, batch)) if isinstance(batch, tuple) else np.array(batch)


def _put(batch: Any, at: Sequence[int] | int, some: Any) -> None:
    """Write the rows of some environments, or one's, into an array, or dicts and tuples of them."""
    if isinstance(batch, dict | tuple):
        for key in batch if isinstance(batch, dict) else range(len(batch)):
            _put(batch[key], at, some[key])
    else:
        batch[at] = some


def _at(observations: Any, i: int) -> Any:
    """Environment i's. Of a Dict Gymnasium's infos have a dict of arrays."""
    if isinstance(observations, dict):
        return {key: _at(inner, i) for key, inner in observations.items() if not key.startswith("_")}
    return observations[i]
