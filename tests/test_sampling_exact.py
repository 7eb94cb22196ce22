"""What a call of `sample()` does for DQN and SAC, rule by rule, against a real `RunnerSession`."""

from __future__ import annotations

import pytest
from core_bench import fragment
from test_sampling import Desk

from rllink_zmq.messages import BYE, DUTY
from rllink_zmq.sampling import LATE, PROGRESS_WAIT, TOO_LATE, Next, SamplingRules
from rllink_zmq.sampling_exact import Answer, ExactCall, Stock
from rllink_zmq.session_runner import HANDOVER_CUT, Lease

EXACT = SamplingRules("exact", share=4, quota=8, timeout=60.0, linger=0.0, ahead=10)


class ExactDesk(Desk):
    """A stock, too. `spoiled`: numbers of fragments that can't be used. `counts`: how many steps of agents each env
    step of these fragments counts; else each is a step."""

    def __init__(self, counts: dict[int, list[int]] | None = None) -> None:
        super().__init__(EXACT)
        self.spoiled: set[int] = set()
        counted = None if counts is None else lambda lease: counts[lease.message.number]
        self.stock = Stock(self.session, self._check, counted)

    def _check(self, lease: Lease) -> str:
        return "malformed" if lease.message.number in self.spoiled else ""

    def call(self) -> ExactCall:
        self.stock.reached(self.now)
        return ExactCall(self.stock, self.rules, self.now)

    def answered(self) -> Answer:
        """A call that is answered without a TAKE."""
        call = self.call()
        assert call.step(self.now) is Next.RETURN
        assert not self.takes()
        return call.answer

    def taken(self) -> Answer:
        """A call that is answered after one TAKE."""
        call = self.call()
        assert call.step(self.now) is Next.WAIT
        self.grant()
        assert call.step(self.now) is Next.RETURN
        return call.answer


def parts(answer: Answer) -> list[tuple[int, int, int]]:
    """(number of the fragment, first step, steps) of each portion."""
    return [(lease.message.number, first, steps) for lease, first, steps in answer.portions]


def test_env_steps_are_given_until_enough_steps_of_agents_are_complete() -> None:
    """As RLlib's own runner does: an env step is not divided, and none goes on where there are enough."""
    desk = ExactDesk({1: [0, 3, 2, 0], 2: [1, 1, 0, 1, 1, 8], 3: [0, 0]})
    desk.lease(4, 6, 2)
    assert parts(desk.taken()) == [(1, 0, 3)]
    assert desk.stock.steps == 12
    assert parts(desk.answered()) == [(1, 3, 1), (2, 0, 5)]
    assert parts(desk.answered()) == [(2, 5, 1)]
    assert desk.stock.steps == 0 and not desk.stock.empty
    desk.receive(DUTY("leave"))
    assert parts(desk.answered()) == [(3, 0, 2)], "none of what it has stays with it"


def test_each_call_returns_its_share_and_fragments_are_cut_to_fit() -> None:
    desk = ExactDesk()
    desk.lease(6, 5, 3)
    assert parts(desk.taken()) == [(1, 0, 4)]
    assert parts(desk.answered()) == [(1, 4, 2), (2, 0, 2)]
    assert parts(desk.answered()) == [(2, 2, 3), (3, 0, 1)]
    assert desk.stock.steps == 2


def test_most_calls_need_no_take() -> None:
    """One brings what is missing and `ahead` more."""
    desk = ExactDesk()
    desk.lease(*[2] * 50)
    taken = 0
    for _ in range(25):
        call = desk.call()
        if call.step(desk.now) is Next.WAIT:
            taken += 1
            desk.grant()
            assert call.step(desk.now) is Next.RETURN
        assert call.steps == 4
    assert taken <= 10


def test_a_fragment_is_returned_when_rllib_has_all_of_it() -> None:
    desk = ExactDesk()
    desk.lease(6)
    assert parts(desk.taken()) == [(1, 0, 4)]
    desk.stock.reached(desk.now)
    assert not desk.told() and desk.session.returned == 0
    desk.lease(2)
    assert parts(desk.taken()) == [(1, 4, 2), (2, 0, 2)]
    desk.stock.reached(desk.now)
    assert desk.told() == [(2, {})]


def test_an_answer_that_may_be_late_is_cut_and_nothing_continues_it() -> None:
    """Its fragments are told as such when all of them are given; the rest of them is given all the same."""
    desk = ExactDesk()
    desk.lease(6, 6)
    assert not desk.taken().fresh
    desk.now += 0.95 * EXACT.timeout  # the process was stopped with the answer in its hands
    assert desk.answered() == Answer([], False), "RLlib may have given this call up"
    answer = desk.answered()
    assert answer.fresh and parts(answer) == [(1, 4, 2), (2, 0, 2)]
    assert not desk.answered().fresh
    desk.stock.reached(desk.now)
    assert desk.told() == [(1, {1: HANDOVER_CUT})]


def test_with_too_few_steps_it_is_silent_past_the_timeout_and_keeps_them() -> None:
    desk = ExactDesk()
    desk.lease(3)
    call = desk.call()
    call.step(desk.now)
    desk.grant()
    assert call.step(desk.now) is Next.WAIT
    assert call.wake == desk.now + EXACT.timeout + LATE
    desk.now += TOO_LATE * EXACT.timeout + 0.1
    desk.look()
    desk.lease(3)
    assert call.step(desk.now) is Next.WAIT
    desk.grant()
    assert call.step(desk.now) is Next.WAIT, "it has enough now, and RLlib may give it up before it gets it"
    desk.now = call.wake
    desk.look()
    assert call.step(desk.now) is Next.RETURN and parts(call.answer) == []
    assert desk.session.returned == 0
    assert parts(desk.answered()) == [(1, 0, 3), (2, 0, 1)]


