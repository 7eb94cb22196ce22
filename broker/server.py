"""The broker on real sockets: one thin loop around the core.

Read, decode to an event, handle, carry out the actions, wait until the next deadline. What has arrived is read before
silence is judged: after a pause of this process every deadline has passed, while the messages that disprove it lie in
the sockets. Acknowledgements go out at any time, however busy the loop is.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import resource
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, cast

import zmq

from rllink_zmq import __version__
from rllink_zmq.errors import ProtocolError, SettingsError
from rllink_zmq.messages import MAX_FRAME_BYTES, MAX_FRAMES
from rllink_zmq.wire import Buffer, check_body, pack, parse_header

from .admin import Admin, Question
from .core import Broker
from .events import Action, Event, Forward, Log, Malformed, Publish, Received, Send, Side, Tick, Unreachable
from .settings import Settings

log = logging.getLogger("rllink_zmq.broker")

TOPIC = b"default_policy"
"""What PUB messages begin with: the id of the module whose weights follow. This is the only one's."""

BATCH = 128
"""Messages read from one ROUTER before the other one is looked at."""

ZERO_COPY_BYTES = 65_536
"""Frames from this size on are passed on in libzmq's own memory; below it a copy is cheaper."""

PAUSE = 0.25
"""Seconds by which a loop that comes late has been stopped (SIGSTOP, a starved machine). libzmq's own thread was
stopped as well and needs as long to read what waits in the kernel: nothing is judged meanwhile."""

QUESTIONS = 64
"""Questions of the admin that may wait for the loop."""

DESCRIPTORS = 1024
"""With fewer file descriptors than this, hundreds of peers don't fit, and libzmq's accept loop spins silently."""

HEARTBEAT_MS, HEARTBEAT_TTL_MS, HEARTBEAT_TIMEOUT_MS = 7_500, 20_000, 7_500

# Plain ints: every operation on the flags of `zmq` builds an enum, which costs more than a send.
_NOBLOCK = int(zmq.NOBLOCK)
_MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

_ADDRESS = re.compile(r"tcp://(?P<host>\*|\[[0-9a-fA-F:.%a-z]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5}|\*)$")
_HTTP = re.compile(r"(?:http://)?(?P<host>\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})/?$")

Socket: TypeAlias = "zmq.Socket[Any]"


