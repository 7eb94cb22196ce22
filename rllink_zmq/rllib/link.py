"""A runner's connection to the broker: what `ZmqEnvRunner` calls, and the thread that does it."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from rllink_zmq import __version__
from rllink_zmq.errors import RllinkError
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.sampling import Next, SampleCall, SamplingRules
from rllink_zmq.session import State
from rllink_zmq.session_runner import Lease, Pool, RunnerSession
from rllink_zmq.transport import Connection
from rllink_zmq.transport_thread import ConnectionThread

logger = logging.getLogger("rllink_zmq")

RETURN_DELAY = 1.0
"""Seconds after which an answer of `sample()` has left the actor, if no further call shows it."""

SAY_EVERY = 10.0


class RunnerLink:
    """One run's conversation of this runner with the broker at `address`."""

    def __init__(self, address: str, run: str, name: str) -> None:
        self.address = address
        self.run = run
        self.session = RunnerSession(secrets.token_bytes(16), run, name=name, package=__version__)
        self._thread = ConnectionThread(Connection(self.session, address), self._step, f"rllink-{name}")
        self._call: SampleCall | None = None
        self._result: Future[list[Lease]] | None = None
        self._returned_at: float | None = None
        self._full_at = -2
        self._thread.start()

    @property
    def pool(self) -> Pool:
        """What the broker last said of the whole pool."""
        return self.session.pool

    def offer(self, version: int, size: int, load: Callable[[], bytes]) -> None:
        """These weights are here: whoever wants them may ask. A new state also shows that RLlib has the last answer."""

        def do(now: float) -> None:
            self._give_back(now)
            self.session.offer(version, size, load, now)

        self._thread.call(do)

    def sample(self, rules: SamplingRules) -> list[Lease]:
        """What this call of `sample()` hands over. Says every 10 s what it waits for."""
        result: Future[list[Lease]] = Future()

        def begin(now: float) -> None:
            self._give_back(now)
            repeated = self._full_at == self.session.offered_version
            self._call = SampleCall(self.session, rules, now, repeated=repeated)
            self._result = result

        self._thread.call(begin).result(timeout=30)
        started = time.monotonic()
        while True:
            try:
                return result.result(timeout=SAY_EVERY)
            except FutureTimeout:
                if result.done():
                    raise
                if self.session.refusal is not None:
                    raise self.session.refusal from None
                if not self._thread.is_alive():
                    raise RllinkError(f"the connection to the broker at {self.address} has ended") from None
                logger.warning("%s", self.waiting(time.monotonic() - started))

    def waiting(self, seconds: float) -> str:
        """What a call that waits is waiting for."""
        session = self.session
        if session.state is not State.LIVE:
            why = f"no connection to the broker at {self.address} (is `rllink-zmq broker` running there?)"
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

    def stop(self) -> None:
        """Say BYE: what was handed over has reached RLlib, what was not taken goes to others."""

        def do(now: float) -> None:
            self._give_back(now)
            if self._call is not None:
                self._call.cancel()

        self._thread.call(do)
        self._thread.stop()

    # ---- in the thread

    def _give_back(self, now: float) -> None:
        self._returned_at = None
        if self._result is None:
            self.session.give_back(now)

    def _step(self, now: float) -> float:
        due = float("inf")
        if self._returned_at is not None:
            due = self._returned_at + RETURN_DELAY
            if now >= due:
                self._give_back(now)
                due = float("inf")
        if self._call is None or self._result is None:
            return due
        if self.session.refusal is not None:
            result, self._call, self._result = self._result, None, None
            result.set_exception(self.session.refusal)
            return due
        if self._call.step(now) is Next.RETURN:
            call, result, self._call, self._result = self._call, self._result, None, None
            self._full_at = self.session.offered_version if call.round_was_full else -2
            result.set_result(call.leases)
            return due
        return min(due, self._call.wake)
