"""Any single kind of failure, however often, and simulators restarted on top: nothing is trained twice, nothing that
was acked is lost, nobody is stuck, training goes on. `world.py` says what is simulated and how it is judged."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world import AIMS, KINDS, Fault, World, judge

SINGLE = [(), *((kind,) for kind in KINDS), *((kind, "sim") for kind in KINDS if kind != "sim")]
RUNS, CHUNK = 1000, 50


@pytest.mark.parametrize("first", range(0, RUNS, CHUNK))
@pytest.mark.parametrize("kinds", SINGLE, ids=lambda kinds: "+".join(kinds) or "none")
def test_one_kind_of_failure_keeps_every_promise(kinds: tuple[str, ...], first: int) -> None:
    """Even seeds drive the runners as PPO does, odd ones as APPO."""
    delivered = 0
    for seed in range(first, first + CHUNK):
        delivered += judge(World(seed, kinds)).outcomes["delivered"]
    assert delivered > 10 * CHUNK


def schedules(kind: str) -> st.SearchStrategy[list[Fault]]:
    """Up to 8 faults of one kind, of the kind that a person can read when it has shrunk."""
    tenths = st.integers(0, 100).map(lambda n: n / 10)
    span = st.integers(0, 250 if kind == "pause" else 60).map(lambda n: n / 10)
    return st.lists(
        st.builds(Fault, tenths, st.just(kind), st.integers(0, 59), span, st.sampled_from(("", *AIMS))), max_size=8
    )


@pytest.mark.parametrize("style", ["round", "stream"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=False)
@given(faults=st.sampled_from(KINDS).flatmap(schedules), seed=st.integers(0, 3))
def test_no_schedule_of_one_kind_of_fault_breaks_a_promise(style: str, faults: list[Fault], seed: int) -> None:
    judge(World(seed, faults, style=style))


def test_a_run_can_be_repeated() -> None:
    first, second = (World(7, ("cut",)) for _ in range(2))
    assert first.run() == second.run()
    assert [entry[:2] for entry in first.trace] == [entry[:2] for entry in second.trace]


def test_a_failure_says_how_to_see_it_again() -> None:
    world = World(3, ("kill", "broker"))
    world.broken.append("a planted one")
    with pytest.raises(AssertionError, match=r"python tests/world\.py --seed 3 --faults kill,broker"):
        judge(world)


def test_the_messages_of_a_whole_run_fit_the_wire() -> None:
    world = World(4, ("cut", "sim"), through_wire=True, check_each=True)
    assert judge(world).outcomes["delivered"] > 10
