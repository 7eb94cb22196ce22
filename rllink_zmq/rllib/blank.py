"""Chunks without RLlib's constructors: thousands a second are made, of data that have been checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer


def _buffer(values: Any, lookback: int = 0, space: gym.Space[Any] | None = None) -> InfiniteLookbackBuffer:
    buffer = InfiniteLookbackBuffer(data=values, space=space)
    buffer.lookback = lookback  # its constructor takes the number of a dict's keys for its length
    return buffer


class Blank:
    """An episode of these spaces that RLlib's constructor made, and its copies with other data: a third of the
    constructor's time. Their columns must have the rows that it would ask for."""

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        self.observation_space = observation_space
        empty = np.zeros(0, np.float32)
        blank = SingleAgentEpisode(
            id_="blank",
            observation_space=observation_space,
            action_space=action_space,
            observations=_buffer(empty, 0, observation_space),
            actions=_buffer(empty),
            rewards=_buffer(empty),
            infos=InfiniteLookbackBuffer(data=[], lookback=0),
            len_lookback_buffer=0,
        )
        mine = {"observations", "actions", "rewards", "infos", "extra_model_outputs", "_custom_data"}
        self._others = [(name, getattr(blank, name)) for name in SingleAgentEpisode.__slots__ if name not in mine]
        self._observations = vars(blank.observations)
        self._actions = vars(blank.actions)
        self._column = vars(blank.rewards)
        self._infos = vars(blank.infos)

    def copy(
        self,
        id_: str,
        t_started: int,
        steps: int,
        end: str,
        *,
        observations: Any,
        back: int,
        actions: Any,
        rewards: NDArray[np.float32],
        outputs: Mapping[str, NDArray[Any]],
    ) -> SingleAgentEpisode:
        """An episode of `steps` steps. `observations`: `back` rows that came before, and steps + 1; `outputs`: its
        extra model outputs, like the others one row a step."""
        episode = SingleAgentEpisode.__new__(SingleAgentEpisode)
        for name, value in self._others:
            setattr(episode, name, value)
        episode.id_ = id_
        episode.t_started, episode.t = t_started, t_started + steps
        episode.is_terminated, episode.is_truncated = end == "terminated", end == "truncated"
        episode.observations = buffer_like(self._observations, observations, back)
        episode.actions = buffer_like(self._actions, actions)
        episode.rewards = buffer_like(self._column, rewards)
        episode.infos = buffer_like(self._infos, [{}] * (steps + 1))
        column = self._column
        episode.extra_model_outputs = {name: buffer_like(column, values) for name, values in outputs.items()}
        episode._custom_data = {}
        return episode


def buffer_like(attributes: Mapping[str, Any], data: Any, lookback: int = 0) -> InfiniteLookbackBuffer:
    """A buffer with these attributes, but for its data."""
    buffer = InfiniteLookbackBuffer.__new__(InfiniteLookbackBuffer)
    buffer.__dict__ = {**attributes, "data": data, "lookback": lookback}
    return buffer
