"""The broker's core: these events, exactly these actions. No sockets, no clock; every test ends with all invariants."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
from core_bench import (
    BLOB,
    EPOCH,
    NEXT_RUN,
    POLICY,
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

from broker import fragments, peers
from broker.events import Forward, Received, Send, Side
from broker.fragments import Fragment, Ledger
from broker.peers import Simulator
from broker.settings import MiB, Settings
from rllink_zmq.messages import (
    ACK,
    BYE,
    CONFIG,
    DUTY,
    FRAGMENT,
    GET_CONFIG,
    GET_STATE,
    HELLO,
    OFFER,
    PING,
    PONG,
    POOL,
    PROTOCOL_VERSION,
    REFUSED,
    RETURNED,
    STATE,
    TAKE,
    TAKEN,
    WELCOME,
    Assigned,
    BoxSpace,
    DiscreteSpace,
    Handed,
    ObserverHello,
    ReaderHello,
    RunnerHello,
    SimulatorHello,
    Spaces,
)
from rllink_zmq.transfer import CHUNK_BYTES


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    return benches()


@pytest.fixture
def trained(benches: Callable[..., Bench]) -> Bench:
    """A trainer "t", a runner "r1", weights 0, the policy, and a simulator "s1"."""
    bench = training(benches())
    bench.simulator("s1")
    return bench


@pytest.fixture
def pair(benches: Callable[..., Bench]) -> Bench:
    """The same with two runners, "r1" and "r2"."""
    bench = training(benches(), ("r1", "r2"))
    bench.simulator("s1")
    return bench


# ---- tables


@pytest.mark.parametrize("state", fragments.State)
@pytest.mark.parametrize("verb", fragments.Verb)
def test_every_move_of_a_fragment_is_listed_or_an_error(state: fragments.State, verb: fragments.Verb) -> None:
    one = Fragment(Simulator(session("s"), 0.0), fragment("s", 1), (), 0)
    one.state = state
    if (state, verb) in fragments.TABLE:
        one.move(verb)
        assert one.state is fragments.TABLE[state, verb]
    else:
        with pytest.raises(KeyError):
            one.move(verb)


@pytest.mark.parametrize("state", peers.State)
@pytest.mark.parametrize("verb", peers.Verb)
def test_every_move_of_a_peer_is_listed_or_an_error(state: peers.State, verb: peers.Verb) -> None:
    peer = peers.Peer(session("p"), 0.0)
    peer.state = state
    if (state, verb) in peers.TABLE:
        peer.move(verb, 5.0)
        assert (peer.state, peer.since) == (peers.TABLE[state, verb], 5.0)
    else:
        with pytest.raises(KeyError):
            peer.move(verb, 5.0)


def test_nothing_leaves_settled() -> None:
    assert not [key for key in fragments.TABLE if key[0] is fragments.State.SETTLED]


def test_a_taken_fragment_goes_back_only_untaken_by_its_own_runner() -> None:
    ways = {verb for (state, verb), to in fragments.TABLE.items() if state is fragments.State.TAKEN}
    assert ways == {fragments.Verb.UNTAKE, fragments.Verb.RETURN, fragments.Verb.CUT}


def test_the_ledger_balances_in_fragments_and_in_steps() -> None:
    ledger = Ledger()
    ledger.receive(10)
    ledger.receive(5)
    ledger.settle(10, "delivered")
    ledger.settle(5, "stale")
    assert ledger.balanced()
    assert ledger.as_json() == {
        "received": {"fragments": 2, "steps": 15},
        "delivered": {"fragments": 1, "steps": 10},
        "in_flight": {"fragments": 0, "steps": 0},
        "dropped": {"stale": {"fragments": 1, "steps": 5}},
    }
    ledger.delivered[0] += 1
    assert not ledger.balanced()


# ---- greetings


def test_a_simulator_is_welcomed_with_its_window(bench: Bench) -> None:
    assert bench.hello("s1", SimulatorHello(spaces=SPACES)) == [
        ("s1", WELCOME(EPOCH, 1, 1 * MiB, 2 * MiB, 1, 1, "", -1, "", "tcp://127.0.0.1:5557", None, ""))
    ]
    assert bench.broker.simulators_live == 1


def test_a_simulator_of_a_training_learns_of_it(trained: Bench) -> None:
    welcome = trained.simulator("s2")
    assert (welcome.run, welcome.version, welcome.policy) == (RUN, 0, POLICY)
    assert (welcome.steps_limit, welcome.fragment_steps, welcome.spaces) == (0, 50, SPACES)


def test_a_runner_a_trainer_and_an_observer_are_welcomed(bench: Bench) -> None:
    assert bench.runner("r1").window == 0
    assert bench.trainer().run == RUN
    (welcome,) = [m for _, m in bench.hello("o", ObserverHello())]
    assert welcome.spaces == SPACES


def test_another_version_of_the_package_is_no_obstacle(bench: Bench) -> None:
    """A broker that is restarted with a newer package meets everybody else's older one: what counts is the protocol."""
    for name, peer in (("s1", SimulatorHello()), ("r1", RunnerHello(RUN)), ("t", terms()), ("s2", ReaderHello())):
        said = bench.send(name, HELLO(PROTOCOL_VERSION, session(name), 1, peer, name, "99.0"))
        assert len(messages(said, WELCOME, name)) == 1
    assert not [log for log in bench.logs if "99.0" in log]


def test_a_reader_gets_policy_and_weights_and_is_no_simulator(trained: Bench) -> None:
    (welcome,) = messages(trained.hello("s9", ReaderHello()), WELCOME)
    assert (welcome.window, welcome.version, welcome.policy) == (0, 0, POLICY)
    assert trained.send("s9", GET_CONFIG(POLICY))[0][1] == CONFIG(POLICY, len(BLOB))
    (state,) = messages(trained.send("s9", GET_STATE()), STATE, "s9")
    assert (state.run, state.version) == (RUN, 0)
    assert messages(trained.send("s9", PING()), PONG, "s9")[0].version == 0
    assert trained.broker.status(trained.now)["simulators"] == 1
    (refused,) = messages(trained.send("s9", fragment("s9", 1)), REFUSED)
    assert refused.text == "only a simulator sends FRAGMENT"
    trained.bye("s9")
    assert b"s9" not in trained.broker.routes[Side.FRONT]
    trained.broker.check_invariants()


def test_an_observer_is_told_the_spaces_of_the_first_simulator(bench: Bench) -> None:
    assert messages(bench.hello("o", ObserverHello()), WELCOME)[0].spaces is None
    bench.simulator("s0", spaces=None)
    bench.simulator("s1")
    assert messages(bench.hello("o", ObserverHello()), WELCOME)[0].spaces == SPACES


def test_a_greeting_that_is_not_newer_changes_nothing(trained: Bench) -> None:
    trained.simulator("s1")
    before = trained.broker.simulators[session("s1")].route
    for greeting in (1, 2):
        assert trained.hello("s1/old", SimulatorHello(base=1), greeting=greeting) == []
        assert trained.hello("r1/old", RunnerHello(RUN, committed=5), greeting=1) == []
    assert trained.hello("t/old", terms(), greeting=1) == []
    assert trained.broker.simulators[session("s1")].route == before


def test_a_newer_greeting_on_another_connection_ends_the_old_one(trained: Bench) -> None:
    trained.simulator("s1/b")
    (refusal,) = trained.send("s1", PING())
    assert refusal == ("s1", REFUSED("greet", "send HELLO first"))
    assert trained.send("s1/b", PING()) == []
    assert messages(trained.tick(0.01), ACK, "s1/b")
    assert trained.broker.simulators_live == 1


def test_another_session_on_the_same_connection_takes_it_over(trained: Bench) -> None:
    trained.send("s1", HELLO(1, session("s9"), 1, SimulatorHello(spaces=SPACES)))
    assert trained.broker.simulators[session("s1")].state is peers.State.LOST
    assert trained.broker.simulators_live == 1


# ---- refusals


@pytest.mark.parametrize("message", [PING(), fragment("s1", 1), BYE(), GET_STATE(), TAKE(1, []), RETURNED(1)])
def test_a_stranger_must_greet(bench: Bench, message: Any) -> None:
    assert bench.send("s1", message) == [("s1", REFUSED("greet", "send HELLO first"))]


