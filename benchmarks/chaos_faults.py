"""Faults: what each does, when it is over, and who does them one after the other or all at once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from chaos_parts import Group, System, balanced, ports_of, serving
from chaos_proxy import Flow, Proxy
from measure import BenchmarkError

LOOK_EVERY = 0.1
RESTART_AFTER = 1.0
"""Seconds after which what was killed is started again."""
NOTICED = 1.5
"""Seconds that are given to everybody to notice what was done to a connection, before all is said to be well."""
STALLED, SILENT, SHORT = 3.0, 12.0, 3.0


class Fault:
    """One fault. `since`: Unix time from which a hand-over shows that it is over; `pids`: of whom it hit.

    `step` is called again and again until it returns True: then nothing is left to do but to wait until all is well.
    """

    kind = ""

    def __init__(self, system: System) -> None:
        self.system = system
        self.began = time.time()
        self.since = self.began
        self.pids: list[int] = []
        self.groups: list[int] = []
        self.victim = ""
        self.done = False
        self.healed: float | None = None
        self.facts: dict[str, Any] = {}

    def begin(self) -> bool:
        """Do it. False: not now."""
        raise NotImplementedError

    def step(self) -> bool:
        """Go on with it: bring back what was taken away."""
        return True

    def is_over(self, status: dict[str, Any]) -> bool:
        """Whether its own trace is gone; that the whole system is well is asked beside this."""
        return True

    def passed(self) -> float:
        return time.time() - self.began

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "victim": self.victim, "began": round(self.began, 3), "since": round(self.since, 3),
            "pids": self.pids, "groups": self.groups, "healed_s": self.healed, **self.facts,
        }  # fmt: skip


class KillRunner(Fault):
    """SIGKILL; Ray and RLlib start it again."""

    kind = "runner killed"
    by = signal.SIGKILL

    def begin(self) -> bool:
        pids = self.system.trained.runners()
        status = self.system.broker.status()
        self.before = serving(status) if status is not None else set()
        if len(pids) < 2:
            return False  # somebody is to survive
        pid = self.system.random.choice(pids)
        self.began = self.since = time.time()
        try:
            os.kill(pid, self.by)
        except ProcessLookupError:
            return False
        self.pids, self.victim = [pid], f"process {pid}"
        return True

    def is_over(self, status: dict[str, Any]) -> bool:
        return not self.before or not self.before <= serving(status)


class StopRunner(KillRunner):
    """SIGSTOP, and never SIGCONT."""

    kind = "runner stopped"
    by = signal.SIGSTOP


class KillBroker(Fault):
    """SIGKILL, and another one at the same addresses that knows nothing."""

    kind = "broker killed"

    def begin(self) -> bool:
        self.began = time.time()
        self.victim = f"process {self.system.broker.kill()}"
        return True

    def step(self) -> bool:
        if self.passed() < RESTART_AFTER:
            return False
        self.system.broker.start()
        self.since = time.time()
        return True

    def is_over(self, status: dict[str, Any]) -> bool:
        if status["simulators"] >= self.system.simulators:
            self.facts.setdefault("all_connected_s", round(time.time() - self.since, 3))
        if status["ledger"]["delivered"]["fragments"]:
            self.facts.setdefault("delivering_s", round(time.time() - self.since, 3))
        return len(self.facts) == 2


class KillSimulators(Fault):
    """SIGKILL for one process of simulators, and another one."""

    kind = "simulators killed"

    def begin(self) -> bool:
        self.group = self.system.random.choice(self.system.groups)
        self.began = time.time()
        self.group.kill()
        self.victim, self.groups = f"{self.group.number} simulators, process {self.group.pid}", [self.group.index]
        return True

    def step(self) -> bool:
        if self.passed() < RESTART_AFTER:
            return False
        self.group.start()
        self.since, self.pids = time.time(), [self.group.pid]
        return True

    def is_over(self, status: dict[str, Any]) -> bool:
        return len(sessions_delivered(self.system.audit, self.group.pid)) >= self.group.number


class Scale(Fault):
    """Another number of runners."""

    kind = "scaled"

    def __init__(self, system: System, number: int) -> None:
        super().__init__(system)
        self.number = number
        self.kind = "scaled up" if number > system.wanted else "scaled down"

    def begin(self) -> bool:
        if not self.system.broker.scale(self.number):
            return False
        self.victim = f"{self.system.wanted} to {self.number} runners"
        self.system.wanted = self.number
        return True


class Break(Fault):
    """Something that carries bytes does otherwise for some seconds."""

    def __init__(self, system: System, kind: str, flow: Flow, seconds: float) -> None:
        super().__init__(system)
        self.kind, self.flow, self.seconds = kind, flow, seconds


class BreakLink(Break):
    """What a group's link carries waits, or vanishes, or the link is cut."""

    def begin(self) -> bool:
        self.group: Group = self.system.random.choice([g for g in self.system.groups if g.proxy is not None])
        self.proxy: Proxy = self.group.proxy  # type: ignore[assignment]
        self.groups, self.victim = [self.group.index], f"the link of {self.group.number} simulators"
        self.pids = [self.group.pid]
        self.began = time.time()
        if self.flow is Flow.PASS:
            self.proxy.cut()
        else:
            self.proxy.set_link(self.flow)
        return True

    def step(self) -> bool:
        if self.passed() < self.seconds:
            return False
        if self.flow is not Flow.PASS:
            self.proxy.set_link(Flow.PASS)
        if self.flow is Flow.SILENCE:
            self.proxy.cut()
        self.since = time.time()
        return True


