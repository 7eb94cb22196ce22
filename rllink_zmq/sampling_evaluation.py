"""What `sample()` calls of an evaluation runner do, sans-IO: what to ask for, when to take, when to return.

RLlib asks for whole episodes, or for env steps (with `evaluation_duration="auto"` again and again, in small pieces):

- **episodes**: so many are wanted of the broker, and the call returns when all of them are there, each whole.
- **steps**: any number of episodes is wanted, and the call returns with what has come, pieces of episodes too. Where
  RLlib asks again and again, or has not got all, they go on in the next call; when none comes for `LINGER` seconds the
  evaluation is over.

RLlib gives a call up after its timeout, unseen. So a call returns what it has shortly before. One that has nothing is
silent past it: RLlib asks again for what an answer in time leaves missing, for as long as there are answers. A call for
nothing (there are more runners than episodes left) returns at once, but a later one of the same evaluation is silent,
too: it shows that the others had nothing for a whole timeout. What was taken is given back (RETURNED) at once, with the
reason for what can't be used: nobody trains on it, and simulators wait for their windows.

An episode counts whole or not at all. One of whose fragments some can't be used, or whose beginning isn't here any
longer, is given back as `unwanted`; then the broker gives its place to another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rllink_zmq.messages import MANY, UNWANTED
from rllink_zmq.sampling import TOO_LATE, Next
from rllink_zmq.session_evaluator import EvaluatorSession
from rllink_zmq.session_runner import Lease

LINGER = 0.5
"""Seconds without a call after which an evaluation by steps is over. Meanwhile simulators serve it."""

PAST = 0.1
"""Seconds past the timeout after which a call that has nothing returns: RLlib has given it up by then."""

ALL = (1 << 53) - 1
"""Any number of episodes, for as long as training goes on."""

MOST_BYTES = 1 << 30
"""Of episodes that have not come to their end: above it the largest one is let go."""


class Wanted(NamedTuple):
    """One call. `episodes`, or if that is None `steps`; `version`: of the weights that are evaluated; `fresh`: nothing
    from before the call counts. `timeout` in seconds. `more`: other calls will go on with its episodes."""

    episodes: int | None
    steps: int
    version: int
    fresh: bool
    timeout: float
    more: bool = False

    @property
    def nothing(self) -> bool:
        """It is a call for 0."""
        return not (self.steps if self.episodes is None else self.episodes)


class _Part:
    """What is here of an episode that goes on: from its first step to `next_t0`."""

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.next_t0 = 0
        self.nbytes = 0

    def add(self, lease: Lease) -> None:
        self.leases.append(lease)
        self.next_t0 += lease.message.steps
        self.nbytes += sum(memoryview(part).nbytes for part in lease.body)


class Evaluation:
    """The evaluations of one runner, one after the other. `call` begins a call; then `step(now)` is to be called
    whenever something came, and at `wake`, until it says `Next.RETURN`: then `take_out` has the answer. `check`: why a
    fragment can't be used, '' if it can."""

    def __init__(self, session: EvaluatorSession, check: Callable[[Lease], str] = lambda lease: "") -> None:
        self.session = session
        self._check = check
        self.wake = float("inf")
        self.wanted: Wanted | None = None
        self.complete = 0
        self._started = 0.0
        self._ended = 0.0
        self._version = -1
        self._asked_at = -1
        self._after = 0
        self._leases: list[Lease] = []
        self._steps = 0
        self._lacked = ""
        self._parts: dict[tuple[bytes, str], _Part] = {}  # the one that went on last is last
        self._bytes = 0
        self._nothing_since: float | None = None
        self._silent = False
        self._cancelled = False

    def begins(self) -> None:
        """RLlib begins an evaluation: calls for nothing are answered again."""
        self._nothing_since = None

    def call(self, wanted: Wanted, now: float) -> None:
        """A call begins."""
        self.wanted, self._started, self.wake = wanted, now, now
        self.complete = 0
        self._cancelled = self._silent = False
        if wanted.nothing and self._nothing_since is None:
            self._nothing_since = now
        elif wanted.nothing and self._nothing_since is not None:
            self._silent = now >= self._nothing_since + wanted.timeout * TOO_LATE
        if wanted.fresh or wanted.episodes is not None or wanted.version != self._version:
            self._close(now)

    def cancel(self) -> None:
        """Return as soon as may be."""
        self._cancelled = True

    @property
    def missing(self) -> str:
        """What the call waits for, or the last one has not got, in words; '' when it has all."""
        wanted = self.wanted
        if wanted is None:
            return self._lacked
        if self._has_all(wanted):
            return ""
        if wanted.episodes is not None:
            return f"{wanted.episodes - self.complete} of {wanted.episodes} episodes"
        return f"{wanted.steps - self._steps} of {wanted.steps} steps"

    def take_out(self) -> list[Lease]:
        """The answer of the call: the fragments of each episode one after the other."""
        leases, self._leases, self._steps = self._leases, [], 0
        return leases

    def step(self, now: float) -> Next:
        """Go on with the call."""
        wanted = self.wanted
        if wanted is None:
            return self._idle(now)
        session = self.session
        self._adopt(now)
        if self._cancelled or session.duty != "serve" or (self._has_all(wanted) and not self._silent):
            return self._return(now)
        least = wanted.timeout * TOO_LATE if self._leases else wanted.timeout + PAST
        if now >= self._started + least:
            return self._return(now)
        if self._silent:
            self.wake = self._started + least
            return Next.WAIT
        if self._asked_at != session.welcomes:
            # The broker has not heard it yet, or has forgotten it, and with it the episodes that had begun.
            self._forget_parts()
            self._asked_at, self._version = session.welcomes, wanted.version
            self._after = session.k
            session.want(wanted.version, self._places(wanted), now)
        session.take(ALL if wanted.episodes is not None else wanted.steps - self._steps, now)
        self.wake = self._started + least
        return Next.WAIT

    def _places(self, wanted: Wanted) -> int:
        """How many episodes are wanted."""
        if wanted.episodes is not None:
            return wanted.episodes - self.complete
        return ALL if wanted.more else MANY

    def _has_all(self, wanted: Wanted) -> bool:
        return self.complete >= wanted.episodes if wanted.episodes is not None else self._steps >= wanted.steps

    def _adopt(self, now: float) -> None:
        """What TAKEN has granted."""
        session = self.session
        taken, session.taken = session.taken, None
        if taken is None:
            return
        if session.committed > self._after and self.wanted is not None:  # else claimed for the evaluation before
            for lease in taken:
                reason = self._check(lease) or self._keep(lease, self.wanted)
                if reason:
                    self._part_of(lease)
                    session.drop(lease.message, reason)
        session.give_back(now)

    def _keep(self, lease: Lease, wanted: Wanted) -> str:
        """Count this fragment. Why it doesn't count, or ''."""
        if wanted.episodes is None:
            self._leases.append(lease)
            self._steps += lease.message.steps
            return ""
        message = lease.message
        part = self._part_of(lease)
        if not message.t0:
            part = _Part()  # of the same name before: its place had been given up
        if part is None or part.next_t0 != message.t0:
            return UNWANTED
        part.add(lease)
        if message.end == "no":
            self._parts[message.session, message.episode] = part
            self._bytes += part.nbytes
            self._let_go(wanted.episodes - self.complete)
        elif self.complete < wanted.episodes:
            self._leases += part.leases
            self.complete += 1
        return ""

    def _part_of(self, lease: Lease) -> _Part | None:
        """What is kept of its episode, which isn't any longer."""
        part = self._parts.pop((lease.message.session, lease.message.episode), None)
        if part is not None:
            self._bytes -= part.nbytes
        return part

    def _let_go(self, places: int) -> None:
        """There are no more episodes than places. Who is beyond has lost its own: first who is silent longest."""
        while len(self._parts) > places:
            self._part_of(next(iter(self._parts.values())).leases[0])
        while self._bytes > MOST_BYTES:
            self._part_of(max(self._parts.values(), key=lambda part: part.nbytes).leases[0])

    def _forget_parts(self) -> None:
        self._parts.clear()
        self._bytes = 0

    def _return(self, now: float) -> Next:
        wanted, self._lacked = self.wanted, self.missing
        goes_on = wanted is not None and wanted.episodes is None and (wanted.more or self._lacked)
        self.wanted, self._ended = None, now
        if not goes_on or self._cancelled or self.session.duty != "serve":
            self._close(now)
        self.wake = now + LINGER if self._asked_at >= 0 else float("inf")
        return Next.RETURN

    def _idle(self, now: float) -> Next:
        self._adopt(now)
        if self._asked_at >= 0 and now >= self._ended + LINGER:
            self._close(now)
        self.wake = self._ended + LINGER if self._asked_at >= 0 else float("inf")
        return Next.WAIT

    def _close(self, now: float) -> None:
        """The evaluation is over: what has come of it and was not returned counts no more."""
        if self._asked_at == self.session.welcomes:
            self.session.want(self._version, 0, now)
        self._asked_at, self._version = -1, -1
        self._forget_parts()
        if self.wanted is not None:
            self.take_out()
