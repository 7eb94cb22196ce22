"""An evaluation runner's end of its conversation, sans-IO: a runner that says what it wants."""

from __future__ import annotations

import msgspec

from rllink_zmq.messages import EVALUATE, WELCOME, RunnerHello
from rllink_zmq.session import State
from rllink_zmq.session_runner import RunnerSession


class EvaluatorSession(RunnerSession):
    """Leases come only while an evaluation wants them. `welcomes`: how many there were. At each the broker has
    forgotten what was wanted, and the episodes that had begun get no further."""

    welcomes = 0

    def hello(self) -> RunnerHello:
        return msgspec.structs.replace(super().hello(), evaluation=True)

    def want(self, version: int, episodes: int, now: float) -> None:
        """So many episodes are to begin, by these weights or newer ones; 0 = nothing more is wanted. What was wanted
        before, and has not been taken, isn't any longer."""
        claimed = set(self._pending[1]) if self._pending is not None else set()
        self.leased = {key: lease for key, lease in self.leased.items() if key in claimed}
        self.leased_steps = sum(lease.message.steps for lease in self.leased.values())
        if self.state is State.LIVE:
            self._say(EVALUATE(version, episodes), now)

    def welcomed(self, message: WELCOME, now: float) -> None:
        super().welcomed(message, now)
        self.welcomes += 1
