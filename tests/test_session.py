"""The sans-IO sessions against messages that a test makes up: what they say, when, and what they make of answers."""

from __future__ import annotations

import random
import zlib
from typing import Any

import msgspec
import pytest
from core_bench import BLOB, EPOCH, POLICY, RUN, SPACES, claim, dropped, fragment, session, terms

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
    REFUSED,
    RETURNED,
    STATE,
    TAKE,
    TAKEN,
    WELCOME,
    Assigned,
    Column,
    Handed,
    ObserverHello,
    Present,
    RunnerHello,
    SimulatorHello,
)
from rllink_zmq.session import STATES, Endpoint, SimulatorSession, State, Timing, Verb
from rllink_zmq.session_runner import (
    MEMORY_OF_HANDED,
    SERVICE_TIMING,
    ObserverSession,
    RunnerSession,
    TrainerSession,
)
from rllink_zmq.transfer import CHUNK_BYTES

T0 = 1000.0
TIMING = Timing()


def welcome(greeting: int = 1, **fields: Any) -> WELCOME:
    base: dict[str, Any] = {
        "epoch": EPOCH, "greeting": greeting, "fragment_bytes": 100, "window": 200, "steps_limit": 0,
        "fragment_steps": 10, "run": RUN, "version": 0,
    }  # fmt: skip
    return WELCOME(**(base | fields))


def ack(*settled: tuple[int, str], window: int = 200, steps_limit: int = 0, **fields: Any) -> ACK:
    return ACK(list(settled), window, steps_limit, 10, **fields)


def said(endpoint: Endpoint) -> list[Any]:
    """The messages queued, which are then sent."""
    out = [o.message for o in endpoint.output]
    endpoint.output.clear()
    return out


def simulator(now: float = T0, **fields: Any) -> SimulatorSession:
    """A live one."""
    s = SimulatorSession(session("s"), name="s", package="0.1.0", spaces=SPACES, rng=random.Random(1))
    s.open(now)
    s.receive(welcome(**fields), [], now)
    said(s)
    return s


def runner(now: float = T0) -> RunnerSession:
    r = RunnerSession(session("r"), RUN, name="r", rng=random.Random(1))
    r.open(now)
    r.receive(welcome(), [], now)
    said(r)
    return r


def submit(s: SimulatorSession, now: float = T0, *, steps: int = 4, size: int = 50) -> int:
    return s.submit(
        episode="e", t0=0, steps=steps, end="no", run=RUN, version=0, return_so_far=0.0,
        columns=(Column("obs", "|u1", (steps + 1,)),), body=[bytes(size)], now=now,
    )  # fmt: skip


def lease(r: RunnerSession, *numbers: int, base: int = 1, now: float = T0, steps: int = 10) -> None:
    for n in numbers:
        r.receive(fragment("s", n, base=base, steps=steps), [b"body"], now)


def handed(r: RunnerSession) -> list[int]:
    return [x.message.number for x in r.taken or ()]


# ---- the table of states


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("verb", Verb)
def test_every_move_is_listed_or_an_error(state: State, verb: Verb) -> None:
    s = SimulatorSession(session("s"))
    s.state = state
    if (state, verb) in STATES:
        s._move(verb)
        assert s.state is STATES[state, verb]
    else:
        with pytest.raises(KeyError):
            s._move(verb)


def test_hello_says_who_it_is() -> None:
    s = SimulatorSession(session("s"), name="n" * 200, package="0.1.0", spaces=SPACES, episodes=3)
    s.policy_held = POLICY
    s.open(T0)
    assert said(s) == [HELLO(1, session("s"), 1, SimulatorHello(1, 0, 3, SPACES, POLICY), "n" * 128, "0.1.0")]
    assert s.state is State.GREETING


def test_welcome_starts_the_conversation() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    s.receive(welcome(policy=POLICY, weights="tcp://h:1", spaces=SPACES, text="be patient", version=7), [], T0)
    assert s.state is State.LIVE
    assert (s.epoch, s.run, s.version, s.policy, s.notice) == (EPOCH, RUN, 7, POLICY, "be patient")
    assert (s.window, s.steps_limit, s.fragment_steps, s.fragment_bytes) == (200, 0, 10, 100)
    assert (s.weights_address, s.trainer_spaces) == ("tcp://h:1", SPACES)


