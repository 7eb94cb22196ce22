"""Every message of the protocol: one frozen, bounded, typed struct each, and their union `Message`.

`docs/protocol.md` says who sends what when. A header is a msgpack map whose `type` names the message. Fields with
a default may be left out. Unknown fields are ignored, so that a newer peer may add some.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal, TypeAlias, Union

import msgspec
from msgspec import Meta, Raw, Struct

PROTOCOL_VERSION = 1

# ---- limits that don't depend on settings (bytes, counts) -----------------------------------------------------
MAX_FRAME_BYTES = 512 * 1024
"""No frame is larger: libzmq's heartbeats can't pass a frame that is on its way (a slow link would look dead)."""
MAX_HEADER_BYTES = MAX_FRAME_BYTES
MAX_FRAMES = 4096
MAX_BODY_BYTES = 1 << 30
MAX_COLUMNS = 512
MAX_SEGMENTS = 4096
"""Pieces of episodes in one fragment: their names at their longest fit into a header."""
MAX_NUMBERS = 65_536
MAX_ROWS = 65_536
"""Observations of one ACT."""
MAX_PLACES = 4096
"""Episodes that one ACT is about, where a service follows them."""
MAX_RUNNERS = 1024
MAX_AGENTS = 255
"""Of an environment: their spaces are a Dict's."""
MAX_AGENTS_STEPS = 65_536
"""Env steps of a fragment of several agents, which may have no rows for them."""
MAX_MODULES = 80
"""Modules that the agents of an environment may be mapped to: each has six columns in a fragment, and its memory."""
MAX_MODULE_ID = 40
"""Characters of a module's id, which is the beginning of its columns' names."""
MAX_COLUMN_NAME = 100
"""Characters. The longest there is: `<module>/state_in/<name>`."""
MOST_WANTED = 1000
"""Runners that a pool may be scaled to: those that leave have to fit into the lists, too."""
MAX_DIMENSIONS = 8
"""Of one value of a space. A column has one more: its rows."""
MAX_BOUNDS = 8192
"""Bounds listed one by one in a Box: those of two spaces fit into a header."""
STATE_IN, STATE_OUT = "state_in/", "state_out/"
"""Before the name of a recurrent policy's state: the columns of its memory before steps, and after them."""
OBS_BEFORE, ACTIONS_BEFORE, REWARDS_BEFORE = BEFORE = ("obs_before", "actions_before", "rewards_before")
STEPS_BEFORE, LOOKBACK = "steps_before", "lookback"
"""Columns of policies that look at earlier observations: the last of them (before a fragment; before each row of an
ACT), how many there are (in each row of an ACT), and how many are wanted (in ACTION)."""
STARTS = "starts"
"""The column of ACT that says which rows are the first of an episode."""
FOLLOWS, LOST = "follows", "lost"
"""Codes of ACTION: the request has to say which episodes it is about; nobody follows this one."""
SEEN, SEEN_REWARD = "seen", "seen_reward"
"""Columns of ACTION where runners follow episodes: the observations as the policy has seen them, and what the runner's
connectors have left of the rewards of the steps before."""
MAX_SPACE_BYTES = 64 * 1024 * 1024
"""One observation or action."""
MAX_PARTS = 256
"""Spaces inside of one, at all its levels."""
MAX_NESTING = 8
"""Dicts and Tuples inside each other."""

