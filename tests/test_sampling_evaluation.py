"""What calls of an evaluation runner do, against a real broker core in memory and a clock that tests turn."""

from __future__ import annotations

from typing import Any

import pytest
from core_bench import RUN, Bench, Said, fragment, training

from rllink_zmq.messages import ACK, EVALUATE, FRAGMENT, HELLO, POOL, Assigned, Duty
from rllink_zmq.sampling import TOO_LATE, Next
from rllink_zmq.sampling_evaluation import ALL, LINGER, MANY, PAST, Evaluation, Wanted
from rllink_zmq.session import State
from rllink_zmq.session_evaluator import EvaluatorSession
from rllink_zmq.session_runner import Lease

TIMEOUT = 10.0


class Joined:
    """An evaluation runner "v", joined to a broker core with a trainer, simulators "s1" and "s2", and weights 0."""

    def __init__(self) -> None:
        self.session = EvaluatorSession(b"v".rjust(16, b"."), RUN, name="v")
        self.bad: set[tuple[str, int]] = set()
        """(episode, t0) of fragments whose columns can't be used."""
        self.evaluation = Evaluation(self.session, self.check)
        self.said: list[Any] = []
        self.numbers: dict[str, int] = {}
        self.body = b""
        self.bench = self.new_broker(100.0)
        self.session.open(self.now)
        self.pump()

    def check(self, lease: Lease) -> str:
        return "malformed" if (lease.message.episode, lease.message.t0) in self.bad else ""

    def new_broker(self, now: float) -> Bench:
        bench = training(Bench(now=now))
        for name in ("s1", "s2"):
            bench.simulator(name)
        bench.tick(0.05)
        self.bench = bench
        return bench

    @property
    def now(self) -> float:
        return self.bench.now

    def pump(self) -> None:
        """Until nobody has anything more to say."""
        while self.session.output:
            output, self.session.output = self.session.output, []
            for outgoing in output:
                self.said.append(outgoing.message)
                self.hear(self.bench.send("v", outgoing.message))

    def hear(self, said: Said) -> None:
        for name, message in said:
            if name == "v":
                self.session.receive(message, (self.body,), self.now)

    def call(
        self, episodes: int | None = None, steps: int = 0, *, version: int = 0, fresh: bool = True, more: bool = True
    ) -> None:
        self.evaluation.call(Wanted(episodes, steps, version, fresh, TIMEOUT, more), self.now)

    def step(self) -> Next:
        """Until it waits for something that doesn't come by itself."""
        while True:
            what = self.evaluation.step(self.now)
            if what is Next.RETURN or not self.session.output:
                self.pump()
                return what
            self.pump()

    def send(self, name: str, episode: str, t0: int = 0, steps: int = 1, end: str = "no", **more: Any) -> None:
        self.numbers[name] = number = self.numbers.get(name, 0) + 1
        one = {"evaluation": True} | more
        self.hear(self.bench.send(name, fragment(name, number, episode=episode, t0=t0, steps=steps, end=end, **one)))

    def wait(self, seconds: float) -> Next:
        self.bench.now += seconds
        self.session.tick(self.now)
        self.pump()
        return self.step()

    def answer(self) -> list[tuple[str, int, int]]:
        """(episode, t0, steps) of the fragments that the call returns."""
        return [(m.episode, m.t0, m.steps) for m, *_ in self.evaluation.take_out()]

    def wants(self) -> list[tuple[int, int]]:
        """What it said since the last look."""
        found = [(m.version, m.episodes) for m in self.said if isinstance(m, EVALUATE)]
        self.said.clear()
        return found


@pytest.fixture
def joined() -> Any:
    one = Joined()
    yield one
    one.bench.broker.check_invariants()


def test_whole_episodes_are_returned_when_all_are_there(joined: Joined) -> None:
    joined.call(episodes=2)
    assert joined.step() is Next.WAIT
    assert joined.wants() == [(0, 2)]
    joined.send("s1", "a")
    joined.send("s2", "b")
    joined.send("s1", "a", 1, 5)
    joined.send("s2", "b", 1, 2, "terminated")
    assert joined.step() is Next.WAIT
    joined.send("s1", "a", 6, 3, "truncated")
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("b", 0, 1), ("b", 1, 2), ("a", 0, 1), ("a", 1, 5), ("a", 6, 3)]
    assert joined.wants() == [(0, 0)], "the broker is told that it has enough"
    assert joined.evaluation.missing == ""


