"""The whole system in memory on a virtual clock: real sessions, real sampling rules, the real broker core, and faults.

Three simulators, two runners (up to five when somebody asks for them), a trainer and a broker are joined by links that
behave like ZeroMQ connections; a driver calls `sample()` as RLlib does. Runs are random but repeatable: everything
follows from the seed.

    python tests/world.py --seed 7 --faults kill,broker     # replay one run, with its trace
    python tests/world.py --seed 7 --mixed                  # a run of any faults, each healed before the next begins
    python tests/world.py --table 300                       # a markdown table of pairs of faults

Its rooms: `world_links` (time and connections), `world_nodes` (processes), `world_driver` (RLlib), `world_pool` (the
number of runners), `world_faults` (schedules), `world_cli` (the lines above), `world_soak` (very many runs).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from world_driver import Driver, ExactDriver, RoundDriver, StreamDriver
from world_faults import AIMS, KINDS, Fault, draw, draw_apart
from world_links import NEVER, Connection, Links
from world_nodes import RUN, RUNNERS, RunnerNode, SimulatorNode, TrainerNode
from world_pool import Pool

from broker.core import Broker
from broker.events import Event, Received
from broker.settings import Settings
from rllink_zmq.messages import DELIVERED, TAKE, BoxSpace, DiscreteSpace, Spaces, TrainerHello
from rllink_zmq.sampling import SamplingRules
from rllink_zmq.session import SimulatorSession
from rllink_zmq.session_runner import RunnerSession, TrainerSession

__all__ = ["AIMS", "KINDS", "Fault", "Verdict", "World", "judge", "mixed"]

SIMULATORS = 3
SPACES = Spaces(BoxSpace((), "|u1", (0.0,), (255.0,)), DiscreteSpace(2))
PATIENCE = 200.0
"""Virtual seconds after the faults in which the system must be training again, and once more to settle everything."""
AIMING = 4.0
"""Virtual seconds that a fault waits for the message at which it is aimed, where one fault follows another."""


class Verdict(NamedTuple):
    """What a run showed. The first six must be empty, or 0. `over_quota`: env steps that the first round for some
    weights took beyond quota and one fragment a runner."""

    twice: list[tuple[bytes, int]]
    lost: list[tuple[bytes, int]]
    untrue: list[tuple[bytes, int, str]]
    stuck: list[str]
    broken: list[str]
    over_quota: int
    used_though_cut: int
    outcomes: Counter[str]
    struck: Counter[str]
    versions: int
    events: int

    @property
    def perfect(self) -> bool:
        return not (self.twice or self.lost or self.untrue or self.stuck or self.broken or self.over_quota)


class World(Links):
    """One run. `faults`: kinds to draw a schedule from, or a schedule. `apart`: each fault begins when the one before
    has healed. `style`: "round", "stream", "exact"; by default one of the first two, by the seed; `lag_limit` likewise.
    `crowd`: how many simulators, episodes that each of them steps together, and runners at the start.
    `parts`: of fragments that are handed over in parts, which steps RLlib has; `short`: answers that
    lacked steps since none came any more; `lacking`: when others lacked steps, or had
    none, while simulators went on."""

    def __init__(
        self,
        seed: int,
        faults: Iterable[str | Fault] = (),
        *,
        apart: bool = False,
        style: str | None = None,
        lag_limit: int = 0,
        crowd: tuple[int, int, int] = (SIMULATORS, 1, RUNNERS),
        broker_class: type[Broker] = Broker,
        runner_class: type[RunnerSession] = RunnerSession,
        simulator_class: type[SimulatorSession] = SimulatorSession,
        check_each: bool | None = None,
        through_wire: bool | None = None,
        repeats: float = 0.0,
    ) -> None:
        super().__init__(
            seed,
            check_each=seed % 50 == 7 if check_each is None else check_each,
            through_wire=seed % 20 == 3 if through_wire is None else through_wire,
            repeats=repeats,
        )
        self.seed, self.apart = seed, apart
        simulators, self.width, self.crew = crowd
        self.kinds = tuple(faults)
        self.classes = broker_class, runner_class, simulator_class
        self.got: Counter[tuple[bytes, int]] = Counter()
        self.parts: dict[tuple[bytes, int], set[int]] = {}
        self.short = 0
        self.lacking: list[float] = []
        self.settled: dict[tuple[bytes, int], str] = {}
        self.struck: Counter[str] = Counter()
        self.producing = True
        self.over_quota, self.pool_seen = 0, (0, 0)
        self.longest, self.ahead, self.lag_limit, self.rules = self.draw_terms(style, lag_limit)
        lease_bytes = self.random.choice((24, 100, 8 << 20))
        self.settings = Settings(fragment_bytes=16, memory=32 * (SIMULATORS + 20), lease_bytes=lease_bytes)
        if crowd != (SIMULATORS, 1, RUNNERS):  # windows that don't matter
            self.settings = Settings(fragment_bytes=64, memory=1 << 20)
        self.start_broker()
        session = TrainerSession(self.id(), self.terms(self.crew), b"blob", name="trainer")
        self.runners: list[RunnerNode] = []
        drivers: dict[str, type[Driver]] = {"round": RoundDriver, "stream": StreamDriver, "exact": ExactDriver}
        self.driver = drivers[self.rules.style](self)
        self.trainer = TrainerNode(self, "trainer", session)
        self.pool = Pool(self, self.crew, self.random.choice((10.0, NEVER)))
        self.trainer.start()
        self.simulators = [self.new_simulator(i) for i in range(simulators)]
        self.schedule = self.draw_schedule()
        self.faults_end = self.now + 1.5
        if not apart:
            for fault in self.schedule:
                self.at(1000.0 + fault.time, self.aimed.append if fault.aim else self.strike, fault)
                self.faults_end = max(self.faults_end, 1000.1 + fault.time + fault.span)

    # ---- what the seed decides

    def draw_terms(self, style: str | None, lag_limit: int) -> tuple[int, int, int, SamplingRules]:
        """(longest fragment, steps ahead, lag limit, the rules of `sample()`)."""
        r = self.random
        style = style or ("round", "stream")[self.seed % 2]
        rounds = style == "round"
        quota = r.choice((10, 24, 40))
        lag = lag_limit or (r.choice((1, 2, 30)) if rounds else r.choice((6, 30)))
        ahead = r.choice((0, 1, quota, lag * quota) if rounds else (0, quota, lag * quota))
        timeout, longest = r.choice((10.0, 30.0)), r.choice((4, 8, 12))
        if rounds:
            return longest, ahead, lag, SamplingRules("round", -(-quota // self.crew), quota, timeout, 0.2)
        if style == "exact":
            share = r.choice((1, 3, 10, 20))
            rules = SamplingRules(style, share, self.crew * share, timeout, 0.0, longest)
            return longest, ahead, r.choice((20, 1000)), rules
        return longest, ahead, lag, SamplingRules("stream", r.choice((4, 6, 10)), quota, timeout, 0.2)

    def terms(self, runners: int) -> TrainerHello:
        """What the trainer tells the broker."""
        quota, longest = self.rules.quota, self.longest
        most = self.rules.share + longest if self.rules.style == "exact" else 0
        return TrainerHello(
            RUN, quota, self.lag_limit, self.ahead, runners, longest, SPACES, "p" * 16, 4, lease_steps=most,
            rounds=self.rules.style == "round",
        )  # fmt: skip

    def draw_schedule(self) -> list[Fault]:
        kinds = [k for k in self.kinds if isinstance(k, str)]
        given = [k for k in self.kinds if isinstance(k, Fault)]
        return given + ((draw_apart if self.apart else draw)(self.random, kinds) if kinds else [])

    # ---- who there is

    def new_runner(self, index: int) -> RunnerNode:
        rng = random.Random(self.random.random())
        session = self.classes[1](self.id(), RUN, name=f"runner{index}", rng=rng)
        node = RunnerNode(self, f"runner{index}", session, index)
        node.start()
        return node

    def new_simulator(self, i: int) -> SimulatorNode:
        rng = random.Random(self.random.random())
        session = self.classes[2](self.id(), name=f"simulator{i}", spaces=SPACES, rng=rng, episodes=self.width)
        node = SimulatorNode(self, f"simulator{i}", session)
        node.start()
        return node

    def start_broker(self) -> None:
        self.broker = self.classes[0](self.settings, self.id(8), "tcp://127.0.0.1:1", self.now)
        self.note("broker", "starts")
        self._tick_at = NEVER
        self._schedule_tick()

    def handle(self, event: Event) -> None:
        super().handle(event)
        if self.broker is not None and self.rules.style == "round":
            self.look_at_quota(self.broker, type(event) is Received and type(event.message) is TAKE)

    def look_at_quota(self, broker: Broker, taken: bool) -> None:
        """The first round for some weights, with as many runners as in the round before: runners may go by the number
        of some seconds ago."""
        runners, driver = len(broker.pool()), self.driver
        if runners != self.pool_seen[0]:
            self.pool_seen = runners, driver.version
        same = broker.version == driver.version  # else what it counts is of the round before
        if taken and same and driver.rounds == 1 and driver.version > self.pool_seen[1] + 1:
            most = self.rules.quota + len(self.runners) * self.longest
            self.over_quota = max(self.over_quota, broker.round_steps - most)

    def publish(self, message: Any) -> None:
        """PUB may lose anything."""
        for node in self.simulators:
            if self.random.random() < 0.7:
                self.after(self.latency(), node.published, message)

    # ---- faults

    def aim(self, connection: Connection, message: Any) -> None:
        for fault in self.aimed:
            if fault.aim == type(message).__name__:
                self.aimed.remove(fault)
                self.after(self.random.uniform(0.0, 2.0) * self.slowness, self.strike, fault, connection)
                self.faults_end = max(self.faults_end, self.now + fault.span + 1.0)
                return

    def strike(self, fault: Fault, connection: Connection | None = None) -> None:
        self.note("fault", fault.kind, fault)
        self.struck[fault.kind] += 1
        node = connection.node if connection is not None else None
        if fault.kind in ("kill", "pause"):
            self.strike_runner(fault, node if isinstance(node, RunnerNode) else None)
        elif fault.kind == "broker":
            self.kill_broker(fault.span)
        elif fault.kind == "scale":
            self.pool.ask(fault.target)
            if not fault.target:
                self.after(fault.span, self.pool.ask, fault.back)
        elif fault.kind == "cut":
            if connection is not None:
                self.cut(connection)
            else:
                self.break_a_link(fault.victim)
        elif fault.kind == "sim":
            i = self.simulators.index(node) if node in self.simulators else fault.victim % len(self.simulators)
            if self.simulators[i].alive:
                self.simulators[i].end()
                self.after(fault.span, self.restart_simulator, i)

    def strike_runner(self, fault: Fault, runner: RunnerNode | None) -> None:
        if runner is None or runner not in self.runners:
            runner = self.runners[fault.victim % len(self.runners)]
        if not runner.alive:
            return
        if fault.kind == "kill":
            runner.end()
            self.after(fault.span, self.pool.restart, runner)
        elif not runner.paused:
            runner.stop()
            self.after(fault.span, runner.resume)

    def restart_simulator(self, i: int) -> None:
        self.simulators[i] = self.new_simulator(i)

    def kill_broker(self, span: float) -> None:
        if self.broker is None:
            return
        self.broker.check_invariants()
        self.broker = None
        self._tick_at = NEVER
        for connection in list(self.connections):
            self.cut(connection, peer_knows=True)
            connection.up_limit = 0
            self.after(self.random.uniform(0.0, 0.05), connection.node.disconnected, connection)
        self.after(span, self.start_broker)
        self.after(span + 5.0, self.pool.ask_again, self.pool.wish)  # who asked the old one sees it

    # ---- the run and its judgement

    def well(self) -> bool:
        """Everybody is there, and nothing of broken connections is."""
        if self.broker is None or self.now < self.restless or not self.pool.settled:
            return False
        nodes: tuple[list[Any], ...] = ([self.trainer], self.simulators, self.runners)
        return all(node.well for some in nodes for node in some)

    def heal(self) -> bool:
        """Everybody is there again, and what was on its way then is settled, and known to be by the broker."""
        if not self.until(self.now + PATIENCE, self.well) or self.broker is None:
            return False
        marks = {node.session.session: node.session.number for node in self.simulators}

        def passed() -> bool:
            known = self.broker.simulators if self.broker is not None else {}
            return all(s in known and known[s].base > mark for s, mark in marks.items())

        return self.until(self.now + PATIENCE, passed)

    def strike_apart(self, stuck: list[str]) -> None:
        """One fault after the other."""
        for fault in self.schedule:
            self.until(self.now + fault.time)
            before = sum(self.struck.values())
            if fault.aim:
                self.aimed.append(fault)
                self.until(self.now + AIMING, lambda: sum(self.struck.values()) > before)  # noqa: B023
                self.aimed.clear()
            if sum(self.struck.values()) == before:
                self.strike(fault)
            self.until(self.now + fault.span + 0.1)
            if not self.heal():
                stuck.append(f"not healed {PATIENCE:.0f} s after {fault}")
                return

    def go_on(self, stuck: list[str]) -> None:
        """After the faults the system must be training."""
        version = self.driver.version
        for node in self.simulators:
            node.settled_since = 0

        def training() -> bool:
            learned = self.driver.version >= version + 2 and all(n.settled_since for n in self.simulators)
            return learned and self.pool.settled

        if not self.until(self.now + PATIENCE, training):
            stuck.append(f"version {self.driver.version}, {version} when the faults ended")
            stuck += [f"{n.name} goes on no more" for n in self.simulators if not n.settled_since]
            if not self.pool.settled:
                stuck.append(f"{self.pool.wish} runners were asked for, the pool means to have {self.pool.target}")

    def settle(self, stuck: list[str]) -> None:
        """Without new fragments everything must get its outcome."""
        self.producing = False
        self.driver.finish()

        def quiet() -> bool:
            broker = self.broker
            if broker is None or broker.ledger.in_flight[0]:
                return False
            return not any(n.session.unsettled for n in self.simulators)

        if not self.until(self.now + PATIENCE, quiet):
            waiting = [node for node in self.simulators if node.session.unsettled]
            stuck += [f"{node.name} waits for {list(node.session.unsettled)}" for node in waiting]
            if self.broker is not None and self.broker.ledger.in_flight[0]:
                stuck.append(f"the broker holds {self.broker.ledger.in_flight[0]} fragments")
        self.until(self.now + 1.0)

    def run(self) -> Verdict:
        stuck: list[str] = []
        if self.apart:
            self.until(self.faults_end)
            self.strike_apart(stuck)
        while self.now < self.faults_end:  # an aimed fault may move it
            self.until(self.faults_end)
        self.aimed.clear()
        self.go_on(stuck)
        self.settle(stuck)
        if self.broker is not None:
            self.broker.check_invariants()
        got, settled = self.got, self.settled
        return Verdict(
            twice=[key for key, n in got.items() if n > 1],
            lost=[key for key, outcome in settled.items() if outcome == DELIVERED and not got[key]],
            untrue=[
                (*key, outcome)
                for key, outcome in settled.items()
                if outcome not in (DELIVERED, "handover_cut")
                and (got[key] or key in self.parts or outcome == "unknown")
            ],
            stuck=stuck,
            broken=self.broken,
            over_quota=self.over_quota,
            used_though_cut=sum(1 for key, outcome in settled.items() if outcome == "handover_cut" and got[key]),
            outcomes=Counter(settled.values()),
            struck=self.struck,
            versions=self.driver.version,
            events=self.events,
        )

    def story(self, last: int = 60) -> str:
        """The end of the trace, and how to see all of it."""
        kinds = ",".join(k for k in self.kinds if isinstance(k, str)) or "none"
        lines = [line(*entry) for entry in self.trace[-last:]]
        replay = f"python tests/world.py --seed {self.seed} --faults {kinds}" + " --apart" * self.apart
        faults = [tuple(f) for f in self.schedule]
        return "\n".join([*lines, f"seed {self.seed}, {self.rules}, faults {faults}", f"replay: {replay}"])


def mixed(seed: int, **options: Any) -> World:
    """A world of any faults, each healed before the next begins."""
    return World(seed, KINDS, apart=True, **options)


def line(t: float, what: str, who: Any, detail: Any) -> str:
    """An entry of the trace, to be read."""
    if isinstance(who, bytes):
        who = who.hex().lstrip("0")
    text = detail.hex() if isinstance(detail, bytes) else str(detail)
    for zeros in ("\\x00" * 15, "\\x00" * 14, "\\x00" * 7):
        text = text.replace(zeros, "~")
    return f"{t - 1000:9.4f} {what:>9} {who!s:<11} {text[:230]}"


def judge(world: World) -> Verdict:
    """Run it. Raises `AssertionError` with the story unless the run was perfect."""
    try:
        verdict = world.run()
    except Exception as e:
        e.add_note(world.story())
        raise
    if not verdict.perfect:
        keys = [key[:2] for key in (*verdict.twice, *verdict.lost, *verdict.untrue)]
        raise AssertionError(f"{failures(verdict)}\n{about(world, keys)}\n{world.story()}")
    return verdict


def about(world: World, keys: Sequence[tuple[bytes, int]]) -> str:
    """The trace lines that mention the fragments `keys`."""
    lines = []
    for entry in world.trace:
        text = str(entry[3])
        if any(repr(s)[2:-1] in text and f"{n}" in text for s, n in keys[:1]) or entry[1] in ("fault", "cut"):
            lines.append(line(*entry))
    return "\n".join(lines[-80:]) if keys else ""


def failures(verdict: Verdict) -> str:
    """What is wrong, in words; '' = nothing."""
    return ", ".join(
        f"{name}: {value}"
        for name, value in (
            ("trained twice", verdict.twice), ("acked as delivered but lost", verdict.lost),
            ("dropped but trained, or no outcome", verdict.untrue), ("stuck", verdict.stuck),
            ("broken", verdict.broken), ("over the quota", verdict.over_quota),
        )
        if value
    )  # fmt: skip


if __name__ == "__main__":
    from world_cli import main

    main()
