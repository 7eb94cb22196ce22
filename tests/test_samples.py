"""What `sample()` returns comes out of its pickle as it went in."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import tree
from ray import cloudpickle
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from test_episodes import ACT, OBS, lease

from rllink_zmq.rllib import samples
from rllink_zmq.rllib.blank import Blank
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.samples import Samples


def fragments() -> Samples:
    """As a runner makes them: of several lengths, at the beginning of an episode and in it, ended or not."""
    builder = EpisodeBuilder(OBS, ACT, None)
    parts = [(b"a", 3, 0, "no"), (b"b", 1, 7, "terminated"), (b"c", 5, 2, "truncated"), (b"a", 2, 3, "no")]
    leases = [lease(steps, t0, end, session=name * 16) for name, steps, t0, end in parts]
    return Samples(chunk.episode for chunk in builder.build(leases)[0])


def nested() -> Samples:
    """Of several parts, with rows that came before, and a recurrent policy's memory."""
    space = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (2,)), b=gym.spaces.Tuple([gym.spaces.Discrete(3)] * 2))
    blank, made = Blank(space, ACT), Samples()
    for i, (steps, back) in enumerate([(2, 0), (4, 3), (1, 3)]):
        rows = np.arange(back + steps + 1, dtype=np.float32) + i
        chunk = blank.copy(
            f"e{i}", back, steps, "no", back=back, actions={"x": np.arange(steps), "y": (np.ones((steps, 2)),)},
            observations={"a": np.stack([rows, rows], 1), "b": (rows.astype(np.int64), rows.astype(np.int32))},
            rewards=np.arange(steps, dtype=np.float32), outputs={},
        )  # fmt: skip
        memory = InfiniteLookbackBuffer(data={"h": rows[back:], "c": rows[back:] + 1})
        memory.lookback = 1
        chunk.extra_model_outputs["state_out"] = memory
        made.append(chunk)
    return made


def large() -> Samples:
    blank = Blank(gym.spaces.Box(0, 255, (84, 84), np.uint8), ACT)
    return Samples(
        blank.copy(
            f"e{i}", 0, 9, "no", observations=np.full((10, 84, 84), i, np.uint8), back=0, actions=np.arange(9),
            rewards=np.ones(9, np.float32), outputs={},
        )
        for i in range(3)
    )  # fmt: skip


def contents(value: Any) -> Any:
    """All there is in an episode, as something that can be compared."""
    if isinstance(value, SingleAgentEpisode):
        return {name: contents(getattr(value, name)) for name in SingleAgentEpisode.__slots__}
    if isinstance(value, InfiniteLookbackBuffer):
        return contents(vars(value))
    if isinstance(value, dict):
        return {name: contents(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [contents(each) for each in value]
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value


def travelled(chunks: Any) -> tuple[Any, int]:
    """The other end's, and how many buffers went beside the pickle, as Ray sends them."""
    buffers: list[Any] = []
    sent = cloudpickle.dumps(chunks, protocol=5, buffer_callback=buffers.append)
    return cloudpickle.loads(sent, buffers=[bytes(b.raw()) for b in buffers]), len(buffers)


@pytest.mark.parametrize("make", [fragments, nested, large])
def test_it_is_the_list_that_it_was(make: Callable[[], Samples]) -> None:
    chunks = make()
    assert samples._pack(chunks) is not None
    there, _ = travelled(chunks)
    plain, _ = travelled(list(chunks))
    assert type(there) is list and len(there) == len(chunks) > 1
    for here, came, usual in zip(chunks, there, plain, strict=True):
        assert contents(came) == contents(here) == contents(usual)
        came.validate()


def test_many_chunks_are_a_few_buffers_and_large_ones_are_not_copied() -> None:
    few, many = fragments(), Samples(fragments() * 50)
    assert travelled(many)[1] == travelled(few)[1] < travelled(list(few))[1]
    chunks = large()
    packed = samples._pack(chunks)
    assert packed is not None
    (observations,) = packed.buffers[0].columns
    assert all(a is chunk.observations.data for a, chunk in zip(observations.arrays, chunks, strict=True))


def _longer_info(chunks: Samples) -> None:
    chunks[1].infos.data[0] = {"won": True}


def _custom_data(chunks: Samples) -> None:
    chunks[2].custom_data["mine"] = 1


def _another_column(chunks: Samples) -> None:
    chunks[0].extra_model_outputs["value"] = InfiniteLookbackBuffer(data=np.ones(3))


def _another_space(chunks: Samples) -> None:
    chunks[1] = EpisodeBuilder(gym.spaces.Box(-9.0, 9.0, (4,), np.float32), ACT, None).build([lease()])[0][0].episode


def _another_structure(chunks: Samples) -> None:
    chunks[1].actions.data = {"x": chunks[1].actions.data}


def _lists(chunks: Samples) -> None:
    chunks[1].rewards = InfiniteLookbackBuffer(data=[1.0], lookback=0)


def _an_array_of_infos(chunks: Samples) -> None:
    chunks[1].infos.data = [np.zeros(2), {}]


def _no_info(chunks: Samples) -> None:
    chunks[1].infos.data = [None, None]


def _a_mark_on_a_buffer(chunks: Samples) -> None:
    chunks[1].rewards.mine = 1


def _none(chunks: Samples) -> None:
    del chunks[:]


@pytest.mark.parametrize(
    "change",
    [
        _longer_info, _custom_data, _another_column, _another_space, _another_structure, _lists, _an_array_of_infos,
        _no_info, _a_mark_on_a_buffer, _none,
    ],
)  # fmt: skip
def test_what_is_not_alike_travels_as_ever(change: Callable[[Samples], None]) -> None:
    chunks = fragments()
    change(chunks)
    assert samples._pack(chunks) is None
    there, _ = travelled(chunks)
    plain, _ = travelled(list(chunks))
    assert type(there) is list and contents(there) == contents(plain)


def test_a_callback_may_edit_arrays_and_rows_of_other_lengths_stay_apart() -> None:
    chunks = nested()
    for chunk in chunks:
        chunk.rewards.data = chunk.rewards.data * 2
    chunks[0].observations.data = tree.map_structure(lambda a: a.astype(np.float64), chunks[0].observations.data)
    packed = samples._pack(chunks)
    assert packed is not None and isinstance(packed.buffers[0].columns[0].arrays, list)
    assert contents(travelled(chunks)[0]) == contents(list(chunks))


def test_its_copies_are_those_of_a_list() -> None:
    chunks = fragments()
    same, other = copy.copy(chunks), copy.deepcopy(chunks)
    assert type(same) is type(other) is Samples
    assert all(a is b for a, b in zip(same, chunks, strict=True))
    assert contents(list(other)) == contents(list(chunks)) and not any(
        np.shares_memory(a.rewards.data, b.rewards.data) for a, b in zip(other, chunks, strict=True)
    )


def test_bytes_keep_their_order() -> None:
    chunks = fragments()
    for chunk in chunks:
        chunk.rewards.data = chunk.rewards.data.astype(">f4")
    assert contents(travelled(chunks)[0]) == contents(list(chunks))
