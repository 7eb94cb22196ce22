"""A fragment's life in the broker, and the ledger.

The rules, all of them:

- `TABLE` holds every move there is; any other is a bug and raises.
- A taken fragment is never given to another runner. It goes back to `queued` only when the very session that took it
  greets again and says that it never acted upon that TAKEN.
- Every received fragment is in exactly one place: queued, leased, taken, or settled with one outcome.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from rllink_zmq.messages import DELIVERED, FRAGMENT
from rllink_zmq.wire import Buffer

if TYPE_CHECKING:
    from .peers import Runner, Simulator


class State(Enum):
    __hash__ = object.__hash__  # an Enum's own is Python code, and `move` is on every fragment's way
    QUEUED = "queued"
    LEASED = "leased"
    TAKEN = "taken"
    SETTLED = "settled"


class Verb(Enum):
    __hash__ = object.__hash__
    LEASE = "lease"  # sent to a runner
    UNLEASE = "unlease"  # that runner is lost, greets anew or leaves
    TAKE = "take"  # TAKE granted
    UNTAKE = "untake"  # the same runner session greets with committed < k
    RETURN = "return"  # RETURNED: RLlib has it, or the runner names why not
    CUT = "cut"  # the runner that took it will not be waited for any longer
    DROP = "drop"  # stale, of an old run, or not as its header says
    HOLD = "hold"  # resent after a restart, and a runner reports that it took it


TABLE: dict[tuple[State, Verb], State] = {
    (State.QUEUED, Verb.LEASE): State.LEASED,
    (State.QUEUED, Verb.DROP): State.SETTLED,
    (State.QUEUED, Verb.HOLD): State.TAKEN,
    (State.QUEUED, Verb.RETURN): State.SETTLED,
    (State.LEASED, Verb.UNLEASE): State.QUEUED,
    (State.LEASED, Verb.TAKE): State.TAKEN,
    (State.LEASED, Verb.DROP): State.SETTLED,
    (State.TAKEN, Verb.UNTAKE): State.QUEUED,
    (State.TAKEN, Verb.RETURN): State.SETTLED,
    (State.TAKEN, Verb.CUT): State.SETTLED,
}
"""(state, verb) -> state. A fragment that a runner reports as handed over already is settled with RETURN at once."""


MAX_REASONS = 48
"""Reasons that the ledger tells apart; runners may name their own, and PONG carries them all."""


class Fragment:
    """One fragment in flight. `frames` is what came, header first; `size` the bytes of its body. `round`: the weights
    version of the round that its steps count for, None while they do for none."""

    __slots__ = ("credited", "frames", "header", "k", "round", "runner", "simulator", "size", "state")

    def __init__(self, simulator: Simulator, header: FRAGMENT, frames: Sequence[Buffer], size: int) -> None:
        self.simulator = simulator
        self.header = header
        self.frames = frames
        self.size = size
        self.state = State.QUEUED
        self.runner: Runner | None = None
        self.k = 0
        self.credited = header.evaluation  # its steps are none of training's
        self.round: int | None = None

    def move(self, verb: Verb) -> None:
        """Raises `KeyError` for a move that `TABLE` doesn't list."""
        self.state = TABLE[self.state, verb]


class Ledger:
    """received = delivered + dropped + in flight, in fragments and in env steps, since this broker started."""

    __slots__ = ("delivered", "dropped", "in_flight", "received")

    def __init__(self) -> None:
        self.received = [0, 0]
        self.delivered = [0, 0]
        self.in_flight = [0, 0]
        self.dropped: dict[str, list[int]] = {}

    def receive(self, steps: int) -> None:
        self.received[0] += 1
        self.received[1] += steps
        self.in_flight[0] += 1
        self.in_flight[1] += steps

    def settle(self, steps: int, outcome: str) -> None:
        self.in_flight[0] -= 1
        self.in_flight[1] -= steps
        if outcome == DELIVERED:
            total = self.delivered
        else:
            if outcome not in self.dropped and len(self.dropped) >= MAX_REASONS:
                outcome = "other"
            total = self.dropped.setdefault(outcome, [0, 0])
        total[0] += 1
        total[1] += steps

    def balanced(self) -> bool:
        return all(
            self.received[i] == self.delivered[i] + self.in_flight[i] + sum(d[i] for d in self.dropped.values())
            for i in (0, 1)
        )

    def totals(self) -> dict[str, tuple[int, int]]:
        """name or reason -> (fragments, env steps), as PONG carries it."""
        named = {"received": self.received, "delivered": self.delivered, "in_flight": self.in_flight}
        return {name: (pair[0], pair[1]) for name, pair in (named | self.dropped).items()}

    def as_json(self) -> dict[str, object]:
        def pair(p: list[int]) -> dict[str, int]:
            return {"fragments": p[0], "steps": p[1]}

        return {
            "received": pair(self.received),
            "delivered": pair(self.delivered),
            "in_flight": pair(self.in_flight),
            "dropped": {reason: pair(p) for reason, p in sorted(self.dropped.items())},
        }
