"""What happens to the core (past tense) and what it wants done (imperatives)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TypeAlias

from msgspec import Struct

from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import STATE, Message
from rllink_zmq.wire import Buffer


class Side(IntEnum):
    """Which ROUTER."""

    FRONT = 0
    BACK = 1


# ---- events


class Received(Struct, frozen=True, gc=False):
    """A checked message. `frames` are all of its frames as they came, the header first; `size` bytes of body."""

    side: Side
    route: bytes
    message: Message
    frames: Sequence[Buffer]
    size: int


class Malformed(Struct, frozen=True, gc=False):
    """Frames that are no message; `message` is their header if that much can be read."""

    side: Side
    route: bytes
    error: ProtocolError
    message: Message | None = None


class Unreachable(Struct, frozen=True, gc=False):
    """A send to this routing id failed: the connection is gone, or its queue is full."""

    side: Side
    route: bytes


class Tick(Struct, frozen=True, gc=False):
    """Everything that had arrived has been handled; deadlines may be judged."""


Event: TypeAlias = Received | Malformed | Unreachable | Tick

# ---- actions


class Send(Struct, frozen=True, gc=False):
    side: Side
    route: bytes
    message: Message
    body: Sequence[Buffer] = ()


class Forward(Struct, frozen=True, gc=False):
    """Frames as they came, unchanged: a fragment to a runner, a request to a service, an answer to who asked."""

    route: bytes
    frames: Sequence[Buffer]
    side: Side = Side.BACK


class Publish(Struct, frozen=True, gc=False):
    message: STATE
    body: Sequence[Buffer] = ()


class Log(Struct, frozen=True, gc=False):
    """A sentence for the operator. `level` is logging's."""

    level: int
    text: str


Action: TypeAlias = Send | Forward | Publish | Log
