"""A broker core on a bench: peers are names, time stands still until it is told to pass, and what the core wants done
comes back as a list of (peer's name, message)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, TypeAlias

from broker.core import Broker
from broker.events import Action, Event, Forward, Log, Malformed, Publish, Received, Send, Side, Tick, Unreachable
from broker.settings import Settings
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import (
    BYE,
    CONFIG,
    DELIVERED,
    FRAGMENT,
    HELLO,
    OFFER,
    PROTOCOL_VERSION,
    RETURNED,
    STATE,
    TAKE,
    WELCOME,
    BoxSpace,
    Claim,
    Column,
    DiscreteSpace,
    Dropped,
    Message,
    RunnerHello,
    SimulatorHello,
    Spaces,
    TrainerHello,
)

Said: TypeAlias = list[tuple[str, Any]]

RUN, NEXT_RUN = "018f00000000-00000001", "018f00000001-00000001"
SPACES = Spaces(BoxSpace((4,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(2))
POLICY = "p" * 16
BLOB = b"an exported policy"
WEIGHTS = b"sixteen bytes! +"
EPOCH = b"epoch 01"


def session(name: str) -> bytes:
    """The session of the peer `name` (what follows a "/" is another connection of the same session)."""
    return name.partition("/")[0].encode().rjust(16, b".")


def terms(run: str = RUN, **changes: Any) -> TrainerHello:
    fields: dict[str, Any] = {
        "run": run, "quota": 100, "lag_limit": 1, "steps_ahead": 0, "runners": 1, "fragment_steps": 50,
        "spaces": SPACES, "policy": POLICY, "policy_bytes": len(BLOB),
    }  # fmt: skip
    return TrainerHello(**(fields | changes))


def fragment(name: str, number: int, *, steps: int = 10, base: int = 1, **changes: Any) -> FRAGMENT:
    """A fragment whose body has `steps` + 1 bytes."""
    fields: dict[str, Any] = {
        "session": session(name), "number": number, "base": base, "episode": "e1", "t0": 0, "steps": steps,
        "end": "no", "run": RUN, "version": 0, "return_so_far": 0.0,
        "columns": (Column("obs", "|u1", (steps + 1,)),),
    }  # fmt: skip
    return FRAGMENT(**(fields | changes))


def claim(name: str, *numbers: int) -> Claim:
    return Claim(session(name), list(numbers))


def dropped(name: str, number: int, reason: str) -> Dropped:
    return Dropped(session(name), number, reason)


class Bench:
    """Sends events, returns what the core said. A name that begins with "s" is on the front side."""

    def __init__(self, *, epoch: bytes = EPOCH, now: float = 100.0, **settings: Any) -> None:
        self.now = now
        self.broker = Broker(Settings(**settings), epoch, "tcp://127.0.0.1:5557", now)
        self.logs: list[str] = []
        self.greetings: dict[bytes, int] = {}

    # ---- events

    def handle(self, event: Event) -> Said:
        return [said for action in self.broker.handle(event, self.now) if (said := self._plain(action)) is not None]

    def send(self, name: str, message: Message, *body: bytes) -> Said:
        """`message` arrives from `name`."""
        if type(message) is FRAGMENT and not body:
            body = (bytes(message.steps + 1),)
        if type(message) is HELLO:
            self.greetings[message.session] = max(message.greeting, self.greetings.get(message.session, 0))
        size = sum(map(len, body))
        return self.handle(Received(self.side(name), name.encode(), message, [message, *body], size))  # type: ignore[list-item]

    def unreachable(self, name: str) -> Said:
        return self.handle(Unreachable(self.side(name), name.encode()))

    def malformed(
        self, name: str, text: str = "no header", code: str = "malformed", message: Message | None = None
    ) -> Said:
        return self.handle(Malformed(self.side(name), name.encode(), ProtocolError(text, code), message))

    def tick(self, seconds: float = 0.0) -> Said:
        """Time passes at once: everything that had arrived has been handled."""
        self.now += seconds
        return self.handle(Tick())

    def wait(self, seconds: float) -> Said:
        """Time passes, and every deadline is met when it is due."""
        said, end = [], self.now + seconds
        while (due := self.broker.next_deadline()) <= end:
            self.now = max(self.now, due)
            said += self.handle(Tick())
        self.now = end
        return said

    # ---- peers

    def hello(self, name: str, peer: Any, *, greeting: int = 0, protocol: int = PROTOCOL_VERSION) -> Said:
        """HELLO with the next greeting of the session, or this one."""
        who = session(name)
        greeting = greeting or self.greetings.get(who, 0) + 1
        return self.send(name, HELLO(protocol, who, greeting, peer, name.partition("/")[0], "0.1.0"))

    def simulator(self, name: str, **fields: Any) -> WELCOME:
        return self._welcome(name, self.hello(name, SimulatorHello(**({"spaces": SPACES} | fields))))

    def runner(self, name: str, run: str = RUN, **fields: Any) -> WELCOME:
        return self._welcome(name, self.hello(name, RunnerHello(run, **fields)))

    def trainer(self, name: str = "t", run: str = RUN, **fields: Any) -> WELCOME:
        return self._welcome(name, self.hello(name, terms(run, **fields)))

    def policy(self, name: str = "t") -> Said:
        return self.send(name, CONFIG(POLICY, len(BLOB)), BLOB)

    def weights(self, name: str, version: int, run: str = RUN) -> Said:
        """`name` offers a version and answers what it is asked."""
        data = WEIGHTS + b"%d" % version
        said = self.send(name, OFFER(run, version, len(data)))
        return said + self.send(name, STATE(run, version, len(data), 0, zlib.crc32(data)), data)

    def take(self, name: str, k: int, *claims: Claim, returned: int = 0) -> Said:
        return self.send(name, TAKE(k, list(claims), returned))

    def returned(self, name: str, k: int, *drops: Dropped) -> Said:
        return self.send(name, RETURNED(k, list(drops)))

    def bye(self, name: str, returned: int = 0) -> Said:
        return self.send(name, BYE(returned))

    # ---- answers

    def acks(self) -> dict[str, list[tuple[int, str]]]:
        """The outcomes that simulators are told once their ACKs are due."""
        settled: dict[str, list[tuple[int, str]]] = {}
        for name, message in self.tick(self.broker.settings.ack_interval):
            if type(message).__name__ == "ACK" and message.settled:
                settled.setdefault(name, []).extend(message.settled)
        return settled

    def ledger(self) -> dict[str, Any]:
        """Fragments: received, delivered, in flight, and dropped by reason."""
        ledger = self.broker.ledger
        return {
            "received": ledger.received[0],
            "delivered": ledger.delivered[0],
            "in_flight": ledger.in_flight[0],
            **{reason: n[0] for reason, n in ledger.dropped.items()},
        }

    @staticmethod
    def side(name: str) -> Side:
        return Side.FRONT if name.startswith("s") else Side.BACK

    def _plain(self, action: Action) -> tuple[str, Any] | None:
        if isinstance(action, Send):
            return action.route.decode(), action.message
        if isinstance(action, Forward):
            return action.route.decode(), action.frames[0]
        if isinstance(action, Publish):
            return "PUB", action.message
        assert isinstance(action, Log)
        self.logs.append(action.text)
        return None

    @staticmethod
    def _welcome(name: str, said: Said) -> WELCOME:
        welcomes = [m for to, m in said if to == name and isinstance(m, WELCOME)]
        assert len(welcomes) == 1, said
        return welcomes[0]


def leases(said: Said) -> list[tuple[str, str, int]]:
    """(runner, simulator, number) of the fragments leased."""
    return [(to, m.session.lstrip(b".").decode(), m.number) for to, m in said if isinstance(m, FRAGMENT)]


def messages(said: Said, kind: type, to: str | None = None) -> list[Any]:
    return [m for name, m in said if isinstance(m, kind) and to in (None, name)]


def training(bench: Bench, runners: Sequence[str] = ("r1",), **fields: Any) -> Bench:
    """The bench with a trainer, runners, the policy and weights of version 0 in place."""
    bench.trainer(**({"runners": len(runners)} | fields))
    bench.policy()
    for name in runners:
        bench.runner(name)
    bench.weights(runners[0], 0)
    bench.tick()
    bench.tick(0.05)
    return bench


__all__ = [
    "BLOB", "DELIVERED", "EPOCH", "NEXT_RUN", "POLICY", "RUN", "SPACES", "WEIGHTS", "Bench", "Said", "claim",
    "dropped", "fragment", "leases", "messages", "session", "terms", "training",
]  # fmt: skip