Session: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""16 random bytes, fresh at every `connect()` (simulator) or process start (runner, trainer)."""
Name: TypeAlias = Annotated[str, Meta(max_length=128)]
Text: TypeAlias = Annotated[str, Meta(max_length=4096)]
RunId: TypeAlias = Annotated[str, Meta(max_length=64)]
"""Sortable: 12 hex digits of Unix milliseconds, a dash, 8 random hex digits. '' = none."""
Reason: TypeAlias = Annotated[str, Meta(max_length=64, pattern=r"^[a-z_]+\Z")]
Count: TypeAlias = Annotated[int, Meta(ge=0, lt=1 << 53)]
Version: TypeAlias = Annotated[int, Meta(ge=-1, lt=1 << 53)]
"""-1 = none yet."""
Key: TypeAlias = Annotated[str, Meta(min_length=1, max_length=128)]
"""Of a Dict."""
Finite: TypeAlias = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""Neither NaN nor infinity."""
Numbers: TypeAlias = Annotated[list[Count], Meta(max_length=MAX_NUMBERS)]
Address: TypeAlias = Annotated[str, Meta(max_length=256)]
Digest: TypeAlias = Annotated[str, Meta(max_length=64)]
AgentId: TypeAlias = Annotated[int, Meta(ge=-(1 << 53), lt=1 << 53)] | Annotated[str, Meta(min_length=1, max_length=64)]
ModuleId: TypeAlias = Annotated[str, Meta(max_length=MAX_MODULE_ID)]
"""'' = the only one."""
Versions: TypeAlias = Annotated[dict[ModuleId, Version], Meta(max_length=MAX_MODULES)]
"""Of the weights of each of several modules."""

DELIVERED = "delivered"
EVALUATED = "evaluated"
"""The outcome of a fragment that an evaluation has."""
UNWANTED = "unwanted"
"""The outcome of a fragment that no evaluation wants."""
MANY = 1 << 52
"""Episodes of an evaluation: so many as it takes. With more it goes on for as long as training does."""

End: TypeAlias = Literal["no", "terminated", "truncated"]
Duty: TypeAlias = Literal["serve", "park", "leave", "end"]
"""What the trainer wants of a runner: to take fragments; to wait; to say BYE when RLlib has all that it returned; to
return from every call at once, since training is over."""


class _Part(Struct, frozen=True, omit_defaults=True, gc=False):
    """A piece of a message."""


# ---- spaces ---------------------------------------------------------------------------------------------------


class BoxSpace(_Part, tag="Box", tag_field="space", frozen=True):
    """`low` and `high` hold one number for all entries, or one each in C order."""

    shape: Annotated[tuple[Count, ...], Meta(max_length=MAX_DIMENSIONS)]
    dtype: Annotated[str, Meta(max_length=16)]
    low: Annotated[tuple[float, ...], Meta(min_length=1, max_length=MAX_BOUNDS)]
    high: Annotated[tuple[float, ...], Meta(min_length=1, max_length=MAX_BOUNDS)]


class DiscreteSpace(_Part, tag="Discrete", tag_field="space", frozen=True):
    """The integers start .. start + n - 1."""

    n: Annotated[int, Meta(ge=1, lt=1 << 53)]
    start: Annotated[int, Meta(ge=-(1 << 53), lt=1 << 53)] = 0


class MultiDiscreteSpace(_Part, tag="MultiDiscrete", tag_field="space", frozen=True):
    """Integers side by side: the i-th one is of `start[i]` .. `start[i] + nvec[i] - 1`. No `start` = all from 0 on."""

    nvec: Annotated[tuple[Annotated[int, Meta(ge=1, lt=1 << 53)], ...], Meta(min_length=1, max_length=MAX_BOUNDS)]
    start: Annotated[tuple[Annotated[int, Meta(ge=-(1 << 53), lt=1 << 53)], ...], Meta(max_length=MAX_BOUNDS)] = ()


class MultiBinarySpace(_Part, tag="MultiBinary", tag_field="space", frozen=True):
    """An array of zeros and ones."""

    shape: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_DIMENSIONS)]


class DictSpace(_Part, tag="Dict", tag_field="space", frozen=True):
    """Named spaces, in the order of their names' code points."""

    spaces: Annotated[tuple[tuple[Key, Space], ...], Meta(min_length=1, max_length=MAX_PARTS)]


class TupleSpace(_Part, tag="Tuple", tag_field="space", frozen=True):
    """Spaces side by side."""

    spaces: Annotated[tuple[Space, ...], Meta(min_length=1, max_length=MAX_PARTS)]


Space: TypeAlias = BoxSpace | DiscreteSpace | MultiDiscreteSpace | MultiBinarySpace | DictSpace | TupleSpace


