"""Episodes that a runner follows, from the simulator's side: what the runner makes of an observation where no action is
wanted, and how such an episode ends."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rllink_zmq.client_remote import AGAIN, OVER_CREDIT, Answer, RemotePolicy, forget_looked, place_of, refusal
from rllink_zmq.errors import ConnectionTimeout, RemovedError
from rllink_zmq.fragments import FragmentBuilder
from rllink_zmq.messages import SEEN, SEEN_REWARD, End

if TYPE_CHECKING:
    from rllink_zmq.client_flow import Flow

FOLLOWER_ANSWERS = 10.0
"""Seconds until a runner that is asked for an episode's last observation is given up."""


class PendingSeen:
    """What the runner that follows an episode makes of its newest observation, where no action is wanted: the episode
    has ended, or its fragment is to leave before there is room for another step."""

    def __init__(self, remote: RemotePolicy, builder: FragmentBuilder, end: End = "no") -> None:
        """The builder has been given the observation."""
        self._remote = remote
        self._builder = builder
        self._place = place_of(builder, end)
        self._arrays, self._how = self._to_ask()
        self._request = 0
        self._again_at = 0.0
        self._answer: Answer | None = None

    @property
    def of_now(self) -> bool:
        """Whether it is still about the episode's newest observation."""
        return self._place.t == self._builder.t0 + self._builder.steps

    def done(self) -> bool:
        """Whether it is there. Never waits. Raises RefusedError."""
        remote = self._remote
        remote.look()
        if self._answer is None and self._request:
            self._answer = remote.answers.pop(self._request, None)
        if self._answer is not None and self._answer.code == OVER_CREDIT:
            self._answer, self._request, self._again_at = None, 0, time.monotonic() + AGAIN
        if not self._request and remote.room and time.monotonic() >= self._again_at:
            builder = self._builder
            self._request = remote.ask(
                self._arrays, explore=builder.explore, evaluation=not builder.sent, places=[self._place], acts=False,
                **self._how,
            )  # fmt: skip
        return self._answer is not None

    @property
    def due(self) -> float:
        """When `done` has something to do, if nothing comes."""
        session = self._remote.session
        return session.next_deadline() if self._request else min(session.next_deadline(), self._again_at or math.inf)

    def take(self) -> None:
        """It is the builder's. Raises as `PendingActions.results` does."""
        answer = self._answer
        assert answer is not None
        if answer.code:
            raise refusal(answer)
        try:
            self._store(answer.arrays)
        except KeyError:
            raise RemovedError("nobody follows this episode any more: abandon it, and start another one") from None

    def forget(self) -> None:
        """It isn't wanted any more."""
        if self._request and self._answer is None:
            self._remote.session.forget(self._request)
            self._remote.answers.pop(self._request, None)

    def _to_ask(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """The request's columns, and what else it says."""
        return {"obs": self._builder.given[np.newaxis]}, {}

    def _store(self, arrays: dict[str, NDArray[Any]]) -> None:
        seen, reward = arrays[SEEN][0], float(arrays[SEEN_REWARD][0])
        self._builder.saw(seen)
        self._builder.rewarded(reward)


class Ending:
    """The end of an episode, for callers that go on meanwhile: where a runner follows the episode it is to say first
    what it makes of the last observation. `done()` says whether `result()` would wait."""

    def __init__(self, flow: Flow, builder: FragmentBuilder, end: End) -> None:
        """The builder has been given the observation."""
        self._flow = flow
        self._builder = builder
        self._end = end
        self._looked: PendingSeen | None = None
        self._until = time.monotonic() + FOLLOWER_ANSWERS
        self.taken = False
        if builder.steps and builder.follows:
            forget_looked(builder)
            self._looked = flow.look_through(builder, end)
        else:
            self._cut()

    @property
    def due(self) -> float:
        """When `done()` has something to do though nothing has come, on the monotonic clock."""
        return self._until if self._looked is None else min(self._until, self._looked.due)

    def done(self) -> bool:
        """Whether `result()` would return, or raise, at once. Never waits. Raises RefusedError."""
        if self.taken or self._looked is None or self._flow.closed or self._looked.done():
            return True
        self._flow.look_if_due()
        return time.monotonic() >= self._until

    def result(self) -> None:
        """The fragment leaves. Raises RemovedError, and abandons the episode, where nobody follows it any more, or its
        runner doesn't answer for 10 s."""
        looked, remote = self._looked, self._flow.remote
        if self.taken or looked is None:
            return
        if self._flow.closed:
            self.give_up()
            return
        try:
            if not self.done() and remote is not None:
                self._flow.wait(self.done, remote.why, at=remote.connection)
            if not looked.done():
                raise ConnectionTimeout("no answer has come")
            looked.take()
        except ConnectionTimeout as e:
            where = f"episode '{self._builder.episode}'"
            raise RemovedError(f"the runner that follows {where} doesn't answer: {e}") from None
        else:
            self._cut()
        finally:
            looked.forget()
            if not self.taken:
                self.give_up()

    def give_up(self) -> None:
        """Abandon the episode: what isn't sent yet is discarded and counted."""
        if not self.taken:
            self.taken = True
            self._flow.abandon(self._builder)
            self._leave()

    def _cut(self) -> None:
        self.taken = True
        if self._builder.steps:
            self._flow.cut(self._builder, self._end)
        self._leave()

    def _leave(self) -> None:
        self._builder.limit = 0
        self._flow.builders.pop(self._builder.episode, None)


__all__ = ["Ending", "PendingSeen"]