def test_no_call_ends_while_something_is_being_claimed() -> None:
    desk = ExactDesk()
    call = desk.call()
    call.step(desk.now)
    desk.now = call.wake - 0.01
    desk.look()
    desk.lease(3)
    assert call.step(desk.now) is Next.WAIT
    desk.now += 0.02
    assert call.step(desk.now) is Next.WAIT, "TAKE is on its way"
    desk.grant()
    desk.lease(3)
    assert call.step(desk.now) is Next.RETURN
    assert not desk.takes() and desk.stock.steps == 3


def test_what_cant_be_used_is_told_at_once_and_another_one_has_its_place() -> None:
    desk = ExactDesk()
    desk.spoiled = {1}
    desk.lease(6)
    call = desk.call()
    call.step(desk.now)
    desk.grant()
    assert call.step(desk.now) is Next.WAIT
    assert desk.told() == [(1, {1: "malformed"})]
    desk.lease(6)
    call.step(desk.now)
    desk.grant()
    assert call.step(desk.now) is Next.RETURN
    assert parts(call.answer) == [(2, 0, 4)]


@pytest.mark.parametrize("duty", ["park", "leave", "end"])
def test_who_is_not_to_serve_returns_all_that_it_has(duty: str) -> None:
    desk = ExactDesk()
    desk.lease(6, 6)
    desk.taken()
    desk.receive(DUTY(duty))  # type: ignore[arg-type]
    assert parts(desk.answered()) == [(1, 4, 2), (2, 0, 6)]
    call = desk.call()
    waits = {"park": EXACT.timeout + LATE, "leave": PROGRESS_WAIT, "end": 0.0}[duty]
    if waits:
        assert call.step(desk.now) is Next.WAIT
        assert call.wake == pytest.approx(desk.now + waits)
    assert call.step(desk.now + waits) is Next.RETURN and not call.answer.portions
    assert desk.session.returned == desk.session.committed


def test_what_rllib_will_not_ask_for_is_given_up_and_counted() -> None:
    desk = ExactDesk()
    desk.lease(6, 6)
    desk.taken()
    desk.stock.give_up(desk.now)
    assert desk.told() == [(1, {1: HANDOVER_CUT, 2: "late"})]
    desk.session.close(desk.now)
    (bye,) = [o.message for o in desk.session.output if isinstance(o.message, BYE)]
    assert bye.returned == 1 and desk.stock.steps == 0


def starve(desk: ExactDesk, *, simulators: int) -> None:
    """A whole call in which nothing comes."""
    call = desk.call()
    desk.session.pool = desk.session.pool._replace(simulators=simulators)
    call.step(desk.now)
    desk.now = call.wake
    desk.session.tick(desk.now)
    assert call.step(desk.now) is Next.RETURN and not call.steps


def kept_three() -> ExactDesk:
    desk = ExactDesk()
    desk.lease(3)
    call = desk.call()
    call.step(desk.now)
    desk.grant()
    call.step(desk.now)
    desk.now = call.wake
    desk.session.tick(desk.now)
    assert call.step(desk.now) is Next.RETURN and not call.steps
    return desk


def test_windows_that_are_full_of_what_runners_keep_are_emptied() -> None:
    """Nothing came during a whole call, though somebody is there: the next one returns what there is."""
    desk = kept_three()
    starve(desk, simulators=1)
    call = desk.call()
    assert call.step(desk.now) is Next.WAIT and call.wake == desk.now + PROGRESS_WAIT
    assert call.step(desk.now + PROGRESS_WAIT) is Next.RETURN
    assert call.short and parts(call.answer) == [(1, 0, 3)]


def test_without_simulators_no_answer_is_short() -> None:
    desk = kept_three()
    starve(desk, simulators=0)
    call = desk.call()
    assert call.step(desk.now) is Next.WAIT and call.wake > desk.now + PROGRESS_WAIT


@pytest.mark.parametrize("others", [True, False])
def test_who_has_nothing_lets_others_go_on_if_they_can(others: bool) -> None:
    """After a call without anything, and while the pool takes steps. Else `train()` would not come back."""
    desk = ExactDesk()
    desk.session.pool = desk.session.pool._replace(taken_steps=100)
    starve(desk, simulators=1)
    if others:
        desk.session.pool = desk.session.pool._replace(taken_steps=104)
    call = desk.call()
    call.step(desk.now)
    assert call.step(desk.now + PROGRESS_WAIT) is (Next.RETURN if others else Next.WAIT)
    assert not call.steps


def test_a_duplicate_is_not_stocked() -> None:
    """Granted twice (a broker that forgot): RLlib gets it once."""
    desk = ExactDesk()
    desk.lease(4)
    desk.taken()
    desk.stock.reached(desk.now)
    desk.session.output.clear()
    desk.receive(fragment("s", 1, steps=4), [b""])
    call = desk.call()
    call.step(desk.now)
    desk.grant()
    assert call.step(desk.now) is Next.WAIT
    assert desk.stock.steps == 0
    assert desk.told() == [(2, {1: "duplicate"})]