class Spaces(_Part, frozen=True):
    """Of one agent. Or of several: then both are Dicts, and `agents` are the agents' ids in the order of their keys,
    which are the ids as text."""

    observation: Space
    action: Space
    agents: Annotated[tuple[AgentId, ...], Meta(max_length=MAX_AGENTS)] = ()


# ---- parts ----------------------------------------------------------------------------------------------------


class Column(_Part, array_like=True, frozen=True):
    """One array of a body: `name`, `dtype` (NumPy's, little endian), `shape`. Bytes follow in the body, C order."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_COLUMN_NAME)]
    dtype: Annotated[str, Meta(max_length=8)]
    shape: Annotated[tuple[Count, ...], Meta(max_length=MAX_DIMENSIONS + 1)]


Columns: TypeAlias = Annotated[tuple[Column, ...], Meta(max_length=MAX_COLUMNS)]


class Segment(_Part, array_like=True, frozen=True):
    """One piece of one episode in a fragment of several: each field as FRAGMENT has it for a single one."""

    episode: Annotated[str, Meta(min_length=1, max_length=64)]
    t0: Count
    steps: Annotated[int, Meta(ge=1, lt=1 << 31)]
    end: End
    return_so_far: Finite
    seconds: Annotated[float, Meta(ge=0, le=sys.float_info.max)]


class AgentRows(_Part, array_like=True, frozen=True):
    """The steps of one agent that a fragment completes, and which module took them. `t0`: the first one's index among
    the agent's own. `end`: whether the agent ended with the last of them. `first`: the version that took the first of
    them, if that was before this fragment; -1 = it is as of the others."""

    agent: AgentId
    module: Annotated[str, Meta(min_length=1, max_length=MAX_MODULE_ID)]
    t0: Count
    steps: Count
    end: End
    return_so_far: Finite
    first: Version = -1


class Place(_Part, array_like=True, frozen=True):
    """Where an observation belongs, for a service that follows the episode: it is the one before the episode's step
    `t`. `reward`: of the step before. `end`: whether the episode has ended with it."""

    episode: Annotated[str, Meta(min_length=1, max_length=64)]
    t: Count
    reward: Finite = 0.0
    end: End = "no"


class Told(_Part, array_like=True, frozen=True):
    """What an env step has brought an agent of an episode that a service follows: its reward since its last
    observation, and whether it has ended; `t`: with which env step, if that was an earlier one, in which nobody was
    given an observation. `module`: by which it acts."""

    agent: AgentId
    module: Annotated[str, Meta(min_length=1, max_length=MAX_MODULE_ID)]
    reward: Finite = 0.0
    end: End = "no"
    t: Version = -1


class Claim(_Part, array_like=True, frozen=True):
    """Some fragments of one simulator session, by number."""

    session: Session
    numbers: Numbers


class Handed(_Part, array_like=True, frozen=True):
    """Fragments of one session that a runner has handed over; `takes[i]` is the TAKE that `numbers[i]` came with."""

    session: Session
    numbers: Numbers
    takes: Numbers


class Dropped(_Part, array_like=True, frozen=True):
    """A taken fragment that RLlib did not get, and why."""

    session: Session
    number: Count
    reason: Reason


class Assigned(_Part, array_like=True, frozen=True):
    """The duty of one runner."""

    session: Session
    duty: Duty


class Present(_Part, array_like=True, frozen=True):
    """A runner that the broker knows. `silent`: seconds since it was last heard."""

    session: Session
    name: Name
    silent: Annotated[float, Meta(ge=0, le=sys.float_info.max)]
    duty: Duty
    connected: bool


Duties: TypeAlias = Annotated[list[Assigned], Meta(max_length=MAX_RUNNERS)]


class SimulatorHello(_Part, tag="simulator", tag_field="role", frozen=True):
    """`base`: every number below it is settled. `steps`: env steps of all settled fragments of this session.
    `episodes`: how many episodes it runs at once. `policy`: hash of the policy it has, '' = none."""

    base: Annotated[int, Meta(ge=1, lt=1 << 53)] = 1
    steps: Count = 0
    episodes: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    spaces: Spaces | None = None
    policy: Digest = ""


class RunnerHello(_Part, tag="runner", tag_field="role", frozen=True):
    """`committed`: the last TAKEN it acted upon. `returned`: RLlib has the hand-overs up to this one. `handed`,
    `dropped`: what it handed over, or could not, and whose `base` has not passed. `evaluation`: it is of the pool that
    evaluates."""

    run: RunId
    committed: Count = 0
    returned: Count = 0
    handed: Annotated[list[Handed], Meta(max_length=65_536)] = []
    dropped: Annotated[list[Dropped], Meta(max_length=65_536)] = []
    evaluation: bool = False


class TrainerHello(_Part, tag="trainer", tag_field="role", frozen=True):
    """`quota`: env steps one learner update consumes. `lag_limit`: the most learner updates a fragment's weights may
    be old. `steps_ahead`: env steps all simulators together may have on their way (0 = no limit). `runners`: how
    many it means to have. `fragment_steps`: the longest fragment wanted. `policy`, `policy_bytes`: the policy it
    offers. `duties`: as in POOL. `evaluation_share`: of the simulators, 0 to 1, that serve evaluations.
    `lease_steps`: env steps leased to one runner and not taken (0 = no limit). `sampled`: env steps that the training
    has sampled before this run, or by now. `needs_logp`: its steps need the log-probabilities of their actions.
    `rounds`: it takes `quota` env steps for each version of the weights, and then learns. `agents`: not 0 = `quota`,
    `steps_ahead` and `fragment_steps` are not of env steps but of agents', of whom there are so many."""

    run: RunId
    quota: Count
    lag_limit: Count
    steps_ahead: Count
    runners: Count
    fragment_steps: Annotated[int, Meta(ge=1, lt=1 << 31)]
    spaces: Spaces
    policy: Digest
    policy_bytes: Annotated[int, Meta(ge=1, lt=1 << 53)]
    duties: Duties = []
    evaluation_share: Annotated[float, Meta(ge=0, le=1)] = 0.0
    lease_steps: Count = 0
    sampled: Count = 0
    needs_logp: bool = True
    rounds: bool = False
    agents: Annotated[int, Meta(ge=0, le=MAX_AGENTS)] = 0