def test_the_welcome_of_another_greeting_is_ignored() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    s.send_failed(T0)
    s.tick(T0 + 1)
    s.receive(welcome(1), [], T0 + 1)
    assert s.state is State.GREETING
    s.receive(welcome(2), [], T0 + 1)
    assert s.state is State.LIVE


def test_a_failed_hello_is_tried_again_with_growing_jittered_pauses() -> None:
    s = SimulatorSession(session("s"), rng=random.Random(3))
    s.open(T0)
    now, pauses = T0, []
    for _ in range(8):
        said(s)
        s.send_failed(now)
        due = s.next_deadline()
        pauses.append(due - now)
        s.tick(now)
        assert not s.output, "not before it is due"
        now = due
        s.tick(now)
        assert [type(m) for m in said(s)] == [HELLO]
    assert s.greeting == 9
    limits = [(0.05, 0.15), (0.1, 0.3), (0.2, 0.6), (0.4, 1.2), *[(0.5, 1.5)] * 4]
    assert all(low <= p <= high for p, (low, high) in zip(pauses, limits, strict=True)), pauses
    assert not s.reconnect


def test_an_unanswered_hello_means_a_new_connection() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    said(s)
    due = T0 + TIMING.answer
    assert s.next_deadline() == due
    s.tick(due - 0.01)
    assert (s.reconnect, said(s)) == (False, [])
    s.tick(due)
    assert s.reconnect
    assert [(type(m), m.greeting) for m in said(s)] == [(HELLO, 2)]


@pytest.mark.parametrize("now", [T0 + n * 0.1 for n in range(40)])
def test_a_tick_at_the_deadline_does_something(now: float) -> None:
    """Whatever the floating point makes of a sum: else a loop that sleeps until the deadline spins."""
    s = SimulatorSession(session("s"))
    s.open(now)
    for _ in range(30):
        before, now = s.next_deadline(), s.next_deadline()
        s.tick(now)
        assert s.next_deadline() > before
        if s.greeting == 3 and s.state is State.GREETING:
            s.receive(welcome(3), [], now)


def test_ping_only_when_nothing_else_was_sent() -> None:
    s = simulator()
    assert s.next_deadline() == T0 + TIMING.ping
    submit(s, T0 + 3)
    said(s)
    s.tick(T0 + TIMING.ping)
    assert said(s) == []
    s.tick(T0 + 3 + TIMING.ping)
    assert said(s) == [PING()]


def test_a_ping_unanswered_for_long_means_a_new_connection() -> None:
    s = simulator()
    s.tick(T0 + TIMING.ping)
    s.tick(T0 + 2 * TIMING.ping)
    s.tick(T0 + TIMING.ping + TIMING.silence - 0.1)
    assert (s.state, s.reconnect) == (State.LIVE, False)
    said(s)
    s.tick(T0 + TIMING.ping + TIMING.silence)
    assert (s.state, s.reconnect) == (State.GREETING, True)
    assert [type(m) for m in said(s)] == [HELLO]


def test_anything_that_comes_answers_a_ping() -> None:
    s = simulator()
    s.tick(T0 + TIMING.ping)
    s.receive(ack(), [], T0 + TIMING.ping + TIMING.silence - 1)
    s.tick(T0 + TIMING.ping + TIMING.silence + 1)
    assert (s.state, s.reconnect) == (State.LIVE, False)


def test_a_connection_that_was_gone_and_is_back_is_greeted_on() -> None:
    s = simulator()
    submit(s, T0)
    said(s)
    s.reconnected(T0 + 1)
    assert (s.state, [type(m) for m in said(s)]) == (State.GREETING, [HELLO])
    s.reconnected(T0 + 2)
    assert [m.greeting for m in said(s)] == [3], "the one before may be lost with the connection"
    s.receive(welcome(3), [], T0 + 2)
    assert [type(m) for m in said(s)] == [FRAGMENT]


def test_after_a_pause_of_this_process_what_came_counts_before_silence_is_judged() -> None:
    s = simulator()
    s.tick(T0 + TIMING.ping)
    s.receive(PONG(EPOCH), [], T0 + 500)
    s.tick(T0 + 500)
    assert (s.state, s.reconnect) == (State.LIVE, False)


def test_between_hello_and_welcome_nothing_else_is_said() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    said(s)
    submit(s)
    s.receive(ack((1, "delivered")), [], T0)
    s.tick(T0 + 1)
    assert said(s) == []
    assert list(s.unsettled) == [1], "an answer from before WELCOME is not for now"


