"""An episode's fragment while it is being built: its columns, where it stands in the episode, and cutting.

A fragment of T steps has T + 1 observations: the last one is the first of the next. So it can be cut where the next
observation is known (`cut`), or one step earlier (`cut_before_last`), and the next fragment goes on without a gap.
Columns are arrays of the final dtype from the start: a step costs a few assignments, a cut no conversion.

A recurrent policy's memory is the episode's, and is kept as observations are: T + 1 rows, the last one the first of the
next fragment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import isfinite
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, cast

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rllink_zmq.arrays import Array
from rllink_zmq.errors import EpisodeError
from rllink_zmq.messages import BEFORE, STATE_IN, AgentRows, Segment
from rllink_zmq.packing import Packing, dtype_of, packing_of
from rllink_zmq.packing_actions import action_dtype, action_packing, choices_of, env_packing

FLOAT32_MAX = float(np.finfo(np.float32).max)
FIRST_ROWS = 16
"""Steps a new fragment has memory for; it grows by doubling, up to the fragment's length."""

FEW = 16
"""Numbers that Python adds faster than NumPy."""
_ndarray = np.ndarray

Kind: TypeAlias = Literal["acted", "logged", "given"]
"""Who chose the actions, which is which columns there are: the policy (`action_logp` and `action_dist_inputs`), the
simulator with their log-probability (`action_logp`), or the simulator without it (neither)."""

End: TypeAlias = Literal["no", "terminated", "truncated"]


class Row(NamedTuple):
    """One row of a column."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


class StateRow(NamedTuple):
    """One row of a column `state_in/<name>`."""

    name: str
    row: Row


class Layout(NamedTuple):
    """The columns of an episode. `choices`: how many values a Discrete action has, or each of a MultiDiscrete's.
    `dist_inputs`: numbers of a row of `action_dist_inputs`. `packing`: of observations that are packed. `state`: the
    memory of a recurrent policy; `starts`: what it begins an episode with, if that is known.
    `lookback`: earlier observations that the policy looks at. `actions`: how actions of several parts are packed, and
    `env_actions` as the environment wants them; `choices` says nothing of them. `given`: what the environment's
    observations are like (`packing` is theirs), where fragments have in their place what a runner made of them."""

    obs: Row
    action: Row
    choices: tuple[int, ...] = ()
    dist_inputs: int = 0
    packing: Packing | None = None
    state: tuple[StateRow, ...] = ()
    starts: tuple[Array, ...] = ()
    lookback: int = 0
    actions: Packing | None = None
    env_actions: Packing | None = None
    given: Row | None = None

    @property
    def looks_back(self) -> bool:
        """Whether the policy, or what stands before it, looks at earlier steps."""
        return bool(self.lookback or self.given is not None)

    def like(self, other: Layout) -> bool:
        """Whether rows of one are rows of the other, whatever the memory starts with."""
        return self._replace(starts=()) == other._replace(starts=())

    @property
    def last_bytes(self) -> int:
        """Bytes beside those of the steps: of the row after the last one, its observation and memory, and of what
        comes before the first one."""
        before = (self.obs.nbytes + self.action.nbytes + 4) * self.lookback
        return self.obs.nbytes + before + sum(state.row.nbytes for state in self.state)

    def step_bytes(self, kind: Kind) -> int:
        """Bytes that each step adds to a fragment."""
        memory = sum(state.row.nbytes for state in self.state)
        logits = 4 * self.dist_inputs if kind == "acted" else 0
        logp = 0 if kind == "given" else 4
        return self.obs.nbytes + memory + self.action.nbytes + 4 + logp + logits

    def most_steps(self, kind: Kind, fragment_bytes: int) -> int:
        """How many steps a fragment of `fragment_bytes` holds; 0 if not even one."""
        return max(0, (fragment_bytes - self.last_bytes) // self.step_bytes(kind))


def layout_of_spaces(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> Layout:
    """The layout of actions that a simulator chose itself. Raises `SpaceError` for spaces that don't travel."""
    observed, packing = observed_as(observation_space)
    actions = action_packing(action_space)
    if actions is not None:
        acted = Row((actions.nbytes,), np.dtype(np.uint8))
    else:
        acted = Row(tuple(action_space.shape or ()), action_dtype(action_space))
    return Layout(
        observed, acted, choices_of(action_space), 0, packing, actions=actions, env_actions=env_packing(action_space)
    )


