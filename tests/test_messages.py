"""Messages: every bound, wrong types, unknown and missing fields, and that whatever is sent comes out the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect
from test_golden import EXAMPLES

from rllink_zmq import messages
from rllink_zmq.messages import MESSAGES, Message, decode, encode

PARTS = (
    messages.BoxSpace,
    messages.DiscreteSpace,
    messages.MultiDiscreteSpace,
    messages.MultiBinarySpace,
    messages.DictSpace,
    messages.TupleSpace,
    messages.Spaces,
    messages.Column,
    messages.Claim,
    messages.Handed,
    messages.Dropped,
    messages.SimulatorHello,
    messages.RunnerHello,
    messages.TrainerHello,
    messages.ObserverHello,
    messages.ReaderHello,
    messages.ServiceHello,
)
STRUCTS = (*MESSAGES, *PARTS)

ANY_FLOAT = {(messages.BoxSpace, "low"), (messages.BoxSpace, "high")}
"""Bounds of a space may be infinite."""


NESTED = (messages.DictSpace, messages.TupleSpace)
"""Spaces of spaces."""


def fields_of(cls: type) -> tuple[inspect.Field, ...]:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    return info.fields


# ---- from the types: values inside the bounds, and just outside ------------------------------------------------------


def valid(kind: inspect.Type) -> Any:
    """The smallest valid value, as builtins."""
    match kind:
        case inspect.IntType():
            return kind.ge
        case inspect.FloatType():
            return max(kind.ge or 0.0, 0.0)
        case inspect.BoolType():
            return False
        case inspect.StrType():
            return "a" * max(1 if kind.pattern else 0, kind.min_length or 0)
        case inspect.BytesType():
            return b"s" * (kind.min_length or 0)
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.NoneType():
            return None
        case inspect.ListType() | inspect.VarTupleType():
            return [valid(kind.item_type)] * (kind.min_length or 0)
        case inspect.TupleType():
            return [valid(k) for k in kind.item_types]
        case inspect.DictType():
            return {}
        case inspect.UnionType():
            return valid(next(k for k in kind.types if not (isinstance(k, inspect.StructType) and k.cls in NESTED)))
        case inspect.StructType():
            values = {f.encode_name: valid(f.type) for f in kind.fields if f.required}
            if kind.array_like:
                return list(values.values())
            return ({kind.tag_field: kind.tag} if kind.tag_field else {}) | values
    raise AssertionError(f"no bound is known for {kind}")


def inside(kind: inspect.Type) -> list[Any]:
    """Values on the edge, and still good."""
    match kind:
        case inspect.IntType():
            return [kind.ge, kind.lt - 1 if kind.lt is not None else kind.le]
        case inspect.FloatType():
            return [v for v in (kind.ge, kind.le, 0, 1) if v is not None]
        case inspect.StrType():
            return ["a" * kind.max_length, valid(kind)]
        case inspect.BytesType():
            return [b"s" * kind.max_length]
        case inspect.LiteralType():
            return list(kind.values)
        case inspect.ListType() | inspect.VarTupleType():
            longest = [valid(kind.item_type)] * kind.max_length
            return [longest, *([v] * max(1, kind.min_length or 0) for v in inside(kind.item_type))]
        case inspect.DictType():
            return [{f"a{chr(97 + i // 26)}{chr(97 + i % 26)}": valid(kind.value_type) for i in range(kind.max_length)}]
        case inspect.UnionType():
            return [v for k in kind.types for v in inside(k)]
    return [valid(kind)]


def outside(kind: inspect.Type) -> list[Any]:
    """Values just over the edge."""
    match kind:
        case inspect.IntType():
            return [kind.ge - 1, kind.lt if kind.lt is not None else kind.le + 1, -(1 << 63), (1 << 64) - 1]
        case inspect.FloatType() if kind.ge is not None:
            return [float("nan"), float("inf"), float("-inf")]
        case inspect.StrType():
            short = ["a" * (kind.min_length - 1)] if kind.min_length else []
            return ["a" * (kind.max_length + 1), *short, *(["", "A", "a b", "a\n"] if kind.pattern else [])]
        case inspect.BytesType():
            return [b"s" * (kind.max_length + 1), *([b"s" * (kind.min_length - 1)] if kind.min_length else [])]
        case inspect.LiteralType():
            return ["", "other"]
        case inspect.ListType() | inspect.VarTupleType():
            long = [valid(kind.item_type)] * (kind.max_length + 1)
            short = [[valid(kind.item_type)] * (kind.min_length - 1)] if kind.min_length else []
            return [long, *short, *([v] * max(1, kind.min_length or 0) for v in outside(kind.item_type))]
        case inspect.TupleType():
            good = valid(kind)
            return [good[:-1], [*good, 0]]
        case inspect.DictType():
            many = {f"a{chr(97 + i // 26)}{chr(97 + i % 26)}": valid(kind.value_type) for i in range(kind.max_length)}
            over = [{k: valid(kind.value_type)} for k in outside(kind.key_type)]
            return [many | {"one_more": valid(kind.value_type)}, *over]
    return []


def wrong(kind: inspect.Type) -> list[Any]:
    """Values of another type."""
    every: list[tuple[type[inspect.Type] | tuple[type[inspect.Type], ...], Any]] = [
        ((inspect.IntType, inspect.FloatType), 7),
        (inspect.BoolType, True),
        ((inspect.StrType, inspect.LiteralType), "no"),
        (inspect.BytesType, b"s" * 16),
        (inspect.NoneType, None),
        ((inspect.ListType, inspect.VarTupleType, inspect.TupleType), []),
        ((inspect.DictType, inspect.StructType), {}),
    ]
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    values = [v for good, v in every if not any(isinstance(k, good) for k in kinds)]
    if isinstance(kind, inspect.IntType):
        values.append(1.0)
    return [*values, msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 0)]


def walk(kind: inspect.Type) -> Iterator[inspect.Type]:
    yield kind
    match kind:
        case inspect.ListType() | inspect.VarTupleType():
            yield from walk(kind.item_type)
        case inspect.TupleType():
            for k in kind.item_types:
                yield from walk(k)
        case inspect.DictType():
            yield from walk(kind.key_type)
            yield from walk(kind.value_type)
        case inspect.UnionType():
            for k in kind.types:
                yield from walk(k)


FIELDS = [pytest.param(cls, f, id=f"{cls.__name__}.{f.name}") for cls in STRUCTS for f in fields_of(cls)]


def raw(cls: type, field: inspect.Field, value: Any) -> bytes:
    """A `cls` on the wire, with this one value put in."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    if info.array_like:
        values = [value if f.name == field.name else valid(f.type) for f in info.fields]
        return bytes(msgpack.packb(values))
    return bytes(msgpack.packb(valid(info) | {field.encode_name: value}))


