"""Actions from the service: runners compute them, the simulator keeps its fragment as it does with a policy of its own.

A request is one observation or many. Several may be open at once, of different episodes. Each answer says which weights
chose: where they have changed, a fragment ends before that step.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rllink_zmq import __version__
from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.errors import EpisodeError, PolicyError, ProtocolError, RemovedError
from rllink_zmq.fragments import Before, FragmentBuilder, Layout, Origin, Row, StateRow
from rllink_zmq.fragments_block import BlockBuilder
from rllink_zmq.messages import (
    ACTION,
    BEFORE,
    FOLLOWS,
    LOOKBACK,
    LOST,
    MAX_PLACES,
    SEEN,
    SEEN_REWARD,
    STARTS,
    STATE_IN,
    STATE_OUT,
    STEPS_BEFORE,
    AgentId,
    End,
    Message,
    Place,
    Told,
)
from rllink_zmq.packing import Packing
from rllink_zmq.session import ReaderSession, State
from rllink_zmq.transport import Connection
from rllink_zmq.wire import Buffer

if TYPE_CHECKING:
    from rllink_zmq.client_flow import Flow

log = logging.getLogger("rllink_zmq")

OVER_CREDIT = "over_credit"
AGAIN, AGAIN_MOST = 0.02, 1.0
"""Seconds until a request that was too much is sent again; twice as long each time."""

ASK_SPACES = 1.0
"""Seconds between two greetings of one that was given no spaces, and has been told none yet."""

Builder: TypeAlias = FragmentBuilder | BlockBuilder
Pairs: TypeAlias = Sequence[tuple[Builder, Any]]
"""Episodes, and the observation each has now; or worlds that are stepped together, and theirs."""


class Chosen(NamedTuple):
    """What an answer holds for each of its rows, and the layout of fragments that are made of it. `before`, `after`:
    the memory."""

    actions: NDArray[Any]
    logps: NDArray[Any]
    dist_inputs: NDArray[Any]
    before: dict[str, NDArray[Any]]
    after: dict[str, NDArray[Any]]
    layout: Layout

    def env_actions(self, answer: Answer) -> Any:
        """What `env.step` wants, in rows: an array, or dicts and tuples of them. Raises PolicyError where that isn't
        in the answer."""
        packing = self.layout.env_actions
        if packing is not None:
            return packing.unpack(packed_for_env(answer.arrays, packing, len(self.actions)))
        # A copy is the caller's own: the message's bytes can't be written.
        return answer.arrays.get("env_actions", self.actions).copy()


class Answer(NamedTuple):
    """What the service said: arrays by name, `rows` long each; of several modules the versions. Or an error's code and
    text."""

    origin: Origin
    arrays: dict[str, NDArray[Any]]
    code: str = ""
    text: str = ""
    modules: Mapping[str, int] = MappingProxyType({})


class RemotePolicy:
    """A connection to the service behind the broker at `address`.

    `origin`: which weights chose the newest actions; another object whenever that changes. `layout`: of the fragments
    that are made of them, once the first answer has shown it. `follows`: the service has asked which episodes requests
    are about. `follower`: which one it is.
    """

    def __init__(self, address: str, name: str) -> None:
        self.session = ReaderSession(os.urandom(16), name=f"{name}/acting"[:128], package=__version__)
        self.session.on_message = self._answered
        self.connection = Connection(self.session, address)
        self.origin: Origin | None = None
        self.layout: Layout | None = None
        self.follows = False
        self.follower = b""
        self.answers: dict[int, Answer] = {}
        self._spaces_at = 0.0

    def ask_spaces(self) -> None:
        """The trainer's spaces are wanted: WELCOME tells them, and the last one came before the trainer."""
        now = self.connection.clock()
        if self.session.spaces is None and now >= self._spaces_at:
            self._spaces_at = now + ASK_SPACES
            self.session.greet_again(now)
            self.connection.flush()

    @property
    def room(self) -> bool:
        """Whether one more request may be sent."""
        session = self.session
        return session.state is State.LIVE and len(session.open_acts) < max(1, session.requests)

    def ask(
        self,
        arrays: dict[str, NDArray[Any]],
        *,
        explore: bool | None,
        evaluation: bool,
        module: str = "",
        agents: Sequence[AgentId] = (),
        places: Sequence[Place] = (),
        told: Sequence[Told] = (),
        acts: bool = True,
        rows: int = 0,
        anew: bool = False,
    ) -> int:
        """Request actions for `obs`, (B, *shape), with what else the request has, of `module` for these `agents` if
        there are several; the number of the request. The rest is as in ACT. `rows`: where they aren't those of `obs`;
        `anew`: these episodes begin, and no other ones go on.
        """
        columns, body = to_buffers(arrays)
        copied = [bytes(buffer) for buffer in body]  # kept until the answer is there: the rows are the builder's
        request = self.session.act(
            columns, rows or len(arrays["obs"]), copied, self.connection.clock(), explore=explore,
            evaluation=evaluation, module=module, agents=agents, places=places, told=told, acts=acts,
            follower=self.follower if places and not anew else b"",
        )  # fmt: skip
        self.connection.flush()
        return request

    def look(self) -> None:
        """Read what has come. Raises RefusedError."""
        self.connection.look()
        if self.session.refusal is not None:
            raise self.session.refusal

    def why(self) -> str:
        """Why there is no answer yet, in words."""
        session = self.session
        if session.state is not State.LIVE:
            return f"no connection to the action service at {self.connection.address}. {session.notice}".rstrip()
        return (
            f"{len(session.open_acts)} requests for actions are open at {self.connection.address} and no runner has "
            f"answered: is a trainer running, with runners?"
        )

    def close(self) -> None:
        self.connection.close(0)

    def _answered(self, message: Message, body: Sequence[Buffer], now: float) -> None:
        if not isinstance(message, ACTION):
            return
        try:
            arrays = from_body(message.columns, body)
        except ProtocolError as e:
            self.answers[message.request] = Answer(Origin("", -1), {}, "malformed", str(e))
            return
        origin = Origin(message.run, message.version)
        self.follower = message.follower or self.follower
        self.answers[message.request] = Answer(
            origin if message.code else self.known(origin), arrays, message.code, message.text, message.modules
        )

    def known(self, origin: Origin) -> Origin:
        """The weights that have answered: the same object for the same ones."""
        if self.origin == origin:
            return self.origin
        if self.origin is None or origin > self.origin:
            self.origin = origin
        return origin


