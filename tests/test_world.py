"""Any single kind of failure, however often, and simulators restarted on top: nothing is trained twice, nothing that
was acked is lost, nobody is stuck, training goes on. So it is with any kinds, as long as each heals before the next,
and while the number of runners changes. `world.py` says what is simulated and how it is judged."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from world import AIMS, KINDS, Fault, World, judge, mixed

from broker.core import Broker
from broker.events import Action, Event, Forward, Received, Send
from rllink_zmq.messages import ACK, DELIVERED

RUNS, CHUNK = 1000, 50
MIXED, MIXED_AT_LENGTH = 1000, 5000
EXACT = 100


@pytest.mark.parametrize("first", range(0, RUNS, CHUNK))
@pytest.mark.parametrize("kind", ["", *KINDS])
def test_one_kind_of_failure_keeps_every_promise(kind: str, first: int) -> None:
    """In half of the runs with simulators restarted on top. Even seeds drive the runners as PPO does, odd ones as
    APPO."""
    on_top = "sim" if first // CHUNK % 2 and kind not in ("", "scale", "sim") else ""
    kinds = tuple(filter(None, (kind, on_top)))
    delivered = 0
    for seed in range(first, first + CHUNK):
        delivered += judge(World(seed, kinds)).outcomes["delivered"]
    assert delivered > 10 * CHUNK


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=[pytest.mark.long] * (first >= MIXED)) for first in range(0, MIXED_AT_LENGTH, CHUNK)],
)
def test_any_kinds_keep_every_promise_if_each_heals_before_the_next(first: int) -> None:
    """Quotas, lag limits, steps ahead, fragments' lengths and the number of runners are the seed's, too."""
    for seed in range(first, first + CHUNK):
        judge(mixed(seed))


@pytest.mark.parametrize("first", range(0, EXACT, CHUNK))
@pytest.mark.parametrize("kind", ["", *KINDS, "mixed"])
def test_fragments_that_are_cut_to_fit_keep_every_promise(kind: str, first: int) -> None:
    """As DQN and SAC drive the runners. Each answer has the steps that were wanted, and their replay buffer finds no
    gap within an episode."""
    delivered = 0
    for seed in range(first, first + CHUNK):
        world = mixed(seed, style="exact") if kind == "mixed" else World(seed, filter(None, (kind,)), style="exact")
        delivered += judge(world).outcomes["delivered"]
    assert delivered > 10 * CHUNK


CROWDS = ((1, 1, 6), (1, 12, 2), (2, 12, 5), (4, 6, 2), (7, 1, 3))
"""Simulators, episodes that each steps together, runners: often more runners than fragments within the limits."""


@pytest.mark.parametrize("crowd", CROWDS, ids=str)
def test_no_runner_goes_without_while_others_sit_on_what_there_is(crowd: tuple[int, int, int]) -> None:
    """RLlib waits for every runner of DQN's and SAC's. None of these seeds wants more than simulators make in time."""
    for seed in range(6):
        world = World(seed, style="exact", crowd=crowd)
        world.until(world.now + 40.0)
        judge(world)
        told = f"seed {seed}, {world.rules}, {world.ahead} ahead, {len(world.lacking)} calls lacked steps"
        assert not world.lacking, told


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_a_crowd_keeps_every_promise(kind: str) -> None:
    for seed in range(3):
        for crowd in CROWDS:
            options: dict[str, Any] = {"style": "exact", "crowd": crowd}
            judge(mixed(seed, **options) if kind == "mixed" else World(seed, (kind,), **options))


@pytest.mark.parametrize("first", range(0, 200, CHUNK))
def test_scaling_alone_drops_nothing(first: int) -> None:
    """To 0 and back, too: training waits, and goes on."""
    for seed in range(first, first + CHUNK):
        verdict = judge(World(seed, ("scale",), lag_limit=1000))
        assert set(verdict.outcomes) == {DELIVERED}, verdict.outcomes


@pytest.mark.parametrize("kind", KINDS)
def test_overlapping_with_another_kind_the_ledger_balances_all_the_same(kind: str) -> None:
    """What else two kinds at once can do is measured, and stands in `docs/protocol.md`."""
    for other in KINDS:
        for seed in range(4):
            World(seed, (kind, other), check_each=True).run()


def schedules(kind: str) -> st.SearchStrategy[list[Fault]]:
    """Up to 8 faults of one kind, of the kind that a person can read when it has shrunk."""
    tenths = st.integers(0, 100).map(lambda n: n / 10)
    span = st.integers(0, 250 if kind == "pause" else 60).map(lambda n: n / 10)
    return st.lists(
        st.builds(Fault, tenths, st.just(kind), st.integers(0, 59), span, st.sampled_from(("", *AIMS))), max_size=8
    )


@pytest.mark.parametrize("style", ["round", "stream", "exact"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=False)
@given(faults=st.sampled_from(KINDS).flatmap(schedules), seed=st.integers(0, 3))
def test_no_schedule_of_one_kind_of_fault_breaks_a_promise(style: str, faults: list[Fault], seed: int) -> None:
    judge(World(seed, faults, style=style))


def test_a_round_takes_no_more_than_its_quota() -> None:
    """And one fragment more of each runner: one is taken whole. Unless RLlib asks again for the same weights."""
    rounds = 0
    for seed in range(0, 400, 2):
        verdict = judge(World(seed, ("sim",) if seed % 4 else ()))
        rounds += verdict.versions
        assert not verdict.over_quota, f"seed {seed}: {verdict.over_quota} env steps too many"
    assert rounds > 500


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
    world = World(4, ("cut", "sim", "scale"), through_wire=True, check_each=True)
    assert judge(world).outcomes["delivered"] > 10


# ---- recorded traffic


class Recorder(Broker):
    """Keeps all that it has heard, of this start."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.heard: list[Received] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        if type(event) is Received:
            self.heard.append(event)
        return super().handle(event, now)


