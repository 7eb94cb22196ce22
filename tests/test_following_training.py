"""Connectors that need more of an episode than a request brings: real runners follow real simulators' episodes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import cue_env
import gymnasium as gym
import numpy as np
import pytest
import secrets_env
import small_dqn
from fake_training import broker
from processes import REAL_RAY, balanced, status, until
from ray import cloudpickle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import MeanStdFilter
from ray.rllib.connectors.env_to_module.observation_preprocessor import SingleAgentObservationPreprocessor
from small_ppo import ppo
from test_agents_training import build, simulators
from test_training_remote import learns

from broker.server import Server

pytestmark = REAL_RAY

for module in (sys.modules[__name__], secrets_env):
    cloudpickle.register_pickle_by_value(module)  # Ray's workers can't import what is beside a test


class Remembers(SingleAgentObservationPreprocessor):
    """Keeps each episode's first observation in itself, and adds some noise to it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._first: dict[str, Any] = {}
        self._random = np.random.default_rng()

    def preprocess(self, observation: Any, episode: Any) -> Any:
        first = self._first.setdefault(episode.id_, observation)
        return np.array([first[0] + self._random.normal(0.0, 0.05), observation[1]], np.float32)


def cued(config: Any, *pieces: Any) -> Any:
    observation_space, action_space = cue_env.SPACES
    return config.environment(None, observation_space=observation_space, action_space=action_space).env_runners(
        env_to_module_connector=lambda *_: [piece() for piece in pieces]
    )


def test_what_only_the_whole_episode_tells_is_learned(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """The first observation tells what to do; a filter in front of the piece that remembers it learns, too."""
    config = cued(ppo(batch=500), MeanStdFilter, Remembers).training(lr=5e-3, num_epochs=6, gamma=0.0)
    learns(config, "cue_env:Cue-v0", addresses, built, above=27.0, within=100)
    (algorithm,) = built
    assert balanced(status(addresses)["ledger"])
    lifetime = algorithm.metrics.peek(("env_runners", "num_env_steps_sampled_lifetime"))
    learned = algorithm.env_runner_group.foreach_env_runner(pushes, local_env_runner=False)
    assert min(learned) >= 0.8 * lifetime, "what all runners' filters have learned is merged, as RLlib does"


def pushes(runner: Any) -> int:
    """How many observations a runner's filter has seen."""
    return int(runner.connectors()["env_to_module_connector"]["MeanStdFilter"][None]["running_stats"][0]["num_pushes"])


@pytest.fixture
def server() -> Iterator[Server]:
    with broker() as running:
        yield running


def shared() -> PPOConfig:
    spaces = (dict.fromkeys(secrets_env.AGENTS, space) for space in (secrets_env.SEES, secrets_env.DOES))
    observations, actions = (gym.spaces.Dict(each) for each in spaces)  # type: ignore[arg-type]
    return (
        PPOConfig()
        .environment(observation_space=observations, action_space=actions)
        .multi_agent(policies={"of_a", "of_b"}, policy_mapping_fn=lambda agent, *_, **__: f"of_{agent}")
        .env_runners(num_env_runners=2, env_to_module_connector=lambda *_: secrets_env.Shares())
        .training(train_batch_size_per_learner=400, minibatch_size=100, num_epochs=6, lr=5e-3, gamma=0.0)
        .rl_module(model_config={"fcnet_hiddens": [16]})
    )


def test_agents_learn_from_what_others_see(cluster: None, server: Server, built: list[Algorithm]) -> None:
    """Each is told what the other one is to do. A runner that is killed takes the episodes along that it followed, and
    the simulators begin other ones."""
    with simulators(server, *[secrets_env.Secrets] * 4, inference="remote"):
        algorithm = build(shared(), server)
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
        pids = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
        os.kill(pids[0], signal.SIGKILL)

        def learned() -> bool:
            results.append(algorithm.train())
            return bool(min(results[-1]["env_runners"]["agent_episode_returns_mean"].values()) > 18.0)

        until(learned, "both agents get 18 of 20", 150)
    ledger = results[-1]["rllink"]["ledger"]
    assert balanced(ledger) and not ledger["dropped"].keys() - {"stale", "handover_cut"}


@pytest.mark.long
def test_a_replay_buffer_gets_what_the_policy_saw(addresses: dict[str, str], built: list[Algorithm]) -> None:
    config = cued(small_dqn.dqn(), Remembers).training(lr=1e-3, gamma=0.0)
    learns(config, "cue_env:Cue-v0", addresses, built, above=26.0, within=200)
