"""The policies of several agents in a process: read once, held once, for all clients of one broker that have agents."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping

from rllink_zmq.client_policy import SWITCH_INTERVAL, PolicyReader, layout_of_policy
from rllink_zmq.errors import PolicyError, RemovedError
from rllink_zmq.fragments import Layout
from rllink_zmq.fragments_agents import AgentsOrigin, Member, whole
from rllink_zmq.messages import AgentId
from rllink_zmq.policy import Policy, policy_hash
from rllink_zmq.policy_agents import Crew, manifests, unpack_crew
from rllink_zmq.session import SimulatorSession
from rllink_zmq.transport import Subscription, beside
from rllink_zmq.weights_agents import AgentsWanted

log = logging.getLogger("rllink_zmq")


SETTLES = 0.3
"""Seconds until a subscription has reached the broker: which topics are wanted is known late, with the crew."""


class AgentsReader(PolicyReader):
    """As `PolicyReader`, for several modules. `policies`: of those that act for agents of this process, by module id;
    `crew`: another object whenever it changes; `layout`: of an env step in which all agents take part."""

    def __init__(self, address: str, threads: int = 1, seed: int | None = None) -> None:
        super().__init__(address, threads, seed)
        self._wanted: AgentsWanted = AgentsWanted()
        self.policies: dict[str, Policy] = {}
        self.crew: Crew | None = None
        self.origin: AgentsOrigin | None = None
        self._layouts: dict[str, Layout] = {}
        self._agents: Counter[AgentId] = Counter()
        self._topics: tuple[str, ...] = ()
        self._fresh_since: float | None = None
        self._random = random.Random(seed)
        self._subscribed = 0.0
        self._heard_again = True

    def admit(self, agents: Iterable[AgentId]) -> None:
        """A client of this process has these."""
        with self.lock:
            self._agents.update(agents)
            self._loaded = ""  # others may be needed now

    def dismiss(self, agents: Iterable[AgentId]) -> None:
        """And is closed."""
        with self.lock:
            self._agents.subtract(agents)

    def cast(self, fixed: Mapping[AgentId, str]) -> dict[AgentId, Member]:
        """How agents take part in an episode: one of the crew's draws, in which those of `fixed` are of these modules.
        Raises RemovedError when there is none."""
        with self.lock:
            crew = self.crew
            assert crew is not None
            known = [(draw.weight, crew.mapping(draw)) for draw in crew.draws]
            fitting = [
                (weight, mapping)
                for weight, mapping in known
                if all(agent in mapping and mapping[agent].id == module for agent, module in fixed.items())
            ]
            if not fitting:
                answers = [{agent: module.id for agent, module in mapping.items()} for _, mapping in known]
                gone = [agent for agent, module in fixed.items() if all(one.get(agent) != module for one in answers)]
                agent = gone[0] if gone else next(iter(fixed))
                raise RemovedError(
                    f"the policy '{fixed[agent]}' by which agent {agent!r} acts was removed from the training, or is "
                    f"another agent's now: abandon this episode, and start another one"
                )
            (mapping,) = self._random.choices([m for _, m in fitting], [w for w, _ in fitting])
            return {
                agent: Member(module.id, self._layouts[module.id])
                for agent, module in mapping.items()
                if module.id in self._layouts
            }

    def behind(self, session: SimulatorSession) -> bool:
        """Whether one of its policies is older than `session` has been told of."""
        origin, told = self.origin, session.modules
        if origin is None or origin.run != session.run:
            return False
        return any(version < told.get(module, -1) for module, version in origin.versions.items())

    def counts_as(self, origin: AgentsOrigin) -> int:
        """The version by which the lag of what begins now with these weights is counted: that of the oldest module that
        is trained and not at its newest. A module that had nothing to learn from for a while is not old."""
        with self.lock:
            crew, versions = self.crew, origin.versions
            trained = {module.id for module in crew.modules if module.trained} if crew is not None else set()
            late = [
                version
                for module, version in versions.items()
                if module in trained and version < self._newest_of(module)
            ]
            return min(late, default=max(self._wanted.newest_told, *versions.values()))

    def elsewhere(self) -> AgentsReader:
        """The reader of clients like this one's for which runners act."""
        return AgentsRoster.join(self.address, self._threads, self._seed)

    # ---- inside

    @property
    def _acting(self) -> Iterable[Policy]:
        return self.policies.values()

    def _newest_of(self, module: str) -> int:
        """The newest version of this module that is known."""
        wanted = self._wanted.modules.get(module)
        return -1 if wanted is None else wanted.version

    def _tell(self, session: SimulatorSession, now: float) -> None:
        if self._subscription is None:
            self._subscribed = now
        elif not self._heard_again and now - self._subscribed >= SETTLES:
            # What was published until the subscription had reached the broker, nobody has told.
            self._heard_again = True
            session.ping(now)
        self._wanted.told_modules(session.run, session.version, session.modules, session.policy, now)

    def _subscribe(self, told: str) -> None:
        address = beside(self.address, told) if told else ""
        topics = tuple(self._wanted.modules)
        subscribed = self._subscription
        if subscribed is not None and (subscribed.address, subscribed.topics) != (address, topics):
            subscribed.close()
            self._subscription = None
        if self._subscription is None and address and topics:
            self._subscription = Subscription(address, topics)
            self._heard_again = False

    def _load(self) -> None:
        wanted = self._wanted
        if policy_hash(wanted.blob) != wanted.blob_hash:
            log.error("the policies %s came damaged, asking for them again", wanted.blob_hash)
            wanted.blob, wanted.blob_hash = b"", ""
            return
        self.crew, self.origin = None, None
        crew, blobs = unpack_crew(wanted.blob)
        about = manifests(crew, blobs)
        needed = crew.needed([agent for agent, count in self._agents.items() if count > 0])
        places = {module.id: module.policy for module in crew.modules}
        self._hold({module: blobs[places[module]] for module in needed})
        self._layouts = {module: layout_of_policy(about[module]) for module in needed}
        self.layout = whole(self._widest(crew))
        self.crew, self._loaded = crew, wanted.blob_hash

    def _hold(self, blobs: Mapping[str, bytes]) -> None:
        """Make these policies ready to act, by module, and want their weights."""
        self.policies = {module: Policy.load(blob, self._threads, self._seed) for module, blob in blobs.items()}
        self._wanted.want(blobs)

    def _widest(self, crew: Crew) -> list[Layout]:
        """For each agent of this process the largest of the layouts that it may have."""
        widest = []
        for i, agent in enumerate(crew.agents):
            modules = {crew.modules[draw.modules[i]].id for draw in crew.draws if draw.modules[i] >= 0}
            layouts = [self._layouts[module] for module in modules if module in self._layouts]
            if self._agents[agent] > 0 and layouts:
                widest.append(max(layouts, key=lambda layout: layout.step_bytes("acted")))
        return widest

    def _switch(self, now: float) -> None:
        wanted, origin, crew = self._wanted, self.origin, self.crew
        if origin is not None and origin.run < wanted.run:
            self.origin = origin = None
        if crew is None or wanted.blob_hash != wanted.policy:
            return
        held = {module: each.newest for module, each in wanted.modules.items()}
        ready = {module: weights for module, weights in held.items() if weights is not None}
        if len(ready) < len(held) or not held or any(w.run != wanted.run for w in ready.values()):
            return
        versions = {module: weights.version for module, weights in ready.items()}
        if origin is not None:
            if all(version <= origin.versions.get(module, -1) for module, version in versions.items()):
                self._fresh_since = None
                return
            if self._fresh_since is None:
                self._fresh_since = now
            behind = any(wanted.modules[m].version > version for m, version in versions.items())
            if not self._may_switch(now) or (behind and now - self._fresh_since < SWITCH_INTERVAL):
                return
        try:
            for module, weights in ready.items():
                policy = self.policies[module]
                if policy.version != (weights.run, weights.version):
                    policy.apply((weights.run, weights.version), weights.data)
        except PolicyError as e:
            log.warning("%s", e)
            return
        self.origin = AgentsOrigin.of(wanted.run, max(versions.values()), versions)
        self._switched, self._fresh_since = now, None


class AgentsRoster(AgentsReader):
    """For clients for which runners act: how agents are mapped to modules, and what their rows are like. There are no
    policies and no weights here. `origin`: which there were when the run was heard of, for who has had no answer yet.
    """

    _told: Mapping[str, int] = {}

    def _tell(self, session: SimulatorSession, now: float) -> None:
        super()._tell(session, now)
        if session.run == self._wanted.run:
            self._told = session.modules

    def _newest_of(self, module: str) -> int:
        return self._told.get(module, -1)

    def _hold(self, blobs: Mapping[str, bytes]) -> None:
        pass

    def _switch(self, now: float) -> None:
        wanted = self._wanted
        if self.crew is None or wanted.blob_hash != wanted.policy:
            self.origin = None
        elif self.origin is None or self.origin.run != wanted.run:
            versions = {module: max(0, self._told.get(module, 0)) for module in self._layouts}
            self.origin = AgentsOrigin.of(wanted.run, max(0, wanted.newest_told), versions)
