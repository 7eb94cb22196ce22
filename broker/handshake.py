"""Letting peers in and out: greetings, refusals, losses, leaves.

- HELLO with a greeting that is not newer than the session's last changes nothing: it was on its way in a connection
  that is dead.
- A lost connection is not a lost process: untaken leases go to others at once, taken ones wait `runner_grace`, unless
  the trainer has said that it is one (duty `end`).
- One trainer at a time; a run is never followed by an older one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TypeVar

from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import (
    BYE,
    DELIVERED,
    HELLO,
    PROTOCOL_VERSION,
    WELCOME,
    ObserverHello,
    ReaderHello,
    RunnerHello,
    ServiceHello,
    SimulatorHello,
    TrainerHello,
)

from .duties import Duties
from .events import Received, Side
from .fragments import Fragment
from .fragments import State as Life
from .fragments import Verb as Move
from .peers import Observer, Peer, Reader, Runner, Service, Simulator, State, Trainer, Verb
from .spaces import check_agents, mismatch, step_bytes

P = TypeVar("P", bound=Peer)

ROLES: dict[type, tuple[str, type[Peer]]] = {
    SimulatorHello: ("a simulator", Simulator), ReaderHello: ("a reader", Reader), RunnerHello: ("a runner", Runner),
    TrainerHello: ("a trainer", Trainer), ObserverHello: ("an observer", Observer),
    ServiceHello: ("a runner's service", Service),
}  # fmt: skip


class Handshake(Duties):
    """The door."""

    def _hello(self, hello: HELLO, event: Received, now: float) -> None:
        def no(code: str, text: str, *, fatal: bool = True) -> None:
            self._refuse(event.side, event.route, code, text, now, fatal=fatal, greeting=hello.greeting)

        role = hello.peer
        in_front = isinstance(role, SimulatorHello | ReaderHello)
        if hello.protocol != PROTOCOL_VERSION:
            return no(
                "protocol",
                f"this broker speaks protocol {PROTOCOL_VERSION}, the peer (package {hello.package or '?'}) speaks "
                f"{hello.protocol}: install the same version of rllink-zmq on both",
            )
        if in_front != (event.side is Side.FRONT):
            name = ROLES[type(role)][0]
            right, wrong = ("frontend", "backend") if in_front else ("backend", "frontend")
            return no("wrong_socket", f"{name} must connect to the broker's {right}, this is the {wrong}")
        other = self.routes[event.side].get(event.route)
        if other is not None and (other.session != hello.session or type(other) is not ROLES[type(role)][1]):
            self._lose(other, now)
        if isinstance(role, SimulatorHello):
            return self._hello_simulator(hello, role, event, now)
        if isinstance(role, RunnerHello):
            return self._hello_runner(hello, role, event, now)
        if isinstance(role, TrainerHello):
            return self._hello_trainer(hello, role, event, now)
        if isinstance(role, ReaderHello):
            return self._hello_reader(hello, event, now)
        if isinstance(role, ServiceHello):
            return self._hello_service(hello, role, event, now)
        observer = Observer(hello.session, now)
        self._enter(observer, hello, event.route, now)
        return self._welcome(observer)

    def _enter(self, peer: Peer, hello: HELLO, route: bytes, now: float) -> None:
        routes = self.routes[peer.side]
        self._pool = None
        if peer.state is State.LIVE:
            routes.pop(peer.route, None)
        elif isinstance(peer, Simulator):
            self.simulators_live += 1
        peer.move(Verb.GREET, now)
        peer.route, peer.greeting, peer.heard = route, hello.greeting, now
        peer.name, peer.package = hello.name, hello.package
        routes[route] = peer

    def _welcome(self, peer: Peer, text: str = "") -> None:
        limit, length, window = 0, 1, 0
        spaces = self.trainer.hello.spaces if self.trainer is not None else None
        if isinstance(peer, Simulator):
            (limit, length), window = self.steps_granted(peer), peer.window
        elif isinstance(peer, Observer) and spaces is None:
            live = (p for p in self.routes[Side.FRONT].values() if isinstance(p, Simulator) and p.spaces is not None)
            first = next(live, None)
            spaces = first.spaces if first is not None else None
        self._send(peer, WELCOME(
            self.epoch, peer.greeting, self.settings.fragment_bytes, window, limit, length, self.run,
            self.published_version, self.policy_ready, self.weights_address, spaces, text,
            self.settings.act_requests if isinstance(peer, Reader) else 0,
            self.evaluation_version if isinstance(peer, Simulator) else -1, peer in self.sharers, self.module_versions,
            self.sampled, self.needs_logp, self.rounds, self.fresh,
        ))  # fmt: skip

    # ---- simulators

    def _hello_simulator(self, hello: HELLO, role: SimulatorHello, event: Received, now: float) -> None:
        sim = self.simulators.get(hello.session)
        if sim is not None and hello.greeting <= sim.greeting:
            return
        problem = self._unfit(role)
        if problem is not None:
            self._refuse(event.side, event.route, *problem, now, fatal=True, greeting=hello.greeting)
            return
        if sim is None:
            sim = self.simulators[hello.session] = Simulator(hello.session, now)
        if sim.state in (State.LIVE, State.LOST):
            self._count(sim, -1)
        self._enter(sim, hello, event.route, now)
        sim.greet(role)
        self._count(sim, 1)
        self.reports.pass_base(sim.session, role.base)
        text = self._reserve(sim)
        self._dirty.pop(sim, None)
        sim.acks = []
        self._welcome(sim, text)

    def _unfit(self, role: SimulatorHello) -> tuple[str, str] | None:
        if role.spaces is None:
            return None
        try:
            step = step_bytes(role.spaces)
        except ProtocolError as e:
            return "spaces", str(e)
        if step > self.settings.fragment_bytes:
            return "too_large", (
                f"one step of this simulator takes {step} bytes, a fragment may have {self.settings.fragment_bytes}: "
                f"start the broker with a larger --fragment-bytes"
            )
        if self.trainer is not None and self.trainer.state is not State.GONE:
            text = mismatch(role.spaces, self.trainer.hello.spaces)
            if text:
                return "spaces", f"{text}: start the simulator with the environment that the trainer was given"
        return None

    @property
    def _full_window(self) -> int:
        return self.settings.window_fragments * self.settings.fragment_bytes

    def _reserve(self, sim: Simulator) -> str:
        """Grant a window if there is room. The sum of all windows never exceeds `memory`."""
        missing = self._full_window - sim.window
        if missing <= 0:
            return ""
        if self.windows + missing > self.settings.memory:
            return (
                f"no window is free: {self.windows} of {self.settings.memory} bytes are granted to other simulators; "
                f"raise the broker's --memory or lower its --fragment-bytes"
            )
        sim.window += missing
        self.windows += missing
        return ""

    def _release_window(self, sim: Simulator, now: float) -> None:
        """Of a simulator that is gone: as much as its fragments don't fill. They stay until they are settled."""
        kept = min(sim.window, sim.open_bytes)
        if kept == sim.window:
            return
        self.windows -= sim.window - kept
        sim.window = kept
        for other in self.routes[Side.FRONT].values():
            if isinstance(other, Simulator) and other.window < self._full_window:
                if self._reserve(other):
                    break
                self._mark(other, now)

    # ---- single actions

    def _hello_reader(self, hello: HELLO, event: Received, now: float) -> None:
        old = self.readers.get(hello.session)
        if old is not None:
            if hello.greeting <= old.greeting:
                return
            self._lose(old, now)  # it asks again for what it still wants
        reader = self.readers[hello.session] = Reader(hello.session, now)
        self._enter(reader, hello, event.route, now)
        self._welcome(reader)

    def _hello_service(self, hello: HELLO, role: ServiceHello, event: Received, now: float) -> None:
        if role.run < self.run:
            text = f"run {role.run} has ended, the broker serves {self.run}: this runner's trainer was replaced"
            self._refuse(event.side, event.route, "old_run", text, now, fatal=True, greeting=hello.greeting)
            return
        for old in [s for s in self.services if s.session == hello.session]:
            if hello.greeting <= old.greeting:
                return
            self.returning = hello.session
            self._lose(old, now)
            self.returning = b""
        service = Service(hello.session, now, role.run)
        self._enter(service, hello, event.route, now)
        self._welcome(service)
        if role.run == self.run:
            service.followed = sum(reader.follower == service.session for reader in self.readers.values())
            self.services.append(service)
            self._serve_all(now)

    # ---- runners

    def _hello_runner(self, hello: HELLO, role: RunnerHello, event: Received, now: float) -> None:
        runner = self.runners.get(hello.session)
        if runner is not None and hello.greeting <= runner.greeting:
            return
        if role.run < self.run:
            text = f"run {role.run} has ended, the broker serves {self.run}: this runner's trainer was replaced"
            self._refuse(event.side, event.route, "old_run", text, now, fatal=True, greeting=hello.greeting)
            return
        if runner is None:
            runner = self.runners[hello.session] = Runner(hello.session, now)
        self._end_evaluation(runner, now)  # it says anew what it wants
        # What it was leased on the old connection is not waited for: TAKE would be refused.
        self._requeue(runner.leased, Move.UNLEASE)
        self._enter(runner, hello, event.route, now)
        runner.run, runner.evaluates, runner.offers, self._pool = role.run, role.evaluation, {}, None
        self._source_lost(runner, now)  # what was asked on the old connection is not waited for
        self._give(runner, role.returned, role.dropped, now)
        for k in sorted((k for k in runner.takes if k > role.committed), reverse=True):
            never_acted_upon = runner.takes.pop(k)
            self._uncount(never_acted_upon, now)
            self._requeue(never_acted_upon, Move.UNTAKE)
        self.reports.add(runner.session, role, now)
        self._apply_reports(runner, role, now)
        self._welcome(runner)
        self._tell_duty(runner)

    def _uncount(self, fragments: Iterable[Fragment], now: float) -> None:
        """These will be taken anew: their steps have not been."""
        for fragment in fragments:
            if fragment.round is not None:
                self.taken_steps -= fragment.header.steps
                self._missed(fragment, now)

    def _missed(self, fragment: Fragment, now: float) -> None:
        """RLlib won't have what its runner took: the round wants as many steps in its place."""
        if fragment.round is not None and fragment.round == self.version:
            self.round_steps -= self.counting.of(fragment.header)
            if self.fresh:
                self._mark_all(now)
        fragment.round = None

    def _apply_reports(self, runner: Runner, role: RunnerHello, now: float) -> None:
        """Fragments that were resent to this broker before the runner that handed them over could say so."""
        for handed in role.handed:
            sim = self.simulators.get(handed.session)
            if sim is None:
                continue
            self.reports.pass_base(sim.session, sim.base)
            known = self.reports.of(handed.session) or {}
            for number, k in zip(handed.numbers, handed.takes, strict=False):
                fragment = sim.open.get(number)
                if fragment is None or fragment.state is Life.TAKEN:
                    continue
                if fragment.state is Life.LEASED:
                    self._requeue([fragment], Move.UNLEASE)
                report = known.get(number, DELIVERED)
                if isinstance(report, str):
                    fragment.move(Move.RETURN)
                    self._settle(fragment, report, now)
                else:
                    self._hold_for(fragment, runner, k, now)

    def _expel(self, peer: Peer, code: str, text: str, now: float) -> None:
        """Refuse a live peer for good."""
        self._refuse(peer.side, peer.route, code, text, now, fatal=True)
        self._leave(peer, now)

    # ---- the trainer

    def _hello_trainer(self, hello: HELLO, role: TrainerHello, event: Received, now: float) -> None:
        def no(code: str, text: str, *, fatal: bool) -> None:
            self._refuse(event.side, event.route, code, text, now, fatal=fatal, greeting=hello.greeting)

        old = self.trainer
        if old is not None and old.session == hello.session:
            if hello.greeting <= old.greeting:
                return None
        elif old is not None and old.state is State.LIVE:
            self._send(old, self.pong(old, now))  # if it is gone this shows it, and the next try is accepted
            return no("trainer_present", f"this broker already serves the trainer '{old.name}' (run {old.hello.run}): "
                      f"stop it, or start a broker of its own for each training", fatal=False)  # fmt: skip
        try:
            check_agents(role.spaces)
        except ProtocolError as e:
            return no("spaces", str(e), fatal=True)
        if role.run < self.run:
            return no(
                "old_run", f"run {role.run} is older than {self.run}, the last one this broker served", fatal=True
            )
        if old is not None and old.session == hello.session:
            trainer = old
            trainer.hello = role
        else:
            trainer = Trainer(hello.session, now, role)
        if self.holding:  # fewer are wanted now: those of before may have something to report all the same
            self.expected = max(self.expected, role.runners)
        if trainer is not old or role.runners == self.wanted:
            self.wanted = None
        self.trainer = trainer
        self._enter(trainer, hello, event.route, now)
        if role.run != self.run:
            self.run = role.run
            self._pool = None
            for peer in list(self.routes[Side.BACK].values()):
                if isinstance(peer, Runner | Service) and peer.run < role.run:
                    self._expel(peer, "old_run", f"run {peer.run} has ended, the broker serves {self.run} now", now)
                elif isinstance(peer, Service) and peer.run == role.run and peer not in self.services:
                    self.services.append(peer)
            if self.services:
                self._serve_all(now)
            self._say(logging.INFO, "run", f"trainer '{trainer.name}' began run {self.run}", now)
        self._welcome(trainer)
        self._assign(role.duties)
        self._begin_run(trainer, now)
        self._announce(now)
        for peer in list(self.routes[Side.FRONT].values()):
            if isinstance(peer, Simulator) and peer.spaces is not None:
                text = mismatch(peer.spaces, role.spaces)
                if text:
                    self._expel(peer, "spaces", f"{text}: start it with the trainer's environment", now)
        return self._mark_all(now)

    # ---- ways out

    def _unreachable(self, side: Side, route: bytes, now: float) -> None:
        peer = self.routes[side].get(route)
        if peer is not None:
            self._lose(peer, now)

    def _lose(self, peer: Peer, now: float) -> None:
        """The connection is gone; the process may come back."""
        self._pool = None
        self._unroute(peer)
        peer.move(Verb.LOSE, now)
        if isinstance(peer, Simulator):
            self.simulators_live -= 1
            self._dirty.pop(peer, None)
            self._give_up_all(peer, now)
        elif isinstance(peer, Runner):
            self._end_evaluation(peer, now)
            self._requeue(peer.leased, Move.UNLEASE)
            self._say(logging.WARNING, f"lost {peer.name}", f"lost the connection to runner '{peer.name}'", now)
            if peer.duty == "end":
                return self._forget(peer, Verb.EXPIRE, now)
        elif isinstance(peer, Reader):
            self._asker_lost(peer)
        elif isinstance(peer, Service):
            self._service_lost(peer, now)
        elif isinstance(peer, Trainer):
            self._say(logging.WARNING, "lost trainer", f"lost the connection to trainer '{peer.name}'", now)
        return self._source_lost(peer, now)

    def _unroute(self, peer: Peer) -> None:
        routes = self.routes[peer.side]
        if routes.get(peer.route) is peer:
            del routes[peer.route]

    def _bye(self, peer: Peer, message: BYE, event: Received, now: float) -> None:
        if isinstance(peer, Runner):
            self._give(peer, message.returned, message.dropped, now)
        self._leave(peer, now)

    def _leave(self, peer: Peer, now: float) -> None:
        """A live or lost peer will not be waited for any longer."""
        if peer.state is State.LIVE:
            self._unroute(peer)
            if isinstance(peer, Simulator):
                self.simulators_live -= 1
        self._forget(peer, Verb.LEAVE, now)

    def _forget(self, peer: Peer, verb: Verb, now: float) -> None:
        self._pool = None
        peer.move(verb, now)
        if isinstance(peer, Simulator):
            self._dirty.pop(peer, None)
            self._count(peer, -1)
            self.unfinished["abandoned" if verb is Verb.LEAVE else "lost"] += min(len(peer.owners), peer.episodes)
            peer.owners.clear()
            self._give_up_all(peer, now)
            self._release_window(peer, now)
        elif isinstance(peer, Runner):
            self._end_evaluation(peer, now)
            self._requeue(peer.leased, Move.UNLEASE)
            for k in list(peer.takes):
                for fragment in peer.takes.pop(k):
                    self._missed(fragment, now)
                    fragment.move(Move.CUT)
                    self._settle(fragment, "handover_cut", now)
            self.reports.resolve(peer.session, 1 << 62, "handover_cut", {})
        elif isinstance(peer, Reader):
            self._asker_lost(peer)
        elif isinstance(peer, Service):
            self._service_lost(peer, now)
        self._source_lost(peer, now)

    # ---- time

    def _sweep(self, now: float) -> None:
        """Judge who is silent, lost or gone for too long. Once a `probe_interval`, after everything was read."""
        s = self.settings
        for peer in list(self.routes[Side.BACK].values()):
            silent = now - peer.heard
            if silent > s.runner_silence:
                self._lose(peer, now)
            elif silent > s.probe_interval:
                self._send(peer, self.pong(peer, now))
        for peer in self.routes[Side.FRONT].values():
            if now - peer.heard > s.simulator_silence:
                self._send(peer, self.pong(peer, now))
        for sim in list(self.simulators.values()):
            if sim.state is State.LOST and now - sim.since > s.simulator_grace:
                self._forget(sim, Verb.EXPIRE, now)
            elif sim.state is State.GONE and not sim.open and now - sim.since > s.outcome_keep:
                del self.simulators[sim.session]
        for runner in list(self.runners.values()):
            if runner.state is State.LOST and (runner.duty == "end" or now - runner.since > s.runner_grace):
                self._forget(runner, Verb.EXPIRE, now)
            elif runner.state is State.GONE and now - runner.since > s.outcome_keep:
                del self.runners[runner.session]
        self._watch_sharers(now)
        self.reports.expire(now - s.outcome_keep)
