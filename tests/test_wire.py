"""Frames <-> messages: cutting, limits, headers that lie, and that any bytes give a Message or a ProtocolError."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import EXAMPLES, frames_of

from rllink_zmq import wire
from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import (
    ACT,
    ACTION,
    CONFIG,
    FRAGMENT,
    MAX_BODY_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    MESSAGES,
    PING,
    STATE,
    TAKE,
    Claim,
    Column,
    Message,
    Relayed,
    Segment,
    decode_columns,
    encode,
)

ARRAYS = {
    "obs": np.arange(12, dtype="<f4").reshape(3, 4),
    "actions": np.array([1, 0], "<i8"),
    "rewards": np.ones(2, "<f4"),
    "action_logp": np.full(2, -0.5, "<f4"),
}
COLUMNS, BUFFERS = to_buffers(ARRAYS)
BODY = b"".join(BUFFERS)


def fragment(columns: Any = COLUMNS, steps: int = 2) -> FRAGMENT:
    return FRAGMENT(b"s" * 16, 1, 1, "e", 0, steps, "no", "run", 0, 0.0, tuple(columns))


def changed(name: str, **changes: Any) -> tuple[Column, ...]:
    return tuple(msgspec.structs.replace(c, **changes) if c.name == name else c for c in COLUMNS)


def relayed(frames: list[Any]) -> Message:
    """As a broker reads them, which leaves the columns of a fragment as they came."""
    message = wire.parse_header(frames[0], relay=True)
    wire.check_body(message, frames[1:])
    return message


def refused(frames: list[Any]) -> ProtocolError:
    with pytest.raises(ProtocolError) as e:
        wire.unpack(frames)
    if frames:
        for _ in range(2):  # what was refused once isn't remembered as good
            with pytest.raises(ProtocolError) as by_broker:
                relayed(frames)
            assert by_broker.value.code == e.value.code
    return e.value


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_a_message_without_a_body_is_one_frame() -> None:
    assert wire.pack(PING()) == [encode(PING())]
    assert wire.pack(STATE("", -1, 0), [b""]) == [encode(STATE("", -1, 0))]


def test_small_buffers_are_joined() -> None:
    frames = wire.pack(fragment(), BUFFERS)
    assert len(frames) == 2
    assert bytes(frames[1]) == BODY


@pytest.mark.parametrize(
    ("sizes", "frames"),
    [
        ([MAX_FRAME_BYTES], [MAX_FRAME_BYTES]),
        ([MAX_FRAME_BYTES + 1], [MAX_FRAME_BYTES, 1]),
        ([MAX_FRAME_BYTES - 1, 1], [MAX_FRAME_BYTES]),
        ([MAX_FRAME_BYTES, 1], [MAX_FRAME_BYTES, 1]),
        ([3 * MAX_FRAME_BYTES, 0, 7], [MAX_FRAME_BYTES] * 3 + [7]),
    ],
)
def test_no_frame_is_larger_than_it_may_be(sizes: list[int], frames: list[int]) -> None:
    buffers = [bytes([i]) * n for i, n in enumerate(sizes)]
    header = STATE("r", 1, sum(sizes))
    packed = wire.pack(header, buffers)
    assert [len(f) for f in packed[1:]] == frames
    message, body = wire.unpack([bytes(f) for f in packed])
    assert message == header and b"".join(body) == b"".join(buffers)


def test_a_header_that_does_not_fit_into_a_frame_is_not_sent() -> None:
    claims = [Claim(bytes([i % 256]) * 16, list(range(10_000, 10_100))) for i in range(2_000)]
    with pytest.raises(ProtocolError, match="TAKE header of"):
        wire.pack(TAKE(1, claims))


# ---- limits ----------------------------------------------------------------------------------------------------------


class Long(bytes):
    """Bytes that say they are longer than they are: a limit is tested without its memory."""

    length = 0

    def __len__(self) -> int:
        return self.length


def long(length: int) -> Long:
    frame = Long()
    frame.length = length
    return frame


def test_no_frames() -> None:
    assert refused([]).code == "malformed"


def test_a_header_over_the_limit() -> None:
    note = msgpack.packb({"type": "PING", "x": b"." * MAX_HEADER_BYTES})
    assert refused([note]).code == "too_large"
    fits = msgpack.packb({"type": "PING", "x": b"." * (MAX_HEADER_BYTES - 20)})
    assert wire.unpack([fits]) == (PING(), [])


def test_too_many_frames() -> None:
    header = encode(STATE("r", 1, MAX_FRAMES))
    assert wire.unpack([header, *[b"x"] * (MAX_FRAMES - 1)])[0] == STATE("r", 1, MAX_FRAMES)
    assert refused([header, *[b"x"] * MAX_FRAMES]).code == "too_large"
    assert refused([header, *[b""] * MAX_FRAMES]).code == "too_large"


def test_a_body_over_the_limit() -> None:
    header = encode(STATE("r", 1, 1 << 52))
    assert wire.check_body(STATE("r", 1, 1 << 52), [long(MAX_BODY_BYTES)]) == MAX_BODY_BYTES
    assert refused([header, long(MAX_BODY_BYTES), b"x"]).code == "too_large"
    assert refused([encode(PING()), long(MAX_BODY_BYTES + 1)]).code == "too_large"


# ---- headers that lie about their body -------------------------------------------------------------------------------


def test_a_fragment_however_its_body_is_cut() -> None:
    header = encode(fragment())
    for body in ([BODY], list(BUFFERS), [BODY[:1], b"", BODY[1:50], BODY[50:]], [bytes([b]) for b in BODY]):
        message, frames = wire.unpack([header, *body])
        assert isinstance(message, FRAGMENT)
        for name, array in from_body(message.columns, frames).items():
            np.testing.assert_array_equal(array, ARRAYS[name])


def test_what_is_relayed_is_the_fragment_but_for_columns_that_nobody_has_read() -> None:
    for steps in (2, 2, 3):
        rows = {name: np.resize(array, (steps + (name == "obs"), *array.shape[1:])) for name, array in ARRAYS.items()}
        columns, buffers = to_buffers(rows)
        message = relayed([encode(fragment(columns, steps)), *buffers])
        assert isinstance(message, Relayed)
        whole = msgspec.structs.asdict(message) | {"columns": decode_columns(message.columns)}
        assert FRAGMENT(**whole) == fragment(columns, steps)


def test_columns_that_are_there_twice_are_decoded_by_the_broker_as_by_everybody() -> None:
    """Of a key that is there twice the last value counts. The first one may be what a runner can't decode."""
    fields = msgpack.unpackb(encode(fragment()))
    packed = [msgpack.packb(key) + msgpack.packb(value) for key, value in fields.items()]
    for key in (msgpack.packb("columns"), b"\xd9\x07columns"):
        header = bytes([0x80 | (len(packed) + 1)]) + key + b"\x07" + b"".join(packed)
        assert "columns" in str(refused([header, BODY]))
    named = msgspec.structs.replace(fragment(), episode="my columns")
    assert relayed([encode(named), BODY]) == named, "no Relayed, and as good"


