"""Room for the steps of a round: what it wants of simulators, and what they may have ahead of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
from core_bench import Bench, claim, dropped, fragment, messages, training

from rllink_zmq.messages import ACK, OFFER, RETURNED, STATE

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


def publish(bench: Bench, module: str, version: int) -> None:
    bench.tick(1.0)
    bench.send("r1", STATE(bench.broker.run, version, 4, 0, zlib.crc32(b"data"), module), b"data")


def deliver(bench: Bench, name: str, number: int, steps: int, k: int) -> None:
    bench.send(name, fragment(name, number, steps=steps))
    bench.take("r1", k, claim(name, number))


def test_a_round_has_room_for_what_it_wants(resting: Bench) -> None:
    welcome = resting.simulator("s1")
    assert (welcome.steps_limit, welcome.fragment_steps, welcome.rounds) == (50, 50, True)
    deliver(resting, "s1", 1, 50, 1)
    assert limits(resting) == {"s1": (50 + 25, 25)}, "half of what the round still wants"


def test_a_full_round_leaves_each_a_single_step(resting: Bench) -> None:
    """All are told: who has not heard since the round began would go on sampling for it."""
    deliver(resting, "s1", 1, 50, 1)
    resting.tick(1.0)
    deliver(resting, "s1", 2, 50, 2)
    assert limits(resting) == {"s1": (101, 1), "s2": (1, 1)}
    resting.send("r1", RETURNED(2, []))
    assert limits(resting) == {"s1": (101, 1)}


def test_the_next_round_has_room_once_its_weights_are_to_be_had(resting: Bench) -> None:
    """Steps before that would be by the weights of the last one."""
    deliver(resting, "s1", 1, 50, 1)
    deliver(resting, "s2", 1, 50, 2)
    resting.tick(1.0)
    resting.send("r1", OFFER(resting.broker.run, 1, 17))
    assert resting.simulator("s3").steps_limit == 1
    resting.weights("r1", 1)
    assert limits(resting) == {"s1": (83, 33), "s2": (83, 33), "s3": (33, 33)}
    assert resting.simulator("s1").fresh


def test_what_a_round_could_not_use_is_wanted_anew(resting: Bench) -> None:
    deliver(resting, "s1", 1, 50, 1)
    deliver(resting, "s2", 1, 50, 2)
    resting.tick(1.0)
    resting.returned("r1", 2, dropped("s2", 1, "late"))
    assert resting.broker.round_steps == 50
    assert limits(resting) == {"s1": (75, 25), "s2": (75, 25)}
    assert resting.broker.taken_steps == 100


def test_what_a_lost_runner_took_is_wanted_anew(benches: Callable[..., Bench]) -> None:
    bench = training(benches(), **RESTING)
    bench.simulator("s1")
    deliver(bench, "s1", 1, 40, 1)
    assert bench.broker.round_steps == 40
    bench.unreachable("r1")
    bench.wait(60.0)
    assert bench.broker.ledger.dropped["handover_cut"][0] == 1
    assert bench.broker.round_steps == 0


def test_a_round_of_several_modules_waits_for_the_weights_of_all(benches: Callable[..., Bench]) -> None:
    bench = training(benches(), **RESTING)
    bench.simulator("s1")
    for module in ("a", "b"):
        bench.send("r1", OFFER(bench.broker.run, 1, 4, module))
    publish(bench, "a", 1)
    assert bench.simulator("s2").steps_limit == 1
    publish(bench, "b", 1)
    assert {limit for limit, _ in limits(bench).values()} == {50}


def test_of_an_earlier_round_nothing_is_wanted_anew(resting: Bench) -> None:
    deliver(resting, "s1", 1, 50, 1)
    resting.weights("r1", 1)
    deliver(resting, "s2", 1, 10, 2)
    resting.returned("r1", 2, dropped("s1", 1, "late"))
    assert resting.broker.round_steps == 10


def test_what_may_be_ahead_is_no_less_in_a_round(benches: Callable[..., Bench]) -> None:
    """PPO's default: a whole batch is sampled while the learner learns."""
    bench = training(benches(), **RESTING | {"steps_ahead": 100})
    welcome = bench.simulator("s1")
    assert (welcome.steps_limit, welcome.rounds, welcome.fresh) == (100, True, False)
    deliver(bench, "s1", 1, 100, 1)
    assert limits(bench) == {"s1": (200, 50)}
    bench.weights("r1", 1)
    assert limits(bench) == {}, "nothing has changed for them"


def test_without_rounds_room_is_what_may_be_ahead(benches: Callable[..., Bench]) -> None:
    bench = training(benches(), **RESTING | {"rounds": False, "steps_ahead": 10})
    welcome = bench.simulator("s1")
    assert (welcome.steps_limit, welcome.rounds) == (10, False)
    bench.tick(1.0)
    bench.weights("r1", 1)
    assert messages(bench.tick(1.0), ACK) == []
