"""Very many runs of any faults, each healed before the next begins: `make soak`.

    python tests/world_soak.py --runs 200000 --processes 2

The summary is written again and again on the way, so that what it says is true whenever the run is stopped; the exit
code is 1 when a run was not perfect. Each failure's seed replays it: `python tests/world.py --seed N --mixed`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from world import failures, mixed
from world_faults import KINDS

CHUNK = 50
FULL = 200_000
FAILURES_KEPT = 100


def some(first: int) -> tuple[int, Counter[str], Counter[str], dict[int, str]]:
    """Run the seeds from `first` on: (events, faults by kind, outcomes, what went wrong by seed)."""
    events, faults, outcomes = 0, Counter[str](), Counter[str]()
    wrong: dict[int, str] = {}
    for seed in range(first, first + CHUNK):
        try:
            verdict = mixed(seed).run()
        except Exception as e:
            wrong[seed] = f"{type(e).__name__}: {e}"
            continue
        events += verdict.events
        faults += verdict.struck
        outcomes += verdict.outcomes
        if not verdict.perfect:
            wrong[seed] = failures(verdict)
    return events, faults, outcomes, wrong


class Summary:
    """What so many runs showed."""

    def __init__(self, wanted: int, path: Path | None) -> None:
        self.wanted = wanted
        self.path = path
        self.runs = self.events = 0
        self.faults, self.outcomes = Counter[str](), Counter[str]()
        self.wrong: dict[int, str] = {}
        self.began = time.monotonic()

    def add(self, events: int, faults: Counter[str], outcomes: Counter[str], wrong: dict[int, str]) -> None:
        self.runs += CHUNK
        self.events += events
        self.faults += faults
        self.outcomes += outcomes
        self.wrong |= wrong

    def as_json(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        return {
            "quick": self.wanted < FULL,
            "runs": self.runs,
            "runs_wanted": self.wanted,
            "seeds": [0, self.runs - 1],
            "seconds": round(seconds, 1),
            "runs_per_s": round(self.runs / seconds, 1),
            "events": self.events,
            "faults": {kind: self.faults[kind] for kind in KINDS},
            "outcomes": dict(self.outcomes.most_common()),
            "failures": len(self.wrong),
            "failed_seeds": dict(sorted(self.wrong.items())[:FAILURES_KEPT]),
        }

    def write(self) -> None:
        if self.path is not None:
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(self.as_json(), indent=2) + "\n")
            new.replace(self.path)

    def say(self) -> None:
        spent = time.monotonic() - self.began
        left = spent / self.runs * (self.wanted - self.runs)
        print(f"{self.runs} of {self.wanted} runs, {self.runs / spent:.0f}/s, {len(self.wrong)} failed, "
              f"{left / 60:.0f} min to go", flush=True)  # fmt: skip


def soak(summary: Summary, processes: int, every: float) -> None:
    """Run them all, in the order of their seeds."""
    firsts = range(0, summary.wanted, CHUNK)
    said = time.monotonic()
    with multiprocessing.Pool(processes) if processes > 1 else _Here() as pool:
        for result in pool.imap(some, firsts):
            summary.add(*result)
            if time.monotonic() - said >= every:
                said = time.monotonic()
                summary.say()
                summary.write()
    summary.say()
    summary.write()


class _Here:
    """One process: this one."""

    def __enter__(self) -> _Here:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def imap(self, do: Any, args: Any) -> Iterator[Any]:
        return chain.from_iterable([do(x)] for x in args)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=FULL, help=f"a multiple of {CHUNK}")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--output", type=Path, help="where to keep the summary")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two lines of progress")
    args = parser.parse_args()
    summary = Summary(-(-args.runs // CHUNK) * CHUNK, args.output)
    soak(summary, args.processes, args.every)
    print(json.dumps(summary.as_json()))
    return 1 if summary.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