def observed_as(space: gym.Space[Any]) -> tuple[Row, Packing | None]:
    """How an observation of `space` travels. Raises `SpaceError`."""
    packing = packing_of(space)
    return (Row((packing.nbytes,), np.dtype(np.uint8)) if packing else _row(space)), packing


def _row(space: gym.Space[Any]) -> Row:
    return Row(tuple(space.shape or ()), dtype_of(space))


class Before(NamedTuple):
    """Steps that came before: (n, *shape) of observations, what was done on each of them, and the rewards."""

    observations: Array
    actions: Array
    rewards: Array


class Origin(NamedTuple):
    """Which weights chose the actions of a fragment."""

    run: str
    version: int


class Cut(NamedTuple):
    """A finished fragment: steps `t0` .. `t0 + steps - 1`, or those of its `segments`. `arrays` in their order on the
    wire; `obs` first. `modules`, `agents`: of several agents, as in FRAGMENT."""

    origin: Origin
    t0: int
    steps: int
    return_so_far: float
    arrays: dict[str, Array]
    segments: tuple[Segment, ...] = ()
    modules: dict[str, int] | None = None
    agents: tuple[AgentRows, ...] = ()

    @property
    def learned(self) -> int:
        """Steps that a learner gets: of several agents each one's own."""
        return self.steps if self.modules is None else sum(rows.steps for rows in self.agents)


