"""`rllink_zmq.compression`: what is unpacked, within which bounds, and what becomes of what isn't what it says."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from backports import zstd
from fake_training import broker, training, until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy import discrete_blob

from rllink_zmq import compression, connect, wire
from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.compression import arrays_of, compress, decompress
from rllink_zmq.errors import ProtocolError, SettingsError
from rllink_zmq.messages import FRAGMENT, MAX_BODY_BYTES, MAX_FRAME_BYTES, Column
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.session_runner import Lease

IMAGES = gym.spaces.Box(0, 255, (20, 20, 1), np.uint8)
ACTIONS = gym.spaces.Discrete(2)
COLUMNS = {
    "obs": np.repeat(np.arange(6, dtype=np.uint8), 400).reshape(6, 20, 20, 1),
    "actions": np.array([0, 1, 0, 1, 1]),
    "rewards": np.arange(5, dtype=np.float32),
    "action_logp": np.full(5, -0.5, np.float32),
    "action_dist_inputs": np.zeros((5, 2), np.float32),
}
SIZE = sum(array.nbytes for array in COLUMNS.values())
PLAIN = b"".join(to_buffers(COLUMNS)[1])


def lease(body: bytes, how: str = "zstd", number: int = 1) -> Lease:
    columns, _ = to_buffers(COLUMNS)
    header = FRAGMENT(b"s" * 16, number, 1, f"e{number}", 0, 5, "no", "r", 1, 0.0, columns, compression=how)
    return Lease(header, [body])


def refused(body: bytes, size: int = SIZE) -> str:
    with pytest.raises(ProtocolError) as raised:
        decompress([body], size)
    assert raised.value.code == "malformed"
    return str(raised.value)


def with_size(frame: bytes, size: int) -> bytes:
    """A zstd frame of 256 bytes or more that says it holds `size` (RFC 8878, 3.1.1.1)."""
    flag, single = frame[4] >> 6, frame[4] >> 5 & 1
    assert flag in (1, 2)
    at, length = 5 + (not single), 2 if flag == 1 else 4
    return frame[:at] + (size - 256 * (flag == 1)).to_bytes(length, "little") + frame[at + length :]


# ---- what fits


@pytest.mark.parametrize("frames", [1, 3], ids=["one frame", "in pieces"])
def test_columns_come_back_as_they_were(frames: int) -> None:
    packed = compress(to_buffers(COLUMNS)[1])
    assert packed is not None and len(packed) < SIZE / 10
    cuts = np.linspace(0, len(packed), frames + 1).astype(int)
    found = arrays_of(lease(b"").message, [packed[a:b] for a, b in pairwise(cuts)])
    assert list(found) == list(COLUMNS)
    for name, array in COLUMNS.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_frame_says_what_it_holds() -> None:
    packed = compress([PLAIN, PLAIN])
    assert packed is not None
    assert zstd.get_frame_info(packed).decompressed_size == 2 * SIZE


def test_what_does_not_become_smaller_is_left_as_it_is() -> None:
    assert compress([np.random.default_rng(1).bytes(10_000)]) is None
    assert compress([b"\x07\x09\x01"]) is None


# ---- what doesn't


def test_sizes_are_compared_before_anything_is_unpacked() -> None:
    packed = zstd.compress(PLAIN)
    assert f"claim {SIZE + 1} bytes, its body's zstd frame says {SIZE}" in refused(packed, SIZE + 1)
    assert f"frame says {SIZE}" in refused(packed, SIZE - 1)
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.content_size_flag: 0})
    assert "frame says None" in refused(compressor.compress(PLAIN, compressor.FLUSH_FRAME))


def test_a_frame_is_not_believed() -> None:
    """100 MB that say they are a kilobyte take the memory of a kilobyte, not of 100 MB."""
    bomb = with_size(zstd.compress(bytes(100_000_000)), 1000)
    assert len(bomb) < 20_000
    tracemalloc.start()
    try:
        refused(bomb, 1000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.collect()
    assert peak < 1_000_000


def test_damage_is_told() -> None:
    packed = zstd.compress(PLAIN)
    assert "no zstd frame" in refused(b"") and "no zstd frame" in refused(PLAIN)
    assert "more or less than one zstd frame" in refused(packed[:-5])
    assert "more or less than one zstd frame" in refused(packed + b"!")
    assert "more or less than one zstd frame" in refused(packed + packed)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bytes_are_the_columns_or_malformed(data: st.DataObject) -> None:
    packed = bytearray(zstd.compress(PLAIN))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert len(decompress([bytes(packed)], SIZE)) == SIZE
    except ProtocolError as e:
        assert e.code == "malformed"


def test_one_that_can_not_be_unpacked_spoils_no_other() -> None:
    packed = compress([PLAIN])
    assert packed is not None
    builder = EpisodeBuilder(IMAGES, ACTIONS, None)
    built, told = builder.build(
        [lease(packed), lease(packed[:-3], number=2), lease(packed, "brotli", 3), lease(PLAIN, "", 4)]
    )
    assert [len(each.episode) for each in built] == [5, 5]
    assert [refusal.message.number for refusal in told] == [2, 3]
    assert "compressed with 'brotli', known is 'zstd'" in str(told[1].error)


def test_a_runner_without_zstd_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError

    packed = compress([PLAIN])
    assert packed is not None
    monkeypatch.setattr(compression, "_zstd", missing)
    assert r"pip install 'rllink-zmq[train]'" in refused(packed)


def test_the_wire_checks_what_a_compressed_body_claims() -> None:
    small = lease(b"").message
    assert wire.check_body(small, [b"1234"]) == 4
    huge = Column("obs", "|u1", (6, MAX_BODY_BYTES // 8))
    for columns, code in (((huge, huge), "too_large"), ((Column("obs", "|u1", (5, 4)),), "malformed")):
        with pytest.raises(ProtocolError) as raised:
            wire.check_body(
                FRAGMENT(b"s" * 16, 1, 1, "e", 0, 5, "no", "r", 1, 0.0, columns, compression="zstd"), [b"1"]
            )
        assert raised.value.code == code


# ---- a simulator


def test_a_simulator_compresses_what_becomes_smaller() -> None:
    """Two episodes, one of images that say little and one of noise: both arrive; the window counts what travels."""
    rng = np.random.default_rng(2)
    made = {
        "flat": [np.full((200, 200, 16), i, np.uint8) for i in range(4)],
        "noise": list(rng.integers(0, 256, (4, 200, 200, 16), np.uint8)),
    }
    space = gym.spaces.Box(0, 255, (200, 200, 16), np.uint8)
    with (
        broker(fragment_bytes=8 << 20) as server,
        training(server, blob=discrete_blob(), observation_space=space) as fake,
        connect(server.frontend, observation_space=space, action_space=ACTIONS, compression="zstd") as client,
    ):
        fake.paused = True
        kept = {}
        for name, images in made.items():
            before = client.flow.session.unsettled_bytes
            with client.start_episode(name) as episode:
                for image in images[:-1]:
                    episode.log_action(image, 1, -0.5)
                    episode.log_returns(1.0)
                episode.end_episode(images[-1])
            kept[name] = client.flow.session.unsettled_bytes - before
        assert kept["flat"] < 10_000 < 4 * 200 * 200 * 16 < kept["noise"]
        until(lambda: client.flow.look() or server.core.held_bytes == sum(kept.values()), "the broker counts the same")
        fake.paused = False
        until(lambda: len(fake.taken) == 2, "both are taken")
        for header, arrays in fake.taken:
            assert header.compression == ("zstd" if header.episode == "flat" else "")
            np.testing.assert_array_equal(arrays["obs"], made[header.episode])
            np.testing.assert_array_equal(arrays["rewards"], np.ones(3))


def test_frames_of_a_message_stay_small() -> None:
    """A compressed body, too, is cut at 512 KB."""
    half = np.random.default_rng(3).integers(0, 16, 2_000_000, np.uint8)  # half of each byte is noise
    packed = compress([half.data])
    assert packed is not None and len(packed) > MAX_FRAME_BYTES
    header = FRAGMENT(
        b"s" * 16, 1, 1, "e", 0, 1, "no", "r", 1, 0.0, (Column("obs", "|u1", (2, 1_000_000)),), compression="zstd"
    )
    frames = wire.pack(header, [packed])
    assert max(map(len, frames)) <= MAX_FRAME_BYTES
    message, body = wire.unpack(frames)
    assert type(message) is FRAGMENT
    np.testing.assert_array_equal(arrays_of(message, body)["obs"], half.reshape(2, 1_000_000))
    with pytest.raises(ProtocolError, match="claim 2000000 bytes"):
        from_body(message.columns, body)


def test_a_simulator_without_zstd_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError

    compression._compressor.cache_clear()
    monkeypatch.setattr(compression, "_zstd", missing)
    with pytest.raises(SettingsError, match=r"backports.zstd.*pip install 'rllink-zmq\[zstd\]'"):
        connect("tcp://127.0.0.1:1", compression="zstd")
    with pytest.raises(SettingsError, match="expected compression 'zstd' or None, got 'gzip'"):
        connect("tcp://127.0.0.1:1", compression="gzip")  # type: ignore[arg-type]