def test_what_is_taken_is_given_back_at_once(joined: Joined) -> None:
    joined.call(episodes=1)
    joined.step()
    joined.send("s1", "a")
    assert joined.step() is Next.WAIT
    assert joined.bench.acks() == {"s1": [(1, "evaluated")]}
    assert joined.bench.ledger()["received"] == 0


def test_with_nothing_it_is_silent_past_the_timeout(joined: Joined) -> None:
    joined.call(episodes=3)
    assert joined.step() is Next.WAIT
    for _ in range(10):
        assert joined.wait(TIMEOUT / 10) is Next.WAIT
    assert joined.evaluation.wake == pytest.approx(joined.now + PAST)
    assert joined.wait(PAST) is Next.RETURN
    assert joined.answer() == [] and joined.evaluation.missing == "3 of 3 episodes"


def test_shortly_before_the_timeout_it_returns_the_whole_episodes_it_has(joined: Joined) -> None:
    joined.call(episodes=3)
    joined.step()
    joined.send("s1", "a", end="terminated")
    joined.send("s2", "b")
    assert joined.step() is Next.WAIT
    for _ in range(8):
        assert joined.wait(TIMEOUT / 10) is Next.WAIT
    assert joined.wait(TIMEOUT * (TOO_LATE - 0.8)) is Next.RETURN
    assert joined.answer() == [("a", 0, 1)] and joined.evaluation.missing == "2 of 3 episodes"
    joined.call(episodes=2)
    joined.step()
    joined.send("s2", "b", 1, 4, "terminated")
    assert joined.step() is Next.WAIT, "an episode counts under the evaluation that it began in"


def test_steps_are_of_any_episodes_and_go_on_in_the_next_call(joined: Joined) -> None:
    joined.call(steps=6)
    joined.step()
    assert joined.wants() == [(0, ALL)]
    joined.send("s1", "a")
    joined.send("s1", "a", 1, 4)
    assert joined.step() is Next.WAIT and joined.evaluation.missing == "1 of 6 steps"
    joined.send("s2", "b")
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 0, 1), ("a", 1, 4), ("b", 0, 1)]
    joined.wait(LINGER / 2)
    joined.send("s1", "a", 5, 9, "terminated")
    joined.call(steps=5, fresh=False)
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 5, 9)]
    assert joined.wants() == [], "it is the same evaluation"


def test_no_more_is_taken_than_steps_are_wanted(joined: Joined) -> None:
    joined.call(steps=6)
    joined.step()
    for t0 in range(0, 20, 4):
        joined.send("s1", "a", t0, 4)
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 0, 4), ("a", 4, 4)]
    joined.call(steps=1, fresh=False)
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 8, 4)]


def test_an_evaluation_by_steps_is_over_when_no_call_comes(joined: Joined) -> None:
    joined.call(steps=1)
    joined.step()
    joined.send("s1", "a")
    joined.step()
    joined.answer()
    joined.send("s1", "a", 1, 4)
    joined.wants()
    assert joined.bench.broker.evaluation_version == 0
    joined.wait(LINGER)
    assert joined.wants() == [(0, 0)] and joined.bench.broker.evaluation_version == -1
    assert joined.bench.acks() == {"s1": [(1, "evaluated"), (2, "unwanted")]}
    joined.wait(5.0)
    assert joined.wants() == []


def test_steps_that_are_all_there_end_the_evaluation_if_no_more_are_to_follow(joined: Joined) -> None:
    joined.call(steps=2, more=False)
    joined.step()
    joined.send("s1", "a", steps=2)
    joined.wants()
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 0, 2)] and joined.wants() == [(0, 0)]
    joined.call(steps=2, more=False)
    joined.step()
    joined.send("s1", "b")
    joined.step()
    joined.wants()
    for _ in range(9):
        what = joined.wait(TIMEOUT / 10)
    assert what is Next.RETURN and joined.answer() == [("b", 0, 1)]
    assert joined.wants() == [], "RLlib asks for the rest"


