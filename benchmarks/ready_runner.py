"""A runner whose episodes are there before they are asked for: RLlib's own, sampled before the first is asked for."""

from __future__ import annotations

from typing import Any

from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

UNDER_WAY = 20
"""Samples after which environments that began together are anywhere in their episodes, as they are in a training."""


class ReadyRunner(SingleAgentEnvRunner):
    """`sample()` costs nothing but what its answer does on its way. It has exactly a batch of steps."""

    _ready: list[SingleAgentEpisode] | None = None

    def sample(self, **_: Any) -> list[SingleAgentEpisode]:
        """The same episodes each time."""
        if self._ready is None:
            for _ in range(UNDER_WAY):
                sampled = super().sample()
            self._ready = _first(sampled, self.config.total_train_batch_size)
            self.metrics.reduce()
        steps = sum(map(len, self._ready))
        self._increase_sampled_metrics(steps, sum(episode.is_done for episode in self._ready))
        return self._ready


def _first(episodes: list[SingleAgentEpisode], steps: int) -> list[SingleAgentEpisode]:
    """So many steps of them."""
    some = []
    for episode in episodes:
        if steps > 0:
            some.append(episode if len(episode) <= steps else episode[:steps])
            steps -= len(some[-1])
    return some
