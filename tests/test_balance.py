"""Which runner gets the next fragment."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from broker.balance import choose


@dataclass(eq=False)
class Load:
    leased_steps: int = 0
    leased_bytes: int = 0
    assigned_steps: int = 0


def test_nobody_is_chosen_from_nobody() -> None:
    assert choose([], 1, 10) is None


def test_the_one_with_the_least_to_do_is_chosen() -> None:
    busy, idle = Load(leased_steps=20, leased_bytes=5), Load(leased_steps=10, leased_bytes=5, assigned_steps=999)
    assert choose([busy, idle], 1, 100) is idle


def test_between_equals_the_one_that_was_given_the_least() -> None:
    old, new = Load(assigned_steps=100), Load(assigned_steps=90)
    assert choose([old, new], 1, 100) is new
    assert choose([new, old], 1, 100) is new


def test_between_equals_in_everything_the_first() -> None:
    loads = [Load(), Load()]
    assert choose(loads, 1, 100) is loads[0]


@pytest.mark.parametrize(("leased", "has_room"), [(0, True), (89, True), (90, True), (91, False)])
def test_a_runner_has_room_while_its_leased_bytes_stay_within_the_limit(leased: int, has_room: bool) -> None:
    load = Load(leased_steps=1, leased_bytes=leased)
    assert choose([load], 10, 100) is (load if has_room else None)


@pytest.mark.parametrize(("leased", "most", "has_room"), [(8, 10, True), (9, 10, False), (9, 0, True)])
def test_and_while_its_leased_steps_do(leased: int, most: int, has_room: bool) -> None:
    load = Load(leased_steps=leased, leased_bytes=1)
    assert choose([load], 1, 100, steps=2, most_steps=most) is (load if has_room else None)


def test_an_idle_runner_has_room_for_one_fragment_of_any_size() -> None:
    load = Load()
    assert choose([load], 10_000, 100, steps=50, most_steps=10) is load


def test_the_episodes_runner_keeps_it() -> None:
    first, second = Load(), Load(leased_steps=1, leased_bytes=1)
    assert choose([first, second], 1, 100, preferred=second) is second


@pytest.mark.parametrize(("mine", "least", "stays"), [(1, 0, True), (2, 0, False), (21, 10, True), (22, 10, False)])
def test_it_keeps_it_up_to_twice_the_least_to_do(mine: int, least: int, stays: bool) -> None:
    other, preferred = Load(leased_steps=least), Load(leased_steps=mine)
    assert choose([other, preferred], 1, 100, preferred=preferred) is (preferred if stays else other)


def test_a_full_runner_does_not_keep_it() -> None:
    other, preferred = Load(leased_steps=50, leased_bytes=1), Load(leased_steps=1, leased_bytes=100)
    assert choose([other, preferred], 1, 100, preferred=preferred) is other


def test_when_all_are_full_the_preferred_one_is_full_too() -> None:
    other, preferred = Load(leased_bytes=100), Load(leased_bytes=100)
    assert choose([other, preferred], 1, 100, preferred=preferred) is None


def test_equal_fragments_spread_evenly() -> None:
    loads = [Load() for _ in range(4)]
    for _ in range(400):
        chosen = choose(loads, 10, 10_000)
        assert chosen is not None
        chosen.leased_steps += 5
        chosen.leased_bytes += 10
        chosen.assigned_steps += 5
    assert [load.assigned_steps for load in loads] == [500] * 4
