"""A policy that acts for a fixed number of observations at once, again and again: all arrays are bound once."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllink_zmq.errors import PolicyError
from rllink_zmq.policy import Actions, Policy


class BatchPolicy:
    """`policy` for `rows` observations a call: what `Policy.act` answers, at less than its cost. Not for policies with
    a memory or packed observations. Made once the policy has weights; newer ones are used as they are applied."""

    def __init__(self, policy: Policy, rows: int) -> None:
        manifest = policy.manifest
        if manifest.state or manifest.parts or manifest.action_parts:
            raise PolicyError(
                "a batch that is bound once is for policies without a memory, of plain observations and actions"
            )
        self.policy = policy
        self.rows = rows
        observation, action, env_action = manifest.observation, manifest.action, manifest.env_action
        self._session = policy.open_session(rows)
        self._observations = np.zeros((rows, *observation.shape), observation.dtype)
        self._noise = np.zeros((rows, *manifest.noise_shape), np.float32)
        actions = np.zeros((rows, action.size), action.dtype)
        logp = np.zeros((rows, 1), np.float32)
        self._dist_inputs = np.zeros((rows, manifest.action_dist_inputs), np.float32)
        outputs = {"actions": actions, "action_logp": logp, "action_dist_inputs": self._dist_inputs}
        env_actions = actions
        if policy.transforms:
            env_actions = outputs["env_actions"] = np.zeros((rows, env_action.size), env_action.dtype)
        self._actions = actions.reshape(rows, *action.shape)
        self._env_actions = env_actions.reshape(rows, *(env_action if policy.transforms else action).shape)
        self._logp = logp.reshape(rows)
        inputs = {"observations": self._observations, "noise": self._noise}
        self._epsilon = np.zeros((rows, 1), np.float32)
        if manifest.epsilon:
            inputs["epsilon"] = self._epsilon
        self._binding = policy.bind(self._session, inputs, outputs)

    def act(self, observations: NDArray[Any]) -> Actions:
        """Actions for (rows, *observation.shape), drawn unless the training takes the most likely ones.
        `env_actions` is new; the rest are views that THE NEXT CALL OVERWRITES."""
        self._observations[...] = observations
        if self.policy.manifest.explores:  # else they stay zero
            self.policy.draw(self._noise)
            self._epsilon.fill(self.policy.epsilon)
        self._session.run_with_iobinding(self._binding)
        return Actions(self._env_actions.copy(), self._actions, self._logp, self._dist_inputs)