def test_descriptions_of_columns_that_are_too_long_to_be_remembered_are_checked_as_well() -> None:
    rows = ARRAYS | {f"column {i} {'x' * 60}": np.zeros(2, "<f4") for i in range(100)}
    columns, buffers = to_buffers(rows)
    many = [encode(fragment(columns)), b"".join(buffers)]
    assert len(many[0]) > wire.REMEMBERED_BYTES
    relayed(many)
    refused([encode(fragment((*columns[:-1], Column("last", "<f4", (3,))))), many[1] + b"...."])


@pytest.mark.parametrize("body", [[], [b""], [BODY[:-1]], [BODY, b"\0"], [BODY, BODY]], ids=len)
def test_fewer_or_more_bytes_than_claimed(body: list[bytes]) -> None:
    assert "the header's columns claim" in str(refused([encode(fragment()), *body]))


@pytest.mark.parametrize(
    "columns",
    [
        pytest.param(changed("obs", shape=(2, 4)), id="obs of steps rows"),
        pytest.param(changed("obs", shape=(4, 3)), id="obs of steps + 2 rows"),
        pytest.param(changed("rewards", shape=(3,)), id="a column of steps + 1 rows"),
        pytest.param(changed("rewards", shape=(1, 2)), id="rows in the second dimension"),
        pytest.param(changed("rewards", shape=()), id="a single number"),
        pytest.param(changed("actions", shape=(0,)), id="no rows"),
        pytest.param(changed("actions", dtype="<i4"), id="fewer bytes"),
        pytest.param(changed("actions", dtype=">i8"), id="big endian"),
        pytest.param(changed("actions", dtype="|O"), id="objects"),
        pytest.param(changed("actions", dtype=""), id="no dtype"),
        pytest.param(changed("obs", shape=(3, 1 << 40)), id="a huge row"),
        pytest.param(changed("obs", shape=(3, (1 << 53) - 1, (1 << 53) - 1, 0)), id="a huge row of no bytes"),
        pytest.param((*COLUMNS[1:], COLUMNS[0]), id="observations last"),
        pytest.param(COLUMNS[:-1], id="a column less"),
        pytest.param((*COLUMNS, Column("more", "|u1", (2,))), id="a column more"),
    ],
)
def test_columns_that_lie(columns: tuple[Column, ...]) -> None:
    refused([encode(fragment(columns)), BODY])


