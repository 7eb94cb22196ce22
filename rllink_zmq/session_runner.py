"""The learner side's endpoints, sans-IO: a runner, a trainer, and one who only asks.

The runner's rules:

- A leased fragment is nobody's. TAKE asks for it, and only what TAKEN grants is handed over; on WELCOME everything that
  is not taken is forgotten, a claim under way too.
- `k` rises with every TAKE. `committed` is the last TAKEN acted upon, `returned` the last hand-over that RLlib has.
- What was handed over is remembered until the simulator's `base` passes it, for a broker that starts empty-handed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from rllink_zmq.arrays import Buffer
from rllink_zmq.messages import (
    ACT,
    ACTION,
    BYE,
    CONFIG,
    DUTY,
    FRAGMENT,
    GET_CONFIG,
    GET_STATE,
    OFFER,
    PING,
    PONG,
    POOL,
    RETURNED,
    STATE,
    TAKE,
    TAKEN,
    WELCOME,
    Assigned,
    Claim,
    Dropped,
    Duty,
    Handed,
    Message,
    ObserverHello,
    Present,
    RunnerHello,
    ServiceHello,
    Spaces,
    TrainerHello,
)
from rllink_zmq.session import Endpoint, State, Timing
from rllink_zmq.transfer import chunk

SERVICE_TIMING = Timing(ping=1.0, silence=10.0, retry=0.1, retry_most=1.0, answer=2.0)
"""Peers with a thread of their own say something every second."""

MEMORY_OF_HANDED = 3600.0
"""Seconds after which hand-overs of a session that sent nothing more are forgotten."""

STALL = 2.5
"""Seconds without a look at the connection that mean the process was stopped: it looks every second or two."""

AWAKE = 1.0
"""Seconds after the end of a call in which a call that begins may have waited in the actor."""

AFTER_STALL = STALL + 0.5
"""Seconds after a stall in which a call that begins may have waited for its end: the process may have been stopped once
more, for less than shows."""

HANDOVER_CUT = "handover_cut"
"""The reason of a fragment that RLlib may have, or may not."""

SESSIONS_REMEMBERED = 4096
"""Of so many sessions at most: the report has to fit the header of a HELLO."""

Key = tuple[bytes, int]


class Lease(NamedTuple):
    """A fragment as it came: its header and the frames of its body; `prepared`: what `RunnerSession.prepare` made of
    it."""

    message: FRAGMENT
    body: Sequence[Buffer]
    prepared: Any = None


class Pool(NamedTuple):
    """What the broker last said of the whole pool: env steps taken so far in this run and since `version`; `sampled`:
    of the training."""

    version: int = -1
    round_steps: int = 0
    taken_steps: int = 0
    simulators: int = 0
    runners: int = 0
    sampled: int = 0


class Offered(NamedTuple):
    """Weights that a runner has: `load()` makes their `size` bytes."""

    version: int
    size: int
    load: Callable[[], bytes]


def env_steps(message: FRAGMENT) -> int:
    """How most trainings count a fragment."""
    return message.steps


class RunnerSession(Endpoint):
    """A runner's end, for one run. `duty`: what the trainer wants of it. `deadline`: an answer that reaches RLlib later
    is thrown away unseen. `last_call`: of the last call of `sample()`, a time no later than when RLlib sent it, and
    when its answer was ready. `prepare`: is called with each fragment that is leased, before anybody takes it."""

    def __init__(
        self, session: bytes, run: str, *, name: str = "", package: str = "", rng: random.Random | None = None
    ) -> None:
        super().__init__(session, name, package, SERVICE_TIMING, rng or random.Random(session))
        self.my_run = run
        self.duty: Duty = "serve"
        self.leased: dict[Key, Lease] = {}
        self.leased_steps = 0
        self.k = 0
        self.committed = 0
        self.returned = 0
        self.taken: list[Lease] | None = None
        self.pool = Pool()
        self.deadline = float("inf")
        self.prepare: Callable[[FRAGMENT, Sequence[Buffer]], Any] | None = None
        self.last_call: tuple[float, float] | None = None
        self._pending: tuple[int, list[Key]] | None = None
        self._handed: dict[bytes, dict[int, int]] = {}
        self._handed_at: dict[bytes, float] = {}
        self._dropped: dict[Key, str] = {}
        self._told_returned = 0
        self._granted = 0
        self._looked: float | None = None
        self._stall = (float("-inf"), float("-inf"))
        self._offers: dict[str, Offered] = {}
        self._weights: dict[str, tuple[int, bytes, int]] = {}

    def open(self, now: float) -> None:
        self._look(now)  # a process may be stopped before it has looked for the first time
        super().open(now)

    def hello(self) -> RunnerHello:
        self._told_returned = self.returned
        handed = [Handed(s, list(known), list(known.values())) for s, known in self._handed.items()]
        return RunnerHello(self.my_run, self.committed, self.returned, handed, self._all_dropped())

    def farewell(self) -> BYE:
        return BYE(self.returned, self._all_dropped())

    # ---- taking

    @property
    def claiming(self) -> bool:
        """A TAKE is on its way."""
        return self._pending is not None

    def take(self, steps: int, now: float, weigh: Callable[[FRAGMENT], int] = env_steps) -> int:
        """Claim leased fragments, oldest first, until they have `steps` steps, as `weigh` counts them. Returns the
        steps claimed (0 = there is nothing to claim now, or what is claimed counts nothing). The answer appears in
        `taken`."""
        if self.state is not State.LIVE or self._pending is not None or not self.leased or self.duty != "serve":
            return 0
        keys: list[Key] = []
        claims: dict[bytes, list[int]] = {}
        claimed = 0
        for key, lease in self.leased.items():
            if claimed >= steps:
                break
            keys.append(key)
            claims.setdefault(key[0], []).append(key[1])
            claimed += weigh(lease.message)
        self.k += 1
        self._pending = (self.k, keys)
        self.taken = None
        self._say(TAKE(self.k, [Claim(s, n) for s, n in claims.items()], self.returned), now)
        return claimed

    def drop(self, message: FRAGMENT, reason: str) -> None:
        """RLlib did not get this taken fragment. Told with the next `give_back`."""
        self._dropped[message.session, message.number] = reason

    def give_back(self, now: float, upto: int | None = None) -> None:
        """RLlib has all hand-overs so far, or those `upto` this k: unless it is past the `deadline`, then nobody
        knows."""
        if upto is None or upto >= self._granted:
            upto = self.committed  # what was claimed after it and refused is no hand-over
        if upto <= self.returned:
            return
        if now > self.deadline:
            for session, known in self._handed.items():
                for number, k in known.items():
                    if k > self.returned:
                        self._dropped.setdefault((session, number), HANDOVER_CUT)
        self.returned = upto
        if self.state is State.LIVE:
            self._say_returned(now)

    def _say_returned(self, now: float) -> None:
        self._told_returned = self.returned
        self._say(RETURNED(self.returned, self._all_dropped()), now)

    def running_since(self, now: float) -> float:
        """A time since which this process has certainly not been stopped, or before which it was."""
        if self._looked is None:
            return now
        began, ended = self._stall
        # By the last look: since then it may have been stopped once more, and this be the first thing it does.
        return began if self._looked - ended < AFTER_STALL else self._looked

    def _look(self, now: float) -> None:
        if self._looked is not None and now - self._looked > STALL:
            began, ended = self._stall
            # Stopped again soon after: a call may have waited for both.
            self._stall = (began if self._looked - ended < AFTER_STALL else self._looked, now)
        self._looked = now

    def receive(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        self._look(now)
        super().receive(message, body, now)

    # ---- weights

    def offer(self, version: int, size: int, load: Callable[[], bytes], now: float, module: str = "") -> None:
        """This runner has weights `version`, of `module` if there are several. `load()` makes their `size` bytes when
        the broker asks for them."""
        self._offers[module] = Offered(version, size, load)
        if self.state is State.LIVE:
            self._say(OFFER(self.my_run, version, size, module), now)

    @property
    def offered_version(self) -> int:
        """The newest version this runner has; -1 before the first."""
        return max((offered.version for offered in self._offers.values()), default=-1)

    def _serve(self, message: GET_STATE, now: float) -> None:
        module = message.module
        if module not in self._offers or message.run != self.my_run:
            return
        version, _, load = self._offers[module]
        held = self._weights.get(module)
        if held is None or (message.version != held[0] and held[0] != version):
            data = load()
            held = self._weights[module] = (version, data, zlib.crc32(data))
        number, data, crc = held
        offset = message.offset if message.version == number else 0
        self._say(STATE(self.my_run, number, len(data), offset, crc, module), now, [chunk(data, offset)])

    # ---- what comes

    def welcomed(self, message: WELCOME, now: float) -> None:
        self.leased.clear()
        self.leased_steps = 0
        self.duty = "serve"  # unless DUTY follows: this broker may never have known another one
        self.pool = self.pool._replace(sampled=message.sampled)  # what epsilon is of, before the first PONG
        if self._pending is not None:
            self._pending, self.taken = None, []
        if self.returned != self._told_returned:
            # Given back after the HELLO. A TAKE that says it first would leave out what was dropped.
            self._say_returned(now)
        for module, offered in self._offers.items():
            self._say(OFFER(self.my_run, offered.version, offered.size, module), now)

    def handle(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if isinstance(message, FRAGMENT):
            self._pass_base(message, now)
            key = (message.session, message.number)
            if key not in self.leased:  # else it was leased on the old connection too, whose last messages come late
                self.leased_steps += message.steps
            prepared = self.prepare(message, body) if self.prepare is not None else None
            self.leased[key] = Lease(message, body, prepared)
        elif isinstance(message, TAKEN):
            self._on_taken(message, now)
        elif isinstance(message, PONG):
            self.pool = _pool(message)
        elif isinstance(message, GET_STATE):
            self._serve(message, now)
        elif isinstance(message, DUTY):
            self._assigned(message.duty)

    def _assigned(self, duty: Duty) -> None:
        self.duty = duty
        if duty == "serve":
            return
        # The broker has given it to others, but for what is being claimed: TAKEN will tell.
        claimed = set(self._pending[1]) if self._pending is not None else set()
        self.leased = {key: lease for key, lease in self.leased.items() if key in claimed}
        self.leased_steps = sum(lease.message.steps for lease in self.leased.values())

    def send_failed(self, now: float) -> None:
        super().send_failed(now)
        if self._pending is not None:
            self._pending, self.taken = None, []

    def _on_taken(self, message: TAKEN, now: float) -> None:
        if self._pending is None or message.k != self._pending[0]:
            return
        refused = {(c.session, n) for c in message.refused for n in c.numbers}
        granted = []
        for key in self._pending[1]:
            lease = self.leased.pop(key)
            self.leased_steps -= lease.message.steps
            if key in refused:
                continue
            known = self._handed.setdefault(key[0], {})
            self._handed_at.pop(key[0], None)
            self._handed_at[key[0]] = now
            if key[1] in known:
                # Handed over before: whatever the broker believes, RLlib doesn't get it again.
                self._dropped.setdefault(key, "duplicate")
                continue
            known[key[1]] = message.k
            granted.append(lease)
        nothing_owed = self.returned >= self._granted
        if len(refused) < len(self._pending[1]):
            self._granted = message.k
        self.committed = message.k
        self.pool = _pool(message)
        self._pending, self.taken = None, granted
        if nothing_owed and not granted:
            self._granted_nothing(now)

    def _granted_nothing(self, now: float) -> None:
        """No answer will show that RLlib has this hand-over: it has it already. A runner that leaves waits for that."""
        if self._granted == self.committed:  # all that was granted are duplicates
            self.give_back(now)
        else:
            self.returned = self.committed

    def _pass_base(self, message: FRAGMENT, now: float) -> None:
        known = self._handed.get(message.session)
        if known is None:
            return
        self._handed_at[message.session] = now
        for number in [n for n in known if n < message.base]:
            del known[number]
            self._dropped.pop((message.session, number), None)
        if not known:
            del self._handed[message.session], self._handed_at[message.session]

    def tick(self, now: float) -> None:
        self._look(now)
        super().tick(now)
        # In the order of their last fragment: the first ones have been silent for the longest.
        surplus = len(self._handed_at) - SESSIONS_REMEMBERED
        old = [s for i, (s, t) in enumerate(self._handed_at.items()) if i < surplus or now - t > MEMORY_OF_HANDED]
        for session in old:
            for number in self._handed.pop(session):
                self._dropped.pop((session, number), None)
            del self._handed_at[session]

    def _all_dropped(self) -> list[Dropped]:
        return [Dropped(s, n, reason) for (s, n), reason in self._dropped.items()]


def _pool(message: TAKEN | PONG) -> Pool:
    return Pool(
        message.version, message.round_steps, message.taken_steps, message.simulators, message.runners, message.sampled
    )


class TrainerSession(Endpoint):
    """The trainer's end: says what it wants of the broker, serves the exported policy, and shows that it is there.

    `runners_wanted`: how many runners somebody asked the broker for. `roster`: the runners of this run that the broker
    of epoch `roster_epoch` knew at `roster_at`. `live_since`: the last WELCOME."""

    def __init__(
        self,
        session: bytes,
        terms: TrainerHello,
        blob: bytes,
        *,
        name: str = "",
        package: str = "",
        rng: random.Random | None = None,
    ) -> None:
        super().__init__(session, name, package, SERVICE_TIMING, rng or random.Random(session))
        self.terms = terms
        self.blob = blob
        self.pool = Pool()
        self.ledger: dict[str, tuple[int, int]] = {}
        self.pongs = 0
        self.runners_wanted: int | None = None
        self.roster: list[Present] = []
        self.roster_at = float("-inf")
        self.roster_epoch = b""
        self.live_since = float("-inf")
        self._duties: list[Assigned] = list(terms.duties)
        self._told: list[Assigned] = []

    def hello(self) -> TrainerHello:
        self._told = self._duties
        return msgspec.structs.replace(self.terms, duties=self._duties)

    def assign(self, duties: Mapping[bytes, Duty], now: float) -> None:
        """Tell the broker the duties of runners, by session: all that are not to serve."""
        self._duties = [Assigned(session, duty) for session, duty in duties.items()]
        if self.state is State.LIVE:
            self._told = self._duties
            self._say(POOL(self._duties), now)

    def welcomed(self, message: WELCOME, now: float) -> None:
        self.live_since = now
        if self._told != self._duties:  # they changed after the HELLO
            self.assign({a.session: a.duty for a in self._duties}, now)
        self.ask(now)

    def note(self, sampled: int) -> None:
        """The training has sampled so many env steps: what a broker that starts anew is told."""
        self.terms = msgspec.structs.replace(self.terms, sampled=sampled)

    def change(self, terms: TrainerHello, now: float) -> None:
        """New terms (a new run, another number of runners): greet with them."""
        self.terms = terms
        if self.state is State.LIVE or self.state is State.GREETING:
            self.state = State.GREETING
            self._greet(now)

    def handle(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if isinstance(message, GET_CONFIG) and message.policy == self.terms.policy:
            header = CONFIG(message.policy, len(self.blob), message.offset)
            self._say(header, now, [chunk(self.blob, message.offset)])
        elif isinstance(message, PONG):
            self.pool = _pool(message)
            self.ledger = dict(message.ledger)
            self.runners_wanted = message.runners_wanted
            self.roster, self.roster_at, self.roster_epoch = message.roster, now, message.epoch
            self.pongs += 1

    def ask(self, now: float) -> None:
        """Ask for the ledger as of now: `pongs` rises when it is there."""
        if self.state is State.LIVE:
            self._say(PING(), now)


class ServiceSession(Endpoint):
    """A runner's end for single actions. `asked`: requests to be answered, by (session, number), in the order they
    came; what else comes goes to `on_message`."""

    def __init__(
        self, session: bytes, run: str, *, name: str = "", package: str = "", rng: random.Random | None = None
    ) -> None:
        super().__init__(session, name, package, SERVICE_TIMING, rng or random.Random(session))
        self.my_run = run
        self.asked: dict[tuple[bytes, int], tuple[ACT, Sequence[Buffer]]] = {}
        self.weights_address = ""
        self.on_message: Callable[[Message, Sequence[Buffer], float], None] | None = None

    def hello(self) -> ServiceHello:
        return ServiceHello(self.my_run)

    def welcomed(self, message: WELCOME, now: float) -> None:
        self.weights_address = message.weights
        self.asked.clear()  # the broker has given them to others, or gives them again

    def handle(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if isinstance(message, ACT):
            self.asked[message.session, message.request] = (message, body)
        elif self.on_message is not None:
            self.on_message(message, body, now)

    def ask(self, messages: Sequence[Message], now: float) -> None:
        """Send these questions."""
        for message in messages:
            self._say(message, now)

    def answer(self, message: ACTION, body: Sequence[Buffer], now: float) -> None:
        """Answer a request. Nothing is sent while the broker is away: others do it."""
        if self.state is State.LIVE:
            self._say(message, now, body)


class ObserverSession(Endpoint):
    """Asks for the spaces of the first simulator, again and again: `spaces` is None until there is one."""

    def __init__(self, session: bytes, *, name: str = "", package: str = "", rng: random.Random | None = None) -> None:
        super().__init__(session, name, package, SERVICE_TIMING, rng or random.Random(session))
        self.spaces: Spaces | None = None
        self._asked = 0.0

    def hello(self) -> ObserverHello:
        return ObserverHello()

    def welcomed(self, message: WELCOME, now: float) -> None:
        self.spaces = message.spaces
        self._asked = now

    def tick(self, now: float) -> None:
        if self.state is State.LIVE and self.spaces is None and now - self._asked >= 0.25:
            self.state = State.GREETING
            self._greet(now)
        super().tick(now)
