"""Modules that act, and the package's own service around one. Imports ray and torch: for processes that answer."""

from __future__ import annotations

import os
import time
from math import inf
from multiprocessing.connection import Connection as Pipe
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from broker_load import RUN, trainer_hello
from learning import ppo
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch import TorchRLModule

from rllink_zmq.policy import unpack_policy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.rllib.service import ActService
from rllink_zmq.session import State
from rllink_zmq.session_runner import RunnerSession, TrainerSession
from rllink_zmq.transport import Connection
from rllink_zmq.transport_thread import ConnectionThread


class SmallCNN(TorchRLModule):
    """Images of bytes, which RLlib's own modules don't take: two convolutions and a layer of 64."""

    def setup(self) -> None:
        self._layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, 8, 8, 4), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 4, 4), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(400, 64), torch.nn.ReLU(), torch.nn.Linear(64, 6),
        )  # fmt: skip

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        pixels = batch[Columns.OBS].permute(0, 3, 1, 2).float() * (1.0 / 255.0)
        return {Columns.ACTION_DIST_INPUTS: self._layers(pixels)}

    def get_exploration_action_dist_cls(self) -> Any:
        return TorchCategorical

    get_inference_action_dist_cls = get_exploration_action_dist_cls


def module_of(what: str) -> tuple[RLModule, gym.Space[Any], gym.Space[Any]]:
    """RLlib's default network of 256x256 for CartPole's vectors, or a small CNN for images; its spaces."""
    if what == "vector":
        observations: gym.Space[Any] = gym.spaces.Box(-inf, inf, (4,), np.float32)
        actions: gym.Space[Any] = gym.spaces.Discrete(2)
        config = ppo(4000).environment(observation_space=observations, action_space=actions)
        made: RLModule = config.get_rl_module_spec(
            spaces={DEFAULT_MODULE_ID: (observations, actions)}, inference_only=True
        ).build()
    else:
        observations, actions = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8), gym.spaces.Discrete(6)
        made = SmallCNN(observation_space=observations, action_space=actions, inference_only=True, model_config={})
    return made, observations, actions


def actor(what: str) -> ModuleActor:
    """A module with weights that acts."""
    torch.set_num_threads(1)
    module, observations, actions = module_of(what)
    manifest = unpack_policy(export_policy(module, observations, actions))[0]
    made = ModuleActor(module, manifest, actions, True, False)
    made.apply(0, weights_body(manifest, module.get_state()))
    return made


def service(connection: Pipe, backend: str, what: str) -> None:
    """A trainer, a runner that offers weights, and the service, at a broker."""
    made = actor(what)
    body = bytes(made.manifest.weights_bytes)
    trainer = TrainerSession(os.urandom(16), trainer_hello(), b"-")
    runner = RunnerSession(os.urandom(16), RUN)
    threads = [ConnectionThread(Connection(s, backend), lambda _: inf, "benchmark") for s in (trainer, runner)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 30
    while State.GREETING in (trainer.state, runner.state) and time.monotonic() < until:
        time.sleep(0.01)
    threads[1].call(lambda now: runner.offer(1, len(body), lambda: body, now))
    acting = ActService(backend, RUN, "benchmark", made)
    while made.version < 1 and time.monotonic() < until:
        time.sleep(0.01)
    connection.send("ready")
    try:
        connection.recv()
    except EOFError:
        acting.stop()
        for thread in threads:
            thread.stop()


class RayActor:
    """The same module as a Ray actor: one call, one action."""

    def __init__(self, what: str) -> None:
        self._actor = actor(what)

    def act(self, rows: Any) -> dict[str, Any]:
        return self._actor.act(rows.copy(), True)
