"""What one process knows of policy and weights, and what it still wants of them: sans-IO.

- Versions are ordered by (run, version). Only the newest counts: a newer one replaces what is held, being fetched or
  wanted; an older one never does.
- Small weights come whole on PUB; large ones are announced there and fetched in pieces. What PUB lost (it may lose
  anything) is known from what the broker tells every session, and fetched as well.
- Weights are for the policy of their run. They are ready once that policy is there too, never before.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from rllink_zmq.arrays import Buffer
from rllink_zmq.messages import CONFIG, GET_CONFIG, GET_STATE, MAX_BODY_BYTES, STATE, Message
from rllink_zmq.transfer import Download

log = logging.getLogger("rllink_zmq")

ASK_AGAIN = 0.2
"""Seconds until what wasn't there yet, or came damaged, is asked for again."""
PUB_GRACE = 0.25
"""Seconds that PUB has to bring a version which a session has heard of already: it usually does."""
STALLED = 10.0
"""Seconds without a piece after which it is asked for again. Too soon, and a slow link carries each piece twice."""


class Weights(NamedTuple):
    """`data`: the body of a weights version, as `Policy.apply` takes it."""

    run: str
    version: int
    data: bytes


class Wanted:
    """Feed it what sessions were told (`told`), what PUB brought (`news`) and answers (`answer`); send what `asks`
    returns through any one live connection. Results are in `blob` (of the policy `blob_hash`) and `weights`. `module`:
    whose weights they are, if there are several."""

    def __init__(self, module: str = "") -> None:
        self.module = module
        self.run = ""
        self.version = -1
        self.policy = ""
        self.blob_hash = ""
        self.blob = b""
        self.weights: Weights | None = None
        # What is being fetched; a download's size is 1 until its first piece tells it.
        self._state: Download | None = None
        self._state_of = ("", -1)
        self._config: Download | None = None
        self._config_of = ""
        self._announced = ("", -1)
        self._misfit: tuple[str, int, str] | None = None
        self._behind: float | None = None
        self._ask_state_at = 0.0
        self._ask_config_at = 0.0

    # ---- what is known

    def told(self, run: str, version: int, policy: str, now: float) -> None:
        """The broker's word, as any session has it: the newest run, its newest version, its policy ('' = unknown)."""
        if run < self.run or not run:
            return
        if run > self.run:
            self.run, self.version, self.policy = run, version, policy
            self._behind = None
        self.version = max(self.version, version)
        self.policy = policy or self.policy
        if self._config_of != self.policy:
            self._config = None
        self._judge(now)

    def reject(self) -> None:
        """The held weights don't fit the policy: it is about to be replaced, or they are."""
        if self.weights is not None:
            self._misfit = (self.weights.run, self.weights.version, self.blob_hash)

    @property
    def ready(self) -> Weights | None:
        """The newest weights, once they and their run's policy are there."""
        weights = self.weights
        if weights is None or weights.run != self.run or not self.blob or self.blob_hash != self.policy:
            return None
        return weights if self._misfit != (weights.run, weights.version, self.blob_hash) else None

    def missing(self) -> str:
        """What is being waited for, in words; '' = nothing."""
        if not self.run:
            return "no trainer has begun a run at the broker yet"
        if not self.policy:
            return f"the trainer of run {self.run} has not sent its policy to the broker yet"
        if self.blob_hash != self.policy:
            return f"the policy of run {self.run} is on its way{_progress(self._config)}"
        if self.weights is None or self.weights.run != self.run:
            if self.version < 0:
                return f"run {self.run} has no weights yet: no runner of the trainer has offered any"
            return f"version {self.version} of the weights is on its way{_progress(self._state)}"
        if self.ready is None:
            return f"version {self.weights.version} of the weights doesn't fit the policy that the broker has"
        return ""

    # ---- what comes

    def news(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        """A message of PUB. Weights come whole or not at all there."""
        if not isinstance(message, STATE) or message.module != self.module:
            return
        if message.version < 0 or not self._newer(message.run, message.version):
            return
        if body:
            self._complete(message, b"".join(body), now)
        else:
            self._announced = max(self._announced, (message.run, message.version))
            self._judge(now)

    def answer(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        """An answer to GET_STATE or GET_CONFIG, over any connection. Anything else is ignored."""
        if isinstance(message, STATE):
            if message.module == self.module:
                self._on_state(message, body, now)
        elif isinstance(message, CONFIG):
            self._on_config(message, body, now)

    def _on_state(self, message: STATE, body: Sequence[Buffer], now: float) -> None:
        what = (message.run, message.version)
        if message.version < 0 or not message.size or message.size > MAX_BODY_BYTES or not self._newer(*what):
            if self._state_of <= what or message.version < 0:
                self._state = None
                self._ask_state_at = now + ASK_AGAIN
            return
        if self._state is None or self._state_of < what:
            if message.offset:
                return
            # The first piece, of the version that was asked for or of one that came since.
            self._state, self._state_of = Download(message.size, now), what
            self._state.add(0, body, now)
            self._state.restart(now)
        elif self._state_of == what:
            self._state.add(message.offset, body, now)
        else:
            return
        if self._state.done:
            data, self._state = bytes(self._state.data), None
            self._complete(message, data, now)

    def _on_config(self, message: CONFIG, body: Sequence[Buffer], now: float) -> None:
        if self._config is None or message.policy != self._config_of:
            return
        if not message.size or message.size > MAX_BODY_BYTES:
            self._config = None
            self._ask_config_at = now + ASK_AGAIN
            return
        self._config.size = message.size
        self._config.add(message.offset, body, now)
        if self._config.done:
            self.blob, self.blob_hash = bytes(self._config.data), message.policy
            self._config = None

    def _complete(self, message: STATE, data: bytes, now: float) -> None:
        if len(data) != message.size or zlib.crc32(data) != message.crc32:
            log.error("weights %d of run %s came damaged, asking for them again", message.version, message.run)
            self._announced = max(self._announced, (message.run, message.version))
            self._ask_state_at = now + ASK_AGAIN
            self._judge(now)
            return
        self.weights = Weights(message.run, message.version, data)
        if self._state_of <= (message.run, message.version):
            self._state = None
        self._behind = None
        self._judge(now)

    # ---- what is to be asked

    def asks(self, now: float) -> list[Message]:
        """What to send now; each question once. Empty as long as nothing is wanted or answers are on their way."""
        messages: list[Message] = []
        if self.policy and self.policy != self.blob_hash:
            if self._config is None and now >= self._ask_config_at:
                self._config, self._config_of = Download(1, now), self.policy
            if self._config is not None:
                messages += [GET_CONFIG(self.policy, offset) for offset in self._config.wants()]
        if self._wants_state(now):
            if self._state is None and now >= self._ask_state_at:
                # The answer names the newest version, whichever that is, and begins the transfer proper.
                self._state, self._state_of = Download(1, now), (self.run, -1)
            if self._state is not None:
                messages += [GET_STATE(*self._state_of, offset, self.module) for offset in self._state.wants()]
        return messages

    @property
    def moved(self) -> float | None:
        """When a transfer under way last moved; None if there is none."""
        moved = [transfer.moved for transfer in (self._state, self._config) if transfer is not None]
        return min(moved) if moved else None

    def restart(self, now: float) -> None:
        """Questions on their way are lost with their connection: `asks` returns them anew. What has come is kept."""
        for transfer in (self._state, self._config):
            if transfer is not None:
                transfer.restart(now)

    def wants(self, now: float) -> bool:
        """Whether there is something to ask for, or answers are on their way."""
        if self.policy and self.policy != self.blob_hash and (self._config is not None or now >= self._ask_config_at):
            return True
        return self._wants_state(now) and (self._state is not None or now >= self._ask_state_at)

    # ---- inside

    def _newer(self, run: str, version: int) -> bool:
        held = self.weights
        return run >= self.run and (held is None or (run, version) > held[:2])

    def _judge(self, now: float) -> None:
        """Note since when a version is known that isn't held."""
        if self.version < 0 or not self._newer(self.run, self.version):
            self._behind = None
        elif self._behind is None:
            self._behind = now

    def _wants_state(self, now: float) -> bool:
        if self._state is not None:
            return True
        if self._newer(*self._announced) and self._announced[1] >= 0:
            return True
        if self._behind is None:
            return False
        # A late joiner has nothing to wait for: what PUB said was before its time.
        return self.weights is None or now >= self._behind + PUB_GRACE


def _progress(transfer: Download | None) -> str:
    if transfer is None or transfer.size <= 1:
        return ""
    return f" ({len(transfer.data)} of {transfer.size} bytes)"
