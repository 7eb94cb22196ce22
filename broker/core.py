"""The broker's mind: events in, actions out. No socket, clock, thread or logging in here.

`handle(event, now)` returns what to do; `next_deadline()` says when a `Tick` is due; `check_invariants()` raises when
something that must always hold doesn't. The rooms share the state: this one routes and keeps the fragments,
`handshake` lets peers in and out, `duties` says what runners are to do, `evaluation` routes what is not trained on,
`artifacts` passes weights and policies on, and `overview` shows it all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rllink_zmq.messages import (
    ACK,
    ACT,
    ACTION,
    BYE,
    CONFIG,
    DELIVERED,
    EVALUATE,
    EVALUATED,
    FRAGMENT,
    GET_CONFIG,
    GET_STATE,
    HELLO,
    OFFER,
    PING,
    POOL,
    RETURNED,
    STATE,
    TAKE,
    TAKEN,
    UNWANTED,
    Claim,
    Relayed,
)
from rllink_zmq.wire import check_columns

from . import peers
from .acting import Acting
from .artifacts import Artifacts
from .balance import choose
from .evaluation import Evaluating
from .events import Action, Event, Forward, Malformed, Received, Send, Side, Tick, Unreachable
from .fragments import Fragment, State, Verb
from .handshake import Handshake
from .overview import Overview
from .peers import Peer, Runner, Simulator
from .settings import Settings

MOST_OWNERS = 16
"""Unfinished episodes that are remembered of a simulator, for each that it says it runs at once."""

ACK_OUTCOMES = 8192
"""Outcomes that one ACK carries at most: its header has to fit a frame."""


class Broker(Handshake, Evaluating, Artifacts, Acting, Overview):
    """One broker epoch. `epoch`: 8 random bytes; `weights_address`: where simulators find PUB."""

    def __init__(self, settings: Settings, epoch: bytes, weights_address: str, now: float) -> None:
        super().__init__(settings, epoch, weights_address, now)
        self._next_sweep = now + settings.probe_interval
        self._stuck = False  # no runner has room for the first of those that wait: another fragment changes nothing
        self._on: dict[type, Callable[[Any, Any, Received, float], None]] = {
            FRAGMENT: self._fragment,
            Relayed: self._fragment,
            TAKE: self._take,
            RETURNED: self._returned,
            EVALUATE: self._on_evaluate,
            PING: self._ping,
            POOL: self._on_pool,
            OFFER: self._offer,
            GET_STATE: self._get_state,
            STATE: self._on_state,
            GET_CONFIG: self._get_config,
            CONFIG: self._on_config,
            ACT: self._act,
            ACTION: self._action,
            BYE: self._bye,
        }

    # ---- in and out

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about `event`. `now` is monotonic seconds and never goes back."""
        actions: list[Action] = []
        self._actions = actions
        self._stuck = self._stuck and type(event) is Received and isinstance(event.message, FRAGMENT)
        if type(event) is Received:
            message = event.message
            peer = self.routes[event.side].get(event.route)
            if type(message) is HELLO:
                self._hello(message, event, now)
            elif peer is None:
                self._refuse(event.side, event.route, "greet", "send HELLO first", now)
            else:
                peer.heard = now
                handler = self._on.get(type(message))
                if handler is None:
                    name = type(message).__name__
                    text = f"{'an' if name[0] in 'AEIOU' else 'a'} {name} is for peers, not for the broker"
                    self._refuse(event.side, event.route, "unexpected", text, now)
                else:
                    handler(peer, message, event, now)
        elif type(event) is Tick:
            self._tick(now)
        elif type(event) is Unreachable:
            self._unreachable(event.side, event.route, now)
        elif type(event) is Malformed:
            self._malformed(event, now)
        if self.waiting and not self._stuck:
            self._dispatch(now)
        return actions

    def next_deadline(self) -> float:
        """When the next `Tick` is due."""
        due = self._next_sweep if self._ack_due is None else min(self._ack_due, self._next_sweep)
        if self.fetch_due is not None:
            due = min(due, self.fetch_due)
        if self.holding and self.trainer is not None:
            due = min(due, self.started + self.settings.hold)
        return due

    def flush_due(self, now: float) -> list[Action]:
        """The ACKs that are due, for a loop that finds no moment without input: nothing else is judged."""
        self._actions = actions = list[Action]()
        if self._ack_due is not None and now >= self._ack_due:
            self._flush_acks()
        return actions

    def _malformed(self, event: Malformed, now: float) -> None:
        self.malformed += 1
        sim, message, text = self.routes[event.side].get(event.route), event.message, str(event.error)
        if type(sim) is Simulator and isinstance(message, FRAGMENT) and message.session == sim.session:
            text = f"fragment {message.number} of {sim.name or 'a simulator'}: {text}"
            self._poison(sim, message, now)
        if event.route not in self.routes[event.side]:
            if now - self._told.get("stranger", -1e9) < 1.0:
                return
            self._told["stranger"] = now
        self._refuse(event.side, event.route, event.error.code, text, now)

    def _poison(self, sim: Simulator, message: FRAGMENT, now: float) -> None:
        """A header that can be read, over a body that isn't what it says: settled at once, or it would be kept and
        resent for ever."""
        if message.number > sim.high:
            sim.high = message.number
            ledger = self._ledger_of(message)
            ledger.receive(message.steps)
            ledger.settle(message.steps, "malformed")
            if message.evaluation:
                self._give_up(sim, message.episode, now)
            else:
                sim.taken_steps += message.steps
            sim.outcomes[message.number] = "malformed"
            self._ack(sim, message.number, "malformed", now)

    # ---- fragments in

    def _fragment(self, sim: Peer, message: FRAGMENT, event: Received, now: float) -> None:
        if type(sim) is not Simulator:
            return self._refuse(event.side, event.route, "unexpected", "only a simulator sends FRAGMENT", now)
        if message.session != sim.session:
            return self._refuse(event.side, event.route, "malformed", "this fragment names another session", now)
        number = message.number
        if message.base > number:
            text = f"base is {message.base}: everything below it is settled, fragment {number} too"
            return self._refuse(event.side, event.route, "malformed", text, now)
        sim.pass_base(message.base)
        if self.reports:
            self.reports.pass_base(sim.session, message.base)
        if message.dropped:
            sim.dropped = dict(message.dropped)
        if number <= sim.high:
            # A repeat: in flight it is ignored, settled it gets its recorded outcome again.
            if number not in sim.open and number >= sim.base:
                self._ack(sim, number, sim.outcomes.get(number, "unknown"), now)
            return None
        if sim.only_evaluates is not (message.evaluation and not sim.trains):
            self._count(sim, -1)
            sim.only_evaluates = not sim.only_evaluates
            self._count(sim, 1)
        sim.high = number
        sim.heard_of_steps = now
        fragment = Fragment(sim, message, event.frames, event.size)
        self._ledger_of(message).receive(message.steps)
        sim.open[number] = fragment
        sim.open_bytes += event.size
        self.held_bytes += event.size
        most = self.settings.fragment_bytes
        known = self.reports.of(sim.session) if self.reports else None
        report = known.get(number) if known else None
        if report is not None:
            return self._reported(fragment, report, now)
        # What is compressed has to be unpacked by somebody: it may not hold more than the others.
        if event.size > most or (message.compression and check_columns(message) > most):
            return self._drop(fragment, "too_large", now)
        if sim.open_bytes > sim.window + most:
            return self._drop(fragment, "over_window", now)
        if message.evaluation:
            return self._route_evaluation(fragment, now)
        if sim.evaluating and sim.episodes == 1:
            self._give_up_all(sim, now)  # it has gone on to another episode
        self.waiting.append(fragment)
        return None

    def _reported(self, fragment: Fragment, report: str | tuple[bytes, int], now: float) -> None:
        """A fragment resent to this new broker that a runner has handed over already."""
        if isinstance(report, str):
            fragment.move(Verb.RETURN if report == DELIVERED else Verb.DROP)
            return self._settle(fragment, report, now)
        session, k = report
        runner = self.runners.get(session)
        if runner is None or runner.state is peers.State.GONE:
            return self._drop(fragment, "handover_cut", now)
        return self._hold_for(fragment, runner, k, now)

    def _hold_for(self, fragment: Fragment, runner: Runner, k: int, now: float) -> None:
        """It is this runner's already: it took it from the broker of the time before."""
        fragment.move(Verb.HOLD)
        fragment.runner, fragment.k = runner, k
        runner.takes.setdefault(k, []).append(fragment)
        self._credit(fragment, now)

    # ---- fragments out

    def _dispatch(self, now: float) -> None:
        """Lease what waits, oldest first, while a runner has room."""
        trainer = self.trainer
        if trainer is None or (self.holding and not self._release(now)):
            return
        waiting, limit = self.waiting, self.settings.lease_bytes
        most_steps = self.lease_steps()
        while waiting:
            fragment = waiting[0]
            if fragment.state is not State.QUEUED:
                waiting.popleft()
                continue
            # What is evaluated waits here only when its runner is gone.
            reason = UNWANTED if fragment.header.evaluation else self._too_old(fragment.header)
            if reason:
                waiting.popleft()
                self._drop(fragment, reason, now)
                continue
            header = fragment.header
            owners = fragment.simulator.owners
            preferred = owners.get(header.episode)
            pool = self.pool()
            if preferred is not None and preferred not in pool:
                preferred = None
            runner = choose(pool, fragment.size, limit, preferred, header.steps, most_steps)
            if runner is None:
                self._stuck = True
                return
            waiting.popleft()
            if header.end == "no":
                owners[header.episode] = runner
                if len(owners) > MOST_OWNERS * fragment.simulator.episodes:
                    del owners[next(iter(owners))]  # its end never came: the simulator dropped it
            else:
                owners.pop(header.episode, None)
            fragment.move(Verb.LEASE)
            fragment.runner = runner
            runner.lease(fragment)
            self._actions.append(Forward(runner.route, fragment.frames))

    def _release(self, now: float) -> bool:
        """After a start nothing is leased until the runners of the time before have reported."""
        trainer = self.trainer
        if trainer is None:
            return False
        # Those that are on their way out may have handed something over, too, and count in no pool. One that is at its
        # end may be a process that has ended.
        others = (session for session, duty in self.duties.items() if duty != "end")
        reported = len(self.pool()) >= max(1, self.expected) and all(session in self.runners for session in others)
        if reported or now >= self.started + self.settings.hold:
            self.holding = False
        return not self.holding

    def _too_old(self, header: FRAGMENT) -> str:
        if header.run != self.run:
            return "old_run"
        if header.evaluation:
            return ""  # its evaluation has said how old it may be
        if self.trainer is not None and self.version - header.version > self.trainer.hello.lag_limit:
            return "stale"
        return ""

    def _take(self, runner: Peer, message: TAKE, event: Received, now: float) -> None:
        if type(runner) is not Runner:
            return self._refuse(event.side, event.route, "unexpected", "only a runner sends TAKE", now)
        self._give(runner, message.returned, (), now)
        refused = []
        taken = runner.takes.setdefault(message.k, [])
        allowed = runner.run == self.run
        before = self.round_steps
        for claim in message.claims:
            sim = self.simulators.get(claim.session)
            no = []
            for number in claim.numbers:
                fragment = sim.open.get(number) if sim is not None else None
                if (
                    not allowed
                    or fragment is None
                    or fragment.state is not State.LEASED
                    or fragment.runner is not runner
                ):
                    no.append(number)
                    continue
                reason = self._too_old(fragment.header)
                if reason:
                    self._drop(fragment, reason, now)
                    no.append(number)
                    continue
                fragment.move(Verb.TAKE)
                runner.unlease(fragment)
                fragment.k = message.k
                taken.append(fragment)
                if runner.evaluates:
                    continue
                fragment.round = self.version
                self.round_steps += self.counting.took(fragment.header)
                self.taken_steps += fragment.header.steps
                self._credit(fragment, now)
            if no:
                refused.append(Claim(claim.session, no))
        if not taken:
            del runner.takes[message.k]
        if self.fresh and self.trainer is not None and before < self.trainer.hello.quota <= self.round_steps:
            self._mark_all(now)  # the round is full: who still samples for it may stop
        if runner.evaluation is not None:
            self._lease_evaluated(runner)
        self._send(
            runner,
            TAKEN(
                message.k, refused, self.version, self.round_steps, self.taken_steps, self.simulators_live,
                len(self.pool()), self.sampled,
            ),
        )  # fmt: skip
        if runner.run < self.run:
            self._expel(runner, "old_run", f"run {runner.run} has ended, the broker serves {self.run}", now)
        return None

    def _returned(self, runner: Peer, message: RETURNED, event: Received, now: float) -> None:
        if type(runner) is not Runner:
            return self._refuse(event.side, event.route, "unexpected", "only a runner sends RETURNED", now)
        return self._give(runner, message.k, message.dropped, now)

    def _give(self, runner: Runner, k: int, dropped: Any, now: float) -> None:
        """RLlib has everything that `runner` took up to `k`, but for `dropped`."""
        if k <= runner.returned:
            return
        runner.returned = k
        why = {(d.session, d.number): d.reason for d in dropped}
        for take in [t for t in runner.takes if t <= k]:
            for fragment in runner.takes.pop(take):
                outcome = why.get((fragment.simulator.session, fragment.header.number), DELIVERED) if why else DELIVERED
                if outcome != DELIVERED:
                    self._missed(fragment, now)
                    if fragment.header.evaluation:
                        self._spoiled(fragment, now)
                fragment.move(Verb.RETURN)
                self._settle(fragment, outcome, now)
        if self.reports:
            self.reports.resolve(runner.session, k, DELIVERED, why)

    # ---- outcomes

    def _drop(self, fragment: Fragment, reason: str, now: float) -> None:
        """Settle a fragment that nobody has taken."""
        if fragment.state is State.LEASED and fragment.runner is not None:
            fragment.runner.unlease(fragment)
        fragment.move(Verb.DROP)
        if fragment.header.evaluation:
            self._give_up(fragment.simulator, fragment.header.episode, now)
        self._settle(fragment, reason, now)

    def _settle(self, fragment: Fragment, outcome: str, now: float) -> None:
        sim, header = fragment.simulator, fragment.header
        self._credit(fragment, now)
        del sim.open[header.number]
        sim.open_bytes -= fragment.size
        self.held_bytes -= fragment.size
        fragment.frames = ()
        self._ledger_of(header).settle(header.steps, outcome)
        told = EVALUATED if header.evaluation and outcome == DELIVERED else outcome
        sim.outcomes[header.number] = told
        if sim.state is peers.State.GONE:
            self._release_window(sim, now)
        self._ack(sim, header.number, told, now)

    def _credit(self, fragment: Fragment, now: float) -> None:
        """Taken or dropped, its steps no longer count as sampled ahead. Once a fragment."""
        if fragment.credited:
            return
        fragment.credited = True
        sim = fragment.simulator
        sim.taken_steps += fragment.header.steps
        if self.trainer is not None and self.trainer.hello.steps_ahead:
            # Of many episodes together: they are few, and what waits for their room is a whole simulator.
            self._mark(sim, now, 0.0 if fragment.header.segments else None)

    def _ack(self, sim: Simulator, number: int, outcome: str, now: float) -> None:
        sim.acks.append((number, outcome))
        self._mark(sim, now)

    def _flush_acks(self) -> None:
        self._ack_due = None
        dirty, self._dirty = self._dirty, {}
        actions, run, version, policy = self._actions, self.run, self.published_version, self.policy_ready
        evaluation, sharers, sampled = self.evaluation_version, self.sharers, self.sampled
        needs_logp, rounds, fresh, modules = self.needs_logp, self.rounds, self.fresh, self.module_versions
        live, front = peers.State.LIVE, Side.FRONT
        for sim in dirty:
            if sim.state is not live:
                continue
            limit, length = self.steps_granted(sim)
            settled, sim.acks = sim.acks, []
            parts = [settled]
            if len(settled) > ACK_OUTCOMES:
                parts = [settled[i : i + ACK_OUTCOMES] for i in range(0, len(settled), ACK_OUTCOMES)]
            for part in parts:
                ack = ACK(
                    part, sim.window, limit, length, run, version, policy, evaluation, sim in sharers, modules,
                    sampled, needs_logp, rounds, fresh,
                )  # fmt: skip
                actions.append(Send(front, sim.route, ack))

    # ---- time

    def _tick(self, now: float) -> None:
        if self._ack_due is not None and now >= self._ack_due:
            self._flush_acks()
        self._fetch(now)
        if self.holding:
            self._release(now)
        if now >= self._next_sweep:
            self._next_sweep = now + self.settings.probe_interval
            self._sweep(now)
            self._sweep_acts(now)

    def _ping(self, peer: Peer, message: PING, event: Received, now: float) -> None:
        if type(peer) is Simulator:
            # An ACK says more than a PONG, and hundreds of waiting ones are answered together. It may go by limits
            # of the old connection, too, whose last messages can come after WELCOME.
            self._mark(peer, now)
        else:
            self._send(peer, self.pong(peer, now))

    # ---- for tests

    def check_invariants(self) -> None:
        """Raises `AssertionError` when something that always holds doesn't. For tests: it looks at everything."""
        open_ = [f for s in self.simulators.values() for f in s.open.values()]
        for ledger, evaluated in ((self.ledger, False), (self.evaluation_ledger, True)):
            mine = [f for f in open_ if f.header.evaluation is evaluated]
            assert ledger.balanced(), ledger.as_json()
            assert ledger.in_flight == [len(mine), sum(f.header.steps for f in mine)]
        assert self.held_bytes == sum(f.size for f in open_) == sum(s.open_bytes for s in self.simulators.values())
        assert self.windows == sum(s.window for s in self.simulators.values()) <= self.settings.memory
        queued = {f for f in self.waiting if f.state is State.QUEUED}
        queued |= {f for r in self.runners.values() if r.evaluation is not None for f in r.evaluation.waiting}
        for f in open_:
            leased = f.runner is not None and f in f.runner.leased
            taken = f.runner is not None and f in f.runner.takes.get(f.k, ())
            where = [f in queued, leased, taken]
            assert where == [f.state is State.QUEUED, f.state is State.LEASED, f.state is State.TAKEN], (f.state, where)
        for r in self.runners.values():
            assert r.leased_steps == sum(f.header.steps for f in r.leased)
            assert r.leased_bytes == sum(f.size for f in r.leased)
            assert all(f.runner is r and f.state is State.LEASED for f in r.leased)
            if r.state is peers.State.GONE:
                assert not r.leased and not r.takes
        for side in Side:
            for route, peer in self.routes[side].items():
                assert peer.route == route and peer.state is peers.State.LIVE, (peer.state, type(peer))
        for s in self.simulators.values():
            assert s.base - 1 <= s.high and all(n <= s.high for n in s.open) and not (s.open.keys() & s.outcomes.keys())
        assert self.episodes == sum(s.episodes for s in self.simulators.values() if s.state is not peers.State.GONE)
        assert self.episodes_apart == sum(
            s.episodes for s in self.simulators.values() if s.only_evaluates and s.state is not peers.State.GONE
        )
        assert self.episodes - self.episodes_apart == sum(width * many for width, many in self.widths.items())
        self.check_acting()
        for r in self.runners.values():
            places = r.evaluation.open if r.evaluation is not None else {}
            assert not places or r.state is peers.State.LIVE
            assert places.keys() == {
                (s, e) for s in self.simulators.values() for e, to in s.evaluating.items() if to is r
            }
            assert all(f.header.evaluation is r.evaluates for f in r.leased)
        assert all(len(s.evaluating) <= s.episodes for s in self.simulators.values())
        assert self.simulators_live == sum(type(p) is Simulator for p in self.routes[Side.FRONT].values())
