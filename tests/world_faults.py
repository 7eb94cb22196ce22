"""What befalls a world: kinds of faults, and schedules of them drawn from a seed.

`kill`, `pause`: of a runner. `broker`: killed, and started again empty. `cut`: of a connection. `sim`: a simulator is
killed and another one started. `scale` is no failure: somebody asks for another number of runners.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("kill", "pause", "broker", "cut", "sim", "scale")
AIMS = ("HELLO", "HELLO", "WELCOME", "TAKE", "TAKEN", "RETURNED", "ACK", "FRAGMENT", "REFUSED")
SCALE_AIMS = ("HELLO", "WELCOME", "TAKE", "TAKEN", "RETURNED", "POOL", "DUTY", "BYE", "FRAGMENT")
MOST_RUNNERS = 5


class Fault(NamedTuple):
    """`victim`: an index, taken modulo what there is; of `scale` it tells the numbers asked for. `span`: seconds
    stopped, down, at 0 runners, or until a restart. `aim`: strike while the next message of this name is on its way,
    at its connection or its peer."""

    time: float
    kind: str
    victim: int
    span: float
    aim: str = ""

    @property
    def target(self) -> int:
        """How many runners `scale` asks for."""
        return self.victim % (MOST_RUNNERS + 1)

    @property
    def back(self) -> int:
        """How many runners are asked for `span` seconds after a `scale` to 0."""
        return 1 + self.victim // (MOST_RUNNERS + 1) % MOST_RUNNERS


def draw(r: random.Random, kinds: Sequence[str]) -> list[Fault]:
    """2 to 5 faults of these kinds, many of them close together. `time` counts from the start."""
    times: list[float] = []
    for _ in range(r.randint(2, 5)):
        near = times and r.random() < 0.4
        times.append(times[-1] + r.uniform(0, 0.3) if near else r.uniform(0.3, 5.0))
    return [fault(r, t, r.choice(kinds)) for t in sorted(times)]


def draw_apart(r: random.Random, kinds: Sequence[str]) -> list[Fault]:
    """2 or 3 faults of these kinds, one after the other. `time` counts from when the one before has healed."""
    return [fault(r, r.uniform(0.0, 1.0), r.choice(kinds)) for _ in range(r.choice((2, 2, 2, 3)))]


def fault(r: random.Random, t: float, kind: str) -> Fault:
    aims = SCALE_AIMS if kind == "scale" else AIMS
    return Fault(t, kind, r.randrange(60), _span(r, kind), r.choice(aims) if r.random() < 0.4 else "")


def _span(r: random.Random, kind: str) -> float:
    if kind == "kill":
        return r.uniform(0.5, 4.0)
    if kind == "pause":
        return r.choice((r.uniform(0.1, 3.0), r.uniform(0.1, 3.0), r.uniform(3.0, 15.0), r.uniform(10.0, 30.0)))
    if kind == "broker":
        return r.choice((r.uniform(0.05, 0.5), r.uniform(0.5, 8.0)))
    if kind == "scale":
        return r.uniform(0.5, 5.0)
    return r.uniform(0.0, 2.0) if kind == "sim" else 0.0
