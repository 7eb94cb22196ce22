"""What stands where the broker does in `bench_broker.py`: what forwards alone, and the least that a broker could be."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Any

import zmq
from broker_load import RUN, RUNNERS

from rllink_zmq.messages import (
    ACK,
    HELLO,
    RETURNED,
    TAKE,
    TAKEN,
    WELCOME,
    Message,
    Relayed,
    decode_relayed,
    encode,
)
from rllink_zmq.transport import set_options

MESSAGES = 128
"""Read from one socket before the other one is looked at, as the broker does."""

_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
"""As plain ints: pyzmq's enums cost more than a send."""


def router(context: zmq.Context[zmq.Socket[Any]], kind: int, rcvhwm: int, sndhwm: int) -> tuple[Any, str]:
    """A bound socket with the broker's options, and its address."""
    socket = context.socket(kind)
    set_options(socket, rcvhwm=rcvhwm, sndhwm=sndhwm)
    if kind == zmq.ROUTER:
        socket.router_mandatory = True
    return socket, f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}"


def _two_routers(connection: Pipe) -> tuple[Any, Any, Iterator[bytes], zmq.Poller]:
    """Front and back, the routing ids of the peers at the back in turn, and what waits at the front."""
    context = zmq.Context()
    front, front_address = router(context, zmq.ROUTER, 8, 100)
    back, back_address = router(context, zmq.ROUTER, 1000, 100_000)
    connection.send((front_address, back_address))
    sinks = itertools.cycle([back.recv_multipart()[0] for _ in range(RUNNERS)])
    connection.send("connected")
    poller = zmq.Poller()
    poller.register(front, zmq.POLLIN)
    return front, back, sinks, poller


def plain_loop(connection: Pipe) -> None:
    """A Python loop of two ROUTERs: what comes at the front goes to the peers at the back in turn."""
    front, back, sinks, poller = _two_routers(connection)
    while True:
        poller.poll()
        for _ in range(MESSAGES):
            try:
                frames = front.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            frames[0] = next(sinks)
            back.send_multipart(frames, zmq.NOBLOCK)


def tuned_loop(connection: Pipe) -> None:
    """The same, with plain ints as flags, without pyzmq's wrappers, and with large frames as they are: about the least
    that Python can do."""
    front, back, sinks, poller = _two_routers(connection)
    recv, send = front.recv, super(zmq.Socket, back).send
    while True:
        poller.poll()
        for _ in range(MESSAGES):
            try:
                recv(_NOBLOCK)
            except zmq.Again:
                break
            frame = recv(_NOBLOCK, False)
            frames: list[Any] = [frame.bytes]
            while frame.more:
                frame = recv(_NOBLOCK, False)
                frames.append(frame.bytes if len(frame) < 65_536 else frame)
            send(next(sinks), _MORE)
            for kept in frames[:-1]:
                send(kept, _MORE)
            send(frames[-1], _NOBLOCK)


def c_proxy(connection: Pipe) -> None:
    """`zmq.proxy`: ROUTER in front, DEALER behind."""
    context = zmq.Context()
    front, front_address = router(context, zmq.ROUTER, 8, 100)
    back, back_address = router(context, zmq.DEALER, 1000, 1000)
    connection.send((front_address, back_address))
    for _ in range(RUNNERS):
        back.recv_multipart()
    connection.send("connected")
    zmq.proxy(front, back)


class BareBroker:
    """A broker that keeps no books, in as little Python as the protocol lets it be: it reads each header, forwards
    fragments to the runners in turn, grants every TAKE, and acknowledges what was returned every 10 ms. No windows,
    leases, checks, resending, ledger or limits: what any broker in Python has to pay for on these messages."""

    def __init__(self, context: zmq.Context[zmq.Socket[Any]]) -> None:
        self.front, self.front_address = router(context, zmq.ROUTER, 8, 100)
        self.back, self.back_address = router(context, zmq.ROUTER, 0, 100_000)
        self._runners: list[bytes] = []
        self._turn = 0
        self._routes: dict[bytes, bytes] = {}
        self._taken: dict[bytes, TAKE] = {}
        self._owed: dict[bytes, list[tuple[int, str]]] = {}
        self._due: float | None = None

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self.front, zmq.POLLIN)
        poller.register(self.back, zmq.POLLIN)
        while True:
            poller.poll(None if self._due is None else max(0, int((self._due - time.monotonic()) * 1000) + 1))
            self._from_simulators()
            self._from_runners()
            if self._due is not None and time.monotonic() >= self._due:
                self._acknowledge()

    def _from_simulators(self) -> None:
        recv, send = self.front.recv, super(zmq.Socket, self.back).send
        for _ in range(MESSAGES):
            try:
                route = recv(_NOBLOCK)
            except zmq.Again:
                return
            frame = recv(_NOBLOCK, False)
            header = frame.bytes
            message = decode_relayed(header)
            if type(message) is Relayed:
                self._turn = (self._turn + 1) % len(self._runners)
                send(self._runners[self._turn], _MORE)
                send(header, _MORE)
                send(recv(_NOBLOCK, False), _NOBLOCK)
                continue
            while frame.more:
                frame = recv(_NOBLOCK, False)
            if isinstance(message, HELLO):
                self._routes[message.session] = route
                self._welcome(self.front, route, message)

    def _from_runners(self) -> None:
        recv = self.back.recv
        for _ in range(MESSAGES):
            try:
                route = recv(_NOBLOCK)
            except zmq.Again:
                return
            frame = recv(_NOBLOCK, False)
            message = decode_relayed(frame.bytes)
            while frame.more:
                frame = recv(_NOBLOCK, False)
            if isinstance(message, TAKE):
                self._taken[route] = message
                self._say(self.back, route, TAKEN(message.k))
            elif isinstance(message, RETURNED):
                for claim in self._taken[route].claims:
                    self._owed.setdefault(claim.session, []).extend([(n, "delivered") for n in claim.numbers])
                if self._due is None:
                    self._due = time.monotonic() + 0.01
            elif isinstance(message, HELLO):
                self._runners.append(route)
                self._welcome(self.back, route, message)

    def _acknowledge(self) -> None:
        self._due = None
        owed, self._owed = self._owed, {}
        for session, settled in owed.items():
            self._say(self.front, self._routes[session], ACK(settled, 2 << 20, 0, 200, RUN, 0))

    def _welcome(self, socket: Any, route: bytes, message: HELLO) -> None:
        self._say(socket, route, WELCOME(bytes(8), message.greeting, 1 << 20, 2 << 20, 0, 200, RUN, 0))

    def _say(self, socket: Any, route: bytes, message: Message) -> None:
        socket.send(route, _MORE)
        socket.send(encode(message), _NOBLOCK)


def bare_broker(connection: Pipe) -> None:
    broker = BareBroker(zmq.Context())
    connection.send((broker.front_address, broker.back_address))
    connection.send("connected")
    broker.run()
