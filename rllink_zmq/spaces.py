"""Gymnasium spaces <-> the protocol's spaces."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np

from rllink_zmq.arrays import ITEM_BYTES
from rllink_zmq.errors import SpaceError
from rllink_zmq.messages import (
    MAX_AGENTS,
    MAX_BOUNDS,
    MAX_DIMENSIONS,
    MAX_NESTING,
    MAX_PARTS,
    MAX_SPACE_BYTES,
    AgentId,
    BoxSpace,
    DictSpace,
    DiscreteSpace,
    MultiBinarySpace,
    MultiDiscreteSpace,
    Space,
    Spaces,
    TupleSpace,
)
from rllink_zmq.packing import children

MAX_KEY = 128
"""Characters of a Dict's key."""

MOST = 1 << 53
"""Integers below it are the same in every language."""


def to_wire(space: gym.Space[Any]) -> Space:
    """A Gymnasium space as it travels. Raises `SpaceError` for one that this version can't carry."""
    return _limited(_to_wire(space, 0))


def _limited(made: Space) -> Space:
    parts, numbers = _count(made)
    if parts > MAX_PARTS or numbers > 2 * MAX_BOUNDS:
        raise SpaceError(
            f"a {type(made).__name__.removesuffix('Space')} of {parts} spaces and {numbers} bounds and counts, all in "
            f"all; {MAX_PARTS} and {2 * MAX_BOUNDS} travel: give Boxes one low and one high for all entries, or join "
            f"some of them"
        )
    return made


def _count(space: Space) -> tuple[int, int]:
    """How many spaces there are inside, and numbers that are listed."""
    if isinstance(space, DictSpace | TupleSpace):
        inner = [value for _, value in space.spaces] if isinstance(space, DictSpace) else space.spaces
        counts = [_count(value) for value in inner]
        return sum(p for p, _ in counts) + 1, sum(n for _, n in counts)
    if isinstance(space, BoxSpace):
        return 1, len(space.low) + len(space.high)
    return 1, len(space.nvec) + len(space.start) if isinstance(space, MultiDiscreteSpace) else 1


def _to_wire(space: gym.Space[Any], depth: int) -> Space:
    if isinstance(space, gym.spaces.Discrete):
        n, start = int(space.n), int(space.start)
        _check_integers("Discrete", n, start)
        return DiscreteSpace(n, start)
    if isinstance(space, gym.spaces.MultiDiscrete):
        if space.nvec.ndim != 1 or not 1 <= len(space.nvec) <= MAX_BOUNDS:
            raise SpaceError(
                f"a MultiDiscrete of shape {list(space.nvec.shape)}; one dimension of 1 to {MAX_BOUNDS} entries travels"
            )
        counts, starts = space.nvec.tolist(), space.start.tolist()
        for n, start in zip(counts, starts, strict=True):
            _check_integers("MultiDiscrete", n, start)
        return MultiDiscreteSpace(tuple(counts), tuple(starts) if any(starts) else ())
    if isinstance(space, gym.spaces.MultiBinary):
        _check_box(space.shape, "|i1")
        return MultiBinarySpace(tuple(space.shape))
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        return _nested_to_wire(space, depth)
    if isinstance(space, gym.spaces.Box):
        _check_box(space.shape, np.dtype(space.dtype).str)
        low, high = _bounds(space.low), _bounds(space.high)
        if max(len(low), len(high)) > MAX_BOUNDS:
            raise SpaceError(
                f"a Box with {space.low.size} bounds that differ; {MAX_BOUNDS} travel: give it one low and one high "
                f"for all entries, for example by scaling the observations"
            )
        return BoxSpace(space.shape, np.dtype(space.dtype).str, low, high)
    raise SpaceError(
        f"a {type(space).__name__} space; Box, Discrete, MultiDiscrete, MultiBinary, Dict and Tuple travel. Wrap the "
        f"environment, for example in gymnasium.wrappers.FlattenObservation."
    )


