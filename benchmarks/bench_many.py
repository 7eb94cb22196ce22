"""`rllink-zmq simulate --num 200` against two runners: who arrives, what is lost, and what the broker's memory does.

Real processes: the broker, the simulators (one process, as the command starts them by default), and the learner's side
(two `ZmqEnvRunner`s whose `sample()` is called in rounds as PPO calls it, with the next weights version after each
4,000 steps, and no learning). The broker's `/status` is asked twice a second; a plot of its memory goes beside
the JSON.
"""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
from processes import broker, command, helpers, status

BATCH = 4000
RUNNERS = 2
STALENESS = ("stale",)
"""Reasons for which the broker may drop: the weights were too old."""


def learner(connection: Connection, backend: str) -> None:
    """Samples until its starter hangs up; says of each round: when, env steps, simulators heard of so far."""
    with measure.quiet():
        from learning import LearnerSide

        side = LearnerSide(backend, BATCH, RUNNERS)
        connection.send("ready")
        heard: set[str] = set()
        batch = 0
        with ThreadPoolExecutor(RUNNERS) as calls:
            while not connection.poll(0):
                steps = 0
                for episodes in calls.map(lambda runner: runner.sample(), side.runners):
                    steps += sum(map(len, episodes))
                    # The client's episode ids begin with its session.
                    heard.update(e.id_.partition("-")[0] for e in episodes)
                for runner in side.runners:
                    runner.get_metrics()
                batch += steps
                if batch >= BATCH:
                    batch = 0
                    side.versions.offer()
                connection.send((time.monotonic(), steps, len(heard)))
        side.stop()
        connection.send("stopped")


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("many", options)
    number, seconds = (20, 4.0) if options.quick else (200, 90.0)
    seen: list[dict[str, Any]] = []
    batches: list[tuple[float, int, int]] = []
    with broker() as addresses, helpers((learner, addresses["backend"])) as (learning,):
        simulate = ("simulate", "--env", "CartPole-v1", "--broker", addresses["frontend"], "--num", str(number))
        started = time.monotonic()
        with command(*simulate, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as simulators:
            complete = None
            patience = started + 90.0
            while complete is None or time.monotonic() < complete + seconds:
                time.sleep(0.5)
                now = time.monotonic()
                seen.append({"s": now - started, **_of_status(status(addresses))})
                while learning.has_said():
                    batches.append(learning.answer())
                if complete is None and batches and batches[-1][2] >= number:
                    complete = now
                if simulators.poll() is not None:
                    raise measure.BenchmarkError(f"simulate has ended with {simulators.returncode}")
                if complete is None and now > patience:
                    raise measure.BenchmarkError(f"{batches[-1:]}: not all simulators were heard of within 90 s")
            held = measure.memory(simulators.pid)
        learning.tell("stop")
        while learning.answer() != "stopped":
            pass
        at_end = status(addresses)
    _tell(report, number, started, seen, batches, at_end, held)


def _of_status(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "simulators": found["simulators"],
        "rss": found["process"]["rss_bytes"],
        "cpu_s": found["process"]["cpu_s"],
        "held_bytes": found["memory"]["held_bytes"],
        "delivered": found["ledger"]["delivered"]["steps"],
        "version": found["weights"]["version"],
    }


def _tell(
    report: measure.Report,
    number: int,
    started: float,
    seen: list[dict[str, Any]],
    batches: list[tuple[float, int, int]],
    at_end: dict[str, Any],
    held: measure.Memory,
) -> None:
    connected = next(s["s"] for s in seen if s["simulators"] >= number)
    first = next(when for when, steps, _ in batches if steps) - started
    heard = next(when for when, _, heard in batches if heard >= number) - started
    ledger = at_end["ledger"]
    dropped = {reason: count["steps"] for reason, count in ledger["dropped"].items()}
    other = sum(steps for reason, steps in dropped.items() if reason not in STALENESS)
    end = seen[-1]
    third = (end["s"] - heard) / 3
    since = next(s for s in seen if s["s"] >= end["s"] - third)
    window = end["s"] - since["s"]
    growth = end["rss"] / since["rss"] - 1
    report.figures = {
        "simulators": number,
        "seconds_until_connected": connected,
        "seconds_until_first_sample": first,
        "seconds_until_all_delivered": heard,
        "steps_per_s": (end["delivered"] - since["delivered"]) / window,
        "versions_per_s": (end["version"] - since["version"]) / window,
        "broker_cores": (end["cpu_s"] - since["cpu_s"]) / window,
        "broker_rss": end["rss"],
        "broker_rss_growth_last_third": growth,
        "simulators_rss": held.rss,
        "received_steps": ledger["received"]["steps"],
        "delivered_steps": ledger["delivered"]["steps"],
        "dropped_steps": dropped,
    }
    report.rounds = {"status": seen}
    f = report.figures
    share = sum(dropped.values()) / max(1, ledger["received"]["steps"])
    report.table(
        f"{number} CartPole simulators in one process, {RUNNERS} runners, {end['s']:.0f} s",
        ("", "figure"),
        [
            ("all connected after, s", float(connected)),
            ("first batch sampled after, s", float(first)),
            ("steps of every one sampled after, s", float(heard)),
            ("env steps/s", f["steps_per_s"]),
            ("weights versions/s", f["versions_per_s"]),
            ("broker's cores", f["broker_cores"]),
            ("broker's RSS, MB", end["rss"] / 1e6),
            ("its growth in the last third, %", 100 * growth),
            ("RSS of all simulators' process, MB", held.rss / 1e6),
            ("steps dropped as stale, %", 100 * share),
        ],
    )
    report.targets += [
        measure.Target(f"seconds until all {number} are connected and steps of each are sampled", heard, "at most", 60),
        measure.Target("steps dropped for anything but staleness", float(other), "at most", 0),
        measure.Target("growth of the broker's RSS in the last third, %", 100 * growth, "at most", 3),
    ]
    _plot(report.path.with_suffix(".png"), number, seen, heard)
    report.show()


def _plot(path: Path, number: int, seen: list[dict[str, Any]], heard: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    times = [s["s"] for s in seen]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    above.plot(times, [s["rss"] / 1e6 for s in seen], label="resident (RSS)")
    above.plot(times, [s["held_bytes"] / 1e6 for s in seen], label="fragments held")
    above.set(ylabel="broker's memory, MB", ylim=(0, None), title=f"{number} simulators, {RUNNERS} runners")
    above.legend(loc="center right")
    below.plot(times, [s["simulators"] for s in seen], color="tab:green", label="simulators connected")
    below.axvline(heard, color="gray", linestyle=":", label="steps of every one were sampled")
    below.set(xlabel="seconds since the simulators were started", ylabel="simulators", ylim=(0, None))
    steps = below.twinx()
    steps.plot(times, [s["delivered"] / 1e6 for s in seen], color="tab:red", label="env steps delivered")
    steps.set(ylabel="million env steps delivered", ylim=(0, None))
    lines = [*below.get_lines(), *steps.get_lines()]
    below.legend(lines, [str(line.get_label()) for line in lines], loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
