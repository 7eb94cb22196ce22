"""The broker's core: what is evaluated goes its own way. These events, exactly these actions; invariants at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from core_bench import NEXT_RUN, RUN, SPACES, Bench, claim, dropped, fragment, leases, messages, session, training

from rllink_zmq.messages import (
    ACK,
    EVALUATE,
    FRAGMENT,
    MANY,
    PING,
    PONG,
    REFUSED,
    TAKEN,
    Handed,
    RunnerHello,
    SimulatorHello,
)


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    """A trainer "t", a runner "r1", an evaluation runner "v1", weights 0 and 1, and simulators "s1" and "s2"."""
    bench = training(benches())
    bench.weights("r1", 1)
    bench.simulator("s1")
    bench.simulator("s2")
    bench.runner("v1", evaluation=True)
    bench.tick(0.05)
    return bench


def piece(name: str, number: int, episode: str = "e1", t0: int = 0, end: str = "no", **more: Any) -> FRAGMENT:
    fields: dict[str, Any] = {"version": 1, "steps": 1 if not t0 else 10, "evaluation": True} | more
    return fragment(name, number, episode=episode, t0=t0, end=end, **fields)


def told(bench: Bench) -> dict[str, tuple[int, bool]]:
    """What simulators are told of evaluations, once their ACKs are due."""
    said = bench.tick(bench.broker.settings.ack_interval)
    return {name: (m.evaluation, m.evaluates) for name, m in said if isinstance(m, ACK)}


def evaluated(bench: Bench) -> dict[str, int]:
    """Fragments in the evaluations' ledger that are not 0."""
    ledger = bench.broker.evaluation_ledger
    counts = {"received": ledger.received[0], "delivered": ledger.delivered[0], "in_flight": ledger.in_flight[0]}
    return {k: v for k, v in (counts | {r: n[0] for r, n in ledger.dropped.items()}).items() if v}


# ---- the two pools


def test_what_is_evaluated_goes_to_who_evaluates_and_training_to_who_trains(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 4))
    assert leases(bench.send("s1", piece("s1", 1))) == [("v1", "s1", 1)]
    assert leases(bench.send("s2", fragment("s2", 1, version=1))) == [("r1", "s2", 1)]
    assert bench.ledger() == {"received": 1, "delivered": 0, "in_flight": 1}
    assert evaluated(bench) == {"received": 1, "in_flight": 1}


def test_without_a_runner_that_trains_nothing_goes_to_who_evaluates(bench: Bench) -> None:
    bench.bye("r1")
    bench.send("v1", EVALUATE(1, 4))
    assert leases(bench.send("s1", fragment("s1", 1, version=1))) == []
    assert bench.broker.waiting_for() == ["a runner"]


def test_who_evaluates_counts_among_the_runners_nowhere(bench: Bench) -> None:
    bench.send("s1", fragment("s1", 1, version=1))
    (taken,) = messages(bench.take("r1", 1, claim("s1", 1)), TAKEN)
    assert taken.runners == 1
    (pong,) = messages(bench.send("t", PING()), PONG)
    assert [p.name for p in pong.roster] == ["r1"] and pong.runners == 1
    pools = {r["name"]: r["pool"] for r in bench.broker.status(bench.now)["runners"]}
    assert pools == {"r1": "training", "v1": "evaluation"}


def test_what_is_evaluated_counts_for_nothing_of_training(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 4))
    bench.send("s1", piece("s1", 1))
    sim = bench.broker.simulators[session("s1")]
    before = (bench.broker.steps_granted(sim), bench.broker.round_steps, bench.broker.taken_steps)
    (taken,) = messages(bench.take("v1", 1, claim("s1", 1)), TAKEN)
    assert taken.refused == [] and (taken.round_steps, taken.taken_steps) == (0, 0)
    bench.returned("v1", 1)
    assert bench.acks() == {"s1": [(1, "evaluated")]}
    assert (bench.broker.steps_granted(sim), bench.broker.round_steps, bench.broker.taken_steps) == before
    assert bench.ledger() == {"received": 0, "delivered": 0, "in_flight": 0}
    assert evaluated(bench) == {"received": 1, "delivered": 1}


def test_training_s_lag_limit_is_none_of_an_evaluation(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 4))
    bench.send("s1", piece("s1", 1))
    for version in (2, 3, 4):
        bench.weights("r1", version)
    (taken,) = messages(bench.take("v1", 1, claim("s1", 1)), TAKEN)
    assert taken.refused == []


