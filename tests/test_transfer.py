"""Transfers: pieces in any order, lost and repeated, end in the same bytes."""

from __future__ import annotations

import random

import pytest

from rllink_zmq.transfer import CHUNK_BYTES, OUTSTANDING, Download, chunk

DATA = random.Random(1).randbytes(3 * CHUNK_BYTES + 17)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(DATA)])
def test_pieces_add_up(size: int) -> None:
    data = DATA[:size]
    pieces = [chunk(data, at) for at in range(0, size, CHUNK_BYTES)]
    assert b"".join(pieces) == data
    assert all(len(p) <= CHUNK_BYTES for p in pieces)


@pytest.mark.parametrize("offset", [len(DATA), len(DATA) + 1, 1 << 52])
def test_past_the_end_there_is_nothing(offset: int) -> None:
    assert len(chunk(DATA, offset)) == 0


@pytest.mark.parametrize("size", [1, CHUNK_BYTES - 1, CHUNK_BYTES, 2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 1, len(DATA)])
def test_a_download(size: int) -> None:
    data = DATA[:size]
    download = Download(size, 0.0)
    asked = download.wants()
    most = len(asked)
    while asked:
        offset = asked.pop(0)
        assert download.add(offset, [chunk(data, offset)], 1.0)
        asked += download.wants()
        most = max(most, len(asked))
    assert download.done and bytes(download.data) == data
    assert most <= OUTSTANDING
    assert download.wants() == []


def test_nothing_is_done_at_once() -> None:
    assert Download(0, 0.0).done
    assert Download(0, 0.0).wants() == []


def test_each_piece_is_asked_for_once() -> None:
    download = Download(len(DATA), 0.0)
    assert download.wants() == [0, CHUNK_BYTES]
    assert download.wants() == []
    download.add(0, [chunk(DATA, 0)], 1.0)
    assert download.wants() == [2 * CHUNK_BYTES]


def test_repeats_holes_and_strangers_change_nothing() -> None:
    download = Download(len(DATA), 0.0)
    download.wants()
    assert not download.add(CHUNK_BYTES, [chunk(DATA, CHUNK_BYTES)], 1.0)
    assert download.add(0, [chunk(DATA, 0)], 2.0)
    assert not download.add(0, [chunk(DATA, 0)], 3.0)
    assert not download.add(1 << 50, [b"x"], 3.0)
    assert (len(download.data), download.moved) == (CHUNK_BYTES, 2.0)


def test_a_piece_past_the_end_is_refused() -> None:
    download = Download(10, 0.0)
    download.wants()
    assert not download.add(0, [b"x" * 6, b"x" * 5], 1.0)
    assert not download.data
    assert download.add(0, [b"x" * 6, b"x" * 4], 1.0)
    assert download.done


def test_it_goes_on_where_it_stopped() -> None:
    download = Download(len(DATA), 0.0)
    download.wants()
    download.add(0, [chunk(DATA, 0)], 1.0)
    download.wants()
    download.restart(9.0)
    assert download.moved == 9.0
    assert download.wants() == [CHUNK_BYTES, 2 * CHUNK_BYTES]


def test_pieces_lost_and_repeated_at_random() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        data = DATA[: rng.randrange(1, len(DATA))]
        download = Download(len(data), 0.0)
        on_the_way: list[int] = []
        for turn in range(10_000):
            on_the_way += download.wants()
            if download.done:
                break
            if not on_the_way:
                download.restart(float(turn))
                continue
            offset = on_the_way.pop(rng.randrange(len(on_the_way)))
            fate = rng.random()
            if fate < 0.2:
                continue
            if fate < 0.4:
                on_the_way.append(offset)
            download.add(offset, [chunk(data, offset)], float(turn))
        assert bytes(download.data) == data
