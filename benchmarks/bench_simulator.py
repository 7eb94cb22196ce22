"""One CartPole simulator and all it needs to sample, against RLlib's own client for external environments.

Ours: a client process, the broker's process, and a `ZmqEnvRunner` whose `sample()` is called. RLlib's: its
`_dummy_external_client`, as it ships, in a process, and its `EnvRunnerServerForExternalInference` whose `sample()` is
called. The same environment, the same 256x256 network, no learning: after each 4,000 steps `set_state` with the next
version, as PPO does it (RLlib's client waits for that; ours gets it published).

Counted are the env steps that `sample()` returned. A round begins and ends when the client waits for the learner, so
that its CPU time belongs to exactly these steps. Steps/s per core = steps / CPU seconds of the client's process.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
from processes import Helper, broker, helpers, questions

if TYPE_CHECKING:
    from learning import Versions

BATCH = 4000
"""Env steps between two weights versions: PPO's default, and RLlib's external client knows no other fragment."""

POLICIES = ("untrained", "balancing")
"""Episodes of about 20 steps, as at the beginning of training, and of 500, as at its end: fragments are no longer."""

SETTLE = 0.3
"""Seconds after which a client that may not sample ahead any further has stopped."""


def ours(connection: Connection, backend: str) -> None:
    """The learner's side with `ZmqEnvRunner`."""
    with measure.quiet():
        from learning import LearnerSide

        side = LearnerSide(backend, BATCH)
        serve(connection, side.runners[0], side.versions, offered=True)
        side.stop()


def peer(connection: Connection, port: int) -> None:
    """The learner's side with RLlib's `EnvRunnerServerForExternalInference`, on `port`."""
    with measure.quiet():
        from learning import Versions, ppo
        from ray.rllib.env.external.env_runner_server_for_external_inference import EnvRunnerServerForExternalInference

        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 - it prints, and until the process ends
        config = ppo(BATCH).environment(env_config={"port": port})
        runner = EnvRunnerServerForExternalInference(config=config, worker_index=0)
        serve(connection, runner, Versions([runner]), offered=False)


def serve(connection: Connection, runner: Any, versions: Versions, *, offered: bool) -> None:
    """`calls` batches of PPO without its learner: env steps, episodes, and steps/s after the first batch, which may
    have been sampled before it was asked for."""
    connection.send("ready")
    for policy, calls in questions(connection):
        started = time.monotonic()
        steps = episodes = first = 0
        for _ in range(calls):
            if offered:  # before the first sample RLlib's client has nothing to wait for
                versions.offer(policy)
            offered = True
            batch = 0
            while batch < BATCH:
                sampled = runner.sample()
                batch += sum(map(len, sampled))
                episodes += sum(e.is_done for e in sampled)
                runner.get_metrics()
            steps += batch
            if not first:
                first, started = steps, time.monotonic()
        connection.send((steps, episodes, (steps - first) / (time.monotonic() - started)))


