"""Fragments of many worlds that are stepped together: columns in, and pieces of all their episodes out.

`FragmentBuilder`'s counterpart. Columns are arrays of (rows, worlds, ...), written a row a step without a loop over the
worlds. A cut orders them by world, and says in segments which steps are whose. Observations of several parts are
packed for all worlds at once. A recurrent policy's memory is kept as observations are: a row for each world before each
step, and that after an episode's last one apart, since the world's next episode begins in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from rllink_zmq.arrays import Array
from rllink_zmq.errors import EpisodeError, VectorError
from rllink_zmq.fragments import FLOAT32_MAX, Cut, End, Kind, Layout, Origin
from rllink_zmq.messages import MAX_SEGMENTS, STATE_IN, Segment
from rllink_zmq.packing import Packing

BLOCK_STEPS = 1024
"""Env steps of a block, or one of each world: a learner's batch is larger than it asked for by a block at most."""

_ndarray = np.ndarray
_ENDS: tuple[End, ...] = ("no", "terminated", "truncated")


class BlockBuilder:
    """Builds the fragments of `width` worlds, one block after the other.

    For each step: `observe`, then `act`, then `log`. `begin` comes before the first step of a block. What `Flow` asks
    of a builder is as `FragmentBuilder` has it: `steps` counts the env steps of all worlds, `limit` a block's rows.
    """

    follows = False

    def __init__(self, episode: str, width: int) -> None:
        self.episode = episode
        self.width = width
        self.sent = True
        self.explore: bool | None = None
        self.dropping = False
        self.asked = False
        self.evaluation: Origin | None = None
        self.kind: Kind = "acted"
        self.origin = Origin("", 0)
        self.limit = 0
        self.rows = 0
        self.steps = 0
        self.t0 = 0
        self.step_bytes = 0
        self.began = 0.0
        self.timings: dict[str, float] = {}
        self.layout: Layout | None = None
        self.logged = True
        self.begun = False
        self.returns: NDArray[np.float64] = np.zeros(width)
        """Of each world's episode so far."""
        self._resting = np.zeros(width, bool)
        self._running = np.zeros(width, bool)
        self._names = np.full(width, -1, np.int64)
        self._named = 0
        # As each world's episode was when the block began.
        self._since = np.zeros(width)
        self._steps_before = np.zeros(width, np.int64)
        self._return_before = np.zeros(width)
        self._next: Array | None = None
        self.fresh = np.ones(width, bool)
        """Of a recurrent policy: which worlds have no memory, since an episode begins with their next step."""
        self._states: list[Array] = []
        self._next_states: list[Array] = []

    # ---- a block

    @property
    def full(self) -> bool:
        """Whether it takes no further row."""
        return self.rows >= self.limit

    def bytes_of(self, layout: Layout, kind: Kind) -> int:
        """What a step adds, should each one end an episode."""
        return layout.step_bytes(kind) + layout.last_bytes

    def clipped(self, steps: int, layout: Layout, kind: Kind, fragment_bytes: int) -> int:
        """How many rows a block may have whose pieces may have `steps` steps."""
        most = fragment_bytes // (self.bytes_of(layout, kind) * self.width)
        return max(1, min(steps, BLOCK_STEPS // self.width, most))

    @property
    def nbytes(self) -> int:
        """Bytes of the block being built."""
        layout = self.layout
        if layout is None or not self.rows:
            return 0
        return self.steps * layout.step_bytes(self.kind) + (self.width + self._ended) * layout.last_bytes

    def begin(self, layout: Layout, kind: Kind, origin: Origin, limit: int) -> None:
        """Start the next block, of at most `limit` >= 1 rows. Observations that ended the last one are kept."""
        refuse(layout)
        self._begin_states(layout, limit)
        self.layout, self.kind, self.origin, self.limit = layout, kind, origin, limit
        self.step_bytes = self.bytes_of(layout, kind)
        width, obs, action = self.width, layout.obs, layout.action
        self._float = obs.dtype.kind == "f"
        self._obs: Array = np.empty((limit + 1, width, *obs.shape), obs.dtype)
        self._actions: Array = np.empty((limit, width, *action.shape), action.dtype)
        self._rewards = np.zeros((limit, width), np.float32)
        self._logp = np.empty((limit, width), np.float32)
        self._dist = np.empty((limit, width, layout.dist_inputs), np.float32)
        self._live = np.ones((limit, width), bool)
        self._end = np.zeros((limit, width), np.uint8)
        self._acted_at = np.zeros(limit)
        self._logged_at = np.zeros(limit)
        self._last: list[tuple[NDArray[np.int64], list[Array]]] = []
        self._ended = 0
        self.rows = 0  # what there are without a step are of worlds that all rested
        self.begun = True
        if self._next is not None:
            self._obs[0] = self._next

    def rest(self, resting: Any) -> None:
        """Which worlds the next row is no step of. Raises `EpisodeError` for one whose episode goes on."""
        if resting is None:
            self._resting[:] = False
            return
        mask = np.asarray(resting)
        if mask.shape != (self.width,) or mask.dtype != bool:
            self._shape("resting", mask, (), "bool")
        if (mask & self._running).any():
            world = int((mask & self._running).argmax())
            raise EpisodeError(
                f"world {world} is in the middle of an episode and can't rest: its next observation would pass for "
                f"what its last action led to. A world rests from the end of its episode on; say the end with log_step"
            )
        self._resting[:] = mask

    def observe(self, observations: Any) -> Array:
        """Store the observations that the next actions are chosen by, (width, *shape), and return them.

        Raises `EpisodeError` for another shape, a dtype that doesn't cast, NaN or infinity, and for other observations
        than those that have ended the last block.
        """
        rows, row = self._rows_of(observations, "observations"), self.rows
        if not row and self._next is not None:
            goes_on = self._names >= 0
            if not np.array_equal(self._next[goes_on], rows[goes_on]):
                raise EpisodeError(
                    "other observations of this step have been given already and are on their way as the last ones of "
                    "a fragment: call again with those"
                )
        self._obs[row] = rows
        return cast(Array, self._obs[row])

    def act(
        self, actions: Array, logps: Array, dist_inputs: Array, now: float, state: Sequence[NDArray[Any]] = ()
    ) -> None:
        """A step of all worlds but those that rest, and the memory after it. Copies. Raises `EpisodeError` for a
        log-probability that isn't finite: the weights are not."""
        row = self.rows
        if not isfinite(float(logps.sum())):
            raise EpisodeError(
                f"the policy (version {self.origin.version} of run {self.origin.run}) gives an action a "
                f"log-probability that isn't finite: its weights hold NaN or infinity, the training has diverged"
            )
        self._actions[row], self._logp[row], self._dist[row] = actions, logps, dist_inputs
        resting = self._resting
        np.logical_not(resting, out=self._live[row])
        self._running |= self._live[row]
        self._acted_at[row] = now
        self.rows = row + 1
        self.steps += self.width - int(np.count_nonzero(resting))
        self.logged = False
        if self._states:
            for column, array in zip(self._states, state, strict=True):
                column[row + 1] = array
            self.fresh &= resting
            self._forget(resting, row + 1)

    def log(
        self, rewards: Any, terminated: Any, truncated: Any, last_observations: Any, now: float
    ) -> NDArray[np.float64]:
        """What the last step came to, (width,) each; returns the returns of the episodes that ended with it.
        `last_observations`: (width, *shape), looked at where an episode ended. Raises `EpisodeError`, and logs nothing,
        where one of these doesn't fit."""
        row = self.rows - 1
        gains = self._cast(rewards, "rewards", (), np.dtype(np.float64))
        if not (np.abs(gains) <= FLOAT32_MAX).all():
            self._not_finite("rewards", gains)
        over = self._flags("terminated", terminated)
        cut = self._flags("truncated", truncated)
        live = self._live[row]
        ended = (over | cut) & live
        if ended.any():
            if last_observations is None:
                raise EpisodeError(
                    f"an episode of world {int(ended.argmax())} has ended: log_step needs the observations that the "
                    f"last actions led to"
                )
            self._end_there(ended, self._rows_of(last_observations, "last observations", ended))
            self._end[row] = np.where(over, 1, 2) * ended
        self._rewards[row] = gained = np.where(live, gains, 0.0)
        self.returns += gained
        self._logged_at[row] = now
        self.logged = True
        returns: NDArray[np.float64] = self.returns[ended]
        self.returns[ended] = 0.0
        self._running[ended] = False
        return returns

    def cut_short(self, observations: Any) -> NDArray[np.float64]:
        """End all episodes after the last row, as truncated there; `observations` are what it led to. Raises
        `EpisodeError`, and ends nothing, where they don't fit or aren't finite."""
        if not self.rows:
            return np.zeros(0)
        row = self.rows - 1
        running = self._live[row] & (self._end[row] == 0)
        values = self._rows_of(observations, "last observations", running)
        self._end_there(running, values)
        self._end[row][running] = 2
        self._obs[self.rows] = values
        returns: NDArray[np.float64] = self.returns[running]
        self.returns[running] = 0.0
        self._running[running] = False
        return returns

    def _end_there(self, ended: NDArray[np.bool_], observations: Array) -> None:
        """Keep what these worlds' episodes come to after the last row."""
        last = [observations[ended]]
        self._last.append((np.flatnonzero(ended) * self.limit + self.rows - 1, last))
        self._ended += len(last[0])
        if self._states:
            last += [column[self.rows][ended] for column in self._states]
            self.fresh |= ended
            self._forget(ended, self.rows)

    # ---- memory

    @property
    def memory(self) -> list[Array]:
        """(width, *shape) for each of the layout's `state`: what the policy remembers before the next step."""
        return [column[self.rows] for column in self._states] if self._states else []

    def remember(self, state: Sequence[NDArray[Any]]) -> None:
        """What `fresh` worlds begin with, (width, *shape) each, where the layout doesn't say it."""
        for column, array in zip(self._states, state, strict=True):
            column[self.rows][self.fresh] = array[self.fresh]

    def _forget(self, worlds: NDArray[np.bool_], row: int) -> None:
        """These begin an episode with step `row`."""
        layout = self.layout
        assert layout is not None
        for column, start in zip(self._states, layout.starts, strict=False):
            column[row][worlds] = start

    def _begin_states(self, layout: Layout, limit: int) -> None:
        """Columns of a new block. The memory of another policy than the one that acts from now on is no memory."""
        goes_on = self.layout is not None and self.layout.state == layout.state
        self._states = [np.zeros((limit + 1, self.width, *s.row.shape), s.row.dtype) for s in layout.state]
        if not goes_on:
            self.fresh[:] = True
            self._next_states = []
        for column, start in zip(self._states, self._next_states or layout.starts, strict=False):
            column[0] = start

    # ---- cutting

    def cuts(self, fragment_bytes: int) -> list[Cut]:
        """The block's fragments, each of at most `fragment_bytes`; the observations after the last row were given to
        `observe`. The next block goes on from there."""
        layout = self.layout
        assert layout is not None
        rows, limit, width = self.rows, self.limit, self.width
        # Steps in the order of worlds: `at` is world * limit + row.
        at = np.flatnonzero(self._live.T.reshape(-1) & (np.arange(width * limit) % limit < rows))
        world, row = np.divmod(at, limit)
        end = self._end[row, world]
        last = (end > 0) | np.append(world[1:] != world[:-1], True)  # of a piece
        stops = np.flatnonzero(last) + 1
        starts = np.concatenate(([0], stops[:-1]))
        pieces = np.arange(len(stops))
        owner = world[starts]
        first = np.append(True, owner[1:] != owner[:-1])  # a world's first piece goes on with what it did before
        goes_on = first & (self._names[owner] >= 0)
        names = self._names[owner]
        fresh = int(np.count_nonzero(~goes_on))
        names[~goes_on] = np.arange(self._named + 1, self._named + 1 + fresh)
        self._named += fresh
        rewards = self._rewards[row, world]
        sums = np.add.reduceat(rewards, starts, dtype=np.float64)
        lengths = stops - starts
        before = np.where(goes_on, self._return_before[owner], 0.0)
        t0 = np.where(goes_on, self._steps_before[owner], 0)
        since = np.where(goes_on, self._since[owner], self._acted_at[row[starts]])
        seconds = np.maximum(self._logged_at[row[stops - 1]] - since, 0.0)
        ends = end[stops - 1]
        # Each piece has one row more of observations and memory: those after its steps.
        steps_at, after, open_ = np.arange(len(at)) + np.repeat(pieces, lengths), stops + pieces, ends == 0
        order = np.zeros(0, np.int64)
        if self._last:
            order = np.argsort(np.concatenate([key for key, _ in self._last]))  # as pieces stand: by world, then by row
        longer: list[Array] = []
        for i, column in enumerate([self._obs, *self._states]):
            values: Array = np.empty((len(at) + len(stops), *column.shape[2:]), column.dtype)
            values[steps_at] = column[row, world]
            values[after[open_]] = column[rows, owner[open_]]
            if self._last:
                values[after[~open_]] = np.concatenate([last[i] for _, last in self._last])[order]
            longer.append(values)
        columns: dict[str, Array] = {
            "obs": longer[0],
            "actions": self._actions[row, world],
            "rewards": rewards,
            "action_logp": self._logp[row, world],
            "action_dist_inputs": self._dist[row, world],
            **{f"{STATE_IN}{state.name}": c for state, c in zip(layout.state, longer[1:], strict=True)},
        }
        segments = [
            Segment(f"w{name}", t, n, _ENDS[how], so_far, took)
            for name, t, n, how, so_far, took in zip(
                names.tolist(), t0.tolist(), lengths.tolist(), ends.tolist(), before.tolist(), seconds.tolist(),
                strict=True,
            )
        ]  # fmt: skip
        self._names[:] = -1
        self._names[owner[open_]] = names[open_]
        self._since[owner[open_]] = since[open_]
        self._steps_before[owner[open_]] = (t0 + lengths)[open_]
        self._return_before[owner[open_]] = (before + sums)[open_]
        self._next = self._obs[rows].copy()
        self._next_states = [column[rows].copy() for column in self._states]
        self.t0 += rows
        self.rows = self.steps = 0
        self.begun = False
        return _split(self.origin, segments, columns, layout.step_bytes(self.kind), layout.last_bytes, fragment_bytes)

    def cut_before_last(self) -> Cut | None:
        """A block is cut where it is stepped, and nowhere else."""
        return None

    # ---- what doesn't fit

    def _rows_of(self, observations: Any, what: str, among: NDArray[np.bool_] | None = None) -> Array:
        """(width, *shape) as columns have them. Raises `EpisodeError` for what doesn't fit, and for NaN or infinity in
        rows of `among` (None = all)."""
        layout = self.layout
        assert layout is not None
        if (
            type(observations) is _ndarray
            and observations.dtype is layout.obs.dtype
            and observations.shape == self._obs.shape[1:]
        ):
            rows: Array = observations
        elif layout.packing is not None:
            return self._pack(layout.packing, observations, what, among)
        else:
            rows = self._cast(observations, what, layout.obs.shape, layout.obs.dtype)
        if self._float and not np.isfinite(rows).all():
            self._check_among(what, rows, among)
        return rows

    def _pack(self, packing: Packing, observations: Any, what: str, among: NDArray[np.bool_] | None) -> Array:

        def cast_part(values: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
            name = f"{what} {name}"
            array = self._cast(values, name, shape, dtype)
            if dtype.kind == "f" and not np.isfinite(array).all():
                self._check_among(name, array, among)
            return array

        try:
            return packing.pack_rows(observations, self.width, cast_part)
        except KeyError as e:
            raise EpisodeError(
                f"{what} have no {e.args[0]}: give them as Gymnasium's vectors do, dicts and tuples of arrays with a "
                f"row for each world, as the environment's observation_space describes it"
            ) from None

    def _check_among(self, what: str, rows: Array, among: NDArray[np.bool_] | None) -> None:
        if among is None:
            self._not_finite(what, rows)
        if not np.isfinite(rows[among]).all():
            spoiled = np.zeros_like(rows)
            spoiled[among] = rows[among]
            self._not_finite(what, spoiled)

    def _cast(self, values: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """`values` in `dtype`. Raises `EpisodeError` for another shape or values that `dtype` can't hold."""
        try:
            array: Array = np.asarray(values)
        except ValueError as e:
            raise EpisodeError(f"expected {what} of shape {(self.width, *shape)}, got no array: {e}") from None
        if array.shape != (self.width, *shape):
            self._shape(what, array, shape, str(dtype))
        if array.dtype == dtype:
            return array
        if array.dtype.kind in "biuf" and not (array.dtype.kind == "f" and dtype.kind in "biu"):
            with np.errstate(all="ignore"):
                held = array.astype(dtype)
            if dtype.kind not in "biu" or np.array_equal(held, array):
                return held
        raise EpisodeError(
            f"expected {what} of dtype {dtype}, got {array.dtype} that it can't hold without loss: convert it before"
        )

    def _flags(self, what: str, values: Any) -> NDArray[np.bool_]:
        array = np.asarray(values)
        if array.shape != (self.width,) or array.dtype != bool:
            self._shape(what, array, (), "bool")
        return array

    def _shape(self, what: str, array: Array, shape: tuple[int, ...], dtype: str) -> NoReturn:
        raise EpisodeError(
            f"expected {what} of {self.width} worlds, {dtype} of shape {(self.width, *shape)}, got {array.dtype} of "
            f"shape {array.shape}"
        )

    def _not_finite(self, what: str, values: Array) -> NoReturn:
        flat = values.reshape(len(values), -1)
        world, entry = np.argwhere(~(np.abs(flat) <= FLOAT32_MAX))[0].tolist()
        where = "" if flat.shape[1] == 1 else f" (entry {entry} of {flat.shape[1]})"
        raise EpisodeError(
            f"expected finite {what}, world {world}'s is {flat[world, entry]}{where}: one such value would spoil the "
            f"whole training; look for its cause in the simulation"
        )


def refuse(layout: Layout) -> None:
    """Raises `VectorError` for a policy that columns of worlds can't serve."""
    if layout.looks_back:
        raise VectorError(
            "the policy looks at earlier observations, which the vector form doesn't serve: use an episode for each "
            "world, with get_actions for all of them (drive_vector does)"
        )


def _split(
    origin: Origin, segments: list[Segment], columns: dict[str, Array], step_bytes: int, last_bytes: int, most: int
) -> list[Cut]:
    """Fragments of whole pieces, as few as `most` bytes and the limit on segments allow."""
    cuts = []
    total = len(columns["rewards"])  # of steps: columns that have more rows have one more for each piece
    first = row = step = 0
    while first < len(segments):
        size = steps = 0
        until = first
        while until < len(segments) and until - first < MAX_SEGMENTS:
            more = segments[until].steps * step_bytes + last_bytes
            if size + more > most and until > first:
                break
            size, steps, until = size + more, steps + segments[until].steps, until + 1
        rows = steps + until - first
        arrays = {
            name: values[row : row + rows] if len(values) > total else values[step : step + steps]
            for name, values in columns.items()
        }
        cuts.append(Cut(origin, 0, steps, 0.0, arrays, tuple(segments[first:until])))
        first, row, step = until, row + rows, step + steps
    return cuts
