"""Runners on several Ray nodes, one of which goes while they train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from processes import REAL_RAY, balanced, simulators, status, until
from ray.cluster_utils import Cluster
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.appo import APPOConfig
from small_ppo import ppo

from rllink_zmq.cli import admin
from rllink_zmq.rllib import attach

pytestmark = [mark for mark in REAL_RAY if mark.name != "usefixtures"]

PATIENCE_S = 120.0
A_NODE_EACH = {"num_cpus_per_env_runner": 0.9}


def appo() -> APPOConfig:
    config = APPOConfig().environment("CartPole-v1").training(train_batch_size_per_learner=250)
    config.env_runners(num_env_runners=2).learners(num_learners=0).rl_module(model_config={"fcnet_hiddens": [16]})
    config.min_time_s_per_iteration = 0.5
    return config


@pytest.fixture
def nodes(ray_environment: None) -> Iterator[Cluster]:
    """A head and two more, of one CPU each."""
    ray.shutdown()  # that of other tests
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def places(algorithm: Algorithm) -> dict[int, str]:
    """Healthy runners of RLlib's group -> their nodes."""
    found = algorithm.env_runner_group._worker_manager.foreach_actor(
        lambda runner: (runner.worker_index, ray.get_runtime_context().get_node_id()), timeout_seconds=5
    )
    return dict(r.get() for r in found if r.ok)


def serving(addresses: dict[str, str]) -> list[str]:
    return [r["name"] for r in status(addresses)["runners"] if r["duty"] == "serve" and r["state"] == "live"]


@pytest.mark.long
@pytest.mark.parametrize("config", [ppo, appo])
def test_a_node_goes_while_they_train(
    nodes: Cluster, addresses: dict[str, str], built: list[Algorithm], config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = config().env_runners(**A_NODE_EACH)
    chosen.env_runner_restore_timeout_s = 5
    with simulators(addresses):
        algorithm = attach(chosen, addresses["backend"]).build_algo()
        built.append(algorithm)
        algorithm.train()
        nodes.add_node(num_cpus=1)
        admin.scale(addresses["admin"], 3)
        until(lambda: algorithm.train() and len(serving(addresses)) == 3, "there are three", PATIENCE_S)
        where = until(lambda: len(found := places(algorithm)) == 3 and found, "all three answer", PATIENCE_S)
        assert len(set(where.values())) == 3, "each has a node of its own"
        gone = next(n for n in nodes.worker_nodes if n.node_id in where.values())
        victim = next(index for index, node in where.items() if node == gone.node_id)
        version = status(addresses)["weights"]["version"]
        nodes.remove_node(gone, allow_graceful=False)
        left = {f"runner-{index}" for index in where} - {f"runner-{victim}"}
        until(
            lambda: algorithm.train() and {name.partition("@")[0] for name in serving(addresses)} == left,
            "the others serve", PATIENCE_S,
        )  # fmt: skip
        until(lambda: algorithm.train() and status(addresses)["weights"]["version"] > version + 3, "it goes on")
        admin.scale(addresses["admin"], 2)
        until(
            lambda: algorithm.train() and algorithm.env_runner_group.num_remote_env_runners() == 2,
            "the one without a node has left", PATIENCE_S,
        )  # fmt: skip
        assert victim not in places(algorithm)
        node = nodes.add_node(num_cpus=1)
        admin.scale(addresses["admin"], 3)
        until(lambda: algorithm.train() and len(serving(addresses)) == 3, "there are three again", PATIENCE_S)
        assert node.node_id in places(algorithm).values()
        version = status(addresses)["weights"]["version"]
        until(lambda: algorithm.train() and status(addresses)["weights"]["version"] > version + 3, "and it goes on")
    ledger = status(addresses)["ledger"]
    assert balanced(ledger) and set(ledger["dropped"]) <= {"stale", "handover_cut"}
    built.pop().stop()
