"""The policy of a process: read once, held once, however many clients of one broker live in it."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterable
from typing import ClassVar, Self, cast

import numpy as np

from rllink_zmq import __version__
from rllink_zmq.errors import PolicyError
from rllink_zmq.fragments import Layout, Origin, Row, StateRow, observed_as
from rllink_zmq.packing import packing_of
from rllink_zmq.packing_actions import action_packing, env_packing
from rllink_zmq.policy import Policy, PolicyManifest, policy_hash
from rllink_zmq.policy_agents import is_crew
from rllink_zmq.session import ReaderSession, SimulatorSession, State
from rllink_zmq.spaces import from_wire
from rllink_zmq.transport import Connection, Subscription, beside
from rllink_zmq.weights import STALLED, Wanted

log = logging.getLogger("rllink_zmq")

SWITCH_INTERVAL = 0.1
"""Seconds between two weights versions that a process acts with. A switch cuts every fragment it is building, and
off-policy training makes a version every few milliseconds: fragments of one step would help nobody. Where a version is
for a whole round of steps there is no such wait."""

READ_INTERVAL = 0.002
"""Seconds between two looks for news, whoever of many clients looks."""

IDLE = 5.0
"""Seconds after which the connection for weights is closed, if there is nothing to fetch."""


def layout_of_policy(manifest: PolicyManifest) -> Layout:
    """The layout of fragments whose actions the policy chose."""
    obs, action = manifest.observation, manifest.action
    packed = None if manifest.packed_action is None else from_wire(manifest.packed_action)
    given = Row(obs.shape, np.dtype(obs.dtype))
    return Layout(
        given if manifest.seen is None else observed_as(from_wire(manifest.seen))[0],
        Row(action.shape, np.dtype(action.dtype)),
        (),
        manifest.action_dist_inputs,
        None if manifest.packed is None else packing_of(from_wire(manifest.packed)),
        tuple(StateRow(state.name, Row(state.shape, np.dtype(state.dtype))) for state in manifest.state),
        tuple(state.start for state in manifest.state),
        manifest.lookback,
        actions=None if packed is None else action_packing(packed),
        env_actions=None if packed is None else env_packing(packed),
        given=None if manifest.seen is None else given,
    )


class PolicyReader:
    """The newest policy and weights of one broker, for all clients of this process.

    `lock` is held while acting: `policy` and `origin` (which weights it acts with) change under it alone. `origin` is
    None while nothing may act, and another object after every switch. `asks_elsewhere`: the policy turned out not to
    run here. Get one with `join`; `leave` it at the end.
    """

    _all: ClassVar[dict[tuple[object, ...], PolicyReader]] = {}
    _all_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, address: str, threads: int = 1, seed: int | None = None) -> None:
        self.address = address
        self.lock = threading.RLock()
        self.policy: Policy | None = None
        self.origin: Origin | None = None
        self.layout: Layout | None = None
        self.asks_elsewhere = False
        self._threads = threads
        self._seed = seed
        self._wanted = Wanted()
        self._subscription: Subscription | None = None
        self._told_address = ""
        self._session = ReaderSession(b"")
        self._connection: Connection | None = None
        self._asked_greeting = 0
        self._idle_from = 0.0
        self._switched = float("-inf")
        self._rounds = False
        self._sampled = ("", 0)
        self._read_at = 0.0
        self._users = 0
        self._loaded = ""

    @classmethod
    def join(cls, address: str, threads: int, seed: int | None) -> Self:
        """The reader that clients with these arguments share in this process."""
        key = (cls, os.getpid(), address, threads, seed)
        with cls._all_lock:
            reader = cls._all.get(key)
            if reader is None:
                reader = cls._all[key] = cls(address, threads, seed)
            reader._users += 1
            return cast(Self, reader)

    def leave(self) -> None:
        """A client is closed. The last one closes the subscription."""
        with self._all_lock, self.lock:
            self._users -= 1
            if self._users > 0:
                return
            for key in [key for key, reader in self._all.items() if reader is self]:
                del self._all[key]
            self.hang_up()
            if self._subscription is not None:
                self._subscription.close()
                self._subscription = None

    def missing(self) -> str:
        """What is being waited for before one can act, in words; '' = nothing."""
        with self.lock:
            return self._wanted.missing() if self.origin is None else ""

    @property
    def subscription(self) -> Subscription | None:
        """What brings news of weights, if it has been told where."""
        return self._subscription

    def behind(self, session: SimulatorSession) -> bool:
        """Whether it acts, and by older weights than `session` has been told of."""
        origin = self.origin
        return origin is not None and origin.run == session.run and origin.version < session.version

    def look(self, session: SimulatorSession, now: float) -> None:
        """Read the news, ask for what is missing, switch to newer weights. `session`: of one of this process's clients,
        for what the broker told it. Raises PolicyError for a policy that can't be loaded."""
        with self.lock:
            wanted = self._wanted
            if session.state is State.LIVE:
                self._rounds = session.rounds
                self._tell(session, now)
                self._subscribe(session.weights_address)
            if now >= self._read_at:
                self._read_at = now + READ_INTERVAL
                if self._subscription is not None:
                    for message, body in self._subscription.read():
                        wanted.news(message, body, now)
                self._fetch(session.state is State.LIVE, now)
            if wanted.blob_hash and wanted.blob_hash != self._loaded:
                self._load()
            self._switch(now)
            session.policy_held = self._loaded
            if session.run == wanted.run:
                # One client's ACK may be older than another's. A new run may begin with fewer.
                self._sampled = max(self._sampled, (session.run, session.sampled))
                for policy in self._acting:
                    policy.advance(self._sampled[1])

    # ---- inside

    @property
    def _acting(self) -> Iterable[Policy]:
        """What acts here."""
        return () if self.policy is None else (self.policy,)

    def _tell(self, session: SimulatorSession, now: float) -> None:
        self._wanted.told(session.run, session.version, session.policy, now)

    def _subscribe(self, told: str) -> None:
        if self._subscription is not None and told == self._told_address:
            return
        self._told_address = told
        address = beside(self.address, told) if told else ""
        if self._subscription is not None and self._subscription.address != address:
            self._subscription.close()
            self._subscription = None
        if self._subscription is None and address:
            self._subscription = Subscription(address)

    def _fetch(self, served: bool, now: float) -> None:
        """Ask for what is wanted, over a connection of its own while there is something: on a client's the questions
        would stand behind megabytes of fragments. `served`: the broker is there."""
        wanted, connection = self._wanted, self._connection
        wants = wanted.wants(now)
        if connection is None:
            if not (wants and served):
                return None
            self._session = ReaderSession(
                os.urandom(16), name=f"{socket.gethostname()}/{os.getpid()}/weights", package=__version__
            )
            self._session.on_message = wanted.answer
            connection = self._connection = Connection(self._session, self.address)
            connection.open()
            self._asked_greeting = 0
        connection.look()
        session = self._session
        if wants:
            self._idle_from = now
        if session.refusal is not None or now - self._idle_from >= IDLE:
            return self.hang_up()
        if session.state is not State.LIVE:
            return None
        moved = wanted.moved
        if session.greeting != self._asked_greeting or (moved is not None and now - moved >= STALLED):
            self._asked_greeting = session.greeting
            wanted.restart(now)
        session.ask(wanted.asks(now), now)
        connection.flush()
        return None

    def hang_up(self) -> None:
        """Close the connection for weights, until somebody wants some."""
        if self._connection is not None:
            self._connection.close(0)
            self._connection = None

    def _load(self) -> None:
        wanted = self._wanted
        if policy_hash(wanted.blob) != wanted.blob_hash:
            log.error("the policy %s came damaged, asking for it again", wanted.blob_hash)
            wanted.blob, wanted.blob_hash = b"", ""
            return
        self.policy, self.origin = None, None
        if is_crew(wanted.blob):
            raise PolicyError(
                "the training at this broker has several agents: a simulator of theirs uses connect_agents(), with the "
                "spaces of each"
            )
        policy = Policy.load(wanted.blob, self._threads, self._seed)
        self.policy, self.layout, self._loaded = policy, layout_of_policy(policy.manifest), wanted.blob_hash

    def _switch(self, now: float) -> None:
        """Act with the newest weights from now on, if it is time for that. What was sampled with the weights of a run
        that has ended would be dropped: nothing acts until the new one's are there."""
        ready, origin = self._wanted.ready, self.origin
        if origin is not None and origin.run < self._wanted.run:
            self.origin = origin = None
        if ready is None or self.policy is None or (origin is not None and ready.version <= origin.version):
            return
        if origin is not None and not self._may_switch(now):
            return
        try:
            self.policy.apply((ready.run, ready.version), ready.data)
        except PolicyError as e:
            log.warning("%s", e)
            self._wanted.reject()
            return
        self.origin = Origin(ready.run, ready.version)
        self._switched = now

    def _may_switch(self, now: float) -> bool:
        return self._rounds or now - self._switched >= SWITCH_INTERVAL
