"""What `python tests/world.py` does: replay a run, look for failures in many, print the table of pairs."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from itertools import combinations

import world
from world_faults import KINDS

NAMES = {
    "kill": ("runner killed", "killed"), "pause": ("runner stopped", "stopped"),
    "broker": ("broker restarted", "broker"), "cut": ("connection cut", "cut"),
    "sim": ("simulator restarted", "simulator"), "scale": ("scaled", "scaled"),
}  # fmt: skip
"""kind -> its name alone, and in a pair."""


def table(runs: int) -> str:
    """Every pair of kinds of faults: in how many of `runs` runs something was trained twice, lost or stuck."""
    rows = ["| faults | runs | trained twice | acknowledged but lost | stuck | other |", "|---|---|---|---|---|---|"]
    alone: list[tuple[str, ...]] = [(), *((kind,) for kind in KINDS)]
    for kinds in alone + list(combinations(KINDS, 2)):
        count: Counter[str] = Counter()
        for seed in range(runs):
            try:
                verdict = world.World(seed, kinds).run()
            except AssertionError:
                count["other"] += 1
                continue
            count["twice"] += bool(verdict.twice)
            count["lost"] += bool(verdict.lost)
            count["stuck"] += bool(verdict.stuck)
            count["other"] += bool(verdict.untrue or verdict.broken or verdict.over_quota)
        name = NAMES[kinds[0]][0] if len(kinds) == 1 else " + ".join(NAMES[k][1] for k in kinds) or "none"
        rows.append(f"| {name} | {runs} | {count['twice']} | {count['lost']} | {count['stuck']} | {count['other']} |")
    return "\n".join(rows)


def one(args: argparse.Namespace) -> None:
    """Run one seed, and print its trace."""
    run = make(args, args.seed)
    verdict = run.run()
    print(run.story(args.last))
    print(world.failures(verdict) or "perfect", dict(verdict.outcomes), f"{verdict.versions} versions")


def many(args: argparse.Namespace) -> None:
    """Run many seeds, and say which of them failed."""
    total: Counter[str] = Counter()
    seen: dict[str, list[int]] = {}
    began = time.perf_counter()
    for seed in range(args.seed, args.seed + args.runs):
        try:
            run = make(args, seed)
            verdict = run.run()
            total["short answers"] += run.short
        except Exception as e:
            total[f"{type(e).__name__}: {e}"[:100]] += 1
            seen.setdefault(type(e).__name__, []).append(seed)
            continue
        total.update(verdict.outcomes)
        total["used though cut"] += verdict.used_though_cut
        total["events"] += verdict.events
        for name in ("twice", "lost", "untrue", "stuck", "broken", "over_quota"):
            if getattr(verdict, name):
                total[name.upper()] += 1
                seen.setdefault(name, []).append(seed)
    spent = (time.perf_counter() - began) / args.runs
    print(f"{args.faults}: {args.runs} runs, {spent * 1e3:.1f} ms each, {total['events'] / args.runs:.0f} events")
    print(dict(total))
    for name, seeds in seen.items():
        print(f"  {name}: seeds {seeds[:12]}")


def make(args: argparse.Namespace, seed: int) -> world.World:
    if args.mixed:
        return world.mixed(seed, style=args.style)
    kinds = [k for k in args.faults.split(",") if k in KINDS]
    return world.World(seed, kinds, apart=args.apart, style=args.style, lag_limit=args.lag)


def main() -> None:
    parser = argparse.ArgumentParser(description=world.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", default="none", help=f"some of {', '.join(KINDS)}, separated by commas")
    parser.add_argument("--apart", action="store_true", help="each fault begins when the one before has healed")
    parser.add_argument("--mixed", action="store_true", help="faults of all kinds, apart")
    parser.add_argument("--style", choices=("round", "stream", "exact"), help="by default the seed decides")
    parser.add_argument("--lag", type=int, default=0, help="the lag limit; by default the seed decides")
    parser.add_argument("--runs", type=int, default=0, help="run this many seeds, and print the first failures")
    parser.add_argument("--table", type=int, metavar="RUNS", help="print the table of pairs")
    parser.add_argument("--last", type=int, default=100_000, help="lines of trace to print")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
    elif args.runs:
        many(args)
    else:
        one(args)
