"""Real processes that are killed and come back: what `benchmarks/chaos.py` does for minutes, for seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from processes import broker, rllink, status, until

ROOT = Path(__file__).parent.parent

RESTARTED_WITHIN_S = 8.0
"""A connection that is gone is tried again each second at most; by a PING alone it would show after 15 s."""


def again(addresses: dict[str, Any]) -> list[str]:
    """Options for a broker at the same addresses."""
    return [
        f"--{name}={addresses[name].removeprefix('http://')}" for name in ("frontend", "backend", "weights", "admin")
    ]


def test_simulators_that_wait_notice_at_once_that_the_broker_was_restarted() -> None:
    with broker() as addresses:
        with rllink(
            "simulate", "--env", "CartPole-v1", "--broker", addresses["frontend"], "--num", "50",
            stdout=subprocess.DEVNULL,
        ):  # fmt: skip
            until(lambda: status(addresses)["simulators"] == 50, "all are connected")
            os.kill(status(addresses)["process"]["pid"], signal.SIGKILL)
            time.sleep(1.0)
            with broker(*again(addresses)) as second:
                until(lambda: status(second)["simulators"] == 50, "all are back", RESTARTED_WITHIN_S)


@pytest.mark.long
@pytest.mark.timeout(400)
def test_nothing_is_lost_or_used_twice_whatever_is_killed(tmp_path: Path) -> None:
    """A runner, the broker, 4 of 12 simulators, a larger pool, a link that stalls: one after the other."""
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--quick", "--logs", str(tmp_path / "logs"),
            "--results", str(tmp_path),
        ],
        capture_output=True, text=True, timeout=360, cwd=tmp_path,
    )  # fmt: skip
    logs = tmp_path / "logs" / "faults"
    said = "\n".join(
        (logs / name).read_text()[-4000:] for name in ("train.log", "broker.log") if (logs / name).exists()
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{said}"
    found = json.loads((tmp_path / "chaos.json").read_text())
    figures = found["figures"]
    assert figures["audit"]["holds"], figures["audit"]["broken"]
    assert all(target["met"] for target in found["targets"]), found["targets"]
    assert set(figures["kinds"]) == {
        "runner killed", "broker killed", "simulators killed", "scaled up", "link stalled for 3 s",
    }  # fmt: skip
    for kind, facts in figures["kinds"].items():
        assert facts["faults"] == 1 and facts["healed_s"]["worst"] is not None, kind
        assert facts["trained_s"]["median"] is not None and not facts["not_again"], kind
    assert figures["audit"]["used"]["steps"] > 5_000
    assert set(figures["dropped_fragments"]) <= {"stale", "handover_cut"}
    assert "is stuck" not in (logs / "train.log").read_text(), "a killed runner is Ray's to start again, not the pool's"
    assert (tmp_path / "chaos.png").exists()