def test_a_fragment_of_other_length_than_its_columns() -> None:
    for steps in (1, 3, (1 << 31) - 1):
        assert "rows" in str(refused([encode(fragment(steps=steps)), BODY]))


def test_a_fragment_of_several_episodes() -> None:
    pieces = (Segment("a", 4, 1, "terminated", 0.0, 0.0), Segment("b", 0, 1, "no", 0.0, 0.0))
    arrays = {"obs": np.zeros((4, 3), np.float32), "actions": np.zeros(2, np.int64)}
    columns, body = to_buffers(arrays)
    several = msgspec.structs.replace(fragment(columns), segments=pieces)
    message, _ = wire.unpack([encode(several), *body])
    assert message == several
    wrong = msgspec.structs.replace(several, segments=(pieces[0], Segment("b", 0, 2, "no", 0.0, 0.0)))
    assert "2 segments of a fragment of 2 steps have 3 steps" in str(refused([encode(wrong), *body]))
    few = msgspec.structs.replace(several, segments=(Segment("a", 4, 2, "no", 0.0, 0.0),))
    assert "column 'obs' of a fragment of 2 steps in 1 segments must have 3 rows, its shape is [4, 3]" in str(
        refused([encode(few), *body])
    )
    evaluated = msgspec.structs.replace(several, evaluation=True)
    assert "has no segments" in str(refused([encode(evaluated), *body]))


def test_a_fragment_that_says_it_is_settled() -> None:
    for base in (1, 7):
        wire.unpack([encode(msgspec.structs.replace(fragment(), number=7, base=base)), BODY])
    assert "settled" in str(refused([encode(msgspec.structs.replace(fragment(), number=7, base=8)), BODY]))


def test_shapes_on_the_wire_can_not_be_negative() -> None:
    header = msgpack.unpackb(encode(fragment()))
    header["columns"][0][2] = [3, -4]
    assert "columns[0][2][1]" in str(refused([msgpack.packb(header), BODY]))
    header["columns"][0][2] = [-3, -4]
    refused([msgpack.packb(header), BODY])


def test_two_columns_of_one_name_are_found_by_who_reads_them() -> None:
    twice = (*COLUMNS, Column("rewards", "<f4", (2,)))
    message, body = wire.unpack([encode(fragment(twice)), BODY, b"\0" * 8])
    assert isinstance(message, FRAGMENT)
    with pytest.raises(ProtocolError, match="two columns"):
        from_body(message.columns, body)


