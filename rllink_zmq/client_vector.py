"""The vector form of a client: many worlds that are stepped together, columns in and columns out.

Nothing here loops over the worlds. When steps may be taken, when fragments are cut, and what weights they are of is
`Flow`'s to say, as for single episodes: to it the worlds are one builder that takes `width` steps at once.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rllink_zmq.arrays import Array
from rllink_zmq.client_flow import Flow
from rllink_zmq.client_remote import Answer, Pairs, PendingActions, request
from rllink_zmq.errors import EpisodeError, VectorError
from rllink_zmq.fragments_block import BlockBuilder
from rllink_zmq.messages import STARTS, STATE_IN
from rllink_zmq.policy_batch import BatchPolicy

_now = time.monotonic
_clock = time.perf_counter


class Vector:
    """N worlds that are stepped together. Get one with `Client.vector`.

    For each step: `get_actions`, step the simulation, `log_step`. A world whose episode has ended begins the next one
    with the observation that is given next, or rests until it has one. Observations and actions of several parts are
    dicts and tuples of arrays, as Gymnasium's vector environments have them, with a row for each world in each array. A
    policy that looks at earlier observations (stacked frames) is refused: an episode for each world serves it.
    """

    def __init__(self, flow: Flow, width: int) -> None:
        """Use `Client.vector`."""
        self.width = width
        self.open = True
        self._flow = flow
        self._block = BlockBuilder(f"{flow.session.session.hex()}-worlds", width)
        self._batch: BatchPolicy | None = None
        self._pending: PendingActions | None = None
        flow.builders[self._block.episode] = self._block

    @property
    def episode_returns(self) -> NDArray[np.float64]:
        """(N,): the sum of all rewards so far of the episode that each world is in."""
        return self._block.returns.copy()

    def get_actions(self, observations: Any, resting: Any = None) -> Any:
        """The policy's actions for `observations`, as the worlds want them: a row for each.

        `observations`: (N, *shape), or a structure of such arrays. `resting`: (N,) bool, the worlds that only reset
        themselves with this step, as Gymnasium's vector environments do in the mode NEXT_STEP: it is no step of an
        episode, and their action counts nothing. Waits, and says why in the log every 5 s, while there is no policy or
        no room for another step. Raises EpisodeError for what doesn't fit, and where the last step has not been logged;
        RefusedError.
        """
        flow, block = self._flow, self._block
        if flow.remote is not None:
            return self.get_actions_async(observations, resting).results()
        self._check("get_actions")
        block.rest(resting)
        while True:
            if not self.ready:
                flow.prepare([(block, observations)], "acted", wait=True)
                if flow.asks:
                    return self.get_actions_async(observations, resting).results()
            reader = flow.reader
            with reader.lock:
                policy = reader.policy
                # Another thread may have switched the policy: a fragment has one version's actions only.
                if block.origin is reader.origin and policy is not None:
                    began = _clock()
                    rows = block.observe(observations)
                    taken = _clock()
                    if self._batch is None or self._batch.policy is not policy:
                        self._batch = BatchPolicy(policy, self.width)
                    acted = self._batch.act(rows, block.memory)
                    chosen = _clock()
                    block.act(acted.actions, acted.action_logp, acted.action_dist_inputs, _now(), acted.state)
                    break
        if block.rows == 1:
            block.timings |= {"observation": taken - began, "inference": chosen - taken, "action": _clock() - chosen}
        flow.credit -= self.width
        return acted.env_actions

    def get_actions_async(self, observations: Any, resting: Any = None) -> PendingActions:
        """Ask the service for the actions, in one request, and go on: `results()` of what is returned is what
        `get_actions` returns, `done()` says whether it is there. With `connect(inference="remote")` alone."""
        flow = self._flow
        if flow.remote is None:
            raise EpisodeError('get_actions_async asks the action service: connect(..., inference="remote")')
        self._check("get_actions_async")
        self._block.rest(resting)
        self._pending = request(flow, flow.remote, [(self._block, observations)], PendingColumns)
        return self._pending

    @property
    def ready(self) -> bool:
        """The quick answer, for nearly every step: one more row of this block, and nothing to look at before."""
        block, flow = self._block, self._flow
        return (
            block.begun
            and block.rows < block.limit
            and block.origin is flow.reader.origin
            and flow.remote is None
            and flow.credit >= self.width
            and _now() < flow.look_at
        )

    def can_act(self, observations: Any, resting: Any = None) -> bool:
        """Whether `get_actions` would return at once; with the service: whether it may ask. Never waits.

        When it would not, what has been built is sent, with `observations` as the last ones: the next call must have
        the same."""
        if self.ready:
            return True
        flow = self._flow
        if flow.remote is not None and not flow.remote.room:
            flow.look_if_due()
            flow.remote.look()
            return False
        self._check("can_act")
        self._block.rest(resting)
        return flow.prepare([(self._block, observations)], "acted", wait=False) is not None

    def log_step(
        self, rewards: Any, terminated: Any, truncated: Any, last_observations: Any = None
    ) -> NDArray[np.float64]:
        """What the last actions led to: `rewards` (N,), `terminated` and `truncated` (N,) bool. Where an episode ended,
        `last_observations`, as `observations`, has its last one; other rows aren't looked at, nor are those of
        worlds that rested. Returns the returns of the episodes that ended, in the order of their worlds.

        Raises EpisodeError for what doesn't fit (then nothing is logged), and where there was no action."""
        block = self._block
        if block.logged or not block.rows:
            raise EpisodeError("log_step is for the last actions, and there are none: call get_actions first")
        return block.log(rewards, terminated, truncated, last_observations, _now())

    def end(self, observations: Any) -> NDArray[np.float64]:
        """All worlds stop here: their episodes are truncated, with `observations` as what the last actions led to.
        Returns the returns of these episodes. Those whose last steps are on their way already stay without an end, and
        actions that were asked for are given up."""
        self._forget()
        self._check("end")
        block, flow = self._block, self._flow
        returns = block.cut_short(observations)
        if block.steps:
            flow.cut(block, "no")
            flow.connection.flush()
        return returns

    def abandon(self) -> None:
        """Leave the worlds as if the simulator had been lost: what isn't sent yet is discarded and counted."""
        if self.open:
            self.open = False
            self._forget()
            self._flow.abandon(self._block)
            self._flow.builders.pop(self._block.episode, None)

    def _forget(self) -> None:
        if self._pending is not None:
            self._pending.forget()
            self._pending = None

    def _check(self, call: str) -> None:
        if self._flow.closed:
            raise EpisodeError(f"{call} of worlds whose client is closed: connect() again")
        if not self.open:
            raise EpisodeError(f"{call} after abandon(): make another one with Client.vector()")
        if not self._block.logged:
            raise EpisodeError(f"{call}: log_step() says first what the last actions led to")
        if self._pending is not None and not self._pending.taken:
            raise EpisodeError(f"{call}: actions have been asked for already: take their results() first")


