"""The whole system in memory on a virtual clock: real sessions, real sampling rules, the real broker core, and faults.

Three simulators, two runners, a trainer and a broker are joined by links that behave like ZeroMQ connections; a driver
calls `sample()` as RLlib does. Runs are random but repeatable: everything follows from the seed.

    python tests/world.py --seed 7 --faults kill,broker     # replay one run, with its trace
    python tests/world.py --table 300                       # a markdown table of pairs of faults

What a link does, as measured: messages of one connection keep their order. A cut lets a prefix of what was on its way
be read later, between the messages of the next connection, and loses the rest. The DEALER connects again below the
application, which is told nothing; a send without a connection fails. A send to a dead routing id is `Unreachable`.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from broker.core import Broker
from broker.events import Event, Forward, Publish, Received, Send, Side, Tick, Unreachable
from broker.settings import Settings
from rllink_zmq import wire
from rllink_zmq.messages import (
    DELIVERED,
    FRAGMENT,
    GET_STATE,
    STATE,
    BoxSpace,
    Column,
    DiscreteSpace,
    Spaces,
    TrainerHello,
)
from rllink_zmq.sampling import Next, SampleCall, SamplingRules
from rllink_zmq.session import Endpoint, SimulatorSession
from rllink_zmq.session_runner import Lease, RunnerSession, TrainerSession

KINDS = ("kill", "pause", "broker", "cut", "sim")
AIMS = ("HELLO", "HELLO", "WELCOME", "TAKE", "TAKEN", "RETURNED", "ACK", "FRAGMENT", "REFUSED")
SIMULATORS, RUNNERS = 3, 2
RUN = "018f00000000-00000001"
SPACES = Spaces(BoxSpace((), "|u1", (0.0,), (255.0,)), DiscreteSpace(2))
HEARTBEAT = 11.0
"""Seconds after which libzmq gives up a connection whose other end is stopped."""
PATIENCE = 200.0
"""Virtual seconds after the faults in which the system must be training again, and once more to settle everything."""
NEVER = float("inf")


class Fault(NamedTuple):
    """`victim`: an index, taken modulo what there is. `span`: seconds stopped, down, or until a restart. `aim`: strike
    while the next message of this name is on its way, at its connection or its peer."""

    time: float
    kind: str
    victim: int
    span: float
    aim: str = ""


class Verdict(NamedTuple):
    """What a run showed. The first five must be empty."""

    twice: list[tuple[bytes, int]]
    lost: list[tuple[bytes, int]]
    untrue: list[tuple[bytes, int, str]]
    stuck: list[str]
    broken: list[str]
    used_though_cut: int
    outcomes: Counter[str]
    versions: int
    events: int

    @property
    def perfect(self) -> bool:
        return not (self.twice or self.lost or self.untrue or self.stuck or self.broken)


class Connection:
    """One connection: two queues in order. `up_limit`, `down_limit`: messages from that index on are lost. `lag`: what
    is left of a broken one reaches the broker so much later."""

    __slots__ = ("broken", "down_got", "down_limit", "down_sent", "down_time", "full", "lag", "node", "route", "side",
                 "up_got", "up_limit", "up_sent", "up_time")  # fmt: skip

    def __init__(self, node: Node, route: bytes, side: Side) -> None:
        self.node = node
        self.route = route
        self.side = side
        self.broken = False
        self.full = False
        self.lag = 0.0
        self.up_sent = self.up_got = self.down_sent = self.down_got = 0
        self.up_limit = self.down_limit = NEVER
        self.up_time = self.down_time = 0.0


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

    def disconnected(self, connection: Connection) -> None:
        """libzmq has noticed. The application is not told."""
        if self.connection is connection and self.alive:
            if self.paused:
                self.waiting_io.append((self.disconnected, (connection,)))
                return
            self.connection = None
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
        self.pace = world.random.uniform(0.1, 0.5)
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
        if session.version > self.version and now > self.asked + 0.5 and session.state is session.state.LIVE:
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
        steps = min(session.fragment_steps, world.random.randint(2, 8))
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


class RunnerNode(Node):
    """A Ray actor: a mailbox, one call at a time, and an I/O thread."""

    session: RunnerSession

    def __init__(self, world: World, name: str, session: RunnerSession) -> None:
        super().__init__(world, name, session)
        self.mailbox: list[tuple[str, int]] = []
        self.call: SampleCall | None = None
        self.call_id = 0
        self.busy = False
        self.full_at: int | None = None
        self.step_at = NEVER

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
        self.session.give_back(self.world.now)  # a new state also shows that RLlib has the last answer
        if version > self.session.offered_version:
            data = b"w%07d" % version
            self.session.offer(version, len(data), lambda: data, self.world.now)

    def begin(self, call_id: int) -> None:
        world, session = self.world, self.session
        self.busy, self.call_id = True, call_id
        session.give_back(world.now)
        if world.rules.style == "stream":
            self.weights(world.driver.version)
        repeated = self.full_at == session.offered_version
        self.call = SampleCall(session, world.rules, world.now, repeated=repeated)
        self.turn()

    def turn(self) -> None:
        call, world = self.call, self.world
        if call is None:
            return
        if call.step(world.now) is Next.WAIT:
            if call.wake < self.step_at:
                self.step_at = call.wake
                world.at(call.wake, self.step, call.wake)
            return
        self.call = None
        self.full_at = self.session.offered_version if call.round_was_full else None
        world.after(world.random.uniform(0.0, 0.03), self.converted, self.call_id, call.leases)

    def step(self, due: float) -> None:
        if due != self.step_at or not self.alive:
            return
        self.step_at = NEVER
        if self.paused:
            self.waiting_main.append((self.turn, ()))
        else:
            self.turn()
            self.flush()

    def converted(self, call_id: int, leases: list[Lease]) -> None:
        """`sample()` returns: from here on Ray has the answer."""
        if not self.alive:
            return
        if self.paused:
            self.waiting_main.append((self.converted, (call_id, leases)))
            return
        self.busy = False
        self.world.after(self.world.latency(), self.arrive, call_id, leases)
        self.world.after(1.0, self.give_back, self.session.committed)
        self.work()

    def give_back(self, committed: int) -> None:
        """The I/O thread, a second after the return."""
        if not self.alive:
            return
        if self.paused:
            self.waiting_io.append((self.give_back, (committed,)))
        elif self.session.committed == committed and self.call is None and not self.busy:
            self.session.give_back(self.world.now)
            self.flush()

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
        calls = [value for what, value in self.mailbox if what == "sample"]
        if self.busy:
            calls.append(self.call_id)
        for call_id in calls:
            self.world.after(self.world.random.uniform(0.01, 0.5), self.world.driver.failed, call_id)


class Driver:
    """RLlib's side: whom it calls when, what it does with the answers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.version = 0
        self.batch = 0
        self.calls = 0
        self.waiting: dict[int, RunnerNode] = {}
        self.thrown_away = 0

    def submit(self, node: RunnerNode) -> None:
        self.calls += 1
        self.waiting[self.calls] = node
        self.world.after(self.world.random.uniform(0.001, 0.01), node.mail, "sample", self.calls)

    def consume(self, leases: list[Lease]) -> None:
        for lease in leases:
            self.world.got[lease.message.session, lease.message.number] += 1
            self.batch += lease.message.steps

    def started(self, node: RunnerNode) -> None:
        """A runner is there (again): RLlib gives it the weights."""
        node.mail("state", self.version)

    def result(self, call_id: int, leases: list[Lease]) -> None:
        raise NotImplementedError

    def failed(self, call_id: int) -> None:
        raise NotImplementedError


