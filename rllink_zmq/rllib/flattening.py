"""RLlib's own FlattenObservations, done by the graph and for whole fragments at once.

One row of float32 of an observation: one-hot for Discrete and MultiDiscrete, everything else as numbers, the parts in
the order of their bytes (keys sorted), as RLlib's piece has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.connectors.common.flatten_observations import FlattenObservations
from ray.rllib.utils.numpy import flatten_inputs_to_1d_tensor

from rllink_zmq.messages import FRAGMENT, AgentId
from rllink_zmq.packing import packing_of


class Flattening:
    """What the piece makes of observations of `space`. `observation_space`: of what it makes; `struct`: the spaces of
    the parts that it takes; `removed`: keys of those that it doesn't."""

    def __init__(
        self, space: gym.Space[Any], observation_space: gym.Space[Any], struct: Any, removed: Iterable[str] = ()
    ) -> None:
        self.observation_space = observation_space
        self._removed = frozenset(removed)
        self._struct = struct
        self._nested = isinstance(space, gym.spaces.Dict)
        packing = packing_of(space)
        parts = [((), space)] if packing is None else [(part.keys, part.space) for part in packing.parts]
        self._parts = [None if keys and keys[0] in self._removed else inner for keys, inner in parts]

    def __call__(self, arrays: Sequence[torch.Tensor]) -> torch.Tensor:
        """(B, *shape) of each part -> (B, n) float32."""
        pairs = zip(self._parts, arrays, strict=True)
        return torch.cat([_flat(space, array) for space, array in pairs if space is not None], -1)

    def of_rows(self, observations: Any) -> NDArray[np.float32]:
        """A structure of (B, ...) arrays -> (B, n), by RLlib's own function."""
        if self._nested and self._removed:
            observations = {key: inner for key, inner in observations.items() if key not in self._removed}
        made: NDArray[np.float32] = flatten_inputs_to_1d_tensor(observations, self._struct, batch_axis=True)
        return made


def flattening_of(pieces: Sequence[Any], space: gym.Space[Any]) -> Flattening | None:
    """What these env-to-module pieces do, if they are RLlib's FlattenObservations and nothing else."""
    if len(pieces) != 1 or type(pieces[0]) is not FlattenObservations:
        return None
    (piece,) = pieces
    if piece._multi_agent or piece._as_learner_connector or not tree.flatten(piece._input_obs_base_struct):
        return None
    return Flattening(space, piece.observation_space, piece._input_obs_base_struct, piece._keys_to_remove)


def agents_flattening_of(
    pieces: Sequence[Any], spaces: Mapping[AgentId, gym.Space[Any]]
) -> dict[AgentId, Flattening] | None:
    """What these env-to-module pieces do to the observations of each agent that they change, if they are RLlib's
    FlattenObservations(multi_agent=True) and nothing else."""
    if len(pieces) != 1 or type(pieces[0]) is not FlattenObservations:
        return None
    (piece,) = pieces
    if not piece._multi_agent or piece._as_learner_connector:
        return None
    return {
        agent: Flattening(
            space, piece.observation_space[agent], piece._input_obs_base_struct[agent],
            piece._keys_to_remove if isinstance(space, gym.spaces.Dict) else (),
        )
        for agent, space in spaces.items()
        if not piece._agent_ids or agent in piece._agent_ids
    }  # fmt: skip


class Came(NamedTuple):
    """A fragment's steps as they came, `back` earlier ones at the front: a structure of (back + steps + 1, ...) arrays
    of observations, (back + steps, ...) actions as they travel, and rewards."""

    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[Any]
    back: int = 0

    def until(self, last: int) -> Came:
        """Its observations before `last`, and the steps between them."""
        observations = tree.map_structure(lambda array: array[:last], self.observations)
        return Came(observations, self.actions[: last - 1], self.rewards[: last - 1], self.back)


class FlattenedFragments:
    """The observations of fragments, flattened: what `EpisodeBuilder` asks of connectors."""

    lookback = 0
    first = -1

    def __init__(self, flattening: Flattening) -> None:
        self._flattening = flattening
        self.observation_space = flattening.observation_space

    def rewrite(self, message: FRAGMENT, came: Came) -> tuple[Any, gym.Space[Any]]:
        """Observations as the policy saw them, (n, k) float32, and their space."""
        return self._flattening.of_rows(came.observations), self.observation_space

    def learn(self, message: FRAGMENT, came: Came) -> None:
        """Nothing: it has no state."""

    @property
    def seen_space(self) -> gym.Space[Any]:
        """Of what the module is given."""
        return self.observation_space

    def dist_inputs(self, module: Any, message: FRAGMENT, came: Came) -> None:
        """None: what `module` itself makes of the rewritten observations."""


class FlattenedAgents:
    """The same of several agents: `flattenings` of those whose observations are flattened."""

    def __init__(self, flattenings: Mapping[AgentId, Flattening]) -> None:
        self.lookbacks: Mapping[str, int] = {}
        self._made = {agent: FlattenedFragments(each) for agent, each in flattenings.items()}

    def of(self, agent: AgentId, module: str) -> FlattenedFragments | None:
        """Those of `agent`, whatever it acts by; None where its observations stay as they are."""
        return self._made.get(agent)

    def check(self, version: int) -> None:
        """Nothing: it is the same with any version."""


def _flat(space: gym.Space[Any], array: torch.Tensor) -> torch.Tensor:
    if isinstance(space, gym.spaces.Discrete):
        return _one_hot(array, int(space.n))
    if isinstance(space, gym.spaces.MultiDiscrete):
        return torch.cat([_one_hot(array[:, i], int(n)) for i, n in enumerate(space.nvec)], -1)
    return (array.unsqueeze(-1) if array.dim() == 1 else array.flatten(1)).to(torch.float32)


def _one_hot(values: torch.Tensor, count: int) -> torch.Tensor:
    return (values.unsqueeze(-1) == torch.arange(count, device=values.device)).to(torch.float32)
