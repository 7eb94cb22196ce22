"""The processes of a world: a session and a DEALER each, and what their applications do with them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from world_links import HEARTBEAT, NEVER, Connection

from broker.events import Side
from rllink_zmq.messages import FRAGMENT, GET_STATE, STATE, Column
from rllink_zmq.sampling import PROGRESS_WAIT, Next, SampleCall
from rllink_zmq.sampling_exact import Answer, ExactCall, Stock
from rllink_zmq.session import Endpoint, SimulatorSession, State
from rllink_zmq.session_runner import Lease, RunnerSession, TrainerSession

if TYPE_CHECKING:
    from world import World

RUN = "018f00000000-00000001"
RUNNERS = 2
RETURN_DELAY = 0.5
NOTICED = 0.5
"""Seconds until a call in a runner that has left is answered at last."""


class Chunk(NamedTuple):
    """Steps `t0` on of an episode, under RLlib's name of it: from step `first` of a fragment on."""

    episode: str
    t0: int
    steps: int
    ends: bool
    message: FRAGMENT
    first: int


class Node:
    """A process with a session and a DEALER. While it is stopped everything that should happen in it waits."""

    side = Side.BACK

    def __init__(self, world: World, name: str, session: Endpoint) -> None:
        self.world = world
        self.name = name
        self.session: Any = session
        self.connection: Connection | None = None
        self.alive = True
        self.paused = False
        self.waiting_io: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.waiting_main: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self.attempt = 0
        self.away = False
        self.wake_at = NEVER

    def start(self) -> None:
        self.connect()
        self.session.open(self.world.now)
        self.flush()

    # ---- the socket

    def connect(self) -> None:
        self.attempt += 1
        self.world.after(self.world.random.uniform(0.005, 0.05), self.try_to_connect, self.attempt, 0.1)

    def try_to_connect(self, attempt: int, interval: float) -> None:
        if attempt != self.attempt or not self.alive:
            return
        if self.paused:
            self.waiting_io.append((self.try_to_connect, (attempt, interval)))
        elif self.world.broker is None:
            self.world.after(interval, self.try_to_connect, attempt, min(1.0, 2 * interval))
        else:
            self.connection = self.world.connected(self)
            if self.away:
                self.away = False
                self.session.reconnected(self.world.now)
                self.flush()

    def disconnected(self, connection: Connection) -> None:
        """libzmq has noticed. The application sees it, if it looks before there is a connection again."""
        if self.connection is connection and self.alive:
            if self.paused:
                self.waiting_io.append((self.disconnected, (connection,)))
                return
            self.connection = None
            self.away = self.world.random.random() < 0.7
            self.connect()

    def flush(self) -> None:
        session = self.session
        if session.reconnect:
            session.reconnect = False
            if self.connection is not None:
                self.world.cut(self.connection, peer_knows=True)
                self.connection = None
            self.connect()
        if session.output:
            output, session.output = session.output, []
            for message, body in output:
                if self.connection is None:
                    session.send_failed(self.world.now)
                    break
                self.world.up(self.connection, message, body)
        due = session.next_deadline()
        if due < self.wake_at:
            self.wake_at = due
            self.world.at(due, self.wake, due)

    def wake(self, due: float) -> None:
        if due != self.wake_at or not self.alive:
            return
        self.wake_at = NEVER
        if self.paused:
            return
        if self.session.next_deadline() <= self.world.now:
            self.session.tick(self.world.now)
            self.turn()
        self.flush()

    def receive(self, message: Any, body: Sequence[Any]) -> None:
        if not self.alive:
            return
        if self.paused:
            self.waiting_io.append((self.receive, (message, body)))
            return
        self.session.receive(message, body, self.world.now)
        self.turn()
        self.flush()

    def turn(self) -> None:
        """Something has come, or time has passed: the application's move."""

    @property
    def well(self) -> bool:
        """It runs, and the broker knows its connection."""
        connection = self.connection
        if not self.alive or self.paused or connection is None or connection.broken:
            return False
        return self.session.state is State.LIVE and self.world.known(connection)

    # ---- SIGSTOP, SIGCONT

    def stop(self) -> None:
        self.paused = True
        connection = self.connection
        if connection is not None:
            self.world.after(HEARTBEAT, self.given_up, connection)

    def given_up(self, connection: Connection) -> None:
        """The broker's libzmq has heard nothing for too long."""
        if self.paused and self.alive:
            self.world.cut(connection)

    def resume(self) -> None:
        if not self.alive or not self.paused:
            return
        self.paused = False
        both = [self.waiting_io, self.waiting_main]
        self.waiting_io, self.waiting_main = [], []
        if self.world.random.random() < 0.5:
            both.reverse()
        for things in both:
            for do, args in things:
                do(*args)
        if self.session.next_deadline() <= self.world.now:
            self.session.tick(self.world.now)
            self.turn()
        self.flush()

    def end(self) -> None:
        """SIGKILL."""
        self.alive = False
        self.attempt += 1
        if self.connection is not None:
            self.world.cut(self.connection, peer_knows=True)
            self.connection = None