class BreakRunnerLink(Break):
    """One runner's connection to the broker waits, or is cut."""

    def begin(self) -> bool:
        pids = self.system.trained.runners()
        if not pids:
            return False
        pid = self.system.random.choice(pids)
        try:
            self.ports = ports_of(pid) & self.system.backend.ports()
        except OSError:
            return False
        if not self.ports:
            return False
        self.began = time.time()
        self.pids, self.victim = [pid], f"the link of runner process {pid}"
        if self.flow is Flow.PASS:
            self.system.backend.cut(self.ports)
        else:
            self.system.backend.set(self.ports, self.flow)
        return True

    def step(self) -> bool:
        if self.passed() < self.seconds:
            return False
        self.system.backend.set(self.ports, Flow.PASS)
        self.since = time.time()
        return True


def sessions_delivered(audit: Path, pid: int) -> set[str]:
    """Sessions of the simulators of this process that have had a fragment delivered, by their own log."""
    found = set()
    for path in audit.glob(f"simulator-*-{pid}-*.jsonl"):
        for line in path.read_text().splitlines():
            if '"settled"' in line and '"delivered"' in line:
                found.add(json.loads(line)["session"])
    return found


def links(system: System) -> Iterator[Fault]:
    """One fault of the network after the other, in turns."""
    for make in cycle((
        lambda: BreakLink(system, f"link stalled for {STALLED:g} s", Flow.STALL, STALLED),
        lambda: BreakRunnerLink(system, "runner's link cut", Flow.PASS, 0.0),
        lambda: BreakLink(system, "link cut", Flow.PASS, 0.0),
        lambda: BreakRunnerLink(system, f"runner's link stalled for {SHORT:g} s", Flow.STALL, SHORT),
        lambda: BreakLink(system, f"link half-open for {SILENT:g} s", Flow.SILENCE, SILENT),
    )):  # fmt: skip
        yield make()


def scales(system: System) -> Iterator[Fault]:
    """One up, back, one down, back."""
    first = system.wanted
    for number in cycle((first + 1, first, max(1, first - 1), first)):
        yield Scale(system, number)


class Plan:
    """Faults of one sort, `period` seconds apart, from `first` on, at most `most` of them."""

    def __init__(self, make: Callable[[], Fault], period: float, first: float, most: int | None = None) -> None:
        self.make = make
        self.period = period
        self.due = first
        self.left = most