class PendingActions:
    """Actions that were asked for: one for each of `pairs`. Get one with `request`; `results()` once."""

    def __init__(self, flow: Flow, remote: RemotePolicy, pairs: Pairs) -> None:
        self._flow = flow
        self._remote = remote
        self._pairs = pairs
        self._beside: dict[str, NDArray[Any]] = {}
        self._builders: list[FragmentBuilder] = []
        # What was sent is what the fragments get: the caller's arrays may be others by the time of the answer.
        self._rows = self._observed(pairs)
        for builder, _ in pairs:
            builder.asked = True
        for builder in self._builders:
            builder.asks = self
        self._counted = sum(builder.width for builder, _ in pairs if builder.sent)
        self._answer: Answer | None = None
        self._pause = AGAIN
        self._again_at = math.inf
        self.taken = False
        self._request = self._send()
        flow.reserved += self._counted
        flow.credit -= self._counted

    def _observed(self, pairs: Pairs) -> NDArray[Any]:
        """The request's observations, one a row."""
        self._builders = [builder for builder, _ in pairs if isinstance(builder, FragmentBuilder)]
        rows = np.stack([builder.observe(observation) for builder, observation in pairs])
        layout = self._remote.layout
        if layout is None or layout.given is None:  # else whoever follows the episodes has these
            self._beside = _memory(self._builders, layout) | _before(self._builders, layout)
        return rows

    def _send(self) -> int:
        first = self._pairs[0][0]
        mine = set(map(id, self._builders))
        others = [b for b in self._flow.builders.values() if id(b) not in mine and (b.t0 or b.steps or b.asked)]
        return self._remote.ask(
            {"obs": self._rows, **self._beside}, explore=first.explore, evaluation=not first.sent,
            places=self._places(), anew=not others and not any(b.t0 or b.steps for b in self._builders),
        )  # fmt: skip

    def _places(self) -> list[Place]:
        """Where the rows belong, if the service wants to know."""
        if not self._remote.follows:
            return []
        if len(self._builders) > MAX_PLACES:
            raise EpisodeError(f"{len(self._builders)} episodes in one request; at most {MAX_PLACES}: ask twice")
        return [place_of(builder) for builder in self._builders]

    @property
    def due(self) -> float:
        """When `done` has something to do, if nothing comes."""
        return min(self._again_at, self._remote.session.next_deadline())

    def done(self) -> bool:
        """Whether there is nothing to wait for. Never waits. Raises RefusedError."""
        if self.taken or self._answer is not None:
            return True
        self._remote.look()
        self._answer = self._remote.answers.pop(self._request, None)
        now = time.monotonic()
        if self._answer is not None and self._answer.code == OVER_CREDIT:
            self._answer, self._again_at = None, now + self._pause
            self._pause = min(2 * self._pause, AGAIN_MOST)
        elif self._answer is not None and self._answer.code == FOLLOWS:
            self._follow()
            self._answer, self._again_at = None, now
        if now >= self._again_at:
            self._again_at, self._request = math.inf, self._send()
        if self._answer is None:
            self._flow.look_if_due()
        return self._answer is not None

    def shown(self, builder: FragmentBuilder) -> bool:
        """Let an episode that is asked for have what the runner has made of its newest observation, if that is known:
        its fragment may leave then."""
        answer = self._answer or self._remote.answers.get(self._request)
        if answer is None or SEEN not in answer.arrays:
            return False
        i = self._builders.index(builder)
        builder.saw(answer.arrays[SEEN][i])
        builder.rewarded(float(answer.arrays[SEEN_REWARD][i]))
        return True

    def _follow(self) -> None:
        """The service wants to know which episodes these are, and has what came before."""
        self._remote.follows = True
        self._beside = {}

    def results(self, timeout: float | None = None) -> Any:
        """What `env.step` wants, a row for each episode: an array, or dicts and tuples of them. Waits, and says why in
        the log every 5 s. Raises EpisodeError for a request that the service refuses, and the second time; PolicyError
        when it can't act; RemovedError when who followed the episode is gone; ConnectionTimeout after `timeout`
        seconds, and then it may be called again."""
        if self.taken:
            raise EpisodeError("this action has been taken already, or was given up: ask for the next one")
        if not self.done():
            self._flow.wait(self.done, self._remote.why, timeout, at=self._remote.connection)
        self._take()
        answer = self._answer
        assert answer is not None
        if answer.code:
            raise refusal(answer)
        return self._adopt(answer)

    def forget(self) -> None:
        """The answer is not wanted any more: the step has not been taken."""
        if not self.taken:
            self._take()
            self._remote.session.forget(self._request)
            self._remote.answers.pop(self._request, None)

    def _take(self) -> None:
        self.taken = True
        for builder, _ in self._pairs:
            builder.asked = False
        for builder in self._builders:
            builder.asks = None
        self._flow.reserved -= self._counted

    def _told(self, answer: Answer) -> Chosen:
        """What an answer says. Raises PolicyError if a learner could not use it."""
        flow, remote, arrays, rows = self._flow, self._remote, answer.arrays, len(self._rows)
        try:
            actions, logps = arrays["actions"], arrays["action_logp"].reshape(rows)
            dist_inputs = arrays["action_dist_inputs"].reshape(rows, -1)
        except (KeyError, ValueError) as e:
            raise PolicyError(f"the action service answers without actions that a learner can use: {e}") from None
        before = {name: arrays[name] for name in arrays if name.startswith(STATE_IN)}
        after = {name.removeprefix(STATE_OUT): arrays[name] for name in arrays if name.startswith(STATE_OUT)}
        layout = flow.layout_of("acted")
        assert layout is not None  # or nothing had been asked
        state = tuple(StateRow(name, Row(array.shape[1:], array.dtype)) for name, array in after.items())
        # Said where it was not asked by: in an episode's first step, and when another policy came.
        lookback = int(arrays[LOOKBACK][0]) if LOOKBACK in arrays else layout.lookback
        told = layout._replace(dist_inputs=dist_inputs.shape[1], state=state, lookback=lookback)
        seen, given = arrays.get(SEEN), layout.given or layout.obs
        if seen is not None:
            told = told._replace(obs=Row(seen.shape[1:], seen.dtype), given=given)
        elif layout.given is not None:
            told = told._replace(obs=given, given=None)
        if told != layout:
            layout = remote.layout = told._replace(starts=())
        return Chosen(actions, logps, dist_inputs, before, after, layout)

    def _adopt(self, answer: Answer) -> Any:
        """The steps whose actions have come are the episodes'."""
        flow, chosen = self._flow, self._told(answer)
        before, after, layout = chosen.before, chosen.after, chosen.layout
        actions, logps, dist_inputs = chosen.actions, chosen.logps.tolist(), chosen.dist_inputs
        seen = answer.arrays.get(SEEN)
        rewards = answer.arrays.get(SEEN_REWARD)
        for builder in self._builders:  # before any of them takes its step
            if builder.t0 + builder.steps and builder.follows != (layout.given is not None):
                raise RemovedError(
                    f"episode '{builder.episode}' has begun in a training that handles observations in another way "
                    f"than the one that goes on: abandon this episode, and start another one"
                )
        for i, builder in enumerate(self._builders):
            forget_looked(builder)
            builder.observe(self._rows[i])
            if builder.follows and seen is not None and rewards is not None:
                builder.saw(seen[i])
                builder.rewarded(float(rewards[i]))
            other = builder.origin is not answer.origin or builder.layout is not layout
            if not builder.steps or other or (builder.follows and builder.full):
                # Other weights chose than those of the steps before, or these have left meanwhile.
                if builder.steps:
                    flow.cut(builder, "no")
                if not builder.t0:
                    builder.began = flow.connection.clock()
                builder.begin(layout, "acted", answer.origin, flow.length(layout, "acted", builder))
                builder.observe(self._rows[i])
                if seen is not None:
                    builder.saw(seen[i])
                    flow.judge(builder, layout)
            if builder.fresh and before:
                builder.remember([before[STATE_IN + name][i] for name in after])
            builder.act(actions[i], logps[i], dist_inputs[i], [array[i] for array in after.values()])
        return chosen.env_actions(answer)


