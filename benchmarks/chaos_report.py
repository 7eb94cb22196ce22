"""How long each fault was felt, by what everybody wrote down; tables, targets and a plot."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rllink_zmq.audit import Entered, Handed, Records, Sent, Settled

AFFECTED_WITHIN = 10.0
"""Seconds before its death within which a runner that handed over fragments of a session counts as its runner."""
PAUSE_WITHIN = 45.0

Key = tuple[str, int]


class Way(NamedTuple):
    """One fragment's times (Unix seconds): handed to RLlib by runner process `pid`, settled, in a train batch."""

    handed: float
    pid: int
    delivered: float | None
    trained: float | None


class Recovery(NamedTuple):
    """Seconds since a fault began, one each of the sessions it hit; `missing`: sessions that never came back."""

    delivered: list[float]
    trained: list[float]
    missing: int


class Book:
    """What all audit logs say, in the order of time."""

    def __init__(self, logs: Sequence[Records]) -> None:
        delivered: dict[Key, float] = {}
        trained: dict[Key, float] = {}
        handed: dict[Key, tuple[float, int]] = {}
        self.first_sent: dict[str, float] = {}
        self.last_sent: dict[str, float] = {}
        self.process: dict[str, int] = {}
        batches: set[tuple[str, int, float]] = set()
        for records in logs:
            pid = int(records.name.rsplit("-", 2)[1])
            for line in records.lines:
                match line:
                    case Sent():
                        self.first_sent.setdefault(line.session, line.time)
                        self.last_sent[line.session] = line.time
                        self.process[line.session] = pid
                    case Settled(outcome="delivered"):
                        delivered[line.session, line.number] = line.time
                    case Handed():
                        handed[line.session, line.number] = (line.time, pid)
                    case Entered():
                        trained.setdefault((line.session, line.number), line.time)
                        batches.add((records.name, line.batch, line.time))
        self.ways: defaultdict[str, list[Way]] = defaultdict(list)
        for key, (time, pid) in handed.items():
            self.ways[key[0]].append(Way(time, pid, delivered.get(key), trained.get(key)))
        for ways in self.ways.values():
            ways.sort(key=lambda w: w.handed)
        self.batches = sorted(time for _, _, time in batches)
        self.trained = sorted(trained.values())

    def sessions(self, fault: dict[str, Any]) -> list[str]:
        """Those that a fault hit."""
        kind, pids = fault["kind"], set(fault["pids"])
        if kind in ("runner killed", "runner stopped") or kind.startswith("runner's link"):
            return [s for s in self.ways if pids & self._lately_by(s, fault["began"])]
        if kind == "simulators killed":
            return [s for s in self.ways if self.process.get(s) in pids]
        there = [s for s in self.ways if self.first_sent.get(s, fault["began"]) < fault["began"]]
        return [s for s in there if self.process.get(s) in pids] if kind.startswith("link") else there

    def _lately_by(self, session: str, before: float) -> set[int]:
        """The runners that handed over its last fragments: those of one round go to several."""
        return {w.pid for w in self.ways[session] if before - AFFECTED_WITHIN < w.handed <= before}

    def recovery(self, fault: dict[str, Any]) -> Recovery:
        """Until the next fragment of each session it hit that was handed over when it could be again."""
        began, since = fault["began"], fault["since"]
        gone = set(fault["pids"]) if fault["kind"] in ("runner killed", "runner stopped") else set()
        delivered, trained, missing = [], [], 0
        for session in self.sessions(fault):
            if self.last_sent.get(session, 0.0) < since:
                continue  # it ended itself, or was killed
            ways = self.ways[session]
            later = [w for w in ways[bisect_left(ways, since, key=lambda w: w.handed) :] if w.pid not in gone]
            first = next((w.delivered for w in later if w.delivered is not None), None)
            used = next((w.trained for w in later if w.trained is not None), None)
            missing += first is None or used is None
            if first is not None:
                delivered.append(first - began)
            if used is not None:
                trained.append(used - began)
        return Recovery(delivered, trained, missing)

    def pause(self, began: float) -> float:
        """Seconds from `began` until the end of the longest time without a train batch that follows it."""
        times = [began, *(t for t in self.batches if began < t < began + PAUSE_WITHIN)]
        _, end = max(((b - a, b) for a, b in pairwise(times)), default=(0.0, began))
        return end - began


