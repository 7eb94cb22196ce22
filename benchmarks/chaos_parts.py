"""The parts of a system that can be killed one by one: broker, groups of simulators, a training and its runners.

Each is a process of its own, started by the command line of the package, and ended by its own id.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, NamedTuple

from chaos_proxy import Proxy
from measure import BenchmarkError, until

from rllink_zmq.cli import admin
from rllink_zmq.errors import RllinkError

HOST = "127.0.0.1"
ITERATION = re.compile(r"iteration\s+(\d+)\s+steps\s+(\d+)\s+return\s+(\S+)")
PR_SET_PDEATHSIG = 1
SHARED = {"RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
"""For a machine that all parts share. Ray gives its workers a niceness of 15: beside simulators and a learner that take
all CPUs there are, a runner that starts would need a minute. And a learner of several threads waits for the one whose
CPU that runner has: an update of 0.4 s took 1.7 s."""
RUNNER = "ray::ZmqEnvRunner"


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _end_with_parent() -> None:
    """In the child: SIGTERM when whoever started it is gone. Linux only."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def start(log: IO[str], *arguments: str, stdout: Any = subprocess.DEVNULL, stderr: Any = None) -> subprocess.Popen[str]:
    """`rllink-zmq` with these arguments; what it says goes to `log` unless told otherwise."""
    return subprocess.Popen(
        [sys.executable, "-m", "rllink_zmq.cli", *arguments],
        stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr or log, text=True, start_new_session=True,
        preexec_fn=_end_with_parent, env={**os.environ, **SHARED},
    )  # fmt: skip


def end(process: subprocess.Popen[str], by: signal.Signals, within: float) -> int:
    """Ask it to end; kill it when it doesn't. The exit code."""
    if process.poll() is None:
        process.send_signal(by)
        try:
            process.wait(within)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


class BrokerProcess:
    """A broker that comes back at the same addresses."""

    def __init__(self, logs: Path) -> None:
        self.frontend, self.backend, self.weights, self.admin = free_ports(4)
        self._log = (logs / "broker.log").open("a")
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Returns when it is ready; how many seconds it took."""
        began = time.monotonic()
        self.process = start(
            self._log, "broker", "--frontend", f"tcp://{HOST}:{self.frontend}", "--backend",
            f"tcp://{HOST}:{self.backend}", "--weights", f"tcp://{HOST}:{self.weights}", "--admin",
            f"{HOST}:{self.admin}", stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchmarkError(f"the broker ended with {self.process.wait()}")
        return time.monotonic() - began

    def kill(self) -> int:
        assert self.process is not None and self.process.stdout is not None
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        return self.process.pid

    def stop(self) -> None:
        if self.process is not None:
            end(self.process, signal.SIGTERM, 20)
            if self.process.stdout is not None:
                self.process.stdout.close()
        self._log.close()

    def status(self) -> dict[str, Any] | None:
        """`/status`; None while nobody answers."""
        try:
            return admin.fetch(f"http://{HOST}:{self.admin}")
        except RllinkError:
            return None

    def scale(self, runners: int) -> bool:
        """Whether it took the request: not while it is away or has no trainer."""
        try:
            admin.scale(f"http://{HOST}:{self.admin}", runners)
        except RllinkError:
            return False
        return True


class Group:
    """Simulators of one process. With a proxy all their connections to the broker's frontend go through it."""

    def __init__(
        self, index: int, number: int, port: int, proxy: Proxy | None, logs: Path, audit: Path, seed: int
    ) -> None:
        self.index = index
        self.number = number
        self.proxy = proxy
        self.pid = 0
        self._port = proxy.port if proxy is not None else port
        self._log = (logs / f"simulators-{index}.log").open("a")
        self._audit = audit
        self._seed = seed
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._seed += 1000
        self._process = start(
            self._log, "simulate", "--env", "CartPole-v1", "--broker", f"tcp://{HOST}:{self._port}", "--num",
            str(self.number), "--seed", str(self._seed), "--audit", str(self._audit),
        )  # fmt: skip
        self.pid = self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def check(self) -> None:
        if self._process is not None and self._process.poll() not in (None, -signal.SIGKILL):
            raise BenchmarkError(f"simulators {self.index} ended with {self._process.returncode}")

    def ask_to_stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def stop(self) -> None:
        if self._process is not None:
            end(self._process, signal.SIGTERM, 20)
        self._log.close()


class Iteration(NamedTuple):
    """`time`: Unix seconds at which it was told."""

    time: float
    number: int
    steps: int
    mean: float | None


