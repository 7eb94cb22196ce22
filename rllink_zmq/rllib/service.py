"""The action service of a runner: requests that are pending become one batch, whenever the module is free.

It has a connection and a thread of its own: it answers while `sample()` waits and while the learner learns, and a
fragment never stands in front of a request. Its weights are the published ones, under the numbers that simulators know;
a batch is of one version.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rllink_zmq import __version__
from rllink_zmq.arrays import column_of, from_body, to_buffers
from rllink_zmq.errors import ProtocolError
from rllink_zmq.fragments import Before
from rllink_zmq.messages import (
    ACT,
    ACTION,
    ACTIONS_BEFORE,
    BEFORE,
    FOLLOWS,
    LOOKBACK,
    LOST,
    OBS_BEFORE,
    REWARDS_BEFORE,
    STARTS,
    STATE_IN,
    STEPS_BEFORE,
    Column,
)
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.following import Followed, FollowingActor, Follows, LostError
from rllink_zmq.session import State
from rllink_zmq.session_runner import ServiceSession
from rllink_zmq.transport import Connection, Subscription, beside
from rllink_zmq.transport_thread import ConnectionThread
from rllink_zmq.weights import STALLED, Wanted
from rllink_zmq.wire import Buffer

logger = logging.getLogger("rllink_zmq")

MAX_ROWS = 1024
"""Observations of one batch."""

SWITCH_INTERVAL = 0.1
"""Seconds between two weights versions to act with: a switch cuts every fragment that is being built. Where a version
is for a whole round of steps there is no such wait."""

NEWS_INTERVAL = 0.05
"""Seconds between two looks for newer weights while nobody asks."""


SAY_WHICH = "runners follow the episodes of this training: 'places' say which the request is about"


def _said(columns: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {np.dtype(dtype)}{list(shape)}" for name, (dtype, shape) in columns.items())


Asked: TypeAlias = tuple[ACT, Sequence[Buffer]]
"""A request, and its body."""


class OwnPolicy(Wanted):
    """Published weights, for a process that has the module itself."""

    def told(self, run: str, version: int, policy: str, now: float) -> None:
        super().told(run, version, "", now)

    @property
    def newest(self) -> tuple[int, bytes] | None:
        """Version and body of this run's newest weights."""
        held = self.weights
        return (held.version, held.data) if held is not None and held.run == self.run else None


