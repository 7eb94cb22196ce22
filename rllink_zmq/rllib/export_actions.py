"""What comes after the module, as graph: the draw from RLlib's action distributions, the action's log-probability
(`Head`), and the env's action (`ForEnv`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchCategorical,
    TorchDiagGaussian,
    TorchMultiCategorical,
    TorchSquashedGaussian,
)
from ray.rllib.utils.numpy import MAX_LOG_NN_OUTPUT, MIN_LOG_NN_OUTPUT, SMALL_NUMBER
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action

from rllink_zmq.errors import PolicyError
from rllink_zmq.policy import Noise, Tensor

REMOTE = "let runners compute the actions (connect(inference='remote'), simulate --inference remote)"
"""What else can be done, for messages about what the graph can't hold."""


class Head(NamedTuple):
    """An action distribution as a function of noise."""

    noise: Noise
    width: int
    """Entries of one row of noise."""
    dist_inputs: int
    action: Tensor
    distribution: Any
    """RLlib's class of it."""
    draw: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """(dist inputs (B, k), noise (B, width)) -> actions (B, n), logp (B, 1)."""


def head_of(module: str, distribution: Any, space: gym.Space[Any]) -> Head:
    """The head for `space`. Raises PolicyError unless `distribution` is RLlib's own for it."""
    if isinstance(space, gym.spaces.Discrete):
        count = int(space.n)
        head = Head("gumbel", count, count, Tensor("int64", ()), distribution, _categorical([count]))
        known = distribution is TorchCategorical
    elif isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
        sizes = [int(size) for size in space.nvec]
        head = Head("gumbel", sum(sizes), sum(sizes), Tensor("int64", (len(sizes),)), distribution, _categorical(sizes))
        # RLlib makes a subclass for each space, that holds `nvec`.
        known = isinstance(distribution, type) and issubclass(distribution, TorchMultiCategorical)
    elif isinstance(space, gym.spaces.Box) and np.dtype(space.dtype).kind == "f" and len(space.shape) == 1:
        size = int(space.shape[0])
        squashed = distribution is TorchSquashedGaussian  # SAC's
        draw = _squashed_gaussian if squashed else _gaussian
        head = Head("normal", size, 2 * size, Tensor("float32", (size,)), distribution, draw)
        known = squashed or distribution is TorchDiagGaussian
    else:
        raise PolicyError(
            f"{module}: the action space {space} is not supported: use Discrete, MultiDiscrete or a float Box of one "
            f"dimension, or {REMOTE}"
        )
    if not known:
        raise PolicyError(
            f"{module} draws actions of {type(space).__name__} from {getattr(distribution, '__name__', distribution)}, "
            f"which the graph doesn't know: use RLlib's default distribution, or {REMOTE}"
        )
    return head


def _categorical(sizes: Sequence[int]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Categorical choices side by side, of `sizes` logits, by the Gumbel-max trick."""

    def draw(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        actions, logps = [], []
        pairs = zip(torch.split(logits, sizes, -1), torch.split(noise, sizes, -1), strict=True)
        for part, noise_part in pairs if len(sizes) > 1 else [(logits, noise)]:
            action = torch.argmax(part + noise_part, -1, keepdim=True)
            actions.append(action)
            logps.append(torch.log_softmax(part, -1).gather(-1, action))
        if len(sizes) == 1:
            return actions[0], logps[0]
        return torch.cat(actions, -1), torch.stack(logps).sum(0)

    return draw


def _gaussian(dist_inputs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TorchDiagGaussian: means, then log stds; the log-probability of torch.distributions.Normal, summed.
    `(action - mean) / std` is taken anew from the rounded action, as the learner will take it."""
    mean, log_std = dist_inputs.chunk(2, -1)
    std = log_std.exp()
    action = mean + std * noise
    logp = -0.5 * ((action - mean) / std) ** 2 - log_std - 0.5 * float(np.log(2.0 * np.pi))
    return action, logp.sum(-1, keepdim=True)


def _squashed_gaussian(dist_inputs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TorchSquashedGaussian between -1 and 1: means, then log stds, which it clips. The log-probability is of the
    action as it is, as `GetActions` takes it. Without noise the action is the mean itself: RLlib's `to_deterministic`
    doesn't squash it."""
    mean, log_std = dist_inputs.chunk(2, -1)
    log_std = log_std.clamp(MIN_LOG_NN_OUTPUT, MAX_LOG_NN_OUTPUT)
    std = log_std.exp()
    greedy = (noise == 0.0).all(-1, keepdim=True)
    action = torch.where(greedy, mean, torch.tanh(mean + std * noise).clamp(-1.0, 1.0))
    inner = torch.atanh(action.clamp(-1.0 + SMALL_NUMBER, 1.0 - SMALL_NUMBER))
    logp = -0.5 * ((inner - mean) / std) ** 2 - log_std - 0.5 * float(np.log(2.0 * np.pi))
    logp = logp - 2.0 * (float(np.log(2.0)) - inner - torch.nn.functional.softplus(-2.0 * inner))
    return action, logp.sum(-1, keepdim=True)


class ForEnv:
    """RLlib's NormalizeAndClipActions (`unsquash_action`, `clip_action`), as it is and as graph."""

    def __init__(self, space: gym.Space[Any], normalize: bool, clip: bool) -> None:
        self._space = space
        self._normalize = normalize
        self._clip = clip
        self._mode = "as it is"
        if isinstance(space, gym.spaces.Box):
            # Not as parameters or buffers of a module: these are the architecture's.
            self._low, self._high = torch.from_numpy(space.low.copy()), torch.from_numpy(space.high.copy())
            lows, highs = np.unique(space.low), np.unique(space.high)
            self._bounds = (float(lows[0]), float(highs[0])) if len(lows) == len(highs) == 1 else None
            if normalize:
                if np.all(space.bounded_below) and np.all(space.bounded_above) and self._low.dtype in _FLOATS:
                    self._mode = "unsquash"
            elif clip:
                self._mode = "clip"

    def reference(self, actions: NDArray[Any]) -> NDArray[Any]:
        """What RLlib gives the env for (B, ...) actions."""
        if self._normalize:
            return np.stack([unsquash_action(action, self._space) for action in actions])
        if self._clip:
            return np.stack([clip_action(action, self._space) for action in actions])
        return actions

    def tensor(self, action: Tensor) -> Tensor:
        """dtype and shape of the env's action."""
        if self._mode == "as it is":
            return action
        example = self.reference(np.zeros((1, *action.shape), action.dtype))
        return msgspec.convert((example.dtype.name, example.shape[1:]), Tensor)

    @property
    def transforms(self) -> bool:
        return self._mode != "as it is"

    def __call__(self, actions: torch.Tensor) -> torch.Tensor:
        """(B, n) actions -> (B, n) of the env's; in the dtypes and the order of operations of NumPy's."""
        low, high = self._low, self._high
        if self._mode == "unsquash":
            # The halved span is a constant of the graph. Halving is exact, so NumPy's order of steps doesn't matter.
            actions = low + (actions + 1.0) * ((high - low) / 2.0)
        actions = actions.to(torch.promote_types(actions.dtype, low.dtype))
        if self._bounds is not None:
            return torch.clamp(actions, *self._bounds)  # one node, where tensors take two
        return torch.minimum(torch.maximum(actions, low), high)


_FLOATS = (torch.float32, torch.float64)
