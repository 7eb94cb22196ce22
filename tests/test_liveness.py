"""A peer that is cut off without a word (half-open TCP), and one that hangs: who notices, on real sockets.

The times are those of the table in `docs/protocol.md`. All links of a test are cut at once: the waits are the longest
there are, and they run side by side.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from processes import process, status, until

from rllink_zmq.messages import BoxSpace, DiscreteSpace, Spaces, TrainerHello
from rllink_zmq.session import SimulatorSession, State
from rllink_zmq.session_runner import RunnerSession, TrainerSession
from rllink_zmq.transport import HEARTBEAT_MS, Connection, poll

RUN = "018f00000000-00000001"
SPACES = Spaces(BoxSpace((4,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(2))
NOTICED_WITHIN_S = 30.0
"""The longest time of the table is 22 s, and this machine may be busy."""


class Proxy:
    """Passes bytes on until it is told to swallow them: its connections then look alive and carry nothing. New ones
    work."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").split(":")
        self._target = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._other: dict[socket.socket, socket.socket] = {}
        self._swallowed: set[socket.socket] = set()
        self._stopping = False
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def cut(self) -> None:
        """What is connected now carries nothing any longer, in either direction."""
        self._swallowed.update(self._other)

    def close(self) -> None:
        self._stopping = True
        self._thread.join()
        for end in [*self._other, self._listening]:
            end.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select(0.05):
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    self._pass_on(key.fileobj)  # type: ignore[arg-type]

    def _accept(self) -> None:
        ours = self._listening.accept()[0]
        theirs = socket.create_connection(self._target)
        for one, other in ((ours, theirs), (theirs, ours)):
            self._other[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        try:
            data = end.recv(65_536)
            if end in self._swallowed:
                if not data:
                    self._selector.unregister(end)
                return
            if data:
                self._other[end].sendall(data)
                return
        except OSError:
            data = b""
        for one in (end, self._other.get(end)):
            if one is not None and one in self._other:
                self._selector.unregister(one)
                del self._other[one]
                one.close()


@contextmanager
def proxies(*targets: str) -> Iterator[list[Proxy]]:
    made = [Proxy(target) for target in targets]
    try:
        yield made
    finally:
        for proxy in made:
            proxy.close()


def look(*connections: Connection) -> None:
    for connection in connections:
        connection.look()
    poll(connections, None, 0.05)


def test_a_half_open_connection_is_noticed_at_both_ends(addresses: dict[str, str]) -> None:
    """A simulator that waits, a runner and a trainer: each loses its link without a FIN, and each comes back."""
    trainer = Connection(
        TrainerSession(os.urandom(16), TrainerHello(RUN, 100, 2, 0, 1, 50, SPACES, "policy", 6), b"policy"),
        addresses["backend"],
    )
    with proxies(addresses["frontend"], addresses["backend"]) as (front, back):
        simulator = Connection(SimulatorSession(os.urandom(16), name="s", spaces=SPACES), front.address)
        runner = Connection(RunnerSession(os.urandom(16), RUN, name="r"), back.address)
        everybody = (trainer, simulator, runner)
        try:
            for connection in everybody:
                connection.open()
            deadline = time.monotonic() + NOTICED_WITHIN_S
            while not all(c.endpoint.state is State.LIVE for c in everybody):
                look(*everybody)
                assert time.monotonic() < deadline, "all are welcome"
            greeted = [simulator.endpoint.greeting, runner.endpoint.greeting]
            cut_at = time.monotonic()
            front.cut()
            back.cut()
            noticed = dict.fromkeys(("simulator", "runner"), 0.0)
            while not all(noticed.values()):
                look(*everybody)
                now = time.monotonic() - cut_at
                for name, connection, before in zip(noticed, everybody[1:], greeted, strict=True):
                    # Only a link that works again brings a WELCOME for a newer greeting.
                    if connection.endpoint.greeting > before and connection.endpoint.state is State.LIVE:
                        noticed[name] = noticed[name] or now
                assert now < NOTICED_WITHIN_S, noticed
            seen = status(addresses)
            assert seen["simulators"] == 1 and [r["state"] for r in seen["runners"]] == ["live"]
        finally:
            for connection in everybody:
                connection.close(0)


HANGING = """
import os, sys, time
sys.path[:0] = ["tests", "."]
import test_liveness as t
kind, address = sys.argv[1:]
session = (t.SimulatorSession(os.urandom(16), name="s", spaces=t.SPACES) if kind == "simulator"
           else t.RunnerSession(os.urandom(16), t.RUN, name="r"))
connection = t.Connection(session, address)
connection.open()
while True:
    t.look(connection)
"""


def test_a_stopped_peer_is_noticed_by_the_broker_and_comes_back(addresses: dict[str, str]) -> None:
    """SIGSTOP: its kernel still answers for it, its process doesn't."""
    trainer = Connection(
        TrainerSession(os.urandom(16), TrainerHello(RUN, 100, 2, 0, 1, 50, SPACES, "policy", 6), b"policy"),
        addresses["backend"],
    )
    trainer.open()
    try:
        with (
            process("-c", HANGING, "simulator", addresses["frontend"], stdout=subprocess.DEVNULL) as simulator,
            process("-c", HANGING, "runner", addresses["backend"], stdout=subprocess.DEVNULL) as runner,
        ):

            def seen() -> tuple[int, list[str]]:
                look(trainer)
                found = status(addresses)
                return found["simulators"], [r["state"] for r in found["runners"]]

            until(lambda: seen() == (1, ["live"]), "both are there")
            first_heartbeat = time.monotonic() + HEARTBEAT_MS / 1000 + 2.0
            while time.monotonic() < first_heartbeat:
                assert seen() == (1, ["live"])
            peers = (simulator, runner)
            for peer in peers:
                peer.send_signal(signal.SIGSTOP)
            try:
                until(lambda: seen()[0] == 0 and seen()[1] in (["lost"], []), "both are missed", NOTICED_WITHIN_S)
            finally:
                for peer in peers:
                    peer.send_signal(signal.SIGCONT)
            until(lambda: seen() == (1, ["live"]), "both are back")
    finally:
        trainer.close(0)


def test_a_slow_simulator_stays_connected(addresses: dict[str, str]) -> None:
    """One that does nothing of ours for 30 s, as in one long step: libzmq answers for it."""
    simulator = Connection(SimulatorSession(os.urandom(16), name="slow", spaces=SPACES), addresses["frontend"])
    simulator.open()
    try:
        assert simulator.until(lambda: simulator.endpoint.state is State.LIVE, 10.0)
        deadline = time.monotonic() + 30.0
        while time.monotonic() < deadline:
            assert status(addresses)["simulators"] == 1
            time.sleep(0.5)
        greeting = simulator.endpoint.greeting
        look(simulator)
        look(simulator)
        assert simulator.endpoint.state is State.LIVE and simulator.endpoint.greeting == greeting
    finally:
        simulator.close(0)
