"""Frames <-> messages: a header frame, then the body's bytes in frames of at most 512 KB.

Any frames give a `Message` with its body or raise `ProtocolError`, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec

from rllink_zmq.arrays import Buffer as Buffer
from rllink_zmq.arrays import column_bytes as column_bytes
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import (
    ACT,
    ACTION,
    BEFORE,
    CONFIG,
    FRAGMENT,
    MAX_AGENTS_STEPS,
    MAX_BODY_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    STATE,
    STATE_IN,
    Column,
    Message,
    Relayed,
    decode,
    decode_columns,
    decode_relayed,
    encode,
)

REMEMBERED_BYTES = 4096
"""Descriptions of columns up to this length are remembered, once they have been checked."""


DECODING = (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError)
"""What decoding a header may raise."""


def pack(message: Message, body: Iterable[Buffer] = ()) -> list[Buffer]:
    """The frames of a message: its header, then `body` cut at 512 KB; small buffers are joined.

    Raises `ProtocolError` when the header itself is larger than a frame may be.
    """
    header = encode(message)
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a {type(message).__name__} header of {len(header)} bytes; at most {MAX_HEADER_BYTES} fit")
    buffers = [b for b in body if len(b)]
    if not buffers:
        return [header]
    if len(buffers) > 1 and sum(map(len, buffers)) <= MAX_FRAME_BYTES:
        return [header, b"".join(buffers)]
    frames: list[Buffer] = [header]
    for buffer in buffers:
        if len(buffer) <= MAX_FRAME_BYTES:
            frames.append(buffer)
        else:
            view = memoryview(buffer).cast("B")
            frames += [view[i : i + MAX_FRAME_BYTES] for i in range(0, len(view), MAX_FRAME_BYTES)]
    return frames


def parse_header(header: Buffer, *, relay: bool = False) -> Message:
    """The message in a header frame; to `relay` it, a FRAGMENT is a `Relayed`, whose columns `check_body` reads.

    Raises `ProtocolError`.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed", "too_large")
    # Of a key that is there twice the last value counts, but the first one may be what no other peer can decode.
    relay = relay and bytes(header).count(b"columns") == 1
    try:
        return decode_relayed(header) if relay else decode(header)
    except DECODING as e:
        raise ProtocolError(f"expected a msgpack header of this protocol: {e}") from None


def check_body(message: Message, body: Sequence[Buffer]) -> int:
    """The size of the body in bytes, once it is known to fit its header. Raises `ProtocolError` otherwise."""
    if len(body) >= MAX_FRAMES:
        raise ProtocolError(f"{len(body)} frames; at most {MAX_FRAMES} are allowed", "too_large")
    size = 0
    for frame in body:
        size += len(frame)
    if size > MAX_BODY_BYTES:
        raise ProtocolError(f"a body of {size} bytes; at most {MAX_BODY_BYTES} are allowed", "too_large")
    if isinstance(message, FRAGMENT):
        if message.base > message.number:
            raise ProtocolError(f"fragment {message.number} says that all numbers below {message.base} are settled")
        claimed = check_columns(message)
        if claimed != size and not message.compression:
            raise ProtocolError(f"the header's columns claim {claimed} bytes, the body has {size}")
        if claimed > MAX_BODY_BYTES:
            raise ProtocolError(f"columns of {claimed} bytes; at most {MAX_BODY_BYTES} are allowed", "too_large")
    elif type(message) is ACT or type(message) is ACTION:
        _check_rows(message, size)
    elif type(message) is STATE or type(message) is CONFIG:
        if message.offset + size > message.size:
            end = message.offset + size
            raise ProtocolError(f"bytes {message.offset} to {end} of a transfer of {message.size} bytes")
    elif size:
        raise ProtocolError(f"a {type(message).__name__} has no body, {size} bytes came")
    return size


def check_columns(message: FRAGMENT) -> int:
    """Bytes of all columns of a fragment: its body's, unless that is compressed.

    Raises `ProtocolError` unless each of them has the rows that it must have.
    """
    steps, segments = message.steps, message.segments
    if segments:
        told = sum([segment.steps for segment in segments])
        if told != steps:
            raise ProtocolError(f"the {len(segments)} segments of a fragment of {steps} steps have {told} steps")
        if message.evaluation:
            raise ProtocolError("a fragment of an evaluation is of one episode, and has no segments")
    if type(message) is not Relayed:
        columns = message.columns
    else:
        described = bytes(message.columns)
        if not message.modules and len(described) <= REMEMBERED_BYTES:
            return _check_described(described, steps, len(segments))
        columns = _read_columns(described)
    if message.modules:
        return _check_agents(message, columns)
    return _check_rows_of(columns, steps, len(segments))


