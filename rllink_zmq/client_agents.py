"""What a simulator of several agents holds: `connect_agents(address)` -> `AgentsClient` -> `AgentsEpisode`.

The ways are those of RLlib's `MultiAgentEnv`: dicts by agent, and who is in a dict takes part. One episode at a time
for a client; as many clients in a process as one likes, which share policies and weights.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import gymnasium as gym
import numpy as np

from rllink_zmq import __version__
from rllink_zmq.audit import Log
from rllink_zmq.client import Backpressure, Client, Inference, Stats, check_choices, log_of_audit, opened
from rllink_zmq.client_agents_followed import PendingFollowed, PendingSeenAgents
from rllink_zmq.client_agents_policy import AgentsReader
from rllink_zmq.client_agents_remote import PendingAgents, RemoteAgents
from rllink_zmq.client_episode import explores, logs_in_evaluation
from rllink_zmq.client_flow import Flow
from rllink_zmq.client_followed import Ending, PendingSeen
from rllink_zmq.client_remote import Pairs, forget_looked
from rllink_zmq.compression import Compression, check_compression
from rllink_zmq.errors import EpisodeError
from rllink_zmq.fragments import End, FragmentBuilder, Kind, Layout, Origin
from rllink_zmq.fragments_agents import ALL, AgentsBuilder, AgentsOrigin, Turn
from rllink_zmq.messages import AgentId
from rllink_zmq.policy import Policy
from rllink_zmq.session import SimulatorSession, State
from rllink_zmq.spaces import agents_to_wire
from rllink_zmq.transport import Connection, parse_address


def connect_agents(
    address: str = "tcp://127.0.0.1:5555",
    *,
    observation_spaces: Mapping[AgentId, gym.Space[Any]],
    action_spaces: Mapping[AgentId, gym.Space[Any]],
    name: str | None = None,
    threads: int = 1,
    seed: int | None = None,
    on_backpressure: Backpressure = "pause",
    inference: Inference = "local",
    compression: Compression | None = None,
    timeout: float | None = 5.0,
    audit: str | os.PathLike[str] | None = None,
) -> AgentsClient:
    """`connect` for a simulator of several agents.

    `observation_spaces`, `action_spaces`: of each agent that may ever take part, by its id (an int, or text of 1 to 64
    characters). They may be fewer than the trainer knows. The other arguments are those of `connect`. With `inference`
    "local" actions are computed here, by the policies of the modules that these agents may be mapped to; no others are
    fetched. With "remote" runners are asked: one request an env step for each module that acts in it, all at once.
    Raises ConnectionTimeout, RefusedError, SettingsError, SpaceError (with the agent's name).
    """
    parse_address(address)
    check_choices(on_backpressure, inference)
    check_compression(compression)
    spaces = agents_to_wire(observation_spaces, action_spaces)
    told = log_of_audit(audit)
    session = SimulatorSession(
        os.urandom(16),
        name=name if name is not None else f"{socket.gethostname()}/{os.getpid()}",
        package=__version__,
        spaces=spaces,
    )
    reader = AgentsReader.join(address, threads, seed)
    reader.admit(spaces.agents)
    flow = AgentsFlow(Connection(session, address), session, reader, spaces.agents, told)
    client = AgentsClient(flow, spaces.agents)
    return opened(client, on_backpressure, inference, timeout, compression)


class AgentsFlow(Flow):
    """A client's flow of env steps of several agents."""

    reader: AgentsReader
    remote: RemoteAgents | None

    def __init__(
        self, connection: Connection, session: SimulatorSession, reader: AgentsReader, agents: tuple[AgentId, ...],
        audit: Log | None = None,
    ) -> None:  # fmt: skip
        super().__init__(connection, session, reader, None, audit)
        self._agents = agents

    def prepare(self, pairs: Pairs, kind: Kind, *, wait: bool) -> Origin | None:
        origin = super().prepare(pairs, kind, wait=wait)
        reader = self.reader
        if origin is not None:
            for builder, _ in pairs:
                assert isinstance(builder, AgentsBuilder)
                if not builder.steps:
                    builder.counts_as = self.counts_as(builder.origin)
                if builder.crew is not reader.crew and reader.crew is not None:
                    fixed = {agent: each.module for agent, each in builder.agents.items()}
                    builder.recast(reader.cast(fixed), reader.crew.failures)
                    builder.crew = reader.crew
        return origin

    def origin(self, kind: Kind) -> AgentsOrigin | None:
        if not self._reads_policy:
            self._reads_policy = True
            self.look()
        remote, told = self.remote, self.reader.origin
        if remote is None or told is None:
            return None if self.rests else told
        if remote.origin is None or remote.origin.run < told.run:
            remote.origin = told  # until the first answer
        return remote.origin

    def counts_as(self, origin: Origin) -> int:
        assert isinstance(origin, AgentsOrigin)
        return self.reader.counts_as(origin)

    def layout_of(self, kind: Kind) -> Layout | None:
        return self.reader.layout

    def look(self) -> None:
        super().look()
        if self._reads_policy and self.remote is not None:
            self.reader.look(self.session, time.monotonic())

    def look_through(self, builder: FragmentBuilder, end: End = "no") -> PendingSeen:
        assert self.remote is not None and isinstance(builder, AgentsBuilder)
        return PendingSeenAgents(self.remote, builder, end)

    def act_remotely(self) -> None:
        before, self.reader = self.reader, self.reader.elsewhere()
        self.reader.admit(self._agents)
        before.dismiss(self._agents)
        before.leave()
        self.remote = RemoteAgents(self.connection.address, self.session.name)
        self.remote.connection.open()

    def why(self, kind: Kind) -> str:
        missing = self.reader.missing() if self.remote is not None and self._reads_policy else ""
        return missing if missing and self.session.state is State.LIVE else super().why(kind)


class AgentsClient:
    """One simulator of several agents. Get one with `connect_agents`. Not for two threads at once. `close` it, or use
    it as a context manager: what isn't sent when the process ends is lost. `base`: the client beneath, for what takes
    several."""

    def __init__(self, flow: AgentsFlow, agents: tuple[AgentId, ...]) -> None:
        """Use `connect_agents`."""
        self.flow = flow
        self.agents = agents
        self.base = Client(flow)
        self._started = 0

    @property
    def address(self) -> str:
        """The broker's."""
        return self.base.address

    @property
    def ready(self) -> bool:
        """Whether policies and weights to act with are there. Never waits. Raises RefusedError."""
        return self.base.ready

    @property
    def stats(self) -> Stats:
        """Counts, as of the last look. Steps are env steps."""
        return self.base.stats

    @property
    def evaluates(self) -> bool:
        """As `Client.evaluates`."""
        return self.base.evaluates

    def start_episode(
        self, episode_id: str | None = None, training_enabled: bool | None = None, *, explore: bool | None = None
    ) -> AgentsEpisode:
        """A new episode; the last one has ended. Arguments and what it raises as of `Client.start_episode`."""
        flow = self.flow
        if training_enabled is not False and explore is not None:
            raise EpisodeError("explore is for episodes that are not trained on: training_enabled=False")
        flow.look_if_due()
        undecided = training_enabled is None
        if training_enabled is None:
            training_enabled = not self.evaluates
        if flow.builders:
            raise EpisodeError(
                f"episode '{next(iter(flow.builders))}' is open: end it first, or connect_agents() for each episode at "
                f"once"
            )
        if episode_id is None:
            self._started += 1
            episode_id = f"{flow.session.session.hex()}-{self._started}"
        if not 1 <= len(episode_id) <= 64:
            raise EpisodeError(f"expected an episode_id of 1 to 64 characters, got {len(episode_id)}")
        builder = AgentsBuilder(episode_id, self.agents, sent=training_enabled, explore=explore)
        flow.builders[episode_id] = builder
        if not training_enabled and explore is None:
            flow.evaluate(builder)
        return AgentsEpisode(flow, builder, undecided=undecided)

    def close(self, timeout: float = 5.0) -> int:
        """As `Client.close`."""
        if not self.flow.closed:
            self.flow.reader.dismiss(self.agents)
        return self.base.close(timeout)

    def __enter__(self) -> AgentsClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(5.0 if kind is None else 0.5)


class AgentsEpisode:
    """One episode of several agents. Get one with `AgentsClient.start_episode`, and end it with `end_episode`.

    For each env step: `get_action` (or `log_action`), step the simulation, `log_returns`. As a context manager: leaving
    it without `end_episode` abandons it: what isn't sent yet is discarded and counted.
    """

    def __init__(self, flow: AgentsFlow, builder: AgentsBuilder, *, undecided: bool = False) -> None:
        """Use `AgentsClient.start_episode`. `undecided`: it was left to the trainer what this episode is for."""
        self.id = builder.episode
        self.training_enabled = builder.sent
        self.builder = builder
        self.open = True
        self._flow = flow
        self._undecided = undecided
        self._cost = 1 if builder.sent or builder.evaluation is not None else 0
        self._pending: PendingAgents | None = None
        self._ending: Ending | None = None
        self._started: float | None = time.monotonic()

    @property
    def steps(self) -> int:
        """Env steps so far."""
        return self.builder.t0 + self.builder.steps

    @property
    def waiting(self) -> set[AgentId]:
        """The agents that have acted, and wait for their next observation."""
        return {name for name, agent in self.builder.agents.items() if agent.acted}

    @property
    def episode_return(self) -> float:
        """The sum of all agents' rewards so far."""
        return self.builder.episode_return

    def get_action(
        self,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> dict[AgentId, Any]:
        """The actions of all agents that are to act, by agent, as `env.step` wants them.

        `observations`: of those agents that the environment gave any, by agent: they act now, but for those that have
        ended with it. `terminateds`, `truncateds`: which agents have; those that are not in there go on. An agent that
        is not in `observations` goes on without acting, until it is.

        Waits, and says why in the log every 5 s, while there is no policy or no room for another step. Raises
        EpisodeError, with the agent's name, for an agent that isn't there, that has ended, or whose observation doesn't
        fit, and when all have ended (`all_ended`): nothing of the call counts then, and it may be made again as it
        should be. RemovedError, when the policy of an agent that takes part was removed: abandon the episode.
        RefusedError when the broker refuses this simulator.
        """
        flow, builder, reader = self._flow, self.builder, self._flow.reader
        turn = self._turn("get_action", observations, terminateds, truncateds)
        while True:
            if flow.remote is None and not self._goes_on("acted"):
                flow.prepare([(builder, turn)], "acted", wait=True)
            if flow.remote is not None:
                pending = self._ask(flow.remote, turn)
                try:
                    return pending.result()
                finally:
                    pending.forget()
            with reader.lock:
                if builder.origin is reader.origin:
                    builder.observe(turn)
                    actions = self._act()
                    break
        flow.credit -= self._cost
        return actions

    def get_action_async(
        self,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> PendingAgents:
        """Ask the service for the actions, and go on: `result()` of what is returned are the actions, `done()` says
        whether they are there. With `connect_agents(inference="remote")` alone; until then the episode takes no other
        call. Waits and raises as `get_action` does, but for the answers."""
        if self._flow.remote is None:
            raise EpisodeError('get_action_async asks the action service: connect_agents(..., inference="remote")')
        return self._ask(self._flow.remote, self._turn("get_action_async", observations, terminateds, truncateds))

    def can_act(
        self,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> bool:
        """Whether `get_action` with the same would return at once; with the service: whether it may ask. The next call
        must have the same. Never waits."""
        flow = self._flow
        turn = self._turn("can_act", observations, terminateds, truncateds)
        if flow.remote is not None and not flow.remote.room:
            flow.look_if_due()
            return False
        acts = flow.reader if flow.remote is None else flow.remote
        if self.builder.origin is acts.origin and self._goes_on("acted"):
            return True
        return flow.prepare([(self.builder, turn)], "acted", wait=False) is not None

    def log_action(
        self,
        observations: Mapping[AgentId, Any],
        actions: Mapping[AgentId, Any],
        action_logps: Mapping[AgentId, float] | None = None,
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> None:
        """An env step whose actions the simulator chose itself: of each agent that has an observation and has not ended
        with it. `actions`: in the action space as RLlib trains on it; `action_logps`: their log-probabilities; None:
        nobody knows, which is enough for DQN and SAC. An episode's actions are all logged in one of these ways, or all
        the policies'. Waits and raises as `get_action` does."""
        builder = self.builder
        turn = self._turn("log_action", observations, terminateds, truncateds)
        if not self.training_enabled and logs_in_evaluation(builder, undecided=self._undecided and not self.steps):
            self.training_enabled, self._cost = True, 1
        kind: Kind = "given" if action_logps is None else "logged"
        if not self._goes_on(kind):
            self._flow.prepare([(builder, turn)], kind, wait=True)
        builder.observe(turn)
        waiting = [agent for agents in builder.to_act().values() for agent in agents]
        for agent in actions:
            if agent not in waiting:
                raise EpisodeError(
                    f"episode '{self.id}': an action for agent {agent!r}, which has no observation to act on"
                )
        for agent in waiting:
            if agent not in actions or (action_logps is not None and agent not in action_logps):
                raise EpisodeError(f"episode '{self.id}': agent {agent!r} is to act, and has no action and action_logp")
        logps = {agent: None if action_logps is None else action_logps[agent] for agent in waiting}
        for agent in waiting:
            builder.check_logged(agent, actions[agent], logps[agent])
        for agent in waiting:
            builder.logged(agent, actions[agent], logps[agent])
        builder.stepped()
        self._flow.credit -= self._cost

    def all_ended(
        self,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> bool:
        """Whether all agents that have taken part have ended, with these at the latest. The episode is over then, as
        RLlib has it, whatever `__all__` says."""
        return self.builder.over_with(Turn(observations, terminateds or {}, truncateds or {}))

    def log_returns(self, rewards: Mapping[AgentId, float]) -> None:
        """Add to the rewards of the agents' last actions. Several calls add up; none means 0. A reward that comes while
        an agent waits for its next observation is its last action's. Raises EpisodeError, with the agent's name, for
        one that isn't there or has ended, and for NaN or infinity."""
        self.check_open("log_returns")
        if not self.steps:
            raise EpisodeError(f"episode '{self.id}': a reward before the first action: call get_action first")
        self.builder.rewards(rewards)

    def end_episode(
        self,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> None:
        """The episode is over, for all agents: `observations` are what the last actions led to. Truncated if
        `truncateds["__all__"]` is set and `terminateds["__all__"]` is not. Raises EpisodeError for an episode without a
        step, the second time, and for an agent that was truncated without an observation after its action."""
        self.finish(observations, terminateds, truncateds)
        self._flow.connection.flush()

    def finish(
        self,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> None:
        """`end_episode` for callers that go on at once: what is queued may leave with the next look."""
        self.ending(observations, terminateds, truncateds).result()

    def ending(
        self,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None = None,
        truncateds: Mapping[AgentId, bool] | None = None,
    ) -> Ending:
        """`finish` for callers that go on meanwhile, where a runner follows the episode. Takes no other call from then
        on, but for `abandon`."""
        self.check_open("end_episode")
        builder = self.builder
        if not builder.steps:
            raise EpisodeError(
                f"episode '{self.id}' ends without an env step since its last observations were given: call get_action "
                f"first, or abandon()"
            )
        terminateds, truncateds = terminateds or {}, truncateds or {}
        cut_short = bool(truncateds.get(ALL)) and not terminateds.get(ALL)
        if cut_short:
            truncateds = {**truncateds, **dict.fromkeys(builder.agents, True)}
        builder.observe(Turn(observations, terminateds, truncateds))
        end: End = "truncated" if cut_short else "terminated"
        builder.finish(end)
        self.open = False
        self._ending = Ending(self._flow, builder, end)
        return self._ending

    def abandon(self) -> None:
        """End the episode as if the simulator had been lost: what isn't sent yet is discarded and counted."""
        if self._ending is not None:
            self._ending.give_up()
        if self.open:
            if self._pending is not None:
                self._pending.forget()
            self._flow.abandon(self.builder)
            self._leave()

    def check_open(self, call: str) -> None:
        """Raises EpisodeError after the end."""
        if self._flow.closed:
            raise EpisodeError(f"{call} of episode '{self.id}', whose client is closed: connect_agents() again")
        if not self.open:
            raise EpisodeError(f"{call} after the end of episode '{self.id}': start another one with start_episode()")
        if self.builder.asked:
            raise EpisodeError(f"{call}: episode '{self.id}' has asked for actions already: take their result() first")

    def __enter__(self) -> AgentsEpisode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.abandon()

    # ---- inside

    def _turn(
        self,
        call: str,
        observations: Mapping[AgentId, Any],
        terminateds: Mapping[AgentId, bool] | None,
        truncateds: Mapping[AgentId, bool] | None,
    ) -> Turn:
        self.check_open(call)
        if self._started is not None:
            self.builder.timings["reset"] = time.monotonic() - self._started
            self._started = None
        for flags in (terminateds, truncateds):
            if flags and flags.get(ALL):
                raise EpisodeError(f"{call}: episode '{self.id}' is over for all agents: call end_episode")
        turn = Turn(observations, terminateds or {}, truncateds or {})
        if self.builder.over_with(turn):
            raise EpisodeError(f"episode '{self.id}': all its agents have ended: call end_episode")
        return turn

    def _ask(self, remote: RemoteAgents, turn: Turn) -> PendingAgents:
        self._goes_on("acted")
        self._flow.prepare([(self.builder, turn)], "acted", wait=True)
        self.builder.observe(turn)
        pending = PendingFollowed if self.builder.follows else PendingAgents
        self._pending = pending(self._flow, remote, self.builder, turn)
        return self._pending

    def _goes_on(self, kind: Kind) -> bool:
        builder, flow = self.builder, self._flow
        if self.steps and builder.kind != kind:
            raise EpisodeError(
                f"episode '{self.id}': an episode's actions are all logged (log_action, with action_logps or without), "
                f"or all are the policies' (get_action)"
            )
        return 0 < builder.steps < builder.limit and flow.credit > 0 and time.monotonic() < flow.look_at

    def _act(self) -> dict[AgentId, Any]:
        builder, policies = self.builder, self._flow.reader.policies
        actions: dict[AgentId, Any] = {}
        began = time.perf_counter()
        for module, agents in builder.to_act().items():
            policy = policies[module]
            draws = explores(builder, policy)
            rows = builder.rows_of(agents)
            if len(agents) == 1 or policy.manifest.packed_action is not None:
                for agent, row in zip(agents, rows, strict=True):
                    one = policy.act_one(row, draws, builder.agents[agent].rows.state)
                    builder.took(agent, one.actions, one.action_logp, one.action_dist_inputs, one.state)
                    actions[agent] = one.env_actions
                continue
            acted = policy.act(np.stack(rows), explore=draws, state=builder.memories(agents))
            logps = acted.action_logp.tolist()
            for i, agent in enumerate(agents):
                memory = [array[i] for array in acted.state]
                builder.took(agent, acted.actions[i], logps[i], acted.action_dist_inputs[i], memory)
                actions[agent] = _for_env(acted.env_actions[i], policy)
        if not builder.steps:
            builder.timings["inference"] = time.perf_counter() - began
        builder.stepped()
        return actions

    def _leave(self) -> None:
        self.open = False
        forget_looked(self.builder)
        self.builder.limit = 0
        self._flow.builders.pop(self.id, None)


def _for_env(action: Any, policy: Policy) -> Any:
    """An int for Discrete, else an array of its own."""
    return int(action) if policy.manifest.env_action.shape == () and np.ndim(action) == 0 else np.array(action)


__all__ = ["AgentsClient", "AgentsEpisode", "connect_agents"]
