"""The world finds bugs: each of these rules of the protocol is broken on purpose, and a run must fail for it that is
perfect while the rule holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from msgspec.structs import replace
from world import World

from broker import peers
from broker.core import Broker
from broker.events import Action, Event, Received, Send
from broker.fragments import Verb
from rllink_zmq.arrays import Buffer
from rllink_zmq.messages import DELIVERED, FRAGMENT, HELLO, TAKEN
from rllink_zmq.session import SimulatorSession, State
from rllink_zmq.session_runner import RunnerSession


class GreetingsUnordered(Broker):
    """Any HELLO counts, an older one that comes late too."""

    def _hello(self, hello: HELLO, event: Received, now: float) -> None:
        for known in (self.simulators, self.runners):
            if hello.session in known:
                known[hello.session].greeting = 0
        super()._hello(hello, event, now)


class OutcomesForgotten(Broker):
    """What became of a fragment is told once, and not kept for a repeat."""

    def _settle(self, fragment: Any, outcome: str, now: float) -> None:
        super()._settle(fragment, outcome, now)
        del fragment.simulator.outcomes[fragment.header.number]


class RepeatsDelivered(Broker):
    """Whatever became of a fragment, its repeat is answered with `delivered`."""

    def _settle(self, fragment: Any, outcome: str, now: float) -> None:
        super()._settle(fragment, outcome, now)
        fragment.simulator.outcomes[fragment.header.number] = DELIVERED


class SpeaksBeforeWelcome(SimulatorSession):
    """New fragments go out while the greeting is unanswered, and the broker takes them."""

    def submit(self, **fields: Any) -> int:
        number = super().submit(**fields)
        if self.state is State.GREETING and self._hello_sent is not None:
            kept = self.unsettled[number]
            self._say(kept.message, fields["now"], kept.body)
        return number


class StrangersServed(Broker):
    """No REFUSED(greet): a fragment from an unknown routing id is taken as its session's."""

    def handle(self, event: Event, now: float) -> list[Action]:
        if type(event) is Received and event.route not in self.routes[event.side] and type(event.message) is not HELLO:
            if type(event.message) is not FRAGMENT:
                return []
            session = event.message.session
            sim = self.simulators.get(session)
            if sim is None:
                sim = self.simulators[session] = peers.Simulator(session, now)
                sim.high = event.message.base - 1
            hello = HELLO(1, session, sim.greeting or 1, peer=None, name=sim.name)  # type: ignore[arg-type]
            if sim.state in (peers.State.UNKNOWN, peers.State.GONE):
                self.episodes += sim.episodes
            self._enter(sim, hello, event.route, now)
            self._reserve(sim)
        return super().handle(event, now)


class ReturnedTooEarly(RunnerSession):
    """RETURNED goes out with the hand-over, before `sample()` has returned it."""

    def handle(self, message: Any, body: Sequence[Buffer], now: float) -> None:
        super().handle(message, body, now)
        if type(message) is TAKEN:
            self.give_back(now)


class TakenRequeued(Broker):
    """What a dead runner had taken goes to the next one."""

    def _forget(self, peer: Any, verb: peers.Verb, now: float) -> None:
        if isinstance(peer, peers.Runner):
            for k in list(peer.takes):
                self._requeue(peer.takes.pop(k), Verb.UNTAKE)
        super()._forget(peer, verb, now)


class NoGrace(Broker):
    """A runner whose connection is lost is dead at once, and what it took goes to the next one."""

    def _lose(self, peer: Any, now: float) -> None:
        super()._lose(peer, now)
        if isinstance(peer, peers.Runner):
            for k in list(peer.takes):
                self._requeue(peer.takes.pop(k), Verb.UNTAKE)


class NoHold(Broker):
    """A new broker leases at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.holding = False


class ReportsIgnored(Broker):
    """A new broker believes what simulators resend, and asks no runner."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reports.add = lambda *args: None  # type: ignore[method-assign]

    def _apply_reports(self, *args: Any) -> None:
        return None


class OwnerUnchecked(Broker):
    """TAKE is granted whoever has the fragment."""

    def handle(self, event: Event, now: float) -> list[Action]:
        return [
            replace(action, message=replace(action.message, refused=[]))
            if type(action) is Send and type(action.message) is TAKEN
            else action
            for action in super().handle(event, now)
        ]


class Planted(NamedTuple):
    """What is broken, by which faults it is found, and in which runs to look for it."""

    bug: type
    faults: tuple[str, ...]
    seeds: range

    def world(self, seed: int, *, broken: bool) -> World:
        roles = {Broker: "broker_class", RunnerSession: "runner_class", SimulatorSession: "simulator_class"}
        role = next(name for kind, name in roles.items() if issubclass(self.bug, kind))
        return World(seed, self.faults, **({role: self.bug} if broken else {}))


PLANTED = {
    "greeting number ignored": Planted(GreetingsUnordered, ("cut",), range(1100, 4000)),
    "outcome forgotten": Planted(OutcomesForgotten, ("cut",), range(600)),
    "repeats called delivered": Planted(RepeatsDelivered, ("cut",), range(600)),
    "a fragment accepted between HELLO and WELCOME": Planted(SpeaksBeforeWelcome, ("cut",), range(600)),
    "a fragment accepted before HELLO": Planted(StrangersServed, ("cut",), range(200)),
    "RETURNED sent before the return": Planted(ReturnedTooEarly, ("kill",), range(200)),
    "a taken fragment requeued": Planted(TakenRequeued, ("kill",), range(60)),
    "a taken fragment requeued when a connection is lost": Planted(NoGrace, ("cut",), range(200)),
    "no wait after a broker restart": Planted(NoHold, ("broker",), range(3000)),
    "no reports after a broker restart": Planted(ReportsIgnored, ("broker",), range(600)),
    "owner check forgotten": Planted(OwnerUnchecked, ("cut",), range(600)),
}


def imperfect(world: World) -> bool:
    """Whether the run shows a fault: a wrong verdict, or an exception (an invariant, a move that no table lists)."""
    try:
        return not world.run().perfect
    except (AssertionError, KeyError):
        return True


@pytest.mark.parametrize("name", PLANTED)
def test_a_bug_that_was_planted_is_found(name: str) -> None:
    planted = PLANTED[name]
    seed = next((s for s in planted.seeds if imperfect(planted.world(s, broken=True))), None)
    assert seed is not None, f"{name}: nothing wrong in {planted.seeds}"
    assert not imperfect(planted.world(seed, broken=False)), f"{name}: seed {seed} fails without the bug, too"
