"""Virtual time, and connections that behave like ZeroMQ's, between the nodes of a world and its broker.

What a link does, as measured: messages of one connection keep their order. A cut lets a prefix of what was on its way
be read later, between the messages of the next connection, and loses the rest. The DEALER connects again below the
application, which sees it or doesn't; a send without a connection fails. A send to a dead routing id is `Unreachable`.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from broker.core import Broker
from broker.events import Action, Event, Forward, Publish, Received, Send, Side, Tick, Unreachable
from rllink_zmq import wire

if TYPE_CHECKING:
    from world_nodes import Node

HEARTBEAT = 15.0
"""Seconds after which libzmq gives up a connection whose other end is stopped."""
MOST_EVENTS = 150_000
NEVER = float("inf")


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


class Time:
    """A heap of what is to happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.events = 0
        self.broken: list[str] = []
        self.trace: list[tuple[float, str, Any, Any]] = []
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0

    def at(self, t: float, do: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (t, self._order, do, args))

    def after(self, seconds: float, do: Callable[..., None], *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._heap, (self.now + seconds, self._order, do, args))

    def until(self, end: float, condition: Callable[[], bool] | None = None) -> bool:
        """Let time pass until `end`, or until `condition()`, looked at every half second."""
        look = self.now
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= end:
            t, _, do, args = pop(heap)
            if t > self.now:
                self.now = t
            self.events += 1
            if self.events > MOST_EVENTS:
                self.broken.append(f"{MOST_EVENTS} events by {self.now - 1000:.3f} s: something spins")
                return False
            do(*args)
            if condition is not None and self.now >= look:
                look = self.now + 0.5
                if condition():
                    return True
        self.now = max(self.now, end)
        return condition is None or condition()

    def note(self, what: str, who: Any, detail: Any = "") -> None:
        self.trace.append((self.now, what, who, detail))


class Links(Time):
    """The network, and the broker in its middle. `repeats`: this part of what peers say is read by the broker once
    more, later. `restless`: until then something of a broken connection may still come, or be noticed."""

    def __init__(self, seed: int, *, check_each: bool, through_wire: bool, repeats: float) -> None:
        super().__init__(seed)
        self.check_each = check_each
        self.through_wire = through_wire
        self.repeats = repeats
        self.slowness = self.random.choice((0.002, 0.02, 0.1))
        self.broker: Broker | None = None
        self.routes: dict[tuple[Side, bytes], Connection] = {}
        self.connections: list[Connection] = []
        self.restless = 0.0
        self.aimed: list[Any] = []
        self._tick_at = NEVER
        self._ids = 0

    def id(self, length: int = 16) -> bytes:
        self._ids += 1
        return self._ids.to_bytes(length, "big")

    def latency(self) -> float:
        return min(0.4, self.random.expovariate(1.0) * self.slowness)

    def aim(self, connection: Connection, message: Any) -> None:
        """A message is on its way that a fault may wait for."""
        raise NotImplementedError

    def publish(self, message: Any) -> None:
        raise NotImplementedError

    # ---- there and back

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
        event = Received(connection.side, connection.route, message, [message, *body], sum(map(len, body)))
        self.handle(event)
        if self.repeats and self.random.random() < self.repeats and self.known(connection):
            self.after(self.random.expovariate(0.5), self.handle, event)

    def known(self, connection: Connection) -> bool:
        return self.broker is not None and connection.route in self.broker.routes[connection.side]

    def handle(self, event: Event) -> None:
        if self.broker is not None:
            self.carry_out(self.broker.handle(event, self.now))

    def carry_out(self, actions: Iterable[Action]) -> None:
        """What the broker wants done; what can't be sent is its next event."""
        broker = self.broker
        if broker is None:
            return
        unreachable = self._sent(actions)
        for event in unreachable:
            unreachable += self._sent(broker.handle(event, self.now))
        if self.check_each:
            broker.check_invariants()
        self._schedule_tick()

    def _sent(self, actions: Iterable[Action]) -> list[Unreachable]:
        failed = []
        for action in actions:
            if type(action) is Send:
                if not self.down(action.side, action.route, action.message, action.body):
                    failed.append(Unreachable(action.side, action.route))
            elif type(action) is Forward:
                if not self.down(Side.BACK, action.route, action.frames[0], action.frames[1:]):
                    failed.append(Unreachable(Side.BACK, action.route))
            elif type(action) is Publish:
                self.publish(action.message)
        return failed

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

    # ---- and how they end

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
        slow = (0.0, 0.0, 0.0, 0.0, r.uniform(0.0, 1.0), r.uniform(0.0, 1.0), HEARTBEAT)
        noticed = 0.0 if peer_knows else r.choice(slow)
        self.after(noticed, self.routes.pop, (connection.side, connection.route), None)
        if not peer_knows:
            self.after(r.choice(slow), connection.node.disconnected, connection)
        rest = max(connection.up_time + connection.lag, connection.down_time) + 0.1
        self.restless = max(self.restless, rest, self.now + noticed)

    def hung_up(self, connection: Connection) -> None:
        """The DEALER is closed in good order: what it had said has been read."""
        if not connection.broken:
            connection.broken = True
            self.note("hung up", connection.node.name, connection.route)
            self.connections.remove(connection)
            self.routes.pop((connection.side, connection.route), None)

    def break_a_link(self, victim: int) -> None:
        open_ = sorted((c for c in self.connections if c.node.alive), key=lambda c: c.route)
        if open_:
            connection = open_[victim % len(open_)]
            if victim // 20 == 2 and self.random.random() < 0.5:
                connection.full = True
            else:
                self.cut(connection)

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
