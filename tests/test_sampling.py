"""What one call of `sample()` does, rule by rule, against a real `RunnerSession` that is told what comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from core_bench import EPOCH, RUN, claim, fragment, session

from rllink_zmq.messages import DUTY, PING, PONG, RETURNED, TAKE, TAKEN, WELCOME
from rllink_zmq.sampling import LATE, PROGRESS_WAIT, TOO_LATE, Next, SampleCall, SamplingRules
from rllink_zmq.session_runner import AFTER_STALL, STALL, RunnerSession

ROUND = SamplingRules("round", share=50, quota=100, timeout=60.0, linger=0.2)
STREAM = SamplingRules("stream", share=50, quota=500, timeout=60.0, linger=0.5)


class Desk:
    """A live runner session, and a call of `sample()`."""

    def __init__(self, rules: SamplingRules = ROUND, *, now: float = 1000.0, version: int = 0) -> None:
        self.now = now
        self.rules = rules
        self.session = RunnerSession(session("r"), RUN)
        self.session.open(now)
        self.receive(WELCOME(EPOCH, 1, 1000, 0, 0, 1, RUN, version))
        self.session.offer(version, 1, lambda: b"w", now)
        self.session.output.clear()
        self.numbers = 0

    def receive(self, message: Any, body: Sequence[bytes] = ()) -> None:
        self.session.receive(message, body, self.now)

    def look(self) -> None:
        """The I/O thread looks, and finds the answer to its PING."""
        pool = self.session.pool
        self.pong(taken_steps=pool.taken_steps, version=pool.version, round_steps=pool.round_steps)
        self.session.tick(self.now)
        self.session.output[:] = [o for o in self.session.output if not isinstance(o.message, PING)]

    def lease(self, *steps: int) -> None:
        for n in steps:
            self.numbers += 1
            self.receive(fragment("s", self.numbers, steps=n), [b""])

    def begin(self, *, repeated: bool = False) -> SampleCall:
        self.session.give_back(self.now)
        return SampleCall(self.session, self.rules, self.now, repeated=repeated)

    def takes(self) -> list[TAKE]:
        out = [o.message for o in self.session.output if isinstance(o.message, TAKE)]
        self.session.output.clear()
        return out

    def grant(self, *, refused: Sequence[int] = (), version: int = 0, round_steps: int = 0) -> None:
        (take,) = self.takes()
        refusal = [claim("s", *refused)] if refused else []
        self.receive(TAKEN(take.k, refusal, version, round_steps))

    def pong(self, *, taken_steps: int, version: int = 0, round_steps: int = 0) -> None:
        self.receive(PONG(EPOCH, RUN, version, taken_steps=taken_steps, round_steps=round_steps))

    def told(self) -> list[tuple[int, dict[int, str]]]:
        """(k, {number: reason}) of each RETURNED."""
        out = [o.message for o in self.session.output if isinstance(o.message, RETURNED)]
        self.session.output.clear()
        return [(m.k, {d.number: d.reason for d in m.dropped}) for m in out]


# ---- what both styles share


@pytest.mark.parametrize("rules", [ROUND, STREAM])
def test_what_is_leased_is_taken_and_only_what_is_granted_is_handed_over(rules: SamplingRules) -> None:
    desk = Desk(rules)
    desk.lease(20, 20, 20)
    call = desk.begin()
    assert call.step(desk.now) is Next.WAIT
    assert call.step(desk.now) is Next.WAIT, "nothing happens before TAKEN"
    desk.grant(refused=[2], round_steps=40)
    call.step(desk.now)
    assert [lease.message.number for lease in call.leases] == [1, 3]
    assert call.steps == 40


@pytest.mark.parametrize("rules", [ROUND, STREAM])
def test_no_more_is_taken_than_reaches_the_share(rules: SamplingRules) -> None:
    desk = Desk(rules)
    desk.lease(30, 30, 30)
    call = desk.begin()
    call.step(desk.now)
    desk.grant(round_steps=60)
    assert call.step(desk.now) is Next.RETURN
    assert (call.steps, desk.session.leased_steps) == (60, 30)


@pytest.mark.parametrize("rules", [ROUND, STREAM])
def test_the_rest_comes_with_a_second_take(rules: SamplingRules) -> None:
    desk = Desk(rules)
    desk.lease(30)
    call = desk.begin()
    call.step(desk.now)
    desk.grant(round_steps=30)
    assert call.step(desk.now) is Next.WAIT
    desk.lease(30)
    call.step(desk.now)
    desk.grant(round_steps=60)
    assert call.step(desk.now) is Next.RETURN
    assert desk.session.committed == 2


@pytest.mark.parametrize("rules", [ROUND, STREAM])
def test_it_returns_a_while_after_the_first_data(rules: SamplingRules) -> None:
    desk = Desk(rules)
    desk.lease(10)
    call = desk.begin()
    call.step(desk.now)
    desk.grant(round_steps=10)
    assert call.step(desk.now) is Next.WAIT
    assert call.wake == desk.now + rules.linger
    assert call.step(call.wake) is Next.RETURN
    assert call.steps == 10


@pytest.mark.parametrize("rules", [ROUND, STREAM])
def test_a_cancelled_call_returns_as_soon_as_nothing_is_being_claimed(rules: SamplingRules) -> None:
    desk = Desk(rules)
    desk.lease(10)
    call = desk.begin()
    call.step(desk.now)
    call.cancel()
    assert call.step(desk.now) is Next.WAIT
    desk.grant()
    assert call.step(desk.now) is Next.RETURN
    assert call.steps == 10


@pytest.mark.parametrize("rules", [ROUND, STREAM])
def test_a_claim_that_a_new_greeting_ends_is_made_again(rules: SamplingRules) -> None:
    desk = Desk(rules)
    desk.lease(10)
    call = desk.begin()
    call.step(desk.now)
    desk.session.send_failed(desk.now)
    assert call.step(desk.now) is Next.WAIT
    desk.session.tick(desk.now + 1)
    desk.receive(WELCOME(EPOCH, 2, 1000, 0, 0, 1, RUN, 0))
    desk.session.output.clear()
    assert call.step(desk.now + 1) is Next.WAIT
    assert not desk.takes(), "what was leased is forgotten at WELCOME"
    desk.lease(10)
    call.step(desk.now + 1)
    assert [take.k for take in desk.takes()] == [2]


# ---- stream: APPO, IMPALA


def test_a_stream_never_returns_nothing() -> None:
    desk = Desk(STREAM)
    call = desk.begin()
    for seconds in (1, 59, 61, 1000, 100_000):
        assert call.step(desk.now + seconds) is Next.WAIT


def test_a_stream_waits_on_when_everything_was_refused() -> None:
    desk = Desk(STREAM)
    desk.lease(10)
    call = desk.begin()
    call.step(desk.now)
    desk.grant(refused=[1])
    assert call.step(desk.now + STREAM.linger + 1) is Next.WAIT
    assert call.leases == []


def test_a_stream_has_no_deadline() -> None:
    desk = Desk(STREAM)
    desk.lease(50)
    call = desk.begin()
    desk.now += 10_000
    call.step(desk.now)
    desk.grant()
    assert call.step(desk.now) is Next.RETURN
    desk.now += 10_000
    desk.session.give_back(desk.now)
    assert desk.told() == [(1, {})]


# ---- round: PPO


def test_a_round_takes_no_more_than_the_round_still_wants() -> None:
    desk = Desk()
    desk.pong(taken_steps=80, round_steps=80)
    desk.lease(10, 10, 10)
    call = desk.begin()
    call.step(desk.now)
    desk.grant(round_steps=100)
    assert call.step(desk.now) is Next.RETURN
    assert (call.steps, call.round_was_full) == (20, True)


def test_a_full_round_gives_nothing_and_says_so() -> None:
    desk = Desk()
    desk.pong(taken_steps=100, round_steps=100)
    desk.lease(10)
    call = desk.begin()
    assert call.step(desk.now) is Next.RETURN
    assert (call.leases, call.round_was_full) == ([], True)


def test_asked_again_in_a_full_round_it_gives_its_share() -> None:
    """RLlib lost some of what was taken, and asks for more."""
    desk = Desk()
    desk.pong(taken_steps=100, round_steps=100)
    desk.lease(50)
    call = desk.begin(repeated=True)
    call.step(desk.now)
    desk.grant(round_steps=150)
    assert call.step(desk.now) is Next.RETURN
    assert call.steps == 50


def test_steps_of_another_version_do_not_fill_this_round() -> None:
    desk = Desk(version=3)
    desk.pong(taken_steps=100, version=2, round_steps=100)
    desk.lease(50)
    call = desk.begin()
    assert call.step(desk.now) is Next.WAIT
    assert desk.takes()


def test_steps_are_counted_as_the_rules_weigh_them() -> None:
    desk = Desk(ROUND._replace(weigh=lambda message: 2 * message.steps))
    desk.lease(20, 20, 20)
    call = desk.begin()
    assert call.step(desk.now) is Next.WAIT
    assert [c.numbers for c in desk.takes()[0].claims] == [[1, 2]], "40 env steps count 80, the share is 50"


def test_nothing_is_returned_while_others_make_progress() -> None:
    desk = Desk()
    call = desk.begin()
    desk.pong(taken_steps=40, round_steps=40)
    assert call.step(desk.now) is Next.WAIT
    assert call.wake == desk.now + PROGRESS_WAIT
    assert call.step(call.wake) is Next.RETURN
    assert call.leases == []


def test_silent_past_the_timeout_while_nobody_has_data() -> None:
    """Then `train()` comes back: RLlib gives all calls up."""
    desk = Desk()
    call = desk.begin()
    times = [desk.now]
    while call.step(times[-1]) is Next.WAIT:
        assert call.wake > times[-1]
        times.append(call.wake)
    assert times[-1] == desk.now + ROUND.timeout + LATE


def test_nothing_is_taken_after_half_of_the_timeout() -> None:
    desk = Desk()
    call = desk.begin()
    desk.now += ROUND.timeout / 2
    desk.look()
    desk.lease(50)
    assert call.step(desk.now) is Next.WAIT
    assert not desk.takes()


def test_what_is_granted_too_late_to_be_returned_is_dropped_as_late() -> None:
    desk = Desk()
    desk.lease(20)
    call = desk.begin()
    call.step(desk.now)
    desk.now += TOO_LATE * ROUND.timeout + 0.1
    desk.grant()
    call.step(desk.now)
    assert call.leases == []
    desk.session.give_back(desk.now)
    assert desk.told() == [(1, {1: "late"})]


# ---- round: RLlib's clock began before this call did


def returned_call(desk: Desk) -> SampleCall:
    """A call that has just returned its share."""
    desk.lease(50)
    call = desk.begin()
    call.step(desk.now)
    desk.grant()
    assert call.step(desk.now) is Next.RETURN
    return call


def test_an_answer_in_time_was_delivered() -> None:
    desk = Desk()
    returned_call(desk)
    desk.now += 1.0
    desk.session.give_back(desk.now)
    assert desk.told() == [(1, {})]


def test_an_answer_that_may_have_been_late_is_cut() -> None:
    """The process was stopped while it returned: nobody knows whether RLlib waited for it."""
    desk = Desk()
    returned_call(desk)
    desk.now += ROUND.timeout + 5
    desk.session.give_back(desk.now)
    assert desk.told() == [(1, {1: "handover_cut"})]


def test_a_late_drop_keeps_its_own_reason() -> None:
    desk = Desk()
    call = returned_call(desk)
    desk.session.drop(call.leases[0].message, "malformed")
    desk.now += ROUND.timeout + 5
    desk.session.give_back(desk.now)
    assert desk.told() == [(1, {1: "malformed"})]


def idle(desk: Desk, seconds: float) -> None:
    """Nothing is called, and the I/O thread looks every second."""
    end = desk.now + seconds
    while desk.now < end:
        desk.now = min(end, desk.now + 1.0)
        desk.look()


def test_a_call_after_a_pause_of_rllib_has_all_of_its_time() -> None:
    desk = Desk()
    returned_call(desk)
    idle(desk, 500)
    call = desk.begin()
    call.step(desk.now + ROUND.timeout / 2 - 0.1)
    desk.lease(50)
    call.step(desk.now + ROUND.timeout / 2 - 0.1)
    assert desk.takes()


def test_a_call_that_waited_behind_one_that_was_given_up_is_as_old_as_that() -> None:
    """Calls without data end `LATE` after their timeout: without this the delay would grow by `LATE` each time."""
    desk = Desk()
    start = desk.now
    for n in range(1, 40):
        call = desk.begin()
        while call.step(desk.now) is Next.WAIT:
            desk.now = min(call.wake, desk.now + 1.0)
            desk.look()
        assert desk.now == pytest.approx(start + n * ROUND.timeout + LATE)


def test_a_call_that_waited_for_longer_than_its_timeout_gives_nothing_at_once() -> None:
    desk = Desk()
    returned_call(desk)
    idle(desk, 2)
    desk.now += 3 * ROUND.timeout  # stopped; RLlib gave up this call meanwhile
    desk.look()
    desk.lease(50)
    call = desk.begin()
    assert call.step(desk.now) is Next.RETURN
    assert call.leases == []


@pytest.mark.parametrize("look_first", [True, False])
def test_calls_that_waited_while_the_process_was_stopped_take_nothing_until_one_can_be_answered(
    look_first: bool,
) -> None:
    desk = Desk()
    returned_call(desk)
    idle(desk, 2)
    stopped = desk.now
    desk.now += 3.2 * ROUND.timeout
    if look_first:
        desk.look()
    desk.lease(50)
    sent = []
    for _ in range(5):  # RLlib sent one every 60 s, at 0, 60, 120 and 180; it still waits for the last one
        call = desk.begin()
        if call.step(desk.now) is Next.WAIT:
            break
        assert call.leases == []
        assert desk.session.last_call is not None
        sent.append(desk.session.last_call[0] - stopped)
        desk.now += 0.01
    assert sent == pytest.approx([0, 60, 120])
    assert desk.takes(), "the one that RLlib waits for takes"


def test_a_call_just_after_a_stall_is_as_old_as_the_stall() -> None:
    desk = Desk()
    returned_call(desk)
    idle(desk, 5)
    desk.now += 40
    desk.look()
    desk.now += STALL  # it may have been stopped again for less than shows
    desk.lease(50)
    call = desk.begin()
    assert call.step(desk.now) is Next.RETURN, "it is past half of the timeout"
    desk.now += 0.1
    call = desk.begin()
    call.step(desk.now)
    assert desk.takes(), "RLlib had that answer in time: this call is fresh"


def test_a_call_long_after_a_stall_is_fresh() -> None:
    desk = Desk()
    returned_call(desk)
    desk.now += 40
    desk.look()
    idle(desk, AFTER_STALL + 1)
    desk.lease(50)
    call = desk.begin()
    call.step(desk.now)
    assert desk.takes()


# ---- off duty


@pytest.mark.parametrize("duty", ["park", "leave", "end"])
@pytest.mark.parametrize("rules", [ROUND, STREAM])
def test_off_duty_it_returns_what_it_has_and_takes_nothing(rules: SamplingRules, duty: Any) -> None:
    desk = Desk(rules)
    desk.lease(20, 20)
    desk.receive(DUTY("serve"))
    call = desk.begin()
    desk.session.take(20, desk.now)
    desk.grant(round_steps=20)
    desk.receive(DUTY(duty))
    assert call.step(desk.now) is Next.RETURN
    assert call.steps == 20 and desk.takes() == []


def test_one_that_leaves_is_soon_out_of_a_round() -> None:
    desk = Desk(ROUND)
    call = desk.begin()
    desk.receive(DUTY("leave"))
    assert call.step(desk.now) is Next.WAIT
    desk.now = call.wake
    assert call.step(desk.now) is Next.RETURN
    assert desk.now <= 1000.0 + PROGRESS_WAIT


def test_one_that_is_parked_is_silent_past_the_timeout_or_serves_again() -> None:
    desk = Desk(ROUND)
    call = desk.begin()
    desk.receive(DUTY("park"))
    assert call.step(desk.now) is Next.WAIT
    assert call.wake == desk.now + 60.0 + LATE
    desk.now += 10
    desk.look()
    desk.receive(DUTY("serve"))
    desk.lease(50)
    assert call.step(desk.now) is Next.WAIT
    desk.grant(round_steps=50)
    assert call.step(desk.now) is Next.RETURN and call.steps == 50


@pytest.mark.parametrize("duty", ["park", "leave"])
def test_in_a_stream_it_never_returns_an_empty_list_before_the_end(duty: Any) -> None:
    desk = Desk(STREAM)
    call = desk.begin()
    desk.receive(DUTY(duty))
    for _ in range(5):
        assert call.step(desk.now) is Next.WAIT
        desk.now = call.wake
    desk.receive(DUTY("end"))
    assert call.step(desk.now) is Next.RETURN


def test_the_share_follows_the_number_of_runners() -> None:
    desk = Desk(ROUND)
    desk.receive(PONG(EPOCH, RUN, 0, runners=4))
    desk.lease(20, 20, 20, 20)
    call = desk.begin()
    call.step(desk.now)
    assert sum(len(c.numbers) for t in desk.takes() for c in t.claims) == 2, "25 of 100 steps"


def test_what_has_been_sampled_is_known_from_welcome_on() -> None:
    """A service acts by it: before the first PONG epsilon would be the beginning's."""
    desk = Desk()
    desk.session.send_failed(desk.now)
    desk.session.tick(desk.now + 1)
    desk.receive(WELCOME(EPOCH, 2, 1000, 0, 0, 1, RUN, 0, sampled=50_000))
    assert desk.session.pool.sampled == 50_000
