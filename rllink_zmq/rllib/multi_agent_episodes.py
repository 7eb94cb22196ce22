"""Fragments of several agents -> RLlib's `MultiAgentEpisode`.

Each agent's rows are checked and joined as those of an episode with one agent are (`EpisodeBuilder`); here they are
taken out of the modules' columns, and put together. `MultiAgentEpisode` is filled directly: replaying steps through
its `add_env_step` would take 25 us for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.env.utils.infinite_lookback_buffer import InfiniteLookbackBuffer
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllink_zmq.arrays import Buffer, to_buffers
from rllink_zmq.audit import Log
from rllink_zmq.compression import arrays_of
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import BEFORE, FRAGMENT, STATE_IN, AgentId, AgentRows
from rllink_zmq.packing import children
from rllink_zmq.rllib.audit import COLUMN, names
from rllink_zmq.rllib.collector import collector_paused
from rllink_zmq.rllib.episodes import REMEMBERED, EpisodeBuilder, Piece, Refusal, Rewrites, chunks_of, learn, mark_of
from rllink_zmq.rllib.exploration import epsilon_schedule
from rllink_zmq.rllib.multi_agent_replay import SKIP, AgentsPiece, ReplayedEpisode
from rllink_zmq.session_runner import Lease

LONGEST_WAIT = 1_000_000
"""Env steps that an agent's step may take: RLlib has an entry for each."""


class AgentsFinished(NamedTuple):
    """An episode that has ended: its whole length in env steps, return, seconds; and each agent's module, steps and
    return."""

    length: int
    total: float
    seconds: float
    agents: Mapping[AgentId, tuple[str, int, float]]


class AgentsBuilt(NamedTuple):
    """As `rllink_zmq.rllib.episodes.Built`. `episode` is None where no agent has completed a step."""

    episode: MultiAgentEpisode | None
    finished: AgentsFinished | None
    step_seconds: float | None
    timings: Sequence[Mapping[str, float]]


class _Place(NamedTuple):
    """Where an episode goes on: env step, name, seconds; of each agent its module, steps and return so far. `last`: of
    agents that have been handed over under this name, their last observation (`mark_of`), None of one that has ended.
    """

    t: int
    name: str
    seconds: float
    agents: dict[AgentId, tuple[str, int, float]]
    last: dict[AgentId, int | None]


class _At(NamedTuple):
    """How much of a module's columns is of the agents before one."""

    steps: int = 0
    agents: int = 0
    earlier: int = 0


class AgentRewrites(Rewrites, Protocol):
    """What is done to the observations of one agent. `seen_space`: of what its module is given. `first`: the version by
    which it has taken the first step, if that isn't the fragment's; else -1."""

    first: int

    @property
    def seen_space(self) -> gym.Space[Any]: ...


class AgentsRewrites(Protocol):
    """Of all: `AgentsConnectors` or `FlattenedAgents`. `lookbacks`: how many earlier observations each module looks at.
    `check` raises ProtocolError where fragments of a version can't be rewritten."""

    @property
    def lookbacks(self) -> Mapping[str, int]: ...

    def of(self, agent: AgentId, module: str) -> AgentRewrites | None: ...

    def check(self, version: int) -> None: ...


_Rows: TypeAlias = tuple[AgentRows, Piece, NDArray[np.int64]]


