"""Between episodes and the broker: when a step may be taken, when a fragment is cut, when the socket is looked at.

- The socket is looked at every 5 ms at most: a look costs a tenth of a step, and a fragment sent alone more than one.
  A fragment that ends within 5 ms of the last one, in the middle of an episode, leaves with the next look.
- Room is asked for before a step. Before anything waits all that was built is submitted: it could wait for itself.
- A fragment is of one weights version: it is cut where newer ones are to be used.
- What is evaluated may go beyond the window, by the one fragment that the broker allows. Else a window full of steps
  that wait for training would keep an evaluation from its end, and training may wait for just that.
- Where a runner follows the episode a fragment is cut when what it has made of the observation after the last step is
  known: with the answer to the next request, or to one for just that where there is no room for a next step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from rllink_zmq.arrays import to_buffers
from rllink_zmq.audit import Log
from rllink_zmq.client_followed import PendingSeen
from rllink_zmq.client_policy import SWITCH_INTERVAL, PolicyReader
from rllink_zmq.client_remote import Builder, Pairs, RemotePolicy, forget_looked
from rllink_zmq.compression import compress
from rllink_zmq.errors import ConnectionTimeout, EpisodeError, PolicyError
from rllink_zmq.fragments import Cut, End, FragmentBuilder, Kind, Layout, Origin, layout_of_spaces
from rllink_zmq.fragments_block import BlockBuilder
from rllink_zmq.messages import DELIVERED, EVALUATED, FRAGMENT, Column
from rllink_zmq.session import SimulatorSession, State
from rllink_zmq.spaces import from_wire
from rllink_zmq.transport import Connection, poll

log = logging.getLogger("rllink_zmq")

LOOK_INTERVAL = 0.005
"""Seconds between two looks at the socket while nothing calls for one."""
JUST_LOOKED = 0.001
"""Seconds after a look in which another one hardly finds anything."""
WAIT_SLICE = 0.02
"""Seconds a wait sleeps at most: weights come on sockets that it doesn't watch, but for their news while it rests."""
SAY_FIRST, SAY_EVERY = 4.0, 5.0
"""Seconds until a wait says what it waits for, and says it again."""
UNSENT_STEPS = 256
"""Length of a fragment that is thrown away."""
EVALUATION_STEPS = 32
"""Length of a fragment that is evaluated, at least: nothing bounds those but the window."""
SERVICES_SWITCH = 0.2
"""Seconds in which services come to act by weights that are published."""


def listen(flows: Sequence[Flow], timeout: float) -> list[Connection]:
    """Sleep until something comes for one of these clients of one process, news of weights too if it rests for them; at
    most `timeout` seconds. Returns the connections that have something to read."""
    reader = next((flow.reader for flow in flows if flow.rests), None)
    news = None if reader is None else reader.subscription
    return poll([connection for flow in flows for connection in flow.connections], news, timeout)


