"""What the broker says of two spaces, and what a step of them takes."""

from __future__ import annotations

import pytest

from broker.spaces import mismatch, step_bytes
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import (
    BoxSpace,
    DictSpace,
    DiscreteSpace,
    MultiBinarySpace,
    MultiDiscreteSpace,
    Space,
    Spaces,
    TupleSpace,
)

TWO = DiscreteSpace(2)
BOX = BoxSpace((4,), "<f4", (-1.0,), (1.0,))


def nest(inner: Space) -> Space:
    return DictSpace((("a", TWO), ("b", TupleSpace((BOX, inner)))))


@pytest.mark.parametrize(
    ("theirs", "ours", "text"),
    [
        (nest(TWO), nest(TWO), ""),
        (nest(BoxSpace((4,), "<f4", (0.0,), (9.0,))), nest(BOX), ""),
        (nest(DiscreteSpace(3)), nest(TWO), "has ['b'][1]: Discrete(2), this simulator's is Discrete(3)"),
        (nest(BOX), nest(TWO), "has ['b'][1]: Discrete(2), this simulator's is Box(-1, 1, [4], f4)"),
        (BOX, nest(TWO), "is Dict('a': Discrete(2), 'b': Tuple(Box(-1, 1, [4], f4), Discrete(2))), this"),
        (DictSpace((("b", TWO),)), DictSpace((("a", TWO),)), "is Dict('a': Discrete(2)), this simulator's is Dict('b'"),
        (MultiDiscreteSpace((2, 3)), MultiDiscreteSpace((2, 3), (0, 1)), "is MultiDiscrete([2, 3], start=[0, 1]), t"),
        (
            MultiBinarySpace((2,)),
            MultiBinarySpace((3, 1)),
            "is MultiBinary([3, 1]), this simulator's is MultiBinary([2",
        ),
    ],
)
def test_what_differs_is_named(theirs: Space, ours: Space, text: str) -> None:
    said = mismatch(Spaces(theirs, TWO), Spaces(ours, TWO))
    assert said.startswith(f"the trainer's observation space {text}") if text else not said


def test_the_bounds_of_actions_matter_at_every_depth() -> None:
    other = BoxSpace((4,), "<f4", (-1.0,), (2.0,))
    assert "action space has ['b'][1]: Box(-1, 1," in mismatch(Spaces(TWO, nest(other)), Spaces(TWO, nest(BOX)))


def test_the_bytes_of_a_step() -> None:
    assert step_bytes(Spaces(nest(MultiBinarySpace((3, 5))), MultiDiscreteSpace((2, 3)))) == 2 * (8 + 16 + 15) + 16
    deep: Space = TWO
    for _ in range(9):
        deep = TupleSpace((deep,))
    with pytest.raises(ProtocolError, match="8 levels deep; at most 8 travel"):
        step_bytes(Spaces(deep, TWO))
    with pytest.raises(ProtocolError, match="over the limit"):
        step_bytes(Spaces(MultiBinarySpace((1 << 50,)), TWO))
