"""What replay buffers ask of several agents' episodes: fragments that are handed over in parts, and chunks that can be
joined again in the buffer, whoever comes late, is absent from a chunk, or has begun a step where one ends."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

from rllink_zmq.messages import FRAGMENT, AgentId, AgentRows
from rllink_zmq.rllib.episodes import Piece, cut_header

SKIP = MultiAgentEpisode.SKIP_ENV_TS_TAG


class AgentsPiece(NamedTuple):
    """One fragment, or a part of it; checked: each agent's rows, and at which env step (counted in the episode) each of
    its observations came. An agent's step is part of that env step with which it is complete."""

    message: FRAGMENT
    agents: dict[AgentId, tuple[AgentRows, Piece, NDArray[np.int64]]]

    def counted(self) -> list[int]:
        """How many agents' steps each env step completes."""
        found = np.zeros(self.message.steps, np.int64)
        for _, _, times in self.agents.values():
            found[times[1:] - self.message.t0 - 1] += 1  # an agent completes one at a time
        return found.tolist()

    def cut(self, first: int, steps: int) -> AgentsPiece:
        """Its env steps `first` to `first + steps - 1`, as `Piece.cut`."""
        message = self.message
        if steps == message.steps:
            return self
        begins = message.t0 + first
        before = 0.0
        agents = {}
        for agent, (rows, piece, times) in self.agents.items():
            i, j = np.searchsorted(times[1:], (begins, begins + steps), side="right").tolist()
            before += float(piece.rewards[:i].sum(dtype=np.float64))
            if i == j:
                continue
            part = piece.cut(i, j - i)
            header = msgspec.structs.replace(
                rows,
                t0=part.message.t0,
                steps=part.message.steps,
                end=part.message.end,
                return_so_far=part.message.return_so_far,
                first=-1 if i else rows.first,
            )
            agents[agent] = (header, part, times[i : j + 1])
        return AgentsPiece(cut_header(message, first, steps, before), agents)


class ReplayedEpisode(MultiAgentEpisode):
    """A chunk that RLlib's replay buffers can join with those before it. They look up an agent's i-th step of what they
    hold as `i` in `env_t_to_agent_t`, wherever that began: so a chunk counts there from 0, and is counted on as it is
    joined. And they ask for the module of each agent when they let an episode go: who comes with a later chunk brings
    it along."""

    __slots__ = ()

    def concat_episode(self, other: MultiAgentEpisode) -> None:
        for agent, single in other.agent_episodes.items():
            entries = other.env_t_to_agent_t[agent]
            mine = self.agent_episodes.get(agent)
            if mine is None:
                missing = other.env_t_started - entries.lookback - self.env_t_started
                entries.data = [SKIP] * missing + entries.data
                entries.lookback += max(0, missing)
            elif not mine.is_done and len(single):
                entries.data = [entry if entry == SKIP else entry + len(mine) for entry in entries.data]
        absent = self.agent_episodes.keys() - other.agent_episodes.keys()
        super().concat_episode(other)
        for agent in absent:
            self.env_t_to_agent_t[agent].data += [SKIP] * len(other)
        self._agent_to_module_mapping |= other._agent_to_module_mapping


__all__ = ["AgentsPiece", "ReplayedEpisode"]
