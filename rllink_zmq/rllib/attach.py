"""`attach(config, broker)`: the one line that turns an AlgorithmConfig to simulators behind a broker.

What it sets, and why; all of it the user's to override, before (values that differ from RLlib's default are kept) or
after (but `callbacks(...)` and `learners(learner_connector=...)` must come before, since they replace):

=====================================  ==========================================================================
`env_runner_cls`                       `ZmqEnvRunner`, or `ZmqMultiAgentEnvRunner`
`observation_space`, `action_space`    from the config, else of its env, else of the first simulator
`callbacks_class`                      the user's, and `TrainerCallback`
`sample_timeout_s`                     10 instead of 60: with no simulator `train()` comes back after this long
`num_cpus_per_env_runner`              0.1 instead of 1: a runner only decodes
`env_runner_health_probe_timeout_s`    0.2 instead of 30: all training waits for it after a runner was lost
`max_requests_in_flight_per_learner`   raised (APPO, IMPALA): past it RLlib drops batches that simulators were told
                                       are delivered
`learner_connector`                    with `audit`: a piece that logs what enters train batches, then the user's
=====================================  ==========================================================================
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllink_zmq import __version__
from rllink_zmq.audit import check_directory
from rllink_zmq.errors import ConnectionTimeout, SettingsError
from rllink_zmq.fragments import layout_of_spaces
from rllink_zmq.rllib.audit import audited
from rllink_zmq.rllib.evaluation import check_evaluation
from rllink_zmq.rllib.multi_agent_policies import check_agents, check_multi_agent, dict_of_agents, spaces_of_agents
from rllink_zmq.rllib.multi_agent_runner import ZmqMultiAgentEnvRunner
from rllink_zmq.rllib.runner import ZmqEnvRunner
from rllink_zmq.rllib.settings import KEY, LinkSettings, style_of, trainer_terms
from rllink_zmq.rllib.trainable import check_memory, check_trainable
from rllink_zmq.rllib.trainer import TrainerCallback
from rllink_zmq.session_runner import ObserverSession
from rllink_zmq.spaces import agents_from_wire, from_wire, spaces_to_wire
from rllink_zmq.transport import Connection, parse_address

logger = logging.getLogger("rllink_zmq")

C = TypeVar("C", bound=AlgorithmConfig)

SAY_EVERY = 5.0
DEFAULT_BROKER = "tcp://127.0.0.1:5556"


def attach(
    config: C,
    broker: str = DEFAULT_BROKER,
    *,
    lag_limit: int = 0,
    steps_ahead: int = 0,
    fragment_steps: int = 0,
    runner_timeout_s: float = 0.0,
    act_rows: int = 0,
    act_wait_s: float = 0.0,
    evaluation_share: float = 0.0,
    spaces_timeout: float | None = None,
    audit: str | os.PathLike[str] | None = None,
) -> C:
    """Have `config`'s samples come from the simulators behind the broker whose backend is at `broker`.

    Changes and returns `config`. `lag_limit` (learner updates), `steps_ahead`, `fragment_steps` (env steps),
    `runner_timeout_s`, `act_rows`, `act_wait_s` (the action service), `evaluation_share` (of the simulators that serve
    RLlib's evaluation): see `LinkSettings`; 0 = the default. A config
    without an env and without spaces takes the spaces of the first simulator: that waits up to `spaces_timeout` seconds
    (None = for ever, saying so every 5 s).
    `audit`: a directory in which runners and learners log each fragment, on their own hosts, for `rllink-zmq audit`.

    Raises `SettingsError` for an algorithm, a setting or an address that can't be used, `SpaceError` for spaces that
    can't travel, or that RLlib's own models can't be trained on, `ConnectionTimeout` when no simulator came in time.
    """
    parse_address(broker)
    style = style_of(config)
    _refuse_unsupported(config)
    folder = "" if audit is None else str(Path(audit).expanduser().absolute())
    if folder and style == "exact":
        raise SettingsError(
            "audit: a replay buffer trains on a step as often as it draws it, and an audit proves that each was "
            "trained on once: it is for PPO, APPO and IMPALA"
        )
    if folder:
        check_directory(Path(folder))
    settings = LinkSettings(
        broker,
        lag_limit=lag_limit,
        steps_ahead=steps_ahead,
        fragment_steps=fragment_steps,
        runner_timeout_s=runner_timeout_s,
        act_rows=act_rows,
        act_wait_s=act_wait_s,
        evaluation_share=evaluation_share,
        audit=folder,
    )
    config.environment(env_config={KEY: settings.as_dict()})
    trainer_terms(config)
    observation_space, action_space = _spaces(config, broker, spaces_timeout)
    if config.is_multi_agent:
        check_agents(observation_space, action_space)
    else:
        spaces_to_wire(observation_space, action_space), layout_of_spaces(observation_space, action_space)
    config.environment(observation_space=observation_space, action_space=action_space)
    check_trainable(config)
    check_memory(config)
    config.env_runners(env_runner_cls=ZmqMultiAgentEnvRunner if config.is_multi_agent else ZmqEnvRunner)
    config.learners(learner_connector=audited(config._learner_connector, folder))
    callbacks = config.callbacks_class
    mine = list(callbacks) if isinstance(callbacks, list | tuple) else [callbacks]
    if TrainerCallback not in mine:
        config.callbacks(callbacks_class=[*mine, TrainerCallback])
    defaults = type(config)()
    _prefer(config, defaults, "sample_timeout_s", 10.0)
    _prefer(config, defaults, "num_cpus_per_env_runner", 0.1)
    _prefer(config, defaults, "env_runner_health_probe_timeout_s", 0.2)
    if style == "stream":
        _prefer(config, defaults, "max_requests_in_flight_per_learner", 100)
    return config


def _prefer(config: AlgorithmConfig, defaults: AlgorithmConfig, name: str, value: Any) -> None:
    """Our value, unless the user has chosen one."""
    if getattr(config, name) == getattr(defaults, name):
        setattr(config, name, value)


def _refuse_unsupported(config: AlgorithmConfig) -> None:
    if not (config.enable_rl_module_and_learner and config.enable_env_runner_and_connector_v2):
        raise SettingsError("rllink-zmq needs RLlib's new API stack: remove config.api_stack(...=False)")
    if config.is_multi_agent:
        check_multi_agent(config)
    check_evaluation(config)
    if config.batch_mode != "truncate_episodes":
        raise SettingsError(
            f"batch_mode={config.batch_mode!r}: simulators send fragments as they come; use 'truncate_episodes'"
        )


def _spaces(config: AlgorithmConfig, broker: str, timeout: float | None) -> tuple[gym.Space[Any], gym.Space[Any]]:
    if config.observation_space is not None and config.action_space is not None:
        return config.observation_space, config.action_space
    if config.env is not None:
        return _spaces_of_env(config)
    return first_simulator_spaces(broker, timeout)


def _spaces_of_env(config: AlgorithmConfig) -> tuple[gym.Space[Any], gym.Space[Any]]:
    own = {k: v for k, v in config.env_config.items() if k != KEY}
    try:
        if isinstance(config.env, str):
            from ray.tune.registry import ENV_CREATOR, _global_registry

            registered = _global_registry.contains(ENV_CREATOR, config.env)
            env = _global_registry.get(ENV_CREATOR, config.env)(own) if registered else gym.make(config.env, **own)
        else:
            env = config.env(own)
    except gym.error.Error as e:
        raise SettingsError(
            f"the environment {config.env!r} can't be made here: {e}. Give its spaces instead "
            f"(config.environment(observation_space=..., action_space=...)), or no env at all: then they "
            f"are taken from the first simulator"
        ) from e
    try:
        if config.is_multi_agent:
            return spaces_of_agents(env)
        return env.observation_space, env.action_space
    finally:
        env.close()


def first_simulator_spaces(broker: str, timeout: float | None = None) -> tuple[gym.Space[Any], gym.Space[Any]]:
    """The spaces of the first simulator that connects. Raises `ConnectionTimeout` after `timeout` seconds."""
    session = ObserverSession(secrets.token_bytes(16), name="spaces", package=__version__)
    connection = Connection(session, broker)
    connection.open()
    try:
        waited = 0.0
        while not connection.until(
            lambda: session.spaces is not None, wait := min(SAY_EVERY, (timeout or math.inf) - waited)
        ):
            waited += wait
            if session.epoch:
                what = (
                    f"0 simulators are connected to the broker at {broker}: start one (rllink-zmq simulate --env ...)"
                )
            else:
                what = f"no answer from a broker at {broker}: is `rllink-zmq broker` running there?"
            if timeout is not None and waited >= timeout:
                raise ConnectionTimeout(f"no spaces after {waited:.0f} s: {what}")
            logger.warning("waiting for the first simulator's spaces (%.0f s): %s", waited, what)
        assert session.spaces is not None
        if session.spaces.agents:
            return tuple(map(dict_of_agents, agents_from_wire(session.spaces)))  # type: ignore[return-value]
        return from_wire(session.spaces.observation), from_wire(session.spaces.action)
    finally:
        connection.close()


__all__ = ["attach", "first_simulator_spaces"]
