"""Room for the steps of a round: what it wants of simulators, and what they may have ahead of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from core_bench import Bench, claim, dropped, fragment, messages, training

from rllink_zmq.messages import ACK, OFFER, RETURNED

RESTING = {"rounds": True, "quota": 100, "steps_ahead": 1}


def limits(bench: Bench) -> dict[str, tuple[int, int]]:
    """Steps limit and fragment length that each simulator is told once its ACK is due."""
    said = bench.tick(bench.broker.settings.ack_interval)
    return {name: (m.steps_limit, m.fragment_steps) for name, m in said if isinstance(m, ACK)}


@pytest.fixture
def resting(benches: Callable[..., Bench]) -> Bench:
    """Two simulators may have next to nothing ahead of a round of 100 steps."""
    bench = training(benches(), **RESTING)
    bench.simulator("s1")
    bench.simulator("s2")
    bench.tick(1.0)
    return bench


def deliver(bench: Bench, name: str, number: int, steps: int, k: int) -> None:
    bench.send(name, fragment(name, number, steps=steps))
    bench.take("r1", k, claim(name, number))


def test_a_round_has_room_for_what_it_wants(resting: Bench) -> None:
    welcome = resting.simulator("s1")
    assert (welcome.steps_limit, welcome.fragment_steps, welcome.rounds) == (50, 25, True)
    deliver(resting, "s1", 1, 50, 1)
    assert limits(resting) == {"s1": (50 + 25, 12)}, "half of what the round still wants"


def test_a_full_round_leaves_each_a_single_step(resting: Bench) -> None:
    deliver(resting, "s1", 1, 50, 1)
    deliver(resting, "s2", 1, 50, 2)
    assert limits(resting) == {"s1": (51, 1), "s2": (51, 1)}
    resting.send("r1", RETURNED(2, []))
    assert limits(resting) == {"s1": (51, 1), "s2": (51, 1)}


def test_the_next_round_has_room_once_its_weights_are_to_be_had(resting: Bench) -> None:
    """Steps before that would be by the weights of the last one."""
    deliver(resting, "s1", 1, 50, 1)
    deliver(resting, "s2", 1, 50, 2)
    resting.tick(1.0)
    resting.send("r1", OFFER(resting.broker.run, 1, 17))
    assert resting.simulator("s3").steps_limit == 1
    resting.weights("r1", 1)
    assert limits(resting) == {"s1": (83, 16), "s2": (83, 16), "s3": (33, 16)}


def test_what_a_round_could_not_use_is_wanted_anew(resting: Bench) -> None:
    deliver(resting, "s1", 1, 50, 1)
    deliver(resting, "s2", 1, 50, 2)
    resting.tick(1.0)
    resting.returned("r1", 2, dropped("s2", 1, "late"))
    assert resting.broker.round_steps == 50
    assert limits(resting)["s2"] == (75, 12)


def test_of_an_earlier_round_nothing_is_wanted_anew(resting: Bench) -> None:
    deliver(resting, "s1", 1, 50, 1)
    resting.weights("r1", 1)
    deliver(resting, "s2", 1, 10, 2)
    resting.returned("r1", 2, dropped("s1", 1, "late"))
    assert resting.broker.round_steps == 10


def test_what_may_be_ahead_is_no_less_in_a_round(benches: Callable[..., Bench]) -> None:
    """PPO's default: a whole batch is sampled while the learner learns."""
    bench = training(benches(), **RESTING | {"steps_ahead": 100})
    assert bench.simulator("s1").steps_limit == 100
    deliver(bench, "s1", 1, 100, 1)
    assert limits(bench) == {"s1": (200, 50)}


def test_without_rounds_room_is_what_may_be_ahead(benches: Callable[..., Bench]) -> None:
    bench = training(benches(), **RESTING | {"rounds": False, "steps_ahead": 10})
    welcome = bench.simulator("s1")
    assert (welcome.steps_limit, welcome.rounds) == (10, False)
    bench.tick(1.0)
    bench.weights("r1", 1)
    assert messages(bench.tick(1.0), ACK) == []
