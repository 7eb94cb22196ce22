"""Which spaces RLlib's own models train, with which algorithms they may remember, and why not the others: told before a
training is built, a space with the part's name.

Where RLlib's own runner raises an error for a space, deep inside of its build or with its first sample, or gives the
environment what doesn't belong into its action space, this says so in words. `tests/test_spaces_table.py` holds each of
these rules against RLlib. A model or connectors of the user's own may do what RLlib's can't, and aren't judged here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.algorithms.sac.sac import SACConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

from rllink_zmq.errors import PolicyError, SettingsError, SpaceError
from rllink_zmq.packing import children
from rllink_zmq.rllib.export_connectors import agents_flattening, pieces

logger = logging.getLogger("rllink_zmq")

NO_MEMORY_OF_AGENTS = (
    "RLlib's replay buffers of several agents draw single steps without what was remembered before them: leave "
    "use_lstm out, or train with PPO, APPO or IMPALA"
)

NO_MEMORY_IN_SAC = (
    "RLlib's SAC knows no memory (with use_lstm its own runner can't act): leave it out, or train with DQN, PPO, APPO "
    "or IMPALA"
)

FLATTEN = (
    "add RLlib's FlattenObservations: config.env_runners(env_to_module_connector=lambda env, spaces, device: "
    "FlattenObservations()), with multi_agent=True where there are several agents"
)


def check_trainable(config: AlgorithmConfig) -> None:
    """Raises `SpaceError`, with the part's name, for spaces in `config` that RLlib's own models can't be trained on;
    with the agent's, where there are several, and `SettingsError` for connectors that don't go with them."""
    observations, actions = config.observation_space, config.action_space
    made = config._env_to_module_connector
    _check_to_env(config)
    if config.is_multi_agent:
        try:
            flattenings = agents_flattening(config)
        except PolicyError as error:
            raise SettingsError(str(error)) from None
        as_they_are = made is None or flattenings is not None
        for agent in observations.spaces if config._rl_module_spec is None else ():
            try:
                flattens = agent in (flattenings or {})
                _check(config, observations[agent], actions[agent], as_they_are, flattens)
            except SpaceError as error:
                raise SpaceError(f"agent {agent!r}: {error}") from None
        return
    if config._rl_module_spec is not None:
        return
    flattens = False
    if made is not None:
        spaces = {INPUT_ENV_SINGLE_SPACES: (observations, actions)}
        flattens = pieces(made, (None, spaces, None)) == "FlattenObservations"
    _check(config, observations, actions, made is None or flattens, flattens)


def _check_to_env(config: AlgorithmConfig) -> None:
    """Raises `SettingsError` for module-to-env pieces that can't be made where there is no environment."""
    make = config._module_to_env_connector
    if make is None:
        return
    spaces = {INPUT_ENV_SINGLE_SPACES: (config.observation_space, config.action_space)}
    try:
        config.build_module_to_env_connector(env=None, spaces=spaces)
    except Exception as error:  # the user's function
        made = pieces(make, (None, spaces))
        raise SettingsError(
            f"config.env_runners(module_to_env_connector=...) adds {made}, which can't be built where there is no "
            f"environment: {type(error).__name__}: {error}"
        ) from error


def _check(
    config: AlgorithmConfig, observations: gym.Space[Any], actions: gym.Space[Any], as_they_are: bool, flattens: bool
) -> None:
    """`as_they_are`: nothing but FlattenObservations is before the module, if it `flattens`."""
    if as_they_are:
        reason = flattened_misfit(observations) if flattens else observation_misfit(observations)
        if reason:
            raise SpaceError(f"RLlib can't train on these observations: {reason}")
    if isinstance(config, DQNConfig) and not isinstance(actions, gym.spaces.Discrete):
        raise SpaceError(
            f"DQN has a value for each of a Discrete's actions, and these are {_short(actions)}: give the environment "
            f"Discrete actions, or train with PPO{' or SAC' * isinstance(actions, gym.spaces.Box)}"
        )
    if reason := action_misfit(actions):
        raise SpaceError(f"RLlib can't train such actions: {reason}")