def read(cls: type, data: bytes) -> Any:
    return decode(data) if cls in MESSAGES else msgspec.msgpack.decode(data, type=cls)


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_nothing_is_without_bounds(cls: type, field: inspect.Field) -> None:
    for kind in walk(field.type):
        match kind:
            case inspect.IntType():
                assert kind.ge is not None and (kind.lt is not None or kind.le is not None)
            case inspect.FloatType():
                assert (kind.ge is not None and kind.le is not None) or (cls, field.name) in ANY_FLOAT
            case inspect.StrType() | inspect.BytesType():
                assert kind.max_length is not None
            case inspect.ListType() | inspect.VarTupleType() | inspect.DictType():
                assert kind.max_length is not None
            case inspect.AnyType() | inspect.RawType():
                raise AssertionError("anything may come")


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_bounds(cls: type, field: inspect.Field) -> None:
    for value in inside(field.type):
        read(cls, raw(cls, field, value))
    for value in outside(field.type):
        with pytest.raises(msgspec.ValidationError):
            print(f"accepted {value!r:.80}", read(cls, raw(cls, field, value)))


@pytest.mark.parametrize(("cls", "field"), FIELDS)
def test_wrong_types_are_refused(cls: type, field: inspect.Field) -> None:
    for value in wrong(field.type):
        with pytest.raises(msgspec.ValidationError):
            print(f"accepted {value!r:.80}", read(cls, raw(cls, field, value)))


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda c: c.__name__)
def test_what_has_no_default_must_be_there(cls: type) -> None:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    whole = valid(info)
    read(cls, msgpack.packb(whole))
    for field in (f for f in info.fields if f.required):
        if info.array_like:
            cut = whole[: [f.name for f in info.fields].index(field.name)]
        else:
            cut = {k: v for k, v in whole.items() if k != field.encode_name}
        with pytest.raises(msgspec.ValidationError):
            read(cls, msgpack.packb(cut))


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda c: c.__name__)
def test_unknown_fields_are_ignored(cls: type) -> None:
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    whole = valid(info)
    more = [*whole, "later", {"a": 1}] if info.array_like else {"later": {"deep": [1, b"x"]}, **whole, "x": None}
    assert read(cls, msgpack.packb(more)) == read(cls, msgpack.packb(whole))


@pytest.mark.parametrize("header", [{}, {"type": "NOPE"}, {"type": 1}, {"type": None}, [], "PING", None, {"k": 1}])
def test_no_such_message(header: Any) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode(msgpack.packb(header))


