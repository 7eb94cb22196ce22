"""Actions of several agents whose episode a runner follows: one request an env step, with what it has brought."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllink_zmq.client_agents_remote import Asked, PendingAgents, chosen_of
from rllink_zmq.client_followed import PendingSeen
from rllink_zmq.client_remote import place_of
from rllink_zmq.errors import EpisodeError
from rllink_zmq.fragments_agents import AgentsBuilder
from rllink_zmq.messages import SEEN, SEEN_REWARD, AgentId

ByModule = dict[str, list[AgentId]]


def rows_of(builder: AgentsBuilder, observed: ByModule) -> dict[str, NDArray[Any]]:
    """The columns of a request: what each of these agents was given."""
    return {f"{module}/obs": np.stack(builder.rows_of(agents)) for module, agents in observed.items()}


def all_of(observed: ByModule) -> list[AgentId]:
    """The agents of a request's rows, in their order."""
    return [agent for agents in observed.values() for agent in agents]


def store(builder: AgentsBuilder, observed: ByModule, arrays: dict[str, NDArray[Any]]) -> None:
    """Take in what the runner has made of the observations. Raises KeyError where it isn't told."""
    for module, agents in observed.items():
        rows, rewards = arrays[f"{module}/{SEEN}"], arrays[f"{module}/{SEEN_REWARD}"]
        for agent, row, reward in zip(agents, rows, rewards.tolist(), strict=True):
            builder.saw_of(agent, row, reward)


class AskedStep(Asked):
    """What is asked of the runner that follows the episode."""

    def __init__(self, builder: AgentsBuilder, observed: ByModule) -> None:
        self.module, self.agents = "", all_of(observed)
        self.columns = rows_of(builder, observed)
        acts = any(agent.waits for agent in builder.agents.values())
        self.how = {
            "agents": self.agents, "places": [place_of(builder)], "told": builder.told(), "rows": len(self.agents),
            "acts": acts, "anew": not builder.t0 + builder.steps,
        }  # fmt: skip
        self.begin()


class PendingFollowed(PendingAgents):
    """Actions that were asked of the runner that follows the episode."""

    def _to_ask(self) -> list[Asked]:
        self._observed = self._builder.newly_observed()
        if not self._observed and not self._builder.t0 + self._builder.steps:
            raise EpisodeError(
                f"episode '{self._builder.episode}' begins without any observation: give those of the agents that act "
                f"first"
            )
        # Where nobody was given anything there is nothing to say: the next request tells how far the episode is.
        return [AskedStep(self._builder, self._observed)] if self._observed else []

    def _drop_older_runs(self) -> None:
        """There is one answer."""

    def _adopt(self) -> dict[AgentId, Any]:
        builder = self._builder
        acting = builder.to_act()
        if not self._asked:
            self._begin(builder.origin.run, {})
            return self._took([])
        answer = self._asked[0].answer
        assert answer is not None
        store(builder, self._observed, answer.arrays)
        chosen = []
        for module, agents in acting.items():
            layout = builder.agents[agents[0]].rows.layout
            assert layout is not None  # it has observed
            mine = {
                name.removeprefix(f"{module}/"): array
                for name, array in answer.arrays.items()
                if name.startswith(f"{module}/")
            }
            chosen.append((agents, chosen_of(mine, len(agents), layout, module)))
        self._begin(answer.origin.run, {module: answer.modules.get(module, 0) for module in acting})
        return self._took(chosen)


class PendingSeenAgents(PendingSeen):
    """`PendingSeen` of several agents."""

    _builder: AgentsBuilder

    def done(self) -> bool:
        return not self._observed or super().done()

    def take(self) -> None:
        if self._observed:
            super().take()

    def _to_ask(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        builder = self._builder
        self._observed = builder.newly_observed()
        if not self._observed:
            return {}, {}
        agents = all_of(self._observed)
        return rows_of(builder, self._observed), {"agents": agents, "told": builder.told(), "rows": len(agents)}

    def _store(self, arrays: dict[str, NDArray[Any]]) -> None:
        store(self._builder, self._observed, arrays)


__all__ = ["PendingFollowed", "PendingSeenAgents"]