@pytest.mark.parametrize(
    "cls", [c for c in MESSAGES if c not in (FRAGMENT, STATE, CONFIG, ACT, ACTION)], ids=lambda c: c.__name__
)
def test_a_body_where_none_belongs(cls: type) -> None:
    example = next(e.message for e in EXAMPLES if type(e.message) is cls)
    assert "has no body, 1 bytes came" in str(refused([encode(example), b"x"]))
    assert wire.unpack([encode(example), b""])[0] == example


@pytest.mark.parametrize("offset", [0, 1, 99, 100])
def test_pieces_stay_inside_their_transfer(offset: int) -> None:
    for message in (STATE("r", 1, 100, offset), CONFIG("p", 100, offset)):
        wire.unpack([encode(message), b"x" * (100 - offset)])
        refused([encode(message), b"x" * (101 - offset)])
    refused([encode(STATE("r", 1, 100, 101))])


# ---- any bytes give a message or a ProtocolError, nothing else -------------------------------------------------------


def survives(frames: list[bytes]) -> bool:
    """True if the frames were a message. Anything but a ProtocolError with a code and a text goes through."""
    try:
        message, body = wire.unpack(frames)
    except ProtocolError as e:
        assert re.fullmatch("[a-z_]{1,64}", e.code)
        assert str(e)
        if frames:
            with pytest.raises(ProtocolError):
                relayed(frames)
        return False
    assert type(message) is type(relayed(frames)) or isinstance(relayed(frames), Relayed)
    assert type(message) in MESSAGES
    if isinstance(message, FRAGMENT):
        try:
            from_body(message.columns, body)
        except ProtocolError:
            return False
    return True


GOLDEN = [frames_of(e) for e in EXAMPLES]


def anything(rng: random.Random, depth: int = 0) -> Any:
    """A msgpack value."""
    kind = rng.randrange(12 if depth < 4 else 9)
    match kind:
        case 0:
            return rng.choice([None, True, False])
        case 1:
            return rng.choice([0, 1, -1, 255, 1 << 31, 1 << 53, (1 << 64) - 1, -(1 << 63)])
        case 2:
            return rng.choice([0.0, 1.5, float("inf"), float("nan"), 1e308])
        case 3:
            return rng.choice(["PING", "obs", "<f4", "simulator", "Box", "no", "é\U0001f600", ""])
        case 4:
            return rng.randbytes(rng.choice([0, 1, 8, 16, 17]))
        case 5:
            return msgpack.ExtType(rng.randrange(128), rng.randbytes(3))
        case 6:
            return msgpack.Timestamp(rng.randrange(1 << 34), 5)
        case 7 | 8:
            return rng.randrange(-100, 100)
        case 9 | 10:
            return [anything(rng, depth + 1) for _ in range(rng.randrange(5))]
    return {rng.choice(["a", "type", "space", "role", "k"]): anything(rng, depth + 1) for _ in range(rng.randrange(4))}


def values_changed(rng: random.Random, header: dict[str, Any]) -> bytes:
    """A golden header with one of its values, however deep, replaced."""
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            places.append((value, key))
            collect(inner)

    collect(header)
    where, key = rng.choice(places)
    where[key] = anything(rng)
    return bytes(msgpack.packb(header))


