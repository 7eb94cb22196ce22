"""The action service of a runner whose training has several modules: one actor for each, also for frozen ones.

A request names its module. Each answer is of one module and of one version of its weights, which are the published
ones: modules that learn, and those that never do, come in the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from rllink_zmq.messages import ACT, FOLLOWS
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.following import Follows
from rllink_zmq.rllib.service import SAY_WHICH, ActService, Asked
from rllink_zmq.weights_agents import AgentsWanted

logger = logging.getLogger("rllink_zmq")

GATHER = 0.02
"""Seconds from the first newer weights of a module until they act: an update's modules are published one after the
other, and simulators cut their fragments at each switch."""


class AgentsActService(ActService):
    """Answers ACT for the modules of `actors`, by id. `actor`, `module`: the one that answers at the moment.
    `following`: acts by all of them at once, where episodes are followed."""

    def __init__(
        self,
        address: str,
        run: str,
        name: str,
        actors: Mapping[str, ModuleActor],
        *,
        following: Follows | None = None,
        **options: Any,
    ) -> None:
        self.actors = dict(actors)
        self._following = following
        self._topics = tuple(self.actors)
        self._fresh_since: float | None = None
        super().__init__(address, run, name, next(iter(self.actors.values())), **options)

    def _answerable(self) -> dict[tuple[bytes, int], Asked]:
        actors = self.actors
        if self._following is not None:
            return self.session.asked if all(actor.version >= 0 for actor in actors.values()) else {}
        return {
            key: asked
            for key, asked in self.session.asked.items()
            if asked[0].module not in actors or actors[asked[0].module].version >= 0
        }

    def _answer_all(self, batch: Sequence[Asked], now: float) -> None:
        if self._following is not None:
            self._follow_all(batch, self._following, now)
            return
        parts: dict[str, list[Asked]] = {}
        for message, body in batch:
            if message.module in self.actors and (why := self._acts_no_more(message)):
                self._refuse(message, "no_module", why, now)
            elif message.module in self.actors:
                parts.setdefault(message.module, []).append((message, body))
            else:
                self._refuse(message, "no_module", self._missing(message), now)
        for module, part in parts.items():
            self.module, self.actor = module, self.actors[module]
            super()._answer_all(part, now)

    def _follow_all(self, batch: Sequence[Asked], following: Follows, now: float) -> None:
        kinds: dict[bool, list[Asked]] = {}
        for message, body in batch:
            if not message.places:
                self._refuse(message, FOLLOWS, SAY_WHICH, now)
                continue
            self.actor = next(iter(self.actors.values()))  # by which it is said whether an evaluation draws
            kinds.setdefault(self._draws(message), []).append((message, body))
        for explore, some in kinds.items():
            self._answer_followed(some, following, explore, now)

    def _acts_no_more(self, message: ACT) -> str:
        """The mapping may have changed since the simulator heard of it: why the episode can't go on; '' if it can."""
        known = self.actors[message.module].agents
        strange = [agent for agent in message.agents if agent not in known] if known else []
        return f"module '{message.module}' doesn't act for agent {strange[0]!r} (any more)" if strange else ""

    def _missing(self, message: ACT) -> str:
        known = ", ".join(f"'{name}'" for name in self.actors)
        if not message.module:
            return f"this training has several modules: name the one that is to act, of {known}"
        return f"there is no module '{message.module}' here; there are {known}"[:4096]

    # ---- weights

    def _wants(self) -> AgentsWanted:
        wanted = AgentsWanted()
        wanted.want(self.actors)
        return wanted

    def _tell(self, now: float) -> None:
        session, wanted = self.session, self._wanted
        assert isinstance(wanted, AgentsWanted)
        wanted.told_modules(session.run, session.version, session.modules, "", now)

    def _switch(self, now: float) -> None:
        """Each module that has newer weights acts by them from now on, all at once."""
        wanted = self._wanted
        assert isinstance(wanted, AgentsWanted)
        if wanted.run != self.run:
            return
        held = {name: each.newest for name, each in wanted.modules.items()}
        fresh = {n: w for n, w in held.items() if w is not None and w.version > self.actors[n].version}
        if not fresh:
            self._fresh_since = None
            return
        if self._fresh_since is None:
            self._fresh_since = now
        acts = all(self.actors[name].version >= 0 for name in fresh)
        if acts and (now - self._switched < self._switch_interval or now - self._fresh_since < GATHER):
            return
        for name, weights in fresh.items():
            try:
                self.actors[name].apply(weights.version, weights.data)
            except Exception as e:  # torch's own errors too; the next version may fit
                logger.warning("weights %d of module '%s' can't be acted by: %s", weights.version, name, e)
        self._switched, self._fresh_since = now, None