class SimulatorNode(Node):
    """Makes fragments while it may, with the newest weights it has."""

    side = Side.FRONT
    session: SimulatorSession

    def __init__(self, world: World, name: str, session: SimulatorSession) -> None:
        super().__init__(world, name, session)
        session.on_settled = self.settled
        session.on_message = self.message
        self.version = -1
        self.asked = -1.0
        self.episode, self.t0 = 0, 0
        self.settled_since = 0
        self.pace = world.random.uniform(0.2, 1.1) * (1.0 if world.width == 1 and world.crew == RUNNERS else 0.1)
        world.after(self.pace, self.sample)

    def settled(self, message: FRAGMENT, outcome: str) -> None:
        self.world.settled[message.session, message.number] = outcome
        self.settled_since += 1

    def message(self, message: Any, body: Sequence[Any], now: float) -> None:
        if type(message) is STATE and message.version > self.version:
            assert message.offset == 0 and sum(map(len, body)) == message.size
            self.version = message.version

    def published(self, message: STATE) -> None:
        if self.alive:
            self.version = max(self.version, message.version)

    def turn(self) -> None:
        """Pull weights that PUB has not brought."""
        session, now = self.session, self.world.now
        if session.version > self.version and now > self.asked + 0.5 and session.state is State.LIVE:
            self.asked = now
            session._say(GET_STATE(session.run, session.version), now)

    def sample(self) -> None:
        """One fragment, if the limits allow it."""
        world = self.world
        if not self.alive or not world.producing:
            return
        world.after(self.pace * world.random.uniform(0.5, 1.5), self.sample)
        session = self.session
        if self.version < 0:
            return
        steps = min(session.fragment_steps, world.random.randint(2, world.longest))
        if world.width > 1:
            steps = world.width  # a row of all its episodes
        if not session.room(steps - 1, steps + 1):
            return
        ends = world.random.random() < 0.3
        number = session.submit(
            episode=f"{self.episode}", t0=self.t0, steps=steps, end="terminated" if ends else "no", run=RUN,
            version=self.version, return_so_far=0.0, columns=(Column("obs", "|u1", (steps + 1,)),),
            body=[bytes(steps + 1)], now=world.now,
        )  # fmt: skip
        assert number == session.number
        self.episode, self.t0 = (self.episode + 1, 0) if ends else (self.episode, self.t0 + steps)
        self.flush()


class TrainerNode(Node):
    """RLlib's driver process, as the broker knows it: whatever comes, the pool has a look."""

    session: TrainerSession

    def turn(self) -> None:
        self.world.pool.look()


