"""64 CartPoles in one vectorised simulator, into `sample()` of one runner, against RLlib's two ways of having them.

Ours: a process that steps 64 CartPoles together (`drive_vector`, Gymnasium's own vector form) and acts by the policy it
is sent, the broker's process, and a `ZmqEnvRunner` whose `sample()` is called in a third. RLlib's: its server for
external environments with its client, as it ships, which has one CartPole; and its `SingleAgentEnvRunner` with 64
environments in the process that calls `sample()`. The same 256x256 network, no learning; after each 4,000 steps
`set_state` with the next version, as PPO does it. Counted are the env steps that `sample()` returned, a second.

Then what a runner spends on a step: one simulator whose episodes, and so its fragments, are of 200 steps.
"""

from __future__ import annotations

import importlib.util
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import measure
from bench_simulator import BATCH, POLICIES, SETTLE, free_port, ours, peer, serve, start
from processes import Helper, broker, helpers, questions

WORLDS = 64
FRAGMENT = 200


def inside(connection: Connection) -> None:
    """RLlib's own runner, with its environments in this process."""
    with measure.quiet():
        from learning import Versions, ppo
        from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner

        config = ppo(BATCH).environment("CartPole-v1").env_runners(num_envs_per_env_runner=WORLDS)
        runner = SingleAgentEnvRunner(config=config, worker_index=0)
        serve(connection, runner, Versions([runner]), offered=True)


def builds(connection: Connection, backend: str) -> None:
    """Microseconds a step of decoding fragments and building episodes of them, at fragments of 200 steps."""
    with measure.quiet():
        from learning import LearnerSide

        from rllink_zmq import wire

        side = LearnerSide(backend, BATCH)
        runner = side.runners[0]
        build = runner._builder.build
        spent = [0.0, 0.0]  # seconds of decoding, of building
        counted = [0, 0]  # steps, fragments

        def timed(leases: Any) -> Any:
            frames = [wire.pack(lease.message, lease.body) for lease in leases]
            began = time.perf_counter()
            for each in frames:
                wire.unpack(each)
            decoded = time.perf_counter()
            made = build(leases)
            spent[0] += decoded - began
            spent[1] += time.perf_counter() - decoded
            counted[0] += sum(lease.message.steps for lease in leases)
            counted[1] += len(leases)
            return made

        runner._builder.build = timed
        connection.send("ready")
        for (calls,) in questions(connection):
            spent[:], counted[:] = [0.0, 0.0], [0, 0]
            for _ in range(calls):
                side.versions.offer("balancing")
                runner.sample()
                runner.get_metrics()
            steps, fragments = counted
            connection.send((spent[0] * 1e6 / steps, spent[1] * 1e6 / steps, steps / fragments))
        side.stop()


class Side:
    """What hands over steps: `learner` is asked for batches."""

    def __init__(self, learner: Helper) -> None:
        self._learner = learner
        self.rates: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        self.lengths: dict[str, list[float]] = {policy: [] for policy in POLICIES}
        self._calls = 2

    def warm_up(self, policy: str, seconds: float) -> None:
        """Change to this policy, and find out how many batches take `seconds`."""
        _, _, rate = self._learner.ask(policy, 3)
        self._calls = max(2, round(seconds * rate / BATCH))

    def run(self, policy: str) -> None:
        steps, episodes, rate = self._learner.ask(policy, self._calls)
        self.rates[policy].append(rate)
        self.lengths[policy].append(steps / max(1, episodes))
        time.sleep(SETTLE)


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("vector", options)
    if importlib.util.find_spec("msgpack_numpy") is None:
        raise SystemExit("RLlib's client needs msgpack_numpy, which RLlib doesn't install: pip install msgpack-numpy")
    number, seconds = (1, 0.3) if options.quick else (5, 4.0)
    port = free_port()
    with ExitStack() as stack:
        addresses = stack.enter_context(broker())
        learners = stack.enter_context(helpers((ours, addresses["backend"]), (peer, port), (inside,)))
        start(stack, "vector", addresses["frontend"], str(WORLDS))
        start(stack, "peer", str(port))
        names = ("rllink-zmq", "RLlib's server and client", "RLlib's runner")
        sides = {name: Side(learner) for name, learner in zip(names, learners, strict=True)}
        for policy in POLICIES:
            for side in sides.values():
                side.warm_up(policy, seconds)
            for _, name in measure.rounds(number, list(sides)):
                sides[name].run(policy)
    with ExitStack() as stack:
        addresses = stack.enter_context(broker())
        (learner,) = stack.enter_context(helpers((builds, addresses["backend"])))
        start(stack, "ours", addresses["frontend"], "CartPole-v0")
        learner.ask(5)
        built = [learner.ask(5 if options.quick else 40) for _ in range(number)]
    _tell(report, sides, built)


def _tell(report: measure.Report, sides: dict[str, Side], built: list[tuple[float, float, float]]) -> None:
    rows: list[tuple[object, ...]] = []
    for policy in POLICIES:
        found = {name: measure.median(side.rates[policy]) for name, side in sides.items()}
        report.figures[policy] = found
        rows += [(policy, name, found[name], measure.median(side.lengths[policy])) for name, side in sides.items()]
    report.table(
        f"{WORLDS} CartPoles, 256x256, sampling only (medians of rounds that alternate)",
        ("policy", "", "steps/s into sample()", "episode"),
        rows,
    )
    mine, client, inside_ = sides.values()
    for policy in POLICIES:
        for side, name, times in ((client, "RLlib's server and client", 30), (inside_, "RLlib's runner", 7)):
            faster = measure.ratios(mine.rates[policy], side.rates[policy])
            report.targets.append(measure.target(f"steps/s, times {name}, {policy}", faster, "at least", times))
    decoding, building = ([b[i] for b in built] for i in (0, 1))
    report.figures["build"] = {"decoding_us": measure.median(decoding), "building_us": measure.median(building)}
    report.table(
        "A runner's time for a step",
        ("decoding us", "building us", "steps a fragment"),
        [(measure.median(decoding), measure.median(building), measure.median([b[2] for b in built]))],
    )
    both = [a + b for a, b in zip(decoding, building, strict=True)]
    report.targets.append(measure.target(f"us a step at fragments of {FRAGMENT}", both, "at most", 0.6))
    report.rounds = {name: {"steps_per_s": side.rates} for name, side in sides.items()} | {"build": built}
    report.notes.append(
        "RLlib's client has one environment: it knows no more. A runner's time: reading header and columns, and making "
        "RLlib's episodes of them, of the fragments as they came, in the process that calls sample()."
    )
    report.show()


if __name__ == "__main__":
    main()