class FragmentBuilder:
    """Builds the fragments of one episode, one after the other.

    For each step: `observe`, then `act` (the policy chose) or `log` (the simulator did), then `reward` any number of
    times. `begin` comes before the first step of a fragment. `steps`: of the fragment being built; `limit`: how many it
    may have; `episode_return`: of all steps so far, in float64. `sent` = False: what is built is thrown away, and
    `explore` says whether its actions are drawn (None = as the trainer's evaluation does); `dropping`: this fragment
    is; `evaluation`: it goes to an evaluation, if the episode begins with these weights or newer ones. `state`: the
    policy's memory before the next step, in the layout's order; `fresh`: no step has been taken with it. `asked`: an
    action has been asked for, and its observation is the newest one; `asks`: what has asked for it; `looked`: what asks
    for what a runner makes of the newest observation, where no action is wanted. For whoever keeps the time: `began`:
    when the first step was taken; `timings`: of this fragment, as in FRAGMENT. `width`: steps that are taken at once.
    """

    width = 1

    def __init__(self, episode: str, *, sent: bool = True, explore: bool | None = None) -> None:
        self.episode = episode
        self.sent = sent
        self.explore = explore
        self.dropping = False
        self.asked = False
        self.evaluation: Origin | None = None
        self._where = f"episode '{episode}'"
        self._layout: Layout | None = None
        self._rows = FIRST_ROWS
        self._reward = self._told = 0.0
        self._before = 0.0
        self.kind: Kind = "logged"
        self.origin = Origin("", 0)
        self.limit = 0
        self.steps = 0
        self.t0 = 0
        self.step_bytes = 0
        self.episode_return = 0.0
        self.began = 0.0
        self.timings: dict[str, float] = {}
        self.fresh = True
        self.state: tuple[Array, ...] = ()
        self._states: tuple[Array, ...] = ()
        self._past: Before | None = None
        self._given: Array | None = None
        self.looked: Any = None
        self.asks: Any = None

    def begin(self, layout: Layout, kind: Kind, origin: Origin, limit: int) -> None:
        """Start the next fragment, of at most `limit` >= 1 steps. An observation that ended the last one is kept."""
        last = self._obs[0] if self.t0 else None
        rows = max(1, min(limit, self._rows))
        obs, action = layout.obs, layout.action
        if layout.state or self._states:
            self._begin_state(layout, rows)
        self._layout, self.kind, self.origin, self.limit = layout, kind, origin, limit
        given = layout.given or obs
        self._shape, self._dtype, self._packing = given.shape, given.dtype, layout.packing
        self._float = given.dtype.kind == "f"
        self._few = self._float and obs.size <= FEW and len(obs.shape) == 1
        self._zeros = np.zeros(obs.size, obs.dtype)
        self._obs: Array = np.empty((rows + 1, *obs.shape), obs.dtype)
        self._flat = self._obs.reshape(rows + 1, obs.size)
        self._actions: Array = np.empty((rows, *action.shape), action.dtype)
        self._rewards = np.zeros(rows, np.float32)
        self._logp = np.empty(rows, np.float32)
        self._dist = np.empty((rows if kind == "acted" else 0, layout.dist_inputs), np.float32)
        self._rows = rows
        self.step_bytes = layout.step_bytes(kind)
        if last is not None:
            self._obs[0] = last

    def observe(self, observation: Any) -> Array:
        """Store the observation that the next action is chosen by, and return it in the layout's dtype.

        Raises `EpisodeError` for another shape, a dtype that doesn't cast, NaN or infinity, and for another observation
        than the one that has ended the last fragment. Where a runner is to see it first (`follows`) it is stored by
        `saw`.
        """
        steps = self.steps
        if (
            type(observation) is not _ndarray
            or observation.dtype is not self._dtype
            or observation.shape != self._shape
        ):
            if self._packing is not None:
                observation = self._pack(self._packing, observation)
            else:
                observation = self._cast(observation, "observation", self._shape, self._dtype)
        if self.follows:
            return self._take(observation)
        if not steps and self.t0:
            if not np.array_equal(self._obs[0], observation):
                self._given_before()
            return cast(Array, self._obs[0])
        self._obs[steps] = observation
        if self._few:
            finite = isfinite(sum(observation.tolist()))
        else:
            finite = not self._float or self._finite(steps)
        if not finite and not np.isfinite(self._obs[steps]).all():
            self._not_finite("observation", self._obs[steps])
        return cast(Array, observation)

    def _given_before(self) -> NoReturn:
        raise EpisodeError(
            f"{self._where}: another observation of step {self.t0} has been given already and is on its way as the "
            f"last one of a fragment: call again with that one"
        )

    def _take(self, observation: Array) -> Array:
        """Keep the newest observation as it was given."""
        if self._float and not np.isfinite(observation).all():
            self._not_finite("observation", observation)
        if not self.steps and self.t0 and self._given is not None and not np.array_equal(self._given, observation):
            self._given_before()
        self._given = observation.copy()
        return self._given

    @property
    def follows(self) -> bool:
        """Whether runners follow this episode: fragments have what they have seen."""
        return self._layout is not None and self._layout.given is not None

    def saw(self, seen: Array) -> None:
        """What a runner has made of the newest observation."""
        self._obs[self.steps] = seen

    def rewarded(self, reward: float) -> float:
        """What a runner has made of the last action's reward; how much more that is. One whose fragment is cut is as it
        is."""
        if not self.steps or reward == self._reward:
            return 0.0
        more = self._number(reward, "reward") - self._reward
        self._reward = reward
        self._rewards[self.steps - 1] = reward
        self.episode_return += more
        return more

    def once_more(self) -> None:
        """The newest observation is the last one again."""
        if self.follows:
            self._obs[self.steps] = self._obs[self.steps - 1]
        else:
            self.observe(self._obs[self.steps - 1])

    def act(
        self, action: Any, logp: float, dist_inputs: NDArray[np.float32], state: Sequence[NDArray[Any]] = ()
    ) -> None:
        """A step whose action the policy chose, and its memory after it. Copies. Raises `EpisodeError` for a
        log-probability that isn't finite: the weights are not."""
        steps = self.steps
        if not -FLOAT32_MAX <= logp <= FLOAT32_MAX:
            raise EpisodeError(
                f"{self._where}: the policy (version {self.origin.version} of run {self.origin.run}) gives an action "
                f"the log-probability {logp}: its weights hold NaN or infinity, the training has diverged"
            )
        if steps == self._rows:
            self._grow()
        self._actions[steps] = action
        self._logp[steps] = logp
        self._dist[steps] = dist_inputs
        if self._states:
            self.remember(state, steps + 1)
            self.fresh = False
        self._reward = self._told = 0.0
        self.steps = steps + 1

    def fitting(self, action: Any, logp: float | None) -> tuple[Any, float | None]:
        """What `log` would store of these. Raises as it does, and changes nothing."""
        layout = self._layout
        assert layout is not None
        if layout.actions is None:
            action = self._cast(action, "action", layout.action.shape, layout.action.dtype)
            self._check_action("action", action, layout.choices)
        else:
            action = self._pack_action(layout.actions, action)
        return action, None if logp is None else self._number(logp, "action_logp")

    def log(self, action: Any, logp: float | None) -> None:
        """A step whose action the simulator chose, as RLlib's action space has it; None: with no known probability.
        Raises `EpisodeError` for an action that doesn't fit the space and a log-probability that isn't a finite
        number."""
        action, logp = self.fitting(action, logp)
        steps = self.steps
        if steps == self._rows:
            self._grow()
        self._logp[steps] = 0.0 if logp is None else logp
        self._actions[steps] = action
        self._reward = self._told = 0.0
        self.steps = steps + 1

    def reward(self, reward: Any) -> None:
        """Add to the last step's reward, in float64. Raises `EpisodeError` unless it is a finite number and comes
        after a step whose fragment isn't cut yet."""
        steps = self.steps
        if not steps:
            raise EpisodeError(
                f"{self._where}: log_returns adds to the reward of the last action, and "
                + (
                    f"the fragment of step {self.t0 - 1} was cut with the observation after it: log a step's reward "
                    f"before its next observation is given"
                    if self.t0
                    else "there is none yet: call get_action first"
                )
            )
        value = reward if type(reward) is float else self._number(reward, "reward")
        total = self._reward + value
        if not -FLOAT32_MAX <= total <= FLOAT32_MAX:  # as NaN isn't
            self._number(total, "reward")
        self._reward = total
        self._told += value
        self._rewards[steps - 1] = total
        self.episode_return += value

    @property
    def last_reward(self) -> float:
        """What the last action has been given so far."""
        return self._reward

    @property
    def told_reward(self) -> float:
        """The last action's reward as the simulator has logged it, also where its fragment has been cut."""
        return self._told

    @property
    def layout(self) -> Layout | None:
        """Of the fragment being built."""
        return self._layout

    def seen(self, row: int) -> Array:
        """Observation `row` of the fragment being built."""
        return cast(Array, self._obs[row])

    @property
    def given(self) -> Array:
        """The newest observation, as it was given."""
        return cast(Array, self._obs[self.steps]) if self._given is None else self._given

    # ---- memory

    @property
    def remembers(self) -> tuple[StateRow, ...]:
        """What of the memory is kept in the fragment being built."""
        return self._layout.state if self._layout is not None else ()

    def remember(self, state: Sequence[NDArray[Any]], row: int | None = None) -> None:
        """Set the memory before step `row` of the fragment, which is the next one; None = as `steps` says."""
        row = self.steps if row is None else row
        for column, array in zip(self._states, state, strict=True):
            column[row] = array
        self.state = tuple(column[row, ...] for column in self._states)

    def _begin_state(self, layout: Layout, rows: int) -> None:
        """Columns of a new fragment. The memory of another policy than the one that acts from now on is no memory."""
        goes_on = bool(self.t0) and layout.state == self.remembers
        first = self.state if goes_on else layout.starts
        self.fresh = self.fresh or not goes_on
        self._states = tuple(np.zeros((rows + 1, *state.row.shape), state.row.dtype) for state in layout.state)
        self.remember(first or [column[0] for column in self._states], 0)

    def before(self) -> Before:
        """The steps before the newest observation, of the last `lookback` those that there are."""
        layout = self._layout
        assert layout is not None
        rows = slice(max(0, self.steps - layout.lookback), self.steps)
        newest = Before(self._obs[rows], self._actions[rows], self._rewards[rows])
        missing = layout.lookback - len(newest.observations)
        if self._past is None or not missing:
            return newest
        pairs = zip(self._past, newest, strict=True)
        return Before(*(np.concatenate([old[max(0, len(old) - missing) :], new]) for old, new in pairs))

    # ---- cutting

    @property
    def full(self) -> bool:
        """Whether the fragment takes no further step."""
        return self.steps >= self.limit

    def bytes_of(self, layout: Layout, kind: Kind) -> int:
        """What a step adds."""
        return layout.step_bytes(kind)

    def clipped(self, steps: int, layout: Layout, kind: Kind, fragment_bytes: int) -> int:
        """What `limit` may be, where an episode's piece may have `steps` steps."""
        return steps

    @property
    def nbytes(self) -> int:
        """Bytes of the fragment being built."""
        layout = self._layout
        return 0 if layout is None or not self.steps else layout.last_bytes + self.steps * self.step_bytes

    def cut(self) -> Cut:
        """The fragment of all its steps (one or more); the observation after the last was given to `observe`."""
        return self._cut(self.steps, self.episode_return)

    def cuts(self, fragment_bytes: int) -> list[Cut]:
        """What `cut` makes, which never has more bytes."""
        return [self.cut()]

    def cut_before_last(self) -> Cut | None:
        """The fragment of all steps but the last, whose observation is known already: the last one begins the next
        fragment, of the same origin. None if that leaves nothing."""
        last = self.steps - 1
        if last < 1:
            return None
        layout, limit = self._layout, self.limit
        assert layout is not None
        actions, rewards, logp, dist = self._actions, self._rewards, self._logp, self._dist
        reward, state = self._reward, self.state  # the memory after the last step
        cut = self._cut(last, self.episode_return - reward)
        self.begin(layout, self.kind, self.origin, limit)
        self._actions[0], self._rewards[0] = actions[last], rewards[last]
        self._logp[0] = logp[last]
        if self.kind == "acted":
            self._dist[0] = dist[last]
        if state:
            self.remember(state, 1)
        self._reward = reward
        self.steps = 1
        return cut

    def _cut(self, steps: int, return_after: float) -> Cut:
        arrays: dict[str, Array] = {
            "obs": self._obs[: steps + 1],
            "actions": self._actions[:steps],
            "rewards": self._rewards[:steps],
        }
        if self.kind != "given":
            arrays["action_logp"] = self._logp[:steps]
        if self.kind == "acted":
            arrays["action_dist_inputs"] = self._dist[:steps]
        for state, column in zip(self.remembers, self._states, strict=True):
            arrays[f"{STATE_IN}{state.name}"] = column[: steps + 1]
        if self._past is not None and len(self._past.observations):
            arrays |= zip(BEFORE, self._past, strict=True)
        last = self._obs[steps].copy()
        if steps * 2 < self._rows:
            # What is kept until it is settled takes the memory that the window counts, not twice as much.
            arrays = {name: array.copy() for name, array in arrays.items()}
        cut = Cut(self.origin, self.t0, steps, self._before, arrays)
        self._before = return_after
        self.t0 += steps
        if self._layout is not None and self._layout.lookback:
            self.steps = steps
            self._past = Before(*(array.copy() for array in self.before()))
        self.steps = 0
        self._rows = max(FIRST_ROWS, steps)
        self._obs = last[np.newaxis]
        if self._states:
            self.state = tuple(column[steps].copy() for column in self._states)
        self._reward = 0.0
        return cut

    def _grow(self) -> None:
        """Twice the rows, at most `limit`."""
        layout, old, held = self._layout, self._rows, self.steps
        assert layout is not None
        rows = max(old + 1, min(2 * old, self.limit))
        self._rows = rows

        def longer(array: Array, length: int, kept: int) -> Array:
            new: Array = np.zeros((length, *array.shape[1:]), array.dtype)
            new[:kept] = array[:kept]
            return new

        self._obs = longer(self._obs, rows + 1, held + 1)
        self._flat = self._obs.reshape(rows + 1, layout.obs.size)
        self._actions = longer(self._actions, rows, held)
        self._rewards = longer(self._rewards, rows, held)  # type: ignore[assignment]
        self._logp = longer(self._logp, rows, held)  # type: ignore[assignment]
        if self.kind == "acted":
            self._dist = longer(self._dist, rows, held)  # type: ignore[assignment]
        self._states = tuple(longer(column, rows + 1, held + 1) for column in self._states)

    # ---- what doesn't fit

    def _finite(self, row: int) -> bool:
        """Whether observation `row` is, at a third of the cost of `isfinite().all()`. May be False where it is."""
        try:
            return bool(self._zeros.dot(self._flat[row]) == 0.0)  # zero times anything else is not zero
        except RuntimeWarning:  # infinity times zero, where warnings are errors
            return False

    def _pack(self, packing: Packing, observation: Any) -> Array:
        """A Dict's or Tuple's observation as its row of bytes. Raises `EpisodeError`, with the part's name."""

        def cast(value: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
            array = self._cast(value, what, shape, dtype)
            if dtype.kind == "f" and not np.isfinite(array).all():
                self._not_finite(what, array)
            return array

        try:
            return packing.pack(observation, cast)
        except KeyError as e:
            raise EpisodeError(
                f"{self._where}: an observation has no {e.args[0]}: give it as the environment's observation_space "
                f"describes it"
            ) from None

    def _pack_action(self, packing: Packing, action: Any) -> Array:
        """An action of several parts as its row of bytes. Raises `EpisodeError`, with the part's name."""
        choices = {part.name: choices_of(part.space) for part in packing.parts}

        def cast(value: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
            array = self._cast(value, what, shape, dtype)
            self._check_action(what, array, choices[what])
            return array

        try:
            return packing.pack(action, cast)
        except KeyError as e:
            raise EpisodeError(
                f"{self._where}: an action has no {e.args[0]}: give it as the environment's action_space describes it"
            ) from None

    def _check_action(self, what: str, action: Array, choices: Sequence[int]) -> None:
        for entry, count in zip(action.reshape(-1).tolist(), choices, strict=False):
            if not 0 <= entry < count:
                raise EpisodeError(f"{self._where}: expected an {what} of 0 to {count - 1}, got {entry}")
        if action.dtype.kind == "f" and not np.isfinite(action).all():
            self._not_finite(what, action)

    def _cast(self, value: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """`value` in `dtype`. Raises `EpisodeError` for another shape or values that `dtype` can't hold."""
        try:
            array: Array = np.asarray(value)
        except ValueError as e:
            raise EpisodeError(f"{self._where}: expected one {what} of shape {shape}, got no array: {e}") from None
        if array.shape != shape:
            raise EpisodeError(
                f"{self._where}: expected one {what} of shape {shape}, got shape {array.shape}: give it as the "
                f"environment's {what}_space describes it"
            )
        if array.dtype == dtype:
            return array
        if array.dtype.kind in "biuf" and not (array.dtype.kind == "f" and dtype.kind in "biu"):
            with np.errstate(all="ignore"):
                held = array.astype(dtype)
            if dtype.kind not in "biu" or np.array_equal(held, array):
                return held
        raise EpisodeError(
            f"{self._where}: expected an {what} of dtype {dtype}, got {array.dtype} that it can't hold without loss: "
            f"convert it before"
        )

    def _not_finite(self, what: str, array: Array) -> NoReturn:
        flat = array.reshape(-1)
        bad = np.flatnonzero(~np.isfinite(flat))
        where = "" if flat.size == 1 else f" (entry {int(bad[0])} of {flat.size})"
        raise EpisodeError(
            f"{self._where}: expected a finite {what}, got {flat[bad[0]]}{where}: one such value would spoil the whole "
            f"training; look for its cause in the simulation"
        )

    def _number(self, value: Any, what: str) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise EpisodeError(
                f"{self._where}: expected one number as {what}, got {type(value).__name__} {str(value)[:60]}"
            ) from None
        if not -FLOAT32_MAX <= number <= FLOAT32_MAX:
            raise EpisodeError(
                f"{self._where}: expected a finite {what} (float32 on the wire), got {number:g}: look for its cause in "
                f"the simulation"
            )
        return number