def test_another_protocol_is_refused(bench: Bench) -> None:
    ((_, refusal),) = bench.hello("s1", SimulatorHello(), protocol=2)
    assert refusal == REFUSED(
        "protocol",
        "this broker speaks protocol 1, the peer (package 0.1.0) speaks 2: install the same version of rllink-zmq on "
        "both",
        True,
        1,
    )


@pytest.mark.parametrize(
    ("name", "hello", "text"),
    [
        ("r1", SimulatorHello(), "a simulator must connect to the broker's frontend, this is the backend"),
        ("s1", RunnerHello(RUN), "a runner must connect to the broker's backend, this is the frontend"),
        ("s1", terms(), "a trainer must connect to the broker's backend, this is the frontend"),
        ("r1", ReaderHello(), "a reader must connect to the broker's frontend, this is the backend"),
        ("s1", ObserverHello(), "an observer must connect to the broker's backend, this is the frontend"),
    ],
)
def test_the_wrong_socket_is_named(bench: Bench, name: str, hello: Any, text: str) -> None:
    assert bench.hello(name, hello) == [(name, REFUSED("wrong_socket", text, True, 1))]


def test_a_step_that_fits_into_no_fragment_is_refused(benches: Callable[..., Bench]) -> None:
    bench = benches(fragment_bytes=30, memory=100)
    ((_, refusal),) = bench.hello("s1", SimulatorHello(spaces=SPACES))
    assert (refusal.code, refusal.fatal) == ("too_large", True)
    assert refusal.text == (
        "one step of this simulator takes 40 bytes, a fragment may have 30: start the broker with a larger "
        "--fragment-bytes"
    )


@pytest.mark.parametrize(
    ("spaces", "text"),
    [
        (
            Spaces(BoxSpace((3,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(2)),
            "the trainer's observation space is Box(-1, 1, [4], f4), this simulator's is Box(-1, 1, [3], f4)",
        ),
        (
            Spaces(SPACES.observation, DiscreteSpace(3, 1)),
            "the trainer's action space is Discrete(2), this simulator's is Discrete(3, start=1)",
        ),
    ],
)
def test_other_spaces_than_the_trainers_are_refused(trained: Bench, spaces: Spaces, text: str) -> None:
    ((_, refusal),) = trained.hello("s2", SimulatorHello(spaces=spaces))
    assert (refusal.code, refusal.fatal, refusal.greeting) == ("spaces", True, 1)
    assert refusal.text == f"{text}: start the simulator with the environment that the trainer was given"


def test_simulators_are_told_of_a_runs_first_weights(bench: Bench) -> None:
    """One that has connected a moment before may not have heard them being published."""
    bench.simulator("s1")
    bench.hello("t", terms())
    bench.runner("r1")
    bench.wait(1.0)
    bench.send("r1", OFFER(RUN, 0, len(WEIGHTS)))
    said = bench.send("r1", state_of(0, WEIGHTS), WEIGHTS) + bench.wait(0.1)
    assert [m.version for to, m in said if to == "s1" and isinstance(m, ACK)] == [0]


def test_bounds_of_observations_do_not_matter(trained: Bench) -> None:
    trained.simulator("s2", spaces=Spaces(BoxSpace((4,), "<f4", (-9.0,), (9.0,)), DiscreteSpace(2)))


def test_a_simulator_that_does_not_fit_is_expelled_when_a_trainer_comes(bench: Bench) -> None:
    bench.simulator("s1", spaces=Spaces(SPACES.observation, DiscreteSpace(5)))
    bench.simulator("s2")
    said = bench.hello("t", terms())
    ((to, refusal),) = [(to, m) for to, m in said if isinstance(m, REFUSED)]
    assert (to, refusal.code, refusal.fatal) == ("s1", "spaces", True)
    assert bench.broker.simulators_live == 1


def test_frames_that_are_no_message_are_refused_and_counted(trained: Bench) -> None:
    assert trained.malformed("s1", "expected a header") == [("s1", REFUSED("malformed", "expected a header"))]
    assert trained.broker.malformed == 1


@pytest.mark.parametrize("code", ["malformed", "too_large"])
def test_strangers_who_send_rubbish_are_answered_once_a_second(bench: Bench, code: str) -> None:
    assert [len(bench.malformed(name, code=code)) for name in ("s1", "s2", "s1")] == [1, 0, 0]
    bench.now += 1.0
    assert len(bench.malformed("s2")) == 1
    assert bench.broker.malformed == 4


@pytest.mark.parametrize(
    ("name", "message", "text"),
    [
        ("r1", fragment("r1", 1), "only a simulator sends FRAGMENT"),
        ("s1", TAKE(1, []), "only a runner sends TAKE"),
        ("t", RETURNED(1), "only a runner sends RETURNED"),
        ("t", OFFER(RUN, 1, 1), "only a runner sends OFFER"),
        ("s1", PONG(EPOCH), "a PONG is for peers, not for the broker"),
        ("r1", TAKEN(1), "a TAKEN is for peers, not for the broker"),
        ("s1", ACK([], 0, 0, 1), "an ACK is for peers, not for the broker"),
    ],
)
def test_a_message_of_another_role_is_refused(trained: Bench, name: str, message: Any, text: str) -> None:
    ((to, refusal),) = trained.send(name, message)
    assert (to, refusal.code, refusal.fatal) == (name, "unexpected", False)
    assert refusal.text == text


def test_a_fragment_of_another_session_is_refused(trained: Bench) -> None:
    assert trained.send("s1", fragment("s2", 1)) == [
        ("s1", REFUSED("malformed", "this fragment names another session"))
    ]


def test_a_fragment_below_its_own_base_is_refused(trained: Bench) -> None:
    ((_, refusal),) = trained.send("s1", fragment("s1", 3, base=4))
    assert (refusal.code, refusal.fatal) == ("malformed", False)
    assert trained.ledger()["received"] == 0


def test_a_fragment_whose_body_is_wrong_is_settled_and_named(trained: Bench) -> None:
    said = trained.malformed("s1", "its columns lie", message=fragment("s1", 1))
    assert messages(said, REFUSED)[0].text == "fragment 1 of s1: its columns lie"
    assert trained.acks() == {"s1": [(1, "malformed")]}


def test_refusals_are_logged_once_a_second(bench: Bench) -> None:
    for _ in range(5):
        bench.hello("s1", SimulatorHello(), protocol=9)
    assert len(bench.logs) == 1


# ---- a fragment's way


def test_a_fragment_is_leased_taken_returned_and_acked(trained: Bench) -> None:
    sent = fragment("s1", 1)
    assert trained.send("s1", sent) == [("r1", sent)]
    assert trained.take("r1", 1, claim("s1", 1)) == [("r1", TAKEN(1, [], 0, 10, 10, 1, 1, 10))]
    assert trained.ledger() == {"received": 1, "delivered": 0, "in_flight": 1}
    assert trained.returned("r1", 1) == []
    assert trained.tick(0.01) == [("s1", ACK([(1, "delivered")], 2 * MiB, 0, 50, RUN, 0, POLICY, sampled=10))]
    assert trained.ledger() == {"received": 1, "delivered": 1, "in_flight": 0}
    assert trained.broker.held_bytes == 0


def test_the_frames_are_forwarded_unchanged(trained: Bench) -> None:
    frames = [b"header", b"body", b"more"]
    (action,) = trained.broker.handle(Received(Side.FRONT, b"s1", fragment("s1", 1), frames, 11), trained.now)
    assert isinstance(action, Forward)
    assert action.frames is frames


def test_returned_names_what_rllib_did_not_get(trained: Bench) -> None:
    for n in (1, 2, 3):
        trained.send("s1", fragment("s1", n))
    trained.take("r1", 1, claim("s1", 1, 2, 3))
    trained.returned("r1", 1, dropped("s1", 2, "malformed"))
    assert trained.acks() == {"s1": [(1, "delivered"), (2, "malformed"), (3, "delivered")]}


def test_returned_covers_all_takes_up_to_it(trained: Bench) -> None:
    for n in (1, 2, 3):
        trained.send("s1", fragment("s1", n))
        trained.take("r1", n, claim("s1", n))
    trained.returned("r1", 2)
    assert trained.acks() == {"s1": [(1, "delivered"), (2, "delivered")]}
    trained.returned("r1", 1)
    assert trained.acks() == {}


def test_a_take_says_what_was_returned_too(trained: Bench) -> None:
    for n in (1, 2):
        trained.send("s1", fragment("s1", n))
    trained.take("r1", 1, claim("s1", 1))
    trained.take("r1", 2, claim("s1", 2), returned=1)
    assert trained.acks() == {"s1": [(1, "delivered")]}


def test_take_grants_only_what_is_leased_to_that_runner(pair: Bench) -> None:
    pair.send("s1", fragment("s1", 1))
    assert pair.take("r2", 1, claim("s1", 1, 2), claim("s7", 1)) == [
        ("r2", TAKEN(1, [claim("s1", 1, 2), claim("s7", 1)], 0, 0, 0, 1, 2))
    ]
    assert pair.take("r1", 1, claim("s1", 1)) == [("r1", TAKEN(1, [], 0, 10, 10, 1, 2, 10))]
    assert pair.take("r1", 2, claim("s1", 1)) == [("r1", TAKEN(2, [claim("s1", 1)], 0, 10, 10, 1, 2, 10))]


def test_acks_wait_ten_milliseconds_and_carry_many(trained: Bench) -> None:
    for n in (1, 2, 3):
        trained.send("s1", fragment("s1", n))
        trained.take("r1", n, claim("s1", n))
    began = trained.now
    for n in (1, 2, 3):
        trained.returned("r1", n)
        trained.now += 0.003
    assert trained.broker.next_deadline() == began + 0.01
    assert trained.tick() == []
    trained.now = began + 0.01
    (ack,) = messages(trained.tick(), ACK)
    assert [n for n, _ in ack.settled] == [1, 2, 3]


def test_due_acks_go_out_without_any_judgement(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1, version=0, run="00"))
    trained.now += 100
    flushed = [trained._plain(a) for a in trained.broker.flush_due(trained.now)]
    assert [(to, m.settled) for to, m in filter(None, flushed)] == [("s1", [(1, "old_run")])]
    assert trained.broker.flush_due(trained.now) == []
    assert trained.broker.runners[session("r1")].state is peers.State.LIVE


def test_a_repeat_in_flight_is_ignored(trained: Bench) -> None:
    sent = fragment("s1", 1)
    trained.send("s1", sent)
    assert trained.send("s1", sent) == []
    trained.take("r1", 1, claim("s1", 1))
    assert trained.send("s1", sent) == []
    assert trained.ledger()["received"] == 1
    assert trained.acks() == {}


def test_a_repeat_of_a_settled_one_is_answered_with_its_outcome(trained: Bench) -> None:
    for n in (1, 2):
        trained.send("s1", fragment("s1", n))
    trained.take("r1", 1, claim("s1", 1, 2))
    trained.returned("r1", 1, dropped("s1", 2, "malformed"))
    trained.acks()
    for n in (1, 2):
        trained.send("s1", fragment("s1", n))
    assert trained.acks() == {"s1": [(1, "delivered"), (2, "malformed")]}
    assert trained.ledger()["received"] == 2


def test_below_the_base_everything_is_forgotten(trained: Bench) -> None:
    sim = trained.broker.simulators[session("s1")]
    for n in (1, 2, 3):
        trained.send("s1", fragment("s1", n))
    trained.take("r1", 1, claim("s1", 1, 2, 3))
    trained.returned("r1", 1)
    assert set(sim.outcomes) == {1, 2, 3}
    trained.send("s1", fragment("s1", 4, base=3))
    assert set(sim.outcomes) == {3}
    trained.acks()
    trained.send("s1", fragment("s1", 2, base=3))
    assert trained.acks() == {}, "the simulator has said that it knows"
    trained.send("s1", fragment("s1", 10, base=10))
    assert sim.outcomes == {}


def test_numbers_need_to_rise_not_to_be_consecutive(trained: Bench) -> None:
    for n in (3, 4, 9):
        assert leases(trained.send("s1", fragment("s1", n, base=3))) == [("r1", "s1", n)]


def test_drops_at_the_simulator_are_totals(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1, dropped={"window_full": (3, 30)}))
    trained.send("s1", fragment("s1", 2, dropped={"window_full": (5, 50)}))
    assert trained.broker.status(trained.now)["dropped_at_simulators"] == {"window_full": {"fragments": 5, "steps": 50}}


