"""Rounds and streams whose steps are those of agents: real calls of `sample()` against a real core."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from core_bench import RUN, SPACES, Bench, claim, fragment, session, terms

from broker.counting import Counting
from rllink_zmq.messages import DUTY, FRAGMENT, TAKEN, AgentRows
from rllink_zmq.rllib.link import RunnerLink
from rllink_zmq.rllib.settings import agent_steps
from rllink_zmq.sampling import Next, SampleCall, SamplingRules
from rllink_zmq.sampling_exact import ExactCall, Stock
from rllink_zmq.session_runner import RunnerSession

STREAM = SamplingRules("stream", share=50, quota=500, timeout=60.0, linger=0.5, weigh=agent_steps)


def of_agents(name: str, number: int, steps: int, counted: int, **changes: Any) -> FRAGMENT:
    """`steps` env steps that complete so many steps of agents."""
    rows = (AgentRows("a", "m", 0, counted, "no", 0.0),) if counted else ()
    return fragment(name, number, steps=steps, agents=rows, modules={"m": 0}, columns=(), **changes)


class Pool:
    """A trainer, its runners, and simulators of which each has so many agents acting in an env step, `per_step` at
    random. A round: every runner is asked as RLlib asks, again and again, until there are `quota` steps."""

    def __init__(self, runners: int, per_step: list[list[int]], quota: int = 400, ahead: int = 0, **more: Any) -> None:
        self.bench = Bench()
        told = {"rounds": True, **more}
        self.bench.hello(
            "t", terms(quota=quota, lag_limit=2, steps_ahead=ahead or quota, runners=runners, agents=8, **told)
        )
        self.quota = quota
        self.rules = SamplingRules("round", -(-quota // runners), quota, 60.0, 0.2, weigh=agent_steps)
        self.rng = random.Random(1)
        self.per_step = per_step
        self.names = [f"r{i}" for i in range(runners)]
        self.sessions: dict[str, RunnerSession] = {}
        self.version = 0
        self.full: dict[str, int] = {}
        for name in self.names:
            self.sessions[name] = one = RunnerSession(session(name), RUN)
            one.open(self.bench.now)
            self.talk(name)
        self.simulators = [f"s{i}" for i in range(len(per_step))]
        for name in self.simulators:
            self.bench.simulator(name, spaces=SPACES)
        self.numbers = dict.fromkeys(self.simulators, 0)
        self.offer()

    def offer(self) -> None:
        """Every runner has the next weights; one is asked for them, and they are published."""
        self.bench.tick(0.05)
        for name in self.names:
            self.sessions[name].offer(self.version, 1, lambda: b"w", self.bench.now)
            self.talk(name)
            self.talk(name)

    def talk(self, name: str) -> None:
        """What this runner has to say, and what everybody is told."""
        one = self.sessions[name]
        output, one.output = one.output, []
        for message, body in output:
            self.deliver(self.bench.send(name, message, *map(bytes, body)))

    def deliver(self, said: list[tuple[str, Any]]) -> None:
        for to, message in said:
            if to in self.sessions:
                self.sessions[to].receive(message, [b""], self.bench.now)

    def simulate(self) -> None:
        """Each simulator sends as much as it may."""
        self.bench.tick(0.02)
        for name, choices in zip(self.simulators, self.per_step, strict=True):
            sim = self.bench.broker.simulators[session(name)]
            while True:
                limit, length = self.bench.broker.steps_granted(sim)
                sent = sim.taken_steps + sum(f.header.steps for f in sim.open.values() if not f.credited)
                if limit and sent + length > limit:
                    break
                self.numbers[name] += 1
                message = self.made(name, self.numbers[name], [self.rng.choice(choices) for _ in range(length)])
                self.deliver(self.bench.send(name, message, b""))

    def made(self, name: str, number: int, counts: list[int]) -> FRAGMENT:
        """The fragment of env steps that count this much."""
        return of_agents(name, number, len(counts), sum(counts), version=self.version)

    def round(self) -> int:
        """The steps of agents that RLlib has in the end."""
        got = asked = 0
        while got < self.quota:
            asked += 1
            assert asked < 50, "it never fills"
            calls = {}
            for name in self.names:
                self.sessions[name].give_back(self.bench.now)
                self.talk(name)
                repeated = self.full.get(name) == self.version
                calls[name] = SampleCall(self.sessions[name], self.rules, self.bench.now, repeated=repeated)
            pending = dict(calls)
            for _ in range(2000):
                self.simulate()
                for name, call in list(pending.items()):
                    if call.step(self.bench.now) is Next.RETURN:
                        del pending[name]
                        if call.round_was_full:
                            self.full[name] = self.version
                    self.talk(name)
                if not pending:
                    break
            assert not pending
            got += sum(call.steps for call in calls.values())
        self.version += 1
        self.offer()
        return got


@pytest.mark.parametrize("runners", [1, 2, 4])
@pytest.mark.parametrize(
    "per_step",
    [
        pytest.param([[8]] * 4, id="all at once"),
        pytest.param([[1]] * 4, id="in turn"),
        pytest.param([[1], [8]] * 4, id="some and some"),
        pytest.param([[1, 8]] * 4, id="at random"),
        pytest.param([[0, 0, 0, 1]] * 4, id="seldom"),
    ],
)
def test_a_round_has_what_rllib_wants_and_little_more(runners: int, per_step: list[list[int]]) -> None:
    pool = Pool(runners, per_step)
    rounds = [pool.round() for _ in range(4)]
    longest = 8 * max(1, pool.bench.broker.counting.env_steps(50))
    assert all(400 <= steps <= 400 + runners * longest for steps in rounds), (rounds, longest)
    pool.bench.broker.check_invariants()


def test_in_lockstep_a_round_is_sampled_in_fragments_of_some_length() -> None:
    """Room is for what the round still wants: a step for each simulator, at the end of it alone."""
    pool = Pool(1, [[1]] * 4, ahead=1)
    for _ in range(4):
        pool.round()
    before = sum(pool.numbers.values())
    assert 400 <= pool.round() <= 400 + 4 * 50
    assert pool.bench.broker.fresh and pool.bench.broker.round_open
    assert sum(pool.numbers.values()) - before <= 40


def test_room_is_for_what_counts() -> None:
    """In env steps, by how many agents have acted of late."""
    together, in_turn = Pool(1, [[8]]), Pool(1, [[1]])
    for pool in (together, in_turn):
        assert pool.bench.broker.counting.env_steps(400) == 50, "at first as if all acted"
        for _ in range(8):
            pool.round()
    assert together.bench.broker.counting.env_steps(400) == 50
    assert 320 <= in_turn.bench.broker.counting.env_steps(400) <= 400


def test_env_steps_count_as_they_are() -> None:
    counting = Counting()
    assert counting.took(of_agents("s", 1, 10, 3)) == counting.of(of_agents("s", 1, 10, 3)) == 10
    assert counting.env_steps(17) == 17 and counting.env_steps(0) == 0


def test_what_is_lost_counts_no_longer(benches: Callable[..., Bench]) -> None:
    bench = benches()
    bench.hello("t", terms(quota=100, agents=4, rounds=True))
    bench.runner("r1")
    bench.simulator("s1", spaces=SPACES)
    bench.tick(5.0)
    bench.send("s1", of_agents("s1", 1, 10, 30), b"")
    ((_, taken),) = [one for one in bench.take("r1", 1, claim("s1", 1)) if isinstance(one[1], TAKEN)]
    assert (taken.round_steps, taken.taken_steps) == (30, 10)
    bench.broker._uncount([f for take in bench.broker.runners[session("r1")].takes.values() for f in take], bench.now)
    assert (bench.broker.round_steps, bench.broker.taken_steps) == (0, 0)


def test_one_that_is_to_leave_returns_fragments_that_complete_nothing() -> None:
    pool = Pool(1, [[0]])
    one = pool.sessions["r0"]
    pool.simulate()
    call = SampleCall(one, STREAM, pool.bench.now)
    assert call.step(pool.bench.now) is Next.WAIT
    pool.talk("r0")
    assert call.step(pool.bench.now) is Next.WAIT and call.leases and not call.steps
    one.receive(DUTY("leave"), [], pool.bench.now)
    assert call.step(pool.bench.now) is Next.RETURN


# ---- exactly as many


class ExactPool(Pool):
    """The same of DQN and SAC: each call gives env steps until `share` steps of agents are complete."""

    def __init__(self, runners: int, per_step: list[list[int]], share: int) -> None:
        most = {"lease_steps": share + 16, "fragment_steps": 16}
        super().__init__(runners, per_step, share * runners, 64, rounds=False, **most)
        self.rules = SamplingRules("exact", share, self.quota, 10.0, 0.0, ahead=16, weigh=agent_steps)
        self.counts: dict[tuple[bytes, int], list[int]] = {}
        self.stocks = {
            name: Stock(one, counts=lambda lease: self.counts[lease.message.session, lease.message.number])
            for name, one in self.sessions.items()
        }

    def made(self, name: str, number: int, counts: list[int]) -> FRAGMENT:
        self.counts[session(name), number] = counts
        return super().made(name, number, counts)

    def answers(self) -> list[list[int]]:
        """One call of each runner: what the env steps of its answer count."""
        calls = {}
        for name, stock in self.stocks.items():
            stock.reached(self.bench.now)
            self.talk(name)
            calls[name] = ExactCall(stock, self.rules, self.bench.now)
        pending, found = dict(calls), []
        for _ in range(2000):
            self.simulate()
            for name, call in list(pending.items()):
                if call.step(self.bench.now) is Next.RETURN:
                    del pending[name]
                    assert not call.short
                    counts = [
                        count
                        for (message, *_), first, steps in call.answer.portions
                        for count in self.counts[message.session, message.number][first : first + steps]
                    ]
                    found.append(counts)
                self.talk(name)
            if not pending:
                return found
        raise AssertionError("calls that never end")


@pytest.mark.parametrize("runners", [1, 3])
@pytest.mark.parametrize("share", [4, 40])
@pytest.mark.parametrize(
    "per_step",
    [
        pytest.param([[8]] * 4, id="all at once"),
        pytest.param([[1]] * 4, id="in turn"),
        pytest.param([[1, 8]] * 4, id="at random"),
        pytest.param([[0, 0, 0, 1]] * 8, id="seldom"),
    ],
)
def test_a_call_gives_the_env_steps_of_rllibs_own_runner(per_step: list[list[int]], share: int, runners: int) -> None:
    pool = ExactPool(runners, per_step, share)
    for _ in range(60):
        for counts in pool.answers():
            assert sum(counts) >= share > sum(counts[:-1]), "no env step more than it takes"
    pool.bench.broker.check_invariants()


def test_env_steps_that_count_nothing_are_given_up_with_the_training() -> None:
    """Else the runner would never be done."""
    pool = ExactPool(1, [[0]], 4)
    pool.simulate()
    (stock,) = pool.stocks.values()
    call = ExactCall(stock, pool.rules, pool.bench.now)
    assert call.step(pool.bench.now) is Next.WAIT
    pool.talk("r0")
    assert call.step(pool.bench.now) is Next.WAIT and not stock.empty and not stock.steps
    link = RunnerLink.__new__(RunnerLink)
    link.session, link._stock, link._held = pool.sessions["r0"], stock, deque()
    link._returned_at = link._call = link._result = link.on_left = None
    link._thread = SimpleNamespace(stop=lambda: None)  # type: ignore[assignment]
    link.session.receive(DUTY("end"), [], pool.bench.now)
    link._step(pool.bench.now)
    assert stock.empty
