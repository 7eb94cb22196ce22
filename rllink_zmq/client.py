"""What a simulator holds: `connect(address)` -> `Client` -> `Episode`. A client has no thread: it works while it is
being called."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import gymnasium as gym
import numpy as np

from rllink_zmq import __version__
from rllink_zmq.audit import Log
from rllink_zmq.client_episode import Episode as Episode
from rllink_zmq.client_episode import explores
from rllink_zmq.client_flow import WAIT_SLICE, Flow
from rllink_zmq.client_policy import PolicyReader
from rllink_zmq.client_remote import PendingActions, request
from rllink_zmq.client_vector import Vector
from rllink_zmq.compression import Compression, check_compression
from rllink_zmq.errors import EpisodeError, SettingsError, SpaceError
from rllink_zmq.fragments import FragmentBuilder, layout_of_spaces
from rllink_zmq.fragments_block import BlockBuilder
from rllink_zmq.session import SimulatorSession, State
from rllink_zmq.spaces import spaces_to_wire
from rllink_zmq.transport import Connection, parse_address, poll

log = logging.getLogger("rllink_zmq")

Backpressure: TypeAlias = Literal["pause", "drop"]
"""What a simulator does while the trainer takes no more of its steps."""

Inference: TypeAlias = Literal["local", "remote", "auto"]
"""Who computes actions: this process with the policy it is sent, the runners, or the runners if this process can't."""


def connect(
    address: str = "tcp://127.0.0.1:5555",
    *,
    observation_space: gym.Space[Any] | None = None,
    action_space: gym.Space[Any] | None = None,
    name: str | None = None,
    episodes: int = 1,
    threads: int = 1,
    seed: int | None = None,
    on_backpressure: Backpressure = "pause",
    inference: Inference = "local",
    compression: Compression | None = None,
    timeout: float | None = 5.0,
    audit: str | os.PathLike[str] | None = None,
) -> Client:
    """A simulator's connection to the broker at `address` (its frontend), once the broker has said WELCOME.

    `observation_space`, `action_space`: both of the environment's, or neither; the broker refuses what the trainer
    can't use. `name`: for people. `episodes`: how many may be open at once. `threads`, `seed`: of the policy; clients
    of one process that give the same ones share it. `on_backpressure`: what to do while the trainer takes no more:
    "pause" in the next call for an action, or "drop" whole fragments, which are counted (`stats.dropped`), for those
    that can't pause. `inference`: who computes actions: "local", here, by the policy that comes with the weights;
    "remote", the runners, which are asked for each; "auto": here, unless ONNX Runtime is missing or refuses the policy.
    `compression`: "zstd" makes fragments smaller, images above all, for some microseconds a step here and at the
    runner; what is asked of the action service travels as it is. `timeout`: seconds; None waits for as long as it
    takes, and says so in the log. `audit`: a directory for this process's audit log, which `rllink-zmq audit` compares
    with the learner's.
    Raises ConnectionTimeout, RefusedError, SettingsError (an address, `audit`, `compression`), SpaceError (a space that
    doesn't travel).
    """
    parse_address(address)
    check_choices(on_backpressure, inference)
    check_compression(compression)
    if not 1 <= episodes <= 1_000_000:
        raise SettingsError(f"expected episodes of 1 to 1,000,000, got {episodes}")
    spaces = layout = None
    if observation_space is not None and action_space is not None:
        spaces = spaces_to_wire(observation_space, action_space)
        layout = layout_of_spaces(observation_space, action_space)
    elif observation_space is not None or action_space is not None:
        raise SpaceError("expected both observation_space and action_space or neither, got one of them")
    told = log_of_audit(audit)
    session = SimulatorSession(
        os.urandom(16),
        name=name if name is not None else f"{socket.gethostname()}/{os.getpid()}",
        package=__version__,
        spaces=spaces,
        episodes=episodes,
    )
    reader = PolicyReader.join(address, threads, seed)
    client = Client(Flow(Connection(session, address), session, reader, layout, told))
    return opened(client, on_backpressure, inference, timeout, compression)


def log_of_audit(directory: str | os.PathLike[str] | None) -> Log | None:
    """This process's, in this directory; None without one. Raises SettingsError where it can't be made."""
    if directory is None:
        return None
    log = Log.shared(directory, "simulator")
    log.open()
    return log


def check_choices(on_backpressure: str, inference: str) -> None:
    """Raises SettingsError for one that there isn't."""
    if on_backpressure not in ("pause", "drop"):
        raise SettingsError(f"expected on_backpressure 'pause' or 'drop', got {on_backpressure!r}")
    if inference not in ("local", "remote", "auto"):
        raise SettingsError(f"expected inference 'local', 'remote' or 'auto', got {inference!r}")


class HasFlow(Protocol):
    """A client, of one agent or of several."""

    @property
    def flow(self) -> Flow: ...

    def close(self, timeout: float = 5.0) -> int: ...


C = TypeVar("C", bound=HasFlow)