def test_a_fragment_larger_than_allowed_is_dropped(benches: Callable[..., Bench]) -> None:
    bench = training(benches(fragment_bytes=100, memory=1000))
    bench.simulator("s1")
    assert leases(bench.send("s1", fragment("s1", 1, steps=99))) == [("r1", "s1", 1)]
    bench.send("s1", fragment("s1", 2, steps=100))
    assert bench.acks() == {"s1": [(2, "too_large")]}


def test_what_is_compressed_may_not_hold_more_than_a_fragment_may(benches: Callable[..., Bench]) -> None:
    """The window counts what travels; what it becomes at the runner is bounded as for all others."""
    bench = training(benches(fragment_bytes=100, memory=1000))
    bench.simulator("s1")
    small = fragment("s1", 1, steps=99, compression="zstd")
    assert leases(bench.send("s1", small, b"7 bytes")) == [("r1", "s1", 1)]
    assert bench.broker.held_bytes == 7
    bench.send("s1", fragment("s1", 2, steps=100, compression="zstd"), b"7 bytes")
    assert bench.acks() == {"s1": [(2, "too_large")]}


def test_what_is_far_over_the_window_is_dropped(benches: Callable[..., Bench]) -> None:
    """One fragment of tolerance: the window may have shrunk while it travelled."""
    bench = training(benches(fragment_bytes=100, memory=1000, lease_bytes=10))
    bench.simulator("s1")
    for n in (1, 2, 3, 4):
        bench.send("s1", fragment("s1", n, steps=99))
    assert bench.acks() == {"s1": [(4, "over_window")]}


# ---- leasing


def test_nothing_is_leased_without_a_trainer_or_a_runner(bench: Bench) -> None:
    bench.simulator("s1")
    assert leases(bench.send("s1", fragment("s1", 1))) == []
    bench.runner("r1")
    bench.wait(10)
    assert bench.ledger()["in_flight"] == 1
    assert leases(bench.hello("t", terms())) == [("r1", "s1", 1)]


def test_fragments_are_leased_oldest_first(bench: Bench) -> None:
    bench.trainer()
    bench.simulator("s1")
    bench.simulator("s2")
    bench.send("s1", fragment("s1", 1))
    bench.send("s2", fragment("s2", 1))
    bench.send("s1", fragment("s1", 2))
    assert leases(bench.hello("r1", RunnerHello(RUN))) == [("r1", "s1", 1), ("r1", "s2", 1), ("r1", "s1", 2)]


def test_a_full_runner_gets_no_more_until_it_takes(benches: Callable[..., Bench]) -> None:
    bench = training(benches(lease_bytes=25))
    bench.simulator("s1")
    got = [leases(bench.send("s1", fragment("s1", n))) for n in (1, 2, 3, 4)]
    assert got == [[("r1", "s1", 1)], [("r1", "s1", 2)], [], []]
    assert leases(bench.take("r1", 1, claim("s1", 1))) == [("r1", "s1", 3)]


def test_episodes_are_balanced_and_their_fragments_follow(pair: Bench) -> None:
    got = []
    for n, episode in ((1, "a"), (2, "b"), (3, "a"), (4, "b")):
        got += leases(pair.send("s1", fragment("s1", n, episode=episode)))
    assert [runner for runner, _, _ in got] == ["r1", "r2", "r1", "r2"]


def test_an_ended_episode_is_forgotten(pair: Bench) -> None:
    pair.send("s1", fragment("s1", 1, episode="a"))
    owners = pair.broker.simulators[session("s1")].owners
    assert list(owners) == ["a"]
    pair.send("s1", fragment("s1", 2, episode="a", end="truncated"))
    assert owners == {}


def test_bye_hands_untaken_fragments_to_others_at_once(pair: Bench) -> None:
    for n, episode in ((1, "a"), (2, "b"), (3, "a")):
        pair.send("s1", fragment("s1", n, episode=episode))
    assert leases(pair.bye("r1")) == [("r2", "s1", 1), ("r2", "s1", 3)]
    assert pair.broker.runners[session("r1")].state is peers.State.GONE