def _nested_to_wire(space: gym.spaces.Dict | gym.spaces.Tuple, depth: int) -> Space:
    kind, inner = type(space).__name__, children(space)
    if depth >= MAX_NESTING:
        raise SpaceError(f"a {kind} {depth} levels deep; at most {MAX_NESTING} travel")
    if not inner:
        raise SpaceError(f"a {kind} of no spaces; 1 to {MAX_PARTS} travel")
    for key, _ in inner:
        if not (isinstance(key, int) or 1 <= len(key) <= MAX_KEY):
            raise SpaceError(f"a Dict with the key {key!r}; text of 1 to {MAX_KEY} characters travels")
    if isinstance(space, gym.spaces.Dict):
        return DictSpace(tuple((str(key), _part_to_wire(key, value, depth + 1)) for key, value in inner))
    return TupleSpace(tuple(_part_to_wire(key, value, depth + 1) for key, value in inner))


def _part_to_wire(key: str | int, space: gym.Space[Any], depth: int) -> Space:
    """A space inside of another one: what is wrong with it is told with the way to it."""
    try:
        return _to_wire(space, depth)
    except SpaceError as error:
        raise SpaceError(_named(f"[{key!r}]", error)) from None


def _named(name: str, error: SpaceError) -> str:
    said = str(error)
    return f"{name}{said}" if said.startswith("[") else f"{name}: {said}"


def from_wire(space: Space) -> gym.Space[Any]:
    """The Gymnasium space of a wire space. Raises `SpaceError` when its parts don't fit each other.

    Bounds travel as float64: those of integers past 2**53 come rounded, the dtype's own ends exact.
    """
    return _from_wire(space, 0)


def _from_wire(space: Space, depth: int) -> gym.Space[Any]:
    if isinstance(space, DiscreteSpace):
        return gym.spaces.Discrete(space.n, start=space.start)
    if isinstance(space, MultiDiscreteSpace):
        if len(space.start) not in (0, len(space.nvec)):
            raise SpaceError(f"a MultiDiscrete of {len(space.nvec)} entries needs 0 or as many starts")
        return gym.spaces.MultiDiscrete(list(space.nvec), start=list(space.start) or None)
    if isinstance(space, MultiBinarySpace):
        _check_box(space.shape, "|i1")
        return gym.spaces.MultiBinary(space.shape[0] if len(space.shape) == 1 else space.shape)
    if isinstance(space, DictSpace | TupleSpace):
        if depth >= MAX_NESTING:
            raise SpaceError(f"spaces {depth} levels deep; at most {MAX_NESTING} travel")
        if isinstance(space, TupleSpace):
            return gym.spaces.Tuple([_from_wire(inner, depth + 1) for inner in space.spaces])
        keys = [key for key, _ in space.spaces]
        if keys != sorted(set(keys)):
            raise SpaceError(f"a Dict whose keys aren't in their order, or there twice: {keys[:8]}")
        return gym.spaces.Dict({key: _from_wire(inner, depth + 1) for key, inner in space.spaces})
    _check_box(space.shape, space.dtype)
    dtype = np.dtype(space.dtype)
    size = math.prod(space.shape)
    for bounds in (space.low, space.high):
        if len(bounds) not in (1, size):
            raise SpaceError(f"a Box of shape {list(space.shape)} needs 1 or {size} bounds, not {len(bounds)}")
        if any(math.isnan(b) for b in bounds):
            raise SpaceError("a bound of a Box is NaN")
    low, high = (
        np.broadcast_to(_in_dtype(b, dtype).reshape(space.shape if len(b) > 1 else ()), space.shape)
        for b in (space.low, space.high)
    )
    try:
        return gym.spaces.Box(low, high, space.shape, dtype.type)
    except ValueError as e:
        raise SpaceError(f"a Box that Gymnasium refuses: {e}") from None


