"""A module for images that travel as bytes.

RLlib's CNNs take floats alone. Made of pixels before (by a wrapper around the environment) each step has four times as
many bytes; by a connector in RLlib's pipelines, simulators couldn't act by themselves. So the module does it.
"""

from __future__ import annotations

from typing import Any

from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.core.columns import Columns


class PixelModule(DefaultPPOTorchRLModule):
    """RLlib's own module for PPO, for observations of 0 to 255."""

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return super()._forward(_scaled(batch), **kwargs)

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return super()._forward_train(_scaled(batch), **kwargs)

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Any:
        return super().compute_values(_scaled(batch), embeddings)


def _scaled(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, Columns.OBS: batch[Columns.OBS].float() / 255.0}
