"""Real simulators, a real broker, a real Ray, and algorithms with a replay buffer: DQN, SAC. And several learners."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import Any

import numpy as np
import pytest
import ray
from processes import REAL_RAY, balanced, process, simulators, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from small_dqn import dqn, sac
from small_ppo import appo, only_staleness, ppo, streams

from rllink_zmq import connect
from rllink_zmq.rllib import attach
from rllink_zmq.rllib.settings import exact_share

pytestmark = REAL_RAY


def sampled(result: dict[str, Any]) -> int:
    return int(result.get("env_runners", {}).get("num_env_steps_sampled_lifetime", 0))


def updates(algorithm: Algorithm) -> int:
    """Of the learner: each makes one version of the weights."""
    return int(algorithm.rllink_trainer.status()["version"])


@pytest.mark.parametrize(("inference", "runners"), [("local", 2), pytest.param("remote", 1, marks=pytest.mark.long)])
def test_dqn_makes_the_updates_that_it_would_make_by_itself(
    inference: str, runners: int, addresses: dict[str, str], built: list[Algorithm]
) -> None:
    """One for each round of exactly as many steps as RLlib's own runners return, once it learns."""
    config = dqn(runners)
    with simulators(addresses, 3, more=("--inference", inference)):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(3)]
    share = exact_share(config, 1) * runners
    assert share == 4 * runners
    steps = sampled(results[-1])
    assert steps >= 600 and steps % share == 0
    made = 1 + steps // share - -(-100 // share)
    until(lambda: made - 1 <= updates(algorithm) <= made + 1, f"{made} updates of {steps} steps", 5)
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and not ledger["dropped"]
    assert results[-1]["env_runners"]["episode_return_mean"] > 5


def test_a_runner_is_killed_and_fragments_are_dropped_in_mid_training(
    addresses: dict[str, str], built: list[Algorithm]
) -> None:
    """Gaps in episodes, that RLlib's prioritized buffer would stop the training at if it saw them."""
    with simulators(addresses, 3):
        # By the time that they come most fragments are older than that.
        algorithm = attach(dqn(), addresses["backend"], lag_limit=8).build_algo()
        built.append(algorithm)
        until(lambda: sampled(algorithm.train()) >= 400, "it trains")
        victim = algorithm.env_runner_group._worker_manager.actors()[1]
        os.kill(ray.get(victim.apply.remote(lambda runner: os.getpid())), signal.SIGKILL)
        before = sampled(algorithm.train())
        until(lambda: sampled(algorithm.train()) >= before + 400, "it goes on")
    ledger = status(addresses)["ledger"]
    assert balanced(ledger)
    assert ledger["dropped"].get("stale", {"fragments": 0})["fragments"] > 10
    assert set(ledger["dropped"]) <= {"stale", "handover_cut", "late"}
    assert algorithm.local_replay_buffer.get_num_timesteps() >= before + 400


def test_a_script_teaches_dqn(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """Actions chosen outside, with no known probability, beside the policy's own."""
    import gymnasium as gym

    algorithm = attach(dqn(1), addresses["backend"]).build_algo()
    built.append(algorithm)
    env = gym.make("CartPole-v1")
    steps = 0
    with connect(
        addresses["frontend"], observation_space=env.observation_space, action_space=env.action_space,
        on_backpressure="drop",
    ) as client:  # fmt: skip
        for number in range(4):
            observation, _ = env.reset(seed=number)
            episode = client.start_episode()
            done = False
            while not done:
                leans = float(observation[2] + observation[3]) > 0
                episode.log_action(observation, int(leans))
                observation, reward, terminated, truncated, _ = env.step(int(leans))
                episode.log_returns(float(reward))
                steps += 1
                done = terminated or truncated
            episode.end_episode(observation)
        until(lambda: status(addresses)["ledger"]["received"]["steps"] >= 48, "they have arrived")
        for _ in range(12):
            algorithm.training_step()
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and ledger["delivered"]["steps"] >= 16
    assert "malformed" not in ledger["dropped"]
    assert algorithm.local_replay_buffer.get_num_timesteps() == 48


@pytest.mark.long
def test_sac_trains_with_two_learners(addresses: dict[str, str], built: list[Algorithm]) -> None:
    with simulators(addresses, 2, "Pendulum-v1"):
        config = attach(sac().learners(num_learners=2), addresses["backend"])
        algorithm = config.build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
    assert sampled(results[-1]) == 400
    learned = results[-1]["learners"]["default_policy"]
    assert learned["num_module_steps_trained"] >= 64 * 20
    assert np.isfinite(learned["qf_loss"])
    until(lambda: updates(algorithm) >= 30, "updates are published", 5)
    assert not status(addresses)["ledger"]["dropped"]


def test_the_example_runs(addresses: dict[str, str]) -> None:
    with (
        simulators(addresses, 2, "Pendulum-v1"),
        process(
            "examples/train_sac.py", "--broker", addresses["backend"], "--iterations", "1", stderr=subprocess.DEVNULL
        ) as training,
    ):
        out, _ = training.communicate(timeout=180)
    assert training.returncode == 0, out
    assert "steps 500 " in out and "2 simulators" in out, out


@pytest.mark.parametrize("name", ["PPO", pytest.param("APPO", marks=pytest.mark.long)])
def test_they_train_with_two_learners(name: str, addresses: dict[str, str], built: list[Algorithm]) -> None:
    config = ppo(batch=250) if name == "PPO" else appo()
    config.learners(num_learners=2).env_runners(num_env_runners=1)
    with simulators(addresses):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        if name == "APPO":
            streams(algorithm)
        else:
            result = [algorithm.train() for _ in range(2)][-1]
            assert result["env_runners"]["num_env_steps_sampled"] >= 500, "what both learners take"
            assert np.isfinite(result["learners"]["default_policy"]["total_loss"])
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)