# ---- refusals


def test_refused_greet_means_greet_again() -> None:
    s = simulator()
    s.receive(REFUSED("greet", "send HELLO first"), [], T0)
    assert s.state is State.GREETING
    assert [(type(m), m.greeting) for m in said(s)] == [(HELLO, 2)]
    s.receive(REFUSED("greet", "send HELLO first"), [], T0)
    assert said(s) == [], "one is on its way"


def test_a_fatal_refusal_ends_it() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    s.receive(REFUSED("spaces", "they differ", True, 1), [], T0)
    assert s.state is State.REFUSED
    assert s.refusal is not None
    assert (s.refusal.code, s.refusal.text) == ("spaces", "they differ")
    assert s.next_deadline() == float("inf")
    said(s)
    s.tick(T0 + 100)
    assert said(s) == []
    s.close(T0)
    assert s.state is State.CLOSED


def test_a_refusal_of_another_greeting_is_ignored() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    s.receive(REFUSED("spaces", "they differ", True, 5), [], T0)
    assert s.state is State.GREETING


def test_a_refusal_that_may_pass_is_tried_again_and_told() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    said(s)
    s.receive(REFUSED("trainer_present", "somebody trains", False, 1), [], T0)
    assert (s.notice, s.state) == ("somebody trains", State.GREETING)
    s.tick(T0)
    assert said(s) == []
    s.tick(T0 + 1)
    assert [(type(m), m.greeting) for m in said(s)] == [(HELLO, 2)]


def test_a_refused_message_ends_nothing() -> None:
    s = simulator()
    s.receive(REFUSED("malformed", "what was that"), [], T0)
    assert (s.state, s.notice, said(s)) == (State.LIVE, "what was that", [])


# ---- leaving


def test_bye_comes_last() -> None:
    s = simulator()
    submit(s)
    s.close(T0)
    assert [type(m) for m in said(s)] == [FRAGMENT, BYE]
    assert s.state is State.CLOSED


def test_no_bye_without_a_conversation() -> None:
    s = SimulatorSession(session("s"))
    s.open(T0)
    said(s)
    s.close(T0)
    assert (said(s), s.state) == ([], State.CLOSED)
    s.close(T0)


def test_a_failed_send_while_live_means_greet_again_soon() -> None:
    s = simulator()
    submit(s)
    s.send_failed(T0)
    assert (s.state, s.output, s.reconnect) == (State.GREETING, [], False)
    s.tick(T0 + 0.2)
    assert [type(m) for m in said(s)] == [HELLO]


# ---- where training is


def test_versions_never_go_back_within_a_run() -> None:
    s = simulator()
    s.receive(ack(run=RUN, version=5), [], T0)
    s.receive(PONG(EPOCH, RUN, 3), [], T0)
    assert s.version == 5


def test_a_newer_run_begins_at_its_own_version_and_an_older_one_is_ignored() -> None:
    s = simulator()
    s.receive(ack(run=RUN, version=5), [], T0)
    s.receive(ack(run="02", version=0, policy=POLICY), [], T0)
    assert (s.run, s.version, s.policy) == ("02", 0, POLICY)
    s.receive(PONG(EPOCH, RUN, 9), [], T0)
    s.receive(PONG(EPOCH), [], T0)
    assert (s.run, s.version, s.policy) == ("02", 0, POLICY)


# ---- a simulator


def test_a_fragment_is_kept_until_it_is_settled() -> None:
    s = simulator()
    outcomes: list[tuple[int, str]] = []
    s.on_settled = lambda message, outcome: outcomes.append((message.number, outcome))
    assert [submit(s), submit(s)] == [1, 2]
    assert (s.unsettled_bytes, s.unsettled_steps, s.settled_steps) == (100, 8, 0)
    s.receive(ack((2, "stale")), [], T0)
    s.receive(ack((2, "delivered"), (1, "delivered")), [], T0)
    assert outcomes == [(2, "stale"), (1, "delivered")], "the first outcome counts"
    assert (s.unsettled_bytes, s.unsettled_steps, s.settled_steps) == (0, 0, 8)
    assert s.outcomes == {"stale": [1, 4], "delivered": [1, 4]}


