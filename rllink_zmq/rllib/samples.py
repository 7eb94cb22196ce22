"""What `sample()` returns, on its way to another process.

With a hundred simulators an answer has a hundred chunks of a few steps, each of seven arrays. Ray would carry hundreds
of buffers: some 11 ms to send them and 5 ms to read them, whatever their bytes are. So chunks that are alike travel as
one array for each of their columns, and come out as what they were: a list of RLlib's episodes, whose arrays are views.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer

from rllink_zmq.rllib.blank import buffer_like

JOINED_BYTES = 16 * 1024
"""Arrays up to this size, by their mean, are joined: below it what an array costs is more than what a copy does."""

_EACH = ("id_", "t_started", "t", "is_terminated", "is_truncated")
_BUFFERS = ("observations", "actions", "rewards")
_APART = {*_EACH, *_BUFFERS, "extra_model_outputs", "infos", "_custom_data"}
_SHARED = tuple(name for name in SingleAgentEpisode.__slots__ if name not in _APART)


class Samples(list[SingleAgentEpisode]):
    """Chunks. Pickled it becomes a plain list of them; its copies are those of a list."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        packed = _pack(self)
        return (list, (list(self),)) if packed is None else (unpack, (packed,))

    def __copy__(self) -> Samples:
        return Samples(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Samples:
        return Samples(copy.deepcopy(chunk, memo) for chunk in self)


class Columns(NamedTuple):
    """One column of all chunks. `arrays`: the rows of one after those of the other (`cuts` says where), or each chunk's
    own."""

    arrays: NDArray[Any] | Sequence[NDArray[Any]]
    cuts: Sequence[int]

    def split(self) -> Sequence[NDArray[Any]]:
        whole = self.arrays
        return [whole[a:b] for a, b in pairwise(self.cuts)] if isinstance(whole, np.ndarray) else whole


class Buffers(NamedTuple):
    """One of RLlib's buffers of all chunks. `attributes`: what they have in common; `like`: the structure whose parts
    the columns are, None where there is one alone."""

    attributes: dict[str, Any]
    lookbacks: Sequence[int]
    like: Any
    columns: Sequence[Columns]

    def split(self) -> list[InfiniteLookbackBuffer]:
        parts = [column.split() for column in self.columns]
        rows = (
            parts[0] if self.like is None else [tree.unflatten_as(self.like, one) for one in zip(*parts, strict=True)]
        )
        return [
            buffer_like(self.attributes, data, lookback) for data, lookback in zip(rows, self.lookbacks, strict=True)
        ]


class Packed(NamedTuple):
    """Chunks that are alike. `shared`: what is the same in all; `each`: id, first step, end, terminated, truncated;
    `infos`: attributes of the buffer, whose data are empty dicts, as many as there are in each chunk."""

    shared: dict[str, Any]
    each: Sequence[tuple[Any, ...]]
    buffers: Sequence[Buffers]
    outputs: Sequence[tuple[str, Buffers]]
    infos: dict[str, Any]
    numbers: Sequence[int]


def unpack(packed: Packed) -> list[SingleAgentEpisode]:
    """The chunks."""
    buffers = zip(*(one.split() for one in packed.buffers), strict=True)
    names = [name for name, _ in packed.outputs]
    outputs: Any = zip(*(one.split() for _, one in packed.outputs), strict=True) if names else [()] * len(packed.each)
    chunks = []
    for each, mine, extra, number in zip(packed.each, buffers, outputs, packed.numbers, strict=True):
        chunk = SingleAgentEpisode.__new__(SingleAgentEpisode)
        for name, value in packed.shared.items():
            setattr(chunk, name, value)
        for name, value in zip(_EACH, each, strict=True):
            setattr(chunk, name, value)
        for name, value in zip(_BUFFERS, mine, strict=True):
            setattr(chunk, name, value)
        chunk.extra_model_outputs = dict(zip(names, extra, strict=True))
        chunk.infos = buffer_like(packed.infos, [{} for _ in range(number)], packed.infos["lookback"])
        chunk._custom_data = {}
        chunks.append(chunk)
    return chunks


def _pack(chunks: Sequence[SingleAgentEpisode]) -> Packed | None:
    """None where they are not alike: others have made them, or a callback has added to them."""
    if len(chunks) < 2 or any(type(chunk) is not SingleAgentEpisode for chunk in chunks):
        return None
    first = chunks[0]
    shared = {name: getattr(first, name) for name in _SHARED}
    names = first.extra_model_outputs.keys()
    infos = _attributes(first.infos) | {"lookback": first.infos.lookback}
    for chunk in chunks:
        if chunk._custom_data != {} or chunk.extra_model_outputs.keys() != names:
            return None
        for name, value in shared.items():
            if getattr(chunk, name) is not value:
                return None
        about = chunk.infos
        if type(about.data) is not list or not all(type(info) is dict and not info for info in about.data):
            return None
        if not _same(infos, _attributes(about) | {"lookback": about.lookback}):
            return None
    buffers = [_buffers([getattr(chunk, name) for chunk in chunks]) for name in _BUFFERS]
    outputs = [(name, _buffers([chunk.extra_model_outputs[name] for chunk in chunks])) for name in names]
    known = [one for one in buffers if one is not None]
    extra = [(name, one) for name, one in outputs if one is not None]
    if len(known) < len(buffers) or len(extra) < len(outputs):
        return None
    each = [tuple(getattr(chunk, name) for name in _EACH) for chunk in chunks]
    return Packed(shared, each, known, extra, infos, [len(chunk.infos.data) for chunk in chunks])


def _attributes(buffer: InfiniteLookbackBuffer) -> dict[str, Any]:
    return {name: value for name, value in vars(buffer).items() if name not in ("data", "lookback")}


def _same(mine: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether these are the very same values under the same names."""
    return mine.keys() == others.keys() and all(others[name] is value for name, value in mine.items())


def _buffers(all_: Sequence[Any]) -> Buffers | None:
    first = all_[0]
    if any(type(buffer) is not InfiniteLookbackBuffer for buffer in all_):
        return None
    attributes = _attributes(first)
    if not all(_same(attributes, _attributes(buffer)) for buffer in all_):
        return None
    if isinstance(first.data, np.ndarray):
        like, parts = None, [[buffer.data for buffer in all_]]
    else:
        try:
            for buffer in all_:
                tree.assert_same_structure(first.data, buffer.data)
        except (TypeError, ValueError):
            return None
        like = tree.map_structure(lambda _: None, first.data)
        parts = [list(column) for column in zip(*(tree.flatten(buffer.data) for buffer in all_), strict=True)]
    columns = [_columns(part) for part in parts]
    known = [column for column in columns if column is not None]
    if len(known) < len(columns) or not known:
        return None
    return Buffers(attributes, [buffer.lookback for buffer in all_], like, known)


def _columns(arrays: Sequence[Any]) -> Columns | None:
    first = arrays[0]
    for array in arrays:
        if type(array) is not np.ndarray or not array.ndim or array.dtype.hasobject:
            return None
    alike = (
        first.dtype.isnative
        and all(  # NumPy would join others to native ones
            array.dtype == first.dtype and array.shape[1:] == first.shape[1:] for array in arrays
        )
    )
    if not alike or sum(array.nbytes for array in arrays) > JOINED_BYTES * len(arrays):
        return Columns(arrays, ())
    cuts = [0]
    for array in arrays:
        cuts.append(cuts[-1] + len(array))
    return Columns(np.concatenate(arrays), cuts)