class Kind(NamedTuple):
    """All faults of one kind, in seconds. `first`: one each fault; the rest one each session it hit."""

    kind: str
    faults: int
    healed: list[float]
    first: list[float]
    delivered: list[float]
    trained: list[float]
    missing: int
    pauses: list[float]


def by_kind(book: Book, faults: Sequence[dict[str, Any]]) -> list[Kind]:
    """In the order in which they came first."""
    found: dict[str, Kind] = {}
    for fault in faults:
        recovery = book.recovery(fault)
        kind = found.setdefault(fault["kind"], Kind(fault["kind"], 0, [], [], [], [], 0, []))
        found[fault["kind"]] = kind._replace(faults=kind.faults + 1, missing=kind.missing + recovery.missing)
        kind.healed.extend([fault["healed_s"]] if fault["healed_s"] is not None else [])
        kind.first.extend([min(recovery.delivered)] if recovery.delivered else [])
        kind.delivered.extend(recovery.delivered)
        kind.trained.extend(recovery.trained)
        kind.pauses.append(book.pause(fault["began"]))
    return list(found.values())


def middle_worst(values: Sequence[float]) -> tuple[float, float]:
    return (statistics.median(values), max(values)) if values else (float("nan"), float("nan"))


HEADER = (
    "fault", "n", "healed: median", "worst", "delivered again: median", "worst", "trained on again: median", "worst",
)  # fmt: skip


def rows(kinds: Sequence[Kind]) -> list[tuple[object, ...]]:
    """Of the table under `HEADER`, seconds."""
    return [
        (k.kind, k.faults, *middle_worst(k.healed), *middle_worst(k.delivered), *middle_worst(k.trained)) for k in kinds
    ]


def figures(kinds: Sequence[Kind]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for k in kinds:
        facts: dict[str, Any] = {"faults": k.faults, "sessions": len(k.trained), "not_again": k.missing}
        for name in ("healed", "first", "delivered", "trained", "pauses"):
            median, worst = middle_worst(getattr(k, name))
            facts[f"{name}_s"] = {"median": median, "worst": worst}
        found[k.kind] = facts
    return found


def plot(
    path: Path, title: str, book: Book, samples: Sequence[dict[str, Any]], faults: Sequence[dict[str, Any]],
    kinds: Sequence[Kind], curves: dict[str, Sequence[tuple[float, float]]],
) -> None:  # fmt: skip
    """Above: what was trained on, and when faults began. In the middle: returns by env steps. Below: recovery times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    zero = faults[0]["began"]
    names = [k.kind for k in kinds]
    colours = {name: pyplot.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    figure, (above, middle, below) = pyplot.subplots(
        3, 1, figsize=(9, 11), layout="constrained", gridspec_kw={"height_ratios": [3, 2, 3]}
    )
    used = [t - zero for t in book.trained if t > zero]
    above.hist(used, bins=range(0, int(max(used)) + 2, 2), color="lightgray", label="fragments trained on, in 2 s")
    above.set(ylabel="fragments trained on, in 2 s", xlabel="seconds", title=title)
    for fault in faults:
        above.axvline(fault["began"] - zero, color=colours[fault["kind"]], linewidth=1.2)
    if samples:
        there = above.twinx()
        there.plot([s["s"] for s in samples], [s["simulators"] for s in samples], color="tab:green", linewidth=1.0)
        there.set(ylabel="simulators connected (green)", ylim=(0, None))
    for name, points in curves.items():
        middle.plot([x for x, _ in points], [y for _, y in points], label=name, linewidth=1.0)
    middle.set(xlabel="env steps", ylabel="mean return", ylim=(0, 510))
    middle.legend(loc="lower right")
    for i, kind in enumerate(kinds):
        below.plot(kind.trained, [i + 0.15] * len(kind.trained), "|", color=colours[kind.kind], markersize=9)
        below.plot(kind.healed, [i - 0.2] * len(kind.healed), "o", color=colours[kind.kind], markersize=4)
    below.set_yticks(range(len(names)), names)
    below.invert_yaxis()
    below.set(
        xlabel="seconds after it began: | each simulator's next fragment in a train batch, o all is well",
        xlim=(0, None),
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