def test_only_what_differs_from_its_default_is_sent() -> None:
    assert msgpack.unpackb(encode(messages.PING())) == {"type": "PING"}
    assert msgpack.unpackb(encode(messages.TAKEN(3))) == {"type": "TAKEN", "k": 3}


def test_the_order_of_fields_means_nothing() -> None:
    for example in EXAMPLES:
        header = msgpack.unpackb(encode(example.message))
        assert decode(msgpack.packb(dict(reversed(header.items())))) == example.message


# ---- round trips -----------------------------------------------------------------------------------------------------


def values(kind: inspect.Type, depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a type, within its bounds and of moderate length. `depth`: of unions around it."""
    match kind:
        case inspect.IntType():
            return st.integers(kind.ge, kind.lt - 1 if kind.lt is not None else kind.le)
        case inspect.FloatType():
            return st.floats(kind.ge, kind.le, allow_nan=False)
        case inspect.BoolType():
            return st.booleans()
        case inspect.StrType():
            alphabet = "abcxyz_" if kind.pattern else st.characters(codec="utf-8")
            least = max(1 if kind.pattern else 0, kind.min_length or 0)
            return st.text(alphabet, min_size=least, max_size=min(kind.max_length, 12))
        case inspect.BytesType():
            return st.binary(min_size=kind.min_length, max_size=kind.max_length)
        case inspect.LiteralType():
            return st.sampled_from(kind.values)
        case inspect.NoneType():
            return st.none()
        case inspect.ListType() | inspect.VarTupleType():
            some = st.lists(
                values(kind.item_type, depth), min_size=kind.min_length or 0, max_size=min(kind.max_length, 4)
            )
            return some if isinstance(kind, inspect.ListType) else some.map(tuple)
        case inspect.TupleType():
            return st.tuples(*(values(k, depth) for k in kind.item_types))
        case inspect.DictType():
            return st.dictionaries(values(kind.key_type, depth), values(kind.value_type, depth), max_size=4)
        case inspect.UnionType():
            kinds = [k for k in kind.types if depth < 2 or not (isinstance(k, inspect.StructType) and k.cls in NESTED)]
            return st.one_of(*(values(k, depth + 1) for k in kinds))
        case inspect.StructType():
            required = {f.name: values(f.type, depth) for f in kind.fields if f.required}
            optional = {f.name: values(f.type, depth) for f in kind.fields if not f.required}
            return st.fixed_dictionaries(required, optional=optional).map(lambda kwargs: kind.cls(**kwargs))
    raise AssertionError(f"no values are known for {kind}")


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda c: c.__name__)
def test_round_trip(cls: type) -> None:
    @settings(max_examples=60, deadline=None)
    @given(values(inspect.type_info(cls)))
    def trip(message: Message) -> None:
        header = encode(message)
        assert decode(header) == message
        assert encode(decode(header)) == header
        assert decode(msgpack.packb(msgpack.unpackb(header))) == message

    trip()


# ---- what the numbers are --------------------------------------------------------------------------------------------


def test_the_bounds_of_two_spaces_fit_into_a_header() -> None:
    box = messages.BoxSpace((1,), "<f4", (0.5,) * messages.MAX_BOUNDS, (1.5,) * messages.MAX_BOUNDS)
    spaces = messages.Spaces(box, box)
    examples = [e.message for e in EXAMPLES]
    hello = next(m for m in examples if isinstance(m, messages.HELLO) and isinstance(m.peer, messages.TrainerHello))
    welcome = next(m for m in examples if isinstance(m, messages.WELCOME))
    big = [
        msgspec.structs.replace(hello, peer=msgspec.structs.replace(hello.peer, spaces=spaces)),
        msgspec.structs.replace(welcome, spaces=spaces, text="x" * 4096),
    ]
    assert all(len(encode(m)) <= messages.MAX_HEADER_BYTES for m in big)


def test_all_messages_are_in_the_union_and_named_as_on_the_wire() -> None:
    assert [c.__name__ for c in MESSAGES] == [inspect.type_info(c).tag for c in MESSAGES]  # type: ignore[attr-defined]
    assert len({c.__name__ for c in MESSAGES}) == len(MESSAGES)
    defined = {c for c in vars(messages).values() if isinstance(c, type) and issubclass(c, messages._Message)}
    assert defined - {messages._Message, messages.Relayed} == set(MESSAGES)


def test_messages_can_not_be_changed() -> None:
    for example in EXAMPLES:
        for field in example.message.__struct_fields__:
            with pytest.raises(AttributeError):
                setattr(example.message, field, 1)