class ObserverHello(_Part, tag="observer", tag_field="role", frozen=True):
    """Only asks: WELCOME tells it the spaces of the first simulator."""


class ReaderHello(_Part, tag="reader", tag_field="role", frozen=True):
    """Asks for policy, weights and single actions, and sends no fragments that its questions would stand behind."""


class ServiceHello(_Part, tag="service", tag_field="role", frozen=True):
    """A runner's second connection: it computes single actions, with weights of `run`."""

    run: RunId


Hello: TypeAlias = SimulatorHello | RunnerHello | TrainerHello | ObserverHello | ReaderHello | ServiceHello


# ---- messages -------------------------------------------------------------------------------------------------


class _Message(Struct, frozen=True, omit_defaults=True, tag_field="type", gc=False):
    """A header."""


class HELLO(_Message, tag="HELLO", frozen=True):
    """any -> broker: (re)start of a conversation. The only message an unknown routing id may send."""

    protocol: Count
    session: Session
    greeting: Annotated[int, Meta(ge=1, lt=1 << 53)]
    peer: Hello
    name: Name = ""
    package: Annotated[str, Meta(max_length=32)] = ""


class WELCOME(_Message, tag="WELCOME", frozen=True):
    """broker -> any: the answer to HELLO `greeting`. A simulator resends all unsettled fragments in order; a runner
    forgets what it has not taken. `window` and `steps_limit` are absolute; 0 as `steps_limit` = no limit. `requests`:
    how many ACTs a reader may have open. `evaluation` and what follows: as in ACK."""

    epoch: Annotated[bytes, Meta(min_length=8, max_length=8)]
    greeting: Count
    fragment_bytes: Count
    window: Count
    steps_limit: Count
    fragment_steps: Count
    run: RunId = ""
    version: Version = -1
    policy: Digest = ""
    weights: Address = ""
    spaces: Spaces | None = None
    text: Text = ""
    requests: Count = 0
    evaluation: Version = -1
    evaluates: bool = False
    modules: Versions = {}
    sampled: Count = 0
    needs_logp: bool = True
    rounds: bool = False
    fresh: bool = False


