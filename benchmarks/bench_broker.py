"""The broker's cost: a fragment's way through it against forwarding alone, bytes against zmq.proxy, 1,000 against 10.

Real processes on tcp: 100 DEALERs (one process) send real FRAGMENT messages; the broker decodes, checks, queues and
leases them to two runners (another process), which TAKE them in batches of 20 and say RETURNED; ACKs go back.

- small: 64 bytes a fragment. Fragments per second of CPU of the broker's process, against a Python loop of two ROUTERs
  that forwards the very same frames and does nothing else (nothing comes back through it). `tuned` is the same loop
  with the broker's own way of calling pyzmq.
- large: 200 KB a fragment. Bytes/s on the wall against `zmq.proxy` (C; ROUTER in front, DEALER behind) with the same
  frames, from the same senders to the same receiver, the same number on their way.
- core: `core.handle` alone, no sockets, 1,000 simulators against 10: FRAGMENT, TAKE, RETURNED, ticks, per fragment.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from math import inf
from multiprocessing.connection import Connection as Pipe
from typing import Any, NamedTuple

import measure
import zmq
from processes import SPAWN, Helper, broker, helpers, questions

from broker.core import Broker
from broker.events import Forward, Received, Side, Tick
from broker.settings import Settings
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
from rllink_zmq.session_runner import TrainerSession
from rllink_zmq.transport import Connection, set_options
from rllink_zmq.transport_thread import ConnectionThread
from rllink_zmq.wire import check_body, column_bytes, pack, parse_header, unpack

SIMULATORS = 100
RUNNERS = 2
TAKE_OF = 20
"""Fragments a TAKE: PPO's 4,000 steps in fragments of 200."""

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
    """The same, with plain ints as flags and without pyzmq's wrappers."""
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
            frames = [frame.bytes]
            while frame.more:
                frame = recv(noblock, False)
                frames.append(frame.bytes)
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
        while socket.get(zmq.EVENTS) & zmq.POLLIN:
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
    """Takes what is leased in batches of `TAKE_OF`, and returns it at once."""

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._socket = socket
        self._leased: deque[tuple[bytes, int]] = deque()
        self._k = 0
        greet(socket, os.urandom(16), RunnerHello(RUN))

    def handle(self, message: Message) -> None:
        if isinstance(message, FRAGMENT):
            self._leased.append((message.session, message.number))
            if len(self._leased) >= TAKE_OF:
                self.take()
        elif isinstance(message, TAKEN):
            self._say(RETURNED(message.k))

    def take(self) -> None:
        """Take all there is."""
        if not self._leased:
            return
        claims: dict[bytes, list[int]] = {}
        for session, number in self._leased:
            claims.setdefault(session, []).append(number)
        self._leased.clear()
        self._k += 1
        self._say(TAKE(self._k, [Claim(s, n) for s, n in claims.items()]))

    def ping(self) -> None:
        """Still here: a silent runner is given up after 15 s."""
        self._say(PING())

    def _say(self, message: Message) -> None:
        self._socket.send_multipart(pack(message))


# ---- the core alone


class Core:
    """A broker core with `number` simulators and 2 runners, fed as fast as it goes: 10,000 fragments a second of its
    own clock, each runner taking every 20."""

    def __init__(self, number: int) -> None:
        self.now = 0.0
        self.broker = Broker(Settings(memory=4096 << 20), b"epoch---", "tcp://127.0.0.1:1", self.now)
        trainer = trainer_hello()
        self._in(Side.BACK, b"trainer", hello(os.urandom(16), trainer))
        for route in (b"a", b"b"):
            self._in(Side.BACK, route, hello(os.urandom(16), RunnerHello(RUN)))
        self.sessions = [os.urandom(16) for _ in range(number)]
        for i, session in enumerate(self.sessions):
            self._in(Side.FRONT, b"s%d" % i, hello(session, SimulatorHello(spaces=SPACES)))
        self.numbers = [0] * number
        self.turn = itertools.cycle(range(number))
        self.leased: dict[bytes, list[tuple[bytes, int]]] = {b"a": [], b"b": []}
        self.k = 0
        self.now = 5.0

    def _in(self, side: Side, route: bytes, message: Message) -> None:
        self.broker.handle(Received(side, route, message, (encode(message),), 0), self.now)

    def events(self, number: int) -> Iterator[Received]:
        body = body_of(SMALL)
        for _ in range(number):
            i = next(self.turn)
            self.numbers[i] += 1
            header = encode(fragment(self.sessions[i], self.numbers[i], max(1, self.numbers[i] - 2), SMALL))
            message = parse_header(header)
            yield Received(Side.FRONT, b"s%d" % i, message, (header, body), check_body(message, (body,)))

    def run(self, number: int) -> dict[str, float]:
        """CPU seconds in `handle`, per fragment: of fragments' own events, and of all of them."""
        events = list(self.events(number))
        handle, clock = self.broker.handle, time.thread_time
        fragments = others = 0.0
        for start in range(0, number, 100):
            began = clock()
            outs = []
            for event in events[start : start + 100]:
                self.now += 1e-4
                outs.append(handle(event, self.now))
            fragments += clock() - began
            for actions, event in zip(outs, events[start:], strict=False):
                for action in actions:
                    if type(action) is Forward:
                        message = event.message
                        self.leased[action.route].append((message.session, message.number))
            asked = list(self._takes())
            began = clock()
            for take, returned in asked:
                handle(take, self.now)
                handle(returned, self.now)
            handle(Tick(), self.now)
            others += clock() - began
        if self.broker.ledger.delivered[0] != sum(self.numbers):
            raise measure.BenchmarkError(f"not all delivered: {self.broker.ledger.as_json()}")
        return {"fragment": fragments / number, "all": (fragments + others) / number}

    def _takes(self) -> Iterator[tuple[Received, Received]]:
        for route, keys in self.leased.items():
            while keys:
                batch, keys[:] = keys[:TAKE_OF], keys[TAKE_OF:]
                claims: dict[bytes, list[int]] = {}
                for session, number in batch:
                    claims.setdefault(session, []).append(number)
                self.k += 1
                take = TAKE(self.k, [Claim(s, n) for s, n in claims.items()])
                yield (
                    Received(Side.BACK, route, take, (b"",), 0),
                    Received(Side.BACK, route, RETURNED(self.k), (b"",), 0),
                )


