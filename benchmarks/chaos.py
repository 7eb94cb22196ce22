"""Real processes that are killed, stopped, cut off and restarted while PPO learns CartPole; then the audit.

A broker, 100 simulators in 5 processes, `rllink-zmq train` with 4 runners. A runner is killed every 10 s, the broker
twice, 20 simulators every 15 s, the pool is scaled every 20 s, a link is stalled, cut or half-open every 15 s. No
fault begins before the one before it has healed, so that they come slower than that where healing takes longer; with
`--overlap` they come by the clock. The same training without faults, for as many env steps, runs after it.
`--recovery`: only the three figures that have a target, with 200 simulators.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import chaos_report
import measure
from chaos_faults import Chaos, Fault, KillBroker, KillRunner, KillSimulators, Plan, StopRunner, links, scales
from chaos_parts import Iteration, System, balanced

from rllink_zmq.audit import read
from rllink_zmq.audit_judge import Verdict, as_json, in_words, judge

GROUPS = 5
REACHED = 450.0
SHARE = 0.9
"""Of the mean return without faults that the training with faults is to reach."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, help="of faults (300; 25 if quick)")
    parser.add_argument("--simulators", type=int, help="(100; 12 if quick; 200 with --recovery)")
    parser.add_argument("--runners", type=int, help="(4; 2 if quick)")
    parser.add_argument("--overlap", action="store_true", help="faults begin by the clock, healed or not")
    parser.add_argument("--recovery", action="store_true", help="only the recovery times that have a target")
    parser.add_argument("--rounds", type=int, default=6, help="of each fault, with --recovery (%(default)s)")
    parser.add_argument("--no-undisturbed", action="store_true", help="don't train again without faults")
    parser.add_argument("--quick", action="store_true", help="one of each fault, to see that it runs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", type=Path, help="for `rllink-zmq train --config`")
    parser.add_argument("--results", type=Path, help="where the JSON goes (benchmarks/results; results/quick if quick)")
    parser.add_argument("--logs", type=Path, help="keep what every process logged in this directory, which is made")
    given = parser.parse_args()
    small = given.quick
    given.seconds = given.seconds or (25.0 if small else 300.0)
    given.simulators = given.simulators or (12 if small else 200 if given.recovery else 100)
    given.runners = given.runners or (2 if small else 4)
    given.groups = 3 if small else GROUPS
    if given.results is None:
        given.results = measure.RESULTS / "quick" if small else measure.RESULTS
    return given


# ---- what is done


def plans(system: System, options: argparse.Namespace) -> list[Plan]:
    """Which faults, how often."""
    network, pool = links(system), scales(system)

    def make(kind: type[Fault]) -> Callable[[], Fault]:
        return lambda: kind(system)

    def link() -> Fault:
        return next(network)

    def scale() -> Fault:
        return next(pool)

    if options.quick:
        order = (make(KillRunner), make(KillBroker), make(KillSimulators), scale, link)
        return [Plan(one, 1.0, 0.1 * i, 1) for i, one in enumerate(order)]
    third = options.seconds / 3
    return [
        Plan(make(KillRunner), 10.0, 0.0),
        Plan(make(KillSimulators), 15.0, 5.0),
        Plan(scale, 20.0, 12.0),
        Plan(link, 15.0, 8.0),
        Plan(make(KillBroker), third, third, 2),
    ]


def recovery_plans(system: System, rounds: int) -> list[Plan]:
    """Each of the three faults in turns."""
    kinds: tuple[type[Fault], ...] = (KillRunner, KillBroker, StopRunner)
    return [Plan(lambda kind=kind: kind(system), 3.0, float(i), rounds) for i, kind in enumerate(kinds)]  # type: ignore[misc]


def undisturbed(folder: Path, options: argparse.Namespace, steps: int, seconds: float) -> list[Iteration]:
    """The same training without a fault: as many env steps, or as many seconds if that is less."""
    folder.mkdir()
    system = _system(folder, options)
    try:
        system.start()
        system.wait_until_it_trains()
        deadline = time.monotonic() + seconds
        while system.trained.steps < steps and time.monotonic() < deadline:
            system.check()
            time.sleep(0.5)
    finally:
        system.stop()
    return system.trained.iterations


