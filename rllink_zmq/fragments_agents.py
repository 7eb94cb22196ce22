"""An episode of several agents while a fragment of it is being built.

Each agent has a `FragmentBuilder` of its own, which counts the agent's steps; this one counts env steps, and joins what
the agents have completed, by module, where a fragment is cut. A step that has begun (the agent has acted) and is not
complete (its next observation hasn't come) stays for a later fragment.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from rllink_zmq.arrays import Array
from rllink_zmq.errors import EpisodeError, RemovedError
from rllink_zmq.fragments import Before, Cut, End, FragmentBuilder, Kind, Layout, Origin, Row
from rllink_zmq.messages import MAX_AGENTS_STEPS, AgentId, AgentRows, Told

log = logging.getLogger("rllink_zmq")

ALL = "__all__"
"""In dicts of ended agents: the whole episode."""


NOTHING: Array = np.zeros(0, np.uint8)


class AgentsOrigin(Origin):
    """Which weights chose: `versions` of each module. By `version` the lag is counted."""

    versions: Mapping[str, int]

    @classmethod
    def of(cls, run: str, version: int, versions: Mapping[str, int]) -> AgentsOrigin:
        origin = cls(run, version)
        origin.versions = versions
        return origin


class Member(NamedTuple):
    """How an agent takes part: by which module, and what its rows are like."""

    module: str
    layout: Layout


class Turn(NamedTuple):
    """What an env step has brought: observations of some agents, and which agents have ended."""

    observations: Mapping[AgentId, Any]
    terminateds: Mapping[AgentId, bool] = {}
    truncateds: Mapping[AgentId, bool] = {}


def whole(layouts: Iterable[Layout]) -> Layout:
    """The layout of env steps in which all of these agents take part: for sizes alone."""
    layouts = list(layouts)
    memory = sum(state.row.nbytes for layout in layouts for state in layout.state)
    lookback = max((layout.lookback for layout in layouts), default=0)
    obs = sum(layout.obs.nbytes + 4 for layout in layouts) + memory  # with its env step
    rest = sum(layout.action.nbytes + 8 for layout in layouts) - 8
    byte = np.dtype(np.uint8)
    return Layout(
        Row((obs,), byte),
        Row((rest,), byte),
        dist_inputs=sum(layout.dist_inputs for layout in layouts),
        lookback=lookback,
        given=next((layout.given for layout in layouts if layout.given is not None), None),
    )


class _Agent:
    """One agent in an episode. `times`: the env step of each of its observations in this fragment; `acted`: it has
    acted on the last one; `carried`: the version that did, if that was before this fragment."""

    __slots__ = ("acted", "carried", "chosen", "end", "module", "rows", "times")

    def __init__(self, module: str, rows: FragmentBuilder) -> None:
        self.module = module
        self.rows = rows
        self.times: list[int] = []
        self.acted = False
        self.end: End = "no"
        self.chosen = self.carried = -1

    @property
    def waits(self) -> bool:
        """It is to act."""
        return not self.acted and self.end == "no"

    @property
    def newest(self) -> Array:
        """Its last observation, as it was given."""
        return self.rows.given if self.rows.follows else self.rows.seen(self.rows.steps - self.acted)


class AgentsBuilder(FragmentBuilder):
    """Builds the fragments of an episode of several agents, one after the other.

    For each env step: `observe` a `Turn`, then `took` for each agent that acts, then `stepped`, then `rewards`.
    `steps`, `t0` and `limit` count env steps. `cast`: agent -> how it takes part, of this episode; `known`: all that
    the simulator may have; `failures`: why others do not; `crew`: whatever `cast` was made of; `counts_as`: the version
    by which the fragment's lag is counted. `observed`: who was given an observation in the newest turn.
    """

    origin: AgentsOrigin

    def __init__(
        self, episode: str, known: Iterable[AgentId], *, sent: bool = True, explore: bool | None = None
    ) -> None:
        super().__init__(episode, sent=sent, explore=explore)
        self.known = frozenset(known)
        self.cast: Mapping[AgentId, Member] = {}
        self.failures: Mapping[AgentId, str] = {}
        self.crew: object = None
        self.counts_as = 0
        self.agents: dict[AgentId, _Agent] = {}
        self.ended: dict[AgentId, End] = {}
        self.observed: frozenset[AgentId] = frozenset()
        self._told_ends: dict[AgentId, int] = {}
        self._ends: dict[AgentId, tuple[int, Told]] = {}
        self._seen = -1
        self._warned = False

    def begin(self, layout: Layout, kind: Kind, origin: Origin, limit: int) -> None:
        """Start the next fragment, of at most `limit` >= 1 env steps. `layout` is only a measure."""
        assert isinstance(origin, AgentsOrigin)
        self._layout, self.kind, self.origin, self.limit = layout, kind, origin, limit
        self.step_bytes = layout.step_bytes(kind)
        for agent in self.agents.values():
            agent.rows.origin, agent.rows.limit = origin, limit + 1
            if agent.rows.kind != kind and not agent.rows.steps and agent.rows.layout is not None:
                agent.rows.begin(agent.rows.layout, kind, origin, limit + 1)  # `observe` comes again

    def recast(self, cast: Mapping[AgentId, Member], failures: Mapping[AgentId, str]) -> None:
        """How agents take part from now on. Raises `RemovedError`, with its name, for one in the episode whose module
        has gone or has become another."""
        for name, agent in self.agents.items():
            member = cast.get(name)
            layout = agent.rows.layout
            if member is None or member.module != agent.module or layout is None or not member.layout.like(layout):
                raise RemovedError(
                    f"{self._where}: the policy '{agent.module}' by which agent {name!r} acts was removed from the "
                    f"training, or is another one now: abandon this episode, and start another one"
                )
        self.cast, self.failures = cast, failures

    def observe(self, observation: Any) -> Array:
        """Take in a `Turn`, once for each env step, or again with the same. Raises `EpisodeError`, with the agent's
        name, for an agent that nobody knows, has ended or has not acted, for one that is truncated without an
        observation, and for what `FragmentBuilder.observe` refuses: nothing of the turn is taken in then."""
        turn: Turn = observation
        now = self.t0 + self.steps
        again = self._seen == now
        if again and self.follows and turn.observations.keys() - self.ended.keys() != self.observed - self.ended.keys():
            raise EpisodeError(
                f"{self._where}: other agents had observations in env step {now} before, and the runner that follows "
                f"the episode has been told: call again with those"
            )
        new: list[AgentId] = []
        try:
            for name, value in turn.observations.items():
                if name not in self.agents:
                    if again and name in self.ended:
                        continue
                    self._enter(name)
                    new.append(name)
                self._see(self.agents[name], name, value, again)
            self._check_ends(turn)
        except EpisodeError:
            for name in new:
                del self.agents[name]
            raise
        for name in turn.observations:
            agent = self.agents.get(name)
            if agent is None:
                continue  # it had ended with this turn already
            if not again or not agent.times or agent.times[-1] != now:
                agent.times.append(now)
            agent.acted = False
        self._seen = now
        self.observed = frozenset(turn.observations)
        for flags, end in ((turn.terminateds, "terminated"), (turn.truncateds, "truncated")):
            for name, flag in flags.items():
                if flag and name != ALL:
                    self._end(name, end)  # type: ignore[arg-type]
        return NOTHING

    def _see(self, agent: _Agent, name: AgentId, value: Any, again: bool) -> None:
        """Write this agent's observation where the next one belongs, if it may have one now."""
        if not again:
            if agent.end != "no":
                raise self._has_ended(name)
            if agent.times and not agent.acted:
                raise EpisodeError(
                    f"{self._where}: agent {name!r} was given an observation in env step {agent.times[-1]}, has not "
                    f"acted on it, and is given another one"
                )
        elif agent.acted:
            raise EpisodeError(
                f"{self._where}: other agents had observations in env step {self._seen} before, without {name!r}: call "
                f"again with those"
            )
        agent.rows.observe(value)

    def _check_ends(self, turn: Turn) -> None:
        for flags in (turn.terminateds, turn.truncateds):
            for name, flag in flags.items():
                if flag and name != ALL and name not in self.known:
                    raise self._unknown(name)
        for name, flag in turn.truncateds.items():
            agent = self.agents.get(name)
            if not flag or agent is None or turn.terminateds.get(name) or name in turn.observations:
                continue
            if agent.acted and agent.end == "no":
                raise EpisodeError(
                    f"{self._where}: agent {name!r} has acted and was truncated, and there is no observation after its "
                    f"action: the learner needs one"
                )

    def over_with(self, turn: Turn) -> bool:
        """Whether all agents that have taken part have ended, with this turn at the latest: RLlib ends the episode
        then."""
        if not (turn.terminateds or turn.truncateds or self.ended):
            return False
        ended = {name for flags in (turn.terminateds, turn.truncateds) for name, flag in flags.items() if flag}
        ended |= self.ended.keys()
        # Where a runner follows the episode RLlib's has ended then, whoever comes with that step.
        present = self.agents.keys() | (set() if self.follows and self.agents else turn.observations.keys())
        return present <= ended and bool(present or self.ended)

    def _enter(self, name: AgentId) -> None:
        if name in self.ended:
            raise self._has_ended(name)
        member = self._member(name)
        rows = FragmentBuilder(f"{self.episode}', agent '{name}")
        rows.begin(member.layout, self.kind, self.origin, self.limit + 1)
        self.agents[name] = _Agent(member.module, rows)

    def _has_ended(self, name: AgentId) -> EpisodeError:
        return EpisodeError(
            f"{self._where}: agent {name!r} has ended ({self.ended[name]}), and is given an observation: an agent that "
            f"comes back needs an id of its own"
        )

    def _member(self, name: AgentId) -> Member:
        if name not in self.known:
            raise self._unknown(name)
        member = self.cast.get(name)
        if member is None:
            why = self.failures.get(name, "the trainer doesn't know it")
            raise EpisodeError(f"{self._where}: agent {name!r} is mapped to no module: {why}")
        return member

    def _unknown(self, name: AgentId) -> EpisodeError:
        return EpisodeError(
            f"{self._where}: there is no agent {name!r}: connect_agents() was told of "
            f"{', '.join(sorted(map(repr, self.known))[:8])}"
        )

    def _end(self, name: AgentId, end: End) -> None:
        agent = self.agents.get(name)
        if agent is None or agent.end != "no":
            return
        if agent.acted:
            # What a terminated agent would have seen is never used: as RLlib does, the last one once more.
            agent.rows.once_more()
            agent.times.append(self.t0 + self.steps)
            agent.acted = False
        agent.end = self.ended[name] = end
        if not agent.rows.steps and not agent.rows.t0:
            del self.agents[name]  # it has never acted
        else:
            self._ends[name] = self.t0 + self.steps, Told(name, agent.module, agent.rows.told_reward, end)

    def finish(self, end: End) -> None:
        """The episode is over, for all agents; `observe` was given the turn with which it is."""
        for name in list(self.agents):
            self._end(name, end)

    def to_act(self) -> dict[str, list[AgentId]]:
        """Module -> the agents that it is to act for now."""
        waiting: dict[str, list[AgentId]] = {}
        for name, agent in self.agents.items():
            if agent.waits:
                waiting.setdefault(agent.module, []).append(name)
        return waiting

    def rows_of(self, agents: Iterable[AgentId]) -> list[Array]:
        """The newest observation of each."""
        return [self.agents[name].newest for name in agents]

    # ---- for a service that follows the episode

    def newly_observed(self) -> dict[str, list[AgentId]]:
        """Module -> its agents that were given an observation in the newest turn."""
        found: dict[str, list[AgentId]] = {}
        for name, agent in self.agents.items():
            if name in self.observed:
                found.setdefault(agent.module, []).append(name)
        return found

    def told(self) -> list[Told]:
        """What the newest turn has brought of each agent, to be told now. An end is told in one env step, which may be
        a later one."""
        now = self.t0 + self.steps
        news = [
            Told(name, agent.module, agent.rows.told_reward)
            for name, agent in self.agents.items()
            if name in self.observed and agent.end == "no"
        ]
        for name, (t, end) in self._ends.items():
            if self._told_ends.setdefault(name, now) == now:
                news.append(end if t == now else msgspec.structs.replace(end, t=t))
        return news

    def saw_of(self, name: AgentId, seen: Array, reward: float) -> None:
        """What a runner has made of this agent's newest observation, and of the reward before it."""
        rows = self.agents[name].rows
        rows.saw(seen)
        self.episode_return += rows.rewarded(reward)

    def memories(self, agents: Sequence[AgentId]) -> list[Array]:
        """What the module that acts for these remembers of each: (n, *shape) arrays, in its layout's order."""
        states = [self.agents[name].rows.state for name in agents]
        return [np.stack(each) for each in zip(*states, strict=True)]

    def before_each(self, agents: Iterable[AgentId]) -> list[Before]:
        """The steps before the newest observation of each, as far as its policy looks back."""
        return [self.agents[name].rows.before() for name in agents]

    def took(
        self, name: AgentId, action: Any, logp: float, dist_inputs: Any, state: Sequence[NDArray[Any]] = ()
    ) -> None:
        """The module has chosen this agent's action, and remembers `state` after it."""
        agent = self.agents[name]
        agent.rows.act(action, logp, dist_inputs, state)
        agent.acted, agent.chosen = True, self.origin.versions.get(agent.module, 0)

    def check_logged(self, name: AgentId, action: Any, logp: float | None) -> None:
        """Raises `EpisodeError` for what `FragmentBuilder.log` refuses, and for an agent whose policy would have to
        remember the step."""
        agent = self.agents[name]
        if agent.rows.remembers:
            raise EpisodeError(
                f"{self._where}: agent {name!r} acts by the recurrent policy '{agent.module}', which would not "
                f"remember an action of the simulator's: let it act (get_action)"
            )
        if agent.rows.layout is not None and agent.rows.layout.looks_back:
            raise EpisodeError(
                f"{self._where}: agent {name!r} acts by the policy '{agent.module}', which looks at earlier "
                f"observations: let it act (get_action)"
            )
        agent.rows.fitting(action, logp)

    def logged(self, name: AgentId, action: Any, logp: float | None) -> None:
        """The simulator has chosen it itself; None: nobody knows how probable it was. Raises as `check_logged`."""
        agent = self.agents[name]
        agent.rows.log(action, logp)
        agent.acted, agent.chosen = True, self.origin.versions.get(agent.module, 0)

    def stepped(self) -> None:
        """All that act in this env step have."""
        self.steps += 1

    def rewards(self, rewards: Mapping[AgentId, Any]) -> None:
        """Add to the agents' rewards. One of an agent that has never acted is nobody's, as with RLlib. Raises
        `EpisodeError`, with its name, for an agent that nobody knows or that has ended, and for what isn't a finite
        number."""
        for name, reward in rewards.items():
            agent = self.agents.get(name)
            if agent is None or agent.end != "no":
                if name in self.ended:
                    if reward:
                        raise EpisodeError(
                            f"{self._where}: a reward of {reward} for agent {name!r}, which has ended "
                            f"({self.ended[name]}): log it before the observations with which the agent ends"
                        )
                    continue
                self._member(name)
                if reward and not self._warned:
                    self._warned = True
                    log.warning(
                        "%s: a reward of %s for agent %r, which has not acted yet, is nobody's; more are not told",
                        self._where, reward, name,
                    )  # fmt: skip
                continue
            if not agent.rows.steps and not agent.rows.t0:
                continue
            before = agent.rows.episode_return
            agent.rows.reward(reward)
            self.episode_return += agent.rows.episode_return - before

    # ---- cutting

    def clipped(self, steps: int, layout: Layout, kind: Kind, fragment_bytes: int) -> int:
        """As the protocol allows."""
        return min(steps, MAX_AGENTS_STEPS)

    @property
    def nbytes(self) -> int:
        """Bytes of the fragment being built."""
        return sum(agent.rows.nbytes + 4 * len(agent.times) for agent in self.agents.values())

    def cut(self) -> Cut:
        """The fragment of all its env steps. The observations after the last were given to `observe`."""
        parts: dict[str, list[tuple[dict[str, Array], list[int]]]] = {}
        entries = []
        for name, agent in self.agents.items():
            rows, version = agent.rows, agent.carried
            cut = rows.cut_before_last() if agent.acted else rows.cut() if rows.steps else None
            # What has begun and is not complete is of these weights, whatever the next fragment is of.
            agent.carried = agent.chosen if agent.acted else -1
            if cut is None:
                continue
            if not agent.acted and agent.end == "no":
                assert rows.layout is not None
                rows.begin(rows.layout, self.kind, self.origin, self.limit + 1)
            first = version if version not in (-1, self.origin.versions.get(agent.module, 0)) else -1
            entries.append(AgentRows(name, agent.module, cut.t0, cut.steps, agent.end, cut.return_so_far, first))
            parts.setdefault(agent.module, []).append((cut.arrays, agent.times))
            agent.times = agent.times[-1:]
        order = list(parts)
        entries.sort(key=lambda entry: order.index(entry.module))  # stable: rows are joined in this order
        used = {agent.module for agent in self.agents.values()} | set(parts)
        all_versions = self.origin.versions
        versions = {module: all_versions.get(module, 0) for module in sorted(used)} or dict(all_versions)
        arrays: dict[str, Array] = {}
        for module, some in parts.items():
            for column in {column: None for one, _ in some for column in one}:
                # Of agents that have just come there are no earlier observations.
                arrays[f"{module}/{column}"] = np.concatenate([one[column] for one, _ in some if column in one])
            times = [time - self.t0 for _, each in some for time in each]
            arrays[f"{module}/t"] = np.array(times, np.int32)
        origin = AgentsOrigin.of(self.origin.run, self.counts_as, all_versions)
        made = Cut(origin, self.t0, self.steps, self._before, arrays, modules=versions, agents=tuple(entries))
        self.agents = {name: agent for name, agent in self.agents.items() if agent.end == "no"}
        # What a step has been given that goes on into a later fragment is that one's.
        begun = sum(agent.rows.last_reward for agent in self.agents.values() if agent.acted)
        self._before = self.episode_return - begun
        self.t0 += self.steps
        self.steps = 0
        return made

    def cut_before_last(self) -> Cut | None:
        """Nothing: what the last env step led to isn't known."""
        return None
