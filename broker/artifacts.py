"""Weights and policies on their way from the learner's side to the simulators.

Any runner may offer a version; the bytes are fetched from one of them, once, the newest only, and published: of each
module by itself, if there are several. The policy comes from the trainer, once for each run, and again where
policies of several agents come or go. Both are opaque here, and both are served in pieces on request.
"""

from __future__ import annotations

import logging
import zlib

from rllink_zmq.messages import CONFIG, GET_CONFIG, GET_STATE, MAX_MODULES, OFFER, STATE
from rllink_zmq.transfer import Download, chunk

from . import peers
from .counting import Counting
from .events import Publish, Received, Send
from .modules import Module, Published
from .peers import Peer, Runner, Trainer
from .settings import Settings
from .state import BrokerState


class Artifacts(BrokerState):
    """`fetch_due`: when the next look for newer weights, or at a stalled transfer, is due."""

    def __init__(self, settings: Settings, epoch: bytes, weights_address: str, now: float) -> None:
        super().__init__(settings, epoch, weights_address, now)
        self.fetch_due: float | None = None
        self._blob: Download | None = None
        self._weights_run = ""

    # ---- a new run

    def _begin_run(self, trainer: Trainer, now: float) -> None:
        hello = trainer.hello
        if self._weights_run != hello.run:
            self._weights_run = hello.run
            self.version = self.published_version = -1
            self.round_steps = 0
            self.counting = Counting(hello.agents, hello.quota)
            self.modules, self.module_versions = {}, {}
            self.sampled_before = hello.sampled - self.taken_steps
            self.needs_logp, self.rounds = hello.needs_logp, hello.rounds
        elif hello.sampled > self.sampled:
            # It was restored from a checkpoint, and knows only now what that training had sampled.
            self.sampled_before = hello.sampled - self.taken_steps
        if hello.policy != self.policy_ready:
            self.policy_ready, self.policy_blob = "", b""
            self._blob = Download(hello.policy_bytes, now)
            self._ask_blob(trainer)
        # Runners may have greeted and offered before their trainer did.
        for runner in self._holders():
            for module, (version, _) in runner.offers.items():
                self.modules.setdefault(module, Module(module))
                if version > self.version:
                    self.version, self.round_steps = version, 0
        self._judge_round()
        self._look(now)

    # ---- weights in

    def _offer(self, runner: Peer, message: OFFER, event: Received, now: float) -> None:
        if not isinstance(runner, Runner):
            return self._refuse(event.side, event.route, "unexpected", "only a runner sends OFFER", now)
        if message.run != runner.run:
            return None
        if len(runner.offers) >= MAX_MODULES and message.module not in runner.offers:
            text = f"weights of more than {MAX_MODULES} modules"
            return self._refuse(event.side, event.route, "malformed", text, now)
        runner.offers[message.module] = (message.version, message.size)
        if message.run == self.run:
            self.modules.setdefault(message.module, Module(message.module))
            if message.version > self.version:
                self.version = message.version
                self.round_steps = 0
            self._judge_round()
        return self._look(now)

    def _judge_round(self) -> None:
        """Whether all that was offered is published."""
        offers = ((module, version) for runner in self._holders() for module, (version, _) in runner.offers.items())
        self.round_open = all(
            version <= self.modules[module].published for module, version in offers if module in self.modules
        )

    def _look(self, now: float) -> None:
        """See to it that `_fetch` runs when it may."""
        self.fetch_due = now
        self._fetch(now)

    def _fetch(self, now: float) -> None:
        if self.fetch_due is None or now < self.fetch_due:
            return
        timeout = self.settings.transfer_timeout
        dues: list[float] = []
        if self._blob is not None and self.trainer is not None and self.trainer.state is peers.State.LIVE:
            if now - self._blob.moved >= timeout:
                self._blob.restart(now)
                self._ask_blob(self.trainer)
            dues.append(now + timeout)
        for module in self.modules.values():
            due = self._fetch_module(module, now)
            if due is not None:
                dues.append(due)
        self.fetch_due = min(dues, default=None)

    def _fetch_module(self, module: Module, now: float) -> float | None:
        """Begin to fetch what is newer, if something is; when to look again."""
        timeout, name = self.settings.transfer_timeout, module.id
        if module.download is not None and module.source is not None:
            if now - module.download.moved < timeout:
                return now + timeout
            self._say(logging.WARNING, "stalled", f"runner '{module.source.name}' does not send its weights", now)
            module.source.offers.pop(name, None)  # until it answers after all, or offers anew
            module.download = None
        best: Runner | None = None
        for runner in self._holders():
            if name in runner.offers and (best is None or runner.offers[name] > best.offers[name]):
                best = runner
        if best is None or best.offers[name][0] <= module.published:
            return None
        due = module.fetched + self.settings.weights_interval
        if now < due:
            return due
        module.source = best
        self._begin_download(module, *best.offers[name], now)
        return now + timeout

    def _holders(self) -> list[Runner]:
        """Whoever may have weights of this run: also one that is parked or about to leave."""
        return [r for r in peers.live(self.runners) if r.run == self.run]

    def _begin_download(self, module: Module, version: int, size: int, now: float) -> None:
        module.fetching, module.fetched = version, now
        module.download = Download(size, now)
        self._ask_state(module)

    def _ask_state(self, module: Module) -> None:
        if module.download is not None and module.source is not None:
            for offset in module.download.wants():
                self._send(module.source, GET_STATE(self.run, module.fetching, offset, module.id))

    def _on_state(self, runner: Peer, message: STATE, event: Received, now: float) -> None:
        module = self.modules.get(message.module)
        if not isinstance(runner, Runner) or message.run != self.run or module is None:
            return None
        if runner is not module.source or module.download is None:
            if module.id not in runner.offers and runner.run == self.run and message.version >= 0:
                # It was slow or stopped, and was given up. What it has may be what everybody waits for.
                runner.offers[module.id] = (message.version, message.size)
                self._look(now)
            return None
        if message.version != module.fetching:
            # It has moved on since it offered: the newest is what we want.
            if message.version > module.fetching and message.offset == 0:
                self._begin_download(module, message.version, message.size, now)
            return None
        if message.size != module.download.size:
            module.download.size = message.size
        module.download.add(message.offset, event.frames[1:], now)
        if not module.download.done:
            return self._ask_state(module)
        data, module.download = bytes(module.download.data), None
        if zlib.crc32(data) != message.crc32:
            self._say(logging.ERROR, "crc", f"weights {message.version} came damaged, asking again", now)
        else:
            self._publish_module(module, message, data, now)
        return self._look(now)

    def _publish_module(self, module: Module, message: STATE, data: bytes, now: float) -> None:
        module.keep(now)
        if module.published < 0 or self.fresh:
            # Who waits for a run's first weights may subscribe too late to see them announced; a round's give room.
            self._mark_all(now)
        version = message.version
        module.data, module.crc, module.published = data, message.crc32, version
        self.published_version = max(self.published_version, version)
        if module.id:
            self.module_versions = {**self.module_versions, module.id: version}
        if version > self.version:
            self.version, self.round_steps = version, 0
        body = [data] if len(data) <= self.settings.weights_inline else []
        header = STATE(self.run, version, len(data), 0, message.crc32, module.id)
        self._actions.append(Publish(header, body))
        self._judge_round()

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
        lost = [module for module in self.modules.values() if module.source is peer]
        for module in lost:
            module.source = module.download = None
        self._judge_round()
        if lost:
            self._look(now)
        elif peer is self.trainer and self._blob is not None:
            self._blob.restart(now)

    # ---- both out

    def _get_state(self, peer: Peer, message: GET_STATE, event: Received, now: float) -> None:
        """The newest weights, or the rest of those whose transfer has begun."""
        module = self.modules.get(message.module)
        if module is None or module.published < 0:
            return self._send(peer, STATE(self.run, -1, 0, module=message.module))
        mine = message.run == self.run
        kept = module.kept.get(message.version)
        if mine and message.offset and kept is not None:
            served, offset = kept, message.offset
        else:
            served = Published(module.published, module.data, module.crc, now)
            offset = message.offset if mine and message.version == served.version else 0
        if offset > len(served.data):
            text = f"byte {offset} of {len(served.data)} bytes of weights"
            return self._refuse(event.side, event.route, "malformed", text, now)
        if served is kept:
            module.kept[kept.version] = kept._replace(asked=now)
        else:
            module.asked = now
        header = STATE(self.run, served.version, len(served.data), offset, served.crc, module.id)
        self._actions.append(Send(peer.side, peer.route, header, [chunk(served.data, offset)]))
        return None

    def _get_config(self, peer: Peer, message: GET_CONFIG, event: Received, now: float) -> None:
        if message.policy != self.policy_ready or not self.policy_blob or message.offset > len(self.policy_blob):
            return self._send(peer, CONFIG(message.policy, 0))
        header = CONFIG(message.policy, len(self.policy_blob), message.offset)
        return self._send(peer, header, [chunk(self.policy_blob, message.offset)])
