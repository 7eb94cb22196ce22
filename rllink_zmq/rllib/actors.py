"""Who acts for simulators that ask: a copy of the module with published weights, alone or behind the pipelines of the
config. It acts as RLlib's own runner does: the module's `forward_exploration` or `forward_inference`, RLlib's
distribution (`GetActions`) and the env's action (`NormalizeAndClipActions`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule

from rllink_zmq.errors import ProtocolError, RllinkError
from rllink_zmq.fragments import Before
from rllink_zmq.messages import ACTIONS_BEFORE, OBS_BEFORE, REWARDS_BEFORE, STATE_IN, STATE_OUT, AgentId
from rllink_zmq.packing import packing_of
from rllink_zmq.packing_actions import action_packing, env_packing
from rllink_zmq.policy import PolicyManifest
from rllink_zmq.rllib import exploration
from rllink_zmq.rllib.checking import check_rows
from rllink_zmq.rllib.export import connectors_state
from rllink_zmq.rllib.export_actions import ForEnv
from rllink_zmq.rllib.flattening import Flattening
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.spaces import from_wire


class ModuleActor:
    """A copy of `module` that acts, on `device` (the runner's GPU, say). `version`: its weights', -1 before the first.
    `sampled()`: env steps that the training has sampled, by which DQN's epsilon goes. `flattening`: the
    FlattenObservations before the module. Not for two threads at once."""

    def __init__(
        self,
        module: RLModule,
        manifest: PolicyManifest,
        action_space: gym.Space[Any],
        normalize: bool,
        clip: bool,
        device: Any = "cpu",
        sampled: Callable[[], int] = lambda: 0,
        flattening: Flattening | None = None,
    ) -> None:
        self.manifest = manifest
        self._sampled = sampled
        self._flattening = flattening
        self.version = -1
        self._device = torch.device(device)
        self._module: Any = copy.deepcopy(module.unwrapped()).to(self._device)
        self._module.eval()
        self._state = self._module.state_dict()
        self._action_space = action_space
        self._actions = action_packing(action_space)
        self._env_actions = env_packing(action_space)
        spaces = [part.space for part in self._actions.parts] if self._actions else [action_space]
        self._for_env = [ForEnv(space, normalize, clip) for space in spaces]
        self._packing = None if manifest.packed is None else packing_of(from_wire(manifest.packed))
        self.memory = Memory(self._module)
        self.dtype = np.dtype(manifest.observation.dtype)
        self.shape = manifest.observation.shape

    @property
    def module(self) -> Any:
        """The copy that acts."""
        return self._module

    def apply(self, version: int, body: bytes) -> None:
        """Act with these weights from now on. `body`: the manifest's, back to back. Raises RllinkError for another
        size."""
        if len(body) != self.manifest.weights_bytes:
            raise RllinkError(f"weights {version} have {len(body)} bytes, expected {self.manifest.weights_bytes}")
        self.version = -1  # what fails in the middle leaves no version at all
        offset = 0
        with torch.no_grad():
            for weight in self.manifest.weights:
                count = int(np.prod(weight.shape, dtype=np.int64))
                sent = np.frombuffer(body, np.dtype(weight.dtype).newbyteorder("<"), count, offset)
                self._state[weight.name].copy_(torch.from_numpy(sent.reshape(weight.shape).copy()))
                offset += weight.nbytes
        self.version = version

    def act(
        self,
        observations: NDArray[Any],
        explore: bool,
        state: Sequence[NDArray[Any]] | None = None,
        starts: NDArray[np.bool_] | None = None,
        earlier: Sequence[Before | None] | None = None,
        agents: Sequence[AgentId] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Columns of an answer for (B, *shape) observations of the policy's dtype.

        `state`: a recurrent module's memory before the step, (B, *shape) each, in the manifest's order; in rows that
        `starts` an episode it is the initial one, whatever is given. None = all rows start. `earlier`: for each row the
        steps before it, for who looks at them; None where there are none. `agents`: whose each row is, for who asks.
        """
        before = self.memory.starts(len(observations))
        if state is not None:
            goes_on = np.ones(len(observations), bool) if starts is None else ~starts
            for array, given in zip(before, state, strict=True):
                array[goes_on] = given[goes_on]
        given_on = [torch.from_numpy(array).to(self._device) for array in before]
        columns = self._compute(observations, explore, given_on, earlier, agents)
        if state is None or (starts is not None and starts.any()):
            # Who begins is told with what.
            columns |= {STATE_IN + name: array for name, array in zip(self.memory.names, before, strict=True)}
        return columns

    def not_finite(self, observations: NDArray[Any]) -> NDArray[np.bool_]:
        """(B,): which of (B, *shape) observations hold NaN or infinity."""
        arrays = [observations] if self._packing is None else self._packing.arrays(observations)
        bad = np.zeros(len(observations), bool)
        for array in arrays:
            if array.dtype.kind == "f":
                bad |= ~np.isfinite(array.reshape(len(array), -1)).all(1)
        return bad

    @property
    def agents(self) -> Collection[AgentId]:
        """Whose rows it must be told of; nobody's, where one is like another."""
        return ()

    def misfit_before(self, before: Before) -> str:
        """Why steps can't have come before; '' if they can."""
        if self.not_finite(before.observations).any():
            return f"'{OBS_BEFORE}' holds NaN or infinity"
        if not np.isfinite(before.rewards).all():
            return f"'{REWARDS_BEFORE}' holds NaN or infinity"
        try:
            check_rows(ACTIONS_BEFORE, before.actions, self._action_space, self._actions, actions=True)
        except ProtocolError as error:
            return str(error)
        return ""

    @property
    def lookback(self) -> int:
        """How many earlier observations it looks at."""
        return self.manifest.lookback

    def _compute(
        self,
        observations: NDArray[Any],
        explore: bool,
        before: Sequence[torch.Tensor],
        earlier: Sequence[Before | None] | None,
        agents: Sequence[AgentId] | None,
    ) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            batch = self.memory.batch(self._given(observations), before)
            module = self._module
            out, after = self.memory.answer(exploration.forward(module, batch, explore, self._sampled()))
            dist_inputs = out[Columns.ACTION_DIST_INPUTS]
            if Columns.ACTIONS in out:
                actions, logp = out[Columns.ACTIONS], out[Columns.ACTION_LOGP]
            else:
                drawn_from = module.get_exploration_action_dist_cls().from_logits(dist_inputs)
                if explore:
                    actions = drawn_from.sample()
                else:
                    greedy = module.get_inference_action_dist_cls().from_logits(dist_inputs).to_deterministic()
                    actions = greedy.sample()
                logp = drawn_from.logp(actions)
            columns = {"action_logp": logp, "action_dist_inputs": dist_inputs}
            columns |= self._acted(actions, len(dist_inputs))
            columns |= {STATE_OUT + name: array for name, array in zip(self.memory.names, after, strict=True)}
            return {name: np.ascontiguousarray(torch.as_tensor(array).cpu().numpy()) for name, array in columns.items()}

    def _acted(self, actions: Any, rows: int) -> dict[str, Any]:
        """The columns of actions that were drawn: an array, or dicts and tuples of them."""
        if self._actions is None or self._env_actions is None:
            columns = {"actions": actions}
            if self._for_env[0].transforms:
                columns["env_actions"] = self._for_env[0](actions.cpu())
            return columns
        packed = self._actions.join(tree.map_structure(lambda tensor: tensor.cpu().numpy(), actions), rows)
        parts = [
            for_env(torch.from_numpy(array)).numpy() if for_env.transforms else array
            for for_env, array in zip(self._for_env, self._actions.arrays(packed), strict=True)
        ]
        return {"actions": packed, "env_actions": self._env_actions.join(self._env_actions.structure(parts), rows)}

    def _given(self, observations: NDArray[Any]) -> Any:
        """(B, *shape) as the module takes them."""
        arrays = [observations] if self._packing is None else self._packing.arrays(observations)
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        if self._flattening is not None:
            return self._flattening(tensors)
        return tensors[0] if self._packing is None else self._packing.structure(tensors)


class PipelineActor(ModuleActor):
    """Acts behind the connectors that the user configured, by RLlib's own pipelines. `on_state(version, state)`: told
    of the state that these have at each version."""

    def __init__(
        self,
        module: RLModule,
        manifest: PolicyManifest,
        pipelines: Pipelines,
        device: Any = "cpu",
        on_state: Callable[[int, bytes], None] | None = None,
        sampled: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(module, manifest, pipelines.action_space, False, False, device, sampled)
        self._pipelines = pipelines
        self._on_state = on_state

    @property
    def agents(self) -> Collection[AgentId]:
        return self._pipelines.agents

    def apply(self, version: int, body: bytes) -> None:
        super().apply(version, body)
        self.version = -1
        state = connectors_state(self.manifest, body)
        self._pipelines.set_state(state)
        self.version = version
        if self._on_state is not None:
            self._on_state(version, state)

    def _compute(
        self,
        observations: NDArray[Any],
        explore: bool,
        before: Sequence[torch.Tensor],
        earlier: Sequence[Before | None] | None,
        agents: Sequence[AgentId] | None,
    ) -> dict[str, NDArray[Any]]:
        pipelines = self._pipelines
        newest = pipelines.each(observations)
        befores = earlier or [None] * len(newest)
        histories = [pipelines.history(before, one) for before, one in zip(befores, newest, strict=True)]
        columns, after = pipelines.act(
            self._module, histories, explore, self.memory, before, self._sampled(), agents if self.agents else None
        )
        return columns | {STATE_OUT + name: array for name, array in zip(self.memory.names, after, strict=True)}


__all__ = ["ModuleActor", "PipelineActor"]
