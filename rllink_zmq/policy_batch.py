"""A policy that acts for a fixed number of observations at once, again and again: all arrays are bound once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllink_zmq.policy import Actions, Parts, Policy, structured


class BatchPolicy:
    """`policy` for `rows` observations a call: what `Policy.act` answers, at less than its cost. Made once the policy
    has weights; newer ones are used as they are applied."""

    def __init__(self, policy: Policy, rows: int) -> None:
        manifest = policy.manifest
        self.policy = policy
        self.rows = rows
        observation, action = manifest.observation, manifest.action
        self._session = policy.open_session(rows)
        self._observations = np.zeros((rows, *observation.shape), observation.dtype)
        self._noise = np.zeros((rows, *manifest.noise_shape), np.float32)
        self._epsilon = np.zeros((rows, 1), np.float32)
        logp = np.zeros((rows, 1), np.float32)
        self._logp = logp.reshape(rows)
        self._dist_inputs = np.zeros((rows, manifest.action_dist_inputs), np.float32)
        inputs = {"noise": self._noise}
        outputs: dict[str, NDArray[Any]] = {"action_logp": logp, "action_dist_inputs": self._dist_inputs}
        self._observed = Parts(manifest.parts, self._observations)
        for i, (part, array) in enumerate(zip(manifest.parts, self._observed.arrays, strict=True)):
            inputs[f"observations/{i}"] = array.reshape(rows, *part.shape)
        if not manifest.parts:
            inputs["observations"] = self._observations
        if manifest.epsilon:
            inputs["epsilon"] = self._epsilon
        self._states_in = [np.zeros((rows, *state.shape), state.dtype) for state in manifest.state]
        states_out = [np.zeros((rows, *state.shape), state.dtype) for state in manifest.state]
        self._states_out = tuple(states_out)
        for state, given, made in zip(manifest.state, self._states_in, states_out, strict=True):
            inputs[f"state_in/{state.name}"], outputs[f"state_out/{state.name}"] = given, made
        self._actions: NDArray[Any] = np.zeros((rows, *action.shape), action.dtype)
        self._acted = Parts(manifest.action_parts, self._actions)
        acted = {f"actions/{i}": array for i, array in enumerate(self._acted.arrays)}
        outputs |= acted or {"actions": self._actions.reshape(rows, action.size)}
        self._env_arrays: list[NDArray[Any]] = []
        for i, part in enumerate(manifest.env_action_parts or (manifest.env_action,)):
            name = f"actions/{i}" if acted else "actions"
            if f"env_{name}" in policy.action_outputs:
                outputs[f"env_{name}"] = np.zeros((rows, part.size), part.dtype)
            self._env_arrays.append(outputs.get(f"env_{name}", outputs[name]).reshape(rows, *part.shape))
        self._binding = policy.bind(self._session, inputs, outputs)

    def act(self, observations: NDArray[Any], state: Sequence[NDArray[Any]] = ()) -> Actions:
        """Actions for (rows, *observation.shape), drawn unless the training takes the most likely ones. `state`: the
        memory before the step, (rows, *shape) for each of the manifest's.
        `env_actions` is new; the rest are views that THE NEXT CALL OVERWRITES."""
        policy = self.policy
        self._observations[...] = observations
        if self._observed.arrays:
            self._observed.split()
        if self._states_in:
            for bound, given in zip(self._states_in, state, strict=True):
                bound[...] = given
        if policy.manifest.explores:  # else they stay zero
            policy.draw(self._noise)
            self._epsilon.fill(policy.epsilon)
        self._session.run_with_iobinding(self._binding)
        space = policy.manifest.packed_action
        if space is None:
            env_actions: Any = self._env_arrays[0].copy()
        else:
            self._acted.join()
            env_actions = structured(space, (array.copy() for array in self._env_arrays))
        return Actions(env_actions, self._actions, self._logp, self._dist_inputs, self._states_out)