class Waiting:
    """Says what a wait that began at `since` waits for: after `SAY_FIRST` seconds, then every `SAY_EVERY`."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._say_at = since + SAY_FIRST

    def say(self, why: Callable[[], str], now: float) -> None:
        if now >= self._say_at:
            self._say_at = now + SAY_EVERY
            log.warning("waiting for %.0f s: %s", now - self._since, why())


class Flow:
    """One client's. `credit`: steps that may be taken until the next look; `look_at`: when that is due. `drops`: where
    there is no room a fragment is built and dropped, rather than waited for. `compresses`: fragments leave as zstd
    frames, where that makes them smaller. `remote`: the service that acts, if it is
    not this process's own policy; `reserved`: steps whose actions it has been asked for; `evaluation_due`: when it acts
    by the weights that are evaluated; `evaluations`: how often this client has been told that one wants episodes, and
    `evaluated_run`: in which run it was last."""

    def __init__(
        self,
        connection: Connection,
        session: SimulatorSession,
        reader: PolicyReader,
        layout: Layout | None,
        audit: Log | None = None,
    ) -> None:
        self.connection = connection
        self.session = session
        self.reader = reader
        self.audit = audit
        self.builders: dict[str, Builder] = {}
        self.drops = False
        self.compresses = False
        self.credit = 0
        self.look_at = 0.0
        self.closed = False
        self.remote: RemotePolicy | None = None
        self.may_ask = False
        self.reserved = 0
        self.evaluation_due = 0.0
        self.evaluations = 0
        self.evaluated_run = ""
        self._room_to_evaluate = 0
        self._evaluation = -1
        self._layout = layout
        self._reads_policy = False
        self._logged: Origin | None = None
        self._logged_at = float("-inf")
        self._sent_at = float("-inf")
        self._step_bytes = 1
        self._notice = ""
        self._reasons: set[str] = set()
        session.on_settled = self._settled

    def open(self, timeout: float | None) -> None:
        """Connect and wait for WELCOME. Raises ConnectionTimeout after `timeout` seconds."""
        self.connection.open()
        session, address = self.session, self.connection.address
        self.wait(
            lambda: session.state is State.LIVE,
            lambda: f"no broker answers at {address}: is `rllink-zmq broker` running there? {session.notice}".rstrip(),
            timeout,
        )
        self.measure()

    @property
    def connections(self) -> list[Connection]:
        """What may bring something that this client waits for."""
        return [self.connection] if self.remote is None else [self.connection, self.remote.connection]

    # ---- before a step

    def prepare(self, pairs: Pairs, kind: Kind, *, wait: bool) -> Origin | None:
        """See to it that each of these episodes has a fragment that takes one more step of `kind`: cut what is full or
        of other weights, wait for policy and room. Returns the fragments' origin; None if it would have to wait and
        `wait` is false. Raises EpisodeError for an observation that doesn't fit, RefusedError."""
        if kind != "acted" and self._looks_back:
            raise EpisodeError(
                "log_action: the policy looks at the steps before (it is recurrent, or stacks frames), and one that it "
                "did not take itself would leave a hole. Let it act (get_action) for whole episodes"
            )
        needed = sum(builder.width for builder, _ in pairs if builder.sent and not builder.dropping)
        looked = self.look_if_due()
        while True:
            origin = self.origin(kind)
            if kind == "given" and origin is not None and self.session.needs_logp:
                raise EpisodeError(
                    "log_action: this training's algorithm corrects for how probable each action was (PPO, APPO, "
                    "IMPALA): give action_logp, the natural logarithm of the probability that you chose it with; or "
                    "train with a replay buffer (DQN, SAC), which needs none"
                )
            for builder, observation in pairs:
                if builder.follows:
                    continue
                if builder.steps and (builder.full or builder.origin is not origin or builder.kind != kind):
                    builder.observe(observation)
                    self.cut(builder, "no")
            if origin is not None and self._step_bytes == 1:
                self._first_size(pairs, kind)
            if origin is not None and self.drops:
                self._drop_or_send(pairs)
                break
            if origin is not None and self._room(needed) and self._may_evaluate(pairs, origin):
                break
            self._submit_all(pairs)
            if not looked and time.monotonic() >= self.look_at - LOOK_INTERVAL + JUST_LOOKED:
                self.look()  # what is waited for may be there already
                looked = True
            elif not wait:
                if not self._leaves(pairs):
                    self._check_window(needed)
                return None
            else:
                self.wait(lambda: self._may_go_on(pairs, kind, needed), lambda: self.why(kind))
        for builder, _ in pairs:
            if not builder.steps:
                if not builder.t0:
                    builder.began = self.connection.clock()
                layout = self.layout_of(kind)
                assert layout is not None  # or there were no origin
                builder.begin(layout, kind, origin, self.length(layout, kind, builder))
                if builder.step_bytes > self._step_bytes:
                    self._step_bytes = builder.step_bytes
                    self.measure()
        return origin

    def _first_size(self, pairs: Pairs, kind: Kind) -> None:
        """How many bytes a step has is known now, before there is a fragment: many at once must not fill the window."""
        layout = self.layout_of(kind)
        if layout is not None and layout.obs.nbytes:
            self._step_bytes = max(builder.bytes_of(layout, kind) for builder, _ in pairs)
            self.measure()

    def _drop_or_send(self, pairs: Pairs) -> None:
        """Never waits: a fragment that begins without room for all of it is one to be dropped, and one that is being
        built and may not grow is sent as it is."""
        fresh = [builder for builder, _ in pairs if builder.sent and not builder.steps]
        growing = sum(b.width for b, _ in pairs if b.sent and not b.dropping and b.steps)
        if growing and not self._room(growing):
            for builder, observation in pairs:
                if builder.steps and not builder.dropping:
                    if builder.follows:
                        self._cut_but_last(builder)
                        builder.dropping = True  # what is left of it, and what comes to it
                        continue
                    builder.observe(observation)
                    self.cut(builder, "no")
                    fresh.append(builder)
        layout, length, most = self.layout_of("acted"), max(1, self.session.fragment_steps), self.session.fragment_bytes
        whole = sum(b.width * (b.clipped(length, layout, "acted", most) if layout else length) for b in fresh)
        room = self._holds(whole)
        for builder in fresh:
            builder.dropping = not room

    def origin(self, kind: Kind) -> Origin | None:
        """Which weights the next fragment is of; None while there are none, or no layout."""
        if kind == "acted" and self.remote is not None:
            if self.remote.origin is None and self.session.run:
                # Until the first answer: nothing is sent under this name.
                self.remote.origin = Origin(self.session.run, max(0, self.session.version))
            return self.remote.origin if self.layout_of(kind) is not None else None
        if kind == "acted":
            if not self._reads_policy:
                self._reads_policy = True
                self.look()
            return None if self.rests else self.reader.origin
        session = self.session
        if not session.run or self.layout_of(kind) is None:
            return None
        told, logged, now = Origin(session.run, max(0, session.version)), self._logged, time.monotonic()
        due = session.rounds or now >= self._logged_at + SWITCH_INTERVAL
        if logged is None or logged.run != told.run or (logged != told and due):
            # Nobody's weights chose these actions: they count as of the version that was the newest.
            self._logged, self._logged_at = told, now
        return self._logged

    @property
    def rests(self) -> bool:
        """Newer weights than this process acts by are there, and steps by older ones are not wanted."""
        return self.session.fresh and self.remote is None and not self.drops and self.reader.behind(self.session)

    @property
    def _looks_back(self) -> bool:
        """Whether the policy is known to have a memory, or to look at earlier observations."""
        layout = self.reader.layout if self.remote is None else self.remote.layout
        return layout is not None and bool(layout.state or layout.looks_back)

    def layout_of(self, kind: Kind) -> Layout | None:
        remote = self.remote
        if kind == "acted" and remote is None:
            return self.reader.layout
        if kind == "acted" and remote is not None and remote.layout is not None:
            return remote.layout
        spaces = self.session.trainer_spaces or (remote.session.spaces if remote is not None else None)
        if self._layout is None and spaces is not None:
            self._layout = layout_of_spaces(from_wire(spaces.observation), from_wire(spaces.action))
        if self._layout is None and remote is not None and self.session.run:
            remote.ask_spaces()
        elif self._layout is None:
            self._reads_policy = True  # its manifest says it
        return self._layout or self.reader.layout

    def length(self, layout: Layout, kind: Kind, builder: Builder) -> int:
        if not builder.sent and builder.evaluation is None:
            return UNSENT_STEPS
        fragment_bytes = self.session.fragment_bytes
        most = layout.most_steps(kind, fragment_bytes)
        if not most:
            raise EpisodeError(
                f"one step takes {layout.last_bytes + layout.step_bytes(kind)} bytes, a fragment may have "
                f"{fragment_bytes}: start the broker with a larger --fragment-bytes"
            )
        if builder.sent:
            return builder.clipped(min(self.session.fragment_steps, most), layout, kind, fragment_bytes)
        # The first step goes alone: with it the episode takes its place in the evaluation.
        return min(max(self.session.fragment_steps, EVALUATION_STEPS), most) if builder.t0 else 1

    # ---- actions of the service

    @property
    def asks(self) -> bool:
        """The service acts: from the beginning, or since the policy turned out not to run here."""
        return self.remote is not None

    def act_remotely(self) -> None:
        """From now on the service computes actions."""
        self.remote = RemotePolicy(self.connection.address, self.session.name)
        self.remote.connection.open()

    # ---- room

    def measure(self) -> None:
        """How many steps may be taken from here on, by all episodes together."""
        session = self.session
        if not session.window:
            self.credit = self._room_to_evaluate = 0
            return
        steps = size = 0
        for builder in self.builders.values():
            if builder.sent and not builder.dropping:
                steps += builder.steps
                size += builder.nbytes
            elif builder.evaluation is not None:
                size += builder.nbytes
        left = session.window - session.unsettled_bytes - size
        credit = left // self._step_bytes + 1
        # Each may begin a fragment with its step, which has one more observation.
        self._room_to_evaluate = (left + session.fragment_bytes) // (2 * self._step_bytes)
        if session.steps_limit:
            credit = min(credit, session.steps_limit - session.settled_steps - session.unsettled_steps - steps)
        self.credit = credit - self.reserved

    def _room(self, needed: int) -> bool:
        if not needed:
            return True
        if self.credit < needed:
            self.measure()
        return self.credit >= needed

    def _may_go_on(self, pairs: Pairs, kind: Kind, needed: int) -> bool:
        origin = self.origin(kind)
        if origin is not None and self._room(needed) and self._may_evaluate(pairs, origin):
            return True
        if self._leaves(pairs):
            return self._room(needed)
        self._check_window(needed)
        return False

    def _check_window(self, needed: int) -> None:
        """Raises EpisodeError if waiting is useless: all is settled, and the window is too small even so."""
        session = self.session
        if not needed or not session.window or session.unsettled:
            return
        held = sum(builder.nbytes for builder in self.builders.values() if builder.sent and not builder.dropping)
        if (session.window - held) // self._step_bytes + 1 < needed:
            episodes = sum(builder.width for builder in self.builders.values())
            raise EpisodeError(
                f"{episodes} episodes need {held + needed * self._step_bytes} bytes for a step each, this "
                f"client's window has {session.window}: use more clients with fewer episodes, or start the broker "
                f"with a larger --fragment-bytes"
            )

    # ---- evaluation

    def evaluate(self, builder: Builder) -> None:
        """This episode, which begins now, is to be sent to the evaluation that is going on, if one is."""
        builder.evaluation = self._evaluated()

    def _evaluated(self) -> Origin | None:
        """Which weights are evaluated, if any are."""
        session = self.session
        return Origin(session.run, session.evaluation) if session.evaluation >= 0 and session.window else None

    def counts_as(self, origin: Origin) -> int:
        """The version as which these weights count where an episode for evaluation begins with them."""
        return origin.version

    def _may_evaluate(self, pairs: Pairs, origin: Origin) -> bool:
        """Whether those of `pairs` that are evaluated may go on: there are their weights, and room for their steps."""
        evaluated = [builder for builder, _ in pairs if builder.evaluation is not None]
        if not evaluated:
            return True
        for builder in evaluated:
            if builder.t0 or builder.steps:
                continue
            wanted = builder.evaluation = self._evaluated()  # it may be over by now, or another one have begun
            if wanted is None:
                continue
            if (
                (origin.run, self.counts_as(origin)) < wanted
                if self.remote is None
                else time.monotonic() < self.evaluation_due
            ):
                return False
        self.measure()
        if self._room_to_evaluate >= len(evaluated):
            return True
        mine = {id(builder) for builder in evaluated}
        leave = any(  # what `_submit_all` sends
            builder.steps > (builder.follows or (id(builder) not in mine and not builder.asked))
            for builder in self.builders.values()
            if builder.evaluation is not None
        )
        if leave or self.session.unsettled:
            return False
        for builder in evaluated:
            builder.evaluation = None  # waiting would be useless: other episodes of this client fill the window
        return True

    # ---- sending

    def cut(self, builder: Builder, end: End) -> None:
        """Submit all steps of a fragment; the observation after the last has been given to the builder."""
        for cut in builder.cuts(self.session.fragment_bytes):
            self._submit(builder, cut, end)

    def _submit_all(self, pairs: Pairs) -> None:
        for builder, observation in pairs:
            if builder.steps:
                builder.observe(observation)
                if not builder.follows:
                    self.cut(builder, "no")
        self._leaves(pairs)
        mine = {id(builder) for builder, _ in pairs}
        for builder in self.builders.values():
            if id(builder) in mine:
                continue
            if builder.asked and builder.steps and not builder.follows:
                self.cut(builder, "no")
            # What the others' last steps led to isn't known here: those stay.
            elif not builder.asked or builder.follows:
                self._cut_but_last(builder)
        self.connection.flush()

    def _cut_but_last(self, builder: Builder) -> None:
        cut = builder.cut_before_last()
        if cut is not None:
            self._submit(builder, cut, "no")

    # ---- episodes that a runner follows

    def _leaves(self, pairs: Pairs) -> bool:
        """Have the fragments of those episodes that a runner follows leave, though there is no room for another step;
        whether some of them can't yet. Their newest observations have been given."""
        waits = False
        mine = {id(builder) for builder, _ in pairs}
        for builder in list(self.builders.values()):
            if isinstance(builder, BlockBuilder) or not (builder.follows and builder.steps):
                continue
            if id(builder) in mine:
                looked = builder.looked
                if looked is None or not looked.of_now:
                    forget_looked(builder)
                    looked = builder.looked = self.look_through(builder)
                if looked.done():
                    builder.looked = None
                    looked.take()
                    self.cut(builder, "no")
                else:
                    waits = True
            elif builder.asks is not None and builder.asks.shown(builder):
                self.cut(builder, "no")
            elif builder.asks is not None:
                waits = True
        return waits

    def judge(self, builder: FragmentBuilder, layout: Layout) -> None:
        """Whether the fragment that begins now, of an episode that a runner follows, is to be dropped: it never
        waits."""
        if self.drops and builder.sent:
            builder.dropping = not self._holds(builder.clipped(max(1, self.session.fragment_steps), layout, "acted", 0))

    def _holds(self, steps: int) -> bool:
        """Whether there is room for so many steps, or for a fragment that nothing stands before."""
        return bool(self.session.window) and (self._room(steps) or (not self.session.unsettled and self.credit > 0))

    def look_through(self, builder: FragmentBuilder, end: End = "no") -> PendingSeen:
        """Ask what the runner that follows this episode makes of its newest observation."""
        assert self.remote is not None
        return PendingSeen(self.remote, builder, end)

    def _submit(self, builder: Builder, cut: Cut, end: End) -> None:
        self.credit = 0  # a fragment takes more than its steps: to be measured before the next one
        if builder.evaluation is not None:
            self._submit_evaluated(builder, cut, end)
        if not builder.sent:
            return
        if builder.dropping:
            self._count_dropped("backpressure", cut.steps)
            return
        number, now = self._send(builder, cut, end, *to_buffers(cut.arrays))
        if self.audit is not None:
            self.audit.sent(self.session.session, number, cut.learned, cut.origin.run, cut.origin.version)
        if now >= self._sent_at + LOOK_INTERVAL:
            # Else the next look sends it, with others: waking libzmq's thread costs more than the message.
            self._sent_at = now
            self.connection.flush()

    def _submit_evaluated(self, builder: Builder, cut: Cut, end: End) -> None:
        columns, body = to_buffers(cut.arrays)
        session = self.session
        if self.drops and session.unsettled_bytes + sum(map(len, body)) > session.window + session.fragment_bytes:
            builder.evaluation = None  # it can't wait, and an evaluation wants whole episodes
            return
        _, now = self._send(builder, cut, end, columns, body, evaluation=True)
        if not cut.t0 or end != "no" or now >= self._sent_at + LOOK_INTERVAL:
            self._sent_at = now
            self.connection.flush()

    def _send(
        self,
        builder: Builder,
        cut: Cut,
        end: End,
        columns: tuple[Column, ...],
        body: list[memoryview],
        *,
        evaluation: bool = False,
    ) -> tuple[int, float]:
        """Queue a fragment: its number, and the time."""
        packed = compress(body) if self.compresses else None
        now = self.connection.clock()
        number = self.session.submit(
            episode=builder.episode,
            t0=cut.t0,
            steps=cut.steps,
            end=end,
            run=cut.origin.run,
            version=cut.origin.version,
            return_so_far=cut.return_so_far,
            columns=columns,
            body=body if packed is None else [packed],
            now=now,
            seconds=0.0 if cut.segments else now - builder.began,
            timings=builder.timings,
            evaluation=evaluation,
            compression="" if packed is None else "zstd",
            segments=cut.segments,
            modules=cut.modules,
            agents=cut.agents,
        )
        builder.timings = {}
        return number, now

    def abandon(self, builder: Builder) -> None:
        """Forget a fragment. The totals of what is never sent travel with the fragments that are."""
        if builder.sent and builder.steps:
            self._count_dropped("backpressure" if builder.dropping else "abandoned", builder.steps)
        builder.steps = 0

    def _count_dropped(self, reason: str, steps: int) -> None:
        fragments, before = self.session.dropped.get(reason, (0, 0))
        self.session.dropped = {**self.session.dropped, reason: (fragments + 1, before + steps)}
        if reason == "backpressure" and not fragments:
            log.warning("there is no room for more steps, fragments are dropped; more are only counted")

    # ---- looking and waiting

    def look_if_due(self) -> bool:
        """Look if the last one is 5 ms ago. Raises RefusedError."""
        if time.monotonic() < self.look_at:
            return False
        self.look()
        return True

    def look(self) -> None:
        """Read what has come, send what is due. Raises RefusedError."""
        if self.closed:
            raise EpisodeError("this client is closed: connect() again")
        self.connection.look()
        if self.remote is not None:
            self.remote.look()
        session, now = self.session, time.monotonic()
        if session.refusal is not None:
            self.look_at = 0.0
            raise session.refusal
        if session.notice != self._notice:
            self._notice = session.notice
            if self._notice:
                log.warning("the broker at %s says: %s", self.connection.address, self._notice)
        if session.evaluation != self._evaluation:
            self._evaluation, self.evaluation_due = session.evaluation, now + SERVICES_SWITCH
            if session.evaluation >= 0:
                self.evaluations += 1
                self.evaluated_run = session.run
        if self._reads_policy and self.remote is None:
            self._read_policy(now)
        self.look_at = now + LOOK_INTERVAL
        self.measure()

    def _read_policy(self, now: float) -> None:
        try:
            self.reader.look(self.session, now)
        except (PolicyError, ImportError) as e:
            if not self.may_ask:
                raise
            if not self.reader.asks_elsewhere:
                self.reader.asks_elsewhere = True  # said once a process
                log.warning("the policy can't run here, runners are asked for actions: %s", e)
            self.reader.hang_up()
            self.act_remotely()

    def wait(
        self,
        done: Callable[[], bool],
        why: Callable[[], str],
        timeout: float | None = None,
        at: Connection | None = None,
    ) -> None:
        """Look until `done()`, and say `why()` in the log every few seconds; `at`: with an ear at this connection, at
        which `done` looks itself. Raises ConnectionTimeout, RefusedError."""
        started = time.monotonic()
        waiting = Waiting(started)
        while not done():
            now = time.monotonic()
            if timeout is not None and now - started >= timeout:
                raise ConnectionTimeout(f"gave up after {timeout:g} s: {why()}")
            waiting.say(why, now)
            if at is None and self.rests:
                listen([self], WAIT_SLICE)
            else:
                (at or self.connection).wait(WAIT_SLICE)
            if at is None:
                self.look()

    def why(self, kind: Kind) -> str:
        """Why `prepare` would wait, in words."""
        session, address = self.session, self.connection.address
        if session.state is not State.LIVE:
            return f"the connection is lost, trying again to reach {address}. {session.notice}".rstrip()
        if kind == "acted" and self.rests:
            return f"the weights of version {session.version} are on their way"
        if self.origin(kind) is None and self.remote is not None:
            return "no trainer has begun a run at the broker yet"
        if self.origin(kind) is None:
            missing = self.reader.missing() if self._reads_policy else ""
            return missing or "no trainer has begun a run at the broker yet"
        if not session.window:
            return f"the broker at {address} has no window for this simulator. {session.notice}".rstrip()
        if session.outcomes:
            steps = session.unsettled_steps
            return f"{steps} steps are on their way, the trainer takes no more for now: it is learning, or has ended"
        return f"{session.unsettled_steps} steps are on their way and none was taken yet: is a trainer running?"

    def _settled(self, message: FRAGMENT, outcome: str) -> None:
        if message.evaluation:
            builder = self.builders.get(message.episode)
            if outcome != EVALUATED and builder is not None:
                builder.evaluation = None  # nobody wants the rest
            return
        if self.audit is not None:
            self.audit.settled(message.session, message.number, outcome)
        if outcome != DELIVERED and outcome not in self._reasons:
            self._reasons.add(outcome)
            log.warning("a fragment was dropped (%s); more of this reason are only counted", outcome)
