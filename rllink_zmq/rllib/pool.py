"""The pool of runners: as many as somebody asked for, and none that hangs.

RLlib's own group of env runners stays the one list of them. Its dictionaries are not made for two threads, so only
RLlib's main thread adds to it and removes from it, between its training steps (`sweep`). What takes long happens in a
thread: starting actors, having them join, waiting until a leaving one has said BYE, killing one that is stuck.

- **More**: new actors with an index of their own, outside Tune's placement group and spread over the nodes, get what
  RLlib gives its first ones (weights, APPO's state server). They join the broker in the moment in which RLlib gets
  them: what a runner is leased while nobody calls its `sample()` grows old there.
- **Fewer**: those that are gone and not back yet leave, then the newest. The broker gives what was leased to them to
  others; they say BYE when RLlib has what they returned; then they are removed and killed.
- **None**: one stays, parked. RLlib falls back to its local runner when a group is empty, and with APPO an empty answer
  of that one ends the training.
- **Dead**: Ray knows within milliseconds that an actor's process has ended, RLlib within seconds, and the broker only
  that a connection is lost. So Ray is asked, and the broker told: what that runner had taken is not waited for.
- **Stuck**: RLlib never notices a runner that is stopped, and waits for it. One that the broker hasn't heard for
  `runner_timeout_s` is killed; RLlib starts it again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from rllink_zmq.messages import Duty, Present

if TYPE_CHECKING:
    from rllink_zmq.rllib.trainer import Trainer

logger = logging.getLogger("rllink_zmq")

LOOK_EVERY = 0.25
SAY_EVERY = 10.0
ABSENT = 20.0
"""Seconds that a runner may be unknown to a broker that is there before it counts as stuck."""
BACK_WITHIN = 60.0
"""Seconds in which a runner that RLlib knows to be gone is to be there again: on a busy host it starts slowly."""
JOIN_WITHIN = 10.0
ASK_AT_ONCE = 8
"""Runners that Ray is asked about at each look; asking costs it 0.7 ms each."""
MOURN = 60.0
"""Seconds for which the broker is told of a process that has ended."""
STOP_WITHIN = 5.0
"""Seconds that runners have to answer when the training ends."""


@dataclass
class Member:
    """One runner. `handle`: of its actor; None: it is in this process. `id`: RLlib's, None while it is being started.
    `session`: at the broker, b'' until it has joined. `restarts`: how often Ray had restarted the actor when it joined.
    `gone_at`: since when RLlib has known that it is gone. `seen`: the epoch of the broker in whose roster it was last.
    """

    handle: ActorHandle
    index: int
    id: int | None = None
    session: bytes = b""
    restarts: int = 0
    seen: bytes = b""
    duty: Duty = "serve"
    since: float = field(default_factory=time.monotonic)
    gone_at: float | None = None

    def joined(self, session: bytes) -> None:
        self.session, self.since = session, time.monotonic()
        self.restarts = known(self.handle)[1]


@dataclass
class Starting:
    """An actor on its way into the group, until `pending` is there."""

    member: Member
    pending: ray.ObjectRef
    began: float = field(default_factory=time.monotonic)


def known(handle: ActorHandle) -> tuple[str, int]:
    """An actor's state ("ALIVE", "RESTARTING", "DEAD" and others) and how often Ray has restarted it, as Ray's control
    store has it. What is public of this (`ray.util.state`) needs Ray's dashboard."""
    found = ray._private.state.actors(handle._actor_id.hex())
    return found.get("State", ""), int(found.get("NumRestarts", 0))