class TrainingProcess:
    """`rllink-zmq train`, and the Ray processes beneath it."""

    def __init__(self, port: int, runners: int, logs: Path, audit: Path, seed: int, config: Path | None) -> None:
        self.iterations: list[Iteration] = []
        self.result: dict[str, Any] = {}
        self._log = (logs / "train.log").open("a")
        more = ["--config", str(config)] if config is not None else []
        self.process = start(
            self._log, "train", "--broker", f"tcp://{HOST}:{port}", "--env", "CartPole-v1", "--runners", str(runners),
            "--audit", str(audit), "--seed", str(seed), "--json", *more, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            now = time.time()
            self._log.write(f"{now:.3f} {line}")
            self._log.flush()
            found = ITERATION.search(line)
            if found:
                mean = None if found[3] == "-" else float(found[3])
                self.iterations.append(Iteration(now, int(found[1]), int(found[2]), mean))

    @property
    def steps(self) -> int:
        return self.iterations[-1].steps if self.iterations else 0

    def check(self) -> None:
        if self.process.poll() is not None:
            raise BenchmarkError(f"the training ended with {self.process.returncode}")

    def runners(self) -> list[int]:
        """The ids of the processes that are runners of this training, now."""
        parents: dict[int, int] = {}
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if (folder / "cmdline").read_bytes().startswith(RUNNER.encode()):
                    found.append(int(folder.name))
            except (OSError, IndexError):
                continue  # it has just ended
        return sorted(pid for pid in found if self._is_ours(pid, parents))

    def _is_ours(self, pid: int, parents: dict[int, int]) -> bool:
        while pid > 1:
            if pid == self.process.pid:
                return True
            pid = parents.get(pid, 0)
        return False

    def stop(self) -> None:
        """Ctrl-C, as a person would, and its last line."""
        end(self.process, signal.SIGINT, 60)
        assert self.process.stdout is not None
        lines = [line for line in self.process.stdout.read().splitlines() if line.startswith("{")]
        self.result = json.loads(lines[-1]) if lines else {}
        self._reader.join(5)
        self.process.stdout.close()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self._log.close()


def ports_of(pid: int) -> set[int]:
    """Local ports of the TCP connections that a process has."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = str(link.readlink())
        except OSError:
            continue
        if name.startswith("socket:["):
            inodes.add(name[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            if parts[9] in inodes:
                found.add(int(parts[1].rpartition(":")[2], 16))
    return found


class System:
    """All of it: broker, proxies, simulators, training. `audit`: where everybody logs."""

    def __init__(
        self, folder: Path, *, simulators: int, runners: int, groups: int, seed: int, config: Path | None = None
    ) -> None:
        self.audit = folder / "audit"
        self.audit.mkdir(parents=True)
        self.simulators = simulators
        self.wanted = runners
        self.random = random.Random(seed)
        self.broker = BrokerProcess(folder)
        self.backend = Proxy(self.broker.backend)
        self.groups = []
        self.training: TrainingProcess | None = None
        shares = [simulators // groups + (i < simulators % groups) for i in range(groups)]
        for i, share in enumerate(shares):
            proxy = Proxy(self.broker.frontend) if i < max(1, groups * 2 // 5) else None
            self.groups.append(Group(i, share, self.broker.frontend, proxy, folder, self.audit, seed + i))
        self._folder, self._seed, self._config = folder, seed, config

    def start(self) -> None:
        self.broker.start()
        for group in self.groups:
            group.start()
        self.training = TrainingProcess(
            self.backend.port, self.wanted, self._folder, self.audit, self._seed, self._config
        )

    @property
    def trained(self) -> TrainingProcess:
        assert self.training is not None
        return self.training

    def check(self) -> None:
        """Raises `BenchmarkError` when something has ended that nobody killed."""
        self.trained.check()
        for group in self.groups:
            group.check()

    def wait_until_it_trains(self, patience: float = 240.0) -> None:
        def ready() -> bool:
            self.check()
            status = self.broker.status()
            return (
                status is not None and status["simulators"] == self.simulators
                and len(serving(status)) == self.wanted and len(self.trained.iterations) >= 3
            )  # fmt: skip

        until(ready, f"{self.simulators} simulators and {self.wanted} runners train", patience, 0.2)

    def stop(self) -> dict[str, Any] | None:
        """Simulators first, so that what is on its way can arrive. The broker's last status."""
        try:
            for group in self.groups:
                group.ask_to_stop()
            for group in self.groups:
                group.stop()
            if self.training is not None:
                time.sleep(1.0)
                self.training.stop()
            return self.broker.status()
        finally:
            self.broker.stop()
            for group in self.groups:
                if group.proxy is not None:
                    group.proxy.close()
            self.backend.close()


def serving(status: dict[str, Any]) -> set[str]:
    """Sessions of the runners that serve the current run."""
    trainer = status["trainer"]
    if trainer is None:
        return set()
    return {
        r["session"] for r in status["runners"]
        if r["run_id"] == trainer["run_id"] and r["duty"] == "serve" and r["state"] == "live"
    }  # fmt: skip


def balanced(ledger: dict[str, Any]) -> bool:
    """received = delivered + dropped + in flight, in fragments and in steps."""
    parts = [ledger["delivered"], ledger["in_flight"], *ledger["dropped"].values()]
    return all(ledger["received"][unit] == sum(p[unit] for p in parts) for unit in ("fragments", "steps"))