def test_bye_says_what_rllib_has_and_cuts_the_rest(trained: Bench) -> None:
    for n in (1, 2):
        trained.send("s1", fragment("s1", n))
        trained.take("r1", n, claim("s1", n))
    trained.bye("r1", returned=1)
    assert trained.acks() == {"s1": [(1, "delivered"), (2, "handover_cut")]}


def test_a_runner_that_greets_anew_gets_its_leases_again(trained: Bench) -> None:
    for n in (1, 2):
        trained.send("s1", fragment("s1", n))
    said = trained.hello("r1/b", RunnerHello(RUN))
    assert leases(said) == [("r1/b", "s1", 1), ("r1/b", "s1", 2)]
    assert isinstance(said[0][1], WELCOME), "before any lease"


def test_a_claim_that_was_never_acted_upon_is_leased_again(trained: Bench) -> None:
    for n in (1, 2):
        trained.send("s1", fragment("s1", n))
        trained.take("r1", n, claim("s1", n))
    assert leases(trained.hello("r1/b", RunnerHello(RUN, committed=1))) == [("r1/b", "s1", 2)]
    assert list(trained.broker.runners[session("r1")].takes) == [1]


def test_a_greeting_says_what_rllib_has(trained: Bench) -> None:
    for n in (1, 2):
        trained.send("s1", fragment("s1", n))
    trained.take("r1", 1, claim("s1", 1, 2))
    trained.runner("r1/b", committed=1, returned=1, dropped=[dropped("s1", 2, "malformed")])
    assert trained.acks() == {"s1": [(1, "delivered"), (2, "malformed")]}


# ---- windows


def test_windows_are_reserved_before_they_are_granted(benches: Callable[..., Bench]) -> None:
    bench = benches(fragment_bytes=100, memory=500)
    welcomes = [bench.simulator(f"s{n}", spaces=None) for n in range(4)]
    assert [w.window for w in welcomes] == [200, 200, 0, 0]
    assert welcomes[0].text == ""
    assert welcomes[2].text == (
        "no window is free: 400 of 500 bytes are granted to other simulators; raise the broker's --memory or lower its "
        "--fragment-bytes"
    )


def test_a_window_that_becomes_free_goes_to_the_next_one(benches: Callable[..., Bench]) -> None:
    bench = benches(fragment_bytes=100, memory=400)
    for n in range(4):
        bench.simulator(f"s{n}", spaces=None)
    bench.bye("s0")
    assert [(to, m.window) for to, m in bench.tick(0.01) if isinstance(m, ACK)] == [("s2", 200)]


def test_a_lost_simulator_keeps_its_window_for_a_while(benches: Callable[..., Bench]) -> None:
    bench = benches(fragment_bytes=100, memory=400)
    for n in range(3):
        bench.simulator(f"s{n}", spaces=None)
    bench.unreachable("s0")
    bench.wait(14)
    assert bench.broker.simulators[session("s0")].window == 200
    assert ("s2", 200) in [(to, m.window) for to, m in bench.wait(3) if isinstance(m, ACK)]
    assert bench.simulator("s0/b", spaces=None).window == 0, "it came back too late"


def test_the_fragments_of_a_gone_simulator_count_until_they_are_settled(benches: Callable[..., Bench]) -> None:
    """Else simulators that come, send and go would fill the memory."""
    bench = training(benches(fragment_bytes=100, memory=400))
    for n in range(3):
        bench.simulator(f"s{n}", spaces=None)
    bench.send("s0", fragment("s0", 1, steps=79))
    bench.send("s0", fragment("s0", 2, steps=69))
    bench.bye("s0")
    assert bench.broker.windows == 350
    assert bench.broker.simulators[session("s2")].window == 0
    bench.take("r1", 1, claim("s0", 1, 2))
    bench.returned("r1", 1)
    assert bench.broker.windows == 400
    assert ("s2", 200) in [(to, m.window) for to, m in bench.tick(0.01) if isinstance(m, ACK)]


def test_a_simulator_that_comes_back_gets_what_is_missing_of_its_window(benches: Callable[..., Bench]) -> None:
    bench = training(benches(fragment_bytes=100, memory=400))
    bench.simulator("s0", spaces=None)
    bench.send("s0", fragment("s0", 1, steps=79))
    bench.bye("s0")
    assert bench.broker.windows == 80
    assert bench.simulator("s0/b", spaces=None).window == 200
    assert bench.broker.windows == 200


def test_settings_that_leave_no_window_are_an_error() -> None:
    with pytest.raises(ValueError, match="memory is 100 bytes, but one window takes 200"):
        Settings(fragment_bytes=100, memory=100)


# ---- steps


@pytest.mark.parametrize(
    ("simulators", "length", "ahead_each"),
    [(1, 200, 2000), (4, 200, 500), (10, 100, 200), (400, 2, 5), (5000, 1, 1)],
)
def test_the_steps_ahead_are_shared(bench: Bench, simulators: int, length: int, ahead_each: int) -> None:
    bench.trainer(quota=1000, lag_limit=2, steps_ahead=2000, fragment_steps=200)
    for n in range(simulators - 1):
        bench.simulator(f"s{n}")
    welcome = bench.simulator("s")
    assert (welcome.fragment_steps, welcome.steps_limit) == (length, ahead_each)


@pytest.mark.parametrize(
    ("simulators", "length", "ahead_each"),
    [(1, 200, 2000), (4, 200, 500), (10, 100, 200), (25, 64, 80), (100, 20, 20), (400, 5, 5), (5000, 1, 1)],
)
def test_in_rounds_a_short_share_is_one_fragment(bench: Bench, simulators: int, length: int, ahead_each: int) -> None:
    bench.trainer(quota=1000, lag_limit=2, steps_ahead=2000, fragment_steps=200, rounds=True)
    for n in range(simulators - 1):
        bench.simulator(f"s{n}")
    welcome = bench.simulator("s")
    assert (welcome.fragment_steps, welcome.steps_limit) == (length, ahead_each)


def test_a_simulator_of_many_episodes_has_the_share_of_each(bench: Bench) -> None:
    bench.trainer(quota=1000, lag_limit=2, steps_ahead=2000, fragment_steps=200)
    bench.simulator("s1", episodes=9)
    assert bench.simulator("s2", episodes=1).steps_limit == 200
    welcome = bench.simulator("s1", episodes=9)
    assert (welcome.fragment_steps, welcome.steps_limit) == (100, 1800)
    bench.bye("s1")
    assert bench.simulator("s2").steps_limit == 2000


def test_a_take_before_the_trainer_greets_is_granted_nothing_and_forgiven(bench: Bench) -> None:
    """A restarted broker serves no run yet; the runner claims what the one before leased it on a connection that was
    read late."""
    bench.runner("r1")
    ((to, taken),) = bench.take("r1", 1, claim("s1", 1))
    assert (to, taken.refused) == ("r1", [claim("s1", 1)])
    bench.trainer()
    assert [r["state"] for r in bench.broker.status(bench.now)["runners"]] == ["live"]


def test_steps_that_are_taken_anew_count_once(trained: Bench) -> None:
    """TAKEN was lost with the connection: the runner has never acted upon it."""
    trained.send("s1", fragment("s1", 1, steps=10))
    trained.take("r1", 1, claim("s1", 1))
    assert (trained.broker.round_steps, trained.broker.taken_steps) == (10, 10)
    trained.runner("r1/again", committed=0)
    assert (trained.broker.round_steps, trained.broker.taken_steps) == (0, 0)
    trained.take("r1/again", 2, claim("s1", 1))
    assert (trained.broker.round_steps, trained.broker.taken_steps) == (10, 10)
    trained.weights("r1/again", 1)
    trained.runner("r1/and again", committed=0)
    assert (trained.broker.round_steps, trained.broker.taken_steps) == (0, 0), "another round by now"


def test_steps_are_credited_when_they_are_taken(benches: Callable[..., Bench]) -> None:
    """Not at the ack: the learner trains between the two, and sampling must overlap with it."""
    bench = training(benches(), steps_ahead=100)
    assert bench.simulator("s1").steps_limit == 100
    bench.tick(0.01)
    bench.send("s1", fragment("s1", 1, steps=50))
    bench.take("r1", 1, claim("s1", 1))
    assert bench.tick(0.01) == [("s1", ACK([], 2 * MiB, 150, 50, RUN, 0, POLICY, sampled=50))]
    bench.returned("r1", 1)
    assert bench.tick(0.01) == [("s1", ACK([(1, "delivered")], 2 * MiB, 150, 50, RUN, 0, POLICY, sampled=50))]