@lru_cache(maxsize=1024)
def _check_described(described: bytes, steps: int, segments: int) -> int:
    """Fragments of one length describe their columns alike, thousands of times."""
    return _check_rows_of(_read_columns(described), steps, segments)


def _read_columns(described: bytes) -> tuple[Column, ...]:
    try:
        return decode_columns(described)
    except DECODING as e:
        raise ProtocolError(f"expected the columns of a fragment: {e}") from None


def _check_rows_of(columns: tuple[Column, ...], steps: int, segments: int) -> int:
    if not columns:
        raise ProtocolError(f"a fragment of {steps} steps has no columns")
    if columns[0].name != "obs":
        raise ProtocolError(f"the first column must be 'obs', it is '{columns[0].name}'")
    pieces = segments or 1
    claimed = 0
    for column in columns:
        claimed += column_bytes(column)
        if column.name in BEFORE and column.shape and not segments:
            continue  # as many as there are
        rows = steps + pieces if column.name == "obs" or column.name.startswith(STATE_IN) else steps
        if not column.shape or column.shape[0] != rows:
            of = f"{steps} steps in {pieces} segments" if segments else f"{steps} steps"
            raise ProtocolError(
                f"column '{column.name}' of a fragment of {of} must have {rows} rows, its shape is {list(column.shape)}"
            )
    return claimed


def _check_agents(message: FRAGMENT, columns: tuple[Column, ...]) -> int:
    """Of several agents: as many rows of each module as its agents have steps, and one more for each of them in `obs`,
    `t` and the memory of a recurrent policy."""
    if message.segments:
        raise ProtocolError("a fragment of several agents is of one episode, and has no segments")
    if message.steps > MAX_AGENTS_STEPS:
        raise ProtocolError(
            f"a fragment of several agents has at most {MAX_AGENTS_STEPS} env steps, this one {message.steps}"
        )
    steps: dict[str, int] = {}
    agents: dict[str, int] = {}
    for rows in message.agents:
        if rows.module not in message.modules:
            raise ProtocolError(f"agent {rows.agent!r} of a fragment is module '{rows.module}', which is not in it")
        steps[rows.module] = steps.get(rows.module, 0) + rows.steps
        agents[rows.module] = agents.get(rows.module, 0) + 1
    if len({rows.agent for rows in message.agents}) < len(message.agents):
        raise ProtocolError("an agent of a fragment is there twice")
    claimed = 0
    for column in columns:
        claimed += column_bytes(column)
        module, _, name = column.name.partition("/")
        if module not in agents:
            raise ProtocolError(f"column '{column.name}' is of none of the fragment's agents' modules: {list(agents)}")
        if name in BEFORE and column.shape:
            continue  # as many as there are
        expected = steps[module] + (agents[module] if name in ("obs", "t") or name.startswith(STATE_IN) else 0)
        if not column.shape or column.shape[0] != expected:
            raise ProtocolError(
                f"column '{column.name}' of {_named(message, module)} with {steps[module]} steps must have {expected} "
                f"rows, its shape is {list(column.shape)}"
            )
    return claimed


def _named(message: FRAGMENT, module: str) -> str:
    names = [repr(rows.agent) for rows in message.agents if rows.module == module]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"agent{'s' * (len(names) > 1)} {', '.join(names[:8])}{more}"


def _check_rows(message: ACT | ACTION, size: int) -> None:
    columns = message.columns
    rows = message.rows if type(message) is ACT else (columns[0].shape[:1] or (0,))[0] if columns else 0
    # Of several modules, each with rows of its own.
    parts = message.told if isinstance(message, ACT) else message.modules
    claimed = 0
    for column in columns:
        claimed += column_bytes(column)
        if not column.shape or (column.shape[0] != rows and not parts):
            raise ProtocolError(
                f"column '{column.name}' of request {message.request} must have {rows} rows, its shape is "
                f"{list(column.shape)}"
            )
    if type(message) is ACT and parts and (told := sum(column.shape[0] for column in columns)) != rows:
        raise ProtocolError(
            f"the columns of request {message.request} must have {rows} rows together, they have {told}"
        )
    if type(message) is ACT and message.agents and len(message.agents) != rows:
        raise ProtocolError(f"request {message.request} of {rows} rows names {len(message.agents)} agents")
    if len(columns) > 1 and len({column.name for column in columns}) < len(columns):
        raise ProtocolError(f"two columns of request {message.request} have one name")
    if claimed != size:
        raise ProtocolError(f"the header's columns claim {claimed} bytes, the body has {size}")


def unpack(frames: Sequence[Buffer]) -> tuple[Message, list[Buffer]]:
    """The message and the frames of its body. Raises `ProtocolError`."""
    if not frames:
        raise ProtocolError("a message without frames")
    message = parse_header(frames[0])
    body = list(frames[1:])
    check_body(message, body)
    return message, body
