"""Recurrent policies through real simulators, a real broker and a real Ray, each in its own process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import REAL_RAY, balanced, environment, rllink, status
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.examples.envs.classes.stateless_cartpole import StatelessCartPole
from small_dqn import dqn
from small_ppo import appo, only_staleness, ppo, streams

from rllink_zmq.rllib import attach

pytestmark = REAL_RAY

EXAMPLES = Path(__file__).parent.parent / "examples"
MODEL = {"use_lstm": True, "lstm_cell_size": 16, "fcnet_hiddens": [16], "max_seq_len": 8, "vf_share_layers": False}


def simulators(addresses: dict[str, str], *more: str) -> Any:
    """StatelessCartPoles at this broker, for a `with`; four, unless `more` says otherwise."""
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    return rllink(
        "simulate", "--env", "stateless_cartpole:StatelessCartPole-v0", "--broker", addresses["frontend"], "--num", "4",
        *more, stdout=subprocess.DEVNULL, env=environment(PYTHONPATH=path),
    )  # fmt: skip


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(np.allclose(one[name], other[name]) for name in one.keys() & other.keys())


@pytest.mark.parametrize("inference", ["local", pytest.param("remote", marks=pytest.mark.long)])
def test_a_recurrent_ppo_trains(inference: str, addresses: dict[str, str], built: list[Algorithm]) -> None:
    config = ppo(runners=1).environment(StatelessCartPole).rl_module(model_config=MODEL)
    with (
        simulators(addresses, "--inference", inference, "--num", "2"),
        simulators(addresses, "--inference", inference, "--num", "1", "--vector", "3") as together,
    ):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(3)]
        assert together.poll() is None
        assert status(addresses)["simulators"] == 3
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    assert results[-1]["learners"][DEFAULT_MODULE_ID]["num_module_steps_trained"] > 0
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)
    # The critic that acts is the learner's. (RLlib's own runner keeps the one it was built with.)
    learned = algorithm.learner_group.get_state()["learner"]["rl_module"][DEFAULT_MODULE_ID]
    group = algorithm.env_runner_group
    for acting in group.foreach_env_runner(lambda runner: runner.held.weights, local_env_runner=False):
        acting = acting.get(DEFAULT_MODULE_ID, acting)
        critic = [name for name in acting if name.startswith("encoder.critic_encoder.lstm")]
        assert critic and same(acting, learned)


@pytest.mark.long
def test_a_recurrent_appo_trains(addresses: dict[str, str], built: list[Algorithm]) -> None:
    config = appo().environment(StatelessCartPole).rl_module(model_config=MODEL)
    with simulators(addresses):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        streams(algorithm)
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and only_staleness(ledger)


@pytest.mark.long
def test_a_recurrent_dqn_trains(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """By simulators that act themselves, one by one and as a vector, and by one that asks."""
    config = dqn(1).environment(StatelessCartPole).rl_module(model_config=MODEL | {"head_fcnet_hiddens": []})
    config.training(replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 10_000}, burn_in_len=2)
    with (
        simulators(addresses, "--num", "1") as alone,
        simulators(addresses, "--num", "1", "--vector", "2") as together,
        simulators(addresses, "--num", "1", "--inference", "remote") as asking,
    ):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(3)]
        shown = status(addresses)
        assert [simulator.poll() for simulator in (alone, together, asking)] == [None] * 3
    assert shown["acting"]["answered"] > 20
    learned = results[-1]["learners"][DEFAULT_MODULE_ID]
    assert learned["num_module_steps_trained"] > 0 and np.isfinite(learned["qf_loss"])
    episodes = algorithm.local_replay_buffer.episodes
    assert sum(map(len, episodes)) >= 600
    for episode in episodes:
        kept = episode.get_extra_model_outputs("state_out")
        assert len(kept["h"]) == len(episode) and np.abs(kept["h"]).max() > 0.0
    ledger = shown["ledger"]
    assert balanced(ledger) and not ledger["dropped"]