def test_how_much_the_training_has_sampled_is_told(benches: Callable[..., Bench]) -> None:
    """In its earlier runs and in this one. A broker that starts anew has it from the trainer."""
    bench = training(benches(), sampled=1000, needs_logp=False)
    welcome = bench.simulator("s1")
    assert (welcome.sampled, welcome.needs_logp) == (1000, False)
    bench.send("s1", fragment("s1", 1, steps=50))
    ((_, taken),) = bench.take("r1", 1, claim("s1", 1))
    assert taken.sampled == 1050
    bench.returned("r1", 1)
    (ack,) = messages(bench.tick(0.01), ACK)
    assert (ack.sampled, ack.needs_logp) == (1050, False)
    # Restored from a checkpoint, a trainer may know it only later. Less than is known means nothing.
    for said in (9000, 1000):
        bench.trainer(runners=1, sampled=said, needs_logp=False)
        assert bench.simulator("s2").sampled == 9000


def test_dropped_steps_are_credited_too(benches: Callable[..., Bench]) -> None:
    bench = training(benches(), steps_ahead=100)
    bench.simulator("s1")
    bench.send("s1", fragment("s1", 1, steps=50, run="00"))
    assert [(m.settled, m.steps_limit) for m in messages(bench.tick(0.01), ACK)] == [([(1, "old_run")], 150)]


def test_a_new_broker_counts_from_what_the_simulator_says(benches: Callable[..., Bench]) -> None:
    bench = training(benches(), steps_ahead=100)
    assert bench.simulator("s1", base=40, steps=7000).steps_limit == 7100


def test_without_a_trainer_nothing_is_sampled_ahead(bench: Bench) -> None:
    assert bench.simulator("s1").steps_limit == 1
    assert bench.simulator("s2", base=40, steps=7000).steps_limit == 7000
    bench.trainer(steps_ahead=100)
    assert {to: m.steps_limit for to, m in bench.tick(0.01) if isinstance(m, ACK)} == {"s1": 50, "s2": 7050}


def test_the_limits_are_said_again_when_a_simulator_pings(benches: Callable[..., Bench]) -> None:
    """An ACK of the old connection that came after WELCOME may have told it others."""
    bench = training(benches(), steps_ahead=100)
    bench.simulator("s1")
    assert bench.send("s1", PING()) == [], "hundreds that wait are answered together"
    assert [(m.settled, m.steps_limit) for m in messages(bench.tick(0.01), ACK)] == [([], 100)]


# ---- staleness, runs


@pytest.mark.parametrize(("version", "outcome"), [(5, None), (4, None), (3, "stale")])
def test_a_fragment_older_than_the_lag_limit_is_dropped_whole(trained: Bench, version: int, outcome: Any) -> None:
    trained.weights("r1", 5)
    trained.send("s1", fragment("s1", 1, version=version))
    assert trained.acks() == ({"s1": [(1, outcome)]} if outcome else {})


def test_a_fragment_that_becomes_stale_while_leased_is_refused_at_take(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.weights("r1", 2)
    assert trained.take("r1", 1, claim("s1", 1)) == [("r1", TAKEN(1, [claim("s1", 1)], 2, 0, 0, 1, 1))]
    assert trained.acks() == {"s1": [(1, "stale")]}


def test_a_fragment_of_another_run_is_dropped(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1, run="00"))
    assert trained.acks() == {"s1": [(1, "old_run")]}