def forget_looked(builder: FragmentBuilder) -> None:
    """What was asked of this episode's newest observation isn't wanted any more."""
    if builder.looked is not None:
        builder.looked.forget()
        builder.looked = None


def place_of(builder: FragmentBuilder, end: End = "no") -> Place:
    """Where the newest observation of this episode belongs."""
    return Place(builder.episode, builder.t0 + builder.steps, builder.told_reward, end)


def refusal(answer: Answer) -> EpisodeError | PolicyError:
    """What to raise for an answer without actions."""
    error: dict[str, type[EpisodeError | PolicyError]] = {
        "failed": PolicyError, LOST: RemovedError, "no_module": RemovedError,
    }  # fmt: skip
    return error.get(answer.code, EpisodeError)(f"the action service refuses ({answer.code}): {answer.text}")


def packed_for_env(arrays: dict[str, NDArray[Any]], packing: Packing, rows: int) -> NDArray[np.uint8]:
    """The answer's `env_actions`, of several parts. Raises PolicyError where they are none of this space."""
    found = arrays.get("env_actions")
    if found is None or found.dtype != np.uint8 or found.shape != (rows, packing.nbytes):
        said = "none" if found is None else f"{found.dtype}{list(found.shape[1:])}"
        raise PolicyError(
            f"the action service answers with env_actions of {said}, expected uint8[{packing.nbytes}]: start the "
            f"simulator with the trainer's environment"
        )
    return found


