"""What every benchmark shares: rounds that alternate, CPU and memory of a process, targets, tables and JSON.

A busy machine makes every figure smaller or larger, from one minute to the next. So nothing here is compared with a
figure of another day: each side of a comparison runs in the same program, in rounds that take turns, and what counts
is the median of the rounds' ratios. Where the question is cost, CPU time is counted and not time on the wall.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import zmq

RESULTS = Path(__file__).parent / "results"

PACKAGES = ("rllink-zmq", "pyzmq", "msgspec", "numpy", "onnxruntime", "gymnasium", "ray", "torch", "backports.zstd")
"""Whose versions are written down with the figures."""


class BenchmarkError(Exception):
    """Something broke: the figures would mean nothing."""


# ---- one process's cost


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, those that have ended too, in user and kernel mode.

    The process's own clock (`clock_getcpuclockid(3)`), which counts nanoseconds where `/proc/PID/stat` counts ticks.
    """
    return time.clock_gettime((~pid << 3) | 2)


class Memory(NamedTuple):
    """Bytes. `rss`: all pages that a process has in memory. `pss`: the same, shared pages divided by their users."""

    rss: int
    pss: int


def memory(pid: int) -> Memory:
    """What a process occupies now (Linux)."""
    found = {"Rss": 0, "Pss": 0}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in found:
            found[name] = int(rest.split()[0]) * 1024
    return Memory(found["Rss"], found["Pss"])


# ---- rounds


def rounds(number: int, sides: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(round, side): each side once a round; every other round in reverse order, so that none is always first."""
    for i in range(number):
        for side in sides if i % 2 == 0 else reversed(sides):
            yield i, side


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def until(condition: Callable[[], Any], what: str, patience: float = 60.0, pause: float = 0.02) -> Any:
    """The first true value of `condition()`. Raises `BenchmarkError` after `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(pause)
    raise BenchmarkError(f"after {patience:.0f} s still not: {what}")


# ---- targets and reports


class Target(NamedTuple):
    """`figure` is to be at least (or at most) `limit`. `spread`: the lowest and highest round."""

    what: str
    figure: float
    sense: str
    limit: float
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        return self.figure >= self.limit if self.sense == "at least" else self.figure <= self.limit

    def __str__(self) -> str:
        low_high = f" (rounds: {self.spread[0]:.2f} to {self.spread[1]:.2f})" if self.spread else ""
        verdict = "met" if self.met else "MISSED"
        return f"target  {self.what}: {self.sense} {self.limit:g}; it is {self.figure:.2f}{low_high}: {verdict}"

    def as_json(self) -> dict[str, Any]:
        return {**self._asdict(), "met": self.met}


def target(what: str, values: Sequence[float], sense: str, limit: float) -> Target:
    """A target for the median of `values`, one a round."""
    return Target(what, median(values), sense, limit, (min(values), max(values)))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown, its columns aligned; numbers get three digits or so."""
    cells = [[str(c) for c in header], *([_cell(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(not isinstance(row[i], str) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        put = (c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True))
        return f"| {' | '.join(put)} |"

    ruler = "|".join(f"{'-' * (w + 1)}{':' if n else '-'}" for w, n in zip(widths, numeric, strict=True))
    return "\n".join([line(cells[0]), f"|{ruler}|", *map(line, cells[1:])])


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def machine() -> dict[str, Any]:
    """What the figures were measured on: figures of two machines can't be compared, and their ratios only roughly."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "cpu": _cpu_model(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "packages": versions,
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


@contextmanager
def picture(path: Path) -> Iterator[Any]:
    """The axes of a plot that is written to `path`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    yield axes
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


class Report:
    """What a benchmark found. `show()` prints it and writes it to `<results>/<name>.json`."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name = name
        self.quick: bool = options.quick
        self.path: Path = options.results / f"{name}.json"
        self.figures: dict[str, Any] = {}
        self.rounds: dict[str, Any] = {}
        self.targets: list[Target] = []
        self.notes: list[str] = []
        self._tables: list[str] = []
        self._load = os.getloadavg()[0]
        self._started = time.monotonic()

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self._tables.append(f"{title}\n\n{table(header, rows)}\n")

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "quick": self.quick,
            "seconds": round(time.monotonic() - self._started, 1),
            "machine": machine(),
            "load_before": round(self._load, 2),
            "targets": [t.as_json() for t in self.targets],
            "figures": self.figures,
            "rounds": self.rounds,
            "notes": self.notes,
        }

    def show(self) -> None:
        facts = self.as_json()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(_rounded(facts), indent=1) + "\n")
        print(f"\n{self.name}: {facts['machine']['cpus']} CPUs ({facts['machine']['cpu']}), {facts['date']}\n")
        print("\n".join(self._tables))
        print("\n".join([*map(str, self.targets), *self.notes]))
        if self.quick:
            print("--quick: rounds this short show that it runs, not how fast")
        print(f"written to {self.path}", flush=True)


def _rounded(value: Any) -> Any:
    """Five significant digits: what is left of them is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value


def options(description: str | None) -> argparse.Namespace:
    """`--quick` and `--results DIRECTORY` of the command line; quick figures don't overwrite the others."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few short rounds, to see that it runs")
    parser.add_argument("--results", type=Path, help="where the JSON goes (benchmarks/results; results/quick if quick)")
    given = parser.parse_args()
    if given.results is None:
        given.results = RESULTS / "quick" if given.quick else RESULTS
    return given


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what libraries warn about while they are imported and built."""
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
