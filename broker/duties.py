"""How many runners there are to be, and what each is to do.

Somebody asks the broker for a number, the broker tells the trainer, and the trainer says by session which runners are
to wait, to leave or to end. The broker tells them, and leases nothing to one that is not to serve.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from rllink_zmq.messages import DUTY, POOL, Assigned

from .events import Action, Received
from .fragments import Verb as Move
from .peers import Peer, Runner, State
from .state import BrokerState


class Duties(BrokerState):
    """The pool's size and its runners' duties."""

    def scale(self, number: int, now: float) -> tuple[str, list[Action]]:
        """Ask the trainer for `number` runners. Returns what is wrong ('' if nothing is), and what to do."""
        self._actions = actions = list[Action]()
        if not self.trained() or self.trainer is None:
            text = "no trainer is connected: there is nobody who could start or stop runners (rllink-zmq train)"
            return text, actions
        self.wanted = number
        self._say(logging.INFO, "scale", f"asked trainer '{self.trainer.name}' for {number} runners", now)
        self._send(self.trainer, self.pong(self.trainer, now))
        return "", actions

    def _on_pool(self, trainer: Peer, message: POOL, event: Received, now: float) -> None:
        if trainer is not self.trainer:
            return self._refuse(event.side, event.route, "unexpected", "only the trainer sends POOL", now)
        return self._assign(message.duties)

    def _assign(self, duties: Iterable[Assigned]) -> None:
        """What runners are to do. The rest serves."""
        self.duties = {a.session: a.duty for a in duties}
        self._pool = None
        for runner in self.runners.values():
            duty = self.duties.get(runner.session, "serve")
            if duty == runner.duty or runner.state is State.GONE:
                continue
            runner.duty = duty
            if duty != "serve":
                self._requeue(runner.leased, Move.UNLEASE)
            if runner.state is State.LIVE:
                self._send(runner, DUTY(duty))

    def _tell_duty(self, runner: Runner) -> None:
        """To one that has just been welcomed: it takes its duty to be `serve`."""
        runner.duty = self.duties.get(runner.session, "serve")
        self._pool = None
        if runner.duty != "serve":
            self._send(runner, DUTY(runner.duty))
