"""RLlib's own evaluation through all of it: real simulators, a real broker, a real Ray."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
from processes import REAL_RAY, balanced, simulators, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.ppo import PPOConfig
from small_ppo import only_staleness, ppo

from rllink_zmq.errors import RllinkError
from rllink_zmq.rllib import attach

pytestmark = REAL_RAY

EVALUATORS = ("--evaluate",)


def evaluated(runners: int, **settings: Any) -> PPOConfig:
    return ppo(runners=1).evaluation(
        evaluation_interval=1,
        evaluation_num_env_runners=runners,
        evaluation_config={"explore": False},
        **({"evaluation_sample_timeout_s": 20} | settings),
    )


def settled(addresses: dict[str, str]) -> dict[str, Any] | None:
    """The broker's status, once nothing is on its way to an evaluation."""
    shown = status(addresses)
    return shown if not shown["evaluation"]["ledger"]["in_flight"]["fragments"] else None


def test_designated_simulators_serve_evaluation(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses, 3), simulators(addresses, 2, more=EVALUATORS):
        algorithm = attach(evaluated(1, evaluation_duration=5), addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(3)]
        shown = until(lambda: settled(addresses), "all that was evaluated is settled")
    for result in results:
        mine = result["evaluation"]["env_runners"]
        assert mine["num_episodes"] == 5
        assert 1 <= mine["episode_return_min"] <= mine["episode_return_mean"] <= mine["episode_return_max"] <= 500
        assert mine["num_env_steps_sampled"] == mine["num_module_steps_sampled"]["default_policy"]
        assert result["env_runners"]["num_env_steps_sampled"] >= 500
    steps = sum(r["evaluation"]["env_runners"]["num_env_steps_sampled"] for r in results)
    ledger, training = shown["evaluation"]["ledger"], shown["ledger"]
    assert balanced(ledger) and set(ledger["dropped"]) <= {"unwanted"}
    assert ledger["delivered"]["steps"] == steps, "an evaluation takes what it counts"
    assert balanced(training) and only_staleness(training)
    sampled = results[-1]["env_runners"]["num_env_steps_sampled_lifetime"]
    assert training["delivered"]["steps"] <= sampled + 600, "what is evaluated is in no training ledger"
    pools = sorted(r["pool"] for r in shown["runners"])
    assert pools == ["evaluation", "training"]


def test_a_share_serves_while_training_stands_still(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """The local evaluation runner asks, in the driver's process; simulators that wait for room serve all the same."""
    with simulators(addresses, 4):
        config = evaluated(0, evaluation_duration=3)
        algorithm = attach(config, addresses["backend"], evaluation_share=0.5).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(3)]
        shown = until(lambda: settled(addresses), "all that was evaluated is settled")
    assert [r["evaluation"]["env_runners"]["num_episodes"] for r in results] == [3, 3, 3]
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    assert shown["evaluation"]["share"] == 0.5
    assert balanced(shown["evaluation"]["ledger"]) and balanced(shown["ledger"]) and only_staleness(shown["ledger"])


def test_parallel_to_training_for_as_long_as_it_takes(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses, 3), simulators(addresses, 1, more=EVALUATORS):
        config = evaluated(1, evaluation_duration="auto", evaluation_parallel_to_training=True)
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)

        def evaluates() -> bool:
            found = algorithm.train().get("evaluation", {}).get("env_runners", {})
            return bool(found.get("num_episodes", 0) > 0 and found["episode_return_mean"] > 0)

        until(evaluates, "an evaluation beside training")


def test_nobody_serves_and_training_goes_on(addresses: dict[str, str], built: list[Algorithm], caplog: Any) -> None:
    with simulators(addresses, 2):
        config = evaluated(0, evaluation_duration=3, evaluation_sample_timeout_s=1.5)
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    assert all(r["evaluation"]["env_runners"]["num_episodes"] == 0 for r in results)
    said = [r.getMessage() for r in caplog.records if "evaluation_share" in r.getMessage()]
    assert said and "3 of 3 episodes" in said[0] and "simulate --evaluate" in said[0]