def _memory(builders: Sequence[FragmentBuilder], layout: Layout | None) -> dict[str, NDArray[Any]]:
    """A request's columns of a recurrent policy's memory: none where all episodes begin. What the policy begins with is
    the service's to know."""
    state = layout.state if layout is not None else ()
    starts = np.array([builder.fresh or builder.remembers != state for builder in builders])
    if not state or starts.all():
        return {}
    columns: dict[str, NDArray[Any]] = {STARTS: starts} if starts.any() else {}
    for j, part in enumerate(state):
        column = columns[STATE_IN + part.name] = np.zeros((len(builders), *part.row.shape), part.row.dtype)
        for i, builder in enumerate(builders):
            if not starts[i]:
                column[i] = builder.state[j]
    return columns


def _before(builders: Sequence[FragmentBuilder], layout: Layout | None) -> dict[str, NDArray[Any]]:
    """A request's columns of earlier observations, which stand at the end of each row: none where the policy looks at
    none, or all episodes begin."""
    if layout is None or not layout.lookback or not any(builder.t0 + builder.steps for builder in builders):
        return {}
    return before_of([builder.before() for builder in builders], layout.lookback)


def before_of(known: Sequence[Before], lookback: int) -> dict[str, NDArray[Any]]:
    """The columns of earlier steps, of which `known` are those before each row, `lookback` at most."""
    columns = {
        name: np.zeros((len(known), lookback, *array.shape[1:]), array.dtype)
        for name, array in zip(BEFORE, known[0], strict=True)
    }
    counts = np.zeros(len(known), np.int32)
    for i, some in enumerate(known):
        counts[i] = len(some.rewards)
        for column, array in zip(columns.values(), some, strict=True):
            column[i, lookback - len(array) :] = array
    return columns | {STEPS_BEFORE: counts}