@pytest.mark.parametrize("how", [{"fresh": True}, {"fresh": False, "version": 1}])
def test_a_new_evaluation_has_nothing_of_the_one_before(joined: Joined, how: Any) -> None:
    joined.call(steps=1)
    joined.step()
    joined.send("s1", "a")
    joined.step()
    joined.answer()
    joined.send("s1", "a", 1, 20)
    joined.bench.weights("r1", 1)
    joined.call(steps=1, **how)
    assert joined.step() is Next.WAIT
    joined.send("s1", "a", 21, 20, version=1)
    assert joined.step() is Next.WAIT
    joined.send("s2", "b", version=1)
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("b", 0, 1)]


def test_a_claim_on_its_way_is_not_the_next_evaluation_s(joined: Joined) -> None:
    joined.call(steps=100)
    joined.step()
    joined.send("s1", "a")
    joined.evaluation.step(joined.now)  # TAKE is said, and not heard yet
    joined.call(episodes=1)
    assert joined.step() is Next.WAIT
    joined.send("s1", "a", 1, 1, "terminated")
    assert joined.step() is Next.WAIT
    joined.send("s2", "b", end="terminated")
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("b", 0, 1)]


def test_a_broker_that_is_restarted_is_told_what_is_still_missing(joined: Joined) -> None:
    joined.call(episodes=3)
    joined.step()
    joined.send("s1", "a", end="terminated")
    joined.send("s2", "b")
    joined.step()
    joined.wants()
    joined.new_broker(joined.now)
    joined.session.reconnected(joined.now)
    joined.pump()
    assert joined.session.state is State.LIVE
    assert joined.step() is Next.WAIT
    assert joined.wants() == [(0, 2)], "what had begun gets no further"
    joined.send("s2", "b", 1, 1, "terminated")
    joined.send("s2", "c", end="terminated")
    joined.send("s1", "d", end="terminated")
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 0, 1), ("c", 0, 1), ("d", 0, 1)]


def test_without_a_broker_the_call_asks_when_there_is_one(joined: Joined) -> None:
    joined.session.send_failed(joined.now)
    joined.call(episodes=1)
    assert joined.step() is Next.WAIT and joined.wants() == []
    assert joined.wait(0.5) is Next.WAIT  # HELLO again
    assert joined.wants() == [(0, 1)]


@pytest.mark.parametrize("units", ["episodes", "steps"])
def test_a_call_for_nothing_is_silent_when_the_others_had_nothing_for_a_timeout(joined: Joined, units: str) -> None:
    """RLlib goes on for as long as anybody answers in time."""
    nothing: dict[str, Any] = {"episodes": 0} if units == "episodes" else {"steps": 0, "more": False}
    for _ in range(2):
        joined.evaluation.begins()
        joined.call(**nothing)
        assert joined.step() is Next.RETURN, "all that are left are the others'"
        joined.bench.now += 0.1
        joined.call(**nothing)
        assert joined.step() is Next.RETURN, "the others are quick"
        joined.bench.now += TIMEOUT
        joined.call(**nothing)
        assert joined.step() is Next.WAIT
        assert joined.wait(TIMEOUT) is Next.WAIT
        assert joined.wait(PAST) is Next.RETURN
        assert joined.answer() == [] and joined.evaluation.missing == ""
    assert not any(episodes for _, episodes in joined.wants())


def test_a_call_for_nothing_ends_with_the_training(joined: Joined) -> None:
    joined.call(episodes=0)
    joined.step()
    joined.bench.now += TIMEOUT
    joined.call(episodes=0)
    assert joined.step() is Next.WAIT
    joined.hear(joined.bench.send("t", POOL([Assigned(joined.session.session, "end")])))
    assert joined.step() is Next.RETURN


def test_steps_want_episodes_for_as_long_as_training_goes_on_or_until_they_are_there(joined: Joined) -> None:
    joined.call(steps=6, more=False)
    joined.step()
    assert joined.wants() == [(0, MANY)]


# ---- what can't be used


