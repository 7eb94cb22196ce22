"""Spaces, as far as the broker looks at them: whether a simulator's fit the trainer's, and what a step takes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import (
    MAX_NESTING,
    BoxSpace,
    Column,
    DictSpace,
    DiscreteSpace,
    MultiBinarySpace,
    MultiDiscreteSpace,
    Space,
    Spaces,
    TupleSpace,
)
from rllink_zmq.wire import column_bytes


def check_agents(spaces: Spaces) -> None:
    """Raises `ProtocolError` where the agents of several and their spaces are not each other's."""
    if spaces.agents:
        _of_agents(spaces)


def mismatch(theirs: Spaces, ours: Spaces) -> str:
    """How a simulator's spaces differ from the trainer's, in words; '' when they fit. Bounds of observations and the
    bounds of a Box that are only rounded differently don't matter. Of several agents it may have fewer."""
    if theirs.agents or ours.agents:
        return _agents_mismatch(theirs, ours)
    return _one_mismatch(theirs, ours)


def _agents_mismatch(theirs: Spaces, ours: Spaces) -> str:
    if not (theirs.agents and ours.agents):
        one = "the trainer's environment has one agent, this simulator's has several: "
        many = "the trainer's environment has several agents, this simulator's has one, or is not told which: "
        return f"{many if ours.agents else one}{_agents(theirs.agents or ours.agents)}"
    known, own = _of_agents(ours), _of_agents(theirs)
    for agent, spaces in own.items():
        if agent not in known:
            return f"the trainer knows no agent {agent!r}, but {_agents(ours.agents)}"
        text = _one_mismatch(spaces, known[agent])
        if text:
            return f"of agent {agent!r} {text}"
    return ""


def _agents(agents: Sequence[int | str]) -> str:
    shown = ", ".join(repr(agent) for agent in agents[:8])
    return shown + (f" and {len(agents) - 8} more" if len(agents) > 8 else "")


def _of_agents(spaces: Spaces) -> dict[int | str, Spaces]:
    """Each agent's own. Raises `ProtocolError` where agents and spaces are not each other's."""
    observation, action = spaces.observation, spaces.action
    names = [str(agent) for agent in spaces.agents]
    if not (isinstance(observation, DictSpace) and isinstance(action, DictSpace)):
        raise ProtocolError("spaces of several agents are Dicts")
    for inside in (observation.spaces, action.spaces):
        if [key for key, _ in inside] != names:
            raise ProtocolError(f"the agents are {_agents(names)}, and the spaces are of others")
    pairs = zip(spaces.agents, observation.spaces, action.spaces, strict=True)
    return {agent: Spaces(of_agent[1], its_action[1]) for agent, of_agent, its_action in pairs}


def _one_mismatch(theirs: Spaces, ours: Spaces) -> str:
    for what, their, our, bounds in (
        ("observation", theirs.observation, ours.observation, False),
        ("action", theirs.action, ours.action, True),
    ):
        if not _same(their, our, bounds):
            where, their, our = _where(their, our, bounds)
            inside = f" has {where}:" if where else " is"
            return f"the trainer's {what} space{inside} {describe(our)}, this simulator's is {describe(their)}"
    return ""


def _same(theirs: Space, ours: Space, bounds: bool) -> bool:
    if type(theirs) is not type(ours):
        return False
    if isinstance(theirs, BoxSpace) and isinstance(ours, BoxSpace):
        same = theirs.shape == ours.shape and theirs.dtype == ours.dtype
        return same and (not bounds or (theirs.low == ours.low and theirs.high == ours.high))
    if isinstance(theirs, DictSpace | TupleSpace) and isinstance(ours, DictSpace | TupleSpace):
        their, our = _inside(theirs), _inside(ours)
        return [k for k, _ in their] == [k for k, _ in our] and all(
            _same(a, b, bounds) for (_, a), (_, b) in zip(their, our, strict=True)
        )
    return theirs == ours


def _where(theirs: Space, ours: Space, bounds: bool) -> tuple[str, Space, Space]:
    """The innermost two that differ, and where they are."""
    if isinstance(theirs, DictSpace | TupleSpace) and type(theirs) is type(ours):
        their, our = _inside(theirs), _inside(ours)
        if [k for k, _ in their] == [k for k, _ in our]:
            for (key, a), (_, b) in zip(their, our, strict=True):
                if not _same(a, b, bounds):
                    where, a, b = _where(a, b, bounds)
                    return f"[{key!r}]{where}", a, b
    return "", theirs, ours


def _inside(space: DictSpace | TupleSpace) -> list[tuple[str | int, Space]]:
    return list(space.spaces) if isinstance(space, DictSpace) else list(enumerate(space.spaces))


def describe(space: Space) -> str:
    """In Gymnasium's words."""
    match space:
        case BoxSpace():
            return f"Box({_bound(space.low)}, {_bound(space.high)}, {list(space.shape)}, {space.dtype.lstrip('<|')})"
        case DiscreteSpace():
            return f"Discrete({space.n}{f', start={space.start}' if space.start else ''})"
        case MultiDiscreteSpace():
            start = f", start={_listed(space.start)}" if space.start else ""
            return f"MultiDiscrete({_listed(space.nvec)}{start})"
        case MultiBinarySpace():
            return f"MultiBinary({_listed(space.shape)})"
        case DictSpace():
            shown = [f"{key!r}: {describe(inner)}" for key, inner in space.spaces[:4]]
            return f"Dict({', '.join(shown)}{', ...' if len(space.spaces) > 4 else ''})"
        case TupleSpace():
            shown = [describe(inner) for inner in space.spaces[:4]]
            return f"Tuple({', '.join(shown)}{', ...' if len(space.spaces) > 4 else ''})"


def _listed(values: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, values[:4])) + (", ...]" if len(values) > 4 else "]")


def _bound(values: tuple[float, ...]) -> str:
    if len(values) == 1:
        return f"{values[0]:g}"
    return "[" + ", ".join(f"{x:g}" for x in values[:4]) + (", ...]" if len(values) > 4 else "]")


def step_bytes(spaces: Spaces) -> int:
    """Bytes that one step of these spaces takes at least: two observations and an action. Of several agents each may
    act alone. Raises `ProtocolError`."""
    if spaces.agents:
        return max(step_bytes(one) for one in _of_agents(spaces).values())
    return 2 * _bytes(spaces.observation, 0) + _bytes(spaces.action, 0)


def _bytes(space: Space, depth: int) -> int:
    match space:
        case BoxSpace():
            return column_bytes(Column("x", space.dtype, space.shape))
        case DiscreteSpace():
            return 8
        case MultiDiscreteSpace():
            return 8 * len(space.nvec)
        case MultiBinarySpace():
            return column_bytes(Column("x", "|i1", space.shape)) if math.prod(space.shape) else 0
    if depth >= MAX_NESTING:
        raise ProtocolError(f"spaces {depth} levels deep; at most {MAX_NESTING} travel")
    return sum(_bytes(inner, depth + 1) for _, inner in _inside(space))