class Watch:
    """Asks the broker, and says whether all is well: everybody there, fragments being delivered, and nobody waited for:
    a runner that is gone is waited for until what it had taken is settled."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.samples: list[dict[str, Any]] = []
        self.unbalanced = 0
        self.delivered = 0
        self.dropped: dict[str, int] = {}
        self._before: dict[str, Any] | None = None
        self._well_at: int | None = None

    def look(self) -> dict[str, Any] | None:
        """The status, noted."""
        now = time.time()
        status = self.system.broker.status()
        if status is not None:
            self.unbalanced += not balanced(status["ledger"])
            if self._before is not None and self._before["epoch"] != status["epoch"]:
                self._close()
            self._before = status
        ledger = status["ledger"]["delivered"]["steps"] if status is not None else None
        self.samples.append({
            "time": round(now, 2),
            "simulators": status["simulators"] if status is not None else None,
            "serving": len(serving(status)) if status is not None else None,
            "wanted": self.system.wanted,
            "delivered": None if ledger is None else self.delivered + ledger,
        })  # fmt: skip
        return status

    def _close(self) -> None:
        """A broker's last known ledger counts on, when another has taken its place."""
        assert self._before is not None
        self.delivered += self._before["ledger"]["delivered"]["steps"]
        for reason, count in self._before["ledger"]["dropped"].items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count["fragments"]

    def finish(self, status: dict[str, Any] | None) -> None:
        if status is not None:
            self._before = status
        self._close()

    def forget(self) -> None:
        """Something was done: what was well before says nothing."""
        self._well_at = None

    def is_well(self, status: dict[str, Any] | None) -> bool:
        if status is None or status["trainer"] is None or not self._complete(status):
            self._well_at = None
            return False
        delivered = status["ledger"]["delivered"]["fragments"]
        if self._well_at is None:
            self._well_at = delivered
        return bool(delivered > self._well_at)

    def _complete(self, status: dict[str, Any]) -> bool:
        wanted = self.system.wanted
        return (
            status["simulators"] == self.system.simulators
            and status["trainer"]["runners_wanted"] == wanted
            and len(serving(status)) == wanted
            and all(r["state"] == "live" and r["duty"] == "serve" for r in status["runners"])
        )


class Chaos:
    """Begins the faults of `plans`, and notes when each has healed. `overlap`: by the clock alone."""

    def __init__(self, system: System, plans: list[Plan], *, overlap: bool, log: Path) -> None:
        self.system = system
        self.plans = plans
        self.overlap = overlap
        self.watch = Watch(system)
        self.faults: list[Fault] = []
        self._open: list[Fault] = []
        self._log = log

    def run(self, seconds: float, patience: float = 90.0) -> None:
        """`seconds` of faults, longer if a fixed number of them is not done by then, and until the last has healed."""
        started = time.time()
        while True:
            now = time.time() - started
            self._go_on()
            if now < seconds or (now < seconds + patience and any(plan.left for plan in self.plans)):
                self._begin_due(now)
            elif not self._open:
                return
            elif now > seconds + 2 * patience:
                if self.overlap:
                    return
                raise BenchmarkError(
                    f"not healed {2 * patience:g} s after the last fault was due: {self._open[0].as_json()}"
                )
            time.sleep(LOOK_EVERY)

    def _begin_due(self, now: float) -> None:
        for plan in sorted(self.plans, key=lambda p: p.due):
            if plan.due > now or plan.left == 0 or (self._open and not self.overlap):
                continue
            fault = plan.make()
            if not fault.begin():
                plan.due = now + 1.0
                continue
            plan.left = None if plan.left is None else plan.left - 1
            plan.due = max(plan.due + plan.period, now) if not self.overlap else plan.due + plan.period
            self.faults.append(fault)
            self._open.append(fault)
            self.watch.forget()
            self._tell({"event": "began", **fault.as_json()})

    def _go_on(self) -> None:
        self.system.check()
        for fault in self._open:
            if not fault.done:
                fault.done = fault.step()
                if fault.done:
                    self.watch.forget()
        status = self.watch.look()
        well = self.watch.is_well(status)
        for fault in list(self._open):
            over = fault.done and status is not None and fault.is_over(status)
            if over and well and time.time() - fault.since > NOTICED:
                fault.healed = round(fault.passed(), 2)
                self._open.remove(fault)
                self._tell({"event": "healed", **fault.as_json()})

    def _tell(self, line: dict[str, Any]) -> None:
        with self._log.open("a") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
