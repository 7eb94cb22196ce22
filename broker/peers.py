"""Who is there: simulators, runners, the trainer, by session.

A routing id means one connection and nothing beyond it; a session is a process's own name for itself. `TABLE` holds
every move of a peer; the conversation starts, and starts again, with HELLO alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from enum import Enum

from rllink_zmq.messages import (
    ACT,
    DELIVERED,
    Duty,
    RunnerHello,
    SimulatorHello,
    Spaces,
    TrainerHello,
)
from rllink_zmq.wire import Buffer

from .events import Side
from .fragments import Fragment


class State(Enum):
    UNKNOWN = "unknown"
    LIVE = "live"
    LOST = "lost"
    GONE = "gone"


class Verb(Enum):
    GREET = "greet"  # HELLO with a newer greeting
    LOSE = "lose"  # EHOSTUNREACH, or silent for too long
    EXPIRE = "expire"  # lost for longer than its grace
    LEAVE = "leave"  # BYE, or refused for good


TABLE: dict[tuple[State, Verb], State] = {
    (State.UNKNOWN, Verb.GREET): State.LIVE,
    (State.LIVE, Verb.GREET): State.LIVE,
    (State.LIVE, Verb.LOSE): State.LOST,
    (State.LIVE, Verb.LEAVE): State.GONE,
    (State.LOST, Verb.GREET): State.LIVE,
    (State.LOST, Verb.EXPIRE): State.GONE,
    (State.LOST, Verb.LEAVE): State.GONE,
    (State.GONE, Verb.GREET): State.LIVE,
}
"""(state, verb) -> state."""


class Peer:
    """One session. `heard` and `since` are times of the last message and of the last change of state."""

    __slots__ = ("greeting", "heard", "name", "package", "route", "session", "since", "state")
    side = Side.BACK

    def __init__(self, session: bytes, now: float) -> None:
        self.session = session
        self.route = b""
        self.greeting = 0
        self.name = ""
        self.package = ""
        self.state = State.UNKNOWN
        self.heard = now
        self.since = now

    def move(self, verb: Verb, now: float) -> None:
        """Raises `KeyError` for a move that `TABLE` doesn't list."""
        self.state = TABLE[self.state, verb]
        self.since = now


class Simulator(Peer):
    """`high`: the highest number seen. `base`: all below are settled. `taken_steps`: env steps of this session that
    were taken or dropped, counted from its first step on. `heard_of_steps`: when its last new fragment came. `owners`:
    unfinished episode -> the runner that was leased its last fragment; `evaluating`: of those that are evaluated,
    oldest first. `only_evaluates`: it has sent fragments of evaluations, and no others. `asked_since`: when it was
    asked to serve one, or last left a place; `shirks`: it was, and did not begin. `outcomes`: number -> outcome,
    from `base` on."""

    __slots__ = ("acks", "asked_since", "base", "dropped", "episodes", "evaluating", "heard_of_steps", "high",
                 "only_evaluates", "open", "open_bytes", "outcomes", "owners", "shirks", "spaces", "taken_steps",
                 "window")  # fmt: skip
    side = Side.FRONT

    def __init__(self, session: bytes, now: float) -> None:
        super().__init__(session, now)
        self.high = 0
        self.base = 1
        self.taken_steps = 0
        self.heard_of_steps = now
        self.episodes = 1
        self.window = 0
        self.open: dict[int, Fragment] = {}
        self.open_bytes = 0
        self.outcomes: dict[int, str] = {}
        self.acks: list[tuple[int, str]] = []
        self.owners: dict[str, Runner] = {}
        self.evaluating: dict[str, Runner] = {}
        self.only_evaluates = False
        self.asked_since = now
        self.shirks = False
        self.spaces: Spaces | None = None
        self.dropped: dict[str, tuple[int, int]] = {}

    def greet(self, hello: SimulatorHello) -> None:
        self.high = max(self.high, hello.base - 1)
        self.pass_base(hello.base)
        self.taken_steps = max(self.taken_steps, hello.steps)
        self.episodes = hello.episodes
        self.spaces = hello.spaces

    @property
    def trains(self) -> bool:
        """It has sent steps to be trained on."""
        return bool(self.taken_steps) or any(not f.header.evaluation for f in self.open.values())

    def pass_base(self, base: int) -> None:
        """Forget the outcomes below `base`: the simulator has them."""
        if base <= self.base:
            return
        if base - self.base > len(self.outcomes):
            self.outcomes = {n: o for n, o in self.outcomes.items() if n >= base}
        else:
            for n in range(self.base, base):
                self.outcomes.pop(n, None)
        self.base = base


class Evaluation:
    """What an evaluation runner wants: `left` more episodes that begin with `version` of the weights, or a newer one.
    `open`: those that have begun and go on. `waiting`: fragments that its runner has no room for."""

    __slots__ = ("left", "open", "version", "waiting")

    def __init__(self, version: int, episodes: int) -> None:
        self.version = version
        self.left = episodes
        self.open: dict[tuple[Simulator, str], None] = {}
        self.waiting: deque[Fragment] = deque()


