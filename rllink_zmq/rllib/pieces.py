"""The connector pieces that a config adds to RLlib's own, and what they keep."""

from __future__ import annotations

import traceback
from itertools import takewhile
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.common.agent_to_module_mapping import AgentToModuleMapping
from ray.rllib.connectors.connector_pipeline_v2 import ConnectorPipelineV2
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES

from rllink_zmq.errors import PolicyError
from rllink_zmq.messages import AgentId
from rllink_zmq.rllib.states import to_bytes


def has_own_connectors(config: AlgorithmConfig) -> bool:
    """Whether `config` changes RLlib's default pipelines."""
    return (
        config._env_to_module_connector is not None
        or config._module_to_env_connector is not None
        or not config.add_default_connectors_to_env_to_module_pipeline
        or not config.add_default_connectors_to_module_to_env_pipeline
    )


def pipeline_of(config: AlgorithmConfig) -> ConnectorV2:
    """An env-to-module pipeline of `config`, of its own state. Raises whatever a user's pieces do."""
    spaces = dict.fromkeys((INPUT_ENV_SPACES, INPUT_ENV_SINGLE_SPACES), (config.observation_space, config.action_space))
    pipeline: ConnectorV2 = config.build_env_to_module_connector(env=None, spaces=spaces)
    return pipeline


def own_pieces(config: AlgorithmConfig) -> list[ConnectorV2]:
    """The env-to-module pieces that the config adds. Raises whatever they do."""
    pipeline: Any = pipeline_of(config)
    return list(pipeline.connectors[: count_own(config, pipeline)])


def seen_spaces(config: AlgorithmConfig) -> dict[AgentId, gym.Space[Any]]:
    """What modules are given of each agent's observations, behind the pieces that the config adds."""
    made = own_pieces(config) if config._env_to_module_connector is not None else []
    pieces = list(takewhile(lambda piece: not isinstance(piece, AgentToModuleMapping), made))
    spaces: dict[AgentId, gym.Space[Any]] = dict(config.observation_space.spaces)
    return spaces | dict(pieces[-1].observation_space.spaces) if pieces else spaces


def count_own(config: AlgorithmConfig, pipeline: Any) -> int:
    """How many pieces at the beginning of the pipeline are the user's."""
    plain = config.copy(copy_frozen=False)
    plain._env_to_module_connector = None
    by_default: Any = pipeline_of(plain)
    return len(pipeline.connectors) - len(by_default.connectors)


def cant_act(who: str, error: Exception) -> PolicyError:
    """What to raise where an action can't be had of `who`, with the piece that has failed."""
    told = f"{type(error).__name__}: {error}"
    return PolicyError(f"{who} can't act behind the configured connectors{raised_in(error)}: {told}")


def raised_in(error: BaseException) -> str:
    """Which piece has raised it, in words; '' if none has."""
    called = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    raised = [one for one in called if isinstance(one, ConnectorV2) and not isinstance(one, ConnectorPipelineV2)]
    return f", in the piece {type(raised[-1]).__name__}" if raised else ""


def is_own(piece: ConnectorV2) -> bool:
    return not type(piece).__module__.startswith("ray.rllib.")


def state_of(pipeline: ConnectorV2) -> dict[str, Any]:
    """The state of those of a pipeline's pieces that have any, by their names."""
    return {name: inner for name, inner in pipeline.get_state().items() if inner}


def state_bytes(pipeline: ConnectorV2) -> bytes:
    """The state of a pipeline's pieces, to travel; b'' where they have none. Raises `PolicyError`."""
    state = state_of(pipeline)
    return to_bytes(state) if state else b""