def test_the_base_of_a_fragment_never_passes_the_fragment_itself() -> None:
    """A base of its own number + 1 would say that it is settled, and the broker would forget its outcome."""
    s = simulator()
    for number, base in ((1, 1), (2, 1)):
        submit(s)
        assert [(m.number, m.base) for m in said(s)] == [(number, base)]
    s.receive(ack((1, "delivered"), (2, "delivered")), [], T0)
    assert s.base == 3
    submit(s)
    assert [(m.number, m.base) for m in said(s)] == [(3, 3)]


def test_settlement_is_out_of_order_and_the_base_stays_with_the_oldest() -> None:
    s = simulator(window=1000)
    for _ in range(5):
        submit(s)
    s.receive(ack((2, "delivered"), (4, "delivered")), [], T0)
    assert (s.base, list(s.unsettled)) == (1, [1, 3, 5])
    s.receive(ack((1, "delivered")), [], T0)
    assert s.base == 3


def test_on_welcome_everything_unsettled_goes_out_in_order_with_todays_base() -> None:
    s = simulator(window=1000)
    for _ in range(4):
        submit(s)
    s.receive(ack((1, "delivered"), (3, "stale")), [], T0)
    said(s)
    s.receive(REFUSED("greet", ""), [], T0)
    (hello,) = said(s)
    assert hello.peer == SimulatorHello(2, 8, 1, SPACES)
    submit(s)
    assert said(s) == []
    s.receive(welcome(2), [], T0)
    assert [(m.number, m.base) for m in said(s)] == [(2, 2), (4, 2), (5, 2)]


def test_room_in_bytes() -> None:
    s = simulator(window=100)
    assert s.room(0, 100)
    assert not s.room(0, 101)
    submit(s, size=60)
    assert s.room(0, 40)
    assert not s.room(0, 41)
    s.receive(ack((1, "delivered"), window=0), [], T0)
    assert not s.room(0, 1), "no window at all"


def test_room_in_steps_counts_the_fragment_being_built() -> None:
    s = simulator(window=1000, steps_limit=10)
    assert s.room(9, 1)
    assert not s.room(10, 1)
    submit(s, steps=4)
    assert s.room(5, 1)
    assert not s.room(6, 1)
    s.receive(ack((1, "delivered"), steps_limit=10), [], T0)
    assert not s.room(6, 1), "the limit is absolute: settled steps still count"
    s.receive(ack(steps_limit=14), [], T0)
    assert s.room(6, 1)
    s.receive(ack(steps_limit=0), [], T0)
    assert s.room(10**9, 1), "0 = no limit"


def test_other_messages_go_to_the_application() -> None:
    s = simulator()
    seen: list[Any] = []
    s.on_message = lambda message, body, now: seen.append((message, body, now))
    s.receive(STATE(RUN, 0, 1), [b"w"], T0 + 1)
    assert seen == [(STATE(RUN, 0, 1), [b"w"], T0 + 1)]


# ---- a runner


def test_a_runner_that_is_stopped_before_its_first_look_knows_it() -> None:
    """RLlib's clock goes on meanwhile: a call that begins afterwards was sent before."""
    r = RunnerSession(session("r"), RUN)
    r.open(T0)
    r.tick(T0 + 9.0)
    assert r.running_since(T0 + 9.0) == T0


def test_a_runner_takes_the_oldest_leases_up_to_the_steps_wanted() -> None:
    r = runner()
    lease(r, 1, 2, 3)
    assert r.leased_steps == 30
    assert r.take(15, T0) == 20
    assert said(r) == [TAKE(1, [claim("s", 1, 2)], 0)]
    assert r.claiming
    assert r.take(15, T0) == 0, "one claim at a time"
    r.receive(TAKEN(1, [claim("s", 2)], 4, 20), [], T0)
    assert (handed(r), r.committed, r.claiming, r.leased_steps) == ([1], 1, False, 10)
    assert (r.pool.version, r.pool.round_steps) == (4, 20)


def test_nothing_is_claimed_without_leases_or_without_a_conversation() -> None:
    r = runner()
    assert r.take(10, T0) == 0
    lease(r, 1)
    r.receive(REFUSED("greet", ""), [], T0)
    said(r)
    assert r.take(10, T0) == 0
    assert r.k == 0


def test_an_answer_to_another_take_is_ignored() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(7), [], T0)
    assert r.claiming
    assert r.committed == 0


