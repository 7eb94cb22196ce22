"""Draw what a training script wrote down: `python examples/plot.py examples/sumo` makes `examples/sumo/returns.png`.

Of that directory it reads `returns.json` (a training script's `--output`) and `baselines.json`: for each policy that
doesn't learn a line, as the simulators' scripts and `random_returns.py` print them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("directory", type=Path, nargs="+")


def draw(directory: Path) -> None:
    run = json.loads((directory / "returns.json").read_text())
    baselines = [json.loads(line) for line in (directory / "baselines.json").read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    steps, _, returns = zip(*run["points"], strict=True)
    axes.plot(steps, returns, label=f"{run['algorithm']}, seed {run['seed']}, {run['wall_s'] / 60:.1f} minutes")
    for baseline, style in zip(baselines, ("--", ":", "-."), strict=False):
        axes.axhline(baseline["return_mean"], color="tab:gray", linestyle=style, label=baseline["name"])
    axes.set(xlabel="env steps", ylabel="mean return of the last episodes", title=directory.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(directory / "returns.png", dpi=110)


if __name__ == "__main__":
    for each in parser.parse_args().directory:
        draw(each)
