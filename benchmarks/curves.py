"""Learning curves: several ways of training that take turns, what they came to, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import measure

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:gray")


class Point(NamedTuple):
    steps: int
    episode_return: float


Curve = list[Point]


class Curves:
    """Of each way a curve and its seconds for each seed. `train(way, seed)` makes one."""

    def __init__(self, ways: Sequence[str], seeds: int, train: Callable[[str, int], tuple[Curve, float]]) -> None:
        self.of: dict[str, list[Curve]] = {way: [] for way in ways}
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        for seed, way in measure.rounds(seeds, ways):
            points, took = train(way, seed)
            self.of[way].append(points)
            self.seconds[way].append(took)

    def report(
        self, report: measure.Report, title: str, heading: str, key: str, figure: Callable[[Curve], float]
    ) -> dict[str, list[float]]:
        """A table of what `figure` makes of each curve, and all the numbers under `key`. Returns them by way."""
        found = {way: [figure(points) for points in curves] for way, curves in self.of.items()}
        report.table(
            title,
            ("", heading, "lowest", "highest", "seconds"),
            [(w, measure.median(f), min(f), max(f), measure.median(self.seconds[w])) for w, f in found.items()],
        )
        report.figures = {way: {key: found[way], "seconds": self.seconds[way]} for way in found}
        report.rounds = {way: [[tuple(p) for p in points] for points in curves] for way, curves in self.of.items()}
        return found

    def plot(self, report: measure.Report, title: str) -> None:
        """Beside the report's JSON."""
        with measure.picture(report.path.with_suffix(".png")) as axes:
            for (way, curves), color in zip(self.of.items(), COLORS, strict=False):
                for i, points in enumerate(curves):
                    axes.plot(*zip(*points, strict=True), color=color, alpha=0.7, label=way if not i else None)
            axes.set(xlabel="env steps", ylabel="mean return", title=title)