def test_welcome_makes_a_runner_forget_what_it_has_not_taken() -> None:
    r = runner()
    lease(r, 1, 2)
    r.take(10, T0)
    r.receive(REFUSED("greet", ""), [], T0)
    (hello,) = said(r)[-1:]
    assert hello.peer == RunnerHello(RUN, 0, 0)
    r.receive(welcome(2), [], T0)
    assert (r.leased, r.leased_steps, r.claiming, handed(r)) == ({}, 0, False, [])
    r.receive(TAKEN(1), [], T0)
    assert (r.committed, handed(r)) == (0, []), "an answer from the old connection comes too late"
    lease(r, 1)
    r.take(10, T0)
    assert said(r) == [TAKE(2, [claim("s", 1)], 0)], "k rises with every TAKE"


def test_an_answer_that_comes_while_it_greets_is_not_acted_upon() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(REFUSED("greet", ""), [], T0)
    r.receive(TAKEN(1), [], T0)
    assert r.committed == 0


def test_a_failed_send_ends_the_claim_under_way() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.send_failed(T0)
    assert (r.claiming, handed(r), r.state) == (False, [], State.GREETING)


def test_a_fragment_leased_on_two_connections_counts_once() -> None:
    r = runner()
    lease(r, 1)
    lease(r, 1)
    assert (len(r.leased), r.leased_steps) == (1, 10)


def test_hello_reports_what_was_handed_over_and_when() -> None:
    r = runner()
    lease(r, 1, 2, 3)
    r.take(20, T0)
    r.receive(TAKEN(1), [], T0)
    r.take(10, T0)
    r.receive(TAKEN(2), [], T0)
    assert r.hello() == RunnerHello(RUN, 2, 0, [Handed(session("s"), [1, 2, 3], [1, 1, 2])], [])


def test_what_was_handed_over_is_remembered_until_the_base_passes() -> None:
    r = runner()
    lease(r, 1, 2)
    r.take(20, T0)
    r.receive(TAKEN(1), [], T0)
    r.drop(fragment("s", 1), "malformed")
    lease(r, 3, base=2)
    assert r.hello().handed == [Handed(session("s"), [2], [1])]
    assert r.hello().dropped == []
    lease(r, 4, base=3)
    assert r.hello().handed == []


def test_it_is_forgotten_when_its_simulator_sent_nothing_for_an_hour() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(1), [], T0)
    r.drop(fragment("s", 1), "malformed")
    r.tick(T0 + MEMORY_OF_HANDED)
    assert r.hello().handed
    r.tick(T0 + MEMORY_OF_HANDED + 1)
    assert (r.hello().handed, r.hello().dropped) == ([], [])


def test_rllib_does_not_get_a_fragment_again_whatever_the_broker_believes() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(1), [], T0)
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(2), [], T0)
    assert handed(r) == []
    assert r.hello().dropped == [dropped("s", 1, "duplicate")]


def test_giving_back_tells_once() -> None:
    r = runner()
    r.give_back(T0)
    assert said(r) == []
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(1), [], T0)
    r.drop(fragment("s", 1), "malformed")
    said(r)
    r.give_back(T0)
    r.give_back(T0)
    assert said(r) == [RETURNED(1, [dropped("s", 1, "malformed")])]
    assert r.hello().returned == 1


def test_what_is_given_back_while_it_greets_is_told_after_welcome_and_before_any_take() -> None:
    """A TAKE says `returned` too, but not what was dropped: the broker would settle that as delivered."""
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(1), [], T0)
    r.drop(fragment("s", 1), "late")
    r.receive(REFUSED("greet", ""), [], T0)
    assert said(r)[-1].peer.returned == 0
    r.give_back(T0)
    assert said(r) == []
    r.receive(welcome(2), [], T0)
    assert said(r) == [RETURNED(1, [dropped("s", 1, "late")])]


def test_a_hello_that_says_it_makes_the_word_after_welcome_needless() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(1), [], T0)
    r.send_failed(T0)
    r.give_back(T0)
    r.tick(T0 + 1)
    assert said(r)[-1].peer.returned == 1
    r.receive(welcome(2), [], T0 + 1)
    assert said(r) == []


def test_bye_of_a_runner_says_what_rllib_has() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(1), [], T0)
    r.give_back(T0)
    said(r)
    r.close(T0)
    assert said(r) == [BYE(1, [])]