def _system(folder: Path, options: argparse.Namespace) -> System:
    return System(
        folder, simulators=options.simulators, runners=options.runners, groups=options.groups, seed=options.seed,
        config=options.config,
    )  # fmt: skip


def disturbed(folder: Path, options: argparse.Namespace) -> tuple[Chaos, dict[str, Any] | None, list[Iteration]]:
    """The faults, the broker's last status, and what was learned meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    system = _system(folder, options)
    try:
        system.start()
        system.wait_until_it_trains()
        wanted = recovery_plans(system, options.rounds) if options.recovery else plans(system, options)
        chaos = Chaos(system, wanted, overlap=options.overlap, log=folder / "faults.jsonl")
        chaos.run(0.0 if options.recovery else options.seconds, 60.0 * options.rounds if options.recovery else 90.0)
    finally:
        last = system.stop()
    chaos.watch.finish(last)
    return chaos, last, system.trained.iterations


# ---- what it comes to


def returns(iterations: Sequence[Iteration]) -> dict[str, float]:
    """What a training reached: `late` is the mean of the last tenth of its iterations."""
    means = [i.mean for i in iterations if i.mean is not None]
    late = means[-max(1, len(means) // 10) :]
    first = next((float(i.steps) for i in iterations if i.mean is not None and i.mean >= REACHED), float("nan"))
    return {
        "late": sum(late) / max(1, len(late)),
        "best": max(means, default=float("nan")),
        f"steps_until_{REACHED:g}": first,
        "steps": float(iterations[-1].steps if iterations else 0),
        "iterations": float(len(iterations)),
        "seconds": iterations[-1].time - iterations[0].time if iterations else 0.0,
    }


def _since(faults: list[dict[str, Any]], zero: float) -> list[dict[str, Any]]:
    """With times in seconds since the first."""
    return [{**f, "began": round(f["began"] - zero, 2), "since": round(f["since"] - zero, 2)} for f in faults]


def _broken(verdict: Verdict, *names: str) -> float:
    return float(sum(len(verdict.broken.get(name, ())) for name in names))


def tell(
    report: measure.Report, options: argparse.Namespace, chaos: Chaos, last: dict[str, Any] | None, verdict: Verdict,
    book: chaos_report.Book, with_faults: list[Iteration], without: list[Iteration],
) -> None:  # fmt: skip
    faults = [fault.as_json() for fault in chaos.faults]
    kinds = chaos_report.by_kind(book, faults)
    reached, beside = returns(with_faults), returns(without)
    report.figures = {
        "simulators": options.simulators, "runners": options.runners, "overlap": options.overlap,
        "faults": len(faults), "kinds": chaos_report.figures(kinds), "audit": as_json(verdict),
        "returns": {"with_faults": reached, "without": beside if without else None},
        "dropped_fragments": chaos.watch.dropped, "unbalanced": chaos.watch.unbalanced,
        "last_ledger": last["ledger"] if last is not None else None,
    }  # fmt: skip
    zero = faults[0]["began"]
    for sample in chaos.watch.samples:
        sample["s"] = round(sample.pop("time") - zero, 2)
    report.rounds = {
        "faults": _since(faults, zero),
        "status": chaos.watch.samples[:: max(1, len(chaos.watch.samples) // 600)],
    }
    how = "by the clock" if options.overlap else "one after the other"
    report.table(
        f"{len(faults)} faults {how}, {options.simulators} simulators, {options.runners} runners; seconds",
        chaos_report.HEADER, chaos_report.rows(kinds),
    )  # fmt: skip
    columns = ("", "late return", "best", f"steps until {REACHED:g}", "steps", "seconds")
    keys = ("late", "best", f"steps_until_{REACHED:g}", "steps", "seconds")
    told = [("with faults", *(reached[k] for k in keys))]
    if without:
        told.append(("without", *(beside[k] for k in keys)))
    report.table("What was learned", columns, told)
    report.table("The audit", ("", "fragments"), [(k, v[0]) for k, v in {**verdict.outcomes, **verdict.apart}.items()])
    unbalanced = chaos.watch.unbalanced + (last is None or not balanced(last["ledger"]))
    report.targets += [
        measure.Target("fragments lost", _broken(verdict, "lost", "dropped", "incomplete"), "at most", 0),
        measure.Target("fragments delivered twice", _broken(verdict, "twice"), "at most", 0),
        measure.Target("promises broken", float(sum(map(len, verdict.broken.values()))), "at most", 0),
        measure.Target("times that the ledger did not balance", float(unbalanced), "at most", 0),
    ]
    if without:
        share = reached["late"] / beside["late"]
        report.targets.append(measure.Target("late return, of that without faults", share, "at least", SHARE))
    report.notes += [line for line in in_words(verdict).splitlines() if "BROKEN" in line or line.startswith("Every")]
    open_ = sum(fault["healed_s"] is None for fault in faults)
    if open_:
        report.notes.append(f"{open_} faults had not healed when others began, or at the end")
    curves = {"with faults": [(float(i.steps), i.mean) for i in with_faults if i.mean is not None]}
    if without:
        curves["without"] = [(float(i.steps), i.mean) for i in without if i.mean is not None]
    title = f"{options.simulators} simulators, {options.runners} runners, {len(faults)} faults {how}"
    chaos_report.plot(report.path.with_suffix(".png"), title, book, chaos.watch.samples, faults, kinds, curves)  # type: ignore[arg-type]


def tell_recovery(report: measure.Report, options: argparse.Namespace, chaos: Chaos, verdict: Verdict,
                  book: chaos_report.Book) -> None:  # fmt: skip
    faults = [fault.as_json() for fault in chaos.faults]
    kinds = {k.kind: k for k in chaos_report.by_kind(book, faults)}
    report.figures = {
        "simulators": options.simulators, "runners": options.runners,
        "kinds": chaos_report.figures(list(kinds.values())), "audit": as_json(verdict),
    }  # fmt: skip
    report.rounds = {"faults": _since(faults, faults[0]["began"])}
    restarts = [f for f in faults if f["kind"] == "broker killed"]
    connected = [float(f["all_connected_s"]) for f in restarts]
    delivering = [float(f["delivering_s"]) for f in restarts]
    killed, stopped = kinds["runner killed"], kinds["runner stopped"]
    told = [
        ("runner killed: a fragment of its episodes is acked as delivered again", len(killed.first), killed.first),
        (
            "runner killed: each of its simulators has one acked as delivered again",
            len(killed.delivered),
            killed.delivered,
        ),
        ("runner killed: each of its simulators has one in a train batch again", len(killed.trained), killed.trained),
        (f"broker ready again: all {options.simulators} simulators connected", len(connected), connected),
        ("broker ready again: fragments are delivered", len(delivering), delivering),
        ("runner stopped: training goes on (end of the longest pause)", len(stopped.pauses), stopped.pauses),
    ]
    report.table(
        f"Recovery with {options.simulators} simulators and {options.runners} runners, seconds",
        ("", "n", "median", "worst"),
        [(what, n, *chaos_report.middle_worst(values)) for what, n, values in told],
    )
    both = [max(a, b) for a, b in zip(connected, delivering, strict=True)]
    report.targets += [
        _worst("killed runner: delivered again, each of its simulators, s (worst)", killed.delivered, 3.0),
        _worst("restarted broker: all simulators connected, and delivering, s (worst)", both, 5.0),
        _worst("stopped runner: training goes on, s (worst)", stopped.pauses, 20.0),
        measure.Target("promises broken", float(sum(map(len, verdict.broken.values()))), "at most", 0),
    ]


def _worst(what: str, values: Sequence[float], limit: float) -> measure.Target:
    return measure.Target(what, max(values), "at most", limit, (min(values), max(values)))


def main() -> None:
    options = parse()
    name = "chaos_recovery" if options.recovery else "chaos_overlap" if options.overlap else "chaos"
    report = measure.Report(name, options)
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    folder = options.logs or Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        chaos, last, with_faults = disturbed(folder / "faults", options)
        logs = read([folder / "faults" / "audit"])
        verdict, book = judge(logs), chaos_report.Book(logs)
        if options.recovery:
            tell_recovery(report, options, chaos, verdict, book)
        else:
            without: list[Iteration] = []
            if not (options.no_undisturbed or options.quick):
                steps = with_faults[-1].steps if with_faults else 0
                without = undisturbed(folder / "undisturbed", options, steps, options.seconds)
            tell(report, options, chaos, last, verdict, book, with_faults, without)
        report.show()
    finally:
        if options.logs is None:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"logs are in {folder}", flush=True)


if __name__ == "__main__":
    main()
