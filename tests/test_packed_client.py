"""Observations and actions of several parts through a real broker: acting here, as a vector, and by the service."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
import tree
from fake_training import RUNS, Training, broker, training, until
from parted_env import ACTIONS, OBSERVATIONS, STEPS, Parted
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core import DEFAULT_MODULE_ID

from broker.server import Server
from rllink_zmq import connect
from rllink_zmq.drive_loops import drive
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.fragments import layout_of_spaces
from rllink_zmq.policy import unpack_policy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.export_connectors import own_flattening
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.service import ActService

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LAYOUT = layout_of_spaces(OBSERVATIONS, ACTIONS)


class Policies:
    """A flattening config's policy, its weights, and an actor of it."""

    def __init__(self) -> None:
        config = PPOConfig().environment(observation_space=OBSERVATIONS, action_space=ACTIONS)
        config.env_runners(env_to_module_connector=lambda env, spaces, device: FlattenObservations())
        config.rl_module(model_config={"fcnet_hiddens": [8]})
        torch.manual_seed(0)
        spaces = {DEFAULT_MODULE_ID: (Pipelines(config).to_module.observation_space, ACTIONS)}
        module = config.get_rl_module_spec(spaces=spaces, inference_only=True).build()
        self.blob = policy_of(config, module)
        manifest = unpack_policy(self.blob)[0]
        self.body = weights_body(manifest, module.get_state())
        self.actor = ModuleActor(module, manifest, ACTIONS, True, False, flattening=own_flattening(config))


@pytest.fixture(scope="module")
def policies() -> Policies:
    return Policies()


@pytest.fixture
def world(policies: Policies) -> Iterator[tuple[Server, Training]]:
    spaces: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
    with broker() as server, training(server, body=policies.body, blob=policies.blob, **spaces) as fake:
        yield server, fake


def check(fake: Training, steps: int) -> None:
    """All that was done has arrived, and is what the environment may be given, but for its Boxes' bounds."""
    until(lambda: fake.steps >= steps, "all steps are taken")
    assert LAYOUT.actions is not None and LAYOUT.packing is not None
    for header, arrays in fake.taken:
        assert arrays["obs"].shape == (header.steps + 1, LAYOUT.packing.nbytes)
        (arm, switches, pick) = LAYOUT.actions.arrays(arrays["actions"].view(np.uint8))
        assert arm.dtype == np.float32 and np.isfinite(arm).all()
        assert set(np.unique(switches)) <= {0, 1} and set(np.unique(pick)) <= {0, 1, 2}
        assert len(arrays["action_dist_inputs"][0]) == 2 + 4 + 3


@pytest.mark.parametrize("inference", ["local", "remote"])
@pytest.mark.parametrize("count", [1, 3])
def test_simulators_act_in_all_parts(
    world: tuple[Server, Training], policies: Policies, inference: Any, count: int
) -> None:
    server, fake = world
    service = None
    if inference == "remote":
        service = ActService(server.backend, RUNS[0], "service", policies.actor)
    spaces: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
    try:
        with connect(server.frontend, inference=inference, episodes=count, **spaces) as client:
            if count == 1:
                summary = drive(client, Parted(), episodes=3, seed=1)
            else:
                summary = drive_vector(client, gym.vector.SyncVectorEnv([Parted] * count), episodes=6, seed=1)
        assert summary.episodes >= 3 and summary.steps >= 3 * STEPS
        check(fake, 3 * STEPS)
    finally:
        if service is not None:
            service.stop()


def test_an_action_of_ones_own_is_the_structure(world: tuple[Server, Training]) -> None:
    server, fake = world
    spaces: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
    env = Parted()
    seen, _ = env.reset(seed=1)
    with connect(server.frontend, **spaces) as client:
        episode = client.start_episode()
        action = {"pick": 2, "body": (np.float32([0.5]), np.array([1, 0]))}
        episode.log_action(seen, action, -1.5)
        episode.log_returns(1.0)
        episode.end_episode(env.step(action)[0])
    until(lambda: fake.steps == 1, "the step is taken")
    assert LAYOUT.actions is not None
    found = LAYOUT.actions.unpack(fake.taken[0][1]["actions"].view(np.uint8))
    for mine, its in zip(tree.flatten(found), tree.flatten(action), strict=True):
        np.testing.assert_array_equal(mine[0], its)
