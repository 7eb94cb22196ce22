"""The connectors that a user configured, where fragments become episodes: pieces that rewrite observations do so again,
in the state that belongs to the version of the weights that acted; and a filter learns of what is handed over.
"""

from __future__ import annotations

import threading
from typing import Any

import gymnasium as gym
import numpy as np
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray

from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import FRAGMENT, AgentId
from rllink_zmq.rllib.flattening import Came
from rllink_zmq.rllib.pipelines import Pipelines


class FragmentConnectors:
    """What a runner needs `pipelines` for where fragments become episodes. `filters`: their state at each version; None
    where nothing is learned from the fragments, and any state will do. `whose`: the agent, where there are several;
    `first`: then, the version by which it has taken the first step, if that isn't the fragment's; else -1."""

    def __init__(self, pipelines: Pipelines, filters: Filters | None, whose: AgentId | None = None) -> None:
        self._pipelines = pipelines
        self._filters = filters
        self._whose = whose
        self.first = -1

    @property
    def lookback(self) -> int:
        """How many observations before the newest the pieces look at."""
        return self._pipelines.lookback

    def rewrite(self, message: FRAGMENT, came: Came) -> tuple[Any, gym.Space[Any]]:
        """A fragment's observations as the policy saw them, a structure of (back + steps + 1, ...) arrays; and the
        space of that. Raises `UnknownFilter`."""
        pipelines, filters = self._pipelines, self._filters
        if not pipelines.stateful or filters is None:
            return pipelines.rewritten(came, self._whose)
        before = None
        if self.first not in (-1, message.version):
            pipelines.set_state(filters.known(self.first))
            before, _ = pipelines.rewritten(came.until(came.back + 1), self._whose)
        pipelines.set_state(filters.known(message.version))
        seen, space = pipelines.rewritten(came, self._whose)
        if before is not None:
            seen = tree.map_structure(lambda old, new: np.concatenate([old, new[len(old) :]]), before, seen)
        return seen, space

    def learn(self, message: FRAGMENT, came: Came) -> None:
        """The fragment will be handed over: what it teaches is learned, once."""
        if self._pipelines.stateful and self._filters is not None:
            self._pipelines.learn(came, came.back + 1 if message.t0 else came.back, self._whose)

    def dist_inputs(self, module: Any, message: FRAGMENT, came: Came) -> NDArray[Any]:
        """(steps, k) of the fragment that was rewritten last: what `module` would have drawn its actions from."""
        return self._pipelines.dist_inputs(module, came, self._whose)


class UnknownFilter(ProtocolError):
    """How a fragment's observations were filtered isn't known to this runner, not any longer or not yet."""


class Filters:
    """The state of the env-to-module pieces at each version of the weights, as far as this runner knows it. Several
    threads may use it. `keep`: how many versions back."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._own: dict[int, bytes] = {}
        self._published: dict[int, bytes] = {}

    def own(self, version: int, state: bytes) -> None:
        """RLlib gave this runner these weights when its pieces were in this state."""
        self._note(self._own, version, state)

    def published(self, version: int, state: bytes) -> None:
        """This state came with the weights that simulators' actions are chosen by."""
        self._note(self._published, version, state)

    def _note(self, known: dict[int, bytes], version: int, state: bytes) -> None:
        with self._lock:
            known.pop(version, None)
            known[version] = state
            while (oldest := next(iter(known))) < version - self._keep:  # they come in their order
                del known[oldest]

    def at(self, version: int) -> bytes | None:
        """The state at this version. What was published goes before what this runner would have published."""
        with self._lock:
            return self._published.get(version, self._own.get(version))

    def known(self, version: int) -> bytes:
        """The state at this version. Raises `UnknownFilter`."""
        state = self.at(version)
        if state is None:
            raise UnknownFilter(f"the filters of version {version} aren't known here")
        return state

    def restart(self) -> None:
        """A new run: its versions begin anew."""
        with self._lock:
            self._own.clear()
            self._published.clear()


__all__ = ["Filters", "FragmentConnectors", "UnknownFilter"]