def check_memory(config: AlgorithmConfig) -> None:
    """Raises `SettingsError` for a memory (`use_lstm`) that RLlib can't train with a replay buffer, and logs a warning
    where it trains, but as if each step began an episode."""
    model = _model_config(config)
    if not isinstance(config, DQNConfig | SACConfig) or not model.get("use_lstm"):
        return
    if isinstance(config, SACConfig):
        raise SettingsError(f"use_lstm: {NO_MEMORY_IN_SAC}")
    if config.is_multi_agent:
        raise SettingsError(f"use_lstm: {NO_MEMORY_OF_AGENTS}")
    if config.num_atoms > 1:
        raise SettingsError(
            f"use_lstm: RLlib's learner of DQN raises for distributions of Q-values (num_atoms={config.num_atoms}) of "
            f"sequences: use num_atoms=1"
        )
    buffer = (config.replay_buffer_config or {}).get("type")
    named = getattr(buffer, "__name__", str(buffer)).rpartition(".")[2]
    if "Prioritized" in named or not model.get("max_seq_len"):
        logger.warning(
            "use_lstm: simulators remember, but what RLlib draws from this replay buffer are single steps without "
            "their memory, and it trains as if each began an episode. Sequences are drawn with config.training("
            "replay_buffer_config={'type': 'EpisodeReplayBuffer', 'capacity': ...}) and 'max_seq_len' in the "
            "model_config; here these are %s and %s",
            named, model.get("max_seq_len"),
        )  # fmt: skip
    elif config.n_step != 1:
        raise SettingsError(
            f"use_lstm: RLlib's replay buffer draws sequences with n_step=1 alone, and it is {config.n_step}"
        )


def _model_config(config: AlgorithmConfig) -> Any:
    """Of the config, or of its single spec."""
    spec = config._rl_module_spec
    told = spec.model_config if isinstance(spec, RLModuleSpec) else None
    found = told if told is not None else config.model_config or {}
    return dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found  # type: ignore[arg-type]


def observation_misfit(space: gym.Space[Any]) -> str:
    """Why RLlib's models can't take observations of this space as they are; '' if they can."""
    if not isinstance(space, gym.spaces.Box):
        return f"its models take a Box, not {_short(space)}: {FLATTEN}"
    if len(space.shape) not in (1, 3):
        shape = list(space.shape)
        return f"its models take a Box of one dimension, or of three for images, not of shape {shape}: {FLATTEN}"
    if len(space.shape) == 3 and np.dtype(space.dtype) == np.uint8:
        return (
            "its models take floats, and bytes reach them as they are: give config.rl_module a module that makes "
            "floats of pixels, as examples/pixels.py has one, or have the environment give float32, four times as much"
        )
    if np.dtype(space.dtype) not in (np.float32, np.float64):
        return (
            f"its models take floats, and {np.dtype(space.dtype)} reaches them as it is: have the environment give "
            f"float32 (a gymnasium wrapper), or {FLATTEN}"
        )
    return ""


def flattened_misfit(space: gym.Space[Any]) -> str:
    """Why RLlib's FlattenObservations can't take observations of this space; '' if it can."""
    for name, part in _parts(space, "obs"):
        if isinstance(part, gym.spaces.Discrete | gym.spaces.MultiDiscrete) and np.any(part.start):
            return (
                f"FlattenObservations counts the values of {name} from 0, and {_short(part)} starts elsewhere: "
                f"have the environment count from 0"
            )
    return ""


def action_misfit(space: gym.Space[Any]) -> str:
    """Why RLlib's distributions can't act in this space; '' if they can."""
    for name, part in _parts(space, "action"):
        if not isinstance(part, gym.spaces.Box):
            continue
        if np.dtype(part.dtype).kind != "f":
            return f"{name} is a Box of {np.dtype(part.dtype)}, and its distributions are of floats: use MultiDiscrete"
        if not all(part.shape):
            return f"{name} is a Box of shape {list(part.shape)}, which holds nothing: leave it out"
        if len(part.shape) != 1:
            return (
                f"{name} is a Box of shape {list(part.shape)}, and its distribution has one dimension: have the "
                f"environment reshape it"
            )
    return ""


def _parts(space: gym.Space[Any], name: str) -> Iterator[tuple[str, gym.Space[Any]]]:
    if not isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        yield name, space
        return
    for key, inner in children(space):
        yield from _parts(inner, f"{name}[{key!r}]")


def _short(space: gym.Space[Any]) -> str:
    said = str(space)
    return said if len(said) <= 60 else type(space).__name__