class REFUSED(_Message, tag="REFUSED", frozen=True):
    """broker -> any. `code` `greet` = send HELLO. `fatal` = don't try again unchanged."""

    code: Reason
    text: Text
    fatal: bool = False
    greeting: Count = 0


class FRAGMENT(_Message, tag="FRAGMENT", frozen=True):
    """simulator -> broker -> runner, header and frames unchanged: env steps `t0` .. `t0 + steps - 1` of an episode.
    `obs` and `state_in/...` have steps + 1 rows, all other columns have steps rows. `return_so_far`: the episode's
    return before step `t0`. `modules`: of an episode of several agents: the version of each module that acts in it;
    `agents`: the steps of theirs that this fragment completes. Columns are `<module>/...` then.
    `seconds`: since the episode began, at the fragment's end. `timings`: seconds of one reset and of one step's acting,
    measured once in the fragment: `reset`, `observation` (taking it in), `inference`, `action` (handing it out).
    `dropped`: cumulative totals of what the simulator dropped itself: reason -> (fragments, steps).
    `evaluation`: it is for an evaluation, and nobody trains on it. `compression`: '' = the body is the columns' bytes;
    "zstd" = one zstd frame of them.
    `segments`: pieces of several episodes, whose rows stand one after the other in the columns; `steps` is their sum,
    `episode` names the stream that they come in, and they say the rest."""

    session: Session
    number: Annotated[int, Meta(ge=1, lt=1 << 53)]
    base: Annotated[int, Meta(ge=1, lt=1 << 53)]
    episode: Annotated[str, Meta(min_length=1, max_length=64)]
    t0: Count
    steps: Annotated[int, Meta(ge=1, lt=1 << 31)]
    end: End
    run: RunId
    version: Count
    return_so_far: Finite
    columns: Columns
    seconds: Annotated[float, Meta(ge=0, le=sys.float_info.max)] = 0.0
    timings: Annotated[dict[Reason, Annotated[float, Meta(ge=0, le=sys.float_info.max)]], Meta(max_length=8)] = {}
    modules: Versions = {}
    agents: Annotated[tuple[AgentRows, ...], Meta(max_length=MAX_AGENTS)] = ()
    dropped: Annotated[dict[Reason, tuple[Count, Count]], Meta(max_length=16)] = {}
    evaluation: bool = False
    compression: Annotated[str, Meta(max_length=16)] = ""
    segments: Annotated[tuple[Segment, ...], Meta(max_length=MAX_SEGMENTS)] = ()


class Relayed(FRAGMENT, tag="FRAGMENT", frozen=True):
    """A FRAGMENT as a broker reads it, which passes its frames on: `columns` are the bytes that came."""

    columns: Raw  # type: ignore[assignment]


class TAKE(_Message, tag="TAKE", frozen=True):
    """runner -> broker: from TAKEN on these fragments are this runner's, for good. `k` rises with every TAKE."""

    k: Count
    claims: Annotated[list[Claim], Meta(max_length=65_536)]
    returned: Count = 0


class TAKEN(_Message, tag="TAKEN", frozen=True):
    """broker -> runner: TAKE `k` is granted but for `refused`. `round_steps`: env steps that all runners took
    since `version`, `taken_steps`: in this run. `simulators`, `runners`: that take part now. `sampled`: as in ACK."""

    k: Count
    refused: Annotated[list[Claim], Meta(max_length=65_536)] = []
    version: Version = -1
    round_steps: Count = 0
    taken_steps: Count = 0
    simulators: Count = 0
    runners: Count = 0
    sampled: Count = 0


class RETURNED(_Message, tag="RETURNED", frozen=True):
    """runner -> broker: RLlib has all hand-overs up to `k`, but for `dropped`."""

    k: Count
    dropped: Annotated[list[Dropped], Meta(max_length=65_536)] = []