class Server:
    """A broker at four addresses. `bind()`, then `run()` until somebody calls `stop()`, then `close()`.

    ZeroMQ addresses are like "tcp://127.0.0.1:5555", or "tcp://127.0.0.1:*" for any free port; `admin` is like
    "127.0.0.1:5580" (port 0: any), None for no admin. After `bind()` the attributes hold what was bound. Anything
    but loopback needs `insecure`: whoever reaches a port is served.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        frontend: str = "tcp://127.0.0.1:5555",
        backend: str = "tcp://127.0.0.1:5556",
        weights: str = "tcp://127.0.0.1:5557",
        admin: str | None = "127.0.0.1:5580",
        insecure: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings or Settings()
        self.frontend, self.backend, self.weights, self.admin = frontend, backend, weights, admin
        self.insecure = insecure
        self.core: Broker | None = None
        self._clock = clock
        self._context: zmq.Context[Socket] | None = None
        self._routers: tuple[Socket, ...] = ()
        self._publisher: Socket | None = None
        self._admin: Admin | None = None
        self._stopping = False
        self._wakes: tuple[socket.socket, ...] = ()
        self._questions: deque[tuple[Question, int, Future[dict[str, Any]]]] = deque()
        self._sends: tuple[Callable[..., Any], ...] = ()
        self._unreachable: deque[Unreachable] = deque()

    # ---- from outside

    def bind(self) -> None:
        """Open every port. Raises `SettingsError` that names the address, its option and what to do."""
        for option, address in (("frontend", self.frontend), ("backend", self.backend), ("weights", self.weights)):
            _allow(option, address, _parse(_ADDRESS, option, address)[0], self.insecure)
        if self.admin is not None:
            host, port = _parse(_HTTP, "admin", self.admin)
            _allow("admin", self.admin, host, self.insecure)
        _raise_descriptors()
        self._wakes = socket.socketpair()
        for end in self._wakes:
            end.setblocking(False)
        self._context = zmq.Context()
        try:
            # Bytes are bounded by windows and leases; these count messages. The frontend's bounds what a simulator
            # that keeps no rules can pile up, PUB's what one that reads nothing does.
            front = self._open(zmq.ROUTER, rcvhwm=8, sndhwm=100)
            back = self._open(zmq.ROUTER, rcvhwm=0, sndhwm=100_000)
            self._routers = (front, back)
            self._publisher = self._open(zmq.PUB, rcvhwm=1000, sndhwm=4)
            self.frontend = _bind(front, "frontend", self.frontend)
            self.backend = _bind(back, "backend", self.backend)
            self.weights = _bind(self._publisher, "weights", self.weights)
            if self.admin is not None:
                self._admin = Admin(host, int(port), self.ask)
                self.admin = self._admin.address
        except BaseException:
            self.close()
            raise
        # The backend's method without the wrapper that looks for options of draft sockets: half the time of a send.
        self._sends = tuple(super(zmq.Socket, router).send for router in self._routers)
        self.core = Broker(self.settings, os.urandom(8), self.weights, self._clock())

    def run(self) -> None:
        """Serve until `stop()`. Needs `bind()` before it."""
        core = self.core
        if core is None:
            raise RuntimeError("bind() comes before run()")
        if self._admin is not None:
            self._admin.start()
        poller = zmq.Poller()
        for router in self._routers:
            poller.register(router, zmq.POLLIN)
        poller.register(self._wakes[1].fileno(), zmq.POLLIN)
        clock, poll, front, back = self._clock, poller.poll, *self._routers
        unread = [0, 0]
        now = judge_from = clock()
        while not self._stopping:
            wait = max(0.0, core.next_deadline() - now)
            ready = dict(poll(int(wait * 1000) + 1 if wait else 0))
            for side, router in enumerate(self._routers):
                count = self._read(Side(side), BATCH) if router in ready else 0
                unread[side] = unread[side] - count if count == BATCH else 0
            if len(ready) > (front in ready) + (back in ready):
                self._answer()
            before, now = now, clock()
            if now - before > wait + PAUSE:
                judge_from = now + PAUSE
                unread = [self._a_full_turn(side) for side in Side]
            if now >= core.next_deadline():
                if now >= judge_from and unread[0] <= 0 and unread[1] <= 0:
                    self._handle(Tick(), now)
                    unread = [self._a_full_turn(side) for side in Side]
                else:
                    self._carry_out(core.flush_due(now), now)
        self._carry_out(core.flush_due(clock() + self.settings.ack_interval), clock())

    def stop(self) -> None:
        """Make `run()` return soon. From any thread, from a signal handler, more than once, before `run()` too."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """Close every port. Acknowledgements on their way have a second to leave."""
        self._stopping = True
        if self._admin is not None:
            self._admin.close()
            self._admin = None
        while self._questions:
            self._questions.popleft()[2].cancel()
        for router in self._routers:
            router.close(1000)
        self._routers = ()
        if self._publisher is not None:
            self._publisher.close(0)
            self._publisher = None
        if self._context is not None:
            self._context.term()
            self._context = None
        for end in self._wakes:
            end.close()

    def ask(self, question: Question, number: int = 0) -> Future[dict[str, Any]]:
        """The answer of the loop's own thread, soon. Cancelled when too many questions wait or the broker stops."""
        future: Future[dict[str, Any]] = Future()
        if self._stopping or len(self._questions) >= QUESTIONS:
            future.cancel()
        else:
            self._questions.append((question, number, future))
            self._wake()
        return future

    # ---- the loop

    def _a_full_turn(self, side: Side) -> int:
        """After this many messages every peer that had sent one has been heard: libzmq reads its connections in turn.
        So a ROUTER that is never found empty can't keep the others from being judged."""
        return 2 * len(self.core.routes[side]) + BATCH if self.core is not None else 0

    def _read(self, side: Side, most: int) -> int:
        """Handle up to `most` messages of a ROUTER; fewer when it was found empty."""
        recv: Callable[..., Any] = self._routers[side].recv
        handle, clock = cast(Broker, self.core).handle, self._clock
        # Carried out together: each send may have to wake libzmq's thread, and a busy one needs no waking.
        actions: list[Action] = []
        for count in range(most):
            try:
                route = recv(_NOBLOCK)
            except zmq.Again:
                most = count
                break
            frame = recv(_NOBLOCK, False)
            frames: list[Any] = [frame.bytes]
            while frame.more:
                frame = recv(_NOBLOCK, False)
                if len(frames) <= MAX_FRAMES:
                    frames.append(frame.bytes if len(frame) < ZERO_COPY_BYTES else frame)
            event: Event
            message = None
            try:
                message = parse_header(frames[0], relay=True)
                event = Received(side, route, message, frames, check_body(message, frames[1:]))
            except ProtocolError as e:
                event = Malformed(side, route, e, message)
            actions += handle(event, clock())
        if actions:
            self._carry_out(actions, clock())
        return most

    def _handle(self, event: Event, now: float) -> None:
        self._carry_out(cast(Broker, self.core).handle(event, now), now)

    def _carry_out(self, actions: Sequence[Action], now: float) -> None:
        """Do what the core wants. A failed send is an event of its own, handled once these actions are done: one after
        the other, since each may have actions that fail too (hundreds of peers can go in one moment)."""
        while True:
            for action in actions:
                kind = type(action)
                if kind is Forward:
                    forward = cast(Forward, action)
                    if not self._send(forward.side, forward.route, forward.frames):
                        self._unreachable.append(Unreachable(forward.side, forward.route))
                elif kind is Send:
                    self._send_message(cast(Send, action))
                elif kind is Publish:
                    self._publish(cast(Publish, action))
                elif kind is Log:
                    log.log(cast(Log, action).level, "%s", cast(Log, action).text)
            if not self._unreachable:
                return
            actions = cast(Broker, self.core).handle(self._unreachable.popleft(), now)

    def _send_message(self, action: Send) -> None:
        try:
            frames = pack(action.message, action.body)
        except ProtocolError as e:
            log.error("a message that is too large could not be sent: %s", e)
            self._unreachable.append(Unreachable(action.side, action.route))
            return
        if not self._send(action.side, action.route, frames):
            self._unreachable.append(Unreachable(action.side, action.route))

    def _send(self, side: Side, route: bytes, frames: Sequence[Buffer]) -> bool:
        """False when the peer is gone or reads nothing.

        A multipart that broke off in the middle would be glued to the next one. It can't: a mandatory ROUTER judges
        the routing id and the queue at the first frame, and swallows the rest if the connection ends meanwhile.
        """
        send = self._sends[side]
        try:
            send(route, _MORE)
        except zmq.ZMQError as e:
            if e.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            return False
        last = len(frames) - 1
        for i in range(last):
            send(frames[i], _MORE)
        send(frames[last], _NOBLOCK)
        return True

    def _publish(self, action: Publish) -> None:
        if self._publisher is not None:
            topic = action.message.module.encode() or TOPIC
            self._publisher.send_multipart([topic, *pack(action.message, action.body)], zmq.NOBLOCK)

    # ---- questions of the admin

    def _wake(self) -> None:
        try:
            for end in self._wakes[:1]:
                end.send(b"!")
        except OSError:
            return  # full: it is awake already; closed: there is nobody to wake

    def _answer(self) -> None:
        """Answer the admin's questions, in the only thread that may look at the core."""
        try:
            self._wakes[1].recv(4096)
        except OSError:
            return
        while self._questions:
            question, number, future = self._questions.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._say(question, number))
            except Exception as e:  # the question fails, the broker goes on
                future.set_exception(e)

    def _say(self, question: Question, number: int) -> dict[str, Any]:
        core = cast(Broker, self.core)
        if question is Question.HEALTH:
            return {"status": "ok"}
        if question is Question.READY:
            return {"waiting_for": core.waiting_for()}
        if question is Question.SCALE:
            now = self._clock()
            wrong, actions = core.scale(number, now)
            self._carry_out(actions, now)
            return {"error": wrong} if wrong else {"runners": number}
        return core.status(self._clock()) | {
            "package": __version__,
            "addresses": {
                "frontend": self.frontend,
                "backend": self.backend,
                "weights": self.weights,
                "admin": self.admin,
            },
            "process": {"pid": os.getpid(), "rss_bytes": _rss(), "cpu_s": round(time.process_time(), 3)},
        }

    def _open(self, kind: int, *, rcvhwm: int, sndhwm: int) -> Socket:
        """A socket with its options, before it is bound: later they are ignored.

        Heartbeats and a limit on what waits to be read exclude each other: when a connection ends whose queue is full,
        the next heartbeat of ours trips an assertion of libzmq 4.3 and ends the process (its issues 3937 and 4767).
        Where there is a limit the peers' heartbeats do the work, their TTL counts here too; TCP does it for the rest.
        """
        opened: Socket = cast("zmq.Context[Socket]", self._context).socket(kind)
        opened.linger = 0
        opened.rcvhwm = rcvhwm
        opened.sndhwm = sndhwm
        opened.maxmsgsize = MAX_FRAME_BYTES
        opened.backlog = 1024
        if not rcvhwm:
            opened.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
            opened.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TTL_MS)
            opened.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        opened.tcp_keepalive = 1
        opened.tcp_keepalive_idle = 10
        opened.tcp_keepalive_intvl = 5
        opened.tcp_keepalive_cnt = 3
        opened.set(zmq.TCP_MAXRT, HEARTBEAT_TTL_MS)
        if kind == zmq.ROUTER:
            opened.router_mandatory = True
        return opened


