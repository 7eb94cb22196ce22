"""Weights and policies on their way from the learner's side to the simulators.

Any runner may offer a version; the bytes are fetched from one of them, once, the newest only, and published. The
policy comes from the trainer, once for each run. Both are opaque here, and both are served in pieces on request.
"""

from __future__ import annotations

import logging
import zlib
from typing import NamedTuple

from rllink_zmq.messages import CONFIG, GET_CONFIG, GET_STATE, OFFER, STATE
from rllink_zmq.transfer import Download, chunk

from . import peers
from .events import Publish, Received, Send
from .peers import Peer, Runner, Trainer
from .settings import Settings
from .state import BrokerState

TRANSFER_IDLE = 20.0
"""Seconds without a request after which a transfer to simulators is over, or given up."""

KEPT = 4
"""Versions beside the newest that are served to the end. More simulators on slow links than that begin again now and
then, which costs them time; more versions would cost the broker memory."""


class _Weights(NamedTuple):
    version: int
    data: bytes
    crc: int
    asked: float


class Artifacts(BrokerState):
    """`fetch_due`: when the next look for newer weights, or at a stalled transfer, is due."""

    def __init__(self, settings: Settings, epoch: bytes, weights_address: str, now: float) -> None:
        super().__init__(settings, epoch, weights_address, now)
        self.fetch_due: float | None = None
        self._fetched = now - settings.weights_interval
        self._source: Runner | None = None
        self._fetching = -1
        self._state: Download | None = None
        self._blob: Download | None = None
        self._kept: dict[int, _Weights] = {}
        self._asked = float("-inf")
        self._weights_run = ""

    # ---- a new run

    def _begin_run(self, trainer: Trainer, now: float) -> None:
        hello = trainer.hello
        if self._weights_run != hello.run:
            self._weights_run = hello.run
            self.version = self.published_version = -1
            self.round_steps = 0
            self.weights, self.weights_crc = b"", 0
            self._kept, self._asked = {}, float("-inf")
            self._source, self._state = None, None
        if hello.policy != self.policy_ready:
            self.policy_ready, self.policy_blob = "", b""
            self._blob = Download(hello.policy_bytes, now)
            self._ask_blob(trainer)
        # Runners may have greeted and offered before their trainer did.
        for runner in self._holders():
            if runner.offer is not None and runner.offer[0] > self.version:
                self.version, self.round_steps = runner.offer[0], 0
        self._look(now)

    # ---- weights in

    def _offer(self, runner: Peer, message: OFFER, event: Received, now: float) -> None:
        if not isinstance(runner, Runner):
            return self._refuse(event.side, event.route, "unexpected", "only a runner sends OFFER", now)
        if message.run != runner.run:
            return None
        runner.offer = (message.version, message.size)
        if message.run == self.run and message.version > self.version:
            self.version = message.version
            self.round_steps = 0
        return self._look(now)

    def _look(self, now: float) -> None:
        """See to it that `_fetch` runs when it may."""
        due = max(now, self._fetched + self.settings.weights_interval)
        self.fetch_due = due if self.fetch_due is None else min(self.fetch_due, due)
        if self.fetch_due <= now:
            self._fetch(now)

    def _fetch(self, now: float) -> None:
        if self.fetch_due is None or now < self.fetch_due:
            return
        self.fetch_due = None
        timeout = self.settings.transfer_timeout
        if self._blob is not None and self.trainer is not None and self.trainer.state is peers.State.LIVE:
            if now - self._blob.moved >= timeout:
                self._blob.restart(now)
                self._ask_blob(self.trainer)
            self.fetch_due = now + timeout
        if self._state is not None and self._source is not None:
            if now - self._state.moved < timeout:
                self.fetch_due = now + timeout
                return
            self._say(logging.WARNING, "stalled", f"runner '{self._source.name}' does not send its weights", now)
            self._source.offer = None  # until it answers after all, or offers anew
            self._state = None
        best: Runner | None = None
        for runner in self._holders():
            if runner.offer is not None and (best is None or best.offer is None or runner.offer > best.offer):
                best = runner
        if best is None or best.offer is None or best.offer[0] <= self.published_version:
            return
        self._source = best
        self._begin_download(best.offer[0], best.offer[1], now)
        self.fetch_due = now + timeout

    def _holders(self) -> list[Runner]:
        """Whoever may have weights of this run: also one that is parked or about to leave."""
        return [r for r in peers.live(self.runners) if r.run == self.run]

    def _begin_download(self, version: int, size: int, now: float) -> None:
        self._fetching, self._fetched = version, now
        self._state = Download(size, now)
        self._ask_state()

    def _ask_state(self) -> None:
        if self._state is not None and self._source is not None:
            for offset in self._state.wants():
                self._send(self._source, GET_STATE(self.run, self._fetching, offset))

    def _on_state(self, runner: Peer, message: STATE, event: Received, now: float) -> None:
        if not isinstance(runner, Runner) or message.run != self.run:
            return None
        if runner is not self._source or self._state is None:
            if runner.offer is None and runner.run == self.run and message.version >= 0:
                # It was slow or stopped, and was given up. What it has may be what everybody waits for.
                runner.offer = (message.version, message.size)
                self._look(now)
            return None
        if message.version != self._fetching:
            # It has moved on since it offered: the newest is what we want.
            if message.version > self._fetching and message.offset == 0:
                self._begin_download(message.version, message.size, now)
            return None
        if message.size != self._state.size:
            self._state.size = message.size
        self._state.add(message.offset, event.frames[1:], now)
        if not self._state.done:
            return self._ask_state()
        data, self._state = bytes(self._state.data), None
        if zlib.crc32(data) != message.crc32:
            self._say(logging.ERROR, "crc", f"weights {message.version} came damaged, asking again", now)
        else:
            self._keep(now)
            if self.published_version < 0:
                self._mark_all(now)  # who waits for a run's first weights may subscribe too late to see them announced
            self.weights, self.weights_crc, self.published_version = data, message.crc32, message.version
            if message.version > self.version:
                self.version, self.round_steps = message.version, 0
            body = [data] if len(data) <= self.settings.weights_inline else []
            self._actions.append(Publish(STATE(self.run, message.version, len(data), 0, message.crc32), body))
        self.fetch_due = None
        return self._look(now)

    # ---- the policy in

    def _ask_blob(self, trainer: Trainer) -> None:
        if self._blob is not None:
            for offset in self._blob.wants():
                self._send(trainer, GET_CONFIG(trainer.hello.policy, offset))

    def _on_config(self, trainer: Peer, message: CONFIG, event: Received, now: float) -> None:
        if trainer is not self.trainer or not isinstance(trainer, Trainer) or self._blob is None:
            return None
        if message.policy != trainer.hello.policy:
            return None
        self._blob.add(message.offset, event.frames[1:], now)
        if not self._blob.done:
            return self._ask_blob(trainer)
        self.policy_blob, self.policy_ready, self._blob = bytes(self._blob.data), message.policy, None
        return self._mark_all(now)

    def _source_lost(self, peer: Peer, now: float) -> None:
        if peer is self._source:
            self._source, self._state = None, None
            self.fetch_due = None
            self._look(now)
        elif peer is self.trainer and self._blob is not None:
            self._blob.restart(now)

    # ---- both out

    def _get_state(self, peer: Peer, message: GET_STATE, event: Received, now: float) -> None:
        """The newest weights, or the rest of those whose transfer has begun."""
        if self.published_version < 0:
            return self._send(peer, STATE(self.run, -1, 0))
        mine = message.run == self.run
        kept = self._kept.get(message.version)
        if mine and message.offset and kept is not None:
            served, offset = kept, message.offset
        else:
            served = _Weights(self.published_version, self.weights, self.weights_crc, now)
            offset = message.offset if mine and message.version == served.version else 0
        if offset > len(served.data):
            text = f"byte {offset} of {len(served.data)} bytes of weights"
            return self._refuse(event.side, event.route, "malformed", text, now)
        if served is kept:
            self._kept[kept.version] = kept._replace(asked=now)
        else:
            self._asked = now
        header = STATE(self.run, served.version, len(served.data), offset, served.crc)
        self._actions.append(Send(peer.side, peer.route, header, [chunk(served.data, offset)]))
        return None

    def _keep(self, now: float) -> None:
        """Newer weights are here. Those from before are served to the end where a transfer of them is under way: with
        versions that come faster than a slow link can carry one, none would ever arrive."""
        self._kept = {version: kept for version, kept in self._kept.items() if now - kept.asked < TRANSFER_IDLE}
        if self.weights and now - self._asked < TRANSFER_IDLE and len(self._kept) < KEPT:
            self._kept[self.published_version] = _Weights(self.published_version, self.weights, self.weights_crc, now)
        self._asked = float("-inf")  # nobody has asked for the newer ones yet

    def _get_config(self, peer: Peer, message: GET_CONFIG, event: Received, now: float) -> None:
        if message.policy != self.policy_ready or not self.policy_blob or message.offset > len(self.policy_blob):
            return self._send(peer, CONFIG(message.policy, 0))
        header = CONFIG(message.policy, len(self.policy_blob), message.offset)
        return self._send(peer, header, [chunk(self.policy_blob, message.offset)])