def test_an_answer_past_the_deadline_is_cut() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    r.receive(TAKEN(1), [], T0)
    said(r)
    r.deadline = T0 + 54
    r.give_back(T0 + 55)
    assert said(r) == [RETURNED(1, [dropped("s", 1, "handover_cut")])]


@pytest.mark.parametrize("duty", ["park", "leave", "end"])
def test_off_duty_it_forgets_leases_but_for_what_it_claims(duty: Any) -> None:
    r = runner()
    for number in (1, 2):
        lease(r, number)
    r.take(1, T0)
    said(r)
    r.receive(DUTY(duty), [], T0)
    assert [key[1] for key in r.leased] == [1]
    r.receive(TAKEN(1), [], T0)
    assert r.taken is not None and [t.message.number for t in r.taken] == [1]
    assert r.take(10, T0) == 0
    r.receive(DUTY("serve"), [], T0)
    lease(r, 3)
    assert r.take(10, T0) > 0


def test_it_gives_back_up_to_a_hand_over() -> None:
    r = runner()
    for k in (1, 2):
        lease(r, k)
        r.take(10, T0)
        r.receive(TAKEN(k), [], T0)
    said(r)
    r.give_back(T0, 1)
    r.give_back(T0, 1)
    assert said(r) == [RETURNED(1, [])] and (r.returned, r.committed) == (1, 2)
    r.give_back(T0)
    assert said(r) == [RETURNED(2, [])]


def test_running_since_tells_a_stall() -> None:
    r = runner()
    for seconds in (1, 2, 3):
        r.receive(PONG(EPOCH), [], T0 + seconds)
    assert r.running_since(T0 + 3.5) == T0 + 3
    r.receive(PONG(EPOCH), [], T0 + 20)
    assert r.running_since(T0 + 20.5) == T0 + 3, "stopped since its last look"
    r.receive(PONG(EPOCH), [], T0 + 22)
    assert r.running_since(T0 + 24.4) == T0 + 3, "and perhaps once more"
    r.receive(PONG(EPOCH), [], T0 + 24)
    assert r.running_since(T0 + 24.5) == T0 + 24
    r.receive(PONG(EPOCH), [], T0 + 40)
    r.receive(PONG(EPOCH), [], T0 + 45)
    assert r.running_since(T0 + 45.5) == T0 + 24, "stopped twice in a row"


def test_an_offer_is_made_at_once_and_after_each_welcome() -> None:
    r = RunnerSession(session("r"), RUN)
    assert r.offered_version == -1
    r.open(T0)
    said(r)
    r.offer(3, 5, lambda: b"abcde", T0)
    assert (said(r), r.offered_version) == ([], 3)
    r.receive(welcome(), [], T0)
    assert said(r) == [OFFER(RUN, 3, 5)]
    r.offer(4, 5, lambda: b"fghij", T0)
    assert said(r) == [OFFER(RUN, 4, 5)]


