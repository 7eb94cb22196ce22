"""Real simulators, a real broker, a real Ray: training through all of it, each in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import image_env
import numpy as np
import pytest
import zmq
from processes import REAL_RAY, balanced, environment, process, rllink, simulators, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.ppo import PPO, PPOConfig

from rllink_zmq.errors import PolicyError
from rllink_zmq.rllib import attach

pytestmark = REAL_RAY


def ppo(runners: int = 2, batch: int = 500) -> PPOConfig:
    return (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=runners, sample_timeout_s=6)
        .training(train_batch_size_per_learner=batch, minibatch_size=125, num_epochs=2)
        .rl_module(model_config={"fcnet_hiddens": [16]})
    )


def only_staleness(ledger: dict[str, Any]) -> bool:
    return set(ledger["dropped"]) <= {"stale", "old_run"}


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
        "weights_seq_no",
    ):  # fmt: skip
        assert key in mine, key
    assert mine["num_env_steps_sampled_lifetime"] == sum(r["env_runners"]["num_env_steps_sampled"] for r in results)
    assert mine["rllink"]["simulators_connected"] == 4 and mine["rllink"]["lag_max"] <= 2
    assert last["rllink"]["simulators"] == 4 and last["rllink"]["version"] >= 3
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)
    assert ledger["delivered"]["steps"] >= mine["num_env_steps_sampled_lifetime"] - 600


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
    algorithm = attach(ppo(), addresses["backend"]).build_algo()
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
    config = (
        APPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2)
        .training(train_batch_size_per_learner=250)
        .learners(num_learners=0)
        .rl_module(model_config={"fcnet_hiddens": [16]})
    )
    config.min_time_s_per_iteration = 1
    with simulators(addresses):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)

        def learned() -> bool:
            result = algorithm.train()
            steps = result.get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0)
            return steps > 1000 and result["rllink"]["version"] > 2

        until(learned, "1,000 steps and two updates")
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)


def test_continuous_actions_train(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses, 2, "Pendulum-v1"):
        config = ppo().environment("Pendulum-v1")
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        result = algorithm.train()
    assert result["env_runners"]["num_env_steps_sampled"] >= 500
    assert only_staleness(status(addresses)["ledger"])


def test_images_train(addresses: dict[str, str], built: list[Algorithm]) -> None:
    observation_space, action_space = image_env.SPACES
    config = (
        ppo(batch=400)
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


def test_checkpoint_and_resume_are_a_new_run(addresses: dict[str, str], built: list[Algorithm], tmp_path: Path) -> None:
    with simulators(addresses):
        first = attach(ppo(), addresses["backend"]).build_algo()
        for _ in range(3):
            first.train()
        run = first.rllink_trainer.run
        weights = first.get_module().get_state()
        path = first.save_to_path(str(tmp_path / "checkpoint"))
        first.stop()
        second = Algorithm.from_checkpoint(path)
        built.append(second)
        assert second.rllink_trainer.run > run
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


def test_a_second_trainer_is_refused_in_words(
    addresses: dict[str, str], built: list[Algorithm], caplog: pytest.LogCaptureFixture
) -> None:
    built.append(attach(ppo(runners=1), addresses["backend"]).build_algo())
    with rllink(
        "train", "--env", "CartPole-v1", "--broker", addresses["backend"], "--runners", "1", "--stop-time", "1",
        stderr=subprocess.PIPE,
    ) as second:  # fmt: skip
        assert second.stderr is not None
        until(lambda: "already serves the trainer 'PPO'" in second.stderr.readline(), "it says who is there")


def test_a_simulator_with_other_spaces_is_refused_in_words(addresses: dict[str, str], built: list[Algorithm]) -> None:
    built.append(attach(ppo(runners=1), addresses["backend"]).build_algo())
    with rllink("simulate", "--env", "Acrobot-v1", "--broker", addresses["frontend"], stderr=subprocess.PIPE) as other:
        _, told = other.communicate(timeout=60)
    assert other.returncode == 1
    assert "the trainer's observation space is Box" in told and "start the simulator with" in told


def test_a_policy_that_cannot_be_exported_is_refused_with_the_module_and_what_to_do(addresses: dict[str, str]) -> None:
    config = ppo(runners=0).rl_module(model_config={"use_lstm": True, "max_seq_len": 8})
    with pytest.raises(PolicyError, match=r"PPO.*stateful"):
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
            algorithm = attach(ppo(), addresses["backend"]).build_algo()
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


def test_the_demo_says_what_it_did() -> None:
    with rllink(
        "demo", "--stop-return", "40", "--stop-time", "120", "--simulators", "8", "--seed", "0", "--json",
        stderr=subprocess.PIPE,
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