# ---- addresses and limits


def _parse(pattern: re.Pattern[str], option: str, address: str) -> tuple[str, str]:
    """Host and port. Raises `SettingsError` with what was expected."""
    match = pattern.fullmatch(address)
    if match is None or (match["port"] != "*" and int(match["port"]) > 65_535):
        example = "127.0.0.1:5580" if pattern is _HTTP else "tcp://127.0.0.1:5555"
        raise SettingsError(f"--{option}: expected an address like {example}, got {address!r}")
    return match["host"], match["port"]


def _allow(option: str, address: str, host: str, insecure: bool) -> None:
    """Raises `SettingsError` for an address that others can reach, unless that is wanted."""
    bare = host.strip("[]").partition("%")[0]
    try:
        loopback = bare == "localhost" or ipaddress.ip_address(bare).is_loopback
    except ValueError:
        loopback = False
    if not loopback and not insecure:
        raise SettingsError(
            f"--{option} {address} can be reached from other machines, and whoever reaches it is served: it can read "
            f"the weights, send made-up episodes and fill this machine's memory. Bind 127.0.0.1 and use a tunnel, or "
            f"give --insecure if only machines you trust can reach it"
        )


def _bind(bound: Socket, option: str, address: str) -> str:
    """Bind, and say where. Raises `SettingsError` in words."""
    # Only where it is meant: an IPv4 address would be told as one inside IPv6.
    bound.ipv6 = "[" in address or "*:" in address
    try:
        bound.bind(address.replace("//localhost:", "//127.0.0.1:"))
    except zmq.ZMQError as e:
        raise SettingsError(f"can't bind --{option} {address}: {_why(e.errno, str(e))}") from None
    return cast(bytes, bound.get(zmq.LAST_ENDPOINT)).decode().rstrip("\0")


def _why(number: int | None, text: str) -> str:
    if number == errno.EADDRINUSE:
        return "the port is in use, perhaps by another broker; stop that one, or choose another port"
    if number in (errno.EADDRNOTAVAIL, errno.ENODEV):
        return "this machine has no such address; choose one of its own, or 127.0.0.1"
    return text


def _raise_descriptors() -> None:
    """As many file descriptors as the system lets us have; a warning when those are few."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass  # it stays as it is
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        log.warning(
            "only %d file descriptors are allowed, each peer needs one: the broker will hang when they are used up; "
            "raise the limit (ulimit -n 65536) before starting it",
            soft,
        )


def _rss() -> int:
    """Bytes of memory this process occupies."""
    try:
        with open("/proc/self/statm", "rb") as statm:  # noqa: PTH123 - one read, no need for a path
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