def test_weights_are_served_in_pieces_and_made_once() -> None:
    r = runner()
    data = bytes(range(256)) * (CHUNK_BYTES // 128)
    made: list[int] = []

    def load() -> bytes:
        made.append(1)
        return data

    r.offer(3, len(data), load, T0)
    said(r)
    for offset in (0, CHUNK_BYTES):
        r.receive(GET_STATE(RUN, 3, offset), [], T0)
        (out,) = r.output
        r.output.clear()
        assert out.message == STATE(RUN, 3, len(data), offset, zlib.crc32(data))
        assert b"".join(out.body) == data[offset : offset + CHUNK_BYTES]
    assert made == [1]


def test_a_transfer_goes_on_while_a_newer_version_is_offered() -> None:
    r = runner()
    old, new = b"a" * (CHUNK_BYTES + 1), b"b" * 10
    r.offer(1, len(old), lambda: old, T0)
    r.receive(GET_STATE(RUN, 1, 0), [], T0)
    r.offer(2, len(new), lambda: new, T0)
    said(r)
    r.receive(GET_STATE(RUN, 1, CHUNK_BYTES), [], T0)
    assert [(m.version, m.offset, m.size) for m in said(r)] == [(1, CHUNK_BYTES, len(old))]
    r.receive(GET_STATE(RUN, 2, 0), [], T0)
    assert [(m.version, m.offset, m.size) for m in said(r)] == [(2, 0, 10)]


def test_who_asks_for_a_version_that_is_no_more_gets_the_newest_from_its_beginning() -> None:
    r = runner()
    r.offer(2, 3, lambda: b"new", T0)
    said(r)
    r.receive(GET_STATE(RUN, 1, 70), [], T0)
    assert [(m.version, m.offset, m.size) for m in said(r)] == [(2, 0, 3)]


def test_weights_of_another_run_are_not_served() -> None:
    r = runner()
    r.receive(GET_STATE(RUN, 0, 0), [], T0)
    r.offer(2, 3, lambda: b"new", T0)
    said(r)
    r.receive(GET_STATE("02", 2, 0), [], T0)
    assert said(r) == []


def test_a_runner_knows_of_the_pool() -> None:
    r = runner()
    r.receive(PONG(EPOCH, RUN, 4, taken_steps=90, round_steps=30, simulators=5, runners=2, sampled=95), [], T0)
    assert tuple(r.pool) == (4, 30, 90, 5, 2, 95)


# ---- a trainer, an observer


def test_duties_that_change_during_a_greeting_are_told_after_it() -> None:
    t = TrainerSession(session("t"), terms(), BLOB)
    t.open(T0)
    said(t)
    t.assign({session("r"): "leave"}, T0)
    assert said(t) == []
    t.receive(welcome(), [], T0)
    assert POOL([Assigned(session("r"), "leave")]) in said(t)
    t.change(terms(runners=2), T0)
    assert said(t)[0].peer.duties == [Assigned(session("r"), "leave")]


def test_a_trainer_knows_the_roster_and_what_is_wanted() -> None:
    t = TrainerSession(session("t"), terms(), BLOB)
    t.open(T0)
    t.receive(welcome(), [], T0)
    assert t.runners_wanted is None
    one = Present(session("r"), "r", 0.5, "serve", True)
    t.receive(PONG(EPOCH, RUN, runners_wanted=4, roster=[one]), [], T0 + 1)
    assert (t.runners_wanted, t.roster, t.roster_at, t.live_since) == (4, [one], T0 + 1, T0)


def test_a_trainer_serves_its_policy() -> None:
    t = TrainerSession(session("t"), terms(), BLOB)
    t.open(T0)
    assert said(t)[0].peer == terms()
    t.receive(welcome(), [], T0)
    assert [o.message for o in t.output] == [PING()], "it asks for the roster"
    t.output.clear()
    t.receive(GET_CONFIG("another"), [], T0)
    assert t.output == []
    t.receive(GET_CONFIG(POLICY, 4), [], T0)
    (out,) = t.output
    assert out.message == CONFIG(POLICY, len(BLOB), 4)
    assert b"".join(out.body) == BLOB[4:]


def test_new_terms_are_told_with_a_new_greeting() -> None:
    t = TrainerSession(session("t"), terms(), BLOB)
    t.open(T0)
    t.receive(welcome(), [], T0)
    said(t)
    t.change(terms(runners=4), T0)
    (hello,) = said(t)
    assert (hello.greeting, hello.peer.runners, t.state) == (2, 4, State.GREETING)
    t.receive(welcome(1), [], T0)
    assert t.state is State.GREETING
    t.receive(welcome(2), [], T0)
    assert t.state is State.LIVE


def test_services_are_heard_every_second() -> None:
    t = TrainerSession(session("t"), terms(), BLOB)
    t.open(T0)
    t.receive(welcome(), [], T0)
    said(t)
    t.tick(T0 + SERVICE_TIMING.ping)
    assert said(t) == [PING()]
    t.receive(PONG(EPOCH, RUN, 1, taken_steps=5, simulators=2), [], T0 + 1)
    assert (t.pool.taken_steps, t.pool.simulators) == (5, 2)


def test_an_observer_asks_until_there_are_spaces() -> None:
    o = ObserverSession(session("o"))
    o.open(T0)
    assert said(o)[0].peer == ObserverHello()
    o.receive(welcome(1, spaces=None), [], T0)
    o.tick(T0 + 0.1)
    assert said(o) == []
    o.tick(T0 + 0.25)
    assert [m.greeting for m in said(o)] == [2]
    o.receive(welcome(2, spaces=SPACES), [], T0 + 0.3)
    assert o.spaces == SPACES
    o.tick(T0 + 0.9)
    assert said(o) == []


def test_every_message_that_a_session_makes_can_be_encoded() -> None:
    r = runner()
    lease(r, 1)
    r.take(10, T0)
    for out in (*r.output, *simulator().output):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(out.message))["type"]