class RoundDriver(Driver):
    """PPO: call all, wait for all or the timeout, until the batch is full; then one update."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.round = 0
        world.after(0.1, self.call_all)

    def call_all(self) -> None:
        nodes = [node for node in self.world.runners if node.alive]
        if not nodes:
            self.world.after(0.5, self.call_all)
            return
        self.round += 1
        for node in nodes:
            self.submit(node)
        self.world.after(self.world.rules.timeout, self.timed_out, self.round)

    def result(self, call_id: int, leases: list[Lease]) -> None:
        if self.waiting.pop(call_id, None) is None:
            self.thrown_away += len(leases)
            self.world.note("late result", call_id, [lease.message.number for lease in leases])
            return
        self.consume(leases)
        if not self.waiting:
            self.done()

    def failed(self, call_id: int) -> None:
        if self.waiting.pop(call_id, None) is not None and not self.waiting:
            self.done()

    def timed_out(self, round_: int) -> None:
        if round_ == self.round and self.waiting:
            self.waiting.clear()
            self.done()

    def done(self) -> None:
        if self.batch >= self.world.rules.quota:
            self.batch = 0
            self.world.after(self.world.random.uniform(0.02, 0.6), self.updated)
        else:
            self.world.after(0.005, self.call_all)

    def updated(self) -> None:
        self.version += 1
        for node in self.world.runners:
            if node.alive:
                node.mail("state", self.version)
        self.call_all()


class StreamDriver(Driver):
    """APPO: a call always under way on each runner; answers are used as they come; `[]` is an error."""

    def started(self, node: RunnerNode) -> None:
        super().started(node)
        self.submit(node)

    def result(self, call_id: int, leases: list[Lease]) -> None:
        node = self.waiting.pop(call_id)
        if not leases:
            self.world.broken.append("sample() returned [] to APPO")
        self.consume(leases)
        if self.batch >= self.world.rules.quota:
            self.batch = 0
            self.world.after(self.world.random.uniform(0.02, 0.6), self.updated)
        if node.alive:
            self.submit(node)

    def failed(self, call_id: int) -> None:
        self.waiting.pop(call_id, None)

    def updated(self) -> None:
        self.version += self.world.random.randint(1, 2)


class World:
    """One run. `faults`: kinds to draw a schedule from, or a schedule. `style`: "round", "stream" or by the seed."""

    def __init__(
        self,
        seed: int,
        faults: Iterable[str | Fault] = (),
        *,
        style: str | None = None,
        broker_class: type[Broker] = Broker,
        check_each: bool | None = None,
        through_wire: bool | None = None,
    ) -> None:
        self.seed = seed
        self.random = r = random.Random(seed)
        self.kinds = tuple(faults)
        self.broker_class = broker_class
        self.check_each = seed % 50 == 7 if check_each is None else check_each
        self.through_wire = seed % 20 == 3 if through_wire is None else through_wire
        self.now = 1000.0
        self.events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self.trace: list[tuple[float, str, Any, Any]] = []
        self.got: Counter[tuple[bytes, int]] = Counter()
        self.settled: dict[tuple[bytes, int], str] = {}
        self.broken: list[str] = []
        self.producing = True
        self.slowness = r.choice((0.002, 0.02, 0.1))
        # the broker
        self.settings = Settings(fragment_bytes=16, memory=32 * (SIMULATORS + 20))
        self.broker: Broker | None = None
        self.routes: dict[tuple[Side, bytes], Connection] = {}
        self.connections: list[Connection] = []
        self._tick_at = NEVER
        self._ids = 0
        self.start_broker()
        # the learner's side
        style = style or ("round", "stream")[seed % 2]
        quota, lag = 24, r.choice((1, 2, 30)) if style == "round" else r.choice((6, 30))
        self.rules = SamplingRules(
            style="round" if style == "round" else "stream",
            share=quota // RUNNERS if style == "round" else 6,
            quota=quota,
            timeout=r.choice((30.0, 60.0)),
            linger=0.2,
        )
        ahead = r.choice((0, lag * quota))
        terms = TrainerHello(RUN, quota, lag, ahead, RUNNERS, 8, SPACES, "p" * 16, 4)
        self.trainer = Node(self, "trainer", TrainerSession(self.id(), terms, b"blob", name="trainer"))
        self.runners: list[RunnerNode] = []
        self.driver: Driver = RoundDriver(self) if style == "round" else StreamDriver(self)
        self.aimed: list[Fault] = []
        self.trainer.start()
        for i in range(RUNNERS):
            self.runners.append(self.new_runner(i))
        self.simulators = [self.new_simulator(i) for i in range(SIMULATORS)]
        # the faults
        drawn = [k for k in self.kinds if isinstance(k, str)]
        self.schedule = [k for k in self.kinds if isinstance(k, Fault)] + (self.draw(drawn) if drawn else [])
        for fault in self.schedule:
            self.at(1000.0 + fault.time, self.aimed.append if fault.aim else self.strike, fault)
        self.faults_end = max((1000.0 + f.time + f.span for f in self.schedule), default=1002.0) + 0.1

    def draw(self, kinds: list[str]) -> list[Fault]:
        r = self.random
        times: list[float] = []
        for _ in range(r.randint(2, 6)):
            near = times and r.random() < 0.4
            times.append(times[-1] + r.uniform(0, 0.3) if near else r.uniform(0.3, 8.0))
        return [self.fault(t, r.choice(kinds)) for t in sorted(times)]

    def fault(self, t: float, kind: str) -> Fault:
        r = self.random
        span = {
            "kill": lambda: r.uniform(0.5, 4.0),
            "pause": lambda: r.choice((r.uniform(0.1, 3.0), r.uniform(3.0, 15.0), r.uniform(10.0, 30.0))),
            "broker": lambda: r.choice((r.uniform(0.05, 0.5), r.uniform(0.5, 8.0))),
            "cut": lambda: 0.0,
            "sim": lambda: r.uniform(0.0, 2.0),
        }[kind]()
        return Fault(t, kind, r.randrange(60), span, r.choice(AIMS) if r.random() < 0.4 else "")

    # ---- time

    def at(self, t: float, do: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (t, self._order, do, args))

    def after(self, seconds: float, do: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + seconds, self._order, do, args))

    def until(self, end: float, condition: Callable[[], bool] | None = None) -> bool:
        """Let time pass until `end`, or until `condition()`, looked at every half second."""
        look = self.now
        heap = self._heap
        while heap and heap[0][0] <= end:
            t, _, do, args = heapq.heappop(heap)
            if t > self.now:
                self.now = t
            self.events += 1
            if self.events > 100_000:
                self.broken.append(f"100,000 events by {self.now - 1000:.3f} s: something spins")
                return False
            do(*args)
            if self.check_each and self.broker is not None:
                self.broker.check_invariants()
            if condition is not None and self.now >= look:
                look = self.now + 0.5
                if condition():
                    return True
        self.now = max(self.now, end)
        return condition is None or condition()

    def latency(self) -> float:
        return min(0.4, self.random.expovariate(1.0) * self.slowness)

    def note(self, what: str, who: Any, detail: Any = "") -> None:
        self.trace.append((self.now, what, who, detail))

    def id(self, length: int = 16) -> bytes:
        self._ids += 1
        return self._ids.to_bytes(length, "big")

    # ---- who there is

    def new_runner(self, i: int) -> RunnerNode:
        rng = random.Random(self.random.random())
        node = RunnerNode(self, f"runner{i}", RunnerSession(self.id(), RUN, name=f"runner{i}", rng=rng))
        node.start()
        self.driver.started(node)
        return node

    def new_simulator(self, i: int) -> SimulatorNode:
        rng = random.Random(self.random.random())
        session = SimulatorSession(self.id(), name=f"simulator{i}", spaces=SPACES, rng=rng)
        node = SimulatorNode(self, f"simulator{i}", session)
        node.start()
        return node

    def start_broker(self) -> None:
        self.broker = self.broker_class(self.settings, self.id(8), "tcp://127.0.0.1:1", self.now)
        self.note("broker", "starts")
        self._tick_at = NEVER
        self._schedule_tick()

    # ---- links

    def connected(self, node: Node) -> Connection:
        connection = Connection(node, self.id(5), node.side)
        self.routes[node.side, connection.route] = connection
        self.connections.append(connection)
        self.note("connected", node.name, connection.route)
        return connection

    def up(self, connection: Connection, message: Any, body: Sequence[Any]) -> None:
        """A DEALER sends."""
        self.note("->", connection.node.name, message)
        if self.through_wire:
            message, body = wire.unpack([bytes(f) for f in wire.pack(message, body)])
        if self.aimed:
            self.aim(connection, message)
        index = connection.up_sent
        connection.up_sent += 1
        if connection.broken:
            return
        connection.up_time = t = max(connection.up_time, self.now + self.latency())
        self.at(t, self.arrived, connection, index, message, body)

    def arrived(self, connection: Connection, index: int, message: Any, body: Sequence[Any]) -> None:
        if index >= connection.up_limit or self.broker is None:
            return
        if connection.lag:
            due = connection.up_time + connection.lag + 1e-4 * index
            if self.now < due:
                self.at(due, self.arrived, connection, index, message, body)
                return
        connection.up_got += 1
        size = sum(map(len, body))
        self.handle(Received(connection.side, connection.route, message, [message, *body], size))

    def handle(self, event: Event) -> None:
        broker = self.broker
        if broker is None:
            return
        events = [event]
        for event in events:
            for action in broker.handle(event, self.now):
                if type(action) is Send:
                    sent = self.down(action.side, action.route, action.message, action.body)
                    if not sent:
                        events.append(Unreachable(action.side, action.route))
                elif type(action) is Forward:
                    if not self.down(Side.BACK, action.route, action.frames[0], action.frames[1:]):
                        events.append(Unreachable(Side.BACK, action.route))
                elif type(action) is Publish:
                    self.publish(action.message)
        self._schedule_tick()

    def down(self, side: Side, route: bytes, message: Any, body: Sequence[Any]) -> bool:
        """A ROUTER sends. False = EHOSTUNREACH, or EAGAIN."""
        connection = self.routes.get((side, route))
        if connection is None or connection.full:
            if connection is not None:
                connection.full = False
            self.note("<-x", route, message)
            return False
        self.note("<-", connection.node.name, message)
        if self.through_wire:
            message, body = wire.unpack([bytes(f) for f in wire.pack(message, body)])
        if self.aimed:
            self.aim(connection, message)
        index = connection.down_sent
        connection.down_sent += 1
        if not connection.broken:
            connection.down_time = t = max(connection.down_time, self.now + self.latency())
            self.at(t, self.came, connection, index, message, body)
        return True

    def came(self, connection: Connection, index: int, message: Any, body: Sequence[Any]) -> None:
        if index < connection.down_limit:
            connection.down_got += 1
            connection.node.receive(message, body)

    def publish(self, message: Any) -> None:
        """PUB may lose anything."""
        for node in self.simulators:
            if self.random.random() < 0.7:
                self.after(self.latency(), node.published, message)

    def cut(self, connection: Connection, *, peer_knows: bool = False) -> None:
        """The connection dies. Either end may take a while to notice."""
        if connection.broken:
            return
        r = self.random
        connection.broken = True
        self.note("cut", connection.node.name, connection.route)
        connection.up_limit = connection.up_got + r.randint(0, connection.up_sent - connection.up_got)
        if r.random() < 0.4:
            connection.lag = r.uniform(0.0, 6.0)
        kept = r.randint(0, connection.down_sent - connection.down_got) if r.random() < 0.5 else 0
        connection.down_limit = connection.down_got + kept
        self.connections.remove(connection)
        slow = (0.0, 0.0, 0.0, r.uniform(0.0, 1.0), HEARTBEAT)
        self.after(0.0 if peer_knows else r.choice(slow), self.routes.pop, (connection.side, connection.route), None)
        if not peer_knows:
            self.after(r.choice(slow), connection.node.disconnected, connection)

    def _schedule_tick(self) -> None:
        if self.broker is not None:
            due = self.broker.next_deadline()
            if due < self._tick_at:
                self._tick_at = max(due, self.now)
                self.at(self._tick_at, self.tick, self._tick_at)

    def tick(self, due: float) -> None:
        if due != self._tick_at:
            return
        self._tick_at = NEVER
        if self.broker is not None and self.broker.next_deadline() <= self.now:
            self.handle(Tick())
        self._schedule_tick()

    # ---- faults

    def aim(self, connection: Connection, message: Any) -> None:
        for fault in self.aimed:
            if fault.aim == type(message).__name__:
                self.aimed.remove(fault)
                self.after(self.random.uniform(0.0, 2.0) * self.slowness, self.strike, fault, connection)
                self.faults_end = max(self.faults_end, self.now + fault.span + 1.0)
                return

    def strike(self, fault: Fault, connection: Connection | None = None) -> None:
        kind, span = fault.kind, fault.span
        self.note("fault", kind, fault)
        node = connection.node if connection is not None else None
        if kind == "kill":
            i = self.runners.index(node) if node in self.runners else fault.victim % RUNNERS
            if self.runners[i].alive:
                self.runners[i].end()
                self.after(span, self.restart_runner, i)
        elif kind == "pause":
            runner = node if isinstance(node, RunnerNode) else self.runners[fault.victim % RUNNERS]
            if runner.alive and not runner.paused:
                runner.stop()
                self.after(span, runner.resume)
        elif kind == "broker":
            self.kill_broker(span)
        elif kind == "cut":
            if connection is not None:
                self.cut(connection)
            else:
                self.break_a_link(fault.victim)
        elif kind == "sim":
            i = self.simulators.index(node) if node in self.simulators else fault.victim % SIMULATORS
            if self.simulators[i].alive:
                self.simulators[i].end()
                self.after(span, self.restart_simulator, i)

    def restart_runner(self, i: int) -> None:
        self.runners[i] = self.new_runner(i)

    def restart_simulator(self, i: int) -> None:
        self.simulators[i] = self.new_simulator(i)

    def kill_broker(self, span: float) -> None:
        if self.broker is None:
            return
        self.broker.check_invariants()
        self.broker = None
        self._tick_at = NEVER
        for connection in list(self.connections):
            self.cut(connection, peer_knows=True)
            connection.up_limit = 0
            self.after(self.random.uniform(0.0, 0.05), connection.node.disconnected, connection)
        self.after(span, self.start_broker)

    def break_a_link(self, victim: int) -> None:
        open_ = sorted((c for c in self.connections if c.node.alive), key=lambda c: c.route)
        if open_:
            connection = open_[victim % len(open_)]
            if victim // 20 == 2 and self.random.random() < 0.5:
                connection.full = True
            else:
                self.cut(connection)

    # ---- the run and its judgement

    def run(self) -> Verdict:
        stuck: list[str] = []
        while self.now < self.faults_end:  # an aimed fault may move it
            self.until(self.faults_end)
        self.aimed.clear()
        version = self.driver.version
        for node in self.simulators:
            node.settled_since = 0

        def training() -> bool:
            return self.driver.version >= version + 2 and all(n.settled_since for n in self.simulators)

        if not self.until(self.now + PATIENCE, training):
            stuck.append(f"version {self.driver.version}, {version} when the faults ended")
            stuck += [f"{n.name} goes on no more" for n in self.simulators if not n.settled_since]
        self.producing = False

        def quiet() -> bool:
            broker = self.broker
            return (
                broker is not None
                and not broker.ledger.in_flight[0]
                and not any(n.session.unsettled for n in self.simulators)
            )

        if not self.until(self.now + PATIENCE, quiet):
            for node in self.simulators:
                if node.session.unsettled:
                    stuck.append(f"{node.name} waits for {list(node.session.unsettled)}")
            if self.broker is not None and self.broker.ledger.in_flight[0]:
                stuck.append(f"the broker holds {self.broker.ledger.in_flight[0]} fragments")
        self.until(self.now + 2.0)
        if self.broker is not None:
            self.broker.check_invariants()
        got, settled = self.got, self.settled
        return Verdict(
            twice=[key for key, n in got.items() if n > 1],
            lost=[key for key, outcome in settled.items() if outcome == DELIVERED and not got[key]],
            untrue=[
                (*key, outcome)
                for key, outcome in settled.items()
                if outcome not in (DELIVERED, "handover_cut") and (got[key] or outcome == "unknown")
            ],
            stuck=stuck,
            broken=self.broken,
            used_though_cut=sum(1 for key, outcome in settled.items() if outcome == "handover_cut" and got[key]),
            outcomes=Counter(settled.values()),
            versions=self.driver.version,
            events=self.events,
        )

    def story(self, last: int = 60) -> str:
        """The end of the trace, and how to see all of it."""
        kinds = ",".join(k for k in self.kinds if isinstance(k, str)) or "none"
        lines = [_line(*entry) for entry in self.trace[-last:]]
        replay = f"python tests/world.py --seed {self.seed} --faults {kinds}"
        faults = [tuple(f) for f in self.schedule]
        return "\n".join([*lines, f"seed {self.seed}, {self.rules.style}, faults {faults}", f"replay: {replay}"])


def _line(t: float, what: str, who: Any, detail: Any) -> str:
    if isinstance(who, bytes):
        who = who.hex().lstrip("0")
    text = detail.hex() if isinstance(detail, bytes) else str(detail)
    for zeros in ("\\x00" * 15, "\\x00" * 14, "\\x00" * 7):
        text = text.replace(zeros, "~")
    return f"{t - 1000:9.4f} {what:>9} {who!s:<11} {text[:230]}"


def judge(world: World) -> Verdict:
    """Run it. Raises `AssertionError` with the story unless the run was perfect."""
    try:
        verdict = world.run()
    except Exception as e:
        e.add_note(world.story())
        raise
    if not verdict.perfect:
        keys = [key[:2] for key in (*verdict.twice, *verdict.lost, *verdict.untrue)]
        raise AssertionError(f"{_failures(verdict)}\n{about(world, keys)}\n{world.story()}")
    return verdict


def about(world: World, keys: Sequence[tuple[bytes, int]]) -> str:
    """The trace lines that mention the fragments `keys`."""
    lines = []
    for entry in world.trace:
        text = str(entry[3])
        if any(repr(s)[2:-1] in text and f"{n}" in text for s, n in keys[:1]) or entry[1] in ("fault", "cut"):
            lines.append(_line(*entry))
    return "\n".join(lines[-80:]) if keys else ""


def _failures(verdict: Verdict) -> str:
    return ", ".join(
        f"{name}: {value}"
        for name, value in (
            ("trained twice", verdict.twice), ("acked as delivered but lost", verdict.lost),
            ("dropped but trained, or no outcome", verdict.untrue), ("stuck", verdict.stuck),
            ("broken", verdict.broken),
        )
        if value
    )  # fmt: skip


def table(runs: int) -> str:
    """Every pair of kinds of faults: in how many of `runs` runs something was trained twice, lost or stuck."""
    rows = ["| faults | runs | trained twice | acked but lost | stuck | other |", "|---|---|---|---|---|---|"]
    alone: list[tuple[str, ...]] = [(), *((kind,) for kind in KINDS)]
    for kinds in alone + list(combinations(KINDS, 2)):
        count: Counter[str] = Counter()
        for seed in range(runs):
            try:
                verdict = World(seed, kinds).run()
            except AssertionError:
                count["other"] += 1
                continue
            count["twice"] += bool(verdict.twice)
            count["lost"] += bool(verdict.lost)
            count["stuck"] += bool(verdict.stuck)
            count["other"] += bool(verdict.untrue or verdict.broken)
        name = " + ".join(kinds) or "none"
        rows.append(f"| {name} | {runs} | {count['twice']} | {count['lost']} | {count['stuck']} | {count['other']} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="none", help=f"some of {', '.join(KINDS)}, separated by commas")
    parser.add_argument("--style", choices=("round", "stream"), help="by default the seed decides")
    parser.add_argument("--runs", type=int, default=0, help="run this many seeds, and print the first failures")
    parser.add_argument("--table", type=int, metavar="RUNS", help="print the table of pairs")
    parser.add_argument("--last", type=int, default=100_000, help="lines of trace to print")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    kinds = [k for k in args.faults.split(",") if k in KINDS]
    if not args.runs:
        world = World(args.seed, kinds, style=args.style)
        verdict = world.run()
        print(world.story(args.last))
        print(_failures(verdict) or "perfect", dict(verdict.outcomes), f"{verdict.versions} versions")
        return
    total: Counter[str] = Counter()
    seen: dict[str, list[int]] = {}
    began, events = time.perf_counter(), 0
    for seed in range(args.seed, args.seed + args.runs):
        world = World(seed, kinds, style=args.style)
        try:
            verdict = world.run()
        except Exception as e:
            total[f"{type(e).__name__}: {e}"[:100]] += 1
            seen.setdefault(type(e).__name__, []).append(seed)
            continue
        total.update(verdict.outcomes)
        total["used though cut"] += verdict.used_though_cut
        total["events"] += verdict.events
        events += verdict.events
        for name in ("twice", "lost", "untrue", "stuck", "broken"):
            if getattr(verdict, name):
                total[name.upper()] += 1
                seen.setdefault(name, []).append(seed)
    spent = time.perf_counter() - began
    print(f"{args.faults}: {args.runs} runs, {spent / args.runs * 1e3:.1f} ms each, {events / args.runs:.0f} events")
    print(dict(total))
    for name, seeds in seen.items():
        print(f"  {name}: seeds {seeds[:12]}")


if __name__ == "__main__":
    main()