def test_only_evaluation_runners_evaluate(bench: Bench) -> None:
    for name in ("r1", "t", "s1"):
        (refused,) = messages(bench.send(name, EVALUATE(1, 4)), REFUSED)
        assert refused.code == "unexpected" and "evaluation runners" in refused.text


# ---- places


def test_what_nobody_asked_for_is_unwanted_at_once(bench: Bench) -> None:
    assert leases(bench.send("s1", piece("s1", 1, end="terminated"))) == []
    assert bench.acks() == {"s1": [(1, "unwanted")]}
    assert evaluated(bench) == {"received": 1, "unwanted": 1}


def test_simulators_are_told_while_there_are_places(bench: Bench) -> None:
    told(bench)
    bench.send("v1", EVALUATE(1, 2))
    assert told(bench) == {"s1": (1, False), "s2": (1, False)}
    assert bench.simulator("s3").evaluation == 1
    bench.send("s1", piece("s1", 1))
    bench.send("s2", piece("s2", 1))
    assert {evaluation for evaluation, _ in told(bench).values()} == {-1}
    assert bench.simulator("s4").evaluation == -1


def test_so_many_episodes_count_as_were_wanted_and_each_whole(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 1))
    bench.send("s1", piece("s1", 1))
    assert leases(bench.send("s2", piece("s2", 1, end="terminated"))) == [], "it began later, and ends first"
    assert leases(bench.send("s1", piece("s1", 2, t0=1))) == [("v1", "s1", 2)]
    assert leases(bench.send("s1", piece("s1", 3, t0=11, end="terminated"))) == [("v1", "s1", 3)]
    assert leases(bench.send("s1", piece("s1", 4, "e2"))) == []
    assert bench.acks() == {"s1": [(4, "unwanted")], "s2": [(1, "unwanted")]}


def test_an_episode_that_begins_with_older_weights_does_not_count(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 1))
    assert leases(bench.send("s1", piece("s1", 1, version=0))) == []
    assert leases(bench.send("s1", piece("s1", 2, t0=1))) == [], "nor later"
    assert leases(bench.send("s2", piece("s2", 1, version=7))) == [("v1", "s2", 1)]


def test_an_episode_that_began_before_the_evaluation_does_not_count(bench: Bench) -> None:
    bench.send("s1", piece("s1", 1))
    bench.send("v1", EVALUATE(1, 1))
    assert leases(bench.send("s1", piece("s1", 2, t0=1, end="terminated"))) == []


@pytest.mark.parametrize("how", ["lost", "bye", "another episode", "training", "too large"])
def test_a_place_is_free_again_when_its_episode_will_not_end(bench: Bench, how: str) -> None:
    bench.send("v1", EVALUATE(1, 1))
    bench.send("s1", piece("s1", 1))
    assert leases(bench.send("s2", piece("s2", 1))) == []
    number = 2
    if how == "lost":
        bench.unreachable("s1")
        bench.hello("s1/2", SimulatorHello(spaces=SPACES))
    elif how == "bye":
        bench.bye("s1")
    elif how == "another episode":
        bench.send("s1", piece("s1", number, "e2", version=0))
        number = 3
    elif how == "training":
        bench.send("s1", fragment("s1", number, episode="e2", version=1))
        number = 3
    else:
        size = bench.broker.settings.fragment_bytes + 1
        bench.send("s1", piece("s1", number, t0=1, steps=size - 1), bytes(size))
        number = 3
    assert bench.broker.evaluation_version == 1
    assert leases(bench.send("s2", piece("s2", 2, "e2"))) == [("v1", "s2", 2)]
    if how != "bye":
        assert leases(bench.send("s1/2" if how == "lost" else "s1", piece("s1", number, t0=1))) == []


def test_one_with_several_episodes_has_as_many_places(bench: Bench) -> None:
    bench.simulator("s3", episodes=2)
    bench.send("v1", EVALUATE(1, 5))
    for number, episode in enumerate(("a", "b", "c"), 1):
        assert leases(bench.send("s3", piece("s3", number, episode))) == [("v1", "s3", number)]
    bench.send("s3", fragment("s3", 4, episode="d", version=1))
    assert leases(bench.send("s3", piece("s3", 5, "c", t0=1))) == [("v1", "s3", 5)]
    assert leases(bench.send("s3", piece("s3", 6, "a", t0=1))) == [], "it has no more than two at once"
    assert bench.broker.status(bench.now)["evaluation"]["episodes_wanted"] == 3