class PendingColumns(PendingActions):
    """Actions of all worlds that were asked for. `results()` once."""

    def _observed(self, pairs: Pairs) -> NDArray[Any]:
        ((block, observations),) = pairs
        assert isinstance(block, BlockBuilder)
        self._block = block
        rows: Array = block.observe(observations).copy()
        layout = self._remote.layout
        if layout is not None and layout.state and block.layout is layout and not block.fresh.all():
            # Without these columns all begin.
            self._beside = {STATE_IN + s.name: a for s, a in zip(layout.state, block.memory, strict=True)}
            if block.fresh.any():
                self._beside[STARTS] = block.fresh.copy()
        return rows

    def _follow(self) -> None:
        raise VectorError(
            "runners follow each episode of this policy, which the vector form doesn't serve: use an episode for each "
            "world, with get_actions for all of them (drive_vector does)"
        )

    def _adopt(self, answer: Answer) -> Any:
        flow, block, chosen = self._flow, self._block, self._told(answer)
        if not block.steps or block.origin is not answer.origin or block.layout is not chosen.layout:
            # Other weights chose than those of the steps before, or these have left meanwhile.
            block.observe(self._rows)
            if block.steps:
                flow.cut(block, "no")
            block.begin(chosen.layout, "acted", answer.origin, flow.length(chosen.layout, "acted", block))
        block.observe(self._rows)
        if chosen.before:
            block.remember([chosen.before[STATE_IN + name] for name in chosen.after])
        block.act(chosen.actions, chosen.logps, chosen.dist_inputs, _now(), list(chosen.after.values()))
        return chosen.env_actions(answer)
