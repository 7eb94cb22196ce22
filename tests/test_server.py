"""The broker's loop on real sockets. Nothing sleeps for a fixed time: what is waited for has a deadline."""

from __future__ import annotations

import logging
import os
import random
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import zmq

from broker.admin import Question
from broker.events import Action, Event, Received, Send, Side, Tick
from broker.server import Server
from broker.settings import Settings
from rllink_zmq import arrays
from rllink_zmq.errors import SettingsError
from rllink_zmq.messages import (
    ACK,
    FRAGMENT,
    HELLO,
    MAX_FRAME_BYTES,
    PING,
    PROTOCOL_VERSION,
    REFUSED,
    STATE,
    WELCOME,
    BoxSpace,
    Column,
    DiscreteSpace,
    Message,
    SimulatorHello,
    Spaces,
    TrainerHello,
    decode,
    encode,
)
from rllink_zmq.session import Endpoint, SimulatorSession, State
from rllink_zmq.session_runner import Lease, RunnerSession, TrainerSession
from rllink_zmq.transport import Connection, Subscription, poll

RUN = "018f00000000-00000001"
SPACES = Spaces(BoxSpace((4,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(2))
TERMS = TrainerHello(RUN, 100, 1000, 0, 1, 50, SPACES, "policy", 6)
ANY = "tcp://127.0.0.1:*"
TIMEOUT = 20.0


@contextmanager
def serving(settings: Settings | None = None, **options: Any) -> Iterator[Server]:
    """A broker in a thread. Whatever the test did, it must still run at the end, stop when asked, and its core be
    sound."""
    options = {"frontend": ANY, "backend": ANY, "weights": ANY, "admin": None} | options
    server = Server(settings, **options)
    server.bind()
    ended: Future[None] = Future()

    def run() -> None:
        try:
            server.run()
            ended.set_result(None)
        except BaseException as e:
            ended.set_exception(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server
        assert not ended.done(), ended.exception()
    finally:
        server.stop()
        thread.join(TIMEOUT)
        server.close()
    ended.result(0)
    assert server.core is not None
    server.core.check_invariants()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


def ledger(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = server.ask(Question.STATUS).result(TIMEOUT)["ledger"]
    return found


def until(condition: Callable[[], object], *connections: Connection, timeout: float = TIMEOUT) -> None:
    """Look after `connections` until `condition()`."""
    deadline = time.monotonic() + timeout
    while True:
        for connection in connections:
            connection.look()
        if condition():
            return
        assert time.monotonic() < deadline, "this did not happen in time"
        poll(connections, None, 0.02)


_dialled: list[Connection] = []


def dial(session: Endpoint, address: str) -> Connection:
    """A connection that ends with the test."""
    connection = Connection(session, address)
    _dialled.append(connection)
    connection.open()
    return connection


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    yield
    while _dialled:
        _dialled.pop().close(0)


class Simulator:
    def __init__(self, server: Server, name: str = "simulator") -> None:
        self.session = SimulatorSession(os.urandom(16), name=name, spaces=SPACES)
        self.connection = dial(self.session, server.frontend)

    def submit(self, steps: int = 3, end: str = "no", width: int = 4) -> int:
        columns, body = arrays.to_buffers(
            {
                "obs": np.full((steps + 1, width), self.session.number, np.float32),
                "actions": np.zeros(steps, np.int64),
            }
        )
        number = self.session.submit(
            episode="e", t0=0, steps=steps, end=end, run=RUN, version=0, return_so_far=0.0, columns=columns, body=body,
            now=time.monotonic(),
        )  # fmt: skip
        self.connection.flush()
        return number


class Trainer:
    """A trainer and a runner that takes whatever it is leased and has it at once."""

    def __init__(self, server: Server, weights: bytes = b"weights") -> None:
        now = time.monotonic()
        self.trainer = TrainerSession(os.urandom(16), TERMS, b"policy", name="trainer")
        self.runner = RunnerSession(os.urandom(16), RUN, name="runner")
        self.connections = []
        for session in (self.trainer, self.runner):
            connection = dial(session, server.backend)
            self.connections.append(connection)
            until(lambda c=connection: c.endpoint.state is State.LIVE, *self.connections)  # type: ignore[misc]
        self.runner.offer(0, len(weights), lambda: weights, now)
        self.got: list[Lease] = []

    def work(self) -> None:
        """Take, and give back. To be called between looks."""
        now = time.monotonic()
        if self.runner.taken is not None:
            self.got += self.runner.taken
            self.runner.taken = None
            self.runner.give_back(now)
        if not self.runner.claiming:
            self.runner.take(1 << 30, now)


def deliver(simulator: Simulator, trainer: Trainer, timeout: float = TIMEOUT) -> None:
    """Until everything the simulator has sent is settled."""

    def settled() -> bool:
        trainer.work()
        return not simulator.session.unsettled

    until(settled, simulator.connection, *trainer.connections, timeout=timeout)


@contextmanager
def dealer(address: str, **options: Any) -> Iterator[zmq.Socket[Any]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as opened:
        opened.linger = 0
        for name, value in options.items():
            setattr(opened, name, value)
        opened.connect(address)
        yield opened


def answer(raw: zmq.Socket[Any]) -> Message:
    assert raw.poll(int(TIMEOUT * 1000)), "no answer"
    return decode(raw.recv_multipart()[0])


def hello(session: bytes = b"s" * 16, protocol: int = PROTOCOL_VERSION) -> bytes:
    return encode(HELLO(protocol, session, 1, SimulatorHello(), "raw"))


def fragment(session: bytes, number: int, columns: Sequence[Column]) -> bytes:
    return encode(FRAGMENT(session, number, 1, "e", 0, 1, "no", RUN, 0, 0.0, tuple(columns)))


# ---- a whole exchange -----------------------------------------------------------------------------------------


def test_fragments_get_through(server: Server) -> None:
    trainer = Trainer(server)
    simulator = Simulator(server)
    until(lambda: simulator.session.state is State.LIVE, simulator.connection, *trainer.connections)
    for end in ("no", "no", "terminated"):
        simulator.submit(end=end)
    deliver(simulator, trainer)
    assert simulator.session.outcomes == {"delivered": [3, 9]}
    assert [lease.message.number for lease in trainer.got] == [1, 2, 3]
    for lease in trainer.got:
        found = arrays.from_body(lease.message.columns, [bytes(b) for b in lease.body])
        np.testing.assert_array_equal(found["obs"], np.full((4, 4), lease.message.number - 1, np.float32))
    assert ledger(server)["delivered"] == {"fragments": 3, "steps": 9}


def test_each_of_several_topics_is_subscribed_to(server: Server) -> None:
    """And no other."""
    topics = ("first", "second", "third")
    news = Subscription(server.weights, topics)
    try:
        trainer = Trainer(server)
        version = 0
        found: set[str] = set()

        def heard() -> bool:
            # A subscription takes a moment: what was published before it is gone.
            nonlocal version
            found.update(message.module for message, _ in news.read() if isinstance(message, STATE))
            version += 1
            for topic in ("other", *topics):
                trainer.runner.offer(version, 5, lambda: b"newer", time.monotonic(), topic)
            return len(found) == len(topics)

        until(heard, *trainer.connections)
        assert found == set(topics)
    finally:
        news.close()


def test_a_large_fragment_arrives_as_it_was(server: Server) -> None:
    """Its frames pass through without being copied."""
    trainer = Trainer(server)
    simulator = Simulator(server)
    until(lambda: simulator.session.window, simulator.connection, *trainer.connections)
    simulator.submit(steps=10, width=20_000)
    deliver(simulator, trainer)
    (lease,) = trainer.got
    assert max(map(len, lease.body)) <= MAX_FRAME_BYTES
    found = arrays.from_body(lease.message.columns, [bytes(b) for b in lease.body])
    np.testing.assert_array_equal(found["obs"], np.zeros((11, 20_000), np.float32))


def test_weights_are_published(server: Server) -> None:
    news = Subscription(server.weights)
    try:
        with dealer(server.frontend) as raw:
            raw.send(hello())
            welcome = answer(raw)
            assert isinstance(welcome, WELCOME)
            assert welcome.weights == server.weights
        version = 0
        trainer = Trainer(server)
        found: list[tuple[Message, list[Any]]] = []

        def heard() -> bool:
            # A subscription takes a moment: what was published before it is gone.
            nonlocal version
            found.extend(news.read())
            if not found and trainer.runner.offered_version == version:
                version += 1
                trainer.runner.offer(version, 5, lambda: b"newer", time.monotonic())
            return bool(found)

        until(heard, *trainer.connections)
        message, body = found[0]
        assert (message.run, message.size) == (RUN, 5)  # type: ignore[union-attr]
        assert [bytes(b) for b in body] == [b"newer"]
    finally:
        news.close()


def test_hundreds_of_simulators_at_once() -> None:
    with serving(Settings(memory=2 << 30)) as server:
        trainer = Trainer(server)
        simulators = [Simulator(server, f"s{i}") for i in range(200)]
        connections = [s.connection for s in simulators]
        for simulator in simulators:
            simulator.submit()

        def settled() -> bool:
            trainer.work()
            return not any(s.session.unsettled for s in simulators)

        until(settled, *connections, *trainer.connections, timeout=60)
        assert ledger(server)["delivered"]["fragments"] == 200


def test_thousands_of_peers_that_are_gone_in_one_moment() -> None:
    server = Server(frontend=ANY, backend=ANY, weights=ANY, admin=None)
    server.bind()
    try:
        assert server.core is not None
        routes = [b"gone%d" % i for i in range(3000)]
        for i, route in enumerate(routes):
            session = i.to_bytes(16, "big")
            greeting = decode(hello(session))
            server.core.handle(Received(Side.FRONT, route, greeting, [], 0), 0.0)
        assert server.core.simulators_live == len(routes)
        server._carry_out([Send(Side.FRONT, route, PING()) for route in routes], 0.0)
        assert server.core.simulators_live == 0
        server.core.check_invariants()
    finally:
        server.close()


# ---- bad input ------------------------------------------------------------------------------------------------


def noise(rng: random.Random) -> list[bytes]:
    """Frames of random bytes; now and then a true header with a random body, or one that was damaged."""
    kind = rng.random()
    if kind < 0.8:
        return [rng.randbytes(rng.randrange(60)) for _ in range(rng.choice((1, 1, 1, 2, 3, 8)))]
    header = bytearray(
        rng.choice((hello(rng.randbytes(16)), encode(PING()), fragment(b"s" * 16, 1, [Column("obs", "<f4", (2, 3))])))
    )
    if kind < 0.9:
        header[rng.randrange(len(header))] = rng.randrange(256)
    return [bytes(header), rng.randbytes(rng.randrange(40))]


@pytest.mark.parametrize("dealers", [1, 5])
def test_100_000_random_messages(server: Server, dealers: int) -> None:
    """On both ROUTERs, while others go about their business."""
    rng = random.Random(20260101 + dealers)
    trainer = Trainer(server)
    simulator = Simulator(server)
    until(lambda: simulator.session.window, simulator.connection, *trainer.connections)
    with zmq.Context() as context, ExitStack() as stack:
        raws = []
        for address in (server.frontend, server.backend):
            for _ in range(dealers):
                raw = context.socket(zmq.DEALER)
                raw.linger, raw.sndhwm, raw.rcvhwm = 0, 100, 0
                raw.connect(address)
                stack.callback(raw.close, 0)
                raws.append(raw)
        left = 100_000
        sent_at_all = 0
        while left:
            raw = raws[left % len(raws)]
            try:
                raw.send_multipart(noise(rng), zmq.NOBLOCK)
                left -= 1
            except zmq.Again:
                poll([simulator.connection, *trainer.connections], None, 0.002)
            if left % 1000 == 0 and sent_at_all < 100:
                simulator.submit()
                sent_at_all += 1
            if left % 50 == 0:
                for connection in (simulator.connection, *trainer.connections):
                    connection.look()
                trainer.work()
                for r in raws:
                    while int(r.get(zmq.EVENTS)) & zmq.POLLIN:
                        r.recv_multipart(zmq.NOBLOCK)
        deliver(simulator, trainer, timeout=60)
        assert simulator.session.outcomes == {"delivered": [sent_at_all, 3 * sent_at_all]}

        def judged() -> bool:  # much of it may still be waiting to be read
            found: int = server.ask(Question.STATUS).result(TIMEOUT)["malformed_messages"]
            return found > 50_000

        until(judged, simulator.connection, *trainer.connections, timeout=60)


def test_a_header_that_lies_about_its_body(server: Server) -> None:
    settled: list[tuple[int, str]] = []

    def refusal() -> REFUSED:
        while True:
            message = answer(raw)
            if isinstance(message, REFUSED):
                return message
            assert isinstance(message, ACK)
            settled.extend(message.settled)

    with dealer(server.frontend) as raw:
        raw.send(hello())
        assert isinstance(answer(raw), WELCOME)
        header = fragment(b"s" * 16, 1, [Column("obs", "<f4", (2, 1 << 20))])
        for body in ([], [b"1234"], [b"1"] * 100, [b"x" * 100_000] * 3):
            raw.send_multipart([header, *body])
            refused = refusal()
            assert refused.code == "malformed"
            assert "8388608 bytes" in refused.text
        huge = fragment(b"s" * 16, 1, [Column("obs", "<f8", (2, 1 << 40, 1 << 40))])
        raw.send(huge)
        assert refusal().code == "too_large"
        while not settled:
            message = answer(raw)
            assert isinstance(message, ACK)
            settled.extend(message.settled)
    assert settled == [(1, "malformed")]
    assert ledger(server)["received"]["fragments"] == 1
    assert ledger(server)["dropped"] == {"malformed": {"fragments": 1, "steps": 1}}


def test_too_many_frames(server: Server) -> None:
    with dealer(server.frontend) as raw:
        raw.send(hello())
        assert isinstance(answer(raw), WELCOME)
        raw.send_multipart([encode(PING()), *[b""] * 10_000])
        refused = answer(raw)
        assert isinstance(refused, REFUSED)
        assert "frames" in refused.text
        raw.send(encode(PING()))
        assert type(answer(raw)).__name__ == "ACK"


def test_an_oversize_frame_ends_its_connection_alone(server: Server) -> None:
    trainer = Trainer(server)
    simulator = Simulator(server)
    until(lambda: simulator.session.window, simulator.connection, *trainer.connections)
    greeting = simulator.session.greeting
    with dealer(server.frontend) as raw, raw.get_monitor_socket(zmq.EVENT_DISCONNECTED) as monitor:
        raw.send(hello())
        assert isinstance(answer(raw), WELCOME)
        raw.send_multipart([encode(PING()), b"x" * (MAX_FRAME_BYTES + 1)])
        until(lambda: monitor.poll(0), simulator.connection, *trainer.connections)
        raw.disable_monitor()
    simulator.submit()
    deliver(simulator, trainer)
    assert simulator.session.greeting == greeting


def test_another_protocol_version_is_told_so(server: Server) -> None:
    with dealer(server.frontend) as raw:
        raw.send(hello(protocol=PROTOCOL_VERSION + 1))
        refused = answer(raw)
    assert isinstance(refused, REFUSED)
    assert (refused.code, refused.fatal) == ("protocol", True)


def test_a_second_trainer_is_refused(server: Server) -> None:
    first = Trainer(server)
    second = TrainerSession(os.urandom(16), TERMS, b"policy", name="second")
    connection = dial(second, server.backend)
    until(lambda: "already serves" in second.notice, connection, *first.connections)
    assert second.state is not State.LIVE
    for c in first.connections:
        c.close()
    until(lambda: second.state is State.LIVE, connection)


def test_a_peer_that_reads_nothing_hinders_nobody(server: Server) -> None:
    """Its answers fill the queue, sends to it fail, and it is taken for lost."""
    trainer = Trainer(server)
    simulator = Simulator(server)
    until(lambda: simulator.session.window, simulator.connection, *trainer.connections)
    with dealer(server.frontend, rcvhwm=1, rcvbuf=4096, sndhwm=10) as raw:
        raw.send(hello(b"d" * 16))
        gone = "deaf"
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            for _ in range(100):
                try:
                    raw.send(encode(HELLO(PROTOCOL_VERSION, b"d" * 16, time.monotonic_ns(), SimulatorHello(), gone)),
                             zmq.NOBLOCK)  # fmt: skip
                except zmq.Again:
                    break
            simulator.connection.look()
            if server.core is not None and any(
                p.name == gone and p.state.value == "lost" for p in list(server.core.simulators.values())
            ):
                break
        else:
            pytest.fail("the deaf peer was never found out")
    simulator.submit()
    deliver(simulator, trainer)
    assert simulator.session.outcomes == {"delivered": [1, 3]}


# ---- time -----------------------------------------------------------------------------------------------------


def test_acks_go_out_under_constant_load(server: Server) -> None:
    trainer = Trainer(server)
    simulator = Simulator(server)
    until(lambda: simulator.session.window, simulator.connection, *trainer.connections)
    over = threading.Event()

    def flood() -> None:
        with dealer(server.frontend, rcvhwm=0) as raw:
            ping = encode(PING())
            while not over.is_set():
                try:
                    for _ in range(200):
                        raw.send(ping, zmq.NOBLOCK)
                except zmq.Again:
                    raw.poll(1, zmq.POLLOUT)
                while int(raw.get(zmq.EVENTS)) & zmq.POLLIN:
                    raw.recv(zmq.NOBLOCK)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        for _ in range(5):
            simulator.submit()
            deliver(simulator, trainer)
    finally:
        over.set()
        flooding.join()


class Watch:
    """A clock that can jump, as if the process had been stopped."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


def test_after_a_pause_it_reads_before_it_judges() -> None:
    """The broker is stopped for a minute, all deadlines pass, the peers' messages wait in the sockets."""
    watch = Watch()
    with serving(clock=watch) as server:
        trainer = Trainer(server)
        simulator = Simulator(server)
        until(lambda: simulator.session.window, simulator.connection, *trainer.connections)
        assert server.core is not None
        greetings = [c.endpoint.greeting for c in trainer.connections]
        for _ in range(5):
            stopped, on = threading.Event(), threading.Event()

            def pause(stopped: threading.Event = stopped, on: threading.Event = on) -> dict[str, Any]:
                stopped.set()
                on.wait(TIMEOUT)
                return {}

            say = server._say
            server._say = lambda question, number: pause()  # type: ignore[method-assign]
            future = server.ask(Question.HEALTH)
            assert stopped.wait(TIMEOUT)
            server._say = say  # type: ignore[method-assign]
            for connection in trainer.connections:
                connection.endpoint._say(PING(), time.monotonic())
                connection.flush()
            simulator.submit()
            watch.ahead += 60.0
            on.set()
            future.result(TIMEOUT)
            deliver(simulator, trainer)
        assert [c.endpoint.greeting for c in trainer.connections] == greetings
        assert all(p.state.value == "live" for p in server.core.runners.values())
        assert ledger(server)["delivered"]["fragments"] == 5


def test_a_silent_runner_is_judged_in_the_end() -> None:
    watch = Watch()
    with serving(clock=watch) as server:
        trainer = Trainer(server)
        assert server.core is not None
        (runner,) = server.core.runners.values()
        watch.ahead += 60.0
        until(lambda: runner.state.value == "lost")
        assert trainer.runner.state is State.LIVE


def test_peers_are_judged_while_one_side_is_never_empty() -> None:
    """libzmq reads its connections in turn: after a full turn everybody who had said something has been heard."""
    watch = Watch()
    with serving(clock=watch) as server:
        Trainer(server)
        assert server.core is not None
        (runner,) = server.core.runners.values()
        over = threading.Event()
        real, seen = server._read, [0]

        def read(side: Side, most: int) -> int:
            seen[0] += 1
            real(side, most)
            return most

        server._read = read  # type: ignore[method-assign]
        flooding = threading.Thread(target=_ping_until, args=(server.frontend, over))
        flooding.start()
        try:
            watch.ahead += 60.0
            until(lambda: runner.state.value == "lost")
            assert seen[0]
        finally:
            over.set()
            flooding.join()


def _ping_until(address: str, over: threading.Event) -> None:
    with dealer(address, rcvhwm=0) as raw:
        while not over.is_set():
            try:
                raw.send(encode(PING()), zmq.NOBLOCK)
            except zmq.Again:
                raw.poll(1, zmq.POLLOUT)
            while int(raw.get(zmq.EVENTS)) & zmq.POLLIN:
                raw.recv(zmq.NOBLOCK)


def test_an_idle_broker_sleeps() -> None:
    """With a trainer and nothing to do it wakes up for its deadlines, not more."""
    with serving(Settings(hold=0.0, probe_interval=0.5)) as server:
        trainer = Trainer(server)
        assert server.core is not None
        until(lambda: server.core.published_version == 0, *trainer.connections)  # type: ignore[union-attr]
        handled: list[Event] = []
        handle = server.core.handle

        def count(event: Event, now: float) -> list[Action]:
            handled.append(event)
            return handle(event, now)

        server.core.handle = count  # type: ignore[method-assign]
        until(lambda: sum(type(e) is Received for e in handled) >= 4, *trainer.connections)
        assert sum(type(e) is Tick for e in handled) < 100


# ---- addresses and limits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["frontend", "backend", "weights", "admin"])
def test_a_port_in_use(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        address = f"127.0.0.1:{port}" if option == "admin" else f"tcp://127.0.0.1:{port}"
        addresses: dict[str, Any] = {"frontend": ANY, "backend": ANY, "weights": ANY, "admin": None} | {option: address}
        with pytest.raises(SettingsError, match=rf"--{option} .*127.0.0.1:{port}: the port is in use"):
            Server(None, **addresses).bind()


@pytest.mark.parametrize("address", ["127.0.0.1:5555", "tcp://127.0.0.1", "tcp://127.0.0.1:70000", "udp://x:1", ""])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(SettingsError, match=r"--frontend: expected an address like tcp://127\.0\.0\.1:5555"):
        Server(frontend=address).bind()


@pytest.mark.parametrize("option", ["frontend", "backend", "weights", "admin"])
@pytest.mark.parametrize("host", ["0.0.0.0", "*", "[::]", "192.0.2.1", "example.org"])
def test_other_machines_are_let_in_on_purpose_only(option: str, host: str) -> None:
    address = f"{host.replace('*', '0.0.0.0')}:5580" if option == "admin" else f"tcp://{host}:5555"
    addresses: dict[str, Any] = {"frontend": ANY, "backend": ANY, "weights": ANY, "admin": None} | {option: address}
    with pytest.raises(SettingsError, match=rf"--{option} .* --insecure"):
        Server(None, **addresses).bind()


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:*", "tcp://*:*", "tcp://localhost:*"])
def test_what_is_bound_can_be_dialled(address: str) -> None:
    with serving(frontend=address, weights=address, insecure=True) as server:
        port = server.frontend.rpartition(":")[2]
        with dealer(f"tcp://127.0.0.1:{port}") as raw:
            raw.send(hello())
            assert isinstance(answer(raw), WELCOME)


def test_an_address_of_another_machine() -> None:
    with pytest.raises(SettingsError, match="no such address"):
        Server(None, frontend="tcp://192.0.2.1:5555", backend=ANY, weights=ANY, admin=None, insecure=True).bind()


def test_few_descriptors_are_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("broker.server.resource.getrlimit", lambda _: (256, 512))
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr("broker.server.resource.setrlimit", lambda _, limits: asked.append(limits))
    with caplog.at_level(logging.WARNING), serving():
        pass
    assert asked == [(512, 512)]
    assert "only 512 file descriptors" in caplog.text


def test_descriptors_are_raised_to_the_limit() -> None:
    with serving():
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == hard


def test_no_socket_has_heartbeats_and_a_limit_on_what_waits(server: Server) -> None:
    """Together they end the process when a connection with a full queue breaks: an assertion of libzmq."""
    sockets = [*server._routers, server._publisher]
    assert len(sockets) == 3
    for opened in sockets:
        assert opened is not None
        assert not (opened.rcvhwm and opened.get(zmq.HEARTBEAT_IVL))
        assert opened.rcvhwm or opened.get(zmq.HEARTBEAT_IVL)


def test_stop_before_run_and_twice() -> None:
    server = Server(None, frontend=ANY, backend=ANY, weights=ANY, admin=None)
    server.bind()
    server.stop()
    server.stop()
    server.run()
    server.close()
    server.close()
    server.stop()
    assert server.ask(Question.HEALTH).cancelled()


def test_the_ports_are_free_again() -> None:
    with serving() as server:
        addresses: dict[str, Any] = {"frontend": server.frontend, "backend": server.backend, "weights": server.weights}
    with serving(**addresses) as again:
        assert again.frontend == addresses["frontend"]