def test_two_evaluations_share_the_episodes_and_each_has_whole_ones(bench: Bench) -> None:
    bench.runner("v2", evaluation=True)
    bench.send("v1", EVALUATE(1, 1))
    bench.send("v2", EVALUATE(1, 2))
    assert leases(bench.send("s1", piece("s1", 1))) == [("v2", "s1", 1)]
    second = leases(bench.send("s2", piece("s2", 1)))
    for number in range(2, 5):
        assert leases(bench.send("s1", piece("s1", number, t0=number))) == [("v2", "s1", number)]
    bench.simulator("s3")
    third = leases(bench.send("s3", piece("s3", 1)))
    assert sorted(to for to, _, _ in second + third) == ["v1", "v2"]


# ---- ends


def test_the_end_of_an_evaluation_settles_what_it_has_not_taken(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 4))
    bench.send("s1", piece("s1", 1))
    bench.take("v1", 1, claim("s1", 1))
    bench.send("s1", piece("s1", 2, t0=1))
    bench.send("v1", EVALUATE(1, 0))
    assert bench.acks() == {"s1": [(2, "unwanted")]}
    assert leases(bench.send("s1", piece("s1", 3, t0=11))) == []
    (taken,) = messages(bench.take("v1", 2, claim("s1", 2)), TAKEN)
    assert taken.refused == [claim("s1", 2)]
    bench.returned("v1", 1)
    assert bench.acks() == {"s1": [(3, "unwanted"), (1, "evaluated")]}


def test_the_next_evaluation_has_nothing_of_the_last(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 4))
    bench.send("s1", piece("s1", 1))
    bench.send("v1", EVALUATE(2, 4))
    assert leases(bench.send("s1", piece("s1", 2, t0=1, version=2))) == []
    assert leases(bench.send("s1", piece("s1", 3, "e2", version=2))) == [("v1", "s1", 3)]


@pytest.mark.parametrize("how", ["lost", "bye", "silent"])
def test_a_runner_that_goes_leaves_nothing_behind(bench: Bench, how: str) -> None:
    bench.send("v1", EVALUATE(1, 4))
    bench.send("s1", piece("s1", 1))
    bench.take("v1", 1, claim("s1", 1))
    bench.send("s1", piece("s1", 2, t0=1))
    if how == "lost":
        bench.unreachable("v1")
    elif how == "bye":
        bench.bye("v1")
    else:
        for _ in range(20):
            bench.tick(1.0)
            for name in ("t", "r1", "s1", "s2"):
                bench.send(name, PING())
    assert bench.broker.evaluation_version == -1
    assert leases(bench.send("s1", piece("s1", 3, t0=11))) == []
    for _ in range(12):
        bench.tick(1.0)
        for name in ("t", "r1", "s1", "s2"):
            bench.send(name, PING())
    assert evaluated(bench) == {"received": 3, "unwanted": 2, "handover_cut": 1}


def test_a_runner_that_comes_back_says_anew_what_it_wants(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 4))
    bench.send("s1", piece("s1", 1))
    bench.take("v1", 1, claim("s1", 1))
    bench.hello("v1/2", RunnerHello(RUN, committed=0, evaluation=True))  # TAKEN 1 never reached it
    assert bench.acks() == {"s1": [(1, "unwanted")]}
    assert leases(bench.send("s1", piece("s1", 2, t0=1))) == []
    bench.send("v1/2", EVALUATE(1, 4))
    assert leases(bench.send("s1", piece("s1", 3, "e2"))) == [("v1/2", "s1", 3)]


def test_a_restarted_broker_hears_from_runners_what_was_evaluated(benches: Callable[..., Bench]) -> None:
    bench = benches()
    bench.trainer(runners=1)
    bench.hello("v1", RunnerHello(RUN, 1, 1, [Handed(session("s1"), [1], [1])], evaluation=True))
    bench.runner("r1")
    bench.simulator("s1")
    bench.send("s1", piece("s1", 1))
    bench.send("s1", piece("s1", 2, t0=1))
    assert bench.acks() == {"s1": [(1, "evaluated"), (2, "unwanted")]}
    assert bench.ledger() == {"received": 0, "delivered": 0, "in_flight": 0}


