"""Actions of several agents from the service: one request for each module that acts in an env step, all at once.

Each answer says which version of its module chose. Where one has changed the fragment ends before that step.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rllink_zmq.client_remote import AGAIN, AGAIN_MOST, OVER_CREDIT, Answer, RemotePolicy, before_of, packed_for_env
from rllink_zmq.errors import EpisodeError, PolicyError, RemovedError
from rllink_zmq.fragments import Layout, Origin
from rllink_zmq.fragments_agents import AgentsBuilder, AgentsOrigin, Turn
from rllink_zmq.messages import FOLLOWS, LOST, STATE_IN, STATE_OUT, AgentId

if TYPE_CHECKING:
    from rllink_zmq.client_agents import AgentsFlow


class RemoteAgents(RemotePolicy):
    """A connection to the service of several modules. `origin`: the version of each that answered last."""

    origin: AgentsOrigin | None

    def known(self, origin: Origin) -> Origin:
        return origin

    def answered_by(self, run: str, versions: dict[str, int]) -> AgentsOrigin:
        """These versions of some modules have answered: `origin` from now on."""
        known = self.origin
        if known is not None and known.run == run:
            if all(known.versions.get(module) == version for module, version in versions.items()):
                return known
            versions = {**known.versions, **versions}
        self.origin = AgentsOrigin.of(run, max(versions.values()), versions)
        return self.origin


class Chosen(NamedTuple):
    """Of each agent that was asked for: `env_actions` as `env.step` wants them, `state` in the layout's order."""

    actions: NDArray[Any]
    logps: list[float]
    dist_inputs: NDArray[Any]
    env_actions: Any
    state: list[NDArray[Any]]


class Asked:
    """What is asked of one module: `columns`, a row for each of `agents`, and what else the request says (`how`).
    `request`: its number while it is under way, 0 before and after; `again_at`: when it may be sent."""

    def __init__(self, module: str, agents: list[AgentId], builder: AgentsBuilder) -> None:
        self.module = module
        self.agents = agents
        rows = builder.agents[agents[0]].rows
        names = [STATE_IN + state.name for state in rows.remembers]
        observations = np.stack(builder.rows_of(agents))
        self.columns = {"obs": observations}
        self.columns |= zip(names, builder.memories(agents), strict=True)
        if rows.layout is not None and rows.layout.lookback:
            self.columns |= before_of(builder.before_each(agents), rows.layout.lookback)
        self.how: dict[str, Any] = {"module": module, "agents": agents}
        self.begin()

    def begin(self) -> None:
        """It has not been asked yet."""
        self.request = 0
        self.again_at = 0.0
        self.answer: Answer | None = None
        self._pause = AGAIN

    def took(self, answer: Answer, now: float) -> None:
        """The service has said this."""
        self.request = 0
        if answer.code == OVER_CREDIT:
            self.again_at = now + self._pause
            self._pause = min(2 * self._pause, AGAIN_MOST)
        else:
            self.answer = answer

    def chosen(self, layout: Layout) -> Chosen:
        """Raises PolicyError for an answer that a learner could not use."""
        assert self.answer is not None
        return chosen_of(self.answer.arrays, len(self.agents), layout, self.module)


def chosen_of(arrays: dict[str, NDArray[Any]], count: int, layout: Layout, module: str) -> Chosen:
    """What an answer's columns say for `count` agents of a module. Raises PolicyError for what no learner could use."""
    try:
        actions = arrays["actions"].reshape(count, *layout.action.shape)
        logps = arrays["action_logp"].reshape(count)
        dist_inputs = arrays["action_dist_inputs"].reshape(count, layout.dist_inputs)
        state = [arrays[STATE_OUT + name].reshape(count, *row.shape) for name, row in layout.state]
    except (KeyError, ValueError) as e:
        raise PolicyError(
            f"the action service answers for module '{module}' without actions that a learner can use: {e}"
        ) from None
    if layout.env_actions is not None:
        for_env = layout.env_actions.unpack(packed_for_env(arrays, layout.env_actions, count))
    else:
        for_env = arrays.get("env_actions", actions)
    return Chosen(actions, logps.tolist(), dist_inputs, for_env, state)


