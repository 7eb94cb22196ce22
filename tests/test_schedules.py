"""The schedules of failure that decided the protocol, each as it happens: these events, exactly these actions.

Each broke an earlier, simpler design. `docs/protocol.md` says what rule keeps it from happening now; `world.py` looks
for those that nobody has thought of yet.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from core_bench import (
    EPOCH,
    NEXT_RUN,
    RUN,
    SPACES,
    WEIGHTS,
    Bench,
    claim,
    dropped,
    fragment,
    leases,
    messages,
    session,
    terms,
    training,
)

from broker import peers
from broker.modules import KEPT, TRANSFER_IDLE
from rllink_zmq.messages import (
    ACK,
    DUTY,
    GET_STATE,
    OFFER,
    PING,
    PONG,
    POOL,
    REFUSED,
    RETURNED,
    STATE,
    TAKE,
    TAKEN,
    WELCOME,
    Assigned,
    Column,
    Handed,
    RunnerHello,
    SimulatorHello,
)
from rllink_zmq.sampling import LATE, Next, SampleCall, SamplingRules
from rllink_zmq.session import SimulatorSession, State
from rllink_zmq.session_runner import RunnerSession
from rllink_zmq.transfer import CHUNK_BYTES


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    """A training with runners "a" and "b", and simulator "s"."""
    bench = training(benches(), ("a", "b"))
    bench.simulator("s")
    return bench


@pytest.fixture
def restarted(benches: Callable[..., Bench]) -> Bench:
    """A broker that has just started, empty: the trainer has greeted and counts two runners."""
    bench = benches(epoch=b"epoch 02")
    bench.trainer(runners=2)
    return bench


class Peer:
    """A real session whose messages go to a bench's core, and which reads what the core says. `connection` names the
    routing id; what is said to another one is lost."""

    def __init__(self, bench: Bench, name: str, endpoint: Any) -> None:
        self.bench = bench
        self.connection = name
        self.endpoint = endpoint
        self.name = name
        endpoint.greeting = bench.greetings.get(endpoint.session, 0)
        endpoint.open(bench.now)
        self.exchange()

    def exchange(self) -> list[Any]:
        """Everything is sent, answered and read. Returns what was said."""
        said = []
        while self.endpoint.output:
            out, self.endpoint.output = self.endpoint.output, []
            for message, body in out:
                said.append(message)
                self.read(self.bench.send(self.connection, message, *map(bytes, body)))
        return said

    def read(self, said: list[tuple[str, Any]]) -> None:
        for to, message in said:
            if to == self.connection:
                self.endpoint.receive(message, [b""], self.bench.now)

    def lose(self) -> list[Any]:
        """What it says now is lost."""
        out = [o.message for o in self.endpoint.output]
        self.endpoint.output.clear()
        return out

    def reconnect(self) -> None:
        """A new connection below the session, which is told nothing."""
        self.connection += "/"


def runner(bench: Bench, name: str) -> Peer:
    return Peer(bench, name, RunnerSession(session(name), RUN, name=name))


def simulator(bench: Bench, name: str) -> Peer:
    return Peer(bench, name, SimulatorSession(session(name), name=name, spaces=SPACES))


def submit(peer: Peer, **fields: Any) -> int:
    base: dict[str, Any] = {
        "episode": "e1", "t0": 0, "steps": 10, "end": "no", "run": RUN, "version": 0, "return_so_far": 0.0,
        "columns": (Column("obs", "|u1", (11,)),), "body": [bytes(11)], "now": peer.bench.now,
    }  # fmt: skip
    number: int = peer.endpoint.submit(**(base | fields))
    return number


def handed_over(name: str, takes: dict[int, int]) -> Handed:
    return Handed(session(name), list(takes), list(takes.values()))


# ---- F1: when is a fragment delivered


def test_f1_lost_a_runner_killed_before_rllib_has_the_answer_was_not_acked(bench: Bench) -> None:
    """Acked at `sample()`, the fragment would be gone: the simulator has freed it, RLlib never got it."""
    bench.send("s", fragment("s", 1))
    assert bench.take("a", 1, claim("s", 1)) == [("a", TAKEN(1, [], 0, 10, 10, 1, 2, 10))]
    assert bench.acks() == {}, "handed over, but nobody knows yet whether RLlib has it"
    bench.unreachable("a")
    bench.send("b", PING())
    said = bench.wait(11.5)
    assert leases(said) == []
    assert [m.settled for m in messages(said, ACK)] == [[(1, "handover_cut")]]


def test_f1_twice_what_a_dead_runner_took_goes_to_nobody(bench: Bench) -> None:
    """Its answer may have reached the driver: given to another runner it would be trained twice."""
    bench.send("s", fragment("s", 1))
    bench.take("a", 1, claim("s", 1))
    assert leases(bench.unreachable("a")) == []
    assert leases(bench.wait(30)) == []
    assert bench.ledger() == {"received": 1, "delivered": 0, "in_flight": 0, "handover_cut": 1}


def test_f1_zombie_a_runner_that_goes_on_after_a_pause_gets_nothing_that_moved(bench: Bench) -> None:
    """SIGSTOP before TAKE; the lease goes to "b", which delivers; SIGCONT."""
    a, b = runner(bench, "a"), runner(bench, "b")
    said = bench.send("s", fragment("s", 1))
    a.read(said)
    assert list(a.endpoint.leased) == [(session("s"), 1)]
    said = bench.unreachable("a")
    assert leases(said) == [("b", "s", 1)]
    b.read(said)
    b.endpoint.take(10, bench.now)
    b.exchange()
    assert [x.message.number for x in b.endpoint.taken] == [1]
    b.endpoint.give_back(bench.now)
    b.exchange()
    assert bench.acks() == {"s": [(1, "delivered")]}
    a.endpoint.take(10, bench.now)
    assert [type(m).__name__ for m in a.exchange()] == ["TAKE", "HELLO"]
    assert a.endpoint.taken == []
    assert bench.acks() == {}


def test_f1_zombie_even_on_a_live_connection_take_is_refused(bench: Bench) -> None:
    bench.send("s", fragment("s", 1))
    assert bench.take("b", 1, claim("s", 1)) == [("b", TAKEN(1, [claim("s", 1)], 0, 0, 0, 1, 2))]


# ---- F2: the broker restarts empty


def test_f2_queued_in_a_runner_an_old_lease_is_not_handed_over(bench: Bench, restarted: Bench) -> None:
    """The simulator resends it to the new broker, which gives it to "b"."""
    a = runner(bench, "a")
    a.read(bench.send("s", fragment("s", 1)))
    a.bench = restarted
    a.endpoint.take(10, restarted.now)
    assert [type(m).__name__ for m in a.exchange()] == ["TAKE", "HELLO"]
    assert (a.endpoint.state, a.endpoint.taken, len(a.endpoint.leased)) == (State.LIVE, [], 0)
    restarted.simulator("s")
    restarted.send("s", fragment("s", 1))
    assert leases(restarted.hello("b", RunnerHello(RUN))) == [("a", "s", 1)]


def test_f2_handed_over_the_report_of_the_runner_keeps_it_from_going_out_again(restarted: Bench) -> None:
    """The ack died with the old broker, so the simulator resends it."""
    restarted.runner("a", committed=3, returned=3, handed=[handed_over("s", {1: 3})])
    restarted.runner("b")
    restarted.simulator("s")
    assert leases(restarted.send("s", fragment("s", 1))) == []
    assert restarted.acks() == {"s": [(1, "delivered")]}


def test_f2_handed_over_nothing_is_leased_before_the_runners_have_reported(restarted: Bench) -> None:
    """The simulator is faster than the runner that has its fragment."""
    restarted.runner("b")
    restarted.simulator("s")
    for n in (1, 2):
        assert leases(restarted.send("s", fragment("s", n))) == []
    said = restarted.hello("a", RunnerHello(RUN, 3, 2, [handed_over("s", {1: 3})]))
    assert leases(said) == [("b", "s", 2)]
    restarted.returned("a", 3)
    assert restarted.acks() == {"s": [(1, "delivered")]}


# ---- F3: one DEALER, two connections


@pytest.fixture
def alone(benches: Callable[..., Bench]) -> Bench:
    """A training with one runner, "a"."""
    return training(benches(), ("a",))


def test_f3a_an_old_greeting_from_a_dead_connection_changes_nothing(alone: Bench) -> None:
    """HELLO(committed=1) has been on its way for long and is read after the new connection has committed 2."""
    alone.simulator("s")
    for n in (1, 2):
        alone.send("s", fragment("s", n))
    alone.take("a", 1, claim("s", 1))
    assert leases(alone.hello("a/new", RunnerHello(RUN, committed=1), greeting=9)) == [("a/new", "s", 2)]
    alone.take("a/new", 2, claim("s", 2))
    assert alone.hello("a", RunnerHello(RUN, committed=1), greeting=8) == []
    alone.returned("a/new", 2)
    assert alone.acks() == {"s": [(1, "delivered"), (2, "delivered")]}


def test_f3b_nothing_overtakes_what_is_resent(alone: Bench) -> None:
    """A fragment sent between HELLO and WELCOME would pass for the newest, and those before it for repeats."""
    s = simulator(alone, "s")
    submit(s)
    submit(s)
    s.lose()
    s.reconnect()
    s.endpoint.tick(alone.now + s.endpoint.timing.ping)
    assert [type(m).__name__ for m in s.lose()] == ["PING"]
    s.endpoint.receive(REFUSED("greet", "send HELLO first"), [], alone.now)
    submit(s)
    assert [type(m).__name__ for m in s.exchange()] == ["HELLO", "FRAGMENT", "FRAGMENT", "FRAGMENT"]
    alone.runner("a/new")
    assert [f.header.number for f in alone.broker.runners[session("a")].leased] == [1, 2, 3]


def test_f3b_a_fragment_from_an_unknown_connection_is_refused_and_changes_nothing(alone: Bench) -> None:
    """The first thing that a broker sees of a connection that libzmq has made below the application."""
    alone.simulator("s")
    assert alone.send("s/new", fragment("s", 3)) == [("s/new", REFUSED("greet", "send HELLO first"))]
    assert alone.broker.simulators[session("s")].high == 0


def test_f3c_a_repeat_of_a_dropped_fragment_is_told_that_it_was_dropped(alone: Bench) -> None:
    """Its ACK was lost with the connection; a broker that knows only "seen" would ack it as delivered."""
    s = simulator(alone, "s")
    alone.weights("a", 5)
    submit(s, version=0)
    s.exchange()
    assert alone.acks() == {"s": [(1, "stale")]}
    s.reconnect()
    alone.unreachable("s")
    s.endpoint.tick(alone.now + s.endpoint.timing.ping)
    s.exchange()
    s.read(alone.tick(0.01))
    assert s.endpoint.outcomes == {"stale": [1, 10]}
    assert s.endpoint.unsettled == {}


def test_f3d_settlement_is_out_of_order_so_numbers_have_holes(alone: Bench, restarted: Bench) -> None:
    """A broker that insisted on consecutive numbers would wait for ever."""
    s = simulator(alone, "s")
    for _ in range(5):
        submit(s)
    s.exchange()
    alone.take("a", 1, claim("s", 2))
    alone.returned("a", 1)
    s.read(alone.tick(0.01))
    assert list(s.endpoint.unsettled) == [1, 3, 4, 5]
    s.bench = restarted
    s.reconnect()
    s.endpoint.tick(alone.now + s.endpoint.timing.ping)
    s.exchange()
    restarted.runner("a")
    assert leases(restarted.hello("b", RunnerHello(RUN))) != []
    given = [f.header.number for r in restarted.broker.runners.values() for f in r.leased]
    assert sorted(given) == [1, 3, 4, 5]


# ---- F4: affinity


def test_f4_new_runners_get_their_share_of_episodes_that_never_end(bench: Bench) -> None:
    for n in range(1, 41):
        bench.send("s", fragment("s", n, episode=f"e{n % 8}"))
    for name in ("c", "d"):
        bench.runner(name)
    taken = dict.fromkeys("abcd", 0)
    for n in range(41, 201):
        bench.send("s", fragment("s", n, episode=f"e{n % 8}"))
        if n % 8 == 0:  # together they take as much as comes
            for name in "abcd":
                mine = [f.header.number for f in bench.broker.runners[session(name)].leased][:2]
                bench.take(name, n, claim("s", *mine))
                taken[name] += len(mine)
    assert min(taken.values()) >= 35, taken


def test_f4_a_gap_in_an_episode_holds_nothing_up(alone: Bench) -> None:
    """Fragment 2 of 3 is stale. The runner sees the gap in `t0`, and gives RLlib the rest under another id."""
    alone.simulator("s")
    alone.weights("a", 5)
    sent = [fragment("s", n, episode="e", t0=10 * (n - 1), version=v) for n, v in ((1, 5), (2, 0), (3, 5))]
    got = [m for one in sent for m in alone.send("s", one)]
    assert got == [("a", sent[0]), ("a", sent[2])]
    assert [m.t0 for _, m in got] == [0, 20]


def test_f4_drain_is_bye(bench: Bench) -> None:
    for n in (1, 2):
        bench.send("s", fragment("s", n, episode=f"e{n}"))
    assert leases(bench.bye("a")) == [("b", "s", 1)]


# ---- F5: who has weights


def test_f5_whichever_runner_has_weights_publishes_them_so_nobody_waits_at_the_start(
    benches: Callable[..., Bench],
) -> None:
    """No runner is special: the local one never gets the first weights, nor any in APPO. The learner waits for
    samples, the simulators for weights, and any offer of version 0 unties that."""
    bench = benches()
    bench.trainer(runners=2)
    bench.runner("local")
    b = runner(bench, "b")
    s = simulator(bench, "s")
    s.endpoint.on_message = None
    assert (s.endpoint.version, bench.broker.published_version) == (-1, -1)
    b.endpoint.offer(0, len(WEIGHTS), lambda: WEIGHTS, bench.now)
    assert [type(m).__name__ for m in b.exchange()] == ["OFFER", "STATE"]
    assert bench.broker.weights == WEIGHTS
    bench.send("s", PING())
    s.read(bench.tick(0.01))
    assert s.endpoint.version == 0


def test_f5_lag_counts_learner_updates_not_publications(alone: Bench) -> None:
    """APPO publishes 74, 76, 78: two publications are four updates."""
    alone.simulator("s")
    for version in (74, 76):
        alone.weights("a", version)
        alone.wait(0.03)
    alone.send("s", fragment("s", 1, version=74))
    assert alone.acks() == {"s": [(1, "stale")]}


# ---- F6: what `sample()` may return

ROUND = SamplingRules("round", share=50, quota=100, timeout=60.0, linger=0.2)
STREAM = SamplingRules("stream", share=50, quota=500, timeout=60.0, linger=0.5)


def test_f6_an_answer_that_would_come_too_late_is_not_acked(alone: Bench) -> None:
    """RLlib throws away what comes after `sample_timeout_s`, unseen."""
    s, a = simulator(alone, "s"), runner(alone, "a")
    call = SampleCall(a.endpoint, ROUND, alone.now)
    submit(s)
    a.read(alone.send("s", s.lose()[0]))
    assert call.step(alone.now) is Next.WAIT
    (take,) = a.lose()
    alone.now += 58  # stopped
    a.read(alone.send("a", take))
    call.step(alone.now)
    assert call.leases == []
    a.endpoint.give_back(alone.now)
    a.exchange()
    assert alone.acks() == {"s": [(1, "late")]}


def test_f6_nothing_is_taken_in_the_second_half_of_the_timeout(alone: Bench) -> None:
    s, a = simulator(alone, "s"), runner(alone, "a")
    call = SampleCall(a.endpoint, ROUND, alone.now)
    call.step(alone.now)
    alone.now += 31
    submit(s)
    a.read(alone.send("s", s.lose()[0]))
    assert call.step(alone.now) is Next.WAIT
    assert a.endpoint.output == []


def test_f6_an_answer_that_may_have_been_late_is_neither_acked_nor_given_away(bench: Bench) -> None:
    s, a = simulator(bench, "s2"), runner(bench, "a")
    call = SampleCall(a.endpoint, ROUND, bench.now)
    submit(s)
    a.read(bench.send("s2", s.lose()[0]))
    call.step(bench.now)
    a.exchange()
    assert call.step(bench.now) is Next.WAIT
    assert call.step(call.wake) is Next.RETURN
    assert [x.message.number for x in call.leases] == [1]
    bench.now += 70  # stopped on its way back
    a.endpoint.give_back(bench.now)
    (returned,) = (o.message for o in a.endpoint.output)
    assert returned == RETURNED(1, [dropped("s2", 1, "handover_cut")])
    a.exchange()
    assert bench.acks() == {"s2": [(1, "handover_cut")]}


def test_f6_with_nothing_to_give_a_round_ends_only_when_others_make_progress(alone: Bench) -> None:
    """[] from all for ever would keep `train()` from returning; past the timeout it does."""
    a = runner(alone, "a")
    call = SampleCall(a.endpoint, ROUND, alone.now)
    assert call.step(alone.now + 59) is Next.WAIT
    assert call.step(alone.now + 60 + LATE) is Next.RETURN
    call = SampleCall(a.endpoint, ROUND, alone.now + 100)
    call.step(alone.now + 100)
    a.endpoint.receive(PONG(EPOCH, RUN, 0, taken_steps=10, round_steps=10), [], alone.now + 100)
    assert call.step(alone.now + 101) is Next.RETURN


def test_f6_a_stream_waits_instead_of_returning_nothing(alone: Bench) -> None:
    """APPO counts calls, and a package of empty lists ends the training."""
    a = runner(alone, "a")
    call = SampleCall(a.endpoint, STREAM, alone.now)
    assert {call.step(alone.now + seconds) for seconds in (0, 1, 100, 10_000)} == {Next.WAIT}


# ---- F7: credit


def test_f7_a_limit_that_is_lost_is_said_again(benches: Callable[..., Bench]) -> None:
    """An increment would be gone with its connection, and the simulator would wait for it for ever."""
    bench = training(benches(), steps_ahead=20)
    s = simulator(bench, "s")
    for _ in range(2):
        submit(s)
    s.exchange()
    assert not s.endpoint.room(0, 1)
    bench.take("r1", 1, claim("s", 1, 2))
    (ack,) = messages(bench.tick(0.01), ACK)
    assert ack.steps_limit == 40, "lost"
    s.reconnect()
    bench.unreachable("s")
    s.endpoint.tick(bench.now + s.endpoint.timing.ping)
    s.exchange()
    assert s.endpoint.steps_limit == 40
    assert s.endpoint.room(19, 1)


def test_f7_an_old_acks_limit_is_put_right(benches: Callable[..., Bench]) -> None:
    """What is left of the old connection may be read after WELCOME."""
    bench = training(benches(), steps_ahead=20)
    s = simulator(bench, "s")
    s.endpoint.receive(ACK([], 0, 1, 1), [], bench.now)
    assert not s.endpoint.room(0, 1)
    s.endpoint.tick(bench.now + s.endpoint.timing.ping)
    s.exchange()
    s.read(bench.tick(0.01))
    assert s.endpoint.room(19, 1)


def test_f7_steps_are_credited_when_taken_so_sampling_overlaps_with_learning(benches: Callable[..., Bench]) -> None:
    """RLlib takes a whole batch and trains for seconds; the acks come after that."""
    bench = training(benches(), quota=20, steps_ahead=20)
    s = simulator(bench, "s")
    for _ in range(2):
        submit(s)
    s.exchange()
    assert not s.endpoint.room(0, 1)
    bench.take("r1", 1, claim("s", 1, 2))
    s.read(bench.tick(0.01))
    assert (s.endpoint.settled_steps, s.endpoint.unsettled_steps) == (0, 20)
    assert s.endpoint.room(19, 1)


def test_f7_bytes_alone_would_not_hold_the_lag(benches: Callable[..., Bench]) -> None:
    """200 simulators with a window of 2 MB each may have no more than the steps of two updates on their way."""
    bench = training(benches(), quota=4000, lag_limit=2, steps_ahead=8000, fragment_steps=200)
    limits = [bench.simulator(f"s{n}").steps_limit for n in range(200)]
    said = [m for _, m in bench.tick(0.01) if isinstance(m, ACK)]
    assert limits[-1] == 40
    assert not said or {m.steps_limit for m in said} == {40}
    assert bench.simulator("s0/b").fragment_steps == 20


def test_f7_a_window_holds_two_of_the_largest_fragments_or_nothing(benches: Callable[..., Bench]) -> None:
    bench = benches(fragment_bytes=300, memory=1000)
    s = simulator(bench, "s")
    assert (s.endpoint.fragment_bytes, s.endpoint.window) == (300, 600)
    assert s.endpoint.room(0, 300)


def test_f7_a_hundred_that_join_at_once_get_no_more_than_there_is(benches: Callable[..., Bench]) -> None:
    bench = benches(fragment_bytes=100, memory=10_000)
    welcomes = [bench.simulator(f"s{n}", spaces=None) for n in range(100)]
    assert sum(w.window for w in welcomes) == 10_000
    assert {w.window for w in welcomes} == {0, 200}
    assert all(w.text.startswith("no window is free") for w in welcomes if not w.window)


# ---- F8: liveness


def test_f8_after_a_pause_of_the_broker_everything_is_read_before_anybody_is_judged(bench: Bench) -> None:
    """All its deadlines have passed. The loop drains both sockets, then comes Tick."""
    bench.send("s", fragment("s", 1))
    bench.take("a", 1, claim("s", 1))
    bench.now += 60
    for name in ("a", "b", "s", "t"):
        bench.send(name, PING())
    said = bench.tick()
    assert [to for to, m in said if isinstance(m, REFUSED)] == []
    assert {p.state for p in (*bench.broker.runners.values(), *bench.broker.simulators.values())} == {peers.State.LIVE}
    bench.returned("a", 1)
    assert bench.acks() == {"s": [(1, "delivered")]}


def test_f8_idle_runners_keep_their_leases_during_a_long_update(bench: Bench) -> None:
    """Liveness is a peer's, not a lease's: nobody calls `sample()` for minutes."""
    bench.send("s", fragment("s", 1))
    for _ in range(120):
        for name in ("a", "b", "t"):
            bench.send(name, PING())
        assert leases(bench.wait(1.0)) == []
    assert bench.take("a", 1, claim("s", 1)) == [("a", TAKEN(1, [], 0, 10, 10, 1, 2, 10))]


def test_f8_a_lost_connection_is_not_a_lost_process(bench: Bench) -> None:
    """Untaken leases move at once (TAKE fences them); taken ones wait for the session to greet again."""
    for n, episode in ((1, "x"), (2, "y"), (3, "x")):
        bench.send("s", fragment("s", n, episode=episode))
    bench.take("a", 1, claim("s", 1))
    assert leases(bench.unreachable("a")) == [("b", "s", 3)]
    bench.send("b", PING())
    bench.wait(9.5)
    bench.runner("a/new", committed=1)
    bench.wait(5)
    bench.returned("a/new", 1)
    assert bench.acks() == {"s": [(1, "delivered")]}


# ---- F9: weights to the busy, the slow and the many


def test_f9_a_late_joiner_pulls_what_was_published_before_it_came(alone: Bench) -> None:
    s = simulator(alone, "s")
    assert s.endpoint.version == 0
    assert alone.send("s", GET_STATE(RUN, 0))[0][1].size == len(WEIGHTS) + 1


def test_f9_the_busy_get_the_newest_not_the_oldest(alone: Bench) -> None:
    """Eight versions while a subscriber is busy: it asks for one that is no more, and gets the last."""
    alone.simulator("s")
    for version in range(1, 9):
        alone.weights("a", version)
        alone.wait(0.03)
    ((_, state),) = alone.send("s", GET_STATE(RUN, 3, CHUNK_BYTES))
    assert (state.version, state.offset) == (8, 0)


def test_f9_a_puller_goes_on_where_it_stopped(benches: Callable[..., Bench]) -> None:
    bench = training(benches())
    bench.simulator("s")
    data = bytes(2 * CHUNK_BYTES)
    bench.send("r1", OFFER(RUN, 1, len(data)))
    crc = zlib.crc32(data)
    for offset in (0, CHUNK_BYTES):
        bench.send("r1", STATE(RUN, 1, len(data), offset, crc), data[offset : offset + CHUNK_BYTES])
    assert bench.send("s", GET_STATE(RUN, 1, 0))[0][1].offset == 0
    bench.unreachable("s")
    bench.simulator("s/new")
    assert bench.send("s/new", GET_STATE(RUN, 1, CHUNK_BYTES))[0][1].offset == CHUNK_BYTES


def publish(bench: Bench, version: int) -> None:
    """Weights of three pieces."""
    data = bytes([version]) * (3 * CHUNK_BYTES)
    bench.send("a", OFFER(RUN, version, len(data)))
    for offset in range(0, len(data), CHUNK_BYTES):
        piece = data[offset : offset + CHUNK_BYTES]
        bench.send("a", STATE(RUN, version, len(data), offset, zlib.crc32(data)), piece)


def pulled(bench: Bench, name: str, version: int, piece: int) -> tuple[int, int]:
    """Version and piece of the answer to a request for a piece."""
    ((_, state),) = bench.send(name, GET_STATE(RUN, version, piece * CHUNK_BYTES))
    return state.version, state.offset // CHUNK_BYTES


def test_f9_a_slow_puller_gets_to_the_end_though_versions_come_faster(alone: Bench) -> None:
    """A version every 0.5 s, a piece a second: the transfer that has begun is served to its end, then the newest."""
    alone.simulator("s")
    publish(alone, 1)
    got = []
    for i in range(3):
        got.append(pulled(alone, "s", 1, i))
        for version in (2 + 2 * i, 3 + 2 * i):
            alone.wait(0.5)
            publish(alone, version)
    assert got == [(1, 0), (1, 1), (1, 2)]
    assert pulled(alone, "s", -1, 0) == (7, 0)
    for _ in range(3):
        alone.wait(TRANSFER_IDLE / 3 + 1)
        alone.send("a", PING())
    publish(alone, 8)
    assert pulled(alone, "s", 1, 1) == (8, 0)


def test_f9_slow_pullers_that_began_at_different_versions_all_get_to_the_end(alone: Bench) -> None:
    """Of as many versions as are kept beside the newest; whoever is one too many begins again with the newest."""
    names = [f"s{i}" for i in range(KEPT + 1)]
    for name in names:
        alone.simulator(name)
    for version, name in enumerate(names, 1):
        publish(alone, version)
        assert pulled(alone, name, -1, 0) == (version, 0)
        alone.wait(0.5)
    newest = len(names) + 1
    publish(alone, newest)
    for version, name in enumerate(names, 1):
        kept = version <= KEPT
        assert [pulled(alone, name, version, i) for i in (1, 2)] == (
            [(version, 1), (version, 2)] if kept else [(newest, 0)] * 2
        )


# ---- F10: two trainers, old runs


def test_f10_a_second_trainer_is_refused_while_the_first_is_connected(bench: Bench) -> None:
    said = bench.hello("t2", terms(NEXT_RUN))
    ((to, refusal),) = [(to, m) for to, m in said if isinstance(m, REFUSED)]
    assert (to, refusal.code, refusal.fatal) == ("t2", "trainer_present", False)
    assert bench.broker.run == RUN


def test_f10_the_runners_of_an_old_trainer_neither_take_nor_publish(bench: Bench) -> None:
    """It was stopped, its connection died, a new one began; it goes on."""
    bench.send("s", fragment("s", 1))
    bench.take("a", 1, claim("s", 1))
    bench.send("s", fragment("s", 2))
    bench.unreachable("t")
    bench.now += 1
    bench.trainer("t2", NEXT_RUN)
    assert sorted(bench.acks()["s"]) == [(1, "handover_cut"), (2, "old_run")]
    for message in (TAKE(2, [claim("s", 2)]), OFFER(RUN, 9, 16)):
        assert bench.send("a", message) == [("a", REFUSED("greet", "send HELLO first"))]
    ((_, refusal),) = bench.hello("a", RunnerHello(RUN, committed=1))
    assert (refusal.code, refusal.fatal) == ("old_run", True)
    assert [m.code for m in messages(bench.hello("t", terms(RUN)), REFUSED)] == ["trainer_present"]
    bench.bye("t2")
    assert [m.code for m in messages(bench.hello("t", terms(RUN)), REFUSED)] == ["old_run"]
    assert (bench.broker.version, bench.broker.published_version) == (-1, -1)


def test_f10_a_runner_of_a_run_whose_trainer_is_yet_to_come_takes_nothing(bench: Bench) -> None:
    bench.runner("c", NEXT_RUN)
    bench.send("s", fragment("s", 1))
    said = bench.take("c", 1, claim("s", 1))
    assert said[0] == ("c", TAKEN(1, [claim("s", 1)], 0, 0, 0, 1, 2))
    assert bench.send("c", OFFER(NEXT_RUN, 3, 16)) in ([], [("c", REFUSED("greet", "send HELLO first"))])
    assert bench.broker.version == 0


def test_f10_fragments_of_an_old_run_are_dropped_by_their_header(bench: Bench) -> None:
    bench.bye("t")
    bench.trainer("t2", NEXT_RUN)
    bench.runner("c", NEXT_RUN)
    bench.send("s", fragment("s", 1, run=RUN))
    bench.send("s", fragment("s", 2, run=NEXT_RUN))
    assert bench.acks() == {"s": [(1, "old_run")]}


# ---- F11: the ledger


def test_f11_the_ledger_counts_what_this_broker_received(bench: Bench, restarted: Bench) -> None:
    """What a dead simulator had in its socket nobody knows; what was resent is received by each broker."""
    bench.send("s", fragment("s", 1))
    restarted.simulator("s")
    restarted.send("s", fragment("s", 1))
    for one in (bench, restarted):
        assert one.ledger() == {"received": 1, "delivered": 0, "in_flight": 1}


def test_f11_repeats_are_not_received_again(bench: Bench) -> None:
    for _ in range(3):
        bench.send("s", fragment("s", 1))
    bench.take("a", 1, claim("s", 1))
    bench.returned("a", 1)
    for _ in range(3):
        bench.send("s", fragment("s", 1))
    assert bench.ledger() == {"received": 1, "delivered": 1, "in_flight": 0}


def test_f11_drops_at_the_simulator_are_totals_so_a_repeat_adds_nothing(bench: Bench) -> None:
    for _ in range(3):
        bench.send("s", fragment("s", 1, dropped={"no_window": (2, 20)}))
    assert bench.broker.status(bench.now)["dropped_at_simulators"] == {"no_window": {"fragments": 2, "steps": 20}}


def test_a_greeting_without_anything_new_is_harmless(bench: Bench) -> None:
    for _ in range(3):
        assert messages(bench.hello("s", SimulatorHello(spaces=SPACES)), WELCOME)
        assert messages(bench.hello("a", RunnerHello(RUN)), WELCOME)
        assert messages(bench.hello("t", terms(runners=2)), WELCOME)
    assert bench.broker.published_version == 0


# ---- scaling


def test_a_runner_that_leaves_is_done_when_its_last_claim_was_refused(alone: Bench) -> None:
    """Its leases went to others while its TAKE was on the way. No answer with nothing in it will ever be returned."""
    a = runner(alone, "a")
    session_ = a.endpoint
    session_.receive(fragment("s1", 1), [b""], alone.now)
    session_.take(10, alone.now)
    session_.receive(TAKEN(session_.k, [claim("s1", 1)], 0), [], alone.now)
    assert session_.taken == []
    assert session_.returned == session_.committed == session_.k


def test_what_was_handed_over_is_owed_whatever_is_refused_after_it(alone: Bench) -> None:
    a = runner(alone, "a").endpoint
    for number in (1, 2):
        a.receive(fragment("s1", number), [b""], alone.now)
    a.take(10, alone.now)
    a.receive(TAKEN(a.k, [], 0), [], alone.now)
    first = a.k
    a.take(10, alone.now)
    a.receive(TAKEN(a.k, [claim("s1", 2)], 0), [], alone.now)
    assert a.returned < first < a.committed, "RLlib may not have the first one yet"
    a.give_back(alone.now, first)
    assert a.returned == a.committed, "and then it has all that there is"


def test_a_new_broker_knows_of_no_other_duty_than_to_serve(bench: Bench) -> None:
    """It was parked by the broker of the time before; by now it is to serve, which no DUTY says."""
    a = runner(bench, "a")
    a.endpoint.receive(DUTY("park"), [], bench.now)
    a.endpoint.receive(REFUSED("greet", "send HELLO first"), [], bench.now)
    assert [type(m).__name__ for m in a.exchange()] == ["HELLO"]
    assert a.endpoint.state is State.LIVE
    assert a.endpoint.duty == "serve"


def test_after_a_restart_runners_that_are_leaving_report_too(benches: Callable[..., Bench]) -> None:
    """It counts in no pool, and what it handed over would go to another one."""
    bench = benches(epoch=b"epoch 02")
    bench.hello("t", msgspec.structs.replace(terms(runners=1), duties=[Assigned(session("b"), "leave")]))
    bench.simulator("s")
    bench.runner("a")
    bench.send("s", fragment("s", 1))
    assert bench.broker.runners[session("a")].leased == {}
    bench.hello("b", RunnerHello(RUN, committed=1, returned=1, handed=[handed_over("s", {1: 1})]))
    assert bench.acks() == {"s": [(1, "delivered")]}


def test_after_a_restart_the_runners_of_before_are_waited_for_though_fewer_are_wanted_now(restarted: Bench) -> None:
    restarted.trainer(runners=1)
    restarted.simulator("s")
    restarted.runner("a")
    restarted.send("s", fragment("s", 1))
    assert restarted.broker.runners[session("a")].leased == {}
    assert leases(restarted.wait(4.0)) != []


def test_the_weights_of_a_parked_runner_are_weights(benches: Callable[..., Bench]) -> None:
    """Scaled to 0 before any simulator had weights: nobody would ever offer them again."""
    bench = benches()
    bench.trainer(runners=1)
    bench.hello("a", RunnerHello(RUN))
    bench.send("t", POOL([Assigned(session("a"), "park")]))
    assert GET_STATE(RUN, 0, 0) in [m for _, m in bench.send("a", OFFER(RUN, 0, len(WEIGHTS)))]
