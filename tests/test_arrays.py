"""Arrays: what travels, that it comes out the same, and headers that lie about their bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rllink_zmq.arrays import ITEM_BYTES, column_bytes, column_of, from_body, to_buffers
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import MAX_BODY_BYTES, Column

DTYPES = st.sampled_from(sorted(ITEM_BYTES))
SOME = {"obs": np.arange(6, dtype="<f4").reshape(3, 2), "actions": np.array([1, 2], "<i8")}


def cut(data: bytes, at: list[int]) -> list[bytes]:
    edges = [0, *sorted(min(n, len(data)) for n in at), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_item_bytes_are_numpys(dtype: str) -> None:
    assert np.dtype(dtype).itemsize == ITEM_BYTES[dtype]
    assert np.dtype(dtype).str == dtype


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_round_trip_however_the_body_is_cut(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4, unique=True))
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    arrays = {name: data.draw(hnp.arrays(data.draw(DTYPES), data.draw(shapes))) for name in names}
    columns, buffers = to_buffers(arrays)
    joined = b"".join(buffers)
    frames = cut(joined, data.draw(st.lists(st.integers(0, len(joined)), max_size=5)))
    for body in (buffers, [joined], frames, [bytearray(joined)], [memoryview(joined)]):
        decoded = from_body(columns, body)
        assert list(decoded) == names
        for name, array in arrays.items():
            assert decoded[name].dtype == array.dtype
            assert decoded[name].shape == array.shape
            assert decoded[name].tobytes() == array.tobytes()
            assert decoded[name].flags.aligned


def test_what_is_not_contiguous_is_copied() -> None:
    whole = np.arange(24, dtype="<f4").reshape(4, 6)
    for view in (whole[:, ::2], whole.T, whole[::-1], np.asfortranarray(whole)):
        columns, buffers = to_buffers({"x": view})
        np.testing.assert_array_equal(from_body(columns, buffers)["x"], view)


def test_contiguous_arrays_are_not_copied() -> None:
    array = np.arange(6, dtype="<f4")
    _, buffers = to_buffers({"x": array})
    array[0] = 9
    assert np.frombuffer(buffers[0], "<f4")[0] == 9
    body = bytes(buffers[0])
    assert np.shares_memory(from_body([Column("x", "<f4", (6,))], [body])["x"], np.frombuffer(body, np.uint8))


@pytest.mark.parametrize("dtype", ["O", ">f4", ">i8", "c8", "U3", "S4", "M8[s]", "m8[s]", "f16", "V8", [("a", "f4")]])
def test_other_dtypes_do_not_travel(dtype: object) -> None:
    array = np.zeros(2, np.dtype(dtype))  # type: ignore[call-overload]
    with pytest.raises(ProtocolError, match="these travel"):
        column_of("x", array)
    with pytest.raises(ProtocolError, match="known: "):
        from_body([Column("x", array.dtype.str, (2,))], [array.tobytes()] if array.dtype.kind != "O" else [b"\0" * 16])


@pytest.mark.parametrize("dtype", ["", "f4", "float32", "<f3", "|O", "O8", "=f4", "<F4", "<f4 ", "|u2", "<b1"])
def test_names_of_dtypes_are_exact(dtype: str) -> None:
    with pytest.raises(ProtocolError, match="known: "):
        column_bytes(Column("x", dtype, (1,)))


@pytest.mark.parametrize(
    "shape",
    [
        (MAX_BODY_BYTES // 4 + 1,),
        (1 << 52, 1 << 52),
        ((1 << 53) - 1,) * 9,
        (0, 1 << 52, 1 << 52),
        (1 << 40, 0),
        (2, 0, 1 << 29),
    ],
)
def test_shapes_that_claim_too_much(shape: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError) as e:
        column_bytes(Column("x", "<f4", shape))
    assert e.value.code == "too_large"
    with pytest.raises(ProtocolError):
        from_body([Column("x", "<f4", shape)], [])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (MAX_BODY_BYTES // 4,), (0, 5), (1,) * 9])
def test_shapes_that_are_good(shape: tuple[int, ...]) -> None:
    assert column_bytes(Column("x", "<f4", shape)) == 4 * int(np.prod(shape))


@pytest.mark.parametrize(
    "columns",
    [
        [Column("obs", "<f4", (3, 2))],
        [Column("obs", "<f4", (3, 2)), Column("actions", "<i8", (3,))],
        [Column("obs", "<f4", (3, 2)), Column("actions", "<i4", (2,))],
        [Column("obs", "<f8", (3, 2)), Column("actions", "<i8", (2,))],
        [Column("obs", "<f4", (3, 2)), Column("actions", "<i8", (2,)), Column("more", "|u1", (1,))],
    ],
)
def test_columns_that_do_not_add_up_to_the_body(columns: list[Column]) -> None:
    _, buffers = to_buffers(SOME)
    with pytest.raises(ProtocolError, match=r"claim .* bytes, the body has 40"):
        from_body(columns, buffers)


def test_two_columns_of_one_name() -> None:
    _, buffers = to_buffers({"a": SOME["actions"], "b": SOME["actions"]})
    with pytest.raises(ProtocolError, match="two columns are called 'a'"):
        from_body([Column("a", "<i8", (2,))] * 2, buffers)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("ab", min_size=1, max_size=2),
            st.one_of(DTYPES, st.text(max_size=8)),
            st.lists(st.one_of(st.integers(0, 4), st.integers(0, (1 << 53) - 1)), max_size=9).map(tuple),
        ),
        max_size=4,
    ),
    st.lists(st.binary(max_size=40), max_size=4),
)
def test_any_columns_and_any_body_give_arrays_or_a_protocol_error(
    columns: list[tuple[str, str, tuple[int, ...]]], body: list[bytes]
) -> None:
    try:
        arrays = from_body([Column(*c) for c in columns], body)
    except ProtocolError:
        return
    assert sum(a.nbytes for a in arrays.values()) == sum(map(len, body))