@pytest.mark.long
def test_more_runners_than_episodes_and_nobody_serves(addresses: dict[str, str], built: list[Algorithm]) -> None:
    config = evaluated(2, evaluation_duration=1, evaluation_sample_timeout_s=1.5)
    algorithm = attach(config, addresses["backend"]).build_algo()
    built.append(algorithm)
    with pytest.raises(RllinkError, match="this runner trains"):
        algorithm.env_runner.sample(num_timesteps=10)
    began = time.monotonic()
    assert algorithm.evaluate()["env_runners"]["num_episodes"] == 0
    assert time.monotonic() - began < 10
    pids = algorithm.eval_env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
    os.kill(pids[0], signal.SIGSTOP)
    began = time.monotonic()
    built.remove(algorithm)
    algorithm.stop()
    assert time.monotonic() - began < 30, "one that is stopped is killed"


@pytest.mark.long
def test_one_that_comes_back_meanwhile_joins_and_a_failed_evaluation_shows_no_old_numbers(
    addresses: dict[str, str], built: list[Algorithm]
) -> None:
    config = evaluated(
        1, evaluation_duration=2, evaluation_unhealthy_workers_timeout_s=30, evaluation_sample_timeout_s=4
    )
    algorithm = attach(config, addresses["backend"]).build_algo()
    built.append(algorithm)
    with simulators(addresses, 1, more=EVALUATORS):
        assert until(lambda: algorithm.evaluate().get("env_runners", {}).get("num_episodes"), "an evaluation") == 2
        pid = algorithm.eval_env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)[0]
        os.kill(pid, signal.SIGKILL)
        algorithm.evaluate()  # finds it gone
        again = [algorithm.evaluate().get("env_runners", {}).get("num_episodes") for _ in range(3)]
        assert again[-1] == 2, again
    assert "env_runners" not in algorithm.evaluate(), "nobody serves"


@pytest.mark.long
def test_an_evaluation_runner_that_is_killed_comes_back(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses, 2), simulators(addresses, 1, more=EVALUATORS):
        algorithm = attach(evaluated(1, evaluation_duration=2), addresses["backend"]).build_algo()
        built.append(algorithm)
        assert algorithm.train()["evaluation"]["env_runners"]["num_episodes"] == 2
        pid = algorithm.eval_env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)[0]
        os.kill(pid, signal.SIGKILL)

        def evaluates() -> bool:
            return bool(algorithm.train().get("evaluation", {}).get("env_runners", {}).get("num_episodes") == 2)

        before = status(addresses)["evaluation"]["ledger"]["delivered"]["fragments"]
        until(
            lambda: evaluates() and status(addresses)["evaluation"]["ledger"]["delivered"]["fragments"] > before,
            "again",
        )


@pytest.mark.long
def test_several_runners_share_an_evaluation_of_appo(addresses: dict[str, str], built: list[Algorithm]) -> None:
    config = (
        APPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=1)
        .training(train_batch_size_per_learner=250)
        .learners(num_learners=0)
        .rl_module(model_config={"fcnet_hiddens": [16]})
        .evaluation(
            evaluation_interval=1, evaluation_num_env_runners=3, evaluation_duration=200,
            evaluation_duration_unit="timesteps", evaluation_sample_timeout_s=20,
        )
    )  # fmt: skip
    config.min_time_s_per_iteration = 1
    with simulators(addresses, 3), simulators(addresses, 1, more=EVALUATORS):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        for _ in range(2):
            mine = algorithm.train()["evaluation"]["env_runners"]
            assert 200 <= mine["num_env_steps_sampled"] < 500
        algorithm.config._is_frozen = False
        algorithm.config.evaluation(evaluation_duration=2, evaluation_duration_unit="episodes")
        assert algorithm.evaluate()["env_runners"]["num_episodes"] == 2, "there are more runners than episodes"
    assert balanced(status(addresses)["ledger"])


def test_a_restored_training_evaluates(addresses: dict[str, str], built: list[Algorithm], tmp_path: Any) -> None:
    with simulators(addresses, 2), simulators(addresses, 1, more=EVALUATORS):
        algorithm = attach(evaluated(1, evaluation_duration=2), addresses["backend"]).build_algo()
        built.append(algorithm)
        algorithm.train()
        saved = algorithm.save_to_path(str(tmp_path))
        algorithm.train()
        algorithm.restore_from_path(saved)
        assert algorithm.train()["evaluation"]["env_runners"]["num_episodes"] == 2


@pytest.mark.long
def test_services_act_for_evaluation(addresses: dict[str, str], built: list[Algorithm]) -> None:
    remote = ("--inference", "remote")
    with simulators(addresses, 2, more=remote), simulators(addresses, 1, more=(*remote, *EVALUATORS)):
        algorithm = attach(evaluated(1, evaluation_duration=2), addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
    assert [r["evaluation"]["env_runners"]["num_episodes"] for r in results] == [2, 2]