class EVALUATE(_Message, tag="EVALUATE", frozen=True):
    """evaluation runner -> broker: `episodes` are to begin, by the weights `version` or newer ones. It ends what was
    wanted before; 0 = no more is wanted."""

    version: Count
    episodes: Count


class ACK(_Message, tag="ACK", frozen=True):
    """broker -> simulator: outcomes, and the limits as they are now (absolute, like WELCOME's). `evaluation`: an
    evaluation wants episodes, of this version of the weights or a newer one; -1 = none does. `evaluates`: this
    simulator's next episode is to be one, unless it knows better. `modules`: the newest version of each of several
    modules; `version` is the newest of all then. `sampled`: env steps that the training has sampled. `needs_logp`: a
    step without its action's log-probability can't be used. `rounds`: new weights are to be acted by at once.
    `fresh`: and older ones than `version` no more."""

    settled: Annotated[list[tuple[Count, Reason]], Meta(max_length=MAX_NUMBERS)]
    window: Count
    steps_limit: Count
    fragment_steps: Count
    run: RunId = ""
    version: Version = -1
    policy: Digest = ""
    evaluation: Version = -1
    evaluates: bool = False
    modules: Versions = {}
    sampled: Count = 0
    needs_logp: bool = True
    rounds: bool = False
    fresh: bool = False


class PING(_Message, tag="PING", frozen=True):
    """any -> broker, only when nothing else was sent for a while."""


class PONG(_Message, tag="PONG", frozen=True):
    """broker -> any: the answer to PING, or a probe. `runners`: that serve. `sampled`: as in ACK. To a trainer
    alone: `runners_wanted`: how many it is to have, `roster`: the runners of its run, and
    `ledger`: "received", "delivered", "in_flight", each reason -> (fragments, steps)."""

    epoch: Annotated[bytes, Meta(min_length=8, max_length=8)]
    run: RunId = ""
    version: Version = -1
    policy: Digest = ""
    taken_steps: Count = 0
    round_steps: Count = 0
    runners_wanted: Count = 0
    simulators: Count = 0
    runners: Count = 0
    roster: Annotated[list[Present], Meta(max_length=MAX_RUNNERS)] = []
    ledger: Annotated[dict[Name, tuple[Count, Count]], Meta(max_length=64)] = {}
    modules: Versions = {}
    sampled: Count = 0


class POOL(_Message, tag="POOL", frozen=True):
    """trainer -> broker: the duty of each of its runners that is not to `serve`. Replaces what it said before."""

    duties: Duties


class DUTY(_Message, tag="DUTY", frozen=True):
    """broker -> runner: its duty from now on. Unless it is `serve`, what was leased to it and not taken is gone."""

    duty: Duty


class OFFER(_Message, tag="OFFER", frozen=True):
    """runner -> broker: this runner holds the weights `version` of `run`, `size` bytes; of `module`, if there are
    several."""

    run: RunId
    version: Count
    size: Count
    module: ModuleId = ""


class GET_STATE(_Message, tag="GET_STATE", frozen=True):
    """broker -> offering runner, or simulator or reader -> broker: send me weights (the newest; `version` = the one a
    transfer has begun with) from byte `offset` on."""

    run: RunId = ""
    version: Version = -1
    offset: Count = 0
    module: ModuleId = ""


class STATE(_Message, tag="STATE", frozen=True):
    """The answer to GET_STATE, and what PUB carries: bytes `offset` .. of `size` bytes of weights, `crc32` of them all.
    On PUB an empty body = announced only, to be pulled. `size` 0 with `version` -1 = there are none yet."""

    run: RunId
    version: Version
    size: Count
    offset: Count = 0
    crc32: Annotated[int, Meta(ge=0, lt=1 << 32)] = 0
    module: ModuleId = ""


class GET_CONFIG(_Message, tag="GET_CONFIG", frozen=True):
    """simulator or reader -> broker, broker -> trainer: send me the exported policy with this hash from `offset` on."""

    policy: Digest
    offset: Count = 0


