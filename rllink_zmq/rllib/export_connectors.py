"""Which connectors of a config the exported policy does itself, and which it can't hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES

from rllink_zmq.errors import PolicyError
from rllink_zmq.messages import AgentId
from rllink_zmq.rllib.export_actions import REMOTE
from rllink_zmq.rllib.flattening import Flattening, agents_flattening_of, flattening_of
from rllink_zmq.rllib.pieces import own_pieces


def check_connectors(config: AlgorithmConfig) -> Flattening | None:
    """What the graph has to do before the module: flatten observations, or nothing. Raises PolicyError, naming the
    pieces, if `config` changes RLlib's default env-to-module or module-to-env connectors in any other way: the graph
    does what the default ones do, and a simulator has no other."""
    flattening = own_flattening(config)
    _check_settings(config, flattening is not None)
    return flattening


def check_agents_connectors(config: AlgorithmConfig) -> dict[AgentId, Flattening]:
    """`check_connectors` of a config with several agents: whose observations are flattened."""
    flattenings = agents_flattening(config)
    _check_settings(config, flattenings is not None)
    return flattenings or {}


def _check_settings(config: AlgorithmConfig, flattens: bool) -> None:
    instead = f"or {REMOTE}"
    for setting, make, arguments, defaults in (
        (
            "env_to_module_connector",
            config._env_to_module_connector,
            _arguments(config),
            config.add_default_connectors_to_env_to_module_pipeline,
        ),
        (
            "module_to_env_connector",
            config._module_to_env_connector,
            _arguments(config)[:2],
            config.add_default_connectors_to_module_to_env_pipeline,
        ),
    ):
        if make is not None and not (flattens and setting == "env_to_module_connector"):
            raise PolicyError(
                f"config.env_runners({setting}=...) adds {pieces(make, arguments)}, which the exported policy can't "
                f"hold: do its work in the environment (a gymnasium wrapper) or in the RLModule, {instead}"
            )
        if not defaults:
            raise PolicyError(
                f"config.env_runners(add_default_connectors_to_{setting.removesuffix('_connector')}_pipeline=False) "
                f"takes away what the exported policy does: leave it True, {instead}"
            )


def _arguments(config: AlgorithmConfig) -> tuple[Any, ...]:
    """With which RLlib calls a connector setting where it has no environment."""
    return None, {INPUT_ENV_SINGLE_SPACES: (config.observation_space, config.action_space)}, None


def own_flattening(config: AlgorithmConfig) -> Flattening | None:
    """RLlib's FlattenObservations, if it is all that the config puts before the module."""
    if config._env_to_module_connector is None:
        return None
    try:
        found = own_pieces(config)
    except Exception:  # a user's function, that may well need an env: what it makes isn't known
        return None
    return flattening_of(found, config.observation_space)


def agents_flattening(config: AlgorithmConfig) -> dict[AgentId, Flattening] | None:
    """RLlib's FlattenObservations(multi_agent=True), if it is all that the config puts before the modules: what it does
    for each agent whose observations it changes. Raises PolicyError where RLlib can't build its pipeline without an
    environment."""
    if config._env_to_module_connector is None:
        return None
    try:
        found = own_pieces(config)
        for piece in found:
            piece.get_state()  # which one that was made for a single agent can't tell
    except Exception as error:  # a user's function, or spaces that don't go together
        made = pieces(config._env_to_module_connector, _arguments(config))
        raise PolicyError(
            f"config.env_runners(env_to_module_connector=...) adds {made}, which can't be built for these agents "
            f"(RLlib's own pieces take multi_agent=True): {type(error).__name__}: {error}"
        ) from error
    return agents_flattening_of(found, dict(config.observation_space.spaces))


def pieces(make: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """What a connector setting makes, for a message: the pieces' classes, or else the function's own name."""
    try:
        made = make(*arguments)
    except Exception:  # a user's function, that may well need an env: its name will do
        return getattr(make, "__qualname__", None) or repr(make)
    return ", ".join(type(piece).__name__ for piece in (made if isinstance(made, (list, tuple)) else [made]))
