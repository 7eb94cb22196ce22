"""Fragments -> RLlib's `SingleAgentEpisode`.

Fragments of one answer that follow each other become one chunk, without a loop over steps: with hundreds of simulators
a fragment has two or three steps, and advantages that are cut there are hardly more than what the critic says. Where a
fragment does not continue what this runner handed over last of the same episode (a drop, a move between runners) the
rest gets a new episode id: RLlib's replay buffers take a gap for a bug and stop the training. So they do where the row
that two fragments share differs: a filter has learned meanwhile, or a simulator goes on from elsewhere.

A fragment of several episodes is checked as a whole, and cut into views. Thousands of episodes a second go through
here, so chunks are copies of a blank one rather than constructed: what RLlib's constructor checks has been checked.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import gymnasium as gym
import msgspec
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllink_zmq.arrays import Buffer
from rllink_zmq.audit import Log
from rllink_zmq.compression import arrays_of
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import ACTIONS_BEFORE, BEFORE, FRAGMENT, OBS_BEFORE, REWARDS_BEFORE, STATE_IN
from rllink_zmq.packing import packing_of
from rllink_zmq.packing_actions import action_packing
from rllink_zmq.rllib.audit import COLUMN, names
from rllink_zmq.rllib.blank import Blank
from rllink_zmq.rllib.checking import check_rows
from rllink_zmq.rllib.collector import collector_paused
from rllink_zmq.rllib.flattening import Came
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.session_runner import Lease
from rllink_zmq.wire import check_columns

ESCAPES = str.maketrans({"_": "%5F", "%": "%25"})
"""RLlib's learner takes samples of one episode for one long episode where its id has an underscore
(`AddObservationsFromEpisodesToBatch`): their sequences would run together."""

logger = logging.getLogger("rllink_zmq")

REMEMBERED = 10_000
"""Episodes whose continuation is known: more than simulators that one runner serves."""


class Finished(NamedTuple):
    """An episode that has ended: its whole length in env steps, return, and seconds."""

    length: int
    total: float
    seconds: float


class Built(NamedTuple):
    """A chunk; its episode's totals if it has ended; wall seconds of each of its steps at the simulator, acting
    included (None where the simulator doesn't tell, or the fragment before this one went elsewhere); what its fragments
    tell of single steps there."""

    episode: SingleAgentEpisode
    finished: Finished | None
    step_seconds: float | None
    timings: Sequence[Mapping[str, float]]


class Refusal(NamedTuple):
    """A fragment that RLlib doesn't get, and why."""

    message: FRAGMENT
    error: ProtocolError


class Rewrites(Protocol):
    """Connectors, where fragments become episodes: `FragmentConnectors` or `FlattenedFragments`."""

    @property
    def lookback(self) -> int: ...

    def rewrite(self, message: FRAGMENT, came: Came) -> tuple[Any, gym.Space[Any]]: ...

    def learn(self, message: FRAGMENT, came: Came) -> None: ...

    def dist_inputs(self, module: Any, message: FRAGMENT, came: Came) -> NDArray[Any] | None: ...


class Piece(NamedTuple):
    """One fragment, or one segment of it as if it had come alone; checked. Arrays: `observations` (a structure of
    arrays of `back` rows that came before, and steps + 1 of its own), the rest one row a step, as it travels."""

    message: FRAGMENT
    observations: Any
    actions: NDArray[Any]
    rewards: NDArray[np.float32]
    outputs: dict[str, NDArray[Any]]
    state: list[NDArray[Any]]
    """A recurrent policy's memory before each step and after the last: steps + 1 rows each."""
    back: int

    def cut(self, first: int, steps: int) -> Piece:
        """Its steps `first` to `first + steps - 1`, as if they had come alone. When they ended isn't known, unless they
        are its last ones."""
        if steps == self.message.steps:
            return self
        last = first + steps
        rows = slice(first, self.back + last + 1)  # as many before its own first one
        return Piece(
            cut_header(self.message, first, steps, float(self.rewards[:first].sum(dtype=np.float64))),
            tree.map_structure(lambda a: a[rows], self.observations),
            self.actions[first:last],
            self.rewards[first:last],
            {name: values[first:last] for name, values in self.outputs.items()},
            [column[first : last + 1] for column in self.state],
            self.back,
        )


def cut_header(message: FRAGMENT, first: int, steps: int, before: float) -> FRAGMENT:
    """Of steps `first` to `first + steps - 1` of this fragment; `before`: the rewards of those before."""
    last = first + steps == message.steps
    return msgspec.structs.replace(
        message,
        t0=message.t0 + first,
        steps=steps,
        end=message.end if last else "no",
        return_so_far=message.return_so_far + before,
        seconds=message.seconds if last else math.nan,
        timings={} if first else message.timings,
    )


class HasMessage(Protocol):
    """A checked fragment."""

    @property
    def message(self) -> FRAGMENT: ...


class CanBeCut(HasMessage, Protocol):
    """One that can be handed over in parts."""

    def cut(self, first: int, steps: int) -> Self: ...


P = TypeVar("P", bound=HasMessage)
C = TypeVar("C", bound=CanBeCut)


def cut(pieces: Sequence[C], first: int, steps: int) -> list[C]:
    """Steps `first` to `first + steps - 1` of pieces that follow each other."""
    found = []
    for piece in pieces:
        count = min(steps, piece.message.steps - first)
        if count > 0:
            found.append(piece.cut(first, count))
            steps -= count
        first = max(0, first - piece.message.steps)
    return found


class EpisodeBuilder:
    """Builds chunks for one runner. `module` fills in what a simulator that acts by itself doesn't know; `longest`:
    fragments are joined to chunks of at most so many steps (APPO and IMPALA cut their batch into rows of that length).
    `audit`: tells what is handed over, and has each step say which fragment's it is (`rllink_zmq.rllib.audit`).
    `connectors`: the user's own, for what they make of a fragment's observations. `dist_inputs`: how many numbers a row
    of that column must have; 0 = any. `needs_logp`: a fragment without `action_logp` can't be used; else it is NaN
    there, and chunks go into a replay buffer.
    `outputs`: episodes have what actions were drawn from, and their log-probabilities; RLlib's own runner has
    neither for DQN.
    """

    def __init__(
        self,
        observation_space: gym.Space[Any],
        action_space: gym.Space[Any],
        module: RLModule | None,
        longest: float = float("inf"),
        audit: Log | None = None,
        connectors: Rewrites | None = None,
        *,
        needs_logp: bool = True,
        outputs: bool = True,
    ) -> None:
        self.dist_inputs = 0
        self._needs_logp = needs_logp
        self._outputs = outputs
        self._connectors = connectors
        self._lessons: list[Callable[[], None]] = []  # of the fragment that is being checked
        self.observation_space = observation_space
        self.action_space = action_space
        self._packing = packing_of(observation_space)
        self._actions = action_packing(action_space)
        self.module = module
        self.memory = Memory(module)
        self.longest = longest
        self.audit = audit
        self._blank = Blank(observation_space, action_space)
        self._next: OrderedDict[tuple[bytes, str], tuple[int, str, float, Any]] = OrderedDict()

    def build(self, leases: Iterable[Lease]) -> tuple[list[Built], list[Refusal]]:
        """Chunks in the order of their first fragments, and the fragments whose columns are missing or don't fit the
        spaces."""
        with collector_paused():
            good, refused = self.check(leases)
            return self.join(good), refused

    def join(self, pieces: Iterable[Piece]) -> list[Built]:
        """Chunks of what was checked before, in the order of their first pieces."""
        with collector_paused():
            chunks = chunks_of(pieces, self.continues)
            built = [self._chunk(chunk) for chunk in chunks]
        if self.audit is not None:
            handed: dict[tuple[bytes, int], int] = {}
            for message in (piece.message for chunk in chunks for piece in chunk):
                key_of = message.session, message.number
                handed[key_of] = handed.get(key_of, 0) + message.steps
            self.audit.handed((*fragment, steps) for fragment, steps in handed.items())
        return built

    def forget(self) -> None:
        """RLlib may lack what it was given: no episode goes on under its id."""
        self._next.clear()

    def prepare(self, message: FRAGMENT, body: Sequence[Buffer]) -> list[Piece] | ProtocolError | None:
        """What `check` will say of this fragment, from any thread, before it is taken. None where that would take
        memory (what is compressed has no more bytes than it came with until then), or what isn't for other threads: the
        module, and the user's connectors."""
        named = any(column.name == Columns.ACTION_DIST_INPUTS for column in message.columns)
        if self._connectors is not None or message.compression or (self._outputs and not named):
            return None
        try:
            return self._check_columns(Lease(message, body))
        except ProtocolError as e:
            return e
        except Exception:  # whatever it is, it isn't this thread's: `check` meets it again, and says it
            return None

    def check(
        self, leases: Iterable[Lease], lessons: list[Callable[[], None]] | None = None
    ) -> tuple[list[Piece], list[Refusal]]:
        """What `build` would use of these, and what it would refuse. `lessons`: gets what would let connectors learn of
        them; None = they do so at once."""
        good: list[Piece] = []
        refused: list[Refusal] = []
        for lease in leases:
            self._lessons = []
            prepared: list[Piece] | ProtocolError | None = lease.prepared
            if isinstance(prepared, ProtocolError):
                refused.append(Refusal(lease.message, prepared))
                continue
            try:
                good += prepared if prepared is not None else self._check_columns(lease)
            except ProtocolError as e:
                refused.append(Refusal(lease.message, e))
            except Exception as e:  # a user's connector may raise anything; other fragments are not to suffer
                text = f"the configured connectors fail on it: {type(e).__name__}: {e}"
                refused.append(Refusal(lease.message, ProtocolError(text)))
            else:
                if lessons is None:
                    learn(self._lessons)
                else:
                    lessons += self._lessons
        return good, refused

    def continues(self, chunk: Sequence[Piece], piece: Piece) -> bool:
        """Whether RLlib may have `piece` as the rest of `chunk`."""
        first, last, message = chunk[0].message, chunk[-1].message, piece.message
        return (
            last.end == "no"
            and message.t0 == last.t0 + last.steps
            and message.t0 + message.steps - first.t0 <= self.longest
            and _dtypes(piece.observations) == _dtypes(chunk[0].observations)
            and piece.actions.dtype == chunk[0].actions.dtype
            and (self._needs_logp or mark_of(chunk[-1].observations, -1) == mark_of(piece.observations, piece.back))
        )

    def _check_columns(self, lease: Lease) -> list[Piece]:
        message = lease.message
        check_columns(message)
        arrays = arrays_of(message, lease.body)
        for needed in ("obs", "actions", "rewards"):
            if needed not in arrays:
                raise ProtocolError(f"a fragment needs the columns obs, actions and rewards: no '{needed}'")
        if self._needs_logp and "action_logp" not in arrays:
            raise ProtocolError(
                "this training's algorithm corrects for how probable each action was, and a fragment needs "
                "'action_logp': give it to log_action, or train with DQN or SAC"
            )
        actions = arrays["actions"]
        self._check_observations("obs", arrays["obs"])
        self._check_actions(actions)
        rewards = arrays["rewards"].astype(np.float32, copy=False)
        given = arrays.get("action_logp")
        logp = np.zeros(message.steps, np.float32) if given is None else given.astype(np.float32, copy=False)
        for name, values in (("rewards", rewards), ("action_logp", logp)):
            if values.ndim != 1 or not np.isfinite(values).all():
                raise ProtocolError(f"'{name}' must be one finite number a step, its shape is {list(values.shape)}")
        state = self._check_state(arrays)
        inputs = arrays.get("action_dist_inputs")
        if inputs is not None:
            self._check_dist_inputs(inputs)
        outputs: dict[str, NDArray[Any]] = {WEIGHTS_SEQ_NO: np.full(message.steps, message.version, np.int64)}
        if self._outputs:
            outputs[Columns.ACTION_LOGP] = logp if given is not None else np.full_like(logp, np.nan)
            if inputs is not None:
                outputs[Columns.ACTION_DIST_INPUTS] = inputs
        if self.audit is not None:
            outputs[COLUMN] = names(message.session, message.number, message.steps)
        if message.segments:
            return self._segments(message, arrays["obs"], actions, rewards, outputs, state)
        observations, back = self._seen(message, arrays, outputs)
        return [Piece(message, observations, actions, rewards, outputs, state, back)]

    def _segments(
        self,
        message: FRAGMENT,
        observations: NDArray[Any],
        actions: NDArray[Any],
        rewards: NDArray[np.float32],
        outputs: Mapping[str, NDArray[Any]],
        state: Sequence[NDArray[Any]],
    ) -> list[Piece]:
        """The pieces of a fragment of several episodes: views of its columns."""
        filled = not self._outputs or Columns.ACTION_DIST_INPUTS in outputs
        plain = self._connectors is None and filled
        whole = observations if self._packing is None else self._packing.unpack(observations.view(np.uint8))
        pieces = []
        row = step = 0
        timings = message.timings
        for part in message.segments:
            next_row, next_step = row + part.steps + 1, step + part.steps
            alone = FRAGMENT(
                message.session, message.number, message.base, part.episode, part.t0, part.steps, part.end,
                message.run, message.version, part.return_so_far, message.columns,
                seconds=part.seconds, timings=timings,
            )  # fmt: skip
            timings = {}
            mine = {name: values[step:next_step] for name, values in outputs.items()}
            if not plain:
                rows = {"obs": observations[row:next_row], "actions": actions[step:next_step]}
                seen, _ = self._seen(alone, rows | {"rewards": rewards[step:next_step]}, mine)
            elif self._packing is None:
                seen = whole[row:next_row]
            else:
                seen = tree.map_structure(lambda a, rows=slice(row, next_row): a[rows], whole)
            memory = [column[row:next_row] for column in state]
            pieces.append(Piece(alone, seen, actions[step:next_step], rewards[step:next_step], mine, memory, 0))
            row, step = next_row, next_step
        return pieces

    def _seen(
        self, message: FRAGMENT, arrays: Mapping[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]
    ) -> tuple[Any, int]:
        """The observations of one episode's piece as the policy saw them, and how many of them came before it. Fills in
        the distribution's inputs where the simulator sent none."""
        came = self._history(message, arrays)
        seen = came.observations
        if self._connectors is not None:
            seen, space = self._connectors.rewrite(message, came)
            self._lessons.append(partial(self._connectors.learn, message, came))
            if space is not self._blank.observation_space:
                self._blank = Blank(space, self.action_space)
        if self._outputs and Columns.ACTION_DIST_INPUTS not in outputs:
            outputs[Columns.ACTION_DIST_INPUTS] = self._dist_inputs(message, came, seen)
        return seen, came.back

    def _chunk(self, pieces: Sequence[Piece]) -> Built:
        first, last = pieces[0].message, pieces[-1].message
        steps = last.t0 + last.steps - first.t0
        rewards = _joined([p.rewards for p in pieces])
        outputs = {name: _joined([p.outputs[name] for p in pieces]) for name in pieces[0].outputs}
        id_, began = self._place(pieces)
        episode = self._blank.copy(
            id_,
            first.t0,
            steps,
            last.end,
            observations=_observations(pieces),
            back=pieces[0].back,
            actions=self._structured(_joined([p.actions for p in pieces])),
            rewards=rewards,
            outputs=outputs,
        )
        if self.memory:
            episode.extra_model_outputs |= self._state_out(pieces)
        timings = [piece.message.timings for piece in pieces if piece.message.timings]
        step_seconds = None
        if began is not None and last.seconds > began:
            step_seconds = (last.seconds - began) / steps
        if last.end == "no":
            return Built(episode, None, step_seconds, timings)
        total = first.return_so_far + float(rewards.sum(dtype=np.float64))
        return Built(episode, Finished(last.t0 + last.steps, total, last.seconds), step_seconds, timings)

    def _structured(self, actions: NDArray[Any]) -> Any:
        """Actions as the action space has them: dicts and tuples of arrays where it is of several parts."""
        return actions if self._actions is None else self._actions.unpack(actions.view(np.uint8))

    def _state_out(self, pieces: Sequence[Piece]) -> dict[str, InfiniteLookbackBuffer]:
        """STATE_OUT of each step. What was before the first one is the row that a learner looks back to: where it cuts
        the chunk into sequences, each begins with the state that the policy had there."""
        rows = [
            _joined([*(each[:-1] for each in columns[:-1]), columns[-1]])
            for columns in zip(*(piece.state for piece in pieces), strict=True)
        ]
        buffer = InfiniteLookbackBuffer(data=self.memory.nested(rows))
        buffer.lookback = 1  # the constructor would count the dict's keys
        return {Columns.STATE_OUT: buffer}

    def _place(self, pieces: Sequence[Piece]) -> tuple[str, float | None]:
        """The chunk's episode id, and when it began, in seconds since the episode did, if that is known."""
        first, last, buffered = pieces[0].message, pieces[-1].message, not self._needs_logp
        key = (first.session, first.episode)
        known = self._next.pop(key, None)
        # A simulator may use a name again when its episode has ended: a replay buffer still holds the one before.
        name = f"{first.session.hex()[:16]}-{first.number}-{first.episode.translate(ESCAPES)}"
        began: float | None = None if first.t0 else 0.0
        fits = known is not None and known[0] == first.t0
        if known is not None and fits:
            began = known[2]
            fits = not buffered or known[3] == mark_of(pieces[0].observations, pieces[0].back)
        if known is not None and fits:
            name = known[1]
        elif first.t0:
            name = f"{name}@{first.t0}"
        if last.end == "no":
            mark = mark_of(pieces[-1].observations, -1) if buffered else None
            self._next[key] = (last.t0 + last.steps, name, last.seconds, mark)
            if len(self._next) > REMEMBERED:
                self._next.popitem(last=False)
        return name, began

    def _check_dist_inputs(self, values: NDArray[Any]) -> None:
        if values.ndim != 2 or (self.dist_inputs and values.shape[1] != self.dist_inputs):
            raise ProtocolError(
                f"'action_dist_inputs' has rows of shape {list(values.shape[1:])}, the policy has {self.dist_inputs}"
            )
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise ProtocolError("'action_dist_inputs' must be finite floats")

    def _check_observations(self, name: str, rows: NDArray[Any]) -> None:
        check_rows(name, rows, self.observation_space, self._packing)

    def _check_actions(self, rows: NDArray[Any], name: str = "actions") -> None:
        check_rows(name, rows, self.action_space, self._actions, actions=True)

    def _check_state(self, arrays: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        columns = []
        for name, start in zip(self.memory.names, self.memory.start, strict=True):
            column = arrays.get(STATE_IN + name)
            if column is None:
                raise ProtocolError(
                    f"the policy is recurrent, and a fragment needs its memory of each step: no '{STATE_IN}{name}'. "
                    f"Let the policy act: a simulator that chooses actions itself has none"
                )
            if column.shape[1:] != start.shape or column.dtype != start.dtype:
                raise ProtocolError(
                    f"'{STATE_IN}{name}' has rows of {column.dtype}{list(column.shape[1:])}, the module's state is "
                    f"{start.dtype}{list(start.shape)}"
                )
            if not np.isfinite(column).all():
                raise ProtocolError(f"'{STATE_IN}{name}' holds NaN or infinity")
            columns.append(column)
        return columns

    def _history(self, message: FRAGMENT, arrays: Mapping[str, NDArray[Any]]) -> Came:
        """A fragment's steps as the environment gave them, with those that came before at the front."""
        observations, actions, rewards = arrays["obs"], arrays["actions"], arrays["rewards"]
        back = 0 if self._connectors is None else min(self._connectors.lookback, message.t0)
        if back:
            found = {name: arrays.get(name) for name in BEFORE}
            now = (observations, actions, rewards.astype(np.float32, copy=False))
            for (name, earlier), newest in zip(found.items(), now, strict=True):
                if earlier is None or len(earlier) != back or earlier.dtype != newest.dtype:
                    raise ProtocolError(
                        f"the policy looks back, and a fragment that begins at step {message.t0} needs {back} rows of "
                        f"'{name}', like '{name.removesuffix('_before')}'. Let the policy act: a simulator that "
                        f"chooses actions itself has none"
                    )
            self._check_observations(OBS_BEFORE, arrays[OBS_BEFORE])
            self._check_actions(arrays[ACTIONS_BEFORE], ACTIONS_BEFORE)
            if arrays[REWARDS_BEFORE].ndim != 1 or not np.isfinite(arrays[REWARDS_BEFORE]).all():
                raise ProtocolError(f"'{REWARDS_BEFORE}' must be one finite number a step")
            joined = (np.concatenate([arrays[name], newest]) for name, newest in zip(BEFORE, now, strict=True))
            observations, actions, rewards = joined
        if self._packing is not None:
            observations = self._packing.unpack(observations.view(np.uint8))
        return Came(observations, actions, rewards, back)

    def _dist_inputs(self, message: FRAGMENT, came: Came, seen: Any) -> NDArray[np.float32]:
        """What the policy would have drawn from, for a simulator that chose its actions itself: the learner wants the
        column (PPO's KL term), and it must be there in all fragments or in none. Observations as they `came`, and as
        the policy has `seen` them."""
        if self.module is None:
            raise ProtocolError("this runner has no RLModule to fill in 'action_dist_inputs'")
        if self.memory:
            raise ProtocolError(
                "the policy is recurrent, and 'action_dist_inputs' can't be filled in: they depend on its memory"
            )
        if self._connectors is not None:
            made = self._connectors.dist_inputs(self.module, message, came)
            if made is not None:
                return made
        with torch.no_grad():
            batch = tree.map_structure(
                lambda a: torch.from_numpy(a[:-1].astype(np.float32) if a.dtype == np.float64 else a[:-1].copy()),
                seen,
            )
            out = self.module.forward_exploration({Columns.OBS: batch})
        return np.asarray(out[Columns.ACTION_DIST_INPUTS].detach().cpu().numpy(), np.float32)


def learn(lessons: Iterable[Callable[[], None]]) -> None:
    """Let connectors learn of what is handed over; what fails at that is no fault of the fragment."""
    for lesson in lessons:
        try:
            lesson()
        except Exception as e:  # a user's piece may raise anything
            logger.warning("a connector could not learn of a fragment: %s: %s", type(e).__name__, e)


def _dtypes(observations: Any) -> Sequence[np.dtype[Any]]:
    if isinstance(observations, np.ndarray):
        return (observations.dtype,)
    return [array.dtype for array in tree.flatten(observations)]


def mark_of(observations: Any, row: int) -> int:
    """Tells one row of observations from another without keeping it: an image has many bytes."""
    if isinstance(observations, np.ndarray):
        return hash(observations[row].tobytes())
    return hash(tuple(array[row].tobytes() for array in tree.flatten(observations)))


def _joined(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def chunks_of(pieces: Iterable[P], continues: Callable[[Sequence[P], P], bool]) -> list[list[P]]:
    """Pieces that follow each other in one episode together, in the order of their first ones. `continues`: whether a
    piece may go on with the newest chunk of its episode."""
    chunks: list[list[P]] = []
    latest: dict[tuple[bytes, str], list[P]] = {}
    for piece in pieces:
        key = (piece.message.session, piece.message.episode)
        chunk = latest.get(key)
        if chunk is not None and continues(chunk, piece):
            chunk.append(piece)
        else:
            chunks.append([piece])
            latest[key] = chunks[-1]
    return chunks


def _observations(pieces: Sequence[Piece]) -> Any:
    """Of a chunk. Each piece's last observation is the next one's first."""
    newest = pieces[-1]
    if len(pieces) == 1:
        return newest.observations
    cuts = [slice(p.back if i else 0, -1) for i, p in enumerate(pieces[:-1])] + [slice(newest.back, None)]
    if isinstance(newest.observations, np.ndarray):
        return np.concatenate([piece.observations[rows] for piece, rows in zip(pieces, cuts, strict=True)])
    each = [
        tree.map_structure(lambda a, rows=rows: a[rows], piece.observations)
        for piece, rows in zip(pieces, cuts, strict=True)
    ]
    return tree.map_structure(lambda *a: np.concatenate(a), *each)
