"""Real simulators, a real broker, a real Ray: training through all of it, each in its own process."""

from __future__ import annotations

import subprocess
from pathlib import Path

import image_env
import zmq
from processes import REAL_RAY, balanced, environment, process, rllink, simulators, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPO
from small_ppo import appo, only_staleness, ppo, streams

from rllink_zmq.rllib import attach

pytestmark = REAL_RAY


def test_ppo_trains_and_reports(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses):
        algorithm = attach(ppo(), addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(4)]
    last = results[-1]
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    assert last["learners"]["default_policy"]["num_module_steps_trained"] > 0
    mine = last["env_runners"]
    for key in (
        "episode_return_mean", "episode_return_max", "episode_len_mean", "episode_duration_sec_mean", "env_step_timer",
        "agent_episode_return_mean", "module_episode_return_mean", "num_episodes", "num_episodes_lifetime",
        "num_agent_steps_sampled", "num_module_steps_sampled_lifetime", "sample", "time_between_sampling",
        "weights_seq_no", "env_to_module_sum_episodes_length_in", "env_to_module_sum_episodes_length_out",
    ):  # fmt: skip
        assert key in mine, key
    timed = (
        mine["env_reset_timer"], mine["rlmodule_inference_timer"],
        mine["env_to_module_connector"]["connector_pipeline_timer"],
        mine["module_to_env_connector"]["connector_pipeline_timer"],
    )  # fmt: skip
    assert all(0 < seconds < 1 for seconds in timed), timed
    assert mine["num_env_steps_sampled_lifetime"] == sum(r["env_runners"]["num_env_steps_sampled"] for r in results)
    assert mine["rllink"]["simulators_connected"] == 4 and mine["rllink"]["lag_max"] <= 2
    assert last["rllink"]["simulators"] == 4 and last["rllink"]["version"] >= 3
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)
    assert ledger["delivered"]["steps"] >= mine["num_env_steps_sampled_lifetime"] - 600


def test_simulators_rest_while_the_learner_learns(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """With next to nothing ahead all that is trained on is by the newest weights, but for a step of each, and what
    was on its way when a round was full."""
    with simulators(addresses):
        algorithm = attach(ppo(), addresses["backend"], steps_ahead=1).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(6)]
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    assert results[-1]["env_runners"]["rllink"]["lag_mean"] < 0.5, results[-1]["env_runners"]["rllink"]
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and not ledger["dropped"]


def test_weights_leave_the_learner_side_once_and_simulators_follow(
    addresses: dict[str, str], built: list[Algorithm]
) -> None:
    subscriber = zmq.Context.instance().socket(zmq.SUB)
    subscriber.subscribe(b"")
    subscriber.connect(addresses["weights"])
    try:
        with simulators(addresses):
            algorithm = attach(ppo(), addresses["backend"]).build_algo()
            built.append(algorithm)
            for _ in range(4):
                algorithm.train()
            until(lambda: status(addresses)["weights"]["version"] == 4, "version 4 is published")
        published = []
        while subscriber.poll(200):
            published.append(subscriber.recv_multipart()[1])
    finally:
        subscriber.close(0)
    assert len(published) == len(set(published)) <= 5


def test_without_simulators_train_comes_back_and_training_starts_when_one_joins(
    addresses: dict[str, str], built: list[Algorithm]
) -> None:
    algorithm = attach(ppo(runners=1), addresses["backend"]).build_algo()
    built.append(algorithm)
    assert algorithm.train().get("env_runners", {}).get("num_env_steps_sampled", 0) == 0
    assert status(addresses)["waiting_for"] == ["a simulator (rllink-zmq simulate)"]
    with simulators(addresses):
        until(lambda: algorithm.train().get("env_runners", {}).get("num_env_steps_sampled", 0) >= 500, "data come")


def test_the_local_runner_samples_when_there_are_no_others(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses):
        algorithm = attach(ppo(runners=0), addresses["backend"]).build_algo()
        built.append(algorithm)
        assert algorithm.train()["env_runners"]["num_env_steps_sampled"] >= 500


def test_appo_trains_and_nothing_is_dropped(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses):
        algorithm = attach(appo(), addresses["backend"]).build_algo()
        built.append(algorithm)
        streams(algorithm)
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)


def test_continuous_actions_train(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses, 2, "Pendulum-v1"):
        config = ppo(runners=1).environment("Pendulum-v1")
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        result = algorithm.train()
    assert result["env_runners"]["num_env_steps_sampled"] >= 500
    assert only_staleness(status(addresses)["ledger"])


def test_images_train(addresses: dict[str, str], built: list[Algorithm]) -> None:
    observation_space, action_space = image_env.SPACES
    config = (
        ppo(runners=1, batch=400)
        .environment(None, observation_space=observation_space, action_space=action_space)
        .training(lr=1e-3)
        .rl_module(model_config={"conv_filters": [[8, 4, 4], [16, 3, 2]], "fcnet_hiddens": [32]})
    )
    with rllink(
        "simulate", "--env", "image_env:Bright-v0", "--broker", addresses["frontend"], "--num", "2",
        stdout=subprocess.DEVNULL, env=environment(PYTHONPATH=str(Path(__file__).parent)),
    ):  # fmt: skip
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        until(lambda: algorithm.train()["env_runners"]["episode_return_mean"] > 8.0, "it sees", 120)
    assert only_staleness(status(addresses)["ledger"])


def test_tune_runs_the_same_config(addresses: dict[str, str], tmp_path: Path) -> None:
    from ray import tune

    with simulators(addresses):
        config = attach(ppo(runners=1), addresses["backend"])
        results = tune.Tuner(
            PPO,
            param_space=config,
            run_config=tune.RunConfig(
                stop={"training_iteration": 2}, storage_path=str(tmp_path), name="t", verbose=0,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            ),
        ).fit()  # fmt: skip
    assert not results.errors
    assert results[0].metrics["env_runners"]["num_env_steps_sampled_lifetime"] >= 1000


def test_the_example_script_and_raw_dealer_train_together(addresses: dict[str, str]) -> None:
    with (
        process("examples/raw_dealer.py", "--broker", addresses["frontend"], stdout=subprocess.DEVNULL),
        process(
            "examples/train_ppo.py", "--broker", addresses["backend"], "--runners", "1", "--iterations", "2",
            stderr=subprocess.DEVNULL,
        ) as training,
    ):  # fmt: skip
        out, _ = training.communicate(timeout=180)
    assert training.returncode == 0, out
    lines = [line for line in out.splitlines() if line.startswith("iteration")]
    assert len(lines) == 2 and "1 simulators" in lines[-1], out
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger) and ledger["delivered"]["steps"] >= 3000
