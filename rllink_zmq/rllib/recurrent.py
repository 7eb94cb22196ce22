"""What a stateful RLModule has beside another one: a memory, which its episodes carry from step to step.

RLlib keeps it as a nested dict of arrays, `{"actor": {"c": ..., "h": ...}, ...}`. With us it is a row of named ones,
`actor/c`, `actor/h`, ..., in the order of their names. `Memory` is both, and empty for a stateless module.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModule
from torch.utils import _pytree as pytree

from rllink_zmq.errors import PolicyError
from rllink_zmq.policy import State

_Leaf = TypeVar("_Leaf")


class Memory:
    """The memory of `module`: `names` of its arrays, and what each `start`s an episode with. Falsy if it has none.
    Raises PolicyError for a state that isn't a nested dict of arrays."""

    def __init__(self, module: RLModule | None) -> None:
        initial = module.get_initial_state() if module is not None and module.is_stateful() else {}
        self._paths: list[tuple[str, ...]] = []
        self.start: list[NDArray[Any]] = []
        for path, value in _leaves(initial, ()):
            array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
            self._paths.append(path)
            self.start.append(array)
        self.names = ["/".join(path) for path in self._paths]

    def __bool__(self) -> bool:
        return bool(self.names)

    def states(self) -> tuple[State, ...]:
        """As a manifest has them. Raises PolicyError for what can't travel."""
        try:
            return msgspec.convert(
                [
                    (name, array.dtype.name, array.shape, array.tobytes("C") if array.any() else b"")
                    for name, array in zip(self.names, self.start, strict=True)
                ],
                tuple[State, ...],
            )
        except msgspec.ValidationError as error:
            raise PolicyError(f"a state that can't travel: {error}") from error

    def nested(self, arrays: Sequence[_Leaf]) -> dict[str, Any]:
        """Arrays in the order of `names`, as RLlib has them."""
        tree: dict[str, Any] = {}
        for path, array in zip(self._paths, arrays, strict=True):
            inner = tree
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = array
        return tree

    def flat(self, tree: Any) -> list[Any]:
        """RLlib's arrays in the order of `names`. Raises KeyError where one is missing."""
        arrays = []
        for path in self._paths:
            inner = tree
            for key in path:
                inner = inner[key]
            arrays.append(inner)
        return arrays

    def starts(self, rows: int) -> list[NDArray[Any]]:
        """The memory of `rows` episodes that begin: (rows, *shape) each."""
        return [np.repeat(start[np.newaxis], rows, 0) for start in self.start]

    # ---- a batch of single steps

    def batch(self, observations: Any, state: Sequence[torch.Tensor]) -> dict[str, Any]:
        """What RLlib's env-to-module pipeline makes of (B, ...) observations and (B, *shape) of each state."""
        if not self:
            return {Columns.OBS: observations}
        # A stateful module is given sequences, here of one step.
        observations = pytree.tree_map(lambda array: array.unsqueeze(1), observations)
        return {Columns.OBS: observations, Columns.STATE_IN: self.nested(state)}

    def answer(self, out: Mapping[str, Any]) -> tuple[dict[str, Any], list[torch.Tensor]]:
        """The module's answer to such a batch without the time dimension, and the state after the step. Raises KeyError
        where it gives none."""
        if not self:
            return dict(out), []
        state = self.flat(out[Columns.STATE_OUT])
        rest = {key: value for key, value in out.items() if key != Columns.STATE_OUT}
        return pytree.tree_map(lambda array: array.squeeze(1), rest), state


def _leaves(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key in sorted(tree):
        if not isinstance(key, str) or not key or "/" in key:
            raise PolicyError(f"a state whose keys are not plain names: {key!r}")
        yield from _leaves(tree[key], (*path, key))


# ---- tracing


@contextmanager
def one_step(module: torch.nn.Module) -> Iterator[None]:
    """Within it `module`'s LSTMs take sequences of one step alone, by the same formula, written out. ONNX has an
    operator for them, but wants the gates in another order than torch, and weights that are inputs would be put into it
    at each call: of 256 cells that takes eight times as long as the step."""
    written = [part for part in module.modules() if type(part) is torch.nn.LSTM and _plain(part)]
    for part in written:
        part.forward = types.MethodType(_lstm_step, part)
    try:
        yield
    finally:
        for part in written:
            del part.forward


def _plain(part: torch.nn.LSTM) -> bool:
    return not part.bidirectional and not part.proj_size


def _lstm_step(
    part: torch.nn.LSTM, sequence: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """torch.nn.LSTM's forward (its documentation has the formula) for a sequence of one step."""
    time = 1 if part.batch_first else 0
    row = sequence.squeeze(time)
    hidden, cell = [], []
    for layer in range(part.num_layers):
        h, c = state[0][layer], state[1][layer]
        bias_x, bias_h = (
            (getattr(part, f"bias_ih_l{layer}"), getattr(part, f"bias_hh_l{layer}")) if part.bias else (None, None)
        )
        linear = torch.nn.functional.linear
        gates = linear(row, getattr(part, f"weight_ih_l{layer}"), bias_x)
        gates = gates + linear(h, getattr(part, f"weight_hh_l{layer}"), bias_h)
        take, keep, new, show = gates.chunk(4, -1)
        c = torch.sigmoid(keep) * c + torch.sigmoid(take) * torch.tanh(new)
        row = torch.sigmoid(show) * torch.tanh(c)
        hidden.append(row)
        cell.append(c)
    return row.unsqueeze(time), (torch.stack(hidden), torch.stack(cell))


# ---- the learners


def send_what_acts(learners: LearnerGroup, weights: Sequence[str], module_id: str = DEFAULT_MODULE_ID) -> None:
    """Have the learners give runners all `weights` (names of the module's state) that acting takes.

    RLlib leaves out what a module calls not needed for inference: with PPO that is the critic's encoder, though it does
    run at acting time if it is recurrent, as the learner begins its sequences with the critic's state of that time.
    RLlib's own runner acts by the critic it was built with, a random one, for ever.
    """
    names = list(weights)

    def extend(learner: Any, **_: Any) -> None:
        module = learner.module[module_id].unwrapped()
        left_out = getattr(module, "get_non_inference_attributes", None)
        if left_out is None:
            return
        kept = [a for a in left_out() if not any(name == a or name.startswith(f"{a}.") for name in names)]
        module.get_non_inference_attributes = lambda: list(kept)

    for result in learners.foreach_learner(extend):
        result.get()