class RunnerNode(Node):
    """A Ray actor: a mailbox, one call at a time, and an I/O thread with a `RunnerLink`. `held`: answers that RLlib
    refers to, in order: the k that each of them brings up to date, and its call. `left`: it has said BYE."""

    session: RunnerSession

    def __init__(self, world: World, name: str, session: RunnerSession, index: int) -> None:
        super().__init__(world, name, session)
        self.index = index
        self.mailbox: list[tuple[str, int]] = []
        self.call: SampleCall | None = None
        self.stock = Stock(session)
        self.names: dict[tuple[bytes, str], tuple[int, str]] = {}
        self.call_id = 0
        self.busy = False
        self.full_at = -2
        self.step_at = NEVER
        self.returned_at: float | None = None
        self.held: deque[tuple[int, int]] = deque()
        self.free: set[int] = set()
        self.left = False

    # ---- the actor

    def mail(self, what: str, value: int) -> None:
        """A remote call arrives: ("sample", id) or ("state", version)."""
        if not self.alive:
            if what == "sample":
                self.world.driver.failed(value)
            return
        self.mailbox.append((what, value))
        if self.paused:
            self.waiting_main.append((self.work, ()))
        else:
            self.work()

    def work(self) -> None:
        while self.mailbox and not self.busy:
            what, value = self.mailbox.pop(0)
            if what == "state":
                self.weights(value)
            else:
                self.begin(value)
        self.flush()

    def weights(self, version: int) -> None:
        if self.left:
            return
        self.give_back()  # a new state also shows that RLlib has the last answer
        if version > self.session.offered_version:
            data = b"w%07d" % version
            self.session.offer(version, len(data), lambda: data, self.world.now)

    def begin(self, call_id: int) -> None:
        world, session = self.world, self.session
        self.busy, self.call_id = True, call_id
        if self.left:
            self.answer_after_leaving(PROGRESS_WAIT)
            return
        self.give_back()
        if world.rules.style == "stream":
            self.weights(world.driver.version)
        repeated = self.full_at == session.offered_version
        if world.rules.style == "exact":
            self.call = ExactCall(self.stock, world.rules, world.now)
        else:
            self.call = SampleCall(session, world.rules, world.now, repeated=repeated)
        self.turn()

    def answer_after_leaving(self, wait: float) -> None:
        """A round gets an empty list; a stream no answer at all."""
        if self.world.rules.style != "stream":
            self.world.after(wait, self.converted, self.call_id, [])

    def converted(self, call_id: int, leases: list[Lease]) -> None:
        """`sample()` returns: from here on Ray has the answer."""
        if not self.alive:
            return
        if self.paused:
            self.waiting_main.append((self.converted, (call_id, leases)))
            return
        self.busy = False
        self.returning(call_id)
        self.world.after(self.world.latency(), self.arrive, call_id, leases)
        self.work()

    def arrive(self, call_id: int, leases: list[Lease]) -> None:
        """The driver has the answer, unless the process died (or was stopped) before it was out."""
        gone = not self.alive or self.paused
        if gone and self.world.random.random() < 0.5:
            if not self.alive:
                self.world.driver.failed(call_id)
            else:
                self.waiting_main.append((self.arrive, (call_id, leases)))
            return
        self.world.driver.result(call_id, leases)

    def end(self) -> None:
        super().end()
        self.world.after(self.world.random.uniform(0.02, 1.0), self.world.pool.ended, self.session.session)
        calls = [value for what, value in self.mailbox if what == "sample"]
        if self.busy:
            calls.append(self.call_id)
        for call_id in calls:
            self.world.after(self.world.random.uniform(0.01, 0.5), self.world.driver.failed, call_id)

    # ---- its thread

    def turn(self) -> None:
        self.go_on()
        self.leave_when_done()

    def go_on(self) -> None:
        """The call's next step."""
        call, world = self.call, self.world
        if call is None:
            return
        if call.step(world.now) is Next.WAIT:
            if call.wake < self.step_at:
                self.step_at = call.wake
                world.at(call.wake, self.step, call.wake)
            return
        self.call = None
        self.full_at = self.session.offered_version if call.round_was_full else -2
        result: list[Any] = call.leases
        if isinstance(call, ExactCall):
            result = self.named(call.answer)
            world.short += call.short
            if (not result or call.short) and self.session.duty == "serve" and world.producing:
                world.lacking.append(world.now)
            if call.steps not in (0, call.rules.share) and self.session.duty == "serve" and not call.short:
                world.broken.append(f"sample() returned {call.steps} steps, {call.rules.share} were wanted")
        world.after(world.random.uniform(0.0, 0.03), self.converted, self.call_id, result)

    def named(self, answer: Answer) -> list[Chunk]:
        """Under the episode ids that RLlib gets, as `EpisodeBuilder` gives them."""
        if answer.fresh:
            self.names.clear()
        chunks = []
        for (message, *_), first, steps in answer.portions:
            key, t0 = (message.session, message.episode), message.t0 + first
            next_t0, name = self.names.pop(key, (-1, ""))
            if next_t0 != t0:
                name = f"{message.session.hex()}_{message.episode}@{t0}"
            ends = message.end != "no" and first + steps == message.steps
            if not ends:
                self.names[key] = (t0 + steps, name)
            chunks.append(Chunk(name, t0, steps, ends, message, first))
        return chunks

    def step(self, due: float) -> None:
        if due != self.step_at or not self.alive:
            return
        self.step_at = NEVER
        if self.paused:
            self.waiting_main.append((self.turn, ()))
        else:
            self.turn()
            self.flush()

    def returning(self, call_id: int) -> None:
        """The answer is on its way: it is there soon, or, of a stream, when RLlib no longer refers to it."""
        if self.world.rules.style == "stream" and self.session.committed > self.session.returned:
            self.held.append((self.session.committed, call_id))
        else:
            self.returned_at = self.world.now
            self.world.after(RETURN_DELAY, self.returned, self.world.now)

    def returned(self, at: float) -> None:
        if not self.alive or at != self.returned_at:
            return
        if self.paused:
            self.waiting_io.append((self.returned, (at,)))
            return
        self.give_back()
        self.leave_when_done()
        self.flush()

    def give_back(self) -> None:
        if self.held:
            return  # what RLlib has is told by the references
        self.returned_at = None
        if self.call is None:
            self.stock.reached(self.world.now)

    def released(self, call_id: int) -> None:
        """RLlib refers to this answer no longer."""
        if not self.alive:
            return
        if self.paused:
            self.waiting_io.append((self.released, (call_id,)))
            return
        self.free.add(call_id)
        upto = 0
        while self.held and self.held[0][1] in self.free:
            upto = self.held.popleft()[0]
        if upto:
            self.session.give_back(self.world.now, upto)
        self.leave_when_done()
        self.flush()

    def leave_when_done(self) -> None:
        """Told to leave, and RLlib has everything: BYE, and a call that waits is answered when that is noticed."""
        session, call = self.session, self.call
        if session.duty not in ("leave", "end") or session.state is not State.LIVE or self.left:
            return
        if session.duty == "end" and call is None:
            self.stock.give_up(self.world.now)
        if session.claiming or session.returned < session.committed or (call is not None and call.steps):
            return
        session.close(self.world.now)
        self.flush()
        self.left = True
        if call is not None:
            self.call = None
            self.answer_after_leaving(NOTICED)
        self.world.after(1.0, self.hang_up)

    def hang_up(self) -> None:
        connection, self.connection = self.connection, None
        self.attempt += 1
        if connection is not None:
            self.world.hung_up(connection)