class CONFIG(_Message, tag="CONFIG", frozen=True):
    """The answer to GET_CONFIG: bytes `offset` .. of the `size` bytes of the policy. `size` 0 = unknown policy."""

    policy: Digest
    size: Count
    offset: Count = 0


class ACT(_Message, tag="ACT", frozen=True):
    """reader -> broker -> service, header and frames unchanged: an action for each of `rows` observations. `request`
    rises in a session. `explore`: draw it, else the most likely one; None = as training does, or `evaluation`.
    `module`: which of several is to act; `agents`: then, the agent of each row, one for each or none.
    `places`: for a service that follows episodes: where each row belongs. Of several agents one, of the env step that
    the request is about, and `told` of all agents that it has brought anything; columns are `<module>/...` then.
    `acts`: actions are wanted, or only what the policy would see. `follower`: which service follows these episodes, as
    its answers have told; none = any may begin to."""

    session: Session
    request: Annotated[int, Meta(ge=1, lt=1 << 53)]
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    columns: Annotated[tuple[Column, ...], Meta(min_length=1, max_length=MAX_COLUMNS)]
    explore: bool | None = None
    evaluation: bool = False
    module: ModuleId = ""
    agents: Annotated[tuple[AgentId, ...], Meta(max_length=MAX_AGENTS)] = ()
    places: Annotated[tuple[Place, ...], Meta(max_length=MAX_PLACES)] = ()
    told: Annotated[tuple[Told, ...], Meta(max_length=MAX_AGENTS)] = ()
    acts: bool = True
    follower: Annotated[bytes, Meta(min_length=0, max_length=16)] = b""


class ACTION(_Message, tag="ACTION", frozen=True):
    """service -> broker -> reader, header and frames unchanged: the answer to `request` of `session`, by the weights
    `version` of `run`. Or why there is none: `code` and `text`. `modules`: the version of each module whose agents
    a request with `told` has rows of: columns are `<module>/...` then, of as many rows as agents.
    `follower`: which service follows these episodes."""

    session: Session
    request: Count
    run: RunId = ""
    version: Version = -1
    columns: Columns = ()
    code: Annotated[str, Meta(max_length=64)] = ""
    text: Text = ""
    modules: Versions = {}
    follower: Annotated[bytes, Meta(min_length=0, max_length=16)] = b""


class BYE(_Message, tag="BYE", frozen=True):
    """any -> broker: an orderly leave. A runner's untaken fragments go to others at once."""

    returned: Count = 0
    dropped: Annotated[list[Dropped], Meta(max_length=65_536)] = []


Message: TypeAlias = (
    HELLO
    | WELCOME
    | REFUSED
    | FRAGMENT
    | TAKE
    | TAKEN
    | RETURNED
    | EVALUATE
    | ACK
    | PING
    | PONG
    | POOL
    | DUTY
    | OFFER
    | GET_STATE
    | STATE
    | GET_CONFIG
    | CONFIG
    | ACT
    | ACTION
    | BYE
)

MESSAGES: tuple[type[Struct], ...] = Message.__args__
"""Every message class, in the order of `docs/protocol.md`."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_relay_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(
    Union[tuple(Relayed if kind is FRAGMENT else kind for kind in MESSAGES)]  # noqa: UP007 - made while it runs
)
_columns_decoder = msgspec.msgpack.Decoder(Columns)


def encode(message: Message) -> bytes:
    """The header frame of a message."""
    return _encoder.encode(message)


def decode(header: bytes | bytearray | memoryview) -> Message:
    """The message of a header frame. Raises `msgspec.DecodeError` (or `UnicodeDecodeError`) alone."""
    return _decoder.decode(header)


def decode_relayed(header: bytes | bytearray | memoryview) -> Message:
    """As `decode`, but a FRAGMENT is a `Relayed`."""
    return _relay_decoder.decode(header)


def decode_columns(columns: bytes | Raw) -> tuple[Column, ...]:
    """The columns of a `Relayed`. Raises as `decode`."""
    return _columns_decoder.decode(columns)
