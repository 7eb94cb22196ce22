"""The pool of runners in a real Ray: it grows and shrinks while training goes on, and what hangs is replaced."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from processes import REAL_RAY, balanced, broker, simulators, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.ppo import PPOConfig

from rllink_zmq.cli import admin
from rllink_zmq.rllib import attach

pytestmark = REAL_RAY

PATIENCE_S = 120.0


def ppo(runners: int) -> AlgorithmConfig:
    config = PPOConfig().env_runners(num_env_runners=runners, sample_timeout_s=4)
    return config.training(train_batch_size_per_learner=500, minibatch_size=125, num_epochs=2)


def appo(runners: int) -> AlgorithmConfig:
    config = APPOConfig().env_runners(num_env_runners=runners).training(train_batch_size_per_learner=250)
    config.learners(num_learners=0)
    config.min_time_s_per_iteration = 0.5
    return config


def build(config: AlgorithmConfig, addresses: dict[str, str], built: list[Algorithm], **link: Any) -> Algorithm:
    config.environment("CartPole-v1").rl_module(model_config={"fcnet_hiddens": [16]})
    built.append(attach(config, addresses["backend"], **link).build_algo())
    return built[-1]


def scale(addresses: dict[str, str], number: int) -> None:
    admin.scale(addresses["admin"], number)


def steps_of(algorithm: Algorithm) -> int:
    """Env steps of one `train()`."""
    found = algorithm.train().get("env_runners", {}).get("num_env_steps_sampled", 0)
    return 0 if found != found else int(found)


def train_until_served_by(algorithm: Algorithm, addresses: dict[str, str], number: int) -> None:
    def reached() -> bool:
        algorithm.train()
        runners = status(addresses)["runners"]
        return [r["duty"] for r in runners if r["duty"] != "park"] == ["serve"] * number

    until(reached, f"{number} runners serve", PATIENCE_S)


@pytest.mark.parametrize("config", [ppo, pytest.param(appo, marks=pytest.mark.long)])
def test_it_grows_shrinks_to_nothing_and_goes_on(
    config: Any, addresses: dict[str, str], built: list[Algorithm], caplog: pytest.LogCaptureFixture
) -> None:
    with simulators(addresses):
        algorithm = build(config(1), addresses, built)
        until(lambda: steps_of(algorithm), "it trains")
        for number in (2, 1, 0):
            scale(addresses, number)
            train_until_served_by(algorithm, addresses, number)
        until(lambda: not steps_of(algorithm), "nothing is on its way any longer")
        version = status(addresses)["weights"]["version"]
        assert steps_of(algorithm) == 0, "at 0 training waits, and train() comes back"
        assert "training waits until there are more" in caplog.text
        assert any("scaled to 0" in text for text in status(addresses)["waiting_for"])
        scale(addresses, 1)
        train_until_served_by(algorithm, addresses, 1)
        until(lambda: algorithm.train() and status(addresses)["weights"]["version"] > version + 2, "it goes on")
        assert algorithm.env_runner_group.num_remote_env_runners() == 1
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and not ledger["dropped"]


@pytest.mark.long
def test_from_the_local_runner_to_actors(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses):
        algorithm = build(ppo(0), addresses, built)
        until(lambda: steps_of(algorithm), "it trains")
        scale(addresses, 1)
        until(
            lambda: steps_of(algorithm) and not algorithm.env_runner.joined, "the local runner has left", PATIENCE_S
        )  # fmt: skip
        assert algorithm.env_runner_group.num_remote_env_runners() == 1


@pytest.mark.long
def test_a_restored_pool_is_as_large_as_it_was(
    addresses: dict[str, str], built: list[Algorithm], tmp_path: Path
) -> None:
    with simulators(addresses):
        algorithm = build(ppo(2), addresses, built)
        until(lambda: steps_of(algorithm), "it trains")
        scale(addresses, 1)
        train_until_served_by(algorithm, addresses, 1)
        path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        built.pop().stop()
        built.append(Algorithm.from_checkpoint(path))
        train_until_served_by(built[-1], addresses, 1)
        assert status(addresses)["trainer"]["runners"] == 1
        until(lambda: steps_of(built[-1]), "it goes on")


def pids(algorithm: Algorithm) -> list[int]:
    found: list[int] = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
    return found


@pytest.mark.parametrize("config", [ppo, pytest.param(appo, marks=pytest.mark.long)])
def test_a_stopped_runner_is_killed_and_training_goes_on(
    config: Any, addresses: dict[str, str], built: list[Algorithm]
) -> None:
    with simulators(addresses):
        algorithm = build(config(2), addresses, built, runner_timeout_s=3)
        until(lambda: steps_of(algorithm), "it trains")
        stopped = pids(algorithm)[0]
        before = {r["session"] for r in status(addresses)["runners"]}
        os.kill(stopped, signal.SIGSTOP)
        try:
            version = status(addresses)["weights"]["version"]
            until(lambda: algorithm.train() and status(addresses)["weights"]["version"] > version + 3, "it goes on")
            until(lambda: algorithm.train() and not alive(stopped), "it is gone")
        finally:
            if alive(stopped):
                os.kill(stopped, signal.SIGCONT)
        until(
            lambda: algorithm.train() and len({r["session"] for r in serving(addresses)} - before) == 1,
            "another one is in its place", PATIENCE_S,
        )  # fmt: skip
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and set(ledger["dropped"]) <= {"stale", "handover_cut"}


def serving(addresses: dict[str, str]) -> list[dict[str, Any]]:
    return [r for r in status(addresses)["runners"] if r["duty"] == "serve" and r["state"] == "live"]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_end_does_not_wait_for_a_stopped_runner(addresses: dict[str, str], built: list[Algorithm]) -> None:
    algorithm = build(appo(2), addresses, built)
    stopped = pids(algorithm)[0]
    algorithm.train()  # both are in a call of sample() that has nothing to give
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    try:
        built.pop().stop()
    finally:
        if alive(stopped):
            os.kill(stopped, signal.SIGKILL)
    assert time.monotonic() - began < PATIENCE_S
    until(lambda: status(addresses)["trainer"] is None, "the trainer has left")


def test_training_survives_the_broker(built: list[Algorithm]) -> None:
    """SIGKILL, and another one at the same addresses that knows nothing."""
    with broker() as addresses, simulators(addresses) as simulating:
        algorithm = build(ppo(2), addresses, built)
        until(lambda: steps_of(algorithm), "it trains")
        run = status(addresses)["weights"]["run_id"]
        os.kill(status(addresses)["process"]["pid"], signal.SIGKILL)
        time.sleep(0.5)
        again = [f"--{name}={addresses[name].removeprefix('http://')}" for name in ("frontend", "backend", "weights")]
        with broker(*again, f"--admin={addresses['admin'].removeprefix('http://')}") as second:
            until(lambda: len(serving(second)) == 2 and status(second)["simulators"] == 4, "all are back")
            until(lambda: steps_of(algorithm), "it goes on")
            seen = status(second)
            assert seen["weights"]["run_id"] == run and seen["weights"]["version"] > 0
            assert simulating.poll() is None
            assert balanced(seen["ledger"]) and set(seen["ledger"]["dropped"]) <= {"stale"}
            built.pop().stop()
