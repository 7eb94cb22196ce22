"""How a training begins again, and what ends it or doesn't: checkpoints, refusals, noise, kills."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq
from processes import REAL_RAY, balanced, rllink, simulators, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.connectors.connector_v2 import ConnectorV2
from small_ppo import only_staleness, ppo

from rllink_zmq.errors import PolicyError
from rllink_zmq.rllib import attach

pytestmark = REAL_RAY


def test_checkpoint_and_resume_are_a_new_run(addresses: dict[str, str], built: list[Algorithm], tmp_path: Path) -> None:
    with simulators(addresses):
        first = attach(ppo(runners=1), addresses["backend"]).build_algo()
        sampled = [first.train()["env_runners"]["num_env_steps_sampled_lifetime"] for _ in range(3)][-1]
        run = first.rllink_trainer.run
        weights = first.get_module().get_state()
        path = first.save_to_path(str(tmp_path / "checkpoint"))
        first.stop()
        second = Algorithm.from_checkpoint(path)
        built.append(second)
        trainer = second.rllink_trainer
        assert trainer.run > run
        until(lambda: trainer.status() and trainer.session.pool.sampled >= sampled, "epsilon goes on from there")
        restored = second.get_module().get_state()
        assert all(np.allclose(weights[k], restored[k]) for k in weights)
        result = second.train()
        assert result["training_iteration"] == 4 and result["env_runners"]["num_env_steps_sampled"] >= 500
        assert result["rllink"]["version"] >= 3
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)


@pytest.mark.parametrize("runners", [2, 0])
def test_an_older_checkpoint_in_a_live_algorithm_goes_back(
    addresses: dict[str, str], built: list[Algorithm], tmp_path: Path, runners: int
) -> None:
    with simulators(addresses):
        algorithm = attach(ppo(runners), addresses["backend"]).build_algo()
        built.append(algorithm)
        algorithm.train()
        path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        saved = algorithm.learner_group.get_weights()["default_policy"]
        for _ in range(3):
            algorithm.train()
        run = algorithm.rllink_trainer.run
        algorithm.restore_from_path(path)
        assert algorithm.rllink_trainer.run > run
        state = algorithm.env_runner_group.foreach_env_runner(
            lambda r: r.module.get_state(), local_env_runner=not runners
        )
        assert all(np.allclose(saved[k], s[k]) for s in state for k in s)
        assert algorithm.train()["env_runners"]["num_env_steps_sampled"] >= 500
        assert algorithm.train()["rllink"]["version"] >= 2


def test_a_second_trainer_and_a_simulator_with_other_spaces_are_refused_in_words(
    addresses: dict[str, str], built: list[Algorithm], caplog: pytest.LogCaptureFixture
) -> None:
    """It waits, says for whom, and begins when the first one has ended."""
    first = attach(ppo(runners=0), addresses["backend"]).build_algo()
    second = threading.Thread(target=lambda: built.append(attach(ppo(runners=0), addresses["backend"]).build_algo()))
    second.start()
    try:
        until(lambda: "already serves the trainer 'PPO'" in caplog.text, "it says who is there", 60)
        assert not built
    finally:
        first.stop()
        second.join()
    assert status(addresses)["weights"]["run_id"] == built[0].rllink_trainer.run, "the broker is its own now"
    with rllink("simulate", "--env", "Acrobot-v1", "--broker", addresses["frontend"], stderr=subprocess.PIPE) as other:
        _, told = other.communicate(timeout=60)
    assert other.returncode == 1
    assert "the trainer's observation space is Box" in told and "start the simulator with" in told


class Broken(ConnectorV2):
    def __call__(self, **kwargs: Any) -> Any:
        raise ValueError("no such sensor")


def test_a_policy_that_nobody_can_compute_is_refused_with_the_piece_and_what_to_do(addresses: dict[str, str]) -> None:
    config = ppo(runners=0).env_runners(env_to_module_connector=lambda *_: Broken())
    with pytest.raises(PolicyError, match="piece Broken fails for one observation: ValueError: no such sensor"):
        attach(config, addresses["backend"]).build_algo()


def test_random_bytes_on_both_sockets_are_not_noticed(addresses: dict[str, str], built: list[Algorithm]) -> None:
    rng = np.random.default_rng(7)
    junk = [rng.bytes(int(n)) for n in rng.integers(0, 200, 1000)]
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(2)]
    try:
        for socket, side in zip(sockets, ("frontend", "backend"), strict=True):
            socket.linger = 0
            socket.connect(addresses[side])
        with simulators(addresses):
            algorithm = attach(ppo(runners=1), addresses["backend"]).build_algo()
            built.append(algorithm)
            sent = 0
            results = []
            while sent < 100_000:
                for socket in sockets:
                    for i in range(5_000):
                        socket.send_multipart(junk[i % 997 : i % 997 + 1 + i % 3])
                        sent += 1
                results.append(algorithm.train())
    finally:
        for socket in sockets:
            socket.close(0)
        context.term()
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    seen = status(addresses)
    assert seen["malformed_messages"] > 0 and only_staleness(seen["ledger"]) and balanced(seen["ledger"])


def test_the_demo_says_what_it_did() -> None:
    with rllink(
        "demo", "--stop-return", "40", "--stop-time", "120", "--simulators", "8", "--runners", "1", "--seed", "0",
        "--json", stderr=subprocess.PIPE,
    ) as demo:  # fmt: skip
        out, err = demo.communicate(timeout=200)
    assert demo.returncode == 0, err
    result = json.loads(out.splitlines()[-1])
    assert {"iterations", "env_steps", "episode_return_mean", "wall_s", "ledger"} <= result.keys()
    assert result["episode_return_mean"] >= 40
    assert balanced(result["ledger"]) and only_staleness(result["ledger"])
    assert "It balances." in err


@pytest.mark.skipif(sys.platform != "linux", reason="a process ends with its parent on Linux alone")
def test_a_demo_that_is_killed_leaves_nothing_behind() -> None:
    with rllink("demo", "--simulators", "1", stderr=subprocess.DEVNULL) as demo:
        children = Path(f"/proc/{demo.pid}/task/{demo.pid}/children")
        pids = until(lambda: len(found := children.read_text().split()) >= 2 and found, "broker and simulators run")
        demo.kill()
        demo.wait()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "they end with it")
