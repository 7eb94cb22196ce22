"""The load of `bench_actions.py`: who asks for actions, what forwards instead of the broker, and who answers there."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any, NamedTuple

import measure
import numpy as np
import zmq
from broker_forwarders import router
from broker_load import dealer, hello
from msgspec.structs import replace
from processes import questions

from rllink_zmq.messages import ACT, ACTION, PONG, WELCOME, Column, ReaderHello, encode
from rllink_zmq.wire import pack, parse_header

VECTOR = (4,), "<f4"
IMAGE = (84, 84, 4), "|u1"
SHAPES = {"vector": VECTOR, "image": IMAGE}
SECONDS_TO_WARM = 0.5
FLOOD = 10
"""Times its credit."""

LOST = 0.2
"""Seconds after which who floods takes what is open for lost."""


class Way(NamedTuple):
    """`through`: "broker", or what forwards. `front`: where to ask; `what`: which observations it takes."""

    through: str
    front: str
    what: str


def bare_loop(connection: Pipe) -> None:
    """A Python loop of two ROUTERs, plain integers as flags: requests to the one service, answers back."""
    context = zmq.Context()
    front, front_address = router(context, zmq.ROUTER, 0, 1000)
    back, back_address = router(context, zmq.ROUTER, 0, 100_000)
    connection.send((front_address, back_address))
    sink = back.recv_multipart()[0]
    connection.send("connected")
    poller = zmq.Poller()
    poller.register(front, zmq.POLLIN)
    poller.register(back, zmq.POLLIN)
    while True:
        poller.poll()
        for source, target, to in ((front, back, sink), (back, front, b"")):
            for _ in range(256):
                try:
                    frames = source.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                # To the service with the asker's name in front, and back without the service's.
                target.send_multipart([to, *frames] if to else frames[1:], zmq.NOBLOCK)


def bare_service(connection: Pipe, back: str, what: str) -> None:
    """The same module in a loop without anything around it: all that is pending is a batch."""
    with measure.quiet():
        from acting import actor

        module = actor(what)
    shape, dtype = SHAPES[what]
    socket = dealer(zmq.Context(), back)
    socket.send(b"here")
    connection.send("ready")
    columns: tuple[Column, ...] = ()
    while True:
        socket.poll()
        asked = []
        while True:
            try:
                asked.append(socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
        rows = np.frombuffer(bytearray().join(frames[2] for frames in asked), dtype).reshape(len(asked), *shape)
        arrays = module.act(rows, True)
        flat = np.concatenate([a.reshape(len(asked), -1).view(np.uint8) for a in arrays.values()], axis=1)
        columns = columns or tuple(Column(name, a.dtype.str, (1, *a.shape[1:])) for name, a in arrays.items())
        for frames, row in zip(asked, flat, strict=True):
            header = parse_header(frames[1])
            assert isinstance(header, ACT)
            answer = encode(ACTION(header.session, header.request, "run", 0, columns))
            socket.send_multipart([frames[0], answer, row.tobytes()], zmq.NOBLOCK)


def askers(connection: Pipe, ways: Sequence[Way], number: int) -> None:
    """Simulators that do nothing but ask. Asked with (way's index, how many of them, seconds, rate): latencies in
    seconds, and seconds on the wall. `rate` 0: each asks again at once; else so many requests a second of all."""
    contexts = [zmq.Context() for _ in ways]  # one has room for 1,023 sockets
    poller = zmq.Poller()
    crowds = [[Asker(context, way) for _ in range(number)] for context, way in zip(contexts, ways, strict=True)]
    connection.send("ready")
    for index, count, seconds, rate, flood in questions(connection):
        crowd = crowds[index][:count]
        for asker in crowd:
            poller.register(asker.socket, zmq.POLLIN)
        _run(poller, crowd, SECONDS_TO_WARM, rate, 0)
        connection.send(_run(poller, crowd, seconds, rate, flood))
        for asker in crowd:
            poller.unregister(asker.socket)


def _run(poller: Any, crowd: Sequence[Asker], seconds: float, rate: float, flood: int) -> tuple[list[float], float]:
    by_socket = {asker.socket: asker for asker in crowd}
    idle = deque(crowd[1:] if flood else crowd)
    latencies: list[float] = []
    started = now = time.perf_counter()
    sent = 0
    if flood:
        crowd[0].flood(flood)
    while True:
        now = time.perf_counter()
        over = now >= started + seconds
        due = 1 << 30 if not rate else int((now - started) * rate) - sent
        while idle and due > 0 and not over:
            idle.popleft().ask(now)
            sent, due = sent + 1, due - 1
        if over and (len(idle) == len(crowd) - bool(flood)):
            break
        wait = 1.0 if not rate or over else max(0.0, started + (sent + 1) / rate - now)
        if now > started + seconds + 20:
            raise measure.BenchmarkError("requests have had no answer for 20 s")
        if flood and crowd[0].drain() == 0 and not over:
            crowd[0].flood(flood)
        for socket, _ in poller.poll(min(wait, LOST) * 1000):
            asker = by_socket[socket]
            if flood and asker is crowd[0]:
                continue
            took = asker.answered()
            if took is not None:
                latencies.append(took)
                idle.append(asker)
    while flood and crowd[0].drain():
        crowd[0].socket.poll(100)
    return latencies, time.perf_counter() - started


class Asker:
    """One simulator."""

    def __init__(self, context: zmq.Context[zmq.Socket[Any]], way: Way) -> None:
        shape, dtype = SHAPES[way.what]
        self.socket = dealer(context, way.front)
        self.session = os.urandom(16)
        self.open = self.regreets = 0
        self._heard = 0.0
        self._columns = (Column("obs", dtype, (1, *shape)),)
        self._body = np.random.default_rng(0).integers(0, 2, (1, *shape)).astype(dtype).tobytes()
        self._request = 0
        self._asked = 0.0
        self._greeting = 0
        if way.through == "broker":
            self._greet()

    def _greet(self) -> None:
        self._greeting += 1
        said = replace(hello(self.session, ReaderHello()), greeting=self._greeting)
        self.socket.send_multipart(pack(said))
        while self.socket.poll(30_000):
            if isinstance(parse_header(self.socket.recv_multipart()[0]), WELCOME):
                return
        raise measure.BenchmarkError("the broker does not answer HELLO")

    def ask(self, now: float) -> None:
        self._request += 1
        self._asked = now
        self.socket.send(encode(ACT(self.session, self._request, 1, self._columns)), zmq.SNDMORE)
        self.socket.send(self._body)

    def answered(self) -> float | None:
        """Read the answer: seconds that it took. None for a probe of one that was silent."""
        message = parse_header(self.socket.recv_multipart()[0])
        if isinstance(message, PONG):
            return None
        if not isinstance(message, ACTION) or message.code:
            raise measure.BenchmarkError(f"no action: {message}")
        return time.perf_counter() - self._asked

    def flood(self, count: int) -> None:
        """Ask for so many actions at once."""
        for _ in range(count):
            self.ask(0.0)
        self.open += count
        self._heard = time.perf_counter()

    def drain(self) -> int:
        """Read what has come; how many are still open. A broker that could not send it all has dropped it, and is
        greeted again."""
        came = False
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            came = True
            self.open -= isinstance(parse_header(self.socket.recv_multipart()[0]), ACTION)
            self._heard = time.perf_counter()
        if not came and self.open and time.perf_counter() - self._heard > LOST:
            self.open = 0
            self.regreets += 1
            self._greet()
        return self.open
