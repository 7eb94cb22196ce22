"""The learner's side of an audit: a learner connector that logs which fragments' steps enter a train batch.

RLlib joins, slices and copies episodes on their way to a learner, and no attribute of an episode survives all of it. A
column of model outputs does: with an audit each step carries its fragment's session and number, and its own place.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllink_zmq.audit import Log, Run

COLUMN = "rllink_audit"
"""Of `extra_model_outputs`: four int64 a step, the two halves of the session, the fragment's number, the step's index
in the fragment. After the piece has seen an episode, what it read is under this key of its `custom_data`."""

EXTENDED = "_added_loss_mask_for_valid_episode_ts"
"""RLlib's mark in the connectors' shared data: `AddOneTsToEpisodesAndTruncate` came before, and the last step of each
episode is a copy of the one before it."""

Builder = Callable[[Any, Any], Any]
"""`config.learners(learner_connector=...)`: (observation space, action space) -> a piece, or a list of them."""


def names(session: bytes, number: int, steps: int) -> NDArray[np.int64]:
    """The column of one fragment, shape (steps, 4)."""
    column = np.empty((steps, 4), np.int64)
    column[:, :2] = np.frombuffer(session, "<i8")
    column[:, 2] = number
    column[:, 3] = np.arange(steps)
    return column


def runs(column: NDArray[np.int64]) -> list[Run]:
    """The column of a chunk, in pieces of one fragment each whose steps follow each other."""
    if not len(column):
        return []
    ends = np.flatnonzero((np.diff(column, axis=0) != (0, 0, 0, 1)).any(axis=1)) + 1
    edges = [0, *ends.tolist(), len(column)]
    return [
        Run(column[a, :2].astype("<i8").tobytes().hex(), int(column[a, 2]), int(column[a, 3]), b - a)
        for a, b in pairwise(edges)
    ]


class AuditPiece(ConnectorV2):
    """Logs what is in the episodes of one train batch, and takes the column out of them: it is of no use to a learner.

    Works in whatever process it is called in, the first in the pipeline but for RLlib's own that lengthens episodes.
    An episode that comes again is seen again.
    """

    def __init__(
        self,
        input_observation_space: Any = None,
        input_action_space: Any = None,
        *,
        log: Log,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_observation_space, input_action_space, **kwargs)
        self._log = log
        self._batches = 0

    def __call__(
        self, *, batch: Any, episodes: list[Any], shared_data: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        self._batches += 1
        extended = bool((shared_data or {}).get(EXTENDED))
        found: list[Run] = []
        unnamed = 0
        for episode in self.single_agent_episode_iterator(episodes, agents_that_stepped_only=False):
            mine = take_names(episode, extended)
            if mine is None:
                unnamed += len(episode) - extended
            else:
                found += mine
        self._log.entered(found, unnamed, self._batches)
        return batch


def take_names(episode: SingleAgentEpisode, extended: bool) -> list[Run] | None:
    """The fragments whose steps `episode` holds, in order; None if it doesn't say. `extended`: its last step is none.

    The column goes; what it said stays, so that the same episode says it again.
    """
    if COLUMN in episode.extra_model_outputs:
        column = episode.get_extra_model_outputs(COLUMN, indices=slice(0, len(episode) - extended))
        episode.custom_data[COLUMN] = runs(np.asarray(column, np.int64).reshape(-1, 4))
        del episode.extra_model_outputs[COLUMN]
    return cast("list[Run] | None", episode.custom_data.get(COLUMN))


class AuditedConnectors:
    """A config's `learner_connector`: `AuditPiece`, then what `user` makes."""

    def __init__(self, user: Builder | None, directory: str | os.PathLike[str]) -> None:
        self.user = user
        self.directory = directory

    def __call__(self, observation_space: Any, action_space: Any) -> list[Any]:
        made = [] if self.user is None else self.user(observation_space, action_space)
        more = list(made) if isinstance(made, list | tuple) else [made]
        return [AuditPiece(observation_space, action_space, log=Log(self.directory, "learner")), *more]


def audited(connector: Builder | None, directory: str) -> Builder | None:
    """A `learner_connector` that logs into `directory` and goes on with `connector`; "" = without a log."""
    user = connector.user if isinstance(connector, AuditedConnectors) else connector
    return AuditedConnectors(user, directory) if directory else user


def runner_log(directory: str) -> Log | None:
    """Where a runner tells what it hands over; None without an audit."""
    return Log.shared(directory, "runner") if directory else None