def opened(
    client: C, on_backpressure: Backpressure, inference: Inference, timeout: float | None, compression: str | None
) -> C:
    """`client`, once the broker has said WELCOME; closed if that fails. See `connect`."""
    client.flow.drops = on_backpressure == "drop"
    client.flow.compresses = compression is not None
    client.flow.may_ask = inference == "auto"
    try:
        client.flow.open(timeout)
        if inference == "remote":
            client.flow.act_remotely()
    except BaseException:
        client.close(0)
        raise
    return client


class Stats(NamedTuple):
    """`steps`: env steps submitted or being built. `fragments`: submitted, `unsettled`: of these, still kept.
    `outcomes`, `dropped` (by this simulator itself): reason -> (fragments, steps). `run`, `version`: of the newest
    weights that the broker has told of."""

    connected: bool
    steps: int
    fragments: int
    unsettled: int
    outcomes: dict[str, tuple[int, int]]
    dropped: dict[str, tuple[int, int]]
    run: str
    version: int


class Client:
    """One simulator. Get one with `connect`. Not for two threads at once. `close` it, or use it as a context manager:
    what isn't sent when the process ends is lost."""

    def __init__(self, flow: Flow) -> None:
        """Use `connect`."""
        self.flow = flow
        self._started = 0

    @property
    def address(self) -> str:
        """The broker's."""
        return self.flow.connection.address

    @property
    def ready(self) -> bool:
        """Whether the policy and weights to act with are there. Never waits. Raises RefusedError."""
        self.flow.look_if_due()
        return self.flow.origin("acted") is not None

    @property
    def stats(self) -> Stats:
        """Counts, as of the last look."""
        session = self.flow.session
        building = sum(b.steps for b in self.flow.builders.values() if b.sent)
        return Stats(
            connected=session.state is State.LIVE,
            steps=session.settled_steps + session.unsettled_steps + building,
            fragments=session.number,
            unsettled=len(session.unsettled),
            outcomes={reason: (total[0], total[1]) for reason, total in session.outcomes.items()},
            dropped=dict(session.dropped),
            run=session.run,
            version=session.version,
        )

    @property
    def evaluates(self) -> bool:
        """Whether the trainer evaluates, and this client's next episode is to be for that (`training_enabled=None`). A
        client with several episodes at once is to say so: `training_enabled=not client.evaluates`."""
        session = self.flow.session
        return session.evaluates and session.evaluation >= 0 and session.window > 0

    def start_episode(
        self, episode_id: str | None = None, training_enabled: bool | None = None, *, explore: bool | None = None
    ) -> Episode:
        """A new episode. `episode_id`: 1 to 64 characters, of no other open episode; None makes one that is unique.

        `training_enabled`: True: it is trained on. False: it is not, and acts as the trainer's evaluation config says;
        while the trainer evaluates, its return counts there. None: as the trainer wants: it is trained on, unless the
        trainer evaluates with a share of the simulators and this is one of them (`Episode.training_enabled` tells). A
        client that was connected for several episodes at once is not meant: they act together, and so all train.
        `explore`: for False alone: draw its actions or (False) take the most likely ones, whatever the trainer says;
        such an episode counts nowhere. Raises EpisodeError, RefusedError."""
        flow = self.flow
        self._check_no_vector()
        if training_enabled is not False and explore is not None:
            raise EpisodeError("explore is for episodes that are not trained on: training_enabled=False")
        flow.look_if_due()
        asked = training_enabled
        if training_enabled is None:
            training_enabled = not self.evaluates or flow.session.episodes > 1
        if episode_id is None:
            self._started += 1
            episode_id = f"{flow.session.session.hex()}-{self._started}"
        if not 1 <= len(episode_id) <= 64:
            raise EpisodeError(f"expected an episode_id of 1 to 64 characters, got {len(episode_id)}")
        if episode_id in flow.builders:
            raise EpisodeError(f"episode '{episode_id}' is open already: end it first, or choose another id")
        if len(flow.builders) >= flow.session.episodes:
            raise EpisodeError(
                f"{len(flow.builders)} episodes are open, and connect() was told episodes={flow.session.episodes}: end "
                f"one first, or connect with the number that is open at once"
            )
        builder = flow.builders[episode_id] = FragmentBuilder(episode_id, sent=training_enabled, explore=explore)
        if not training_enabled and explore is None:
            flow.evaluate(builder)
        return Episode(flow, builder, undecided=asked is None)

    def vector(self, worlds: int) -> Vector:
        """The vector form, for a simulator that steps so many worlds at once: columns in, columns out, all trained on.
        The client must have been connected for as many `episodes`, and has no others meanwhile. Raises EpisodeError."""
        flow = self.flow
        self._check_no_vector()
        if not 1 <= worlds <= flow.session.episodes:
            raise EpisodeError(
                f"expected 1 to {flow.session.episodes} worlds, as connect() was told with episodes=, got {worlds}"
            )
        if flow.builders:
            raise EpisodeError(f"{len(flow.builders)} episodes are open: end them first, or use another client")
        return Vector(flow, worlds)

    def _check_no_vector(self) -> None:
        if any(isinstance(builder, BlockBuilder) for builder in self.flow.builders.values()):
            raise EpisodeError(
                "this client has worlds that are stepped together: abandon() them, or use another client"
            )

    def get_actions(self, episodes: Sequence[Episode], observations: Sequence[Any]) -> Any:
        """`Episode.get_action` for several episodes of this client, in one forward pass.

        `observations`: one for each episode. Returns an array whose row i is what episode i's `env.step` wants.
        """
        flow, reader = self.flow, self.flow.reader
        pairs = self._pairs(episodes, observations, "get_actions")
        if flow.remote is not None:
            pending = self.get_actions_async(episodes, observations)
            try:
                return pending.results()
            except BaseException:
                pending.forget()
                raise
        while True:
            origin = flow.prepare(pairs, "acted", wait=True)
            if flow.asks:
                return self.get_actions(episodes, observations)
            with reader.lock:
                # Another thread may have switched the policy: a fragment has one version's actions only.
                if origin is reader.origin and reader.policy is not None:
                    began = time.perf_counter()
                    rows = np.stack([builder.observe(observation) for builder, observation in pairs])
                    taken = time.perf_counter()
                    drawn = np.array([explores(builder, reader.policy) for builder, _ in pairs])
                    memories = zip(*(builder.state for builder, _ in pairs), strict=True)
                    acted = reader.policy.act(rows, explore=drawn, state=[np.stack(each) for each in memories])
                    chosen = time.perf_counter()
                    break
        logps = acted.action_logp.tolist()
        for i, (builder, _) in enumerate(pairs):
            state = [array[i] for array in acted.state]
            builder.act(acted.actions[i], logps[i], acted.action_dist_inputs[i], state)
        timed = pairs[0][0]  # the whole batch, told once a fragment of its first episode
        if timed.steps == 1:
            done = time.perf_counter()
            timed.timings |= {"observation": taken - began, "inference": chosen - taken, "action": done - chosen}
        flow.credit -= sum(builder.sent or builder.evaluation is not None for builder, _ in pairs)
        return acted.env_actions

    def get_actions_async(self, episodes: Sequence[Episode], observations: Sequence[Any]) -> PendingActions:
        """`Episode.get_action_async` for several episodes of this client, in one request: `results()` of what is
        returned is what `get_actions` returns."""
        if self.flow.remote is None:
            raise EpisodeError('get_actions_async asks the action service: connect(..., inference="remote")')
        return request(self.flow, self.flow.remote, self._pairs(episodes, observations, "get_actions_async"))

    def can_act(self, episodes: Sequence[Episode], observations: Sequence[Any]) -> bool:
        """`Episode.can_act` for several episodes of this client: whether `get_actions` would return at once."""
        return self.flow.prepare(self._pairs(episodes, observations, "can_act"), "acted", wait=False) is not None

    def _pairs(
        self, episodes: Sequence[Episode], observations: Sequence[Any], call: str
    ) -> list[tuple[FragmentBuilder, Any]]:
        if not episodes or len(episodes) != len(observations) or len({e.id for e in episodes}) != len(episodes):
            raise EpisodeError(
                f"{call} expects one or more different episodes and one observation for each, got {len(episodes)} "
                f"episodes and {len(observations)} observations"
            )
        for episode in episodes:
            episode.check_open(call)
            if episode.asks:
                raise EpisodeError(f"{call}: episode '{episode.id}' has asked for an action: take its result() first")
            if episode.builder is not self.flow.builders.get(episode.id):
                raise EpisodeError(f"{call}: episode '{episode.id}' is another client's")
        return [(e.builder, o) for e, o in zip(episodes, observations, strict=True)]

    def close(self, timeout: float = 5.0) -> int:
        """Abandon open episodes, wait up to `timeout` seconds until all that was sent is settled, say BYE.

        Returns how many fragments were not settled: those that have reached the broker may still be trained on.
        """
        flow = self.flow
        if flow.closed:
            return 0
        for builder in list(flow.builders.values()):
            flow.abandon(builder)
        flow.builders.clear()
        settle([self], timeout)
        session = flow.session
        flow.closed, flow.look_at = True, 0.0
        flow.reader.leave()
        if flow.remote is not None:
            flow.remote.close()
        flow.connection.close()
        if flow.audit is not None:
            flow.audit.closed(session.session, sum(not u.message.evaluation for u in session.unsettled.values()))
        if session.unsettled:
            log.warning(
                "closed while %d fragments (%d steps) were on their way",
                len(session.unsettled),
                session.unsettled_steps,
            )
        return len(session.unsettled)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(5.0 if kind is None else 0.5)


def settle(clients: Sequence[Client], timeout: float) -> None:
    """Send what these clients have queued, and wait up to `timeout` seconds until all of it is settled."""
    open_flows = [client.flow for client in clients if not client.flow.closed]
    deadline = time.monotonic() + timeout
    while True:
        for flow in open_flows:
            flow.connection.look()
        open_flows = [f for f in open_flows if f.session.unsettled and f.session.refusal is None]
        left = deadline - time.monotonic()
        if not open_flows or left <= 0:
            return
        poll([flow.connection for flow in open_flows], None, min(left, WAIT_SLICE))
