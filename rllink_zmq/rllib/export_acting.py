"""All that comes after the module, as graph: of an action of one part, or of several (Tuple, Dict)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.core.distribution.torch.torch_distribution import TorchMultiDistribution

from rllink_zmq.errors import PolicyError, SpaceError
from rllink_zmq.packing import Packing
from rllink_zmq.packing_actions import action_packing
from rllink_zmq.policy import Tensor
from rllink_zmq.rllib import exploration
from rllink_zmq.rllib.export_actions import REMOTE, ForEnv, head_of
from rllink_zmq.spaces import to_wire

HALF = 0.5
"""Epsilon while an exported policy is tried."""


class Acting:
    """What is drawn from a module's dist inputs, and how the environment gets it.

    `distribution`: RLlib's class of the whole action. `width`: numbers in a row of noise, `noise_runs` what they are.
    Several parts have their dist inputs and noise side by side, in the order of `packing` (which is RLlib's, too: keys
    sorted), and the sum of their log-probabilities. `greedy`: dist inputs are Q-values, and epsilon comes with them.
    Raises PolicyError, with the part's name, for what the graph can't draw.
    """

    def __init__(
        self,
        module: str,
        distribution: Any,
        space: gym.Space[Any],
        normalize: bool = True,
        clip: bool = False,
        *,
        greedy: bool = False,
    ) -> None:
        self.distribution = distribution
        self.greedy = greedy
        try:
            self.packing: Packing | None = action_packing(space)
        except SpaceError as error:
            raise PolicyError(f"{module}: {error}") from error
        if self.packing is None:
            self._heads = [head_of(module, distribution, space)]
            spaces = [space]
        else:
            spaces = [part.space for part in self.packing.parts]
            kinds = _parts_of(module, distribution, spaces)
            self._heads = [
                head_of(f"{module}: {part.name}", kind, part.space)
                for part, kind in zip(self.packing.parts, kinds, strict=True)
            ]
        self.for_env = [ForEnv(part, normalize, clip) for part in spaces]
        self.width = sum(head.width for head in self._heads)
        self.dist_inputs = sum(head.dist_inputs for head in self._heads)

    # ---- for the manifest

    def described(self) -> dict[str, Any]:
        """The manifest's fields about noise and actions, but for their numbers."""
        noise, parts = self._heads[0].noise, tuple(head.action for head in self._heads)
        env_parts = tuple(f.tensor(part) for f, part in zip(self.for_env, parts, strict=True))
        if self.packing is None:
            return {"noise": noise, "action": parts[0], "env_action": env_parts[0]}
        rows = [Tensor("uint8", (sum(part.nbytes for part in each),)) for each in (parts, env_parts)]
        runs = tuple((head.noise, head.width) for head in self._heads)
        return {
            "noise": noise,
            "noise_runs": runs if any(kind != noise for kind, _ in runs) else (),
            "action": rows[0],
            "env_action": rows[1],
            "packed_action": to_wire(self.packing.space),
            "action_parts": parts,
            "env_action_parts": env_parts,
        }

    @property
    def outputs(self) -> list[str]:
        """The names of what `__call__` returns."""
        if self.packing is None:
            return ["actions", "action_logp", "action_dist_inputs"] + ["env_actions"] * self.for_env[0].transforms
        names = [f"actions/{i}" for i in range(len(self._heads))] + ["action_logp", "action_dist_inputs"]
        return names + [f"env_actions/{i}" for i, for_env in enumerate(self.for_env) if for_env.transforms]

    @property
    def names(self) -> list[str]:
        """What comes behind a name to tell the parts apart: '' where there is one."""
        return [""] if self.packing is None else [f" of {part.name}" for part in self.packing.parts]

    # ---- the graph, and what it is compared with

    def __call__(self, dist_inputs: torch.Tensor, noise: torch.Tensor, *epsilon: torch.Tensor) -> list[torch.Tensor]:
        """(B, k) dist inputs, (B, width) noise, (B, 1) epsilon if it is greedy -> the outputs, a row for each."""
        given: Sequence[torch.Tensor] = [dist_inputs]
        noises: Sequence[torch.Tensor] = [noise]
        if len(self._heads) > 1:
            given = torch.split(dist_inputs, [head.dist_inputs for head in self._heads], -1)
            noises = torch.split(noise, [head.width for head in self._heads], -1)
        if self.greedy:  # DQN has a single Discrete action
            drawn = [exploration.draw(dist_inputs, noise, *epsilon)]
        else:
            drawn = [head.draw(*both) for head, *both in zip(self._heads, given, noises, strict=True)]
        actions = [action for action, _ in drawn]
        logp = drawn[0][1]
        for _, more in drawn[1:]:
            logp = logp + more
        for_env = [f(action) for f, action in zip(self.for_env, actions, strict=True) if f.transforms]
        return [*actions, logp, dist_inputs, *for_env]

    def logp(self, dist_inputs: torch.Tensor, actions: NDArray[Any]) -> torch.Tensor:
        """RLlib's log-probability of actions as the manifest has them; of epsilon-greedy ones where epsilon is `HALF`,
        and no Q-value is zero."""
        if self.greedy:
            best = dist_inputs.argmax(-1) == torch.from_numpy(actions)
            return torch.log(HALF / dist_inputs.shape[-1] + (1.0 - HALF) * best.float())
        distribution = self.distribution.from_logits(dist_inputs)
        logp: torch.Tensor = distribution.logp(self.structure(actions, torch.from_numpy))
        return logp

    def structure(self, actions: NDArray[Any], make: Any = None) -> Any:
        """Rows as the manifest has them -> what RLlib has in their place."""
        make = make or (lambda array: array)
        if self.packing is None:
            return make(actions)
        return self.packing.structure([make(array) for array in self.packing.arrays(actions)])

    def each(self, structure: Any) -> list[NDArray[Any]]:
        """Dicts and tuples of (B, ...) arrays -> the arrays."""
        if self.packing is None:
            return [structure]
        arrays = []
        for part in self.packing.parts:
            value = structure
            for key in part.keys:
                value = value[key]
            arrays.append(value)
        return arrays

    def env_reference(self, actions: NDArray[Any]) -> list[NDArray[Any]]:
        """What RLlib gives the environment for these actions, part by part."""
        arrays = [actions] if self.packing is None else self.packing.arrays(actions)
        return [for_env.reference(array) for for_env, array in zip(self.for_env, arrays, strict=True)]


def _parts_of(module: str, distribution: Any, spaces: Sequence[gym.Space[Any]]) -> list[Any]:
    """RLlib's class of each part's distribution."""
    if not (isinstance(distribution, type) and issubclass(distribution, TorchMultiDistribution)):
        raise PolicyError(
            f"{module} draws actions of several parts from {getattr(distribution, '__name__', distribution)}, which "
            f"the graph doesn't know: use RLlib's default distribution, or {REMOTE}"
        )
    # RLlib makes a subclass for each space, that holds its parts' classes: `get_partial_dist_cls` keeps them there.
    held: dict[str, Any] = getattr(distribution, "_merge_kwargs", dict)()
    kinds: list[Any] = tree.flatten(held.get("child_distribution_cls_struct", ()))
    if len(kinds) != len(spaces):
        raise PolicyError(f"{module} draws {len(kinds)} parts of an action that has {len(spaces)}")
    return kinds
