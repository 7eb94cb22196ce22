"""The pool of runners as the trainer's process keeps it (`rllink_zmq/rllib/pool.py`), without Ray.

New runners start in a while and join when RLlib gets them, between its training steps; the newest leave, the last one
parks; one that has left is removed and killed when the broker's roster shows it no longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from world_nodes import RunnerNode

from rllink_zmq.messages import Duty

if TYPE_CHECKING:
    from world import World

ABSENT = 20.0


class Member:
    """One runner. `node`: None until it has joined. `session`: at the broker."""

    def __init__(self, index: int, now: float) -> None:
        self.index = index
        self.since = now
        self.duty: Duty = "serve"
        self.node: RunnerNode | None = None
        self.session = b""

    def is_(self, node: RunnerNode, now: float) -> None:
        self.node, self.session, self.since = node, node.session.session, now


class Pool:
    """`timeout`: a runner that the broker hasn't heard for so long is killed. `wish`: what was asked for last."""

    def __init__(self, world: World, runners: int, timeout: float) -> None:
        self.world = world
        self.timeout = timeout
        self.target = self.wish = runners
        self.members: list[Member] = []
        self.starting: list[Member] = []
        self.ready: list[Member] = []
        self.highest = 0
        self.told: dict[bytes, Duty] = {}
        self.dead: set[bytes] = set()
        for _ in range(runners):
            self.join(self.member())

    # ---- whoever asks for runners

    def ask(self, number: int) -> None:
        """`rllink-zmq scale`, again and again until somebody hears it."""
        world = self.world
        self.wish = number
        if world.broker is not None:
            error, actions = world.broker.scale(number, world.now)
            world.note("scale", number, error)
            world.carry_out(actions)
            if not error:
                return
        world.after(0.5, self.ask_again, number)

    def ask_again(self, number: int) -> None:
        if self.wish == number != self.target:
            self.ask(number)

    @property
    def settled(self) -> bool:
        """There are as many runners as were asked for."""
        return self.target == self.wish and self.at_rest

    @property
    def at_rest(self) -> bool:
        if self.starting or self.ready or any(m.duty == "leave" for m in self.members):
            return False
        return len(self.serving()) == self.target

    # ---- RLlib's main thread

    def sweep(self) -> None:
        """Put new runners into RLlib's group, and take out those that have left."""
        world, session = self.world, self.world.trainer.session
        ready, self.ready = self.ready, []
        for member in ready:
            self.join(member)
        if any(m.duty == "leave" for m in self.members):
            world.driver.take_over()
        roster = {p.session for p in session.roster}
        for member in list(self.members):
            if member.duty == "leave" and member.session not in roster and session.roster_at > member.since:
                self.remove(member)

    def join(self, member: Member) -> None:
        node = self.world.new_runner(member.index)
        member.is_(node, self.world.now)
        self.members.append(member)
        self.world.runners.append(node)
        self.world.driver.started(node)

    def remove(self, member: Member) -> None:
        node = member.node
        assert node is not None
        self.members.remove(member)
        self.world.note("removed", node.name)
        self.world.driver.removed(node)
        self.world.runners.remove(node)
        if node.alive:
            node.end()

    def restart(self, node: RunnerNode) -> None:
        """RLlib makes a dead actor anew, and tells it the run."""
        for member in self.members:
            if member.node is node:
                new = self.world.new_runner(member.index)
                member.is_(new, self.world.now)
                self.world.runners[self.world.runners.index(node)] = new
                self.world.driver.started(new)
                self.tell()

    # ---- the thread

    def look(self) -> None:
        session = self.world.trainer.session
        wanted = session.runners_wanted
        if wanted is not None and wanted != self.target:
            self.target = wanted
            session.change(self.world.terms(wanted), self.world.now)
        if not self.at_rest:
            self.fit()
        now = self.world.now
        if now - session.roster_at < 3.0 and now - session.live_since > self.timeout:
            self.watch()
        self.tell()

    def ended(self, session: bytes) -> None:
        """Ray knows that this runner's process is no more."""
        self.dead.add(session)

    def tell(self) -> None:
        duties: dict[bytes, Duty] = {m.session: m.duty for m in self.members if m.duty != "serve"}
        duties.update((session, "end") for session in self.dead)
        if duties != self.told:
            self.told = duties
            self.world.trainer.session.assign(duties, self.world.now)
            self.world.trainer.flush()

    def serving(self) -> list[Member]:
        return [m for m in self.members if m.duty == "serve"]

    def member(self) -> Member:
        self.highest += 1
        return Member(self.highest, self.world.now)

    def fit(self) -> None:
        """Start what is missing, send away what is too much."""
        now = self.world.now
        coming = len(self.starting) + len(self.ready)
        serving = self.serving()
        parked = [m for m in self.members if m.duty == "park"]
        for member in parked[: max(0, self.target - len(serving) - coming)]:
            member.duty, member.since = "serve", now
            serving.append(member)
        for _ in range(self.target - len(serving) - coming):
            self.begin()
        surplus = len(serving) + coming - self.target
        while surplus > 0 and (self.starting or self.ready):
            (self.starting or self.ready).pop()
            surplus -= 1
        for member in sorted(serving, key=lambda m: m.index, reverse=True)[: max(0, surplus)]:
            last = self.target == 0 and member.index == min(m.index for m in serving)
            member.duty, member.since = ("park" if last else "leave"), now

    def begin(self) -> None:
        member = self.member()
        self.starting.append(member)
        self.world.after(self.world.random.uniform(0.5, 3.0), self.begun, member)

    def begun(self, member: Member) -> None:
        if member in self.starting:
            self.starting.remove(member)
            self.ready.append(member)

    def watch(self) -> None:
        """Kill what hangs."""
        world, now = self.world, self.world.now
        known = {p.session: p for p in world.trainer.session.roster}
        for member in self.members:
            there, node = known.get(member.session), member.node
            if node is None or not node.alive or now - member.since < self.timeout:
                continue
            absent = there is None and member.duty != "leave" and now - member.since > ABSENT
            if absent or (there is not None and there.silent > self.timeout):
                world.note("stuck", node.name)
                node.end()
                world.after(world.random.uniform(0.5, 3.0), self.restart, node)
