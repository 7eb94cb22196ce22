"""Sockets: their options, set before they connect, and `Connection`, which drives one session over one DEALER.

libzmq reconnects below us and says nothing; the sessions are built for that. `IMMEDIATE` keeps messages out of a pipe
that leads nowhere: without a connection a send fails at once, and the session greets again when there is one.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from rllink_zmq import wire
from rllink_zmq.arrays import Buffer
from rllink_zmq.errors import ConnectionTimeout, ProtocolError, SettingsError
from rllink_zmq.messages import MAX_FRAME_BYTES, Message
from rllink_zmq.session import Endpoint, State

HEARTBEAT_MS, HEARTBEAT_TTL_MS, HEARTBEAT_TIMEOUT_MS = 7_500, 20_000, 7_500
"""libzmq's own heartbeats: its I/O thread answers them, whatever the application does. A hung host shows after 15 s."""

FIRST_CONNECT_MS = 50
"""How long opening a connection waits for the other side before it goes on in the background."""

_EVENTS, _POLLIN, _POLLOUT = int(zmq.EVENTS), int(zmq.POLLIN), int(zmq.POLLOUT)
"""As numbers: what pyzmq's enums cost is more than what is asked with them, hundreds of times a second."""

_ADDRESS = re.compile(r"tcp://(?P<host>\*|\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})$")


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of "tcp://host:port". Raises `SettingsError` with what was expected."""
    match = _ADDRESS.fullmatch(address)
    if match is None or not 0 <= int(match["port"]) <= 65535:
        raise SettingsError(f"expected an address like tcp://127.0.0.1:5555, got {address!r}")
    return match["host"], int(match["port"])


def beside(address: str, told: str) -> str:
    """`told` as it can be reached from here: where the broker binds every interface, its host is `address`'s."""
    host, port = parse_address(told)
    if host in ("0.0.0.0", "*", "[::]"):
        host = parse_address(address)[0]
    return f"tcp://{host}:{port}"


def set_options(socket: zmq.Socket[Any], *, rcvhwm: int, sndhwm: int, heartbeats: bool = True) -> None:
    """Options every socket of ours has. To be called before bind or connect: later they are ignored.

    `heartbeats` go with an unlimited `rcvhwm` (0) alone: with a full receive queue libzmq 4.3 aborts the process when
    one of them fails (libzmq#3937, #4364, #4767). Without them TCP's own keepalive finds a dead host.
    """
    socket.linger = 0
    socket.rcvhwm = rcvhwm
    socket.sndhwm = sndhwm
    socket.maxmsgsize = MAX_FRAME_BYTES
    socket.ipv6 = True
    if not heartbeats:
        socket.tcp_keepalive, socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl = 1, 5, 5
        return
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TTL_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def _dealer(address: str) -> zmq.Socket[Any]:
    parse_address(address)
    socket: zmq.Socket[Any] = zmq.Context.instance().socket(zmq.DEALER)
    set_options(socket, rcvhwm=0, sndhwm=1000)
    socket.immediate = True
    socket.reconnect_ivl = 250  # longer than between two looks, so that one of them sees the connection gone
    socket.reconnect_ivl_max = 1000
    try:
        socket.connect(address)
    except zmq.ZMQError as e:
        socket.close(0)
        raise SettingsError(f"can't connect to {address}: {e}") from None
    return socket