def test_a_new_version_begins_a_new_round(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.take("r1", 1, claim("s1", 1))
    assert (trained.broker.round_steps, trained.broker.taken_steps) == (10, 10)
    trained.weights("r1", 1)
    assert (trained.broker.round_steps, trained.broker.taken_steps) == (0, 10)


def test_a_new_run_begins_anew(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.bye("t")
    said = trained.hello("t2", terms(NEXT_RUN, policy="q" * 16))
    assert messages(said, REFUSED, "r1")[0] == REFUSED(
        "old_run", f"run {RUN} has ended, the broker serves {NEXT_RUN} now", True
    )
    assert (trained.broker.run, trained.broker.published_version, trained.broker.policy_ready) == (NEXT_RUN, -1, "")
    assert trained.acks() == {"s1": [(1, "old_run")]}
    assert trained.broker.runners[session("r1")].state is peers.State.GONE


def test_a_second_trainer_is_refused_while_the_first_is_there(trained: Bench) -> None:
    said = trained.hello("t2", terms(NEXT_RUN))
    assert messages(said, REFUSED, "t2") == [
        REFUSED(
            "trainer_present",
            f"this broker already serves the trainer 't' (run {RUN}): stop it, or start a broker of its own for each "
            f"training",
            False,
            1,
        )
    ]
    assert [to for to, m in said if isinstance(m, PONG)] == ["t"], "it is asked whether it is still there"
    trained.unreachable("t")
    assert trained.trainer("t2", NEXT_RUN).run == NEXT_RUN


def test_an_older_run_is_refused_for_good(trained: Bench) -> None:
    trained.bye("t")
    trained.trainer("t2", NEXT_RUN)
    trained.bye("t2")
    ((_, refusal),) = trained.hello("t3", terms(RUN))
    assert (refusal.code, refusal.fatal) == ("old_run", True)
    assert refusal.text == f"run {RUN} is older than {NEXT_RUN}, the last one this broker served"
    ((_, refusal),) = trained.hello("r9", RunnerHello(RUN))
    assert (refusal.code, refusal.fatal) == ("old_run", True)
    assert refusal.text == f"run {RUN} has ended, the broker serves {NEXT_RUN}: this runner's trainer was replaced"


def test_a_trainer_may_change_its_terms(trained: Bench) -> None:
    trained.hello("t", terms(runners=7, lag_limit=9))
    assert messages(trained.send("t", PING()), PONG)[0].runners_wanted == 7
    assert messages(trained.send("r1", PING()), PONG)[0].runners_wanted == 0, "that is the trainer's business"
    assert trained.broker.published_version == 0
    trained.weights("r1", 8)
    trained.send("s1", fragment("s1", 1, version=0))
    assert trained.acks() == {}


# ---- unfinished episodes, and who holds a round back


def test_an_episode_whose_simulator_vanishes_is_counted_and_never_ends(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1, episode="a"))
    trained.unreachable("s1")
    for _ in range(2):
        trained.wait(10.0)
        trained.send("r1", PING())
    assert trained.broker.status(trained.now)["unfinished_episodes"] == {"lost": 1, "abandoned": 0}
    trained.simulator("s2")
    trained.send("s2", fragment("s2", 1, episode="b"))
    trained.send("s2", fragment("s2", 2, episode="b", t0=10, end="terminated"))
    trained.send("s2", fragment("s2", 3, episode="c"))
    trained.bye("s2")
    assert trained.broker.status(trained.now)["unfinished_episodes"] == {"lost": 1, "abandoned": 1}


def test_episodes_whose_ends_never_come_are_not_remembered_for_ever(trained: Bench) -> None:
    for n in range(1, 101):
        trained.send("s1", fragment("s1", n, episode=f"e{n}"))
        trained.take("r1", n, claim("s1", n), returned=n - 1)
    assert len(trained.broker.simulators[session("s1")].owners) == 16


def test_status_names_the_simulators_that_hold_a_round_back(trained: Bench) -> None:
    for name in ("s2", "s3"):
        trained.simulator(name)
    number = 0
    for _ in range(8):
        trained.wait(0.5)
        number += 1
        for name in ("s1", "s2"):
            trained.send(name, fragment(name, number, steps=1))
        trained.take("r1", number, claim("s1", number), claim("s2", number))
    seen = trained.broker.status(trained.now)["round"]
    assert (seen["steps"], seen["quota"]) == (16, 100)
    assert [s["name"] for s in seen["held_back_by"]] == ["s3"] and seen["held_back_by"][0]["silent_s"] >= 4.0
    number += 1
    trained.send("s3", fragment("s3", number, steps=84))
    trained.take("r1", number, claim("s3", number))
    assert trained.broker.status(trained.now)["round"]["held_back_by"] == [], "it is full"


# ---- the pool's size and duties


def test_scale_tells_the_trainer_until_it_has_taken_it_up(trained: Bench) -> None:
    wrong, actions = trained.broker.scale(3, trained.now)
    assert wrong == ""
    (pong,) = [a.message for a in actions if isinstance(a, Send)]
    assert (pong.runners_wanted, [p.session for p in pong.roster]) == (3, [session("r1")])
    assert trained.broker.status(trained.now)["trainer"]["runners_wanted"] == 3
    trained.hello("t", terms(runners=3))
    assert trained.broker.wanted is None
    assert messages(trained.send("t", PING()), PONG)[0].runners_wanted == 3


def test_scale_without_a_trainer_says_so(bench: Bench) -> None:
    wrong, actions = bench.broker.scale(3, bench.now)
    assert "no trainer is connected" in wrong and not actions


def test_another_trainer_does_not_inherit_the_wish(trained: Bench) -> None:
    trained.broker.scale(8, trained.now)
    trained.bye("t")
    trained.trainer("t2", NEXT_RUN)
    assert messages(trained.send("t2", PING()), PONG)[0].runners_wanted == 1


@pytest.mark.parametrize("duty", ["park", "leave", "end"])
def test_a_runner_off_duty_is_leased_nothing_and_its_leases_go_to_others(pair: Bench, duty: Any) -> None:
    said = pair.send("s1", fragment("s1", 1))
    ((one, _, _),) = leases(said)
    other = {"r1": "r2", "r2": "r1"}[one]
    said = pair.send("t", POOL([Assigned(session(one), duty)]))
    assert messages(said, DUTY, one) == [DUTY(duty)]
    assert leases(said) == [(other, "s1", 1)]
    assert messages(pair.take(one, 1, claim("s1", 1)), TAKEN)[0].refused == [claim("s1", 1)]
    assert messages(pair.send("r1", PING()), PONG)[0].runners == 1
    again = pair.send("t", POOL([]))
    assert messages(again, DUTY, one) == [DUTY("serve")]
    assert messages(pair.send("r1", PING()), PONG)[0].runners == 2


def test_what_a_leaving_runner_has_taken_stays_its_own(pair: Bench) -> None:
    ((one, _, _),) = leases(pair.send("s1", fragment("s1", 1)))
    pair.take(one, 1, claim("s1", 1))
    pair.send("t", POOL([Assigned(session(one), "leave")]))
    pair.bye(one, returned=1)
    assert pair.ledger()["delivered"] == 1
    assert session(one) not in {p.session for p in messages(pair.send("t", PING()), PONG)[0].roster}


def test_a_runner_whose_process_has_ended_is_not_waited_for(pair: Bench) -> None:
    for lost_first in (True, False):
        number = 1 if lost_first else 2
        ((one, _, _),) = leases(pair.send("s1", fragment("s1", number)))
        pair.take(one, 1, claim("s1", number))
        if lost_first:
            pair.unreachable(one)
        assert pair.acks() == {}
        said = pair.send("t", POOL([Assigned(session(one), "end")]))
        if not lost_first:
            assert messages(said, DUTY, one) == [DUTY("end")]
            pair.unreachable(one)
        else:
            pair.tick(2.0)
        assert pair.acks() == {"s1": [(number, "handover_cut")]}


def test_a_duty_outlives_connections_and_comes_with_the_trainers_greeting(trained: Bench) -> None:
    trained.send("t", POOL([Assigned(session("r1"), "leave"), Assigned(session("r5"), "park")]))
    assert messages(trained.hello("r1/2", RunnerHello(RUN)), DUTY) == [DUTY("leave")]
    assert messages(trained.hello("r5", RunnerHello(RUN)), DUTY) == [DUTY("park")]
    said = trained.hello("t", terms(duties=[Assigned(session("r5"), "park")]))
    assert messages(said, DUTY, "r1/2") == [DUTY("serve")] and not messages(said, DUTY, "r5")


def test_only_the_trainer_says_duties(trained: Bench) -> None:
    ((_, refusal),) = trained.send("r1", POOL([Assigned(session("r1"), "leave")]))
    assert refusal == REFUSED("unexpected", "only the trainer sends POOL")


def test_at_zero_runners_it_says_what_is_missing(trained: Bench) -> None:
    trained.hello("t", terms(runners=0, duties=[Assigned(session("r1"), "park")]))
    assert any("scaled to 0" in text for text in trained.broker.waiting_for())


# ---- liveness


def test_pong_says_where_training_is(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.take("r1", 1, claim("s1", 1))
    assert trained.send("r1", PING()) == [
        ("r1", PONG(EPOCH, RUN, 0, POLICY, 10, 10, simulators=1, runners=1, sampled=10))
    ]
    (pong,) = messages(trained.send("t", PING()), PONG)
    assert pong.ledger == {"received": (1, 10), "delivered": (0, 0), "in_flight": (1, 10)}


def test_the_silent_are_probed(benches: Callable[..., Bench]) -> None:
    bench = training(benches(simulator_silence=4.0))
    bench.simulator("s1")
    bench.send("r1", PING())
    bench.wait(0.9)
    probed = {to for to, m in bench.wait(2.0) if isinstance(m, PONG)}
    assert probed == {"r1", "t"}
    probed = {to for to, m in bench.wait(5.0) if isinstance(m, PONG)}
    assert probed == {"r1", "t", "s1"}


def test_a_lost_connection_requeues_leases_at_once_and_waits_with_what_was_taken(pair: Bench) -> None:
    for n, episode in ((1, "a"), (2, "b"), (3, "a")):
        pair.send("s1", fragment("s1", n, episode=episode))
    pair.take("r1", 1, claim("s1", 1))
    assert leases(pair.unreachable("r1")) == [("r2", "s1", 3)]
    pair.send("r2", PING())
    pair.wait(10)
    assert pair.acks() == {}
    said = pair.wait(1.5)
    assert [m.settled for m in messages(said, ACK, "s1")] == [[(1, "handover_cut")]]


def test_a_runner_that_says_nothing_is_lost(trained: Bench) -> None:
    runner = trained.broker.runners[session("r1")]
    trained.wait(15)
    assert runner.state is peers.State.LIVE
    trained.wait(2)
    assert runner.state is peers.State.LOST
    assert trained.send("r1", PING()) == [("r1", REFUSED("greet", "send HELLO first"))]
    trained.wait(11)
    assert runner.state is peers.State.GONE


def test_a_runner_that_comes_back_in_time_keeps_what_it_took(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.take("r1", 1, claim("s1", 1))
    trained.unreachable("r1")
    trained.wait(9)
    trained.runner("r1/b", committed=1)
    trained.wait(9)
    trained.returned("r1/b", 1)
    assert trained.acks() == {"s1": [(1, "delivered")]}


def test_a_send_to_somebody_unknown_that_fails_changes_nothing(trained: Bench) -> None:
    assert trained.unreachable("s7") == []
    assert trained.unreachable("r7") == []


def test_a_lost_simulators_outcomes_wait_for_it(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.take("r1", 1, claim("s1", 1))
    trained.unreachable("s1")
    trained.returned("r1", 1)
    assert trained.acks() == {}
    trained.simulator("s1/b")
    trained.send("s1/b", fragment("s1", 1))
    assert trained.acks() == {"s1/b": [(1, "delivered")]}


def test_a_gone_simulator_is_forgotten_after_an_hour(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.bye("s1")
    trained.now += 3601
    trained.tick()
    assert session("s1") in trained.broker.simulators, "a fragment of it is in flight"
    trained.runner("r1/b")
    trained.take("r1/b", 1, claim("s1", 1))
    trained.returned("r1/b", 1)
    trained.wait(2)
    assert session("s1") not in trained.broker.simulators


def test_a_gone_runner_is_forgotten_after_an_hour(trained: Bench) -> None:
    trained.bye("r1")
    trained.wait(3599)
    assert session("r1") in trained.broker.runners
    trained.wait(3)
    assert session("r1") not in trained.broker.runners


def test_episodes_of_lost_simulators_count_until_they_are_gone(bench: Bench) -> None:
    bench.simulator("s1", episodes=5)
    bench.simulator("s2")
    bench.unreachable("s1")
    assert bench.broker.episodes == 6
    bench.wait(17)
    assert bench.broker.episodes == 1
    bench.simulator("s1/b", episodes=3)
    assert bench.broker.episodes == 4


# ---- after a start


def test_nothing_is_leased_until_the_runners_of_before_have_greeted(bench: Bench) -> None:
    bench.trainer(runners=2)
    bench.runner("r1")
    bench.simulator("s1")
    assert leases(bench.send("s1", fragment("s1", 1))) == []
    assert leases(bench.hello("r2", RunnerHello(RUN))) == [("r1", "s1", 1)]


def test_at_most_four_seconds(bench: Bench) -> None:
    bench.trainer(runners=2)
    bench.runner("r1")
    bench.simulator("s1")
    bench.send("s1", fragment("s1", 1))
    assert leases(bench.wait(3.99)) == []
    assert leases(bench.wait(0.02)) == [("r1", "s1", 1)]


def test_nobody_waits_for_the_report_of_a_process_that_has_ended(bench: Bench) -> None:
    bench.trainer(runners=1, duties=[Assigned(session("r0"), "end")])
    bench.simulator("s1")
    bench.send("s1", fragment("s1", 1))
    assert leases(bench.hello("r1", RunnerHello(RUN))) == [("r1", "s1", 1)]


def test_the_hold_ends_also_when_nothing_waits(bench: Bench) -> None:
    """A deadline that stays in the past would make the loop spin."""
    bench.trainer(runners=2)
    bench.wait(4.5)
    assert bench.broker.next_deadline() > bench.now
    assert not bench.broker.holding


def test_a_resent_fragment_that_rllib_has_is_acked(bench: Bench) -> None:
    handed = [handed_over("s1", {1: 1, 2: 2})]
    bench.trainer()
    bench.runner("r1", committed=2, returned=1, handed=handed)
    bench.simulator("s1")
    for n in (1, 2, 3):
        bench.send("s1", fragment("s1", n))
    assert bench.acks() == {"s1": [(1, "delivered")]}
    runner = bench.broker.runners[session("r1")]
    assert [f.header.number for f in runner.takes[2]] == [2], "it is still this runner's"
    assert [f.header.number for f in runner.leased] == [3]
    bench.returned("r1", 2)
    assert bench.acks() == {"s1": [(2, "delivered")]}


def handed_over(name: str, takes: dict[int, int]) -> Handed:
    """`takes`: number -> the TAKE it came with."""
    return Handed(session(name), list(takes), list(takes.values()))


def test_a_fragment_that_was_resent_before_the_report_is_kept_for_its_runner(bench: Bench) -> None:
    bench.trainer(runners=2)
    bench.simulator("s1")
    for n in (1, 2, 3):
        bench.send("s1", fragment("s1", n))
    handed = [handed_over("s1", {1: 1, 2: 2})]
    bench.hello("r1", RunnerHello(RUN, 2, 1, handed, [dropped("s1", 1, "malformed")]))
    assert bench.acks() == {"s1": [(1, "malformed")]}
    assert leases(bench.hello("r2", RunnerHello(RUN))) == [("r1", "s1", 3)]


def test_even_when_it_was_leased_to_another(bench: Bench) -> None:
    bench.trainer(runners=2)
    bench.simulator("s1")
    bench.runner("r2")
    bench.wait(5)
    assert leases(bench.send("s1", fragment("s1", 1))) == [("r2", "s1", 1)]
    bench.hello("r1", RunnerHello(RUN, 1, 0, [handed_over("s1", {1: 1})]))
    assert bench.take("r2", 1, claim("s1", 1)) == [("r2", TAKEN(1, [claim("s1", 1)], -1, 0, 0, 1, 2))]
    bench.returned("r1", 1)
    assert bench.acks() == {"s1": [(1, "delivered")]}


def test_a_report_of_a_runner_that_died_is_a_cut(bench: Bench) -> None:
    bench.trainer()
    bench.runner("r1", committed=1, handed=[handed_over("s1", {1: 1})])
    bench.unreachable("r1")
    bench.wait(12)
    bench.simulator("s1")
    bench.send("s1", fragment("s1", 1))
    assert bench.acks() == {"s1": [(1, "handover_cut")]}


def test_reports_are_forgotten_when_the_base_passes_or_after_an_hour(bench: Bench) -> None:
    bench.trainer()
    bench.runner("r1", committed=1, handed=[handed_over("s1", {1: 1, 2: 1}), handed_over("s2", {1: 1})])
    bench.simulator("s1", base=3, steps=20)
    assert bench.broker.reports.of(session("s1")) is None
    assert bench.broker.reports
    bench.wait(3602)
    assert not bench.broker.reports


# ---- weights


def state_of(version: int, data: bytes, offset: int = 0) -> STATE:
    return STATE(RUN, version, len(data), offset, zlib.crc32(data))


@pytest.fixture
def weightless(benches: Callable[..., Bench]) -> Bench:
    """A trainer and two runners, nothing offered yet, and simulator "s1"."""
    bench = benches()
    bench.trainer(runners=2)
    bench.policy()
    bench.runner("r1")
    bench.runner("r2")
    bench.simulator("s1")
    bench.tick(0.02)
    return bench


def test_an_offer_is_fetched_once_and_published_whole(weightless: Bench) -> None:
    bench = weightless
    assert bench.send("r1", OFFER(RUN, 0, 16)) == [("r1", GET_STATE(RUN, 0, 0))]
    assert bench.send("r2", OFFER(RUN, 0, 16)) == []
    assert bench.send("r1", state_of(0, WEIGHTS), WEIGHTS) == [("PUB", state_of(0, WEIGHTS))]
    assert messages(bench.wait(1.0), GET_STATE) == []


def test_large_weights_are_fetched_in_pieces_and_only_announced(benches: Callable[..., Bench]) -> None:
    bench = benches(weights_inline=1000)
    bench.trainer()
    bench.runner("r1")
    data = bytes(range(256)) * (3 * CHUNK_BYTES // 256) + b"end"
    asked = messages(bench.send("r1", OFFER(RUN, 4, len(data))), GET_STATE)
    assert [a.offset for a in asked] == [0, CHUNK_BYTES], "two on the way"
    said = []
    for n in range(4):
        offset = n * CHUNK_BYTES
        said = bench.send("r1", state_of(4, data, offset), data[offset : offset + CHUNK_BYTES])
        assert [m.offset for m in messages(said, GET_STATE)] == ([offset + 2 * CHUNK_BYTES] if n < 2 else [])
    assert said == [("PUB", state_of(4, data))]
    bench.simulator("s1")
    got = b""
    while len(got) < len(data):
        ((to, state),) = bench.send("s1", GET_STATE(RUN, 4, len(got)))
        assert (to, state) == ("s1", state_of(4, data, len(got)))
        got += data[len(got) : len(got) + CHUNK_BYTES]


def test_only_the_newest_version_matters_and_not_too_often(weightless: Bench) -> None:
    bench = weightless
    bench.weights("r1", 0)
    for version in (1, 2, 3):
        assert bench.send("r1", OFFER(RUN, version, 16)) == []
    assert [(to, m) for to, m in bench.wait(0.03) if to == "r1"] == [("r1", GET_STATE(RUN, 3, 0))]
    assert bench.broker.version == 3


def test_a_runner_that_has_moved_on_sends_what_it_has(weightless: Bench) -> None:
    bench = weightless
    bench.send("r1", OFFER(RUN, 0, 16))
    said = bench.send("r1", state_of(2, WEIGHTS), WEIGHTS)
    assert [type(m) for _, m in said] == [GET_STATE]
    assert bench.send("r1", state_of(2, WEIGHTS), WEIGHTS) == [("PUB", state_of(2, WEIGHTS))]
    assert (bench.broker.published_version, bench.broker.version) == (2, 2)


def test_damaged_weights_are_fetched_again(weightless: Bench) -> None:
    bench = weightless
    bench.send("r1", OFFER(RUN, 0, 16))
    assert bench.send("r1", STATE(RUN, 0, 16, 0, 1), WEIGHTS) == []
    assert "weights 0 came damaged, asking again" in bench.logs
    assert messages(bench.wait(0.05), GET_STATE, "r1")
    assert bench.send("r1", state_of(0, WEIGHTS), WEIGHTS) == [("PUB", state_of(0, WEIGHTS))]


def test_a_runner_that_does_not_answer_is_replaced(weightless: Bench) -> None:
    bench = weightless
    bench.send("r1", OFFER(RUN, 0, 16))
    bench.send("r2", OFFER(RUN, 0, 16))
    assert messages(bench.wait(4.9), GET_STATE) == []
    assert [to for to, m in bench.wait(0.2) if isinstance(m, GET_STATE)] == ["r2"]
    assert "runner 'r1' does not send its weights" in bench.logs


def test_a_runner_that_answers_after_all_is_asked_again(weightless: Bench) -> None:
    """It may be the only one who has that version: without this, simulators would wait for it for ever."""
    bench = weightless
    bench.send("r1", OFFER(RUN, 0, 16))
    bench.wait(6)
    assert not bench.broker.runners[session("r1")].offers
    said = bench.send("r1", state_of(0, WEIGHTS), WEIGHTS) + bench.wait(0.1)
    assert [to for to, m in said if isinstance(m, GET_STATE)] == ["r1"]
    assert bench.send("r1", state_of(0, WEIGHTS), WEIGHTS) == [("PUB", state_of(0, WEIGHTS))]


def test_a_lost_source_is_replaced_at_once(weightless: Bench) -> None:
    bench = weightless
    bench.send("r1", OFFER(RUN, 0, 16))
    bench.send("r2", OFFER(RUN, 0, 16))
    said = bench.unreachable("r1") + bench.wait(0.05)
    assert [to for to, m in said if isinstance(m, GET_STATE)] == ["r2"]


def test_a_source_that_greets_anew_is_asked_anew(weightless: Bench) -> None:
    bench = weightless
    bench.send("r1", OFFER(RUN, 0, 16))
    bench.runner("r1/b")
    said = bench.send("r1/b", OFFER(RUN, 0, 16)) + bench.wait(0.05)
    assert [to for to, m in said if isinstance(m, GET_STATE)] == ["r1/b"]


def test_offers_made_before_the_trainer_greeted_count(bench: Bench) -> None:
    bench.runner("r1")
    bench.send("r1", OFFER(RUN, 6, 16))
    said = bench.hello("t", terms()) + bench.wait(0.05)
    assert messages(said, GET_STATE, "r1") == [GET_STATE(RUN, 6, 0)]
    assert bench.broker.version == 6


def test_an_offer_of_another_run_is_ignored(weightless: Bench) -> None:
    assert weightless.send("r1", OFFER(NEXT_RUN, 5, 16)) == []
    assert weightless.broker.version == -1


def test_state_that_nobody_asked_for_is_ignored(weightless: Bench) -> None:
    assert weightless.send("r2", state_of(0, WEIGHTS), WEIGHTS) in ([], [("r2", GET_STATE(RUN, 0, 0))])
    assert weightless.broker.published_version == -1


def test_who_asks_before_there_are_weights_is_told_so(weightless: Bench) -> None:
    assert weightless.send("s1", GET_STATE(RUN, 0)) == [("s1", STATE(RUN, -1, 0))]


def test_whatever_version_is_asked_for_the_newest_is_sent(trained: Bench) -> None:
    data = WEIGHTS + b"0"
    for asked in (GET_STATE(RUN, -1), GET_STATE(RUN, 7, 5), GET_STATE("00", 0, 5)):
        assert trained.send("s1", asked) == [("s1", state_of(0, data))]
    assert trained.send("s1", GET_STATE(RUN, 0, 5)) == [("s1", state_of(0, data, 5))]
    ((_, refusal),) = trained.send("s1", GET_STATE(RUN, 0, 99))
    assert refusal == REFUSED("malformed", f"byte 99 of {len(data)} bytes of weights")


# ---- the policy


def test_the_policy_is_fetched_from_the_trainer_and_announced(bench: Bench) -> None:
    bench.simulator("s1")
    said = bench.hello("t", terms())
    assert messages(said, GET_CONFIG) == [GET_CONFIG(POLICY, 0)]
    assert bench.policy() == []
    assert [(to, m.policy) for to, m in bench.tick(0.01) if isinstance(m, ACK)] == [("s1", POLICY)]
    assert bench.send("s1", GET_CONFIG(POLICY)) == [("s1", CONFIG(POLICY, len(BLOB)))]
    assert bench.send("s1", GET_CONFIG(POLICY, 5)) == [("s1", CONFIG(POLICY, len(BLOB), 5))]


def test_an_unknown_policy_has_no_size(trained: Bench) -> None:
    assert trained.send("s1", GET_CONFIG("another")) == [("s1", CONFIG("another", 0))]
    assert trained.send("s1", GET_CONFIG(POLICY, 999)) == [("s1", CONFIG(POLICY, 0))]


def test_a_large_policy_comes_in_pieces(bench: Bench) -> None:
    blob = bytes(2 * CHUNK_BYTES + 7)
    said = bench.hello("t", terms(policy_bytes=len(blob)))
    assert [m.offset for m in messages(said, GET_CONFIG)] == [0, CHUNK_BYTES]
    assert [m.offset for m in messages(
        bench.send("t", CONFIG(POLICY, len(blob)), blob[:CHUNK_BYTES]), GET_CONFIG
    )] == [2 * CHUNK_BYTES]  # fmt: skip
    for offset in (CHUNK_BYTES, 2 * CHUNK_BYTES):
        bench.send("t", CONFIG(POLICY, len(blob), offset), blob[offset : offset + CHUNK_BYTES])
    assert bench.broker.policy_ready == POLICY
    assert bench.broker.policy_blob == blob


def test_a_policy_that_does_not_come_is_asked_for_again(bench: Bench) -> None:
    bench.trainer()
    assert messages(bench.wait(4.9), GET_CONFIG) == []
    assert messages(bench.wait(0.2), GET_CONFIG) == [GET_CONFIG(POLICY, 0)]


def test_a_trainer_that_comes_back_is_asked_again(bench: Bench) -> None:
    bench.trainer()
    bench.unreachable("t")
    assert messages(bench.hello("t/b", terms()), GET_CONFIG) == [GET_CONFIG(POLICY, 0)]
    bench.policy("t/b")
    assert bench.broker.policy_ready == POLICY
    assert messages(bench.hello("t/c", terms()), GET_CONFIG) == [], "it is there"


def test_a_policy_from_somebody_else_or_another_one_is_ignored(bench: Bench) -> None:
    bench.trainer()
    bench.runner("r1")
    bench.policy("r1")
    bench.send("t", CONFIG("another", 3), b"abc")
    assert bench.broker.policy_ready == ""


# ---- for people


def test_waiting_for_names_what_is_missing(bench: Bench) -> None:
    sim = "a simulator (rllink-zmq simulate)"
    assert bench.broker.waiting_for() == ["a trainer (rllink-zmq train)", sim]
    bench.trainer()
    assert bench.broker.waiting_for() == ["a runner", sim]
    bench.runner("r1")
    assert bench.broker.waiting_for() == ["the policy from the trainer", sim]
    bench.policy()
    assert bench.broker.waiting_for() == ["the first weights from a runner", sim]
    bench.weights("r1", 0)
    assert bench.broker.waiting_for() == [sim]
    bench.simulator("s1")
    assert bench.broker.waiting_for() == []


def test_status_shows_the_whole_house(trained: Bench) -> None:
    trained.send("s1", fragment("s1", 1))
    trained.take("r1", 1, claim("s1", 1))
    status = trained.broker.status(trained.now + 2)
    assert status["simulators"] == status["sampled_by"] == 1
    assert status["ledger"]["in_flight"] == {"fragments": 1, "steps": 10}
    assert status["memory"] == {"held_bytes": 11, "granted_bytes": 2 * MiB, "limit_bytes": 1024 * MiB}
    assert status["weights"] == {"run_id": RUN, "version": 0, "bytes": 17}
    (runner,) = status["runners"]
    assert (runner["name"], runner["state"], runner["taken_fragments"]) == ("r1", "live", 1)
    assert status["trainer"]["quota"] == 100


def test_invariants_are_looked_at() -> None:
    bench = training(Bench())
    bench.simulator("s1")
    bench.send("s1", fragment("s1", 1))
    bench.broker.held_bytes += 1
    with pytest.raises(AssertionError):
        bench.broker.check_invariants()


def test_a_fragment_message_is_what_the_bench_makes() -> None:
    assert isinstance(fragment("s1", 1), FRAGMENT)
