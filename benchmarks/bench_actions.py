"""Single actions: one round trip, many simulators, images, the tail, a flood; beside a bare loop and a Ray actor.

Simulators that do nothing but ask (one process, a DEALER each) get actions of RLlib's default 256x256 network:

- through the broker's process, from the service of a runner (`rllink_zmq.rllib.service`);
- through a *bare loop* of two ROUTERs that forwards the very same frames, from the same module in a loop that batches
  what is pending and does nothing else;
- from a *Ray actor* with the same module: one call an action, as many calls open as there are simulators.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import measure
import numpy as np
from actions_load import FLOOD, Way, askers, bare_loop, bare_service
from processes import broker, helpers

from broker.settings import Settings

MANY = 256
LATENCY_ROUNDS, ROUNDS = 9, 7


def service(connection: Any, backend: str, what: str) -> None:
    with measure.quiet():
        from acting import service as serve
    serve(connection, backend, what)


def ray_actor(connection: Any) -> None:
    """Asked with (number open, seconds): actions/s and the median seconds of one."""
    import ray
    from processes import questions

    with measure.quiet():
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        from acting import RayActor

        handle = ray.remote(RayActor).options(num_cpus=1).remote("vector")
        row = np.zeros((1, 4), np.float32)
        ray.get(handle.act.remote(row))
    connection.send("ready")
    for number, seconds in questions(connection):
        began = {handle.act.remote(row): time.perf_counter() for _ in range(number)}
        started, times = time.perf_counter(), []
        while (now := time.perf_counter()) < started + seconds:
            for done in ray.wait(list(began), num_returns=1)[0]:
                ray.get(done)
                times.append(time.perf_counter() - began.pop(done))
                began[handle.act.remote(row)] = time.perf_counter()
        for rest in began:
            ray.get(rest)
        connection.send((len(times) / (now - started), float(np.median(times))))
    ray.shutdown()


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("actions", options)
    with broker() as one, broker() as two, helpers((bare_loop,), (bare_loop,)) as loops:
        starts = [
            (service, one["backend"], "vector"), (service, two["backend"], "image"),
            (bare_service, loops[0].ready[1], "vector"), (bare_service, loops[1].ready[1], "image"),
        ]  # fmt: skip
        with helpers(*starts):
            for loop in loops:
                loop.answer()
            ways = [
                Way("broker", one["frontend"], "vector"), Way("bare loop", loops[0].ready[0], "vector"),
                Way("broker", two["frontend"], "image"), Way("bare loop", loops[1].ready[0], "image"),
            ]  # fmt: skip
            with helpers((askers, ways, MANY)) as (asking,):
                measure_all(report, options, asking)
    report.show()


def measure_all(report: measure.Report, options: argparse.Namespace, asking: Any) -> None:
    seconds, quick = (0.5, True) if options.quick else (3.0, False)

    def run(way: int, number: int, rate: float = 0.0, flood: int = 0) -> dict[str, Any]:
        latencies, took = asking.ask(way, number, seconds, rate, flood)
        return {"per_s": len(latencies) / took, "latencies": latencies, "median": measure.median(latencies)}

    both = ("broker", "bare loop")
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, number, first, rounds in (
        ("one", 1, 0, LATENCY_ROUNDS), ("many", MANY, 0, ROUNDS), ("images", MANY, 2, ROUNDS),
    ):  # fmt: skip
        found[name] = {side: [] for side in both}
        for _, side in measure.rounds(1 if quick else rounds, both):
            found[name][side].append(run(first + both.index(side), number))
    _ray(report, options, found, seconds)
    for name in found:
        rows = []
        for side, results in found[name].items():
            per_s, median = (measure.median([r[k] for r in results]) for k in ("per_s", "median"))
            report.figures.setdefault(name, {})[side] = {"per_s": per_s, "median_s": median}
            rows.append((side, per_s, median * 1e3))
        title = {"one": "One simulator", "many": f"{MANY} simulators", "images": f"{MANY} simulators, 84x84x4 bytes"}
        report.table(title[name], ("", "actions/s", "median ms"), rows)
        report.rounds[name] = {
            side: [{k: r[k] for k in ("per_s", "median")} for r in results] for side, results in found[name].items()
        }

    def ratios(name: str, key: str, of: str = "bare loop") -> list[float]:
        return measure.ratios([r[key] for r in found[name]["broker"]], [r[key] for r in found[name][of]])

    targets = report.targets
    targets.append(measure.target("one action, times the bare loop's", ratios("one", "median"), "at most", 1.5))
    targets.append(
        measure.target(f"{MANY}: actions/s, part of the bare loop's", ratios("many", "per_s"), "at least", 0.6)
    )
    targets.append(measure.target(f"{MANY}: times a Ray actor's", ratios("many", "per_s", "Ray actor"), "at least", 8))
    targets.append(measure.target("images: part of the bare loop's", ratios("images", "per_s"), "at least", 0.8))
    _tail(report, run, found["many"]["broker"], 1 if quick else 5)


def _ray(report: measure.Report, options: argparse.Namespace, found: Any, seconds: float) -> None:
    """In turns with the others it would take their CPUs: it runs after them, as often."""
    with helpers((ray_actor,)) as (actor,):
        for name, number in (("one", 1), ("many", MANY)):
            found[name]["Ray actor"] = []
            for _ in found[name]["broker"]:
                per_s, median = actor.ask(number, seconds)
                found[name]["Ray actor"].append({"per_s": per_s, "median": median})


def _tail(report: measure.Report, run: Any, most: list[dict[str, Any]], rounds: int) -> None:
    """Half of what it can do: how late the latest are, and what a flood does to them."""
    rate = measure.median([r["per_s"] for r in most]) / 2
    credit = Settings().act_requests
    quiet, flooded = [], []
    for i in range(rounds):
        for flood in (0, FLOOD * credit) if i % 2 == 0 else (FLOOD * credit, 0):
            (flooded if flood else quiet).append(run(0, MANY, rate, flood)["latencies"])
    parts = {name: [np.percentile(r, (50, 99)) for r in of] for name, of in (("quiet", quiet), ("flooded", flooded))}
    rows = [(name, *(1e3 * np.median(np.array(of), axis=0)).tolist()) for name, of in parts.items()]
    report.table(f"{MANY} simulators at half load ({rate:,.0f}/s), ms", ("", "p50", "p99"), rows)
    report.figures["tail"] = {name: {"p50_s": p50 / 1e3, "p99_s": p99 / 1e3} for name, p50, p99 in rows}
    own = [float(p99 / p50) for p50, p99 in parts["quiet"]]
    report.targets.append(measure.target("half load: p99, times p50", own, "at most", 10))
    by_flood = [float(b[1] / a[1]) for a, b in zip(parts["quiet"], parts["flooded"], strict=True)]
    report.targets.append(measure.target("a flood: the others' p99, times without it", by_flood, "at most", 2))
    if not report.quick:
        _plot(report, quiet, flooded)


def _plot(report: measure.Report, quiet: list[list[float]], flooded: list[list[float]]) -> None:
    with measure.picture(report.path.with_suffix(".png")) as axes:
        for name, of in (("half load", quiet), ("half load, one of them floods", flooded)):
            values = 1e3 * np.sort(np.concatenate(of))
            axes.plot(values, 1 - np.arange(len(values)) / len(values), label=name)
        axes.set(xscale="log", yscale="log", xlabel="round trip, ms", ylabel="part that takes longer")


if __name__ == "__main__":
    main()
