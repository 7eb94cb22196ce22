"""A small recurrent module with a memory unlike that of RLlib's: not zero at an episode's start, and of two layers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch import TorchRLModule

OBS, ACT = gym.spaces.Box(-10.0, 10.0, (3,), gym.spaces.Box(0, 1).dtype), gym.spaces.Discrete(2)


class Recurrent(TorchRLModule):
    """`{"lstm": {"c", "h"}, "trace"}`: two layers of an LSTM, and a sum that fades."""

    framework = "torch"

    def setup(self) -> None:
        self.lstm = torch.nn.LSTM(3, 4, 2, batch_first=True)
        self.head = torch.nn.Linear(4 + 3, 2)

    def get_initial_state(self) -> dict[str, Any]:
        return {"lstm": {"h": torch.full((2, 4), 0.25), "c": torch.zeros(2, 4)}, "trace": torch.arange(3.0)}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        state = batch[Columns.STATE_IN]
        layers = {key: value.transpose(0, 1).contiguous() for key, value in state["lstm"].items()}
        out, (h, c) = self.lstm(batch[Columns.OBS], (layers["h"], layers["c"]))
        trace = 0.5 * state["trace"] + batch[Columns.OBS][:, 0]
        return {
            Columns.ACTION_DIST_INPUTS: self.head(torch.cat([out, trace.unsqueeze(1)], -1)),
            Columns.STATE_OUT: {"lstm": {"h": h.transpose(0, 1), "c": c.transpose(0, 1)}, "trace": trace},
        }


class Learned(Recurrent):
    """Starts episodes with what it has learned."""

    def setup(self) -> None:
        super().setup()
        self.start = torch.nn.Parameter(torch.zeros(3))

    def get_initial_state(self) -> dict[str, Any]:
        return {**super().get_initial_state(), "trace": self.start}


class Forgetful(Recurrent):
    """Says that it has a memory, and gives none."""

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: super()._forward(batch)[Columns.ACTION_DIST_INPUTS]}


def made(kind: type[Recurrent] = Recurrent, seed: int = 1) -> Recurrent:
    torch.manual_seed(seed)
    return kind(observation_space=OBS, action_space=ACT, model_config={"max_seq_len": 4})