# ---- the benchmark


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("broker", options)
    with broker() as addresses, helpers((plain_loop,), (tuned_loop,), (c_proxy,)) as forwarders:
        _sockets(
            report, options, addresses, dict(zip(("plain loop", "tuned loop", "zmq.proxy"), forwarders, strict=True))
        )
    _core(report, options)
    report.show()


def _sockets(
    report: measure.Report, options: argparse.Namespace, addresses: dict[str, Any], forwarders: dict[str, Helper]
) -> None:
    ways = [Way("broker", addresses["frontend"], addresses["backend"])]
    ways += [Way(name, *helper.ready) for name, helper in forwarders.items()]
    pids = {"broker": addresses["pid"], **{name: helper.pid for name, helper in forwarders.items()}}
    index = {way.through: i for i, way in enumerate(ways)}
    trainer = ConnectionThread(
        Connection(TrainerSession(os.urandom(16), trainer_hello(), b"-"), addresses["backend"]),
        lambda _: inf,
        "trainer",
    )
    trainer.start()
    received = SPAWN.Value("Q", 0, lock=False)
    with helpers((receiver, ways, received)), helpers((senders, ways, received)) as (sending,):
        for helper in forwarders.values():
            helper.answer()

        def run(name: str, load: str, number: int) -> dict[str, float]:
            before = measure.cpu_seconds(pids[name])
            seconds = sending.ask(index[name], load, number)
            time.sleep(0.05)
            used = measure.cpu_seconds(pids[name]) - before
            return {"per_cpu_s": number / used, "per_s": number / seconds, "cores": used / seconds}

        for load, sides, number, of in (
            ("small", ("broker", "plain loop", "tuned loop"), *((6_000, 1) if options.quick else (40_000, 9))),
            ("large", ("broker", "zmq.proxy"), *((300, 1) if options.quick else (3_000, 9))),
        ):
            found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for side in sides:
                run(side, load, number // 4)
            for _, side in measure.rounds(of, sides):
                found[side].append(run(side, load, number))
            report.rounds[load] = found
            _tell(report, load, found)
    trainer.stop()


def _tell(report: measure.Report, load: str, found: dict[str, list[dict[str, float]]]) -> None:
    size = len(body_of(LOADS[load]))
    middle = {s: {k: measure.median([r[k] for r in rs]) for k in rs[0]} for s, rs in found.items()}
    report.figures[load] = {"bytes": size, **middle}
    rows = [
        (s, m["per_cpu_s"], 1e6 / m["per_cpu_s"], m["per_s"], m["per_s"] * size / 1e6, m["cores"])
        for s, m in middle.items()
    ]
    report.table(
        f"{size:,} bytes a fragment, {SIMULATORS} connections (medians of rounds that alternate)",
        ("", "fragments/s of CPU", "CPU µs a fragment", "fragments/s, wall", "MB/s, wall", "cores"),
        rows,
    )

    def against(side: str, key: str) -> list[float]:
        return measure.ratios([r[key] for r in found["broker"]], [r[key] for r in found[side]])

    if load == "small":
        what = "64-byte fragments per second of CPU, part of a plain loop's"
        report.targets.append(measure.target(what, against("plain loop", "per_cpu_s"), "at least", 0.5))
        tuned = measure.median(against("tuned loop", "per_cpu_s"))
        report.notes.append(f"part of the tuned loop's fragments per second of CPU: {tuned:.2f}")
    else:
        what = "200 KB fragments, bytes/s on the wall, part of zmq.proxy's"
        report.targets.append(measure.target(what, against("zmq.proxy", "per_s"), "at least", 0.9))
        cost = measure.median(against("zmq.proxy", "per_cpu_s"))
        report.notes.append(f"part of zmq.proxy's bytes per second of CPU: {cost:.2f}")


def _core(report: measure.Report, options: argparse.Namespace) -> None:
    sizes = (10, 1000)
    cores = {str(n): Core(n) for n in sizes}
    number, of = (2_000, 2) if options.quick else (10_000, 15)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cores}
    for core in cores.values():
        core.run(number)
    for _, name in measure.rounds(of, list(cores)):
        found[name].append(cores[name].run(number))
    for core in cores.values():
        core.broker.check_invariants()
    report.rounds["core"] = found
    middle = {n: {k: measure.median([r[k] for r in rs]) for k in rs[0]} for n, rs in found.items()}
    report.figures["core"] = middle
    report.table(
        "core.handle, CPU µs a fragment",
        ("simulators", "FRAGMENT", "with its part of TAKE, RETURNED, ticks"),
        [(int(n), m["fragment"] * 1e6, m["all"] * 1e6) for n, m in middle.items()],
    )
    few, many = ([r["all"] for r in found[str(n)]] for n in sizes)
    what = "core.handle at 1,000 simulators, times at 10"
    report.targets.append(measure.target(what, measure.ratios(many, few), "at most", 1.3))
    few, many = ([r["fragment"] for r in found[str(n)]] for n in sizes)
    own = measure.median(measure.ratios(many, few))
    report.notes.append(f"FRAGMENT events alone: {own:.2f} times")


if __name__ == "__main__":
    main()
