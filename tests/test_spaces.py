"""Spaces there and back, and those that can't travel."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

from rllink_zmq import wire
from rllink_zmq.arrays import ITEM_BYTES
from rllink_zmq.client import connect
from rllink_zmq.errors import SpaceError
from rllink_zmq.messages import (
    HELLO,
    MAX_BOUNDS,
    MAX_SPACE_BYTES,
    BoxSpace,
    DictSpace,
    DiscreteSpace,
    MultiBinarySpace,
    MultiDiscreteSpace,
    SimulatorHello,
    Space,
)
from rllink_zmq.spaces import from_wire, spaces_to_wire, to_wire

INT64 = np.iinfo(np.int64)


def over_the_wire(space: gym.Space) -> gym.Space:
    """Encoded, checked against the bounds of the messages, decoded."""
    hello = HELLO(1, b"s" * 16, 1, SimulatorHello(spaces=spaces_to_wire(space, Discrete(2))))
    message, _ = wire.unpack(wire.pack(hello))
    assert isinstance(message, HELLO) and isinstance(message.peer, SimulatorHello) and message.peer.spaces
    return from_wire(message.peer.spaces.observation)


@pytest.mark.parametrize(
    "space",
    [
        Discrete(1),
        Discrete(5, start=-3),
        Discrete((1 << 53) - 1),
        Box(-np.inf, np.inf, (4,)),
        Box(0, 255, (84, 84, 4), np.uint8),
        Box(np.array([-1, -np.inf, -8], np.float32), np.array([1, np.inf, 8], np.float32)),
        Box(-1, 1, (), np.float32),
        Box(0, 1, (0,), np.float32),
        Box(0, 1, (3, 0, 2), np.float32),
        Box(-1, 1, (1,) * 8, np.float64),
        Box(-1, 1, (2,), np.float16),
        Box(0, 1, (3,), np.bool_),
        Box(INT64.min, INT64.max, (2,), np.int64),
        Box(0, np.iinfo(np.uint64).max, (2,), np.uint64),
        Box(np.array([[0, -5], [1, 2]]), np.array([[1, 5], [1, 3]]), dtype=np.int32),
        Box(0, 1, (1024, 1024, 3), np.uint8),
        gym.make("CartPole-v1").observation_space,
        gym.make("Pendulum-v1").action_space,
    ],
    ids=str,
)
def test_there_and_back(space: gym.Space) -> None:
    assert over_the_wire(space) == space


def test_equal_bounds_travel_as_one_number() -> None:
    assert to_wire(Box(0, 255, (84, 84), np.uint8)) == BoxSpace((84, 84), "|u1", (0.0,), (255.0,))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_box(data: st.DataObject) -> None:
    dtype = np.dtype(data.draw(st.sampled_from(sorted(ITEM_BYTES))))
    shape = tuple(data.draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape))
    if dtype.kind == "f":
        limit = float(np.finfo(dtype).max)
        numbers = st.floats(-limit, limit, width=dtype.itemsize * 8, allow_subnormal=False)  # type: ignore[arg-type]
    elif dtype.kind == "b":
        numbers = st.integers(0, 1)
    else:
        ends = np.iinfo(dtype)
        numbers = st.integers(max(int(ends.min), -(1 << 53)), min(int(ends.max), 1 << 53))
    one = np.array(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype).reshape(shape)
    two = np.array(data.draw(st.lists(numbers, min_size=size, max_size=size)), dtype).reshape(shape)
    space = Box(np.asarray(np.minimum(one, two)), np.asarray(np.maximum(one, two)), shape, dtype.type)
    assert over_the_wire(space) == space


def nested(levels: int) -> gym.Space:
    return Discrete(2) if not levels else gym.spaces.Tuple([nested(levels - 1)])


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.MultiDiscrete([2, 3]),
        gym.spaces.MultiDiscrete([2, 3], start=[-1, 4]),
        gym.spaces.MultiBinary(3),
        gym.spaces.MultiBinary((3, 2)),
        gym.spaces.Tuple([Discrete(2), Box(-1, 1, (2,))]),
        gym.spaces.Dict({"b": Discrete(2), "a": gym.spaces.Dict({"c": gym.spaces.Tuple([Discrete(3)])})}),
        nested(8),
    ],
    ids=lambda s: f"{s}"[:40],
)
def test_these_travel(space: gym.Space) -> None:
    assert over_the_wire(space) == space


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (DictSpace((("b", DiscreteSpace(2)), ("a", DiscreteSpace(2)))), "their order"),
        (DictSpace((("a", DiscreteSpace(2)), ("a", DiscreteSpace(2)))), "there twice"),
        (MultiDiscreteSpace((2, 3), (1,)), "as many starts"),
        (MultiBinarySpace((1 << 40,)), "bytes travel"),
    ],
)
def test_spaces_that_do_not_fit_together(space: Space, text: str) -> None:
    with pytest.raises(SpaceError, match=text):
        from_wire(space)


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.MultiDiscrete([[2, 3], [2, 3]]),
        gym.spaces.MultiDiscrete([2, 1 << 53]),
        gym.spaces.Dict({}),
        gym.spaces.Dict({"k" * 129: Discrete(2)}),
        gym.spaces.Dict({"a": gym.spaces.Text(3)}),
        gym.spaces.Tuple([Discrete(2)] * 256),
        gym.spaces.Tuple([gym.spaces.MultiDiscrete([2] * 8192)] * 3),
        nested(9),
        gym.spaces.Text(3),
        Box(-1, 1, (1,) * 9),
        Box(np.arange(MAX_BOUNDS + 1, dtype=np.float32), np.inf),
        Box(0, 1, (2,), np.dtype(">f4")),
        Discrete(1 << 53),
        Discrete(2, start=1 << 53),
        Discrete(2, start=-(1 << 53) - 1),
    ],
    ids=lambda s: f"{s}"[:40],
)
def test_these_do_not_travel(space: gym.Space) -> None:
    with pytest.raises(SpaceError):
        to_wire(space)


@pytest.mark.parametrize(
    "space",
    [
        BoxSpace((2,), "<f4", (float("nan"),), (1.0,)),
        BoxSpace((2,), "<i4", (0.0,), (float("nan"),)),
        BoxSpace((2,), "<f4", (2.0,), (1.0,)),
        BoxSpace((2,), "<f4", (1.0, 2.0, 3.0), (4.0,)),
        BoxSpace((2,), "<f4", (0.0,), (4.0, 5.0, 6.0)),
        BoxSpace((2,), "|O", (0.0,), (1.0,)),
        BoxSpace((2,), "", (0.0,), (1.0,)),
        BoxSpace((1 << 40, 1 << 40), "<f4", (0.0,), (1.0,)),
        BoxSpace((1 << 31,), "<f4", (0.0,), (1.0,)),
        BoxSpace((MAX_SPACE_BYTES + 1,), "|u1", (0.0,), (1.0,)),
        BoxSpace((0, 1 << 52, 1 << 52), "<f4", (0.0,), (1.0,)),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused_before_it_takes_memory(space: Space) -> None:
    with pytest.raises(SpaceError):
        from_wire(space)


@pytest.mark.parametrize(
    ("space", "low", "high"),
    [
        (BoxSpace((2,), "|u1", (-5.0,), (300.0,)), 0, 255),
        (BoxSpace((2,), "<i8", (-1e300,), (float("inf"),)), INT64.min, INT64.max),
        (BoxSpace((2,), "<f4", (-1e300,), (1e300,)), -np.inf, np.inf),
    ],
)
def test_bounds_past_the_dtype_are_its_ends(space: BoxSpace, low: float, high: float) -> None:
    box = from_wire(space)
    assert isinstance(box, Box)
    assert (box.low == low).all() and (box.high == high).all()


finite_or_not = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.builds(DiscreteSpace, st.integers(1, (1 << 53) - 1), st.integers(-(1 << 53), (1 << 53) - 1)),
        st.builds(
            BoxSpace,
            st.lists(st.one_of(st.integers(0, 3), st.integers(0, (1 << 53) - 1)), max_size=8).map(tuple),
            st.one_of(st.sampled_from(sorted(ITEM_BYTES)), st.text(max_size=16)),
            st.lists(finite_or_not, min_size=1, max_size=4).map(tuple),
            st.lists(finite_or_not, min_size=1, max_size=4).map(tuple),
        ).filter(lambda s: np.prod([float(n) for n in s.shape]) < 1e4 or np.prod([float(n) for n in s.shape]) > 1e9),
    )
)
def test_any_wire_space_gives_a_space_or_a_space_error(space: Space) -> None:
    try:
        made = from_wire(space)
    except SpaceError:
        return
    assert isinstance(made, gym.Space)


@pytest.mark.parametrize(
    ("observed", "acted", "text"),
    [
        (
            gym.spaces.Dict({"camera": gym.spaces.Tuple([gym.spaces.Text(3)])}),
            gym.spaces.Discrete(2),
            r"observation\['camera'\]\[0\]: a Text space",
        ),
        (gym.spaces.Sequence(gym.spaces.Discrete(2)), gym.spaces.Discrete(2), r"observation: a Sequence space"),
        (gym.spaces.Discrete(2), gym.spaces.OneOf([gym.spaces.Discrete(2)]), r"action: a OneOf space"),
        (
            gym.spaces.Discrete(2),
            gym.spaces.Dict({"lamps": gym.spaces.MultiBinary(2)}),
            r"action\['lamps'\]: actions of MultiBinary\(2\): RLlib has no distribution",
        ),
        (
            gym.spaces.Tuple([gym.spaces.Discrete(2)] * 300),
            gym.spaces.Discrete(2),
            r"observation: a Tuple of 301 spaces",
        ),
    ],
)
def test_a_simulator_is_told_which_part_does_not_travel(observed: gym.Space, acted: gym.Space, text: str) -> None:
    with pytest.raises(SpaceError, match=text):
        connect("tcp://127.0.0.1:1", observation_space=observed, action_space=acted, timeout=0.1)