class Runner(Peer):
    """`leased`: sent to it, in order, not taken. `takes`: k -> fragments taken with it, until RETURNED.
    `duty`: what the trainer wants of it. `evaluates`: it is of the pool that evaluates, and gets nothing else."""

    __slots__ = ("assigned_steps", "duty", "evaluates", "evaluation", "leased", "leased_bytes", "leased_steps",
                 "offers", "returned", "run", "takes")  # fmt: skip

    def __init__(self, session: bytes, now: float) -> None:
        super().__init__(session, now)
        self.run = ""
        self.duty: Duty = "serve"
        self.returned = 0
        self.leased: dict[Fragment, None] = {}
        self.leased_steps = 0
        self.leased_bytes = 0
        self.assigned_steps = 0
        self.takes: dict[int, list[Fragment]] = {}
        self.offers: dict[str, tuple[int, int]] = {}
        self.evaluates = False
        self.evaluation: Evaluation | None = None

    def lease(self, fragment: Fragment) -> None:
        self.leased[fragment] = None
        steps = fragment.header.steps
        self.leased_steps += steps
        self.assigned_steps += steps
        self.leased_bytes += fragment.size

    def unlease(self, fragment: Fragment) -> None:
        del self.leased[fragment]
        self.leased_steps -= fragment.header.steps
        self.leased_bytes -= fragment.size


class Trainer(Peer):
    __slots__ = ("hello",)

    def __init__(self, session: bytes, now: float, hello: TrainerHello) -> None:
        super().__init__(session, now)
        self.hello = hello


class Observer(Peer):
    """Asks for the spaces of the first simulator, and leaves."""

    __slots__ = ()


class Request:
    """An ACT that has no answer yet. `service`: who computes it, None while nobody can; `since`: for how long.
    `follows`: it is of episodes that a service follows, `follower`: the session of that, if one does already."""

    __slots__ = ("follower", "follows", "frames", "key", "reader", "rows", "service", "since", "size")

    def __init__(self, reader: Reader, message: ACT, frames: Sequence[Buffer], size: int, now: float) -> None:
        self.reader = reader
        self.key = (message.session, message.request)
        self.rows = message.rows
        self.follows = bool(message.places)
        self.follower = message.follower
        self.frames = frames
        self.size = size
        self.service: Service | None = None
        self.since = now


class Reader(Peer):
    """Asks for policy, weights and actions. `requests`: its open ones, by number; `act_bytes`: of their bodies.
    `follower`: the session of the service that follows its episodes, as far as that is known."""

    __slots__ = ("act_bytes", "follower", "requests")
    side = Side.FRONT

    def __init__(self, session: bytes, now: float) -> None:
        super().__init__(session, now)
        self.requests: dict[int, Request] = {}
        self.act_bytes = 0
        self.follower = b""


class Service(Peer):
    """Computes actions. `open`: the requests it has, oldest first; `rows`: their observations. `answered`: when it last
    did. `late`: something had to be moved from it, and it has not answered since. `followed`: how many readers it
    follows the episodes of."""

    __slots__ = ("answered", "followed", "late", "open", "rows", "run")

    def __init__(self, session: bytes, now: float, run: str) -> None:
        super().__init__(session, now)
        self.run = run
        self.open: dict[tuple[bytes, int], Request] = {}
        self.rows = 0
        self.answered = now
        self.late = False
        self.followed = 0


class Reports:
    """What runners said at their greetings of fragments whose simulator may yet resend them to a broker that has just
    started: session -> number -> an outcome, or (runner session, k) while RLlib may not have it."""

    def __init__(self) -> None:
        self._of: dict[bytes, dict[int, str | tuple[bytes, int]]] = {}
        self._heard: dict[bytes, float] = {}

    def add(self, runner: bytes, hello: RunnerHello, now: float) -> None:
        for handed in hello.handed:
            known = self._of.setdefault(handed.session, {})
            self._heard[handed.session] = now
            for number, k in zip(handed.numbers, handed.takes, strict=False):
                known[number] = DELIVERED if k <= hello.returned else (runner, k)
        for drop in hello.dropped:
            self._of.setdefault(drop.session, {})[drop.number] = drop.reason
            self._heard[drop.session] = now

    def of(self, session: bytes) -> dict[int, str | tuple[bytes, int]] | None:
        return self._of.get(session)

    def pass_base(self, session: bytes, base: int) -> None:
        known = self._of.get(session)
        if known is None:
            return
        for number in [n for n in known if n < base]:
            del known[number]
        if not known:
            del self._of[session], self._heard[session]

    def resolve(self, runner: bytes, upto: int, outcome: str, dropped: dict[tuple[bytes, int], str]) -> None:
        """What `runner` held with k <= `upto` now has its outcome."""
        for session, known in self._of.items():
            for number, held in known.items():
                if isinstance(held, tuple) and held[0] == runner and held[1] <= upto:
                    known[number] = dropped.get((session, number), outcome)

    def expire(self, before: float) -> None:
        for session in [s for s, t in self._heard.items() if t < before]:
            del self._of[session], self._heard[session]

    def __bool__(self) -> bool:
        return bool(self._of)


def live(peers: dict[bytes, Runner]) -> Iterator[Runner]:
    return (p for p in peers.values() if p.state is State.LIVE)