def inputs(rng: random.Random, count: int) -> Iterator[list[bytes]]:
    for _ in range(count):
        frames = list(rng.choice(GOLDEN))
        at = rng.randrange(len(frames))
        frame = frames[at]
        match rng.randrange(10):
            case 0:
                frames = [rng.randbytes(rng.randrange(64)) for _ in range(rng.randrange(4))]
            case 1 | 2 | 3:
                bit = rng.randrange(8 * len(frame))
                changed = bytearray(frame)
                changed[bit // 8] ^= 1 << bit % 8
                frames[at] = bytes(changed)
            case 4:
                frames[at] = frame[: rng.randrange(len(frame))]
            case 5:
                frames[at] = frame + rng.randbytes(rng.randrange(1, 9))
            case 6:
                changed = bytearray(frame)
                for _ in range(rng.randrange(1, 6)):
                    changed[rng.randrange(len(frame))] = rng.randrange(256)
                frames[at] = bytes(changed)
            case 7:
                other = rng.choice(rng.choice(GOLDEN))
                frames[at] = frame[: rng.randrange(len(frame))] + other[rng.randrange(len(other)) :]
            case 8:
                frames[0] = values_changed(rng, msgpack.unpackb(frames[0]))
            case _:
                rng.shuffle(frames)
                frames += rng.choice(GOLDEN)[rng.randrange(2) :]
        yield frames


def test_200_000_random_inputs() -> None:
    rng = random.Random(20_260_101)
    messages = sum(survives(frames) for frames in inputs(rng, 200_000))
    # Neither all nor none: a bit in a payload or in a free text changes nothing that could be noticed.
    assert 10_000 < messages < 150_000


def test_every_truncation_and_every_bit_of_every_golden_frame() -> None:
    for frames in GOLDEN:
        header = frames[0]
        for n in range(len(header)):
            assert not survives([header[:n], *frames[1:]])
        for bit in range(8 * len(header)):
            flipped = bytearray(header)
            flipped[bit // 8] ^= 1 << bit % 8
            survives([bytes(flipped), *frames[1:]])


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=4))
def test_any_frames(frames: list[bytes]) -> None:
    survives(frames)


msgpack_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from([c.__name__ for c in MESSAGES]),
    st.dictionaries(
        st.sampled_from(sorted({f for c in MESSAGES for f in c.__struct_fields__})), msgpack_values, max_size=6
    ),
    st.lists(st.binary(max_size=20), max_size=2),
)
def test_any_msgpack_map(kind: str, fields: dict[str, Any], body: list[bytes]) -> None:
    survives([msgpack.packb({"type": kind, **fields}), *body])


@pytest.mark.parametrize("length", [50_000_000, 0xFFFF_FFFF])
@pytest.mark.parametrize("before", ["refused", "unknown", "columns", "ledger"])
def test_lengths_that_are_claimed_take_no_memory(before: str, length: int) -> None:
    kind = {"refused": "TAKEN", "unknown": "PING", "columns": "FRAGMENT", "ledger": "PONG"}[before]
    code = b"\xdf" if before == "ledger" else b"\xdd"
    start = b"\x82" + msgpack.packb("type") + msgpack.packb(kind) + msgpack.packb(before)
    refused([start + code + length.to_bytes(4, "big")])


def test_depth_is_no_danger() -> None:
    for start in (b"\x82" + msgpack.packb("type") + msgpack.packb("PING"), b"\x82"):
        refused([start + msgpack.packb("x") + b"\x91" * 500_000])


def test_text_that_is_not_utf8() -> None:
    header = msgpack.packb({"type": "GET_CONFIG", "policy": "abcd"})
    refused([header.replace(b"abcd", b"ab\xff\xfe")])
    refused([header.replace(b"GET_CONFIG", b"GET_CONFI\xff")])
    refused([header.replace(b"policy", b"polic\xff")])


@pytest.mark.parametrize("kind", ["ACT", "ACTION"])
def test_rows_of_actions_fit_their_header(kind: str) -> None:
    def message(*columns: Column) -> Any:
        return ACT(b"s" * 16, 1, 2, columns) if kind == "ACT" else ACTION(b"s" * 16, 1, columns=columns)

    two, three, flat = Column("a", "<f4", (2, 1)), Column("b", "<f4", (3, 1)), Column("c", "<f4", ())
    assert wire.unpack([encode(message(two)), b"8 bytes!"])[0] == message(two)
    assert "must have 2 rows" in str(refused([encode(message(two, three)), bytes(20)]))
    assert "rows, its shape is []" in str(refused([encode(message(flat)), bytes(4)]))
    assert "claim 8 bytes, the body has 4" in str(refused([encode(message(two)), bytes(4)]))