def start(stack: ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
    """A client's process."""
    client = Path(__file__).parent / "simulator_client.py"
    running = subprocess.Popen([sys.executable, str(client), *arguments], stdout=subprocess.DEVNULL)

    def stop() -> None:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()

    stack.callback(stop)
    return running


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


class Side:
    """One client with its learner's side. `others`: process ids that work for it, besides these two."""

    def __init__(self, what: str, learner: Helper, client: subprocess.Popen[bytes], others: tuple[int, ...]) -> None:
        self.what = what
        self._learner = learner
        self._client = client
        self._pids = (client.pid, learner.pid, *others)
        self.rounds: dict[str, list[dict[str, float]]] = {policy: [] for policy in POLICIES}
        self._calls = 2

    def warm_up(self, policy: str, seconds: float) -> None:
        """Change to this policy, and find out how many batches take `seconds`."""
        _, _, rate = self._learner.ask(policy, 3)
        self._calls = max(2, round(seconds * rate / BATCH))
        time.sleep(SETTLE)

    def run(self, policy: str) -> None:
        before = [measure.cpu_seconds(pid) for pid in self._pids]
        steps, episodes, rate = self._learner.ask(policy, self._calls)
        time.sleep(SETTLE)
        used = [measure.cpu_seconds(pid) - b for pid, b in zip(self._pids, before, strict=True)]
        held = measure.memory(self._client.pid)
        self.rounds[policy].append(
            {
                "steps_per_client_cpu_s": steps / used[0],
                "steps_per_all_cpu_s": steps / sum(used),
                "steps_per_s": rate,
                "client_cores": rate * used[0] / steps,
                "episode_steps": steps / max(1, episodes),
                "client_rss": held.rss,
                "client_pss": held.pss,
            }
        )

    def of(self, policy: str, what: str) -> list[float]:
        return [r[what] for r in self.rounds[policy]]


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("simulator", options)
    if importlib.util.find_spec("msgpack_numpy") is None:
        raise SystemExit("RLlib's client needs msgpack_numpy, which RLlib doesn't install: pip install msgpack-numpy")
    number, seconds = (1, 0.5) if options.quick else (5, 5.0)
    ports = [free_port()] if options.quick else [free_port(), free_port()]
    with ExitStack() as stack:
        addresses = stack.enter_context(broker())
        learners = stack.enter_context(helpers((ours, addresses["backend"]), *((peer, p) for p in ports)))
        sides = [Side("rllink-zmq", learners[0], start(stack, "ours", addresses["frontend"]), (addresses["pid"],))]
        sides.append(Side("RLlib's client", learners[1], start(stack, "peer", str(ports[0])), ()))
        if not options.quick:
            one = start(stack, "peer", str(ports[1]), "1")
            sides.append(Side("RLlib's, 1 torch thread", learners[2], one, ()))
        by_name = {side.what: side for side in sides}
        for policy in POLICIES:
            for side in sides:
                side.warm_up(policy, seconds)
            for _, name in measure.rounds(number, list(by_name)):
                by_name[name].run(policy)
    _tell(report, sides)


def _tell(report: measure.Report, sides: list[Side]) -> None:
    rows: list[tuple[object, ...]] = []
    for policy in POLICIES:
        for side in sides:
            found = {k: measure.median(side.of(policy, k)) for k in side.rounds[policy][0]}
            report.figures.setdefault(policy, {})[side.what] = found
            rates = (found[k] for k in ("steps_per_client_cpu_s", "steps_per_all_cpu_s", "steps_per_s"))
            held = (found[k] / 1e6 for k in ("client_rss", "client_pss"))
            rows.append((policy, side.what, *rates, found["client_cores"], *held, found["episode_steps"]))
    report.table(
        "One CartPole simulator, 256x256, sampling only (medians of rounds that alternate)",
        ("policy", "", "steps/s per core", "steps/s, all CPU", "steps/s, wall", "cores", "RSS MB", "PSS MB", "episode"),
        rows,
    )
    mine = sides[0]
    for side in sides[1:]:
        for policy in POLICIES:
            k = "steps_per_client_cpu_s"
            faster = measure.ratios(mine.of(policy, k), side.of(policy, k))
            what = f"steps/s per core, times {side.what}, {policy}"
            report.targets.append(measure.target(what, faster, "at least", 8))
        smaller = measure.ratios(mine.of(POLICIES[-1], "client_rss"), side.of(POLICIES[-1], "client_rss"))
        report.targets.append(measure.target(f"resident memory, part of {side.what}", smaller, "at most", 0.25))
    for side in sides:
        report.rounds[side.what] = side.rounds
    report.notes.append(
        "steps/s per core: env steps that sample() returned / CPU seconds of the client's process alone. All CPU: "
        "client + broker + the process that calls sample(); for RLlib's client + the process that calls sample(). "
        "Cores: CPU seconds of the client a second. Episode: its mean length."
    )
    report.show()


if __name__ == "__main__":
    main()