def test_a_new_run_ends_the_evaluations_of_the_old_one(bench: Bench) -> None:
    bench.send("v1", EVALUATE(1, 4))
    bench.send("s1", piece("s1", 1))
    said = bench.hello("t", bench.broker.trainer.hello.__class__(**{  # type: ignore[union-attr]
        f: getattr(bench.broker.trainer.hello, f) for f in bench.broker.trainer.hello.__struct_fields__  # type: ignore[union-attr]
    } | {"run": NEXT_RUN}))  # fmt: skip
    assert [m.code for m in messages(said, REFUSED, "v1")] == ["old_run"]
    assert bench.broker.evaluation_version == -1
    bench.runner("v2", NEXT_RUN, evaluation=True)
    bench.send("v2", EVALUATE(0, 1))
    assert leases(bench.send("s1", piece("s1", 2, "e2"))) == []
    assert evaluated(bench) == {"received": 2, "unwanted": 1, "old_run": 1}


def test_an_evaluation_that_was_asked_for_before_its_trainer_came_is_told_then(benches: Callable[..., Bench]) -> None:
    bench = benches()
    bench.simulator("s1")
    bench.runner("v1", evaluation=True)
    bench.send("v1", EVALUATE(0, 1))
    assert told(bench).get("s1", (-1, False)) == (-1, False)
    bench.trainer()
    assert told(bench)["s1"] == (0, False)


# ---- a share of the simulators


def shared(benches: Callable[..., Bench], share: float, simulators: int, **fields: Any) -> Bench:
    bench = training(benches(), evaluation_share=share, **fields)
    for i in range(simulators):
        bench.simulator(f"s{i + 1}")
    bench.runner("v1", evaluation=True)
    bench.tick(0.05)
    return bench


@pytest.mark.parametrize(
    ("share", "places", "expected"),
    [(0.0, 9, []), (0.01, 9, ["s1"]), (0.5, 9, ["s1", "s2"]), (0.51, 9, ["s1", "s2", "s3"]), (1.0, 2, ["s1", "s2"])],
)
def test_a_share_is_asked_to_serve(
    benches: Callable[..., Bench], share: float, places: int, expected: list[str]
) -> None:
    bench = shared(benches, share, 4)
    bench.send("v1", EVALUATE(0, places))
    assert [name for name, (_, evaluates) in sorted(told(bench).items()) if evaluates] == expected
    bench.send("v1", EVALUATE(0, 0))
    assert not any(evaluates for _, evaluates in told(bench).values())


def test_those_that_are_free_are_asked_first(benches: Callable[..., Bench]) -> None:
    bench = shared(benches, 1.0, 2)
    bench.send("v1", EVALUATE(0, 2))
    told(bench)
    bench.send("s1", piece("s1", 1, version=0))
    assert told(bench) == {"s1": (0, False)}, "one place is left, and s2 is free"


def test_who_comes_meanwhile_may_be_asked_too(benches: Callable[..., Bench]) -> None:
    bench = shared(benches, 1.0, 0)
    bench.send("v1", EVALUATE(0, 2))
    assert bench.simulator("s1").evaluates is False
    bench.tick(1.1)
    assert told(bench) == {"s1": (0, True)}


def test_a_simulator_is_left_to_a_training_that_an_evaluation_goes_on_with(benches: Callable[..., Bench]) -> None:
    bench = shared(benches, 1.0, 2)
    bench.send("v1", EVALUATE(0, MANY + 1))
    assert told(bench) == {"s1": (0, True), "s2": (0, False)}
    bench.bye("s1")
    bench.tick(1.1)
    assert not bench.broker.sharers, "the only one trains"
    bench.send("v1", EVALUATE(0, MANY))
    assert told(bench) == {"s2": (0, True)}, "this one has an end"


def pass_time(bench: Bench, seconds: int, simulators: int) -> list[str]:
    """Who is asked to serve then."""
    for _ in range(seconds):
        for name in ("t", "r1", "v1", *(f"s{i + 1}" for i in range(simulators))):
            bench.send(name, PING())
        bench.tick(1.01)
    return sorted(sim.name for sim in bench.broker.sharers)


