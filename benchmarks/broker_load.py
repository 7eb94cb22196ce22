"""The load of `bench_broker.py`: simulators that send, runners that take, and what forwards instead of the broker."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Sequence
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


# ---- what forwards instead of the broker


def _router(context: zmq.Context[zmq.Socket[Any]], kind: int, rcvhwm: int, sndhwm: int) -> tuple[Any, str]:
    """A bound socket with the broker's options, and its address."""
    socket = context.socket(kind)
    set_options(socket, rcvhwm=rcvhwm, sndhwm=sndhwm)
    if kind == zmq.ROUTER:
        socket.router_mandatory = True
    return socket, f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


def plain_loop(connection: Pipe) -> None:
    """A Python loop of two ROUTERs: what comes at the front goes to the peers at the back in turn."""
    context = zmq.Context()
    front, front_address = _router(context, zmq.ROUTER, 8, 100)
    back, back_address = _router(context, zmq.ROUTER, 1000, 100_000)
    connection.send((front_address, back_address))
    sinks = itertools.cycle([back.recv_multipart()[0] for _ in range(RUNNERS)])
    connection.send("connected")
    poller = zmq.Poller()
    poller.register(front, zmq.POLLIN)
    while True:
        poller.poll()
        for _ in range(128):
            try:
                frames = front.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            frames[0] = next(sinks)
            back.send_multipart(frames, zmq.NOBLOCK)


def tuned_loop(connection: Pipe) -> None:
    """The same, with plain ints as flags, without pyzmq's wrappers, and with large frames as they are: about the least
    that Python can do."""
    context = zmq.Context()
    front, front_address = _router(context, zmq.ROUTER, 8, 100)
    back, back_address = _router(context, zmq.ROUTER, 1000, 100_000)
    connection.send((front_address, back_address))
    sinks = itertools.cycle([back.recv_multipart()[0] for _ in range(RUNNERS)])
    connection.send("connected")
    poller = zmq.Poller()
    poller.register(front, zmq.POLLIN)
    recv, send = front.recv, super(zmq.Socket, back).send
    noblock, more = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
    while True:
        poller.poll()
        for _ in range(128):
            try:
                recv(noblock)
            except zmq.Again:
                break
            frame = recv(noblock, False)
            frames: list[Any] = [frame.bytes]
            while frame.more:
                frame = recv(noblock, False)
                frames.append(frame.bytes if len(frame) < 65_536 else frame)
            send(next(sinks), more)
            for kept in frames[:-1]:
                send(kept, more)
            send(frames[-1], noblock)


def c_proxy(connection: Pipe) -> None:
    """`zmq.proxy`: ROUTER in front, DEALER behind."""
    context = zmq.Context()
    front, front_address = _router(context, zmq.ROUTER, 8, 100)
    back, back_address = _router(context, zmq.DEALER, 1000, 1000)
    connection.send((front_address, back_address))
    for _ in range(RUNNERS):
        back.recv_multipart()
    connection.send("connected")
    zmq.proxy(front, back)


# ---- both ends


class Way(NamedTuple):
    """A thing to send through: `through` is "broker" or what forwards. Addresses of its front and its back."""

    through: str
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
        self.acked = way.through == "broker"
        self.sockets = [dealer(context, way.front) for _ in range(SIMULATORS)]
        self.sessions = [os.urandom(16) for _ in range(SIMULATORS)]
        self.numbers = [0] * SIMULATORS
        if self.acked:
            for socket, session in zip(self.sockets, self.sessions, strict=True):
                greet(socket, session, SimulatorHello(spaces=SPACES))

    def send(self, name: str, count: int, received: Any) -> float:
        """Seconds on the wall."""
        load, most = LOADS[name], ON_THEIR_WAY[name]
        body = body_of(load)
        copy = len(body) < 65_536
        before = received.value
        started = time.monotonic()
        sent = settled = 0
        unsettled: list[dict[int, None]] = [{} for _ in range(SIMULATORS)]
        while settled < count:
            progress = False
            for i, socket in enumerate(self.sockets):
                if self.acked and unsettled[i]:
                    heard = self._acks(socket, unsettled[i])
                    settled += heard
                    progress = progress or heard > 0
                room = most - len(unsettled[i]) if self.acked else most * SIMULATORS - (sent - settled)
                # Half a window at a time, as many as a simulator's ACK lets it send.
                room = min(room, max(1, most // 2), count - sent)
                if room < min(max(1, most // 2), count - sent) or room <= 0:
                    continue
                for _ in range(room):
                    number = self.numbers[i] = self.numbers[i] + 1
                    base = next(iter(unsettled[i]), number)
                    if self.acked:
                        unsettled[i][number] = None
                    socket.send(encode(fragment(self.sessions[i], number, base, load)), zmq.SNDMORE)
                    socket.send(body, copy=copy)
                sent += room
                progress = True
            if not self.acked:
                settled = received.value - before
            if not progress:
                time.sleep(0.003)  # a look at 100 sockets is not cheap, and ACKs come every 10 ms
            if time.monotonic() - started > PATIENCE:
                raise measure.BenchmarkError(f"{settled} of {count} fragments settled in {PATIENCE:.0f} s")
        return time.monotonic() - started

    def _acks(self, socket: zmq.Socket[Any], unsettled: dict[int, None]) -> int:
        heard = 0
        while int(socket.get(EVENTS)) & POLLIN:  # as numbers: pyzmq's enums cost more than what is asked
            message, _ = unpack(socket.recv_multipart())
            if isinstance(message, ACK):
                heard += len(message.settled)
                for number, _ in message.settled:
                    del unsettled[number]
                if any(outcome != "delivered" for _, outcome in message.settled):
                    raise measure.BenchmarkError(f"dropped: {message.settled}")
        return heard


def receiver(connection: Pipe, ways: Sequence[Way], received: Any) -> None:
    """The runners of the broker, and who receives at the other ways. Reads whatever comes, decodes the header."""
    context = zmq.Context()
    poller = zmq.Poller()
    ends: dict[Any, Runner | None] = {}
    for way in [way for way in ways for _ in range(RUNNERS)]:
        socket = dealer(context, way.back)
        if way.through == "broker":
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
