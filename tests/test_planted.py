"""The world finds bugs: each of these rules of the protocol is broken on purpose, and a run must fail for it."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from world import World

from broker import peers
from broker.core import Broker
from broker.events import Action, Event, Received, Send
from broker.fragments import Verb
from rllink_zmq.messages import DELIVERED, FRAGMENT, HELLO, TAKEN


class GreetingsUnordered(Broker):
    """Any HELLO counts, an older one that comes late too."""

    def _hello(self, hello: HELLO, event: Received, now: float) -> None:
        for known in (self.simulators, self.runners):
            if hello.session in known:
                known[hello.session].greeting = 0
        super()._hello(hello, event, now)


class TakeUnfenced(Broker):
    """TAKE is granted whoever has the fragment."""

    def handle(self, event: Event, now: float) -> list[Action]:
        return [
            action._replace(message=replace(action.message, refused=[]))
            if type(action) is Send and type(action.message) is TAKEN
            else action
            for action in super().handle(event, now)
        ]


class TakenRequeued(Broker):
    """What a dead runner had taken goes to the next one."""

    def _forget(self, peer: Any, verb: peers.Verb, now: float) -> None:
        if isinstance(peer, peers.Runner):
            for k in list(peer.takes):
                self._requeue(peer.takes.pop(k), Verb.UNTAKE)
        super()._forget(peer, verb, now)


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


class ReportsIgnored(Broker):
    """A new broker believes what simulators resend, and asks no runner."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reports.add = lambda *args: None  # type: ignore[method-assign]

    def _apply_reports(self, *args: Any) -> None:
        return None


class RepeatsDelivered(Broker):
    """Whatever became of a fragment, its repeat is answered with `delivered`."""

    def _settle(self, fragment: Any, outcome: str, now: float) -> None:
        super()._settle(fragment, outcome, now)
        fragment.simulator.outcomes[fragment.header.number] = DELIVERED


class NoHold(Broker):
    """A new broker leases at once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.holding = False


class NoGrace(Broker):
    """A runner whose connection is lost is dead at once, and what it took goes to the next one."""

    def _lose(self, peer: Any, now: float) -> None:
        super()._lose(peer, now)
        if isinstance(peer, peers.Runner):
            for k in list(peer.takes):
                self._requeue(peer.takes.pop(k), Verb.UNTAKE)


PLANTED: list[tuple[type[Broker], tuple[str, ...], int]] = [
    (GreetingsUnordered, ("cut",), 4000),
    (TakeUnfenced, ("cut",), 600),
    (TakenRequeued, ("kill",), 60),
    (StrangersServed, ("cut",), 200),
    (ReportsIgnored, ("broker",), 600),
    (RepeatsDelivered, ("cut",), 600),
    (NoHold, ("broker",), 3000),
    (NoGrace, ("cut",), 200),
]
"""What is broken, by which faults it is found, and in how many runs at most."""


def imperfect(world: World) -> bool:
    """Whether the run shows a fault: a wrong verdict, or an exception (an invariant, a move that no table lists)."""
    try:
        return not world.run().perfect
    except (AssertionError, KeyError):
        return True


@pytest.mark.parametrize(("broker", "faults", "runs"), PLANTED, ids=lambda x: x.__name__ if isinstance(x, type) else "")
def test_a_broken_rule_is_found(broker: type[Broker], faults: tuple[str, ...], runs: int) -> None:
    assert any(imperfect(World(seed, faults, broker_class=broker)) for seed in range(runs)), (
        f"{broker.__name__}: no fault found in {runs} runs"
    )
