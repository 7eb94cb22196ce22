"""How a module chooses actions where RLlib doesn't draw them from a distribution: DQN's epsilon-greedy.

DQN's module answers with actions and nothing else: with probability epsilon a random one, else the one with the highest
Q-value. Here that is one categorical distribution, so that it can be drawn from like any other (by noise, in the
exported graph, too), and each action has its true log-probability. Its `action_dist_inputs` are the Q-values. Epsilon
follows the module's schedule over the env steps that the training has sampled.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from ray.rllib.algorithms.dqn.default_dqn_rl_module import QF_PREDS
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.core.columns import Columns

Schedule: TypeAlias = tuple[tuple[float, float], ...]
"""(env steps, epsilon) in rising order: linear between two of them, the last value from there on."""


def epsilon_schedule(module: Any) -> Schedule:
    """By which `module` explores, if it is RLlib's own for DQN (or one with another network). () if it is not."""
    own = DefaultDQNTorchRLModule
    if not isinstance(module, own):
        return ()
    for name in ("_forward_exploration", "_forward_inference"):
        if getattr(type(module), name) is not getattr(own, name):
            return ()  # it chooses actions in a way of its own
    epsilon = module.model_config["epsilon"]
    points = epsilon if isinstance(epsilon, list | tuple) else [(0, epsilon)]
    return tuple((float(step), float(value)) for step, value in points)


def epsilon_at(schedule: Schedule, steps: int) -> float:
    """Epsilon when the training has sampled so many env steps."""
    return float(np.interp(steps, [step for step, _ in schedule], [value for _, value in schedule]))


def forward(module: Any, batch: Mapping[str, Any], explore: bool, steps: int = 0) -> dict[str, Any]:
    """What `module` answers, in a training that has sampled so many env steps. DQN's: `actions` and `action_logp`, (B,)
    each, and `action_dist_inputs`, the Q-values."""
    schedule = epsilon_schedule(module)
    if not schedule:
        if not explore:
            return dict(module.forward_inference(batch))
        return dict(module.forward_exploration(batch, **({"t": steps} if _wants_steps(type(module)) else {})))
    q_values, out = values_of(module, batch)
    epsilon = torch.full((*q_values.shape[:-1], 1), epsilon_at(schedule, steps) if explore else 0.0)
    noise = -torch.log(-torch.log(torch.rand_like(q_values).clamp(1e-20, 1.0 - 1e-7)))
    actions, logp = draw(q_values, noise, epsilon.to(q_values.device))
    return out | {Columns.ACTIONS: actions.squeeze(-1), Columns.ACTION_LOGP: logp.squeeze(-1)}


def values_of(module: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Q-values (..., n), and the module's answer with them as `action_dist_inputs`."""
    found = module.compute_q_values(batch)
    out = {Columns.ACTION_DIST_INPUTS: found[QF_PREDS]}
    if Columns.STATE_OUT in found:
        out[Columns.STATE_OUT] = found[Columns.STATE_OUT]
    return found[QF_PREDS], out


def draw(q_values: torch.Tensor, noise: torch.Tensor, epsilon: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Epsilon-greedy by the Gumbel-max trick: (..., n) Q-values and noise, (..., 1) epsilon -> actions and their
    log-probability, (..., 1). As in RLlib, a random action is one whose Q-value isn't zero or minus infinity; where
    there is none, any. NaN among the Q-values makes the log-probability NaN."""
    choices = torch.nan_to_num(q_values, neginf=0.0) != 0.0
    choices = choices | ~choices.any(-1, keepdim=True)
    random = choices.to(q_values.dtype)
    random = random / random.sum(-1, keepdim=True)
    best = torch.argmax(q_values, -1, keepdim=True)
    greedy = (torch.arange(q_values.shape[-1], device=q_values.device) == best).to(q_values.dtype)
    logits = torch.log(epsilon * random + (1.0 - epsilon) * greedy)
    actions = torch.argmax(logits + noise, -1, keepdim=True)
    logp = logits.gather(-1, actions)
    broken = torch.isnan(q_values).any(-1, keepdim=True)
    return actions, torch.where(broken, torch.full_like(logp, float("nan")), logp)


def _wants_steps(module_class: type) -> bool:
    """Whether its `_forward_exploration` takes the number of env steps, as RLlib's own runner gives it."""
    parameters = inspect.signature(module_class._forward_exploration).parameters  # type: ignore[attr-defined]
    return "t" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


__all__ = ["Schedule", "draw", "epsilon_at", "epsilon_schedule", "forward", "values_of"]