class Connection:
    """One session over one DEALER. Not for two threads at once.

    `look()` reads what there is, lets the session judge the time if there was nothing, and sends what it queued.
    """

    def __init__(self, endpoint: Endpoint, address: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.endpoint = endpoint
        self.address = address
        self.clock = clock
        self.socket: zmq.Socket[Any] | None = None
        self.bad_messages = 0
        self._away = False

    def open(self) -> None:
        """Connect (in the background) and begin to greet. Raises `SettingsError` for an address that can't be used."""
        self.socket = _dealer(self.address)
        # A peer that is there answers within a millisecond. Greeting before it can be sent costs the wait for a retry.
        self.socket.poll(FIRST_CONNECT_MS, zmq.POLLOUT)
        self.endpoint.open(self.clock())
        self.flush()

    def look(self) -> bool:
        """Handle all that has come; True if anything had. Never waits."""
        came = False
        socket = self.socket
        if socket is None:
            return False
        events = int(socket.get(_EVENTS))
        if not events & _POLLOUT:
            self._away = True  # ZMQ_IMMEDIATE: there is no connection now
        elif self._away:
            self._away = False
            self.endpoint.reconnected(self.clock())
        while events & _POLLIN:
            came = True
            frames = socket.recv_multipart(zmq.NOBLOCK)
            events = int(socket.get(_EVENTS))
            try:
                message, body = wire.unpack(frames)
            except ProtocolError:
                self.bad_messages += 1
                continue
            self.endpoint.receive(message, body, self.clock())
        if not came:
            self.endpoint.tick(self.clock())
        self.flush()
        return came

    def flush(self) -> None:
        """Send what the session has queued."""
        endpoint = self.endpoint
        if endpoint.reconnect:
            endpoint.reconnect = False
            if self.socket is not None:
                self.socket.close(0)
            self.socket, self._away = _dealer(self.address), False
        if not endpoint.output:
            return
        output, endpoint.output = endpoint.output, []
        for message, body in output:
            if not self._send(message, body):
                endpoint.send_failed(self.clock())
                return

    def _send(self, message: Message, body: Sequence[Buffer]) -> bool:
        if self.socket is None:
            return False
        try:
            self.socket.send_multipart(wire.pack(message, body), zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return False
        return True

    def wait(self, timeout: float) -> bool:
        """Sleep until something comes, the session has something to do, or `timeout` seconds have passed."""
        if self.socket is None:
            return False
        due = self.endpoint.next_deadline() - self.clock()
        ms = max(0, min(timeout, due)) * 1000
        return bool(self.socket.poll(int(ms) + 1 if ms else 0))

    def until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Look and wait until `condition()`, or `timeout` seconds. False when time ran out. Raises the refusal of a
        session that was refused for good."""
        deadline = self.clock() + timeout
        while not condition():
            if self.endpoint.refusal is not None:
                raise self.endpoint.refusal
            left = deadline - self.clock()
            if left <= 0:
                return False
            self.wait(min(left, 0.2))
            self.look()
        return True

    def welcome(self, timeout: float, what: str) -> None:
        """Wait for the broker's WELCOME. Raises `ConnectionTimeout` naming the address, or the refusal."""
        if not self.until(lambda: self.endpoint.state is State.LIVE, timeout):
            raise ConnectionTimeout(
                f"no answer from a broker at {self.address} within {timeout:g} s ({what}): is `rllink-zmq broker` "
                f"running there? {self.endpoint.notice}".rstrip()
            )

    def close(self, linger: float = 1.0) -> None:
        """Say BYE and close. What is queued has `linger` seconds to leave."""
        if self.socket is None:
            return
        self.endpoint.close(self.clock())
        self.flush()
        self.socket.close(int(linger * 1000))
        self.socket = None


class Subscription:
    """One SUB socket for weights news. `topics`: the ids of the modules that are wanted; none = all."""

    def __init__(self, address: str, topics: Sequence[str] = ()) -> None:
        self.address = address
        self.topics = tuple(topics)
        self.socket: zmq.Socket[Any] = zmq.Context.instance().socket(zmq.SUB)
        # Subscriptions are sent, too: what is over the limit never reaches the broker, and nobody says so.
        count = max(1, len(topics))
        set_options(self.socket, rcvhwm=4 * count, sndhwm=count, heartbeats=False)
        for topic in topics or ("",):
            self.socket.subscribe(topic.encode())
        self.socket.connect(address)

    def read(self) -> list[tuple[Message, list[Buffer]]]:
        """Everything that has come: frames are a topic (the module's id) and a message. Bad ones are skipped."""
        messages = []
        while int(self.socket.get(_EVENTS)) & _POLLIN:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            try:
                messages.append(wire.unpack(frames[1:]))
            except ProtocolError:
                continue
        return messages

    def close(self) -> None:
        self.socket.close(0)


def poll(connections: Sequence[Connection], subscription: Subscription | None, timeout: float) -> list[Connection]:
    """Sleep until one of these has something to read, a session has something to do, or `timeout` seconds passed.

    Returns the connections that have something to read.
    """
    poller = zmq.Poller()
    due = timeout
    for connection in connections:
        if connection.socket is not None:
            poller.register(connection.socket, zmq.POLLIN)
            due = min(due, connection.endpoint.next_deadline() - connection.clock())
    if subscription is not None:
        poller.register(subscription.socket, zmq.POLLIN)
    ready = {socket for socket, _ in poller.poll(int(due * 1000) + 1 if due > 0 else 0)}
    return [connection for connection in connections if connection.socket in ready]
