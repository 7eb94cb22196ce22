"""Observations and actions of several parts through real simulators, a real broker and a real Ray."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import parted_env
from processes import REAL_RAY, balanced, environment, rllink, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.connectors.env_to_module import FlattenObservations
from small_ppo import only_staleness, ppo

from rllink_zmq.rllib import attach

pytestmark = REAL_RAY


def simulators(addresses: dict[str, str], *more: str) -> Any:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return rllink(
        "simulate", "--env", "parted_env:Parted-v0", "--broker", addresses["frontend"], *more,
        stdout=subprocess.DEVNULL, env=environment(PYTHONPATH=path),
    )  # fmt: skip


def test_all_parts_are_learned(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """By simulators that act themselves, one by one and as a vector, and by one that asks. The environment ends a
    simulator whose action is none of its space."""
    config = (
        ppo(runners=1)
        .environment(observation_space=parted_env.OBSERVATIONS, action_space=parted_env.ACTIONS, env=None)
        .env_runners(env_to_module_connector=lambda env, spaces, device: FlattenObservations())
        .training(lr=5e-3, num_epochs=6, gamma=0.0)  # what an action is worth shows at once
    )
    config.env = None
    with (
        simulators(addresses, "--num", "2") as alone,
        simulators(addresses, "--vector", "3") as together,
        simulators(addresses, "--inference", "remote") as asking,
    ):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        returns: list[float] = []

        def learned() -> bool:
            returns.append(algorithm.train()["env_runners"]["episode_return_mean"])
            return returns[-1] > returns[0] + 4.0

        until(learned, "returns rise by 4", 120)
        shown = status(addresses)
        assert [simulator.poll() for simulator in (alone, together, asking)] == [None] * 3
    assert shown["acting"]["answered"] > 100
    assert balanced(shown["ledger"]) and only_staleness(shown["ledger"])