class PendingAgents:
    """Actions that were asked for with `AgentsEpisode.get_action_async`. `result()` once."""

    def __init__(self, flow: AgentsFlow, remote: RemoteAgents, builder: AgentsBuilder, turn: Turn) -> None:
        """The builder has observed `turn`."""
        self._flow = flow
        self._remote = remote
        self._builder = builder
        self._turn = turn
        self._asked = self._to_ask()
        self.taken = False
        self._cost = 1 if builder.sent else 0
        flow.reserved += self._cost
        flow.credit -= self._cost
        builder.asked = True
        self._send(time.monotonic())

    @property
    def due(self) -> float:
        """When `done` has something to do, if nothing comes, on the monotonic clock."""
        waits = [one.again_at for one in self._asked if one.answer is None and not one.request]
        return min([self._remote.session.next_deadline(), *waits], default=math.inf)

    def done(self) -> bool:
        """Whether `result()` would return at once. Never waits. Raises RefusedError."""
        if self.taken or self._complete():
            return True
        self._remote.look()
        now = time.monotonic()
        for one in self._asked:
            answer = self._remote.answers.pop(one.request, None) if one.request else None
            if answer is not None:
                one.took(answer, now)
        if self._complete():
            self._drop_older_runs()
        if self._complete():
            return True
        self._send(now)
        self._flow.look_if_due()
        return False

    def result(self, timeout: float | None = None) -> dict[AgentId, Any]:
        """The actions, by agent, as `env.step` wants them. Once. Waits and raises as `AgentsEpisode.get_action` does;
        raises ConnectionTimeout after `timeout` seconds, and then it may be called again."""
        if self.taken:
            raise EpisodeError("these actions have been taken already, or were given up: ask for the next ones")
        if not self.done():
            self._flow.wait(self.done, self._remote.why, timeout, at=self._remote.connection)
        self.forget()
        for one in self._asked:
            if one.answer is not None and one.answer.code:
                errors = {"failed": PolicyError, "no_module": RemovedError, LOST: RemovedError, FOLLOWS: RemovedError}
                error = errors.get(one.answer.code, EpisodeError)
                raise error(
                    f"the action service refuses ({one.answer.code}) to act for {_named(one.agents)} by module "
                    f"'{one.module}': {one.answer.text}"
                )
        return self._adopt()

    def forget(self) -> None:
        """Give it up: the step has not been taken, and the episode goes on as if nothing had been asked."""
        if self.taken:
            return
        self.taken = True
        self._builder.asked = False
        self._flow.reserved -= self._cost
        for one in self._asked:
            if one.request:
                self._remote.session.forget(one.request)
                self._remote.answers.pop(one.request, None)
                one.request = 0

    # ---- inside

    def _to_ask(self) -> list[Asked]:
        builder = self._builder
        return [Asked(module, agents, builder) for module, agents in builder.to_act().items()]

    def _send(self, now: float) -> None:
        """What is to be sent, as far as there is room for requests."""
        builder = self._builder
        for one in self._asked:
            if one.answer is None and not one.request and now >= one.again_at and self._remote.room:
                one.request = self._remote.ask(
                    one.columns, explore=builder.explore, evaluation=not builder.sent, **one.how
                )

    def _complete(self) -> bool:
        answers = [one.answer for one in self._asked]
        return all(answers) or any(answer.code for answer in answers if answer is not None)

    def _drop_older_runs(self) -> None:
        """A run has begun between two answers: a step is of one, and the older one's are asked for again."""
        told = [one for one in self._asked if one.answer is not None and not one.answer.code]
        newest = max((one.answer.origin.run for one in told if one.answer is not None), default="")
        for one in told:
            if one.answer is not None and one.answer.origin.run < newest:
                one.answer = None

    def _adopt(self) -> dict[AgentId, Any]:
        """The step whose actions have come is the episode's."""
        builder = self._builder
        chosen = []
        versions: dict[str, int] = {}
        run = builder.origin.run
        for one in self._asked:
            layout = builder.agents[one.agents[0]].rows.layout
            assert layout is not None and one.answer is not None  # it has observed, and nothing was refused
            chosen.append((one.agents, one.chosen(layout)))
            run, versions[one.module] = one.answer.origin
        self._begin(run, versions)
        return self._took(chosen)

    def _begin(self, run: str, versions: dict[str, int]) -> None:
        """Cut the fragment, and begin the next one, where other versions have answered than those that it is of."""
        flow, builder, reader = self._flow, self._builder, self._flow.reader
        origin = self._remote.answered_by(run, versions) if versions else builder.origin
        if builder.origin is not origin or (builder.follows and builder.full):
            if builder.steps:
                flow.cut(builder, "no")
            measure = flow.layout_of("acted")
            assert measure is not None  # or nothing had been asked
            if not builder.t0:
                builder.began = flow.connection.clock()
            builder.begin(measure, "acted", origin, flow.length(measure, "acted", builder))
            builder.observe(self._turn)
            if builder.follows:
                flow.judge(builder, measure)
        if not builder.steps and versions:
            # Of those that act now: what others had answered with some time ago says nothing of their age.
            builder.counts_as = reader.counts_as(AgentsOrigin.of(run, max(versions.values()), versions))

    def _took(self, chosen: list[tuple[list[AgentId], Chosen]]) -> dict[AgentId, Any]:
        """The step is the episode's."""
        builder = self._builder
        actions: dict[AgentId, Any] = {}
        for agents, told in chosen:
            for i, agent in enumerate(agents):
                memory = [array[i] for array in told.state]
                builder.took(agent, told.actions[i], told.logps[i], told.dist_inputs[i], memory)
                actions[agent] = _row(told.env_actions, i)
        builder.stepped()
        return actions


def _named(agents: list[AgentId]) -> str:
    return f"agent{'s' if len(agents) > 1 else ''} {', '.join(map(repr, agents[:8]))}"


def _row(actions: Any, i: int) -> Any:
    """One row of dicts and tuples of arrays, or of an array: the caller's own, and an int where it is one."""
    if isinstance(actions, dict):
        return {key: _row(inner, i) for key, inner in actions.items()}
    if isinstance(actions, tuple):
        return tuple(_row(inner, i) for inner in actions)
    row = np.array(actions[i])
    return int(row) if row.ndim == 0 and row.dtype.kind in "iu" else row
