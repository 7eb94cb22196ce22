"""How a training counts steps, which the broker else counts as env steps."""

from __future__ import annotations

from rllink_zmq.messages import FRAGMENT

ROUNDS = 4
"""Rounds that what is known of an env step goes back, at least."""


class Counting:
    """`agents`: 0 = env steps count; else those of agents, of whom there are so many. How many an env step has is
    measured of what is taken, and before that as if all acted in each. `quota`: steps of a round, as they count."""

    __slots__ = ("_counted", "_env", "_most", "agents")

    def __init__(self, agents: int = 0, quota: int = 0) -> None:
        self.agents = agents
        self._env = max(1, quota // max(1, agents))
        self._counted = self._env * max(1, agents)
        self._most = max(1, ROUNDS * 2 * quota)

    def of(self, header: FRAGMENT) -> int:
        """How many steps a fragment counts."""
        return sum([rows.steps for rows in header.agents]) if self.agents else header.steps

    def took(self, header: FRAGMENT) -> int:
        """`of` a fragment that has been taken."""
        counted = self.of(header)
        if self.agents:
            self._env += header.steps
            self._counted += counted
            if self._counted > self._most:
                self._env, self._counted = max(1, self._env // 2), self._counted // 2
        return counted

    def env_steps(self, counted: int) -> int:
        """So many env steps count `counted`, as far as is known: rounded up."""
        return -(-counted * self._env // self._counted) if self.agents else counted
