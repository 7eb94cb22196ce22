"""A runner's connection to the broker: what `ZmqEnvRunner` calls, and the thread that does it."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import ray
from ray import ObjectRef

from rllink_zmq import __version__
from rllink_zmq.arrays import Buffer
from rllink_zmq.errors import RefusedError, RllinkError
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.sampling import LATE, PROGRESS_WAIT, Next, SampleCall, SamplingRules
from rllink_zmq.sampling_exact import Answer, ExactCall, Stock
from rllink_zmq.session import State
from rllink_zmq.session_runner import Lease, Pool, RunnerSession
from rllink_zmq.transport import Connection
from rllink_zmq.transport_thread import ConnectionThread

logger = logging.getLogger("rllink_zmq")

LOOK_AT_REFERENCES = 0.1
"""Seconds between two looks at whether RLlib still holds what this process owns."""

RETURN_DELAY = 0.5
"""Seconds after which an answer of `sample()` has left the actor, if no further call shows it."""

SAY_EVERY = 10.0


class RunnerLink:
    """One run's conversation of this runner with the broker at `address`. `check`: why a fragment can't be used, or '';
    the connection's thread calls it, during `draw` alone. `prepare`: what can be done of a fragment before it is taken;
    the connection's thread does it while RLlib learns. `counts`: as of `Stock`, asked of what has been checked."""

    def __init__(
        self,
        address: str,
        run: str,
        name: str,
        check: Callable[[Lease], str] = lambda lease: "",
        prepare: Callable[[FRAGMENT, Sequence[Buffer]], Any] | None = None,
        *,
        counts: Callable[[Lease], Sequence[int]] | None = None,
        local: bool = False,
        session: RunnerSession | None = None,
    ) -> None:
        self.address = address
        self.run = run
        self._local = local
        self.session = session or RunnerSession(secrets.token_bytes(16), run, name=name, package=__version__)
        self.session.prepare = prepare
        self._stock = Stock(self.session, check, counts)
        self._thread = ConnectionThread(Connection(self.session, address), self._step, f"rllink-{name}")
        self._call: SampleCall | None = None
        self._result: Future[Any] | None = None
        self._returned_at: float | None = None
        self._held: deque[tuple[int, bytes]] = deque()
        self._full_at = -2
        self._stopped = threading.Event()
        self.on_left: Callable[[], None] | None = None
        self._thread.start()

    @property
    def pool(self) -> Pool:
        """What the broker last said of the whole pool."""
        return self.session.pool

    def offer(self, version: int, size: int, load: Callable[[], bytes], module: str = "") -> None:
        """These weights are here: whoever wants them may ask. A new state also shows that RLlib has the last answer."""

        def do(now: float) -> None:
            self._give_back(now)
            self.session.offer(version, size, load, now, module)

        self._thread.call(do)

    def left(self) -> bool:
        """It was told to leave, and has said BYE: RLlib has all that it returned."""
        return self.session.duty in ("leave", "end") and not self._thread.is_alive()

    def sample(self, rules: SamplingRules) -> list[Lease]:
        """What this call of `sample()` hands over. Says every 10 s what it waits for."""

        def begin(now: float) -> SampleCall:
            repeated = self._full_at == self.session.offered_version
            return SampleCall(self.session, rules, now, repeated=repeated)

        call = self._await(begin, rules)
        return [] if call is None else call.leases

    def draw(self, rules: SamplingRules) -> Answer:
        """What this call of `sample()` hands over in the exact style. Says every 10 s what it waits for."""
        call = self._await(lambda now: ExactCall(self._stock, rules, now), rules)
        return call.answer if isinstance(call, ExactCall) else Answer([], False)

    def _await(self, make: Callable[[float], SampleCall], rules: SamplingRules) -> SampleCall | None:
        """The call that `make(now)` begins, when it returns; None: there is nothing for this one."""
        if self.left():
            self._after_leaving(rules)
            return None
        result: Future[SampleCall] = Future()

        def begin(now: float) -> None:
            self._give_back(now)
            self._call = make(now)
            self._result = result

        try:
            self._thread.call(begin).result(timeout=30)
        except RllinkError:
            if self.left():
                self._after_leaving(rules)
                return None
            raise
        started = time.monotonic()
        while True:
            try:
                return result.result(timeout=SAY_EVERY)
            except RefusedError as e:
                self._after_refusal(e, rules)
                return None
            except FutureTimeout:
                if result.done():
                    raise
                if self.left():
                    self._after_leaving(rules)
                    return None
                if not self._thread.is_alive():
                    raise RllinkError(f"the connection to the broker at {self.address} has ended") from None
                logger.warning("%s", self.waiting(time.monotonic() - started))

    def _after_leaving(self, rules: SamplingRules) -> None:
        """RLlib calls until it has removed this runner. In a stream an empty list would count as data: no answer then,
        until `stop()` or the end of the process."""
        if rules.style == "stream" and self.session.duty == "leave":
            self._stopped.wait()
        else:
            self._stopped.wait(PROGRESS_WAIT)

    def _after_refusal(self, refusal: RefusedError, rules: SamplingRules) -> None:
        """The broker wants nothing of this runner, nor of its trainer: that one ends with the reason, if its calls come
        back to it. In its own process the refusal is raised; an actor that raises is only restarted, again and again.
        """
        if self._local:
            raise refusal
        logger.warning("runner '%s' can't go on: %s", self.session.name, refusal)
        self._stopped.wait(None if rules.style == "stream" else rules.timeout + LATE)

    def waiting(self, seconds: float) -> str:
        """What a call that waits is waiting for."""
        session = self.session
        if session.state is not State.LIVE:
            why = f"no connection to the broker at {self.address} (is `rllink-zmq broker` running there?)"
        elif session.duty == "park":
            why = "the pool was scaled to 0 runners; rllink-zmq scale N goes on"
        elif not session.pool.simulators:
            why = f"0 simulators are connected to the broker at {self.address} (rllink-zmq simulate)"
        else:
            why = f"{session.pool.simulators} simulators are connected, and no fragment has come from them"
        return f"runner '{session.name}' has waited {seconds:.0f} s for data: {why}. {session.notice}".rstrip()

    def drop(self, message: FRAGMENT, reason: str) -> None:
        """RLlib does not get this fragment of the last answer."""
        self._thread.call(lambda now: self.session.drop(message, reason))

    def returning(self) -> None:
        """The answer of `sample()` is on its way to RLlib."""

        def do(now: float) -> None:
            self._returned_at = now

        self._thread.call(do)

    def returning_ref(self, ref: ObjectRef) -> None:
        """The answer is on its way as an object that this process owns and that dies with it: RLlib has it when
        nobody refers to it any longer."""
        key = ref.hex().encode()

        def do(now: float) -> None:
            if self.session.committed > self.session.returned and self._returned_at is not None:
                self._held.append((self.session.committed, key))
                self._returned_at = None

        self._thread.call(do)

    def stop(self) -> None:
        """Say BYE: what was handed over has reached RLlib, what was not taken goes to others."""

        def do(now: float) -> None:
            self._held.clear()
            self._give_back(now)
            if self._call is not None:
                self._call.cancel()
            else:
                self._stock.give_up(now)

        self._stopped.set()
        self._thread.call(do)
        self._thread.stop()

    # ---- in the thread

    def _give_back(self, now: float) -> None:
        if self._held:
            return  # what RLlib has is told by the references
        self._returned_at = None
        if self._result is None:
            self._stock.reached(now)

    def _released(self, now: float) -> None:
        """Give back what RLlib holds no references to any longer, in order."""
        known = reference_counts()
        upto = 0
        while self._held and self._held[0][1] not in known:
            upto = self._held.popleft()[0]
        if upto:
            self.session.give_back(now, upto)

    def _step(self, now: float) -> float:
        due = float("inf")
        if self._held:
            self._released(now)
            due = now + LOOK_AT_REFERENCES
        if self._returned_at is not None:
            due = min(due, self._returned_at + RETURN_DELAY)
            if now >= self._returned_at + RETURN_DELAY:
                self._give_back(now)
        if self._call is not None and self._result is not None:
            due = min(due, self._go_on(self._call, self._result, now))
        elif self.session.duty == "end" and not self._stock.empty:
            self._stock.give_up(now)
        if self._done():
            if self.on_left is not None:
                self.on_left()
            self._thread.stop()
        return due

    def _done(self) -> bool:
        """Told to leave, and RLlib has everything."""
        session = self.session
        call = self._call
        waits = call is not None and (call.leases or call.rules.style != "stream")
        busy = session.claiming or session.returned < session.committed or waits
        return session.duty in ("leave", "end") and session.state is State.LIVE and not busy

    def _go_on(self, call: SampleCall, result: Future[Any], now: float) -> float:
        """The call's next step. Returns when the one after that is due."""
        if self.session.refusal is not None:
            self._call, self._result = None, None
            result.set_exception(self.session.refusal)
            return float("inf")
        if call.step(now) is Next.RETURN:
            self._call, self._result = None, None
            self._full_at = self.session.offered_version if call.round_was_full else -2
            result.set_result(call)
            return float("inf")
        return call.wake


def reference_counts() -> dict[bytes, object]:
    """The objects that this process knows references to, its own or others', by hex id. Ray has no public name for it:
    `ray memory` shows the same table."""
    found: dict[bytes, object] = ray._private.worker.global_worker.core_worker.get_all_reference_counts()
    return found
