"""The policy of a training, as simulators are told of it: exported, so that they can run it; or, where that can't be,
for runners alone, which simulators ask for actions."""

from __future__ import annotations

import logging
from typing import Any

import gymnasium as gym
import msgspec
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.sac.sac import SACConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch import TorchRLModule

from rllink_zmq.errors import PolicyError, SettingsError
from rllink_zmq.fragments import layout_of_spaces
from rllink_zmq.policy import PolicyManifest, Tensor, Weight, pack_policy
from rllink_zmq.rllib.export import OPSET, export_policy
from rllink_zmq.rllib.export_connectors import check_connectors
from rllink_zmq.rllib.following import lookback_of, try_following
from rllink_zmq.rllib.pieces import pipeline_of
from rllink_zmq.rllib.pipelines import NeedsEpisode, Pipelines
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.rllib.settings import explores
from rllink_zmq.rllib.trainable import NO_MEMORY_IN_SAC
from rllink_zmq.spaces import to_wire

logger = logging.getLogger("rllink_zmq")


def policy_of(config: AlgorithmConfig, module: RLModule) -> bytes:
    """The blob of `module` behind the connectors of `config`. Where it can't be exported a warning says why, and that
    simulators have to ask. Raises `PolicyError` for what runners can't act by either, `SettingsError` for settings that
    a filter can't do with, and for a memory where the algorithm has none."""
    if isinstance(config, SACConfig) and module.is_stateful():
        raise SettingsError(f"{type(module).__name__} has a memory. {NO_MEMORY_IN_SAC}")
    try:
        flattening = check_connectors(config)
        return export_policy(
            module,
            config.observation_space,
            config.action_space,
            normalize_actions=bool(config.normalize_actions),
            clip_actions=bool(config.clip_actions),
            explores=explores(config)[0],
            evaluation_explores=explores(config)[1],
            flattening=flattening,
        )
    except PolicyError as error:
        blob = _remote_policy(config, module, str(error))
        logger.warning("simulators have to ask for the actions of this policy: %s", error)
        return blob


def _remote_policy(config: AlgorithmConfig, module: RLModule, why: str) -> bytes:
    module = module.unwrapped()
    name = type(module).__name__
    if isinstance(module, MultiRLModule) or not isinstance(module, TorchRLModule):
        raise PolicyError(f"{name} is not a single TorchRLModule: neither simulators nor runners can act by it")
    pipelines = Pipelines(config, learns=pipeline_of(config))
    more: dict[str, Any] = {}
    try:
        more["action_dist_inputs"] = pipelines.check(module)
        more |= {"connectors": pipelines.room(config), "lookback": pipelines.lookback}
    except NeedsEpisode as error:
        seen, more["action_dist_inputs"] = try_following(config, module)
        why = followed(why, error)
        more |= {"lookback": lookback_of(config), "seen": to_wire(seen)}
    manifest = remote_manifest(
        module, config.observation_space, config.action_space, why, explores=explores(config)[0],
        evaluation_explores=explores(config)[1], **more,
    )  # fmt: skip
    return pack_policy(manifest, b"")


def followed(why: str, because: PolicyError | str) -> str:
    """Why simulators have to ask, and more than that."""
    logger.warning("runners follow each episode that asks, and it ends where its runner does: %s", because)
    return f"{why}; and runners follow its episodes: {because}"


def remote_manifest(
    module: RLModule, observation_space: gym.Space[Any], action_space: gym.Space[Any], why: str, **more: Any
) -> PolicyManifest:
    """Of a module that runners alone can act by, with these spaces; `more` of its fields. Raises `PolicyError` for
    weights that can't travel."""
    name = type(module).__name__
    layout = layout_of_spaces(observation_space, action_space)
    weights = [
        (key, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for key, tensor in module.state_dict().items()
    ]
    action, for_env = _tensor(layout.action), layout.env_actions
    try:
        return PolicyManifest(
            format=1,
            module=name,
            observation=_tensor(layout.obs),
            noise="normal",
            noise_shape=(),
            action=action,
            env_action=action if for_env is None else Tensor("uint8", (for_env.nbytes,)),
            packed_action=to_wire(action_space) if layout.actions else None,
            action_parts=layout.actions.tensors if layout.actions else (),
            env_action_parts=for_env.tensors if for_env else (),
            opset=OPSET,
            weights=msgspec.convert(weights, tuple[Weight, ...]),
            packed=to_wire(observation_space) if layout.packing else None,
            parts=layout.packing.tensors if layout.packing else (),
            remote_only=why[:4096],
            state=Memory(module).states(),
            **more,
        )
    except msgspec.ValidationError as error:
        raise PolicyError(f"{name} has weights that can't travel: {error}") from error


def _tensor(row: Any) -> Tensor:
    return msgspec.convert((row.dtype.name, row.shape), Tensor)
