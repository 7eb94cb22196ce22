"""The load of `bench_broker.py`: simulators that send, and runners that take."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any, NamedTuple

import measure
import zmq
from processes import questions

from rllink_zmq.messages import (
    ACK,
    FRAGMENT,
    HELLO,
    PING,
    PROTOCOL_VERSION,
    RETURNED,
    TAKE,
    TAKEN,
    BoxSpace,
    Claim,
    Column,
    DiscreteSpace,
    Hello,
    Message,
    RunnerHello,
    SimulatorHello,
    Spaces,
    TrainerHello,
    encode,
)
from rllink_zmq.transport import set_options
from rllink_zmq.wire import column_bytes, pack, parse_header, unpack

SIMULATORS = 100
RUNNERS = 2
BATCH = 4000
"""Env steps that a TAKE wants, at most: PPO's batch."""
TAKE_OF = 20
"""Fragments a TAKE, of 200 steps each."""

RUN = "0123456789ab-00000000"
SPACES = Spaces(BoxSpace((4,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(2))

SMALL = (
    1,
    (
        Column("obs", "<f4", (2, 5)),
        Column("actions", "<i8", (1,)),
        Column("rewards", "<f4", (1,)),
        Column("action_logp", "<f4", (1,)),
        Column("action_dist_inputs", "<f4", (1, 2)),
    ),
)
"""Steps and columns: 64 bytes."""

LARGE = (
    7,
    (
        Column("obs", "|u1", (8, 84, 84, 4 - 1)),
        Column("actions", "<i8", (7,)),
        Column("rewards", "<f4", (7,)),
        Column("action_logp", "<f4", (7,)),
        Column("action_dist_inputs", "<f4", (7, 1093)),
    ),
)
"""Steps and columns: 200,060 bytes of small images, in one frame."""

LOADS = {"small": SMALL, "large": LARGE}
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)

ON_THEIR_WAY = {"small": 200, "large": 4}
"""Fragments a simulator has sent and not heard of."""

PATIENCE = 100.0
"""Seconds that one round may take."""


def fragment(session: bytes, number: int, base: int, load: tuple[int, tuple[Column, ...]]) -> FRAGMENT:
    """As the client makes it, of one long episode. Every number below `base` is settled."""
    steps, columns = load
    t0 = (number - 1) * steps
    return FRAGMENT(session, number, base, "1", t0, steps, "no", RUN, 0, 0.0, columns, 1.0)


def body_of(load: tuple[int, tuple[Column, ...]]) -> bytes:
    return bytes(sum(map(column_bytes, load[1])))


def trainer_hello() -> TrainerHello:
    """No limit on steps, so that bytes alone limit what is on its way."""
    return TrainerHello(RUN, 4000, 1 << 30, 0, RUNNERS, 200, SPACES, "policy", 1)


def hello(session: bytes, peer: Hello) -> HELLO:
    return HELLO(PROTOCOL_VERSION, session, 1, peer, "benchmark", "0")


def greet(socket: zmq.Socket[Any], session: bytes, peer: Hello) -> None:
    """HELLO and WELCOME."""
    socket.send_multipart(pack(hello(session, peer)))
    if not socket.poll(30_000):
        raise measure.BenchmarkError("the broker does not answer HELLO")
    socket.recv_multipart()


def dealer(context: zmq.Context[zmq.Socket[Any]], address: str) -> zmq.Socket[Any]:
    """A DEALER with the options that every peer of the broker has."""
    socket = context.socket(zmq.DEALER)
    set_options(socket, rcvhwm=0, sndhwm=1000)
    socket.connect(address)
    return socket


# ---- both ends


class Way(NamedTuple):
    """A thing to send through: whether it is a broker or only forwards. Addresses of its front and its back."""

    broker: bool
    front: str
    back: str


def senders(connection: Pipe, ways: Sequence[Way], received: Any) -> None:
    """100 simulators for each way. Asked (way, load, number), sends that many fragments and answers when all of them
    have been acknowledged (broker) or received (`received`, counted by the other end)."""
    context = zmq.Context()
    fleets = [Fleet(context, way) for way in ways]
    connection.send("ready")
    for index, load, number in questions(connection):
        connection.send(fleets[index].send(load, number, received))


class Fleet:
    """The simulators of one way."""

    def __init__(self, context: zmq.Context[zmq.Socket[Any]], way: Way) -> None:
        self.acked = way.broker
        self.sockets = [dealer(context, way.front) for _ in range(SIMULATORS)]
        self.sessions = [os.urandom(16) for _ in range(SIMULATORS)]
        self.numbers = [0] * SIMULATORS
        # A look at 100 sockets for each ACK costs more than the ACK does.
        self.epoll = select.epoll()
        self.descriptors = {int(socket.get(zmq.FD)): i for i, socket in enumerate(self.sockets)}
        for descriptor in self.descriptors:
            self.epoll.register(descriptor, select.EPOLLIN)
        if self.acked:
            for socket, session in zip(self.sockets, self.sessions, strict=True):
                greet(socket, session, SimulatorHello(spaces=SPACES))

    def send(self, name: str, count: int, received: Any) -> float:
        """Seconds on the wall."""
        before = received.value
        started = time.monotonic()
        work = Work(LOADS[name], ON_THEIR_WAY[name], count)
        waiting: Iterable[int] = range(SIMULATORS)
        while work.settled < count:
            if self.acked:
                for i in waiting:
                    # Sending, too, takes what the descriptor has to tell: after it comes one more look.
                    while self._acks(i, work) or work.room(len(work.unsettled[i])):
                        self._push(i, work, work.room(len(work.unsettled[i])))
                waiting = [self.descriptors[fd] for fd, _ in self.epoll.poll(1.0)] if work.settled < count else ()
            else:
                work.settled = received.value - before
                if not work.room(work.sent - work.settled, SIMULATORS):
                    time.sleep(0.003)
                while room := work.room(work.sent - work.settled, SIMULATORS):
                    self._push(work.turn, work, room)
                    work.turn = (work.turn + 1) % SIMULATORS
            if time.monotonic() - started > PATIENCE:
                raise measure.BenchmarkError(f"{work.settled} of {count} fragments settled in {PATIENCE:.0f} s")
        return time.monotonic() - started

    def _push(self, i: int, work: Work, number: int) -> None:
        socket, unsettled = self.sockets[i], work.unsettled[i]
        for _ in range(number):
            self.numbers[i] += 1
            base = next(iter(unsettled), self.numbers[i])
            if self.acked:
                unsettled[self.numbers[i]] = None
            socket.send(encode(fragment(self.sessions[i], self.numbers[i], base, work.load)), zmq.SNDMORE)
            socket.send(work.body, copy=len(work.body) < 65_536)
        work.sent += number

    def _acks(self, i: int, work: Work) -> int:
        heard = 0
        socket, unsettled = self.sockets[i], work.unsettled[i]
        while int(socket.get(EVENTS)) & POLLIN:  # as numbers: pyzmq's enums cost more than what is asked
            message, _ = unpack(socket.recv_multipart())
            if isinstance(message, ACK):
                heard += len(message.settled)
                for number, _ in message.settled:
                    del unsettled[number]
                if any(outcome != "delivered" for _, outcome in message.settled):
                    raise measure.BenchmarkError(f"dropped: {message.settled}")
        work.settled += heard
        return heard


class Work:
    """What is asked of a fleet, and how far it is: `count` fragments of `load`, `most` of a simulator on their way."""

    def __init__(self, load: tuple[int, tuple[Column, ...]], most: int, count: int) -> None:
        self.load, self.body = load, body_of(load)
        self.sent = self.settled = self.turn = 0
        self.unsettled: list[dict[int, None]] = [{} for _ in range(SIMULATORS)]
        self._most, self._count = most, count

    def room(self, on_their_way: int, simulators: int = 1) -> int:
        """How many fragments a simulator sends now: half a window at a time, as many as an ACK lets it send. With so
        many `on_their_way` of its own, or of several."""
        some = min(max(1, self._most // 2), self._count - self.sent)
        return some if on_their_way + some <= self._most * simulators else 0


def receiver(connection: Pipe, ways: Sequence[Way], received: Any) -> None:
    """The runners of the broker, and who receives at the other ways. Reads whatever comes, decodes the header."""
    context = zmq.Context()
    poller = zmq.Poller()
    ends: dict[Any, Runner | None] = {}
    for way in [way for way in ways for _ in range(RUNNERS)]:
        socket = dealer(context, way.back)
        if way.broker:
            ends[socket] = Runner(socket)
        else:
            socket.send(b"here")
            ends[socket] = None
        poller.register(socket, zmq.POLLIN)
    poller.register(connection.fileno(), zmq.POLLIN)
    connection.send("ready")
    noblock = int(zmq.NOBLOCK)
    pinged = time.monotonic()
    while True:
        ready = poller.poll(1000)
        if time.monotonic() - pinged >= 1.0:
            pinged = time.monotonic()
            for runner in filter(None, ends.values()):
                runner.ping()
        for found, _ in ready:
            if found not in ends:
                return  # the starter hung up
            runner = ends[found]
            count = 0
            while True:
                try:
                    frame = found.recv(noblock, False)
                except zmq.Again:
                    break
                frames = [frame]
                while frame.more:
                    frame = found.recv(noblock, False)
                    frames.append(frame)
                if runner is not None:
                    runner.handle(parse_header(frames[0].bytes))
                else:
                    parse_header(frames[-2].bytes)
                    count += 1
            received.value += count
            if runner is not None:
                runner.take()


class Runner:
    """Takes what is leased, a batch at most and one TAKE after the other, as `RunnerSession` does, and returns it at
    once."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._leased: deque[tuple[bytes, int, int]] = deque()
        self._k = 0
        self._claiming = False
        greet(socket, os.urandom(16), RunnerHello(RUN))

    def handle(self, message: Message) -> None:
        if isinstance(message, FRAGMENT):
            self._leased.append((message.session, message.number, message.steps))
        elif isinstance(message, TAKEN):
            self._say(RETURNED(message.k))
            self._claiming = False

    def take(self) -> None:
        """Take what there is, if it may."""
        if self._claiming or not self._leased:
            return
        claims: dict[bytes, list[int]] = {}
        wanted = BATCH
        while wanted > 0 and self._leased:
            session, number, steps = self._leased.popleft()
            claims.setdefault(session, []).append(number)
            wanted -= steps
        self._k += 1
        self._claiming = True
        self._say(TAKE(self._k, [Claim(s, n) for s, n in claims.items()]))

    def ping(self) -> None:
        """Still here: a silent runner is given up after 15 s."""
        self._say(PING())

    def _say(self, message: Message) -> None:
        self._socket.send_multipart(pack(message))
