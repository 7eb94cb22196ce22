"""An audit of real trainings: simulators, broker, runners and learners, each in its own process."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from processes import broker, rllink, status, until


def audited(directory: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """`rllink-zmq audit`: its exit code, JSON, and words."""
    with rllink("audit", str(directory), "--json", *arguments, stderr=subprocess.PIPE) as process:
        out, words = process.communicate(timeout=60)
    return process.returncode, json.loads(out.splitlines()[-1]), words


@pytest.mark.parametrize(
    ("algo", "more"),
    [
        pytest.param(
            "PPO", {"train_batch_size_per_learner": 500, "minibatch_size": 125, "num_epochs": 2},
            marks=pytest.mark.ray, id="PPO",
        ),
        pytest.param(
            "PPO", {"train_batch_size_per_learner": 250, "minibatch_size": 125, "num_epochs": 1, "num_learners": 2},
            marks=pytest.mark.long, id="PPO with two learners",
        ),
        pytest.param("APPO", {"train_batch_size_per_learner": 250}, marks=pytest.mark.long, id="APPO"),
    ],
)  # fmt: skip
def test_a_training_uses_each_delivered_fragment_once(tmp_path: Path, algo: str, more: dict[str, Any]) -> None:
    logs, config = tmp_path / "logs", tmp_path / "config.yaml"
    config.write_text(json.dumps({**more, "model_config": {"fcnet_hiddens": [16]}}))
    with broker() as addresses:
        with rllink(
            "simulate", "--env", "CartPole-v1", "--broker", addresses["frontend"], "--num", "6", "--processes", "2",
            "--audit", str(logs), stdout=subprocess.DEVNULL,
        ):  # fmt: skip
            with rllink(
                "train", "--broker", addresses["backend"], "--algo", algo, "--config", str(config), "--audit",
                str(logs), "--stop-steps", "3000", "--json", stderr=subprocess.PIPE,
            ) as training:  # fmt: skip
                out, words = training.communicate(timeout=180)
            assert training.returncode == 0, words
            trained = json.loads(out.splitlines()[-1])["env_steps"]
            until(lambda: not status(addresses)["runners"], "the runners have left")
        ledger = status(addresses)["ledger"]
    code, told, words = audited(logs)
    assert code == 0, words
    assert told["logs"]["simulator"] == 2 and told["logs"]["runner"] == 2
    assert told["logs"]["learner"] == more.get("num_learners", 1)
    delivered = told["outcomes"]["delivered"]
    assert trained >= 3000 and told["used"]["steps"] >= (2500 if algo == "PPO" else 1000)
    assert 0 < delivered["fragments"] <= ledger["delivered"]["fragments"]
    # APPO stops in the middle of its stream; PPO trains on all that it has collected.
    apart = told["apart"]
    assert told["used"]["steps"] + apart["held"]["steps"] == delivered["steps"]
    assert algo == "APPO" or not apart["held"]["fragments"]
    assert not apart["unsent"]["fragments"] and "Every promise was kept." in words
    # A learner's log that is lost, or a batch too many, is noticed.
    learner = next(logs.glob("learner-*"))
    lines = learner.read_text().splitlines(keepends=True)
    learner.write_text("".join([*lines, lines[1]]))
    code, told, _ = audited(logs)
    assert code == 1 and set(told["broken"]) == {"twice"}
    learner.write_text("".join(lines[:1] + lines[2:]))
    assert audited(logs)[0] == 1