def replayed(world: World, heard: list[Received]) -> list[Action]:
    """What the broker wants done when it hears `heard`."""
    broker, said = world.broker, list[Action]()
    assert broker is not None
    for event in heard:
        world.now += 0.001
        said += broker.handle(event, world.now)
    return said + broker.flush_due(world.now + 1.0)


@pytest.mark.parametrize("kinds", [(), ("cut",), ("kill", "sim"), ("broker",), ("pause",), ("scale",)], ids="+".join)
def test_a_replay_of_recorded_traffic_delivers_nothing_twice(kinds: tuple[str, ...]) -> None:
    """Everything once more, in any order and some of it often: nothing goes out to a runner, and whoever asks what
    became of a fragment is told what was recorded."""
    answered = 0
    for seed in range(30):
        world = World(seed, kinds, broker_class=Recorder)
        judge(world)
        broker = world.broker
        assert isinstance(broker, Recorder)
        before = broker.ledger.as_json()
        heard = random.Random(seed).choices(broker.heard, k=2 * len(broker.heard))
        recorded = {s.session: dict(s.outcomes) for s in broker.simulators.values()}
        said = replayed(world, heard)
        broker.check_invariants()
        assert not [a for a in said if type(a) is Forward]
        assert broker.ledger.as_json() == before
        routes = {node.connection.route: node.session.session for node in world.simulators if node.connection}
        for action in said:
            if type(action) is Send and type(action.message) is ACK and action.route in routes:
                for number, outcome in action.message.settled:
                    answered += 1
                    assert outcome == recorded[routes[action.route]][number]
    assert answered > 100


@pytest.mark.parametrize("first", range(0, 200, CHUNK))
def test_messages_that_come_again_while_training_goes_on_deliver_nothing_twice(first: int) -> None:
    """A third of what a peer says, the broker hears once more on the same connection, up to many seconds later."""
    verdicts = [World(seed, ("cut",), repeats=0.3).run() for seed in range(first, first + CHUNK)]
    assert [v for v in verdicts if v.twice or v.lost or v.untrue or v.broken] == []
    assert sum((v.outcomes for v in verdicts), Counter[str]())[DELIVERED] > 10 * CHUNK


# ---- the command lines


def run(*args: str) -> str:
    world = Path(__file__).parent / "world.py"
    return subprocess.run([sys.executable, world, *args], check=True, capture_output=True, text=True).stdout


def test_a_run_can_be_looked_at() -> None:
    assert run("--seed", "3", "--faults", "kill,sim").splitlines()[-1].startswith("perfect ")
    assert run("--seed", "5", "--mixed").splitlines()[-1].startswith("perfect ")
    assert run("--runs", "3", "--faults", "cut").startswith("cut: 3 runs")


def test_very_many_runs_have_a_summary(tmp_path: Path) -> None:
    soak, summary = Path(__file__).parent / "world_soak.py", tmp_path / "soak.json"
    subprocess.run([sys.executable, soak, "--runs", "100", "--processes", "2", "--output", summary], check=True)
    shown = json.loads(summary.read_text())
    assert shown["runs"] == shown["runs_wanted"] == 100 and not shown["failures"]
    assert sum(shown["faults"].values()) >= 200 and shown["outcomes"]["delivered"] > 1000
