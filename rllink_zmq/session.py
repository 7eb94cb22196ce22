"""Sans-IO endpoints: what a peer says, when, and what it makes of the answers. No socket and no clock in here.

An `Endpoint` is one session. Feed it what came (`receive`), the time (`tick`), and failed sends (`send_failed`);
carry out what it queued (`output`), and open a new connection when `reconnect` is set. `STATES` holds every move.

- Between HELLO and WELCOME nothing is sent but PING: anything else could overtake what is resent.
- A send that failed, or REFUSED(`greet`), means: greet again. On WELCOME all unsettled fragments go out in order.
- Silence is judged only after a look that found nothing to read, never after a pause of this process.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from rllink_zmq.arrays import Buffer
from rllink_zmq.errors import RefusedError
from rllink_zmq.messages import (
    ACK,
    ACT,
    ACTION,
    BYE,
    DELIVERED,
    FRAGMENT,
    HELLO,
    PING,
    PONG,
    PROTOCOL_VERSION,
    REFUSED,
    WELCOME,
    AgentId,
    AgentRows,
    Column,
    Hello,
    Message,
    Place,
    ReaderHello,
    Segment,
    SimulatorHello,
    Spaces,
    Told,
)


class State(Enum):
    CLOSED = "closed"
    GREETING = "greeting"
    LIVE = "live"
    REFUSED = "refused"


class Verb(Enum):
    OPEN = "open"  # the application starts
    WELCOME = "welcome"  # WELCOME for the newest greeting
    REGREET = "regreet"  # REFUSED(greet), a failed send, silence
    REFUSE = "refuse"  # REFUSED, fatal
    CLOSE = "close"  # the application ends


STATES: dict[tuple[State, Verb], State] = {
    (State.CLOSED, Verb.OPEN): State.GREETING,
    (State.GREETING, Verb.WELCOME): State.LIVE,
    (State.GREETING, Verb.REGREET): State.GREETING,
    (State.GREETING, Verb.REFUSE): State.REFUSED,
    (State.GREETING, Verb.CLOSE): State.CLOSED,
    (State.LIVE, Verb.WELCOME): State.LIVE,
    (State.LIVE, Verb.REGREET): State.GREETING,
    (State.LIVE, Verb.REFUSE): State.REFUSED,
    (State.LIVE, Verb.CLOSE): State.CLOSED,
    (State.REFUSED, Verb.CLOSE): State.CLOSED,
}
"""(state, verb) -> state."""


class Timing(NamedTuple):
    """Seconds. `ping`: after this long without a send, one PING. `silence`: a PING unanswered for this long means a new
    connection. `retry`, `retry_most`: between greetings, doubling, with jitter. `answer`: how long a HELLO that could
    be sent may go unanswered before the connection is replaced."""

    ping: float = 15.0
    silence: float = 30.0
    retry: float = 0.1
    retry_most: float = 1.0
    answer: float = 5.0


class Outgoing(NamedTuple):
    message: Message
    body: Sequence[Buffer] = ()


class Endpoint:
    """One session. `session`: 16 random bytes; `rng` makes the jitter."""

    def __init__(self, session: bytes, name: str, package: str, timing: Timing, rng: random.Random) -> None:
        self.session = session
        self.name = name
        self.package = package
        self.timing = timing
        self.state = State.CLOSED
        self.greeting = 0
        self.epoch = b""
        self.run = ""
        self.version = -1
        self.modules: Mapping[str, int] = {}
        self.policy = ""
        self.output: list[Outgoing] = []
        self.reconnect = False
        self.refusal: RefusedError | None = None
        self.notice = ""
        self._rng = rng
        self._retry = timing.retry
        self._hello_due = 0.0
        self._hello_sent: float | None = None
        self._sent = 0.0
        self._pinged: float | None = None

    # ---- the application's side

    def open(self, now: float) -> None:
        """Begin to greet."""
        self._move(Verb.OPEN)
        self._greet(now)

    def close(self, now: float) -> None:
        """Say BYE and be done. What was queued goes out first."""
        if self.state is State.LIVE:
            self._say(self.farewell(), now)
        if self.state is not State.CLOSED:
            self._move(Verb.CLOSE)

    def farewell(self) -> BYE:
        return BYE()

    def hello(self) -> Hello:
        """The role-specific part of HELLO, as of now."""
        raise NotImplementedError

    # ---- the transport's side

    def receive(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        """What came. Messages that this state or role has no use for are ignored: they are from another time."""
        self._pinged = None
        if isinstance(message, WELCOME):
            if message.greeting == self.greeting and self.state in (State.GREETING, State.LIVE):
                self._move(Verb.WELCOME)
                self._retry = self.timing.retry
                self._hello_sent = None
                self.notice = message.text
                self.epoch = message.epoch
                self._learn(message)
                self.welcomed(message, now)
        elif isinstance(message, REFUSED):
            self._refused(message, now)
        elif self.state is State.LIVE:
            if isinstance(message, PONG):
                self._learn(message)
            self.handle(message, body, now)

    def welcomed(self, message: WELCOME, now: float) -> None:
        """The conversation has started (again)."""

    def handle(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        """Anything else that comes while the session is live."""

    def send_failed(self, now: float) -> None:
        """A message could not be sent: no connection, or a full queue. It is lost, and so may be others."""
        self.output.clear()
        if self.state is State.LIVE:
            self._move(Verb.REGREET)
        if self.state is State.GREETING:
            self._hello_sent = None
            self._later(now)

    def reconnected(self, now: float) -> None:
        """The connection was gone and is back: perhaps to another broker, and what was on its way may be lost."""
        if self.state is State.LIVE:
            self._move(Verb.REGREET)
        if self.state is State.GREETING:
            self._greet(now)

    def tick(self, now: float) -> None:
        """The time, after a look that found nothing to read."""
        if self.state is State.GREETING:
            if self._hello_sent is not None and now >= self._hello_sent + self.timing.answer:
                self.reconnect = True
                self._greet(now)
            elif self._hello_sent is None and now >= self._hello_due:
                self._greet(now)
        elif self.state is State.LIVE:
            if self._pinged is not None and now >= self._pinged + self.timing.silence:
                self.reconnect = True
                self._move(Verb.REGREET)
                self._greet(now)
            elif now >= self._sent + self.timing.ping:
                self._say(PING(), now)
                if self._pinged is None:
                    self._pinged = now

    def next_deadline(self) -> float:
        """When `tick` has something to do."""
        if self.state is State.GREETING:
            return self._hello_due if self._hello_sent is None else self._hello_sent + self.timing.answer
        if self.state is State.LIVE:
            due = self._sent + self.timing.ping
            return due if self._pinged is None else min(due, self._pinged + self.timing.silence)
        return float("inf")

    # ---- inside

    def _move(self, verb: Verb) -> None:
        self.state = STATES[self.state, verb]

    def _say(self, message: Message, now: float, body: Sequence[Buffer] = ()) -> None:
        self._sent = now
        self.output.append(Outgoing(message, body))

    def _greet(self, now: float) -> None:
        self.greeting += 1
        self._hello_sent = now
        self._pinged = None
        self.output.clear()
        self._say(
            HELLO(PROTOCOL_VERSION, self.session, self.greeting, self.hello(), self.name[:128], self.package), now
        )

    def _later(self, now: float) -> None:
        self._hello_due = now + self._retry * self._rng.uniform(0.5, 1.5)
        self._retry = min(self._retry * 2, self.timing.retry_most)

    def _refused(self, message: REFUSED, now: float) -> None:
        if message.greeting and message.greeting != self.greeting:
            return
        if message.fatal:
            if self.state in (State.GREETING, State.LIVE):
                self._move(Verb.REFUSE)
            self.refusal = RefusedError(message.code, message.text)
        elif message.code == "greet":
            # In GREETING a HELLO is on its way: the refusal is for what was sent before it.
            if self.state is State.LIVE:
                self._move(Verb.REGREET)
                self._greet(now)
        else:
            self.notice = message.text
            if message.greeting and self.state is State.GREETING:
                self._hello_sent = None
                self._later(now)

    def _learn(self, told: WELCOME | ACK | PONG) -> None:
        """Where training is: any message may say so, and an older one may come late."""
        run, version = told.run, told.version
        if run >= self.run:
            newer = run > self.run
            if newer or version >= self.version:
                self.modules = told.modules
            self.version = version if newer else max(self.version, version)
            self.run = run
            self.policy = told.policy or ("" if newer else self.policy)


class Unsettled(NamedTuple):
    """A fragment the simulator keeps until it has an outcome. `size`: bytes of its body."""

    message: FRAGMENT
    body: Sequence[Buffer]
    size: int


class SimulatorSession(Endpoint):
    """A simulator's end. `unsettled` in order of number; `window` in bytes, `steps_limit` in env steps of this session
    (0 = none), `fragment_steps` the length of a fragment: all as the broker told last. `evaluation`: the version that
    an evaluation wants episodes of, -1 = none does; `evaluates`: this simulator is to serve it. `sampled`: env
    steps that the training has sampled; `needs_logp`: its steps need the log-probabilities of their actions; `rounds`,
    `fresh`: they are to be by new weights at once, and by no older ones than `version`. Steps are those that are
    trained on."""

    def __init__(
        self,
        session: bytes,
        *,
        name: str = "",
        package: str = "",
        spaces: Spaces | None = None,
        episodes: int = 1,
        timing: Timing | None = None,
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(session, name, package, timing or Timing(), rng or random.Random(session))
        self.spaces = spaces
        self.trainer_spaces: Spaces | None = None
        self.episodes = episodes
        self.policy_held = ""
        self.number = 0
        self.unsettled: dict[int, Unsettled] = {}
        self.unsettled_bytes = 0
        self.unsettled_steps = 0
        self.settled_steps = 0
        self.window = 0
        self.steps_limit = 0
        self.fragment_steps = 1
        self.fragment_bytes = 0
        self.evaluation = -1
        self.evaluates = False
        self.sampled = 0
        self.needs_logp = True
        self.rounds = self.fresh = False
        self.weights_address = ""
        self.outcomes: dict[str, list[int]] = {}
        self.dropped: dict[str, tuple[int, int]] = {}
        self.on_settled: Callable[[FRAGMENT, str], None] | None = None
        self.on_message: Callable[[Message, Sequence[Buffer], float], None] | None = None

    def hello(self) -> SimulatorHello:
        return SimulatorHello(self.base, self.settled_steps, self.episodes, self.spaces, self.policy_held)

    @property
    def base(self) -> int:
        """Every number below it is settled."""
        return next(iter(self.unsettled), self.number + 1)

    def room(self, steps: int, size: int) -> bool:
        """Whether one more step may be taken with `steps` steps and `size` bytes built and not yet submitted."""
        if not self.window or self.unsettled_bytes + size > self.window:
            return False
        return not self.steps_limit or self.settled_steps + self.unsettled_steps + steps < self.steps_limit

    def submit(
        self,
        *,
        episode: str,
        t0: int,
        steps: int,
        end: str,
        run: str,
        version: int,
        return_so_far: float,
        columns: tuple[Column, ...],
        body: Sequence[Buffer],
        now: float,
        seconds: float = 0.0,
        timings: dict[str, float] | None = None,
        evaluation: bool = False,
        compression: str = "",
        segments: tuple[Segment, ...] = (),
        modules: dict[str, int] | None = None,
        agents: tuple[AgentRows, ...] = (),
    ) -> int:
        """Send a fragment, keep it until it is settled, and return its number."""
        base = self.base  # of the time before: nothing unsettled makes this very fragment the first one
        self.number += 1
        message = FRAGMENT(
            self.session, self.number, base, episode, t0, steps, end, run, version, return_so_far, columns,  # type: ignore[arg-type]
            seconds=seconds, timings=timings or {}, dropped=self.dropped, evaluation=evaluation,
            compression=compression,
            segments=segments,
            modules=modules or {}, agents=agents,
        )  # fmt: skip
        size = sum(map(len, body))
        self.unsettled[self.number] = Unsettled(message, body, size)
        self.unsettled_bytes += size
        self.unsettled_steps += 0 if evaluation else steps
        if self.state is State.LIVE:
            self._say(message, now, body)
        return self.number

    def ping(self, now: float) -> None:
        """Have the broker tell its limits, and the newest versions, once more."""
        if self.state is State.LIVE:
            self._say(PING(), now)

    def welcomed(self, message: WELCOME, now: float) -> None:
        self.fragment_bytes = message.fragment_bytes
        self.weights_address = message.weights
        self.trainer_spaces = message.spaces
        self._limits(message)
        base = self.base
        for kept in self.unsettled.values():
            self._say(msgspec.structs.replace(kept.message, base=base), now, kept.body)

    def handle(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if isinstance(message, ACK):
            self._learn(message)
            self._limits(message)
            for number, outcome in message.settled:
                kept = self.unsettled.pop(number, None)
                if kept is None:
                    continue
                self.unsettled_bytes -= kept.size
                if not kept.message.evaluation:
                    self.unsettled_steps -= kept.message.steps
                    self.settled_steps += kept.message.steps
                total = self.outcomes.setdefault(outcome, [0, 0])
                total[0] += 1
                total[1] += kept.message.steps
                if self.on_settled is not None:
                    self.on_settled(kept.message, outcome)
        elif self.on_message is not None:
            self.on_message(message, body, now)

    def _limits(self, told: WELCOME | ACK) -> None:
        self.window, self.steps_limit, self.fragment_steps = told.window, told.steps_limit, max(1, told.fragment_steps)
        self.evaluation, self.evaluates = told.evaluation, told.evaluates
        if told.run:  # a broker that has just started knows of no training
            self.sampled, self.needs_logp = told.sampled, told.needs_logp
            self.rounds, self.fresh = told.rounds, told.fresh


class ReaderSession(Endpoint):
    """The end of who asks, for policy and weights (`ask`) and for single actions (`act`). `on_message` gets what comes.

    `open_acts`: requests without an answer, by number; on WELCOME they are sent again. `requests`: how many may be.
    `spaces`: the trainer's, if it was there at the last WELCOME."""

    def __init__(self, session: bytes, *, name: str = "", package: str = "", rng: random.Random | None = None) -> None:
        super().__init__(session, name, package, Timing(), rng or random.Random(session))
        self.on_message: Callable[[Message, Sequence[Buffer], float], None] | None = None
        self.open_acts: dict[int, Outgoing] = {}
        self.requests = 0
        self.spaces: Spaces | None = None
        self._request = 0

    def hello(self) -> ReaderHello:
        return ReaderHello()

    def ask(self, messages: Sequence[Message], now: float) -> None:
        """Send these questions."""
        for message in messages:
            self._say(message, now)

    def act(
        self,
        columns: tuple[Column, ...],
        rows: int,
        body: Sequence[Buffer],
        now: float,
        *,
        explore: bool | None = None,
        evaluation: bool = False,
        module: str = "",
        agents: Sequence[AgentId] = (),
        places: Sequence[Place] = (),
        told: Sequence[Told] = (),
        acts: bool = True,
        follower: bytes = b"",
    ) -> int:
        """Ask for actions for `rows` observations, and return the request's number."""
        self._request += 1
        message = ACT(
            self.session, self._request, rows, columns, explore, evaluation, module, tuple(agents), tuple(places),
            tuple(told), acts, follower,
        )  # fmt: skip
        self.open_acts[self._request] = Outgoing(message, body)
        if self.state is State.LIVE:
            self._say(message, now, body)
        return self._request

    def greet_again(self, now: float) -> None:
        """Hear WELCOME once more: what it tells may have changed."""
        if self.state is State.LIVE:
            self._move(Verb.REGREET)
            self._greet(now)

    def forget(self, request: int) -> None:
        """Its answer is not wanted any more."""
        self.open_acts.pop(request, None)

    def welcomed(self, message: WELCOME, now: float) -> None:
        self.requests, self.spaces = message.requests, message.spaces
        for act in self.open_acts.values():
            self._say(act.message, now, act.body)

    def handle(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if isinstance(message, ACTION) and self.open_acts.pop(message.request, None) is None:
            return  # the second answer
        if self.on_message is not None:
            self.on_message(message, body, now)


__all__ = [
    "DELIVERED", "STATES", "Endpoint", "Outgoing", "ReaderSession", "SimulatorSession", "State", "Timing", "Unsettled",
    "Verb",
]  # fmt: skip
