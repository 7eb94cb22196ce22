"""Loops for Gymnasium environments: one (`drive`), many clients a thread (`drive_many`).

None of them blocks on a client: one that has to wait doesn't stop the others, and `stop` is looked at meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import gymnasium as gym
import numpy as np

from rllink_zmq.client import Client, Episode, HasFlow
from rllink_zmq.client_flow import WAIT_SLICE, Waiting, listen
from rllink_zmq.client_followed import Ending
from rllink_zmq.client_policy import PolicyReader
from rllink_zmq.client_remote import PendingAction
from rllink_zmq.errors import RemovedError
from rllink_zmq.fragments import FragmentBuilder, Origin

log = logging.getLogger("rllink_zmq")

TURN_STEPS, TURN_SECONDS = 16, 0.005
"""What one client takes before the next has its turn, and `stop` is looked at."""
WAKE_INTERVAL = 0.002
"""Seconds between two looks at the clients that have to wait while others go on."""
LOOK_ANYWAY = 0.2
"""Seconds after which a waiting client's socket is looked at though nothing has come: that a broker was restarted shows
only while the connection is gone."""
LAST_RETURNS = 100


class Summary(NamedTuple):
    """`episodes`: that ended by themselves, `episode_return_mean`: of the last 100 of them (None before the first).
    `steps`: of all. `wall_s`: seconds."""

    episodes: int
    steps: int
    episode_return_mean: float | None
    wall_s: float


class Tally:
    """Counts while a loop runs."""

    def __init__(self) -> None:
        self.episodes = 0
        self.steps = 0
        self.returns: deque[float] = deque(maxlen=LAST_RETURNS)
        self._started = time.monotonic()

    def ended(self, *returns: float) -> None:
        """Episodes have ended by themselves, with these returns."""
        self.episodes += len(returns)
        self.returns.extend(returns)

    def summary(self) -> Summary:
        """As of now."""
        mean = float(np.mean(self.returns)) if self.returns else None
        return Summary(self.episodes, self.steps, mean, time.monotonic() - self._started)


Stop = Callable[[], bool]


def drive(
    client: Client,
    env: gym.Env[Any, Any],
    *,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    training_enabled: bool | None = None,
) -> Summary:
    """Run `env` with the client's policy for so many `episodes`, or `steps`, or until `stop()`; for ever with none.

    `seed`: of the first reset. An episode that is cut off by `steps` or `stop` is ended as truncated, or abandoned if
    it isn't trained on. Raises what `Episode.get_action` does. `training_enabled`: as of `Client.start_episode`. With
    False the loop is there for evaluations: once a run has had one it waits for the next, and leaves an episode that
    counts in none. Until then, and where there are none, it shows what the policy does.
    """
    return drive_many(
        [(client, env)], episodes=episodes, steps=steps, seed=seed, stop=stop, training_enabled=training_enabled
    )


def drive_many(
    seats: Iterable[tuple[Client, gym.Env[Any, Any]]],
    *,
    episodes: int | None = None,
    steps: int | None = None,
    seed: int | None = None,
    stop: Stop | None = None,
    tally: Tally | None = None,
    training_enabled: bool | None = None,
) -> Summary:
    """`drive` for many clients with an environment each, in turn, in this thread. `episodes` and `steps` are for each
    of them; the i-th environment's first reset has `seed` + i. `tally`: counts that a caller wants to watch.

    A training episode that waits for room while the trainer evaluates and wants this client for it is left as it is:
    all of its steps have been sent, and only its end is missing."""
    count = tally or Tally()
    all_seats = [
        _Seat(client, env, count, episodes, steps, None if seed is None else seed + i, training_enabled)
        for i, (client, env) in enumerate(seats)
    ]
    active = [seat for seat in all_seats if not seat.done]
    waiting: Waiting | None = None
    wake_at = 0.0
    try:
        while active and not (stop is not None and stop()):
            for seat in active:
                if not seat.blocked:
                    seat.turn()
            active = [seat for seat in active if not seat.done]
            blocked = [seat for seat in active if seat.blocked]
            now = time.monotonic()
            if len(blocked) < len(active):
                waiting = None
                if blocked and now >= wake_at:
                    wake_at = now + WAKE_INTERVAL
                    _wake(blocked, 0.0)
            elif active:
                busy = [seat for seat in active if not seat.idle]
                waiting = (waiting or Waiting(now)) if busy else None
                if waiting is not None:
                    waiting.say(_why(busy), now)
                _wake(blocked, WAIT_SLICE)
        for seat in active:
            seat.cut_off(stopped=True)
    finally:
        for seat in all_seats:
            seat.leave()
    return count.summary()


def _wake(blocked: Sequence[_Seat], timeout: float) -> None:
    """Sleep until something comes for one of these, at most `timeout` seconds, and let those try again for which it
    may have changed something: with hundreds of them, asking all costs more than a step."""
    ready = set(map(id, listen([seat.client.flow for seat in blocked], timeout)))
    now = time.monotonic()
    asked: set[PolicyReader] = set()
    for seat in blocked:
        flow = seat.client.flow
        reader = flow.reader
        alone = flow.remote is None
        # One of them reads the news for all.
        no_policy = alone and (reader.origin is None or flow.rests) and reader not in asked
        if no_policy:
            asked.add(reader)
        if (
            no_policy
            or any(id(connection) in ready for connection in flow.connections)
            or reader.origin is not seat.origin
            or flow.session.next_deadline() <= now
            or seat.due <= now
        ):
            seat.blocked = False
        elif now >= flow.look_at + LOOK_ANYWAY:
            flow.look()
            seat.blocked = False  # the look may have read what it waits for


def _why(seats: Sequence[_Seat]) -> Callable[[], str]:
    others = f" ({len(seats)} simulators)" if len(seats) > 1 else ""
    return lambda: seats[0].why() + others


class _Seat:
    """One client and its environment. `blocked`: it had to wait; `origin`: the weights there were then."""

    def __init__(
        self,
        client: Client,
        env: gym.Env[Any, Any],
        tally: Tally,
        episodes: int | None,
        steps: int | None,
        seed: int | None,
        training_enabled: bool | None,
    ) -> None:
        self.client = client
        self._training_enabled = training_enabled
        self.blocked = False
        self.origin: Origin | None = None
        self._env = env
        self._tally = tally
        self._episodes_left = float("inf") if episodes is None else episodes
        self._steps_left = float("inf") if steps is None else steps
        self._seed = seed
        self._episode: Episode | None = None
        self._observation: Any = None
        self._asked: PendingAction | None = None
        self._ending: Ending | None = None
        self._counts = True  # an episode that ends by itself does
        self._idle = Idle(client)

    @property
    def idle(self) -> bool:
        """It waits for the next evaluation, and for nothing else."""
        return self._episode is None and self._training_enabled is False and self._idle.waits()

    @property
    def due(self) -> float:
        """When to try again though nothing has come: a request that is to be sent again, or an evaluation to begin."""
        if self._asked is not None or self._ending is not None:
            pending = self._asked or self._ending
            assert pending is not None
            return pending.due
        flow, episode = self.client.flow, self._episode
        begins = episode is not None and not episode.steps and episode.builder.evaluation is not None
        return flow.evaluation_due if begins and flow.remote is not None else float("inf")

    def why(self) -> str:
        """What it waits for."""
        flow = self.client.flow
        waits = self._asked is not None or self._ending is not None
        return flow.remote.why() if flow.remote is not None and waits else flow.why("acted")

    @property
    def done(self) -> bool:
        return self._episode is None and (self._episodes_left <= 0 or self._steps_left <= 0)

    def turn(self) -> None:
        """Take some steps, fewer where it would have to wait. An episode that can't go on is left."""
        try:
            self._turn()
        except RemovedError as e:
            log.warning("%s", e)
            self.leave()

    def _turn(self) -> None:
        if self._ending is not None:
            if not self._ending.done():
                return self._block()
            self._ended(self._ending)
            return None
        episode = self._episode
        if self._training_enabled is False:
            self.client.flow.look_if_due()
            if episode is not None and self._idle.worthless([episode]):
                self.leave()
                episode = None
        if episode is None:
            if self.idle or (self.client.flow.remote is None and not self.client.ready):
                return self._block()
            self._idle.begins()
            episode = self._episode = self.client.start_episode(training_enabled=self._training_enabled)
            self._observation, _ = self._env.reset(seed=self._seed)
            self._seed = None
        env, tally, observation = self._env, self._tally, self._observation
        until = time.monotonic() + TURN_SECONDS
        for _ in range(TURN_STEPS):
            self._observation = observation
            action = self._act(episode, observation)
            if action is None:
                return self._serve_instead() if self._may_serve() else self._block()
            observation, reward, terminated, truncated, _ = env.step(action)
            episode.log_returns(float(reward))
            tally.steps += 1
            self._steps_left -= 1
            if terminated or truncated:
                ending = episode.ending(observation, truncated=not terminated)
                if not ending.done():
                    self._ending = ending
                    return self._block()
                self._ended(ending)
                break
            if self._steps_left <= 0 or time.monotonic() >= until:
                break
        self._observation = observation
        if self._steps_left <= 0:
            self.cut_off()
        if self.done:
            self.client.flow.look()  # nobody calls it any more: what is queued leaves now
        return None

    def _ended(self, ending: Ending) -> None:
        self._ending, counts, self._counts = None, self._counts, True
        ending.result()
        assert self._episode is not None
        if counts:
            self._tally.ended(self._episode.episode_return)
            self._episodes_left -= 1
        self._episode = None
        if self.done:
            self.client.flow.look()  # nobody calls it any more: what is queued leaves now

    def _act(self, episode: Episode, observation: Any) -> Any:
        """The action, or None if it would have to be waited for."""
        asked = self._asked
        if asked is None:
            if not episode.can_act(observation):
                return None
            if self.client.flow.remote is None:
                return episode.get_action(observation)
            asked = self._asked = episode.get_action_async(observation)
        if not asked.done():
            return None
        self._asked = None
        return asked.result()

    def _may_serve(self) -> bool:
        """Whether it is to evaluate, and can't go on with what it does: training stands still meanwhile."""
        episode, client = self._episode, self.client
        trains = self._training_enabled is None and episode is not None and episode.training_enabled
        unsent = episode is not None and episode.builder.follows and episode.builder.steps
        return trains and self._asked is None and client.evaluates and client.flow.credit <= 0 and not unsent

    def _serve_instead(self) -> None:
        """Leave the episode that waits, as it is, and begin another one."""
        self.leave()
        self.turn()

    def _block(self) -> None:
        self.blocked = True
        self.origin = self.client.flow.reader.origin

    def cut_off(self, *, stopped: bool = False) -> None:
        """End the episode where it is. What is evaluated ends by itself, or doesn't count; and what a runner follows is
        left as it is where the loop was `stopped`: that runner may be gone, too."""
        self._asked = None
        episode = self._episode
        unended = episode is not None and self._ending is None and episode.steps and episode.training_enabled
        if episode is not None and unended and not (stopped and episode.builder.follows):
            self._ending, self._counts = episode.ending(self._observation, truncated=True), False
            self.client.flow.connection.flush()
        if self._ending is not None and not stopped:
            if not self._ending.done():
                self._block()  # its next turns see to it
                return
            self._ended(self._ending)
        self.leave()

    def leave(self) -> None:
        self._asked, self._ending, self._counts = None, None, True
        if self._episode is not None:
            self._episode.abandon()
            self._episode = None


class HasBuilder(Protocol):
    """An episode, of one agent or of several."""

    @property
    def builder(self) -> FragmentBuilder: ...


class Idle:
    """When a loop that is there for evaluations has nothing to do: after the first one of a run, between them."""

    def __init__(self, client: HasFlow) -> None:
        self._flow = client.flow
        self._began = 0

    def begins(self) -> None:
        """Episodes begin now."""
        self._began = self._flow.evaluations

    def waits(self) -> bool:
        """No evaluation wants an episode."""
        return self._evaluates and self._flow.session.evaluation < 0

    @property
    def _evaluates(self) -> bool:
        """Whether this run's trainer has had an evaluation, as far as the client knows."""
        return self._flow.evaluated_run != "" and self._flow.evaluated_run == self._flow.session.run

    def worthless(self, episodes: Sequence[HasBuilder]) -> bool:
        """These count in no evaluation, and are in the way of the next one, or nothing wants them at all."""
        flow = self._flow
        if not self._evaluates or any(episode.builder.evaluation is not None for episode in episodes):
            return False
        return self.waits() or flow.evaluations > self._began