class ActService:
    """Answers ACT for one run. `max_rows`: observations of one batch; `max_wait`: seconds that its first request may
    wait for company. `explores`: whether training draws its actions; evaluation does as the manifest says. `rounds`:
    training samples a round of steps for each version. `module`: the name that requests give to what `actor` has."""

    module = ""
    _topics: tuple[str, ...] = ()

    def __init__(
        self,
        address: str,
        run: str,
        name: str,
        actor: ModuleActor,
        *,
        max_rows: int = MAX_ROWS,
        max_wait: float = 0.0,
        explores: bool = True,
        rounds: bool = False,
    ) -> None:
        self.actor = actor
        self._switch_interval = 0.0 if rounds else SWITCH_INTERVAL
        self._explores = explores
        self.run = run
        self.batches = self.rows = 0
        self._address = address
        self._max_rows = max_rows
        self._max_wait = max_wait
        self._first_at: float | None = None
        self._wanted = self._wants()
        self._subscription: Subscription | None = None
        self._asked_greeting = 0
        self._switched = float("-inf")
        self._news_at = 0.0
        self._columns: dict[tuple[str, int, tuple[str, ...]], tuple[Column, ...]] = {}
        self.session = ServiceSession(secrets.token_bytes(16), run, name=name, package=__version__)
        self.session.on_message = self._wanted.answer
        self._thread = ConnectionThread(Connection(self.session, address), self._step, f"{name}-acting")
        self._thread.start()

    def stop(self) -> None:
        """Say BYE: what is open goes to others."""
        self._thread.stop()
        if self._subscription is not None and not self._thread.is_alive():
            self._subscription.close()
            self._subscription = None

    # ---- in the thread

    def _step(self, now: float) -> float:
        session = self.session
        if session.asked or now >= self._news_at:
            self._news_at = now + NEWS_INTERVAL
            self._read_weights(now)
        asked = self._answerable()
        if not asked:
            self._first_at = None
            return self._news_at
        if self._first_at is None:
            self._first_at = now
        pending = sum(message.rows for message, _ in asked.values())
        if now < self._first_at + self._max_wait and pending < self._max_rows:
            return self._first_at + self._max_wait
        self._first_at = None
        rows = count = 0
        for message, _ in asked.values():
            if count and rows + message.rows > self._max_rows:
                break
            rows += message.rows
            count += 1
        self._answer_all([session.asked.pop(key) for key in list(asked)[:count]], now)
        return now if self._answerable() else self._news_at

    def _answerable(self) -> dict[tuple[bytes, int], Asked]:
        """What is asked of a module whose weights are here."""
        return self.session.asked if self.actor.version >= 0 else {}

    def _answer_all(self, batch: Sequence[Asked], now: float) -> None:
        for explore in (True, False):
            some = [(message, body) for message, body in batch if self._draws(message) is explore]
            if some:
                self._answer(some, explore, now)

    def _answer(self, batch: Sequence[Asked], explore: bool, now: float) -> None:
        """One forward pass for all that fits; a reason for each that doesn't."""
        actor = self.actor
        fit: list[ACT] = []
        bodies: list[Sequence[Buffer]] = []
        for message, body in batch:
            if actor.manifest.seen is not None and not message.places:
                self._refuse(message, FOLLOWS, SAY_WHICH, now)
                continue
            try:
                why = self._misfit(message, body)
            except (ProtocolError, ValueError, IndexError) as e:  # columns that don't belong together
                why = f"columns that don't fit each other: {e}"
            if why:
                self._refuse(message, "malformed", why, now)
                continue
            fit.append(message)
            bodies.append(body)
        if not fit:
            return
        if isinstance(actor, FollowingActor):
            self._answer_followed(list(zip(fit, bodies, strict=True)), actor, explore, now)
            return
        rows = sum(message.rows for message in fit)
        try:
            if actor.memory or actor.lookback or actor.agents:
                asked = [from_body(message.columns, body) for message, body in zip(fit, bodies, strict=True)]
                observations = np.concatenate([one["obs"] for one in asked])
            else:
                joined = bytearray().join(buffer for body in bodies for buffer in body)
                observations = np.frombuffer(joined, actor.dtype).reshape(rows, *actor.shape)
                asked = []
            bad = actor.not_finite(observations)
            if bad.any():
                self._answer(self._without(fit, bodies, bad, now), explore, now)
                return
            arrays = self._act_on(fit, asked, observations, explore) if asked else actor.act(observations, explore)
        except Exception as e:  # a user's module may raise anything; who asked is told, and the service goes on
            if len(fit) > 1:  # perhaps for one of them alone: an observation that overflows, say
                for one in zip(fit, bodies, strict=True):
                    self._answer([one], explore, now)
                return
            self._failed(fit, e, now)
            return
        self.batches += 1
        self.rows += rows
        if rows == len(fit):
            # Each asks for one: their columns' bytes lie side by side, so that an answer is one slice.
            flat = [array.reshape(rows, -1).view(np.uint8) for array in arrays.values()]
            beside_each_other = np.concatenate(flat, axis=1)
            width, data = beside_each_other.shape[1], beside_each_other.tobytes()
            columns = self._columns_of(arrays, 1)
            for i, message in enumerate(fit):
                self._give(message, columns, data[i * width : (i + 1) * width], now)
            return
        first = 0
        for message in fit:
            last = first + message.rows
            answer = b"".join(array[first:last].tobytes() for array in arrays.values())
            self._give(message, self._columns_of(arrays, message.rows), answer, now)
            first = last

    def _answer_followed(self, batch: Sequence[Asked], following: Follows, explore: bool, now: float) -> None:
        """Answer requests about episodes that are followed, those of one kind together; what is wanted to be seen
        comes first, and of each episode one request at a time."""
        kinds: dict[tuple[bool, bool], list[tuple[ACT, Sequence[Followed]]]] = {}
        taken: set[tuple[bytes, str]] = set()
        later: list[Asked] = []
        for message, body in batch:
            keys = {(message.session, place.episode) for place in message.places}
            if keys & taken:
                later.append((message, body))
                continue
            taken |= keys
            try:
                if len(keys) < len(message.places):
                    raise ProtocolError("'places' names an episode twice")
                episodes = following.follow(message, body)
            except LostError as e:
                self._refuse(message, LOST, f"{e}: abandon this episode, and begin another one", now)
            except ProtocolError as e:
                self._refuse(message, e.code, str(e), now)
            except Exception as e:  # what RLlib's episode doesn't take
                self._failed([message], e, now)
            else:
                kinds.setdefault((message.acts, message.evaluation), []).append((message, episodes))
        for _, some in sorted(kinds.items()):
            self._answer_kind(some, following, explore, now)
        if later:
            self._answer_followed(later, following, explore, now)

    def _answer_kind(
        self, some: Sequence[tuple[ACT, Sequence[Followed]]], following: Follows, explore: bool, now: float
    ) -> None:
        try:
            answers = following.answer(some, explore)
        except Exception as e:  # a user's module or piece may raise anything
            if len(some) == 1:
                self._failed([some[0][0]], e, now)
                return
            for one in some:  # perhaps for one of them alone
                self._answer_kind([one], following, explore, now)
            return
        self.batches += 1
        for (message, _), answer in zip(some, answers, strict=True):
            self.rows += message.rows
            columns, body = to_buffers(answer.columns)
            told = ACTION(
                message.session,
                message.request,
                self.run,
                answer.version,
                columns,
                modules=dict(answer.modules),
                follower=self.session.session,
            )
            self.session.answer(told, body, now)

    def _failed(self, messages: Sequence[ACT], error: Exception, now: float) -> None:
        logger.warning("the module can't act: %s: %s", type(error).__name__, error)
        for message in messages:
            self._refuse(message, "failed", f"{type(error).__name__}: {error}"[:1000], now)

    def _without(
        self, fit: Sequence[ACT], bodies: Sequence[Sequence[Buffer]], bad: NDArray[np.bool_], now: float
    ) -> list[Asked]:
        """The requests that have no row of these; the others are told."""
        rest = []
        first = 0
        for message, body in zip(fit, bodies, strict=True):
            rows = bad[first : first + message.rows]
            first += message.rows
            if rows.any():
                text = f"the observation in row {int(rows.argmax())} holds NaN or infinity"
                self._say(message, ACTION(message.session, message.request, code="malformed", text=text), b"", now)
            else:
                rest.append((message, body))
        return rest

    def _act_on(
        self,
        fit: Sequence[ACT],
        asked: Sequence[dict[str, NDArray[Any]]],
        observations: NDArray[Any],
        explore: bool,
    ) -> dict[str, NDArray[Any]]:
        """Columns of the answer for requests that may bring more than an observation: memory, or what came before."""
        actor = self.actor
        memory = actor.memory
        state = memory.starts(len(observations))
        starts = np.ones(len(observations), bool)
        earlier: list[Before | None] = []
        first = 0
        for message, arrays in zip(fit, asked, strict=True):
            rows = slice(first, first + message.rows)
            first += message.rows
            if memory and STATE_IN + memory.names[0] in arrays:
                starts[rows] = arrays.get(STARTS, False)
                for array, name in zip(state, memory.names, strict=True):
                    array[rows] = arrays[STATE_IN + name]
            counts = arrays[STEPS_BEFORE].tolist() if OBS_BEFORE in arrays else []
            for i, count in enumerate(counts):
                earlier.append(Before(*(arrays[name][i, actor.lookback - count :] for name in BEFORE)))
            earlier += [None] * (message.rows - len(counts))
        agents = [agent for message in fit for agent in message.agents] if actor.agents else None
        columns = actor.act(observations, explore, state, starts, earlier, agents)
        if actor.lookback:
            columns[LOOKBACK] = np.full(len(observations), actor.lookback, np.int32)
        return columns

    def _columns_of(self, arrays: dict[str, NDArray[Any]], rows: int) -> tuple[Column, ...]:
        key = (self.module, rows, tuple(arrays))
        columns = self._columns.get(key)
        if columns is None:
            columns = tuple(column_of(name, array[:1].repeat(rows, 0)) for name, array in arrays.items())
            if rows <= 64:
                self._columns[key] = columns
        return columns

    def _give(self, message: ACT, columns: tuple[Column, ...], body: bytes, now: float) -> None:
        self._say(message, ACTION(message.session, message.request, self.run, self.actor.version, columns), body, now)

    def _refuse(self, message: ACT, code: str, text: str, now: float) -> None:
        self._say(message, ACTION(message.session, message.request, code=code, text=text), b"", now)

    def _say(self, message: ACT, answer: ACTION, body: bytes, now: float) -> None:
        self.session.answer(answer, [body] if body else [], now)

    def _draws(self, message: ACT) -> bool:
        if message.explore is not None:
            return message.explore
        return self.actor.manifest.evaluation_explores if message.evaluation else self._explores

    def _misfit(self, message: ACT, body: Sequence[Buffer]) -> str:
        """Why this request can't be answered; '' when it can."""
        actor, column = self.actor, message.columns[0]
        if message.module != self.module:
            return f"there is no module '{message.module}' here: leave it out"
        if actor.agents and not message.agents:
            return f"expected 'agents', whose each of the {message.rows} rows is: connectors may treat them differently"
        if message.told:
            return "this training has one agent, and the request tells of several: leave 'told' out"
        if message.places and actor.manifest.seen is not None and len(message.places) != message.rows:
            return f"expected 'places' of each of the {message.rows} rows, got {len(message.places)}"
        rest = message.columns[1:]
        if column.name != "obs" or (rest and not actor.memory and not actor.lookback):
            names = ", ".join(c.name for c in message.columns)
            return f"expected one column 'obs', got {names}"
        if column.shape[1:] != actor.shape or np.dtype(column.dtype) != actor.dtype:
            return (
                f"expected observations of {actor.dtype}{list(actor.shape)}, got {np.dtype(column.dtype)}"
                f"{list(column.shape[1:])}: start the simulator with the trainer's environment"
            )
        return self._misfit_beside(rest, body) if rest else ""

    def _misfit_beside(self, rest: Sequence[Column], body: Sequence[Buffer]) -> str:
        """Why what comes beside the observations doesn't fit."""
        actor = self.actor
        memory, lookback = actor.memory, actor.lookback
        found = {c.name: (c.dtype, c.shape[1:]) for c in rest}
        named = zip(memory.names, memory.start, strict=True)
        expected = {STATE_IN + name: (array.dtype.str, array.shape) for name, array in named}
        action = actor.manifest.action
        history = {
            OBS_BEFORE: (actor.dtype.str, (lookback, *actor.shape)),
            ACTIONS_BEFORE: (np.dtype(action.dtype).str, (lookback, *action.shape)),
            REWARDS_BEFORE: ("<f4", (lookback,)),
            STEPS_BEFORE: ("<i4", ()),
        }
        told = {name: found.pop(name) for name in history if name in found}
        if told and (told != history or not lookback):
            return f"expected {_said(history)}, or none of them where all rows begin an episode; got {_said(told)}"
        if told:
            columns = (Column("obs", actor.dtype.str, (rest[0].shape[0], *actor.shape)), *rest)
            arrays = from_body(columns, body)
            counts = arrays[STEPS_BEFORE]
            if counts.min() < 0 or counts.max() > lookback:
                return f"'{STEPS_BEFORE}' must be from 0 to {lookback}"
            there = np.arange(lookback) >= (lookback - counts.astype(np.int64))[:, np.newaxis]
            if there.any() and (why := actor.misfit_before(Before(*(arrays[name][there] for name in BEFORE)))):
                return why
        if found.get(STARTS) == ("|b1", ()):
            del found[STARTS]
        if found and found != expected:
            return (
                f"expected the policy's memory before this step, {_said(expected)}, or none of it where all rows "
                f"begin an episode; got {_said(found)}"
            )
        return ""

    # ---- weights

    def _read_weights(self, now: float) -> None:
        session, wanted = self.session, self._wanted
        if session.state is not State.LIVE:
            return
        self._tell(now)
        address = beside(self._address, session.weights_address) if session.weights_address else ""
        if self._subscription is not None and self._subscription.address != address:
            self._subscription.close()
            self._subscription = None
        if self._subscription is None and address:
            self._subscription = Subscription(address, self._topics)
        if self._subscription is not None:
            for message, body in self._subscription.read():
                wanted.news(message, body, now)
        moved = wanted.moved
        if session.greeting != self._asked_greeting or (moved is not None and now - moved >= STALLED):
            self._asked_greeting = session.greeting
            wanted.restart(now)
        session.ask(wanted.asks(now), now)
        self._switch(now)

    def _wants(self) -> Wanted:
        """What it is to hear of, from the beginning."""
        return OwnPolicy()

    def _tell(self, now: float) -> None:
        self._wanted.told(self.session.run, self.session.version, "", now)

    def _switch(self, now: float) -> None:
        """Act by the newest weights from now on."""
        wanted = self._wanted
        assert isinstance(wanted, OwnPolicy)
        newest = wanted.newest
        if newest is None or wanted.run != self.run or newest[0] <= self.actor.version:
            return
        if self.actor.version >= 0 and now - self._switched < self._switch_interval:
            return
        try:
            self.actor.apply(*newest)
        except Exception as e:  # torch's own errors too; the next version may fit
            logger.warning("weights %d can't be acted by: %s", newest[0], e)
        self._switched = now
