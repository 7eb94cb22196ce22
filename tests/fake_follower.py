"""A service without RLlib that follows episodes, in a thread: what clients need to be tested on real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
from fake_service import Reply, Service
from numpy.typing import NDArray

from broker.server import Server
from rllink_zmq.messages import ACT, ACTION, FOLLOWS, LOST, SEEN, SEEN_REWARD


class Follower(Service):
    """Knows how far each episode is, and what it was told on its way (`heard`: t, the first number of the observation,
    reward, end, whether an action was wanted). Sees the square of that number, and a count of what it has seen of the
    episode. `forgets`: it knows nothing any more. `shapes`: what
    it makes of rewards. `holds_ends`: it says nothing of last observations; `held_ends`: how often."""

    def __init__(self, backend: str, **options: Any) -> None:
        super().__init__(backend, **options)
        self.heard: dict[str, list[tuple[int, float, float, str, bool]]] = {}
        self.lookback = 2
        self.shapes = 1.0
        self.holds_ends = False
        self.held_ends = 0
        self._at: dict[tuple[bytes, str], int] = {}

    def forgets(self) -> None:
        """It is another one from now on."""
        self._at.clear()

    def reply(self, message: ACT, arrays: dict[str, NDArray[Any]]) -> Reply | None:
        told = ACTION(message.session, message.request)
        if not message.places:
            return self.refused(told, FOLLOWS), {}
        rows = arrays["obs"]
        if self.holds_ends and message.places[0].end != "no":
            self.held_ends += 1
            return None
        for place, row in zip(message.places, rows, strict=True):
            key = message.session, place.episode
            at = self._at.get(key, -1)
            if place.t not in (at, at + 1):
                return self.refused(told, LOST), {}
            self._at[key] = place.t
            self.heard.setdefault(place.episode, []).append(
                (place.t, float(row[0]), place.reward, place.end, message.acts)
            )
        seen = np.array([[row[0] ** 2, p.t] for p, row in zip(message.places, rows, strict=True)], np.float64)
        rewards = np.array([place.reward for place in message.places], np.float64)
        answer = {SEEN: seen, SEEN_REWARD: self.shapes * rewards}
        return told, answer if not message.acts else self.answer(message, rows) | answer


class AgentsFollower(Follower):
    """The same of several agents. `told`: what it was told of each env step of an episode: t, the agents that have
    observations, and of each agent that it heard of its reward and end. `ended_at`: env steps of ends that were told
    later."""

    def __init__(self, backend: str, **options: Any) -> None:
        super().__init__(backend, **options)
        self.lookback = 0
        self.ended_at: dict[Any, int] = {}
        self.told: list[tuple[int, list[Any], dict[Any, tuple[float, str]], bool]] = []

    def reply(self, message: ACT, arrays: dict[str, NDArray[Any]]) -> Reply | None:
        told = ACTION(message.session, message.request)
        if self.refuses:
            return self.refused(told, self.refuses), {}
        (place,) = message.places
        key = message.session, place.episode
        if place.t < self._at.get(key, 0) or (place.t and key not in self._at):
            return self.refused(told, LOST), {}
        self._at[key] = place.t
        self.ended_at |= {one.agent: one.t for one in message.told if one.t >= 0}
        heard = {one.agent: (one.reward, one.end) for one in message.told}
        self.told.append((place.t, list(message.agents), heard, message.acts))
        answer: dict[str, NDArray[Any]] = {}
        versions = {}
        module_of = {one.agent: one.module for one in message.told}
        for name, rows in arrays.items():
            module = name.removesuffix("/obs")
            mine = [agent for agent in message.agents if module_of[agent] == module]
            acting = rows[[heard[agent][1] == "no" for agent in mine]]
            rewards = np.array([heard[agent][0] for agent in mine], np.float64)
            columns = {
                SEEN: np.array([[row[0] ** 2, place.t] for row in rows], np.float64),
                SEEN_REWARD: self.shapes * rewards,
            }
            if message.acts and len(acting):
                columns |= self.answer(message, acting)
            versions[module] = self.versions[module]
            answer |= {f"{module}/{column}": array for column, array in columns.items()}
        return msgspec.structs.replace(told, modules=versions), answer


@contextmanager
def follower(server: Server, kind: type[Follower] = Follower, **options: Any) -> Iterator[Any]:
    """One at `server`."""
    fake = kind(server.backend, **options)
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()