def spaces_to_wire(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Spaces:
    """Both spaces of an environment as they travel. Raises `SpaceError`."""
    made = []
    for name, space in (("observation", observation_space), ("action", action_space)):
        try:
            made.append(to_wire(space))
        except SpaceError as error:
            raise SpaceError(_named(name, error)) from None
    return Spaces(made[0], made[1])


def agents_to_wire(
    observation_spaces: Mapping[AgentId, gym.Space[Any]], action_spaces: Mapping[AgentId, gym.Space[Any]]
) -> Spaces:
    """The spaces of several agents, by their ids, as they travel. Raises `SpaceError`, with the agent's name."""
    if set(observation_spaces) != set(action_spaces) or not observation_spaces:
        raise SpaceError(
            f"expected an observation space and an action space of each agent, got observation spaces of "
            f"{list(observation_spaces)} and action spaces of {list(action_spaces)}"
        )
    if len(observation_spaces) > MAX_AGENTS:
        raise SpaceError(f"{len(observation_spaces)} agents; at most {MAX_AGENTS} travel")
    agents = sorted(map(agent_id, observation_spaces), key=str)
    for agent in agents:
        if not 1 <= len(str(agent)) <= 64:
            raise SpaceError(f"an agent's id is an int or text of 1 to 64 characters, not {agent!r}")
    if len(set(map(str, agents))) < len(agents):
        raise SpaceError(f"two agents have the same id as text: {agents}")
    wired = []
    for spaces in (observation_spaces, action_spaces):
        inside = []
        for agent in agents:
            try:
                inside.append((str(agent), _to_wire(spaces[agent], 1)))
            except SpaceError as e:
                raise SpaceError(f"agent {agent!r}: {e}") from None
        wired.append(_limited(DictSpace(tuple(inside))))
    return Spaces(wired[0], wired[1], tuple(agents))


def agents_from_wire(spaces: Spaces) -> tuple[dict[AgentId, gym.Space[Any]], dict[AgentId, gym.Space[Any]]]:
    """Observation spaces and action spaces of several agents, by their ids. Raises `SpaceError`."""
    observation, action = spaces.observation, spaces.action
    names = [str(agent) for agent in spaces.agents]
    if not (isinstance(observation, DictSpace) and isinstance(action, DictSpace)):
        raise SpaceError("spaces of several agents are Dicts")
    if not ([key for key, _ in observation.spaces] == [key for key, _ in action.spaces] == names):
        raise SpaceError(f"the agents are {names[:8]}, and the spaces are of others")
    return (
        {agent: _from_wire(inner, 1) for agent, (_, inner) in zip(spaces.agents, observation.spaces, strict=True)},
        {agent: _from_wire(inner, 1) for agent, (_, inner) in zip(spaces.agents, action.spaces, strict=True)},
    )


def agent_id(agent: Any) -> AgentId:
    """An id as it travels. Raises `SpaceError` for one that doesn't."""
    if isinstance(agent, str):
        return str(agent)
    if isinstance(agent, int | np.integer) and not isinstance(agent, bool):
        return int(agent)
    raise SpaceError(f"an agent's id is an int or text of 1 to 64 characters, not {agent!r}")


def _check_integers(kind: str, n: int, start: int) -> None:
    if not -MOST <= start < MOST or n >= MOST:
        raise SpaceError(f"a {kind} of {n} values from {start} on; numbers below 2**53 travel")


def _check_box(shape: tuple[int, ...], dtype: str) -> None:
    """Raises `SpaceError` for a Box that can't travel, before anything of its size is made."""
    if dtype not in ITEM_BYTES:
        raise SpaceError(f"a Box of dtype {dtype}; these travel: {', '.join(ITEM_BYTES)}")
    size = ITEM_BYTES[dtype] * math.prod(n for n in shape if n)
    if len(shape) > MAX_DIMENSIONS or size > MAX_SPACE_BYTES:
        raise SpaceError(
            f"a Box of shape {list(shape)} and dtype {dtype}; at most {MAX_DIMENSIONS} dimensions and "
            f"{MAX_SPACE_BYTES} bytes travel"
        )


def _bounds(values: Any) -> tuple[float, ...]:
    """One number where all are the same."""
    flat = np.asarray(values).reshape(-1)
    if not flat.size:
        return (0.0,)
    return (float(flat[0]),) if (flat == flat[0]).all() else tuple(map(float, flat))


def _in_dtype(values: tuple[float, ...], dtype: np.dtype[Any]) -> Any:
    """Bounds as an array. What lies outside of the dtype becomes its end: float64 can't hold 2**63 - 1."""
    if dtype.kind in "iu":
        ends = np.iinfo(dtype)
        lowest, highest = int(ends.min), int(ends.max)
        whole = [lowest if v <= lowest else highest if v >= highest else int(v) for v in values]
        return np.array(whole, dtype)
    with np.errstate(over="ignore"):
        return np.array(values).astype(dtype)
