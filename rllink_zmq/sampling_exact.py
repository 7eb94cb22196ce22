"""What a `sample()` call does for algorithms with a replay buffer (DQN, SAC), sans-IO: exactly `share` steps.

The ratio of learner updates to env steps is the user's, and RLlib counts on what its own runner would give: so a call
returns `share` steps or none. Fragments are cut to fit. What is left of one, and what a TAKE brought beyond what was
missing (`ahead`), stays here for the next calls: most of them need no TAKE, and no round trip. That is the `Stock`.

- RETURNED for a hand-over `k` is said when RLlib has all of what it took up to `k`. If the runner dies before, such a
  fragment is `handover_cut` as a whole.
- RLlib calls all runners, waits for every answer, and throws away unseen what is later than `timeout`. A call that
  has too few steps by then keeps them, and is silent past the timeout: then `train()` comes back.
- An answer may be too late all the same (the process was stopped). Nobody knows then whether RLlib has it: its
  fragments are reported as `handover_cut`, and `Answer.fresh` says that nothing continues what was answered before.
- If nothing at all came during such a call, though there are simulators, their windows may be full of just what runners
  keep. So the next call returns what there is, if still nothing comes: the one answer that is short. One that has
  nothing at all returns an empty list then, if others have made progress lately.
- A runner that is not to serve returns all that it has at once: it may not be asked again. One whose training has ended
  drops it as `late`.
- Where steps of agents count, a call returns env steps until there are enough of these, as RLlib's own runner does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

from rllink_zmq.sampling import LATE, PROGRESS_WAIT, TOO_LATE, Next, SampleCall, SamplingRules
from rllink_zmq.session_runner import HANDOVER_CUT, Lease, RunnerSession


class Portion(NamedTuple):
    """Env steps `first` to `first + steps - 1` of a fragment."""

    lease: Lease
    first: int
    steps: int


class Answer(NamedTuple):
    """What RLlib gets, in the order in which it was taken. `fresh`: RLlib may lack what it was given before, so the
    rest of an episode is no continuation of it."""

    portions: list[Portion]
    fresh: bool


class _Item:
    """A fragment that was taken with `k`. RLlib has been given its first `given` env steps. `sums`: how many steps its
    env steps count, up to each; None = as many as they are."""

    __slots__ = ("given", "k", "lease", "sums")

    def __init__(self, lease: Lease, k: int, sums: Sequence[int] | None) -> None:
        self.lease = lease
        self.k = k
        self.sums = sums
        self.given = 0

    @property
    def left(self) -> int:
        """The steps that count and have not been given."""
        return self.counted(self.given, self.lease.message.steps)

    def counted(self, first: int, last: int) -> int:
        """What env steps `first` to `last` - 1 count."""
        if self.sums is None:
            return last - first
        return (self.sums[last - 1] if last else 0) - (self.sums[first - 1] if first else 0)

    def until(self, steps: int) -> int:
        """The first env step with which so many steps more have been given, counted from 1; all, if it has fewer."""
        if self.sums is None:
            return min(self.given + steps, self.lease.message.steps)
        reached = self.counted(0, self.given) + steps
        return min(bisect_left(self.sums, reached, self.given) + 1, self.lease.message.steps)


class Stock:
    """What a runner has taken and has not given to RLlib: `steps` of those that count. `check`: why a fragment can't be
    used, '' if it can. `counts`: how many steps each env step of one counts, None = each one. `starved`: nothing came
    during all of the last call. `moved`: how many env steps all runners had taken when that last changed, and since
    when."""

    def __init__(
        self,
        session: RunnerSession,
        check: Callable[[Lease], str] = lambda lease: "",
        counts: Callable[[Lease], Sequence[int]] | None = None,
    ) -> None:
        self.session = session
        self._counts = counts
        self.steps = 0
        self.starved = False
        self.moved = (-1, float("-inf"))
        self._check = check
        self._items: deque[_Item] = deque()
        self._answered: list[Lease] = []
        self._deadline = float("inf")
        self._fresh = False

    def put(self, lease: Lease) -> None:
        """It was granted by the last TAKEN."""
        self.starved = False
        reason = self._check(lease)
        if reason:
            self.session.drop(lease.message, reason)
            return
        sums = None if self._counts is None else list(accumulate(self._counts(lease)))
        self._items.append(_Item(lease, self.session.committed, sums))
        self.steps += self._items[-1].left

    @property
    def empty(self) -> bool:
        return not self._items

    def answer(self, steps: int | None, deadline: float) -> Answer:
        """As many env steps as it takes for `steps`, or all of them, the oldest first, for an answer that is thrown
        away unseen after `deadline`."""
        portions: list[Portion] = []
        while self._items and (steps is None or steps > 0):
            item = self._items[0]
            first, last = item.given, item.lease.message.steps if steps is None else item.until(steps)
            portions.append(Portion(item.lease, first, last - first))
            counted = item.counted(first, last)
            item.given = last
            self.steps -= counted
            if steps is not None:
                steps -= counted
            if item.given == item.lease.message.steps:
                self._items.popleft()
        self._answered = [portion.lease for portion in portions]
        self._deadline = deadline
        fresh, self._fresh = self._fresh, self._fresh and not portions
        return Answer(portions, fresh)

    def reached(self, now: float) -> None:
        """RLlib has the last answer, unless it is too late: then nobody knows."""
        if self._answered and now > self._deadline:
            self._fresh = True
            for lease in self._answered:
                self.session.drop(lease.message, HANDOVER_CUT)
        self._answered = []
        self.session.give_back(now, self._items[0].k - 1 if self._items else None)

    def give_up(self, now: float) -> None:
        """RLlib will not ask again: what it has not been given is dropped."""
        for item in self._items:
            self.session.drop(item.lease.message, HANDOVER_CUT if item.given else "late")
        self._items.clear()
        self.steps = 0
        self.reached(now)


class ExactCall(SampleCall):
    """One call of `sample()`, as `SampleCall` is; the result is in `answer`. `short`: it has fewer steps than wanted,
    since no more come."""

    def __init__(self, stock: Stock, rules: SamplingRules, now: float) -> None:
        super().__init__(stock.session, rules, now)
        self.answer = Answer([], False)
        self.short = False
        self._stock = stock
        self._hungry = True
        self._deadline = self._submitted + TOO_LATE * rules.timeout

    def _step(self, now: float) -> Next:
        session, rules, stock = self.session, self.rules, self._stock
        if session.taken:
            self._hungry = False
            for lease in session.taken:
                stock.put(lease)
            stock.reached(now)  # what can't be used is told at once
        session.taken = None
        if stock.moved[0] != session.pool.taken_steps:
            stock.moved = session.pool.taken_steps, now
        if session.claiming:
            self.wake = now + rules.timeout
            return Next.WAIT
        if self._cancelled or self._started > self._deadline:
            return Next.RETURN  # RLlib may have given this call up; if not, the next one starts afresh
        in_time = now <= self._deadline
        if session.duty != "serve":
            if in_time and not stock.empty:
                return self._give(None)
            return self._off_duty(now)
        if stock.steps >= rules.share and in_time:
            return self._give(rules.share)
        patience, late = self._started + PROGRESS_WAIT, self._submitted + rules.timeout + LATE
        if now >= late:
            stock.starved = self._hungry and session.pool.simulators > 0
            return Next.RETURN
        if stock.steps < rules.share:
            session.take(rules.share - stock.steps + rules.ahead, now, rules.weigh)
            if not session.claiming and stock.starved and in_time:
                if now < patience:
                    late = patience
                elif not stock.empty or now < stock.moved[1] + rules.timeout:
                    self.short = True
                    return self._give(None)
        self.wake = late
        return Next.WAIT

    def _give(self, steps: int | None) -> Next:
        self.answer = self._stock.answer(steps, self._deadline)
        self.steps = sum(portion.steps for portion in self.answer.portions)
        return Next.RETURN

    def _off_duty(self, now: float) -> Next:
        """It has nothing. One that leaves is out of the round soon; one that is parked is silent past the timeout."""
        duty = self.session.duty
        if duty == "end":
            return Next.RETURN
        late = self._submitted + self.rules.timeout + LATE
        until = min(self._started + PROGRESS_WAIT, late) if duty == "leave" and self._stock.empty else late
        if now >= until:
            return Next.RETURN
        self.wake = until
        return Next.WAIT


__all__ = ["Answer", "ExactCall", "Portion", "Stock"]