def test_others_are_asked_as_well_when_one_does_not_serve(benches: Callable[..., Bench]) -> None:
    bench = shared(benches, 0.25, 4)
    bench.send("v1", EVALUATE(0, 3))
    assert pass_time(bench, 4, 4) == ["s1"]
    assert pass_time(bench, 3, 4) == ["s1", "s2"]
    bench.send("s2", piece("s2", 1, version=0))
    assert pass_time(bench, 10, 4) == ["s1", "s2"], "an episode takes as long as it takes"
    bench.send("s1", piece("s1", 1, version=0))
    assert pass_time(bench, 1, 4) == ["s1"], "it serves after all"
    bench.send("s1", piece("s1", 2, t0=1, end="terminated", version=0))
    assert pass_time(bench, 4, 4) == ["s1"], "the next one has its time"


def test_one_that_does_not_serve_is_not_one_of_the_places(benches: Callable[..., Bench]) -> None:
    bench = shared(benches, 1.0, 3)
    bench.send("v1", EVALUATE(0, 1))
    assert pass_time(bench, 1, 3) == ["s1"]
    assert pass_time(bench, 6, 3) == ["s1", "s2"]
    assert pass_time(bench, 6, 3) == ["s1", "s2", "s3"]


def test_nobody_is_blamed_for_weights_that_are_not_there(benches: Callable[..., Bench]) -> None:
    bench = shared(benches, 0.25, 4)
    bench.send("v1", EVALUATE(1, 3))
    assert pass_time(bench, 20, 4) == ["s1"]


# ---- bounds


def test_a_runner_is_leased_no_more_than_it_has_room_for(benches: Callable[..., Bench]) -> None:
    bench = training(benches(lease_bytes=20))
    for name in ("s1", "s2"):
        bench.simulator(name)
    bench.runner("v1", evaluation=True)
    bench.send("v1", EVALUATE(0, 2))
    sent = leases(bench.send("s1", piece("s1", 1, version=0)))
    sent += leases(bench.send("s1", piece("s1", 2, t0=1, version=0)))
    assert sent == [("v1", "s1", 1), ("v1", "s1", 2)]
    assert leases(bench.send("s1", piece("s1", 3, t0=11, version=0))) == []
    assert leases(bench.send("s2", piece("s2", 1, version=0))) == []
    assert leases(bench.take("v1", 1, claim("s1", 1))) == []
    bench.broker.check_invariants()
    assert leases(bench.take("v1", 2, claim("s1", 2))) == [("v1", "s1", 3), ("v1", "s2", 1)]
    assert leases(bench.send("s1", piece("s1", 4, t0=21, version=0))) == []
    bench.send("v1", EVALUATE(0, 0))
    assert bench.acks() == {"s1": [(3, "unwanted"), (4, "unwanted")], "s2": [(1, "unwanted")]}


def test_the_steps_ahead_are_shared_by_those_that_train(benches: Callable[..., Bench]) -> None:
    bench = training(benches(), steps_ahead=4000, fragment_steps=200)
    for i in range(4):
        bench.simulator(f"s{i + 1}", episodes=2)
    bench.runner("v1", evaluation=True)
    bench.send("v1", EVALUATE(0, MANY))

    def granted() -> int:
        return bench.broker.steps_granted(bench.broker.simulators[session("s1")])[0]

    assert granted() == 1000
    for name in ("s3", "s4"):
        bench.send(name, piece(name, 1, version=0))
        bench.send(name, piece(name, 2, t0=1, version=0))
    assert granted() == 2000, "these two are there for evaluations"
    bench.send("s4", fragment("s4", 3, steps=1, episode="e2"))
    assert granted() == 2 * (4000 // 6), "this one is not"
    bench.send("s4", piece("s4", 4, "e3", version=0))
    bench.bye("s3")
    assert granted() == 2 * (4000 // 6)


@pytest.mark.parametrize("end", ["no", "terminated"])
def test_a_place_is_free_again_when_its_episode_can_t_be_used(bench: Bench, end: str) -> None:
    bench.send("v1", EVALUATE(1, 1))
    bench.send("s1", piece("s1", 1, end=end))
    bench.take("v1", 1, claim("s1", 1))
    bench.returned("v1", 1, dropped("s1", 1, "malformed"))
    assert leases(bench.send("s1", piece("s1", 2, t0=1))) == []
    assert leases(bench.send("s2", piece("s2", 1))) == [("v1", "s2", 1)]
    assert leases(bench.send("s1", piece("s1", 3, "e2"))) == []