@pytest.mark.parametrize("spoiled", [0, 1, 3])
def test_an_episode_that_can_t_be_used_counts_as_none_and_gives_its_place_away(joined: Joined, spoiled: int) -> None:
    joined.bad = {("a", spoiled)}
    joined.call(episodes=1)
    joined.step()
    joined.send("s1", "a")
    joined.send("s1", "a", 1, 2)
    joined.send("s1", "a", 3, 1, "terminated")
    assert joined.step() is Next.WAIT
    outcomes = dict(joined.bench.acks()["s1"])
    first = [0, 1, 3].index(spoiled) + 1
    assert outcomes == {n: "evaluated" if n < first else "malformed" if n == first else "unwanted" for n in (1, 2, 3)}
    joined.send("s2", "b", steps=2, end="terminated")
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("b", 0, 2)]


def test_one_that_sends_only_what_can_t_be_used_holds_up_nothing_but_the_timeout(joined: Joined) -> None:
    joined.bad = {(f"e{i}", 0) for i in range(20)}
    joined.call(episodes=1)
    joined.step()
    for i in range(20):
        joined.send("s1", f"e{i}", end="terminated", base=joined.numbers.get("s1", 0) + 1)
        assert joined.step() is Next.WAIT
        assert joined.bench.acks() == {"s1": [(i + 1, "malformed")]}
    assert len(joined.session._dropped) <= 1, "what is settled is forgotten"
    assert joined.wait(TIMEOUT * TOO_LATE) is Next.WAIT, "with nothing it is silent past the timeout"
    assert joined.wait(TIMEOUT) is Next.RETURN and joined.answer() == []


def test_steps_are_counted_that_can_be_used(joined: Joined) -> None:
    joined.bad = {("a", 1)}
    joined.call(steps=3)
    joined.step()
    joined.send("s1", "a")
    joined.send("s1", "a", 1, 5)
    assert joined.step() is Next.WAIT
    joined.send("s2", "b", 0, 2)
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 0, 1), ("b", 0, 2)]


def test_an_episode_that_begins_again_and_again_is_kept_once(joined: Joined) -> None:
    joined.call(episodes=2)
    joined.step()
    for _ in range(10):
        joined.send("s1", "a")
        joined.step()
    joined.send("s1", "a")
    joined.send("s1", "a", 1, 3, "terminated")
    joined.step()
    joined.send("s2", "b", end="terminated")
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 0, 1), ("a", 1, 3), ("b", 0, 1)]


def test_no_more_episodes_are_kept_than_there_are_places(joined: Joined) -> None:
    joined.call(episodes=2)
    joined.step()
    joined.send("s2", "b")
    for i in range(10):
        joined.send("s1", f"x{i}")  # each has the place of the one before
        joined.send("s2", "b", 1 + i)
        joined.step()
    assert [episode for _, episode in joined.evaluation._parts] == ["x9", "b"]


def test_the_largest_episode_is_let_go_when_all_are_too_large(joined: Joined, monkeypatch: Any) -> None:
    monkeypatch.setattr("rllink_zmq.sampling_evaluation.MOST_BYTES", 60)
    joined.body = bytes(20)
    joined.call(episodes=2)
    joined.step()
    joined.send("s2", "b")
    joined.send("s1", "a")
    joined.send("s1", "a", 1)
    joined.step()
    assert len(joined.evaluation._parts) == 2
    joined.send("s1", "a", 2)
    joined.step()
    assert [episode for _, episode in joined.evaluation._parts] == ["b"]
    joined.send("s1", "a", 3)
    joined.step()
    assert joined.bench.acks()["s1"][-1] == (4, "unwanted"), "and its simulator is told"


@pytest.mark.parametrize("how", ["end", "cancel"])
def test_it_returns_when_it_is_over(joined: Joined, how: str) -> None:
    joined.call(episodes=2)
    joined.step()
    joined.send("s1", "a", end="terminated")
    joined.send("s2", "b")
    assert joined.step() is Next.WAIT
    if how == "end":
        duty: Duty = "end"
        joined.hear(joined.bench.send("t", POOL([Assigned(joined.session.session, duty)])))
    else:
        joined.evaluation.cancel()
    assert joined.step() is Next.RETURN
    assert joined.answer() == [("a", 0, 1)]
    assert joined.bench.broker.evaluation_version == -1


def test_it_greets_as_one_that_evaluates(joined: Joined) -> None:
    (hello,) = [m for m in joined.said if isinstance(m, HELLO)]
    assert hello.peer.evaluation is True  # type: ignore[union-attr]
    assert not [m for m in joined.said if isinstance(m, (FRAGMENT, ACK, EVALUATE))]
