"""Broker, two Ray nodes and simulators, each on a host of its own: a slow link, and a partition that heals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import netns
import pytest
from processes import balanced, environment, running_command, status, until

from rllink_zmq.audit import Sent, read
from rllink_zmq.audit_judge import judge

pytestmark = pytest.mark.long

PATIENCE_S = 120.0
PARTITION_S = 10.0
CONFIG = {
    "train_batch_size_per_learner": 128,
    "minibatch_size": 128,
    "num_epochs": 1,
    "sample_timeout_s": 40,
    "num_cpus_per_env_runner": 0.9,
    "model_config": {"fcnet_hiddens": [256]},
    "rllink": {"lag_limit": 20, "steps_ahead": 512, "fragment_steps": 128},
}
RAY = {"RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
"""A head that finds a token in the home directory asks everybody else for it."""
WEIGHTS_BYTES = 4_000_000


@pytest.fixture
def net() -> Iterator[netns.Net]:
    reason = netns.why_not()
    if reason:
        pytest.skip(reason)
    with netns.network() as made:
        yield made


@contextmanager
def on(host: netns.Host, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python with these arguments on this host, its stdout a pipe."""
    with running_command(
        host.command(sys.executable, *arguments), signal.SIGINT,
        **{
            "start_new_session": True,
            "env": environment(**RAY, PYTHONPATH=str(Path(__file__).parent)), "cwd": None, **options,
        },
    ) as running:  # fmt: skip
        yield running


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Short, since paths of Unix sockets are made of it; and Ray's own would tell other programs of this cluster."""
    folder = Path(tempfile.mkdtemp(prefix="rll"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_node(host: netns.Host, log: Path, *arguments: str) -> Iterator[None]:
    """`ray start` on this host with one CPU; it ends with all its processes when the namespace does."""
    with log.open("w") as said:
        with on(
            host, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--disable-usage-stats",
            "--object-store-memory", "200000000", "--node-ip-address", host.address, *arguments, stdout=said,
            stderr=subprocess.STDOUT,
        ) as node:  # fmt: skip
            until(lambda: node.poll() is not None or "runtime started" in log.read_text(), "the Ray node is there")
            assert node.poll() is None, log.read_text()
            yield


def runners_on(host: netns.Host) -> list[int]:
    """Processes of this host that are runners."""
    found = []
    for pid in host.processes():
        try:
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::ZmqEnvRunner"):
                found.append(pid)
        except OSError:
            continue
    return found


def newest_version(audit: Path) -> int:
    """Of the weights that simulators have acted by."""
    found = [-1]
    for path in audit.glob("simulator-*.jsonl"):
        found += [json.loads(line)["version"] for line in path.read_text().splitlines()[1:] if '"sent"' in line]
    return max(found)


@pytest.mark.timeout(500)
def test_training_over_a_slow_link_and_through_a_partition(net: netns.Net, tmp_path: Path, ray_folder: Path) -> None:
    """Fragments of 2 MB and weights of 4 MB over 4 Mbit/s; then the broker's host is cut off for 10 s."""
    at_broker, head, node, simulating = (net.host(name) for name in ("broker", "head", "node", "sim"))
    simulating.slow("4mbit")
    audit, config, said = tmp_path / "audit", tmp_path / "config.yaml", tmp_path / "train.log"
    config.write_text(json.dumps(CONFIG))
    with ExitStack() as stack:
        served = stack.enter_context(on(
            at_broker, "-m", "rllink_zmq.cli", "broker", "--insecure", "--frontend", "tcp://0.0.0.0:5555", "--backend",
            "tcp://0.0.0.0:5556", "--weights", "tcp://0.0.0.0:5557", "--admin", "127.0.0.1:5580", "--fragment-bytes",
            "4MiB",
        ))  # fmt: skip
        assert served.stdout is not None
        addresses = json.loads(served.stdout.readline())

        def now() -> dict[str, Any]:
            return at_broker.inside(lambda: status(addresses))

        def delivered() -> int:
            return int(now()["ledger"]["delivered"]["fragments"])

        gcs = f"{head.address}:6399"
        stack.enter_context(
            ray_node(
                head,
                tmp_path / "head.log",
                "--head",
                "--port",
                "6399",
                "--include-dashboard",
                "false",
                "--temp-dir",
                str(ray_folder),
            )
        )
        stack.enter_context(ray_node(node, tmp_path / "node.log", "--address", gcs))
        stack.enter_context(on(
            simulating, "-m", "rllink_zmq.cli", "simulate", "--env", "netns_env:Wide-v0", "--num", "2", "--broker",
            f"tcp://{at_broker.address}:5555", "--audit", str(audit), stdout=subprocess.DEVNULL,
        ))  # fmt: skip
        log = stack.enter_context(said.open("w"))
        training = stack.enter_context(on(
            head, "-m", "rllink_zmq.cli", "train", "--broker", f"tcp://{at_broker.address}:5556", "--ray-address", gcs,
            "--runners", "2", "--config", str(config), "--audit", str(audit), stdout=subprocess.DEVNULL, stderr=log,
        ))  # fmt: skip

        def trained(version: int) -> bool:
            assert training.poll() is None, said.read_text()
            return bool(now()["weights"]["version"] >= version)

        until(lambda: trained(1), "it trains", PATIENCE_S)
        assert [len(runners_on(host)) for host in (at_broker, head, node, simulating)] == [0, 1, 1, 0]
        acted_by = newest_version(audit)
        assert acted_by >= 0, "weights have come over the slow link"
        until(
            lambda: newest_version(audit) > acted_by + 1, "newer ones come, though fragments fill it", PATIENCE_S
        )  # fmt: skip
        before, epoch = now(), now()["epoch"]
        with at_broker.cut_off():
            time.sleep(PARTITION_S)
        assert balanced(now()["ledger"])
        known = delivered()
        until(lambda: delivered() >= known + 2, "fragments are delivered again", PATIENCE_S)
        until(lambda: trained(before["weights"]["version"] + 2), "training goes on", PATIENCE_S)
        after = now()
        assert after["epoch"] == epoch and balanced(after["ledger"])
        assert after["simulators"] == 2
        # A partition may look as if runners were lost, with what they had taken; else only what is too old is dropped.
        assert set(after["ledger"]["dropped"]) <= {"stale", "handover_cut"}
        assert not after["malformed_messages"]
        assert after["weights"]["bytes"] == 0 or after["weights"]["bytes"] > WEIGHTS_BYTES
    logs = read([audit])
    sent = [line for records in logs for line in records.lines if isinstance(line, Sent)]
    assert max(line.steps for line in sent) == 128, "2 MB"
    verdict = judge(logs)
    assert verdict.holds, verdict.broken
    assert verdict.used[0] >= 3
