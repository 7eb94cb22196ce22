"""What one `sample()` call does, sans-IO: how much to take, when to wait, when to return.

RLlib's algorithms want different things of a runner, and none says so (`docs/rllib.md`):

- **round** (PPO): RLlib calls all runners, waits for every answer, and goes on until its batch is full. An answer
  later than `timeout` is thrown away unseen. So: return at this runner's share, or `linger` after the first data; with
  nothing to give return an empty list only while other runners make progress. When nobody has data stay silent past
  the timeout: then `train()` comes back. Nothing is taken after half of the timeout, and what was granted too late to
  be returned in time is dropped with the reason `late`. RLlib's clock starts when it sends the call, which may then
  wait in the actor: behind a call that RLlib has given up, or while the process is stopped.
- **stream** (APPO, IMPALA): calls are asynchronous and *counted*: each is taken for a full fragment, and a package of
  empty ones ends the training. So: wait for `share` steps, never return an empty list.
- **exact** (DQN, SAC): as a round, but each answer has `share` steps: see `rllink_zmq.sampling_exact`.

A runner that is not to serve returns what it has and takes nothing. With nothing to give: one that leaves is out of a
round soon, since others go on with it; one that is parked (nobody goes on) is silent past the timeout, so that
`train()` comes back; in a stream both stay silent until RLlib forgets the call or the runner serves again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

from rllink_zmq.messages import FRAGMENT
from rllink_zmq.session_runner import AWAKE, Lease, RunnerSession, env_steps

PROGRESS_WAIT = 0.3
"""Seconds that a runner of a round waits for its first data before it looks whether others make progress."""

LATE = 1.0
"""Seconds past the timeout after which a silent call returns: RLlib has given it up by then."""

Style: TypeAlias = Literal["round", "stream", "exact"]

TOO_LATE = 0.9
"""Part of the timeout after which an answer might not reach RLlib in time."""


class SamplingRules(NamedTuple):
    """`share`: env steps wanted of one call; in a round it is a part of the quota, for as many runners as the broker
    counts. `quota`: env steps that all runners together give for one weights version. Times in seconds. `ahead`: of
    the exact style, the env steps that are taken beyond what is missing. `weigh`: how many steps a fragment counts,
    where `share` and `quota` are not of env steps."""

    style: Style
    share: int
    quota: int
    timeout: float
    linger: float
    ahead: int = 0
    weigh: Callable[[FRAGMENT], int] = env_steps


class Next(Enum):
    WAIT = "wait"
    RETURN = "return"


class SampleCall:
    """One call of `sample()`. `step(now)` is to be called whenever something came, and at `wake`; the result is in
    `leases` when it says `Next.RETURN`."""

    def __init__(self, session: RunnerSession, rules: SamplingRules, now: float, *, repeated: bool = False) -> None:
        self.session = session
        self.rules = rules
        self.leases: list[Lease] = []
        self.steps = 0
        self.wake = now
        self.round_was_full = False
        self._repeated = repeated
        self._started = now
        self._submitted = _submitted(session, rules.timeout, now)
        self._first: float | None = None
        self._pool_at_start = session.pool.taken_steps
        self._mine = 0
        self._cancelled = False
        session.taken = None
        session.deadline = self._submitted + TOO_LATE * rules.timeout if rules.style == "round" else float("inf")

    def cancel(self) -> None:
        """Return as soon as nothing is being claimed."""
        self._cancelled = True

    def step(self, now: float) -> Next:
        what = self._step(now)
        if what is Next.RETURN:
            self.session.last_call = (self._submitted, now)
        return what

    def _step(self, now: float) -> Next:
        session = self.session
        if session.taken is not None:
            late = now > session.deadline
            for lease in session.taken:
                if late:
                    session.drop(lease.message, "late")
                    continue
                self.leases.append(lease)
                self.steps += self.rules.weigh(lease.message)
                self._mine += lease.message.steps
            if session.taken and self._first is None:
                self._first = now
            session.taken = None
        if session.claiming:
            self.wake = now + self.rules.timeout
            return Next.WAIT
        if self._cancelled:
            return Next.RETURN
        if session.duty != "serve":
            return self._off_duty(now)
        return self._round(now) if self.rules.style == "round" else self._stream(now)

    def _off_duty(self, now: float) -> Next:
        """The trainer wants nothing more of this runner, or nothing for now."""
        rules, duty = self.rules, self.session.duty
        if self.leases or duty == "end":
            return Next.RETURN
        if rules.style == "stream":  # RLlib drops the call with the runner; an empty list would count as data
            self.wake = now + rules.timeout
            return Next.WAIT
        until = self._started + PROGRESS_WAIT if duty == "leave" else self._submitted + rules.timeout + LATE
        if now >= until:
            return Next.RETURN
        self.wake = until
        return Next.WAIT

    def _stream(self, now: float) -> Next:
        rules = self.rules
        if self.steps >= rules.share or (self._first is not None and now >= self._first + rules.linger):
            return Next.RETURN
        self.session.take(rules.share - self.steps, now, rules.weigh)
        self.wake = now + rules.timeout if self._first is None else self._first + rules.linger
        return Next.WAIT

    def _round(self, now: float) -> Next:
        rules, share = self.rules, self._share()
        want = min(share, self._open()) if not self._repeated else share
        if self.steps >= want:
            self.round_was_full = want < share or self._open() <= 0
            return Next.RETURN
        if self._first is not None and now >= self._first + rules.linger:
            return Next.RETURN
        half = self._submitted + rules.timeout / 2
        if self._started >= half:
            return Next.RETURN  # RLlib may have given this call up; if not, the next one starts afresh
        if now < half:
            self.session.take(want - self.steps, now, rules.weigh)
            if self.session.claiming:
                self.wake = now + rules.timeout
                return Next.WAIT
        if self._first is not None:
            self.wake = self._first + rules.linger
            return Next.WAIT
        others = self.session.pool.taken_steps - self._pool_at_start > self._mine
        patience = self._started + PROGRESS_WAIT
        if others and now >= patience:
            return Next.RETURN
        late = self._submitted + rules.timeout + LATE
        if now >= late:
            return Next.RETURN
        self.wake = min(t for t in (patience, half, late, now + PROGRESS_WAIT) if t > now)
        return Next.WAIT

    def _share(self) -> int:
        """Of the quota, for as many runners as there are now."""
        runners = self.session.pool.runners
        return math.ceil(self.rules.quota / runners) if runners else self.rules.share

    def _open(self) -> int:
        """Steps that this round still wants of the pool, with what this call has taken. The broker counts what was
        taken since the newest version; RLlib asking again in spite of a full round (`repeated`) knows better."""
        pool = self.session.pool
        taken = pool.round_steps if pool.version == self.session.offered_version else 0
        return self.rules.quota - taken + self.steps


def _submitted(session: RunnerSession, timeout: float, now: float) -> float:
    """A time no later than when RLlib sent the call that begins now.

    RLlib sends the next call when it has the last answer, or has given it up. A runner that is idle and not stopped
    begins at once.
    """
    running = min(now, session.running_since(now))
    if session.last_call is None:
        return running
    submitted, ended = session.last_call
    given_up = submitted + timeout
    if ended < given_up:
        return max(ended, running)
    return given_up if now - ended < AWAKE else max(given_up, running)
