"""RLlib's side of a world: whom it calls when, and what it does with the answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from world_nodes import Chunk, RunnerNode

from rllink_zmq.session_runner import Lease

if TYPE_CHECKING:
    from world import World


class Driver:
    """`version`: of the newest weights. `batch`: env steps towards the next ones. `rounds`: rounds since."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.version = 0
        self.batch = 0
        self.calls = 0
        self.rounds = 0
        self.waiting: dict[int, RunnerNode] = {}
        self.thrown_away = 0

    def submit(self, node: RunnerNode) -> None:
        self.calls += 1
        self.waiting[self.calls] = node
        self.world.after(self.world.random.uniform(0.001, 0.01), node.mail, "sample", self.calls)

    def consume(self, leases: list[Lease]) -> None:
        for lease in leases:
            self.world.got[lease.message.session, lease.message.number] += 1

    def started(self, node: RunnerNode) -> None:
        """A runner is there (again): RLlib gives it the weights."""
        node.mail("state", self.version)

    def removed(self, node: RunnerNode) -> None:
        """A runner is in the group no longer: its calls are forgotten."""
        for call_id in [c for c, n in self.waiting.items() if n is node]:
            del self.waiting[call_id]

    def take_over(self) -> None:
        """A runner is about to go: what was collected of it has to be independent of it."""

    def finish(self) -> None:
        """The run is over: nothing is held back for a batch that will not be full."""

    def result(self, call_id: int, leases: list[Any]) -> None:
        raise NotImplementedError

    def failed(self, call_id: int) -> None:
        raise NotImplementedError


class RoundDriver(Driver):
    """PPO: call all, wait for all or the timeout, until the batch is full; then one update. Between two steps of the
    training, and when nothing came of a round, the pool takes shape."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.round = 0
        self.between = False
        world.after(0.1, self.call_all)

    def call_all(self) -> None:
        world = self.world
        if self.between:
            self.between = False
            world.pool.sweep()
        nodes = [node for node in world.runners if node.alive]
        if not nodes:
            self.between = True
            world.after(0.5, self.call_all)
            return
        self.round += 1
        self.rounds += 1
        for node in nodes:
            self.submit(node)
        world.after(world.rules.timeout, self.timed_out, self.round)

    def result(self, call_id: int, leases: list[Any]) -> None:
        if self.waiting.pop(call_id, None) is None:
            self.thrown_away += len(leases)
            self.world.note("late result", call_id, [lease.message.number for lease in leases])
            return
        self.consume(leases)
        self.batch += self.steps(leases)
        if not self.waiting:
            self.done()

    def steps(self, leases: list[Any]) -> int:
        return sum(lease.message.steps for lease in leases)

    def failed(self, call_id: int) -> None:
        if self.waiting.pop(call_id, None) is not None and not self.waiting:
            self.done()

    def timed_out(self, round_: int) -> None:
        if round_ == self.round and self.waiting:
            self.waiting.clear()
            self.between = True
            self.done()

    def done(self) -> None:
        if self.batch >= self.world.rules.quota:
            self.batch = 0
            self.world.after(self.world.random.uniform(0.02, 0.6), self.updated)
        else:
            self.world.after(0.005, self.call_all)

    def updated(self) -> None:
        self.version += 1
        self.rounds = 0
        self.between = True
        for node in self.world.runners:
            if node.alive:
                node.mail("state", self.version)
        self.call_all()


class ExactDriver(RoundDriver):
    """DQN, SAC: call all, wait for all or the timeout, again if nothing came; then into the replay buffer with it, and
    one update. The buffer is what RLlib's is: it takes a gap within an episode for a bug."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.buffer: dict[str, tuple[int, bool]] = {}

    def steps(self, leases: list[Any]) -> int:
        return sum(chunk.steps for chunk in leases)

    def consume(self, leases: list[Any]) -> None:
        chunks: list[Chunk] = leases
        world = self.world
        for chunk in chunks:
            known = self.buffer.get(chunk.episode)
            if known is not None and known != (chunk.t0, False):
                world.broken.append(f"step {chunk.t0} of {chunk.episode} after {known}: the replay buffer raises")
            self.buffer[chunk.episode] = (chunk.t0 + chunk.steps, chunk.ends)
            key = chunk.message.session, chunk.message.number
            has = world.parts.setdefault(key, set())
            new = set(range(chunk.first, chunk.first + chunk.steps))
            if has & new:
                world.got[key] += 1
            has |= new
            if len(has) == chunk.message.steps:
                world.got[key] += 1

    def done(self) -> None:
        if self.batch:
            self.batch = 0
            self.world.after(self.world.random.uniform(0.005, 0.1), self.updated)
        else:
            self.world.after(0.005, self.call_all)

    def finish(self) -> None:
        """Nothing more comes: what there is is asked for in few calls."""
        self.world.rules = self.world.rules._replace(share=20)


class StreamDriver(Driver):
    """APPO: a call always under way on each runner; `[]` is an error. Answers are references to what the runners own
    until a batch of them is full and has been learned; a runner that dies takes its own along."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.refs: list[tuple[RunnerNode, int, list[Lease]]] = []
        world.after(1.0, self.iterate)

    def iterate(self) -> None:
        """The end of a `train()`."""
        self.world.pool.sweep()
        self.world.after(self.world.random.uniform(0.5, 2.0), self.iterate)

    def started(self, node: RunnerNode) -> None:
        super().started(node)
        self.submit(node)

    def result(self, call_id: int, leases: list[Lease]) -> None:
        node = self.waiting.pop(call_id, None)
        if node is None:
            return
        if not leases:
            self.world.broken.append("sample() returned [] to APPO")
        self.refs.append((node, call_id, leases))
        self.batch += sum(lease.message.steps for lease in leases)
        if self.batch >= self.world.rules.quota or not self.world.producing:
            self.batch = 0
            refs, self.refs = self.refs, []
            self.world.after(self.world.random.uniform(0.02, 0.6), self.updated, refs)
        if node.alive:
            self.submit(node)

    def failed(self, call_id: int) -> None:
        self.waiting.pop(call_id, None)

    def learn(self, node: RunnerNode, call_id: int, leases: list[Lease]) -> None:
        if node.alive:
            self.consume(leases)
            self.world.after(self.world.random.uniform(0.0, 0.15), node.released, call_id)

    def take_over(self) -> None:
        refs, self.refs = self.refs, []
        for ref in refs:
            self.learn(*ref)

    def finish(self) -> None:
        self.take_over()

    def updated(self, refs: list[tuple[RunnerNode, int, list[Lease]]]) -> None:
        self.version += self.world.random.randint(1, 2)
        for ref in refs:
            self.learn(*ref)
