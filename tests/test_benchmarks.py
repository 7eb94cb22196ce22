"""Every benchmark runs, and writes what it says it writes. How fast anything is, no test asks."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = sorted((ROOT / "benchmarks").glob("bench_*.py"))

KEYS = {"name", "date", "quick", "seconds", "machine", "load_before", "targets", "figures", "rounds", "notes"}
TARGET_KEYS = {"what", "figure", "sense", "limit", "spread", "met"}
FIGURES = {
    "actions": {"one", "many", "images", "tail"},
    "agents": {"simulators", "lockstep", "RLlib", "together", "in_turn"},
    "algorithms": {"PPO", "APPO", "IMPALA", "DQN", "SAC"},
    "broker": {"small", "large", "core"},
    "bytes": {
        "Boxing",
        "Boxing, stacked",
        "Breakout",
        "Breakout, stacked",
        "CartPole",
        "HalfCheetah",
    },
    "idle": {"percent_of_a_core", "heartbeats_percent"},
    "iteration": {"large", "small"},
    "many": {"seconds_until_all_delivered", "broker_rss", "dropped_steps", "steps_per_s"},
    "recurrent": {"local", "remote", "RLlib", "no memory"},
    "remote": {"local", "remote"},
    "simulator": {"untrained", "balancing"},
    "vector": {"untrained", "balancing", "build"},
    "weights": {"bytes", "subscribers", "ours", "bare"},
}
TARGETS = {
    "actions": 6,
    "agents": 4,
    "algorithms": 11,
    "broker": 3,
    "bytes": 4,
    "idle": 1,
    "iteration": 2,
    "many": 3,
    "recurrent": 2,
    "remote": 2,
    "simulator": 3,
    "vector": 5,
    "weights": 1,
}


def run(name: str, results: Path) -> dict[str, Any]:
    """`--quick`, and the JSON it wrote."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / f"bench_{name}.py"), "--quick", "--results", str(results)],
        capture_output=True, text=True, timeout=220, cwd=results,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "target" in done.stdout and ("met" in done.stdout or "MISSED" in done.stdout)
    loaded: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
    return loaded


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("actions", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("agents", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("algorithms", marks=[pytest.mark.ray, pytest.mark.long]),
        "broker",
        "bytes",
        "idle",
        pytest.param("iteration", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("many", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("recurrent", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("remote", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("simulator", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("vector", marks=[pytest.mark.ray, pytest.mark.long]),
        pytest.param("weights", marks=pytest.mark.ray),
    ],
)
def test_a_benchmark_writes_its_figures(name: str, tmp_path: Path) -> None:
    if name in ("simulator", "vector") and importlib.util.find_spec("msgpack_numpy") is None:
        pytest.skip("RLlib's client needs msgpack-numpy")
    found = run(name, tmp_path)
    assert found.keys() == KEYS
    assert found["name"] == name and found["quick"] is True
    assert {"cpus", "cpu", "system", "python", "libzmq", "packages"} <= found["machine"].keys()
    assert found["machine"]["packages"]["pyzmq"]
    assert len(found["targets"]) == TARGETS[name]
    for target in found["targets"]:
        assert target.keys() == TARGET_KEYS
        assert target["sense"] in ("at least", "at most")
        assert isinstance(target["figure"], float) and isinstance(target["met"], bool)
    assert found["figures"].keys() >= FIGURES[name] and found["rounds"]
    assert (tmp_path / "many.png").exists() == (name == "many")


def test_every_benchmark_is_run_here() -> None:
    assert [path.stem.removeprefix("bench_") for path in BENCHMARKS] == sorted(FIGURES)


def test_the_figures_that_are_kept_are_of_full_runs() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert json.loads(path.read_text())["quick"] is False, path