def request(
    flow: Flow, remote: RemotePolicy, pairs: Pairs, pending: type[PendingActions] = PendingActions
) -> PendingActions:
    """Ask the service for an action for each of these episodes. Waits while there is no room for the steps, or for one
    more request. Raises RefusedError, and what `Flow.prepare` does."""

    def room() -> bool:
        flow.look_if_due()
        remote.look()
        return remote.room

    if len({(builder.sent, builder.explore) for builder, _ in pairs}) > 1:
        raise EpisodeError("one request to the service is for episodes that are all trained on, or all not: ask twice")
    flow.prepare(pairs, "acted", wait=True)
    if not room():
        flow.wait(room, remote.why, at=remote.connection)
    return pending(flow, remote, pairs)


class PendingAction:
    """An action that was asked for with `Episode.get_action_async`."""

    def __init__(self, pending: PendingActions) -> None:
        self._pending = pending

    def done(self) -> bool:
        """Whether `result()` would return at once. Never waits."""
        return self._pending.done()

    @property
    def due(self) -> float:
        """When `done()` has something to do though nothing has come, on the monotonic clock."""
        return self._pending.due

    def forget(self) -> None:
        """Give it up: the step has not been taken, and the episode goes on as if nothing had been asked."""
        self._pending.forget()

    def result(self, timeout: float | None = None) -> Any:
        """The action, as `env.step` wants it. Once. Waits and raises as `Episode.get_action` does; raises
        ConnectionTimeout after `timeout` seconds, and then it may be called again."""
        return _first(self._pending.results(timeout))


def _first(actions: Any) -> Any:
    """The first row of dicts and tuples of arrays, or of an array."""
    if isinstance(actions, dict):
        return {key: _first(inner) for key, inner in actions.items()}
    if isinstance(actions, tuple):
        return tuple(_first(inner) for inner in actions)
    row = actions[0]
    return int(row) if row.ndim == 0 and row.dtype.kind in "iu" else row