class Pool:
    """The runners of one Algorithm. Everything but `sweep` and `adopt` may be called from any thread."""

    def __init__(self, trainer: Trainer, group: EnvRunnerGroup, timeout: float, target: int = -1) -> None:
        self.target = target if target >= 0 else group.num_remote_env_runners()
        self._trainer = trainer
        self._group = group
        self._timeout = timeout
        self._lock = threading.RLock()
        self._members: list[Member] = []
        self._starting: list[Starting] = []
        self._ready: list[Member] = []
        self._highest = 0
        self._said = float("-inf")
        self._told: dict[bytes, Duty] = {}
        self._dead: dict[bytes, float] = {}
        self._asked = 0
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rllink-pool", daemon=True)

    def start(self) -> None:
        self._thread.start()

    # ---- RLlib's main thread

    def adopt(self, sessions: dict[int, bytes]) -> None:
        """These runners of the group (RLlib's id -> session) have joined the broker, at first or after a restart."""
        manager = self._group._worker_manager
        with self._lock:
            known = {m.id: m for m in self._members}
            for id_, session in sessions.items():
                member = known.get(id_)
                if member is None:
                    member = Member(manager.actors()[id_], id_, id_)
                    self._highest = max(self._highest, id_)
                    self._members.append(member)
                member.joined(session)

    def sweep(self) -> None:
        """Put new runners into RLlib's group, and take out those that have left."""
        manager = self._group._worker_manager
        with self._lock:
            ready, self._ready = self._ready, []
            added = [member for member in ready if self._join(member)]
            for member in added:
                manager.add_actors([member.handle])
                member.id = max(manager.actors())
                self._members.append(member)
            if any(m.duty == "leave" for m in self._members):
                self._trainer.take_over()
            gone = [m for m in self._members if m.duty == "leave" and self._has_left(m) and m.id in manager.actors()]
            for member in gone:
                self._members.remove(member)
                manager.remove_actor(member.id)
                self._kill(member, no_restart=True)
        if added or gone:
            logger.info("%d runners joined and %d left, %d are wanted", len(added), len(gone), self.target)

    def _has_left(self, member: Member) -> bool:
        """It has said BYE: the broker knew it, and does no longer. A broker that was restarted meanwhile may not have
        heard it yet, and what it has to report must not die with it."""
        session = self._trainer.session
        if not member.session:
            return True  # it died, and was started again
        if session.roster_at <= member.since or any(p.session == member.session for p in session.roster):
            return False
        return member.seen == session.roster_epoch or time.monotonic() - session.live_since > ABSENT

    def _join(self, member: Member) -> bool:
        try:
            member.joined(ray.get(member.handle.apply.remote(self._trainer.joining()), timeout=JOIN_WITHIN))
        except (RayError, TimeoutError) as e:
            logger.warning("runner %d could not join: %s", member.index, str(e).partition("\n")[0])
            self._kill(member, no_restart=True)
            return False
        return True

    def end(self, others: Iterable[Member] = ()) -> None:
        """The training ends: no call waits any longer, and who doesn't answer is killed, of `others`, too."""
        self._ending.set()
        with self._lock:
            members = [*self._members, *self._ready, *(s.member for s in self._starting), *others]
            self._members, self._ready, self._starting = [], [], []
        self._trainer.assign(dict.fromkeys((m.session for m in members if m.session), "end"))
        threading.Thread(target=_see_to_the_end, args=(members,), name="rllink-end", daemon=True).start()

    # ---- the thread

    def _run(self) -> None:
        while not self._ending.is_set():
            self._ending.wait(LOOK_EVERY)
            try:
                ended = self._ended()
                with self._lock:
                    if not self._ending.is_set():
                        self._dead.update((session, time.monotonic()) for session in ended)
                        self._reconcile()
            except RayError as e:
                logger.warning("the pool of runners: %s", str(e).splitlines()[0])

    def _reconcile(self) -> None:
        session = self._trainer.session
        wanted = session.runners_wanted
        if wanted is not None and wanted != self.target:
            logger.info("%d runners are wanted, there are %d", wanted, len(self._serving()))
            self.target = wanted
            self._trainer.change_runners(wanted)
        present = {p.session for p in session.roster}
        for member in self._members:
            if member.session in present:
                member.seen = session.roster_epoch
        self._advance()
        self._fit()
        self._watch(session.roster, session.roster_at, session.live_since)
        self._dead = {s: at for s, at in self._dead.items() if time.monotonic() - at < MOURN}
        duties: dict[bytes, Duty] = {m.session: m.duty for m in self._members if m.session and m.duty != "serve"}
        duties.update((session, "end") for session in self._dead)
        if duties != self._told:
            self._told = duties
            self._trainer.assign(duties)

    def _ended(self) -> list[bytes]:
        """Sessions whose process has ended, of some members, the next time of others. Ray is asked without the lock:
        it may be slow to answer."""
        with self._lock:
            living = [m for m in self._members if m.session and m.session not in self._dead]
            first = self._asked % max(1, len(living))
            asked = [(m.session, m.handle, m.restarts) for m in (living[first:] + living[:first])[:ASK_AT_ONCE]]
            self._asked += len(asked)
        ended = []
        for session, handle, before in asked:
            state, restarts = known(handle)
            if state == "DEAD" or restarts > before:
                ended.append(session)
        return ended

    def _serving(self) -> list[Member]:
        return [m for m in self._members if m.duty == "serve"]

    def _fit(self) -> None:
        """Start what is missing, send away what is too much."""
        members = self._members
        coming = len(self._starting) + len(self._ready)
        serving = self._serving()
        for member in [m for m in members if m.duty == "park"][: max(0, self.target - len(serving) - coming)]:
            member.duty, member.since = "serve", time.monotonic()
            serving.append(member)
        for _ in range(self.target - len(serving) - coming):
            self._begin()
        surplus = len(serving) + coming - self.target
        while surplus > 0 and self._starting:
            self._kill(self._starting.pop().member, no_restart=True)
            surplus -= 1
        while surplus > 0 and self._ready:
            self._kill(self._ready.pop(), no_restart=True)
            surplus -= 1
        order = sorted(serving, key=lambda m: (self._is_gone(m), m.index), reverse=True)
        for member in order[: max(0, surplus)]:
            last = self.target == 0 and member is order[-1]
            member.duty, member.since = ("park" if last else "leave"), time.monotonic()

    def _is_gone(self, member: Member) -> bool:
        return member.gone_at is not None or member.session in self._dead

    def _begin(self) -> None:
        """A new actor, as RLlib makes its own, but with an index of its own and outside any placement group."""
        group = self._group
        self._highest += 1
        handle = (
            ray.remote(**group._remote_args)(group.env_runner_cls)
            .options(placement_group=None, scheduling_strategy="SPREAD")
            .remote(
                config=group._remote_config_obj_ref,
                worker_index=self._highest,
                num_workers=max(1, self.target),
                tune_trial_id=group._tune_trial_id,
            )
        )
        self._starting.append(Starting(Member(handle, self._highest), handle.assert_healthy.remote()))

    def _advance(self) -> None:
        """Go on with the actors that are being started."""
        now = time.monotonic()
        starting, self._starting = self._starting, []
        for one in starting:
            if not ray.wait([one.pending], timeout=0)[0]:
                self._starting.append(one)
                continue
            try:
                ray.get(one.pending)
                self._ready.append(one.member)
            except RayError as e:
                logger.warning("runner %d could not be started: %s", one.member.index, str(e).splitlines()[0])
                self._kill(one.member, no_restart=True)
        slow = [one for one in self._starting if now - one.began >= SAY_EVERY]
        if slow and now - self._said >= SAY_EVERY:
            self._said = now
            logger.warning(
                "%d runners have been starting for up to %.0f s%s", len(slow), now - slow[0].began, self._lacking()
            )

    def _waits_for_a_place(self, member: Member, now: float) -> bool:
        """Whether Ray has not found one for it yet, since its node went."""
        if known(member.handle)[0] == "ALIVE":
            return False
        if now - self._said >= SAY_EVERY:
            self._said = now
            logger.warning("runner %d waits to be started again%s", member.index, self._lacking())
        return True

    def _lacking(self) -> str:
        """What the cluster has too little of for one more runner, in words."""
        needs = {"CPU": "num_cpus", "GPU": "num_gpus"}
        free = ray.available_resources()
        short = [
            f"{self._group._remote_args[name]:g} {kind}s, and {free.get(kind, 0.0):g} are free outside placement groups"
            for kind, name in needs.items()
            if (self._group._remote_args.get(name) or 0) > free.get(kind, 0.0)
        ]
        return f": it needs {', '.join(short)}" if short else ""

    # ---- the watch

    def _watch(self, roster: list[Present], at: float, live_since: float) -> None:
        """Kill what hangs. Silence is judged by a broker that is there, and has been for long enough."""
        now = time.monotonic()
        if now - at > 3.0 or now - live_since < self._timeout:
            return
        known = {p.session: p for p in roster}
        for member in [m for m in self._members if m.session]:
            if self._comes_back(member, now):
                continue
            there = known.get(member.session)
            if now - member.since < self._timeout:
                continue
            if there is not None and there.silent > self._timeout:
                why = f"the broker has not heard it for {there.silent:.0f} s"
            elif there is None and member.duty != "leave" and now - member.since > ABSENT:
                if self._waits_for_a_place(member, now):
                    continue
                why = "the broker doesn't know it any longer"
            else:
                continue
            logger.warning("runner %d is stuck (%s): it is killed, and RLlib starts it again", member.index, why)
            member.session, member.since, member.gone_at = b"", now, now
            self._kill(member, no_restart=False)

    def _comes_back(self, member: Member, now: float) -> bool:
        """Whether RLlib knows that it is gone, and Ray is starting it again: killing it would only begin that anew."""
        states = self._group._worker_manager
        if member.id is None or member.id not in states.actors() or states.is_actor_healthy(member.id):
            if member.gone_at is not None:
                member.gone_at, member.since = None, now
            return False
        member.gone_at = member.gone_at or now
        return now - member.gone_at < BACK_WITHIN

    @staticmethod
    def _kill(member: Member, *, no_restart: bool) -> None:
        try:
            ray.kill(member.handle, no_restart=no_restart)
        except (RayError, ValueError) as e:
            logger.debug("runner %d: %s", member.index, e)


def _see_to_the_end(members: list[Member]) -> None:
    """Kill runners that don't answer: RLlib waits for their `stop()` without a limit."""
    try:
        calls = {m.handle.ping.remote(): m for m in members if m.handle is not None}
        _, silent = ray.wait(list(calls), num_returns=len(calls), timeout=STOP_WITHIN) if calls else ([], [])
        for call in silent:
            logger.warning("runner %d does not answer: it is killed", calls[call].index)
            Pool._kill(calls[call], no_restart=True)
    except (RayError, RuntimeError, ValueError) as e:  # Ray was shut down meanwhile: then nothing is left to kill
        logger.debug("the end of the runners: %s", e)