class MultiAgentEpisodeBuilder:
    """Builds chunks for one runner. The spaces are those of each agent; `modules`: all that there are, by id.
    `longest`, `audit`, `needs_logp`: as of `EpisodeBuilder`. `connectors`: what is done to observations. `dist_inputs`:
    of each module, how many numbers a row of that column has."""

    def __init__(
        self,
        observation_spaces: Mapping[AgentId, gym.Space[Any]],
        action_spaces: Mapping[AgentId, gym.Space[Any]],
        module: MultiRLModule,
        mapping: Callable[..., str],
        longest: float = float("inf"),
        connectors: AgentsRewrites | None = None,
        audit: Log | None = None,
        *,
        needs_logp: bool = True,
    ) -> None:
        self._needs_logp = needs_logp
        self.observation_spaces = dict(observation_spaces)
        self.action_spaces = dict(action_spaces)
        self.module = module
        self.longest = longest
        self.audit = audit
        self.dist_inputs: Mapping[str, int] = {}
        self._mapping = mapping
        self._connectors = connectors
        self._builders: dict[tuple[AgentId, str], EpisodeBuilder] = {}
        self._places: OrderedDict[tuple[bytes, str], _Place] = OrderedDict()

    def build(self, leases: Iterable[Lease]) -> tuple[list[AgentsBuilt], list[Refusal]]:
        """Chunks in the order of their first fragments, and the fragments that don't fit."""
        with collector_paused():
            good, refused = self.check(leases)
            return self.join(good), refused

    def prepare(self, message: FRAGMENT, body: Sequence[Buffer]) -> None:
        """Nothing: which modules there are may have changed until a fragment is taken."""

    def check(self, leases: Iterable[Lease]) -> tuple[list[AgentsPiece], list[Refusal]]:
        """What `build` would use of these, and what it would refuse."""
        good, refused = [], []
        for lease in leases:
            try:
                good.append(self._check(lease))
            except ProtocolError as e:
                refused.append(Refusal(lease.message, e))
            except Exception as e:  # a user's module may raise anything; other fragments are not to suffer
                text = f"it can't be read: {type(e).__name__}: {e}"
                refused.append(Refusal(lease.message, ProtocolError(text)))
        return good, refused

    def join(self, pieces: Iterable[AgentsPiece]) -> list[AgentsBuilt]:
        """Chunks of what was checked before, in the order of their first pieces."""
        with collector_paused():
            chunks = chunks_of(pieces, self._continues)
            built = [self._chunk(chunk) for chunk in chunks]
        if self.audit is not None:
            self.audit.handed(
                (piece.message.session, piece.message.number, sum(rows.steps for rows in piece.message.agents))
                for chunk in chunks
                for piece in chunk
            )
        return built

    def forget(self) -> None:
        """RLlib may lack what it was given: no episode goes on under its id."""
        self._places.clear()

    def recast(self) -> None:
        """The modules, or how far they look back, may be others from now on."""
        self._builders.clear()

    # ---- checking

    def _check(self, lease: Lease) -> AgentsPiece:
        message = lease.message
        if not message.modules:
            raise ProtocolError(
                "the training has several agents, and this fragment is of one: simulators use connect_agents()"
            )
        arrays = arrays_of(message, lease.body)
        for module in message.modules:
            if module not in self.module:
                whose = ", ".join(repr(rows.agent) for rows in message.agents if rows.module == module)
                raise ProtocolError(
                    f"there is no policy '{module}'{' of agent ' * bool(whose)}{whose} in this training (any more?); "
                    f"there are {', '.join(self.module.keys())}"
                )
        connectors = self._connectors
        if connectors is not None:
            for version in {*message.modules.values(), *(rows.first for rows in message.agents if rows.first >= 0)}:
                connectors.check(version)
        agents: dict[AgentId, _Rows] = {}
        lessons: list[Callable[[], None]] = []
        at: dict[str, _At] = {}
        named = None
        if self.audit is not None:
            named = names(message.session, message.number, sum(rows.steps for rows in message.agents))
        for rows in message.agents:
            if rows.agent not in self.observation_spaces:
                raise ProtocolError(
                    f"there is no agent {rows.agent!r} in this training; there are "
                    f"{', '.join(map(repr, list(self.observation_spaces)[:8]))}"
                )
            place = at.get(rows.module, _At())
            back = 0 if connectors is None else min(connectors.lookbacks.get(rows.module, 0), rows.t0)
            at[rows.module] = _At(place.steps + rows.steps, place.agents + 1, place.earlier + back)
            if not rows.steps:
                raise ProtocolError(f"agent {rows.agent!r} has no steps in a fragment that lists it")
            self._check_module(rows)
            piece, times = self._check_agent(message, rows, arrays, place, back, lessons)
            if named is not None:
                piece.outputs[COLUMN], named = named[: rows.steps], named[rows.steps :]
            agents[rows.agent] = rows, piece, times
        for module, place in at.items():
            looks_back = connectors is not None and connectors.lookbacks.get(module)
            for column in (f"{module}/{name}" for name in BEFORE if looks_back):
                if column in arrays and len(arrays[column]) != place.earlier:
                    raise ProtocolError(
                        f"the agents of module '{module}' have {place.earlier} steps before this fragment that it "
                        f"looks back at, and '{column}' has {len(arrays[column])} rows"
                    )
        learn(lessons)  # the fragment is handed over
        return AgentsPiece(message, agents)

    def _check_module(self, rows: AgentRows) -> None:
        """Raises `ProtocolError` for a module that can't be this agent's: whose spaces are of another kind."""
        module, connectors = self.module[rows.module], self._rewrites(rows)
        seen = self.observation_spaces[rows.agent] if connectors is None else connectors.seen_space
        for what, agents, its in (
            ("observations", seen, getattr(module, "observation_space", None)),
            ("actions", self.action_spaces[rows.agent], getattr(module, "action_space", None)),
        ):
            if its is not None and kind_of(agents) != kind_of(its):
                raise ProtocolError(f"the policy '{rows.module}' takes other {what} than agent {rows.agent!r} has")

    def _check_agent(
        self,
        message: FRAGMENT,
        rows: AgentRows,
        arrays: Mapping[str, NDArray[Any]],
        at: _At,
        back: int,
        lessons: list[Callable[[], None]],
    ) -> tuple[Piece, NDArray[np.int64]]:
        """The rows of its module's columns behind those of others (`at`), with `back` earlier observations."""
        prefix = rows.module + "/"
        mine: dict[str, NDArray[Any]] = {}
        for name, values in arrays.items():
            if name.startswith(prefix):
                column = name[len(prefix) :]
                if column in BEFORE:
                    start, count = at.earlier, back
                elif column in ("obs", "t") or column.startswith(STATE_IN):
                    start, count = at.steps + at.agents, rows.steps + 1
                else:
                    start, count = at.steps, rows.steps
                mine[column] = values[start : start + count]
        times = mine.pop("t", None)
        if times is None or times.dtype.kind != "i" or times.ndim != 1 or (times[1:] <= times[:-1]).any():
            raise ProtocolError(f"agent {rows.agent!r}: '{prefix}t' must be one rising integer for each observation")
        if times[-1] > message.steps:
            raise ProtocolError(f"agent {rows.agent!r}: '{prefix}t' goes past the fragment's {message.steps} env steps")
        if times[1] <= 0:
            raise ProtocolError(
                f"agent {rows.agent!r}: a step was complete before this fragment, as '{prefix}t' has it"
            )
        if times[0] < -min(message.t0, LONGEST_WAIT):
            raise ProtocolError(
                f"agent {rows.agent!r}: '{prefix}t' begins before the episode does, or {LONGEST_WAIT} env steps back"
            )
        columns, body = to_buffers(mine)
        version = message.modules[rows.module]
        header = FRAGMENT(
            message.session, message.number, message.base, f"{message.episode}/{rows.agent}", rows.t0, rows.steps,
            rows.end, message.run, max(0, version), rows.return_so_far, columns,
        )  # fmt: skip
        rewrites = self._rewrites(rows)
        if rewrites is not None:
            rewrites.first = rows.first
        good, refused = self._builder(rows).check([Lease(header, body)], lessons)
        if refused:
            error = refused[0].error
            raise ProtocolError(f"agent {rows.agent!r} (module '{rows.module}'): {error}", error.code)
        (piece,) = good
        if rows.first >= 0:
            piece.outputs[WEIGHTS_SEQ_NO][0] = rows.first
        return piece, times.astype(np.int64) + message.t0

    def _rewrites(self, rows: AgentRows) -> AgentRewrites | None:
        return None if self._connectors is None else self._connectors.of(rows.agent, rows.module)

    def _builder(self, rows: AgentRows) -> EpisodeBuilder:
        key = (rows.agent, rows.module)
        builder, module = self._builders.get(key), self.module.get(rows.module)
        if builder is None or (module is not None and builder.module is not module):
            agent = rows.agent
            builder = self._builders[key] = EpisodeBuilder(
                self.observation_spaces[agent], self.action_spaces[agent], module,
                connectors=self._rewrites(rows), needs_logp=self._needs_logp,
                outputs=not epsilon_schedule(module),
            )  # fmt: skip
        builder.dist_inputs = self.dist_inputs.get(rows.module, 0)
        return builder

    # ---- joining

    def _continues(self, chunk: Sequence[AgentsPiece], piece: AgentsPiece) -> bool:
        first, last, message = chunk[0].message, chunk[-1].message, piece.message
        if last.end != "no" or message.t0 != last.t0 + last.steps:
            return False
        if message.t0 + message.steps - first.t0 > self.longest:
            return False
        newest: dict[AgentId, _Rows] = {}
        for earlier in chunk:
            newest |= earlier.agents
        return all(
            agent not in newest
            or (newest[agent][0].module == rows.module and self._builder(rows).continues([newest[agent][1]], mine))
            for agent, (rows, mine, _) in piece.agents.items()
        )

    def _chunk(self, pieces: Sequence[AgentsPiece]) -> AgentsBuilt:
        first, last = pieces[0].message, pieces[-1].message
        t0, steps = first.t0, last.t0 + last.steps - first.t0
        by_agent: dict[AgentId, list[_Rows]] = {}
        for piece in pieces:
            for agent, each in piece.agents.items():
                by_agent.setdefault(agent, []).append(each)
        name, began, before, seen = self._place(first, {agent: some[0] for agent, some in by_agent.items()})
        totals = dict(before)
        episode = None
        if by_agent or not self._needs_logp:  # a replay buffer takes env steps that nobody completed for a gap
            episode = self._empty(name, t0, {agent: some[0][0].module for agent, some in by_agent.items()})
        for agent, some in by_agent.items():
            rows = some[0][0]
            builder = self._builder(rows)
            builder.forget()
            (built,) = builder.join([piece for _, piece, _ in some])
            single = built.episode
            single.id_ = f"{name}_{agent}"
            single.agent_id, single.module_id, single.multi_agent_episode_id = agent, rows.module, name
            assert episode is not None
            episode.agent_episodes[agent] = single
            episode.agent_t_started[agent] = rows.t0
            times = np.concatenate([*(each[:-1] for _, _, each in some[:-1]), some[-1][2]])
            episode.env_t_to_agent_t[agent] = _env_steps(times, rows.t0 if self._needs_logp else 0, t0, steps)
            taken = sum(each.steps for each, _, _ in some)
            total = rows.return_so_far + float(sum(p.rewards.sum(dtype=np.float64) for _, p, _ in some))
            totals[agent] = (rows.module, rows.t0 + taken, total)
            if not self._needs_logp:
                ended, newest = some[-1][0].end != "no", some[-1][1]
                seen[agent] = None if ended else mark_of(newest.observations, -1)
        if episode is not None:
            episode.env_t = t0 + steps
            episode.is_terminated, episode.is_truncated = last.end == "terminated", last.end == "truncated"
        if last.end == "no":
            self._remember(last, name, totals, seen)
        timings = [piece.message.timings for piece in pieces if piece.message.timings]
        step_seconds = (last.seconds - began) / steps if began is not None and last.seconds > began else None
        finished = None
        if last.end != "no":
            # Of agents that have not been seen since the episode came to this runner nothing is known.
            total = first.return_so_far + sum(
                float(p.rewards.sum(dtype=np.float64)) for some in by_agent.values() for _, p, _ in some
            )
            finished = AgentsFinished(last.t0 + last.steps, total, last.seconds, totals)
        return AgentsBuilt(episode, finished, step_seconds, timings)

    def _empty(self, name: str, t0: int, modules: dict[AgentId, str]) -> MultiAgentEpisode:
        make = MultiAgentEpisode if self._needs_logp else ReplayedEpisode
        return make(
            id_=name,
            observation_space=self.observation_spaces,
            action_space=self.action_spaces,
            env_t_started=t0,
            agent_module_ids=modules,
            agent_to_module_mapping_fn=self._mapping,
        )

    def _place(
        self, message: FRAGMENT, begins: Mapping[AgentId, _Rows]
    ) -> tuple[str, float | None, Mapping[AgentId, tuple[str, int, float]], dict[AgentId, int | None]]:
        """The chunk's episode id; when it began, in seconds since the episode did, if that is known; what is known of
        its agents; and what was last handed over of them under that id. `begins`: each agent's first rows in it."""
        key = (message.session, message.episode)
        known = self._places.pop(key, None)
        name = f"{message.session.hex()[:16]}_{message.number}_{message.episode}"
        if known is not None and known.t == message.t0 and self._fits(known, begins):
            return known.name, known.seconds, known.agents, known.last
        if message.t0:
            return f"{name}@{message.t0}", None, known.agents if known is not None else {}, {}
        return name, 0.0, {}, {}

    @staticmethod
    def _fits(known: _Place, begins: Mapping[AgentId, _Rows]) -> bool:
        """Whether each agent goes on where it was: a replay buffer stops the training where one does not."""
        return all(
            agent not in known.last
            or (
                known.agents[agent][:2] == (rows.module, rows.t0)
                and known.last[agent] == mark_of(piece.observations, piece.back)
            )
            for agent, (rows, piece, _) in begins.items()
        )

    def _remember(
        self,
        last: FRAGMENT,
        name: str,
        totals: dict[AgentId, tuple[str, int, float]],
        seen: dict[AgentId, int | None],
    ) -> None:
        self._places[last.session, last.episode] = _Place(last.t0 + last.steps, name, last.seconds, totals, seen)
        if len(self._places) > REMEMBERED:
            self._places.popitem(last=False)


def _env_steps(times: NDArray[np.int64], agent_t: int, t0: int, steps: int) -> InfiniteLookbackBuffer:
    """At which env steps an agent's observations came, as RLlib has it: an entry for each env step of the chunk, and
    for those before it back to the first observation: the agent's own step, or a mark that there is none."""
    begins = min(t0, int(times[0]))
    entries: list[int | str] = [SKIP] * (t0 + steps + 1 - begins)
    for i, time in enumerate(times.tolist()):
        entries[time - begins] = agent_t + i
    return InfiniteLookbackBuffer(data=entries, lookback=t0 - begins)


def kind_of(space: gym.Space[Any]) -> Any:
    """What rows of this space are like, whatever their bounds."""
    if isinstance(space, gym.spaces.Dict | gym.spaces.Tuple):
        return [(key, kind_of(inner)) for key, inner in children(space)]
    if isinstance(space, gym.spaces.Discrete):
        return int(space.n)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return space.nvec.tolist()
    return type(space), space.shape, np.dtype(space.dtype).kind
