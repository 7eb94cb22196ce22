"""What the core remembers, and how it speaks: the ground that its rooms share."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

from rllink_zmq.messages import FRAGMENT, MAX_RUNNERS, PONG, REFUSED, Duty, Message, Present
from rllink_zmq.wire import Buffer

from . import peers
from .counting import Counting
from .events import Action, Log, Send, Side
from .fragments import Fragment, Ledger, Verb
from .modules import Module
from .peers import Peer, Reader, Request, Runner, Service, Simulator, Trainer
from .settings import Settings

WHOLE_STEPS = 64
"""In rounds a simulator's share of what may be ahead is one fragment up to this length, and two above it: a fragment
costs every process on its way as much as some tens of steps. One with many episodes at once may have all their steps in
a single fragment: it gets two, of which one is built while the other is on its way."""


class BrokerState:
    """One broker epoch. `epoch`: 8 random bytes; `weights_address`: where simulators find PUB."""

    def __init__(self, settings: Settings, epoch: bytes, weights_address: str, now: float) -> None:
        self.settings = settings
        self.epoch = epoch
        self.weights_address = weights_address
        self.started = now
        # who is there: `routes` holds live peers alone, the rest every session that is remembered
        self.routes: tuple[dict[bytes, Peer], dict[bytes, Peer]] = ({}, {})
        self.simulators: dict[bytes, Simulator] = {}
        self.runners: dict[bytes, Runner] = {}
        self.trainer: Trainer | None = None
        self.duties: dict[bytes, Duty] = {}
        self.wanted: int | None = None
        self.reports = peers.Reports()
        self.simulators_live = 0
        self.episodes = 0  # that are open at once, and of these the ones of simulators that only evaluate
        self.episodes_apart = 0
        self.widths: Counter[int] = Counter()  # of the other simulators: how many have so many episodes at once
        self.windows = 0
        # what is in flight
        self.ledger = Ledger()
        self.evaluation_ledger = Ledger()
        self.waiting: deque[Fragment] = deque()
        self.held_bytes = 0
        self.holding = True
        self.expected = 0
        self.malformed = 0
        self.unfinished = {"lost": 0, "abandoned": 0}
        # the run, and the newest weights version that any runner has offered
        self.run = ""
        self.version = -1
        self.round_steps = 0  # as the trainer counts; all others are env steps
        self.counting = Counting()
        self.taken_steps = 0
        self.sampled_before = 0
        self.needs_logp = True
        self.rounds = False
        self.round_open = False  # its weights are to be had: of all modules that have been offered
        # evaluations: which version they want episodes of (-1 = none does), and which simulators are to serve them
        self.evaluation_version = -1
        self.sharers: dict[Simulator, None] = {}
        # the artifacts: what simulators can get. Of several modules `published_version` is the newest of all
        self.modules: dict[str, Module] = {}  # by id, once a runner has offered weights of it; "" is the only one's
        self.published_version = -1
        self.module_versions: dict[str, int] = {}
        self.policy_ready = ""
        self.policy_blob = b""
        # single actions: who asks, who answers, and what waits for somebody who does
        self.readers: dict[bytes, Reader] = {}
        self.services: list[Service] = []
        self.unserved: dict[tuple[bytes, int], Request] = {}
        self.returning = b""  # the session of a service that is greeting again
        self.act_bytes = 0
        self.acts = {"answered": 0, "refused": 0, "moved": 0}
        self._pool: list[Runner] | None = None
        self._dirty: dict[Simulator, None] = {}
        self._ack_due: float | None = None
        self._told: dict[str, float] = {}
        self._actions: list[Action] = []

    @property
    def weights(self) -> bytes:
        """All that is published."""
        return b"".join(module.data for module in self.modules.values())

    # ---- speaking

    def _send(self, peer: Peer, message: Message, body: Sequence[Buffer] = ()) -> None:
        self._actions.append(Send(peer.side, peer.route, message, body))

    def _refuse(
        self, side: Side, route: bytes, code: str, text: str, now: float, *, fatal: bool = False, greeting: int = 0
    ) -> None:
        self._actions.append(Send(side, route, REFUSED(code, text[:4000], fatal, greeting)))
        if code != "greet":
            self._say(logging.WARNING, code, f"refused ({code}): {text}", now)

    def _say(self, level: int, kind: str, text: str, now: float) -> None:
        """A log line, at most one of a kind a second: whatever a peer does, the log stays readable."""
        if now - self._told.get(kind, -1e9) >= 1.0:
            self._told[kind] = now
            self._actions.append(Log(level, text))

    def pong(self, peer: Peer, now: float) -> PONG:
        """The answer to a PING of `peer`, or a probe of it."""
        wanted, roster, ledger = 0, list[Present](), dict[str, tuple[int, int]]()
        if isinstance(peer, Trainer):
            wanted = peer.hello.runners if self.wanted is None else self.wanted
            ledger = self.ledger.totals()
            roster = [
                Present(r.session, r.name, max(0.0, now - r.heard), r.duty, r.state is peers.State.LIVE)
                for r in self.runners.values()
                if r.run == self.run and r.state is not peers.State.GONE and not r.evaluates
            ][:MAX_RUNNERS]
        return PONG(
            self.epoch, self.run, self.published_version, self.policy_ready, self.taken_steps, self.round_steps,
            wanted, self.simulators_live, len(self.pool()), roster, ledger, self.module_versions, self.sampled,
        )  # fmt: skip

    # ---- what every room needs

    def trained(self) -> bool:
        """A trainer is connected."""
        return self.trainer is not None and self.trainer.state is peers.State.LIVE

    def pool(self) -> list[Runner]:
        """The runners that may be leased what is trained on."""
        if self._pool is None:
            self._pool = [
                r for r in self.runners.values()
                if r.state is peers.State.LIVE and r.run == self.run and r.duty == "serve" and not r.evaluates
            ]  # fmt: skip
        return self._pool

    @property
    def sampled(self) -> int:
        """Env steps of the training: what its trainer said when the run began here, and what was taken since."""
        return max(0, self.sampled_before + self.taken_steps)

    def live_simulators(self) -> list[Simulator]:
        """In the order of their greetings."""
        return [peer for peer in self.routes[Side.FRONT].values() if isinstance(peer, Simulator)]

    def steps_granted(self, sim: Simulator) -> tuple[int, int]:
        """(steps limit of this session, length of its fragments): the steps ahead are shared by episodes at once, but
        for those that have shown that they are there for evaluations alone."""
        trainer = self.trainer
        if trainer is None:
            return max(1, sim.taken_steps), 1  # nobody learns: nothing is sampled ahead (0 would mean no limit)
        hello, env_steps = trainer.hello, self.counting.env_steps
        longest = max(1, min(hello.fragment_steps, env_steps(hello.fragment_steps)))
        ahead = env_steps(hello.steps_ahead)
        n = max(1, self.episodes - self.episodes_apart)
        if not ahead:
            return 0, longest
        if self.rounds and self.round_open:
            # What the round still wants. Before its weights are to be had, its steps would be by those from before.
            ahead = max(ahead, env_steps(hello.quota - self.round_steps))
        if not hello.lease_steps:
            whole = min(ahead // n, WHOLE_STEPS) if self.rounds and sim.episodes == 1 else 0
            length = max(1, min(longest, max(ahead // (2 * n), whole)))
            return sim.taken_steps + max(length, ahead // n) * sim.episodes, length
        # Each runner waits for its own share, and all for the last: one of the largest fragments for each.
        parts = self._runners_wanted() + 1
        length = max(1, min(longest, ahead // (parts * n)))
        each = max(length, ahead // n, -(-parts * length * max(self.widths, default=1) // n))
        return sim.taken_steps + each * sim.episodes, length

    @property
    def fresh(self) -> bool:
        """Less than a round may be sampled ahead of it: its steps are meant to be by its own weights."""
        hello = self.trainer.hello if self.trainer is not None else None
        return hello is not None and self.rounds and 0 < hello.steps_ahead < hello.quota

    def lease_steps(self) -> int:
        """Env steps that one runner may have been leased and not taken, 0 = any number: so few that the others' leases
        together never hold all that simulators may have on their way."""
        hello, env_steps = self.trainer.hello if self.trainer is not None else None, self.counting.env_steps
        if hello is None or not hello.lease_steps or not hello.steps_ahead:
            return 0 if hello is None else env_steps(hello.lease_steps)
        return max(1, min(env_steps(hello.lease_steps), env_steps(hello.steps_ahead) // (self._runners_wanted() + 1)))

    def _runners_wanted(self) -> int:
        return max(1, self.trainer.hello.runners) if self.trainer is not None else 1

    def _count(self, sim: Simulator, sign: int) -> None:
        """Its episodes come (1) or go (-1)."""
        self.episodes += sign * sim.episodes
        if sim.only_evaluates:
            self.episodes_apart += sign * sim.episodes
            return
        self.widths[sim.episodes] += sign
        if not self.widths[sim.episodes]:
            del self.widths[sim.episodes]

    def _mark(self, sim: Simulator, now: float, wait: float | None = None) -> None:
        """This simulator is owed an ACK, within `wait` seconds; None = `ack_interval`."""
        self._dirty[sim] = None
        due = now + (self.settings.ack_interval if wait is None else wait)
        if self._ack_due is None or due < self._ack_due:
            self._ack_due = due

    def _mark_all(self, now: float) -> None:
        for sim in self.live_simulators():
            self._mark(sim, now)

    def _ledger_of(self, header: FRAGMENT) -> Ledger:
        return self.evaluation_ledger if header.evaluation else self.ledger

    def _requeue(self, fragments: Iterable[Fragment], verb: Verb) -> None:
        """Back to the head of the queue, in their order."""
        for fragment in reversed(list(fragments)):
            if verb is Verb.UNLEASE and fragment.runner is not None:
                fragment.runner.unlease(fragment)
            fragment.move(verb)
            fragment.runner = None
            self.waiting.appendleft(fragment)

    def _settle(self, fragment: Fragment, outcome: str, now: float) -> None:
        raise NotImplementedError  # the core's

    def _drop(self, fragment: Fragment, reason: str, now: float) -> None:
        raise NotImplementedError  # the core's

    def _give(self, runner: Runner, k: int, dropped: Any, now: float) -> None:
        raise NotImplementedError  # the core's

    def _hold_for(self, fragment: Fragment, runner: Runner, k: int, now: float) -> None:
        raise NotImplementedError  # the core's

    def _source_lost(self, peer: Peer, now: float) -> None:
        raise NotImplementedError  # the artifacts'

    def _serve_all(self, now: float) -> None:
        raise NotImplementedError  # acting's

    def _asker_lost(self, reader: Reader) -> None:
        raise NotImplementedError  # acting's

    def _service_lost(self, service: Service, now: float) -> None:
        raise NotImplementedError  # acting's

    def _begin_run(self, trainer: Trainer, now: float) -> None:
        raise NotImplementedError  # the artifacts'

    def _end_evaluation(self, runner: Runner, now: float) -> None:
        raise NotImplementedError  # the evaluations'

    def _give_up_all(self, sim: Simulator, now: float) -> None:
        raise NotImplementedError  # the evaluations'

    def _announce(self, now: float) -> None:
        raise NotImplementedError  # the evaluations'

    def _watch_sharers(self, now: float) -> None:
        raise NotImplementedError  # the evaluations'
