"""`tests/golden/frames.json`: every message as it is on the wire, in hex, with its meaning.

For those who write a client in another language: encode the `header` of an entry with your own msgpack and compare,
decode its `frames` and compare. `python tests/test_golden.py` prints the file anew after a deliberate change.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest

from rllink_zmq import wire
from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.compression import arrays_of
from rllink_zmq.messages import (
    ACK,
    ACT,
    ACTION,
    BYE,
    CONFIG,
    DUTY,
    EVALUATE,
    FRAGMENT,
    GET_CONFIG,
    GET_STATE,
    HELLO,
    MESSAGES,
    OFFER,
    PING,
    PONG,
    POOL,
    REFUSED,
    RETURNED,
    STATE,
    TAKE,
    TAKEN,
    WELCOME,
    AgentRows,
    Assigned,
    BoxSpace,
    Claim,
    Column,
    DictSpace,
    DiscreteSpace,
    Dropped,
    Handed,
    Message,
    ObserverHello,
    Place,
    Present,
    ReaderHello,
    RunnerHello,
    Segment,
    ServiceHello,
    SimulatorHello,
    Spaces,
    Told,
    TrainerHello,
)

RUNNER = bytes.fromhex("52" * 16)
FILE = Path(__file__).parent / "golden" / "frames.json"

SIM, RUNNER, TRAINER, OBSERVER, READER, SERVICE = (bytes([n]) * 16 for n in (0x51, 0x52, 0x54, 0x4F, 0x44, 0x56))
EPOCH = bytes(range(8))
RUN = "0198a2b3c4d5-0badcafe"
POLICY = "00112233445566778899aabbccddeeff"
INF = float("inf")

CARTPOLE = Spaces(BoxSpace((4,), "<f4", (-4.8, -INF, -0.42, -INF), (4.8, INF, 0.42, INF)), DiscreteSpace(2))
PENDULUM = Spaces(BoxSpace((3,), "<f4", (-1.0, -1.0, -8.0), (1.0, 1.0, 8.0)), BoxSpace((1,), "<f4", (-2.0,), (2.0,)))
CUBES = Spaces(BoxSpace((3,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(4, 1))

TWO_STEPS = {
    "obs": np.arange(12, dtype="<f4").reshape(3, 4) / 8,
    "actions": np.array([1, 0], "<i8"),
    "rewards": np.array([1.0, 1.0], "<f4"),
    "action_logp": np.array([-0.75, -0.5], "<f4"),
}
TWO_EPISODES = {
    "obs": np.arange(20, dtype="<f4").reshape(5, 4) / 8,
    "actions": np.array([1, 0, 1], "<i8"),
    "rewards": np.array([1.0, 1.0, 1.0], "<f4"),
    "action_logp": np.array([-0.75, -0.5, -0.25], "<f4"),
}
LAST_STEP = {
    "obs": np.array([[0.5, -0.5, 2.0], [0.25, 0.0, -1.0]], "<f4"),
    "actions": np.array([[1.5]], "<f4"),
    "rewards": np.array([-0.125], "<f4"),
    "action_logp": np.array([-1.25], "<f4"),
    "action_dist_inputs": np.array([[1.0, -0.5]], "<f4"),
}
TWO_IMAGES = {
    "obs": np.zeros((3, 8, 8, 1), "|u1"),
    "actions": np.array([1, 0], "<i8"),
    "rewards": np.array([0.0, 1.0], "<f4"),
    "action_logp": np.array([-0.75, -0.5], "<f4"),
}
TWO_IMAGES["obs"][1, 2, 3] = TWO_IMAGES["obs"][2, 2, 4] = 255
ZSTD_FRAME = bytes.fromhex("28b52ffd20e0e50000900000ff00ff000100803f000040bf000000bf04500200748892a301")
"""The columns of TWO_IMAGES, 224 bytes. Another version of zstd may write other bytes for the same."""
DUEL = Spaces(
    DictSpace((("left", DiscreteSpace(3)), ("right", DiscreteSpace(3)))),
    DictSpace((("left", DiscreteSpace(2)), ("right", DiscreteSpace(2)))),
    ("left", "right"),
)
IN_TURN = {
    "old/obs": np.array([2, 1], "<i8"),
    "old/actions": np.array([1], "<i8"),
    "old/rewards": np.array([0.5], "<f4"),
    "old/action_logp": np.array([-0.5], "<f4"),
    "old/t": np.array([-1, 1], "<i4"),
    "new/obs": np.array([0, 2], "<i8"),
    "new/actions": np.array([0], "<i8"),
    "new/rewards": np.array([-0.5], "<f4"),
    "new/action_logp": np.array([-0.75], "<f4"),
    "new/t": np.array([0, 2], "<i4"),
}
WEIGHTS = struct.pack("<4f", 0.0, 1.0, -1.0, 0.5)
BLOB = b"a policy is opaque to the broker"


class Example(NamedTuple):
    name: str
    direction: str
    meaning: str
    message: Message
    body: tuple[bytes, ...] = ()


def _fragment(arrays: dict[str, np.ndarray], **fields: Any) -> tuple[FRAGMENT, tuple[bytes, ...]]:
    columns, buffers = to_buffers(arrays)
    return FRAGMENT(session=SIM, columns=columns, **fields), tuple(bytes(b) for b in buffers)


EXAMPLES = (
    Example(
        "HELLO of a simulator",
        "simulator -> broker",
        "The first greeting of a fresh session: nothing settled, one episode at a time, CartPole's spaces.",
        HELLO(1, SIM, 1, SimulatorHello(spaces=CARTPOLE), "sim-1@host", "0.1.0"),
    ),
    Example(
        "HELLO of a simulator that comes back",
        "simulator -> broker",
        "The third greeting: fragments 1 to 8 (1,600 env steps) are settled, 4 episodes at once, the policy is here.",
        HELLO(1, SIM, 3, SimulatorHello(9, 1600, 4, CUBES, POLICY)),
    ),
    Example(
        "HELLO of a simulator of several agents",
        "simulator -> broker",
        "Two agents with spaces of their own.",
        HELLO(1, SIM, 1, SimulatorHello(spaces=DUEL)),
    ),
    Example(
        "HELLO of a runner",
        "runner -> broker",
        "It has acted upon TAKEN 5, RLlib has the hand-overs up to 4; of one simulator it has handed over the "
        "fragments 3 and 4 (with TAKE 4 and 5); fragment 2 was malformed.",
        HELLO(
            1, RUNNER, 2, RunnerHello(RUN, 5, 4, [Handed(SIM, [3, 4], [4, 5])], [Dropped(SIM, 2, "malformed")]),
            "runner-1@host", "0.1.0",
        ),
    ),
    Example(
        "HELLO of a trainer",
        "trainer -> broker",
        "A run of PPO: 4,000 env steps an update, weights at most 2 updates old, 4,000 steps on their way at most, two "
        "runners, fragments of up to 200 steps, and a policy of 32 bytes.",
        HELLO(1, TRAINER, 1, TrainerHello(
            RUN, 4000, 2, 4000, 2, 200, CARTPOLE, POLICY, len(BLOB), rounds=True
        ), "PPO", "0.1.0"),
    ),
    Example(
        "HELLO of an evaluation runner",
        "runner -> broker",
        "It wants what is evaluated, and gets nothing that is trained on.",
        HELLO(1, RUNNER, 1, RunnerHello(RUN, evaluation=True), "evaluator-1@host", "0.1.0"),
    ),
    Example(
        "HELLO of a trainer whose evaluations a share of the simulators serves",
        "trainer -> broker",
        "A quarter of them, rounded up.",
        HELLO(1, TRAINER, 1, TrainerHello(
            RUN, 4000, 2, 4000, 2, 200, CARTPOLE, POLICY, len(BLOB), evaluation_share=0.25
        )),
    ),
    Example(
        "HELLO of an observer",
        "observer -> broker",
        "It only wants to know the spaces.",
        HELLO(1, OBSERVER, 1, ObserverHello()),
    ),
    Example(
        "HELLO of a reader",
        "reader -> broker",
        "It will ask for policy and weights.",
        HELLO(1, READER, 1, ReaderHello(), "host/4711/weights", "0.1.0"),
    ),
    Example(
        "HELLO of a service",
        "service -> broker",
        "The second connection of a runner: it acts by this run's weights.",
        HELLO(1, SERVICE, 1, ServiceHello(RUN), "runner-1@host", "0.1.0"),
    ),
    Example(
        "WELCOME",
        "broker -> simulator",
        "The answer to greeting 1: fragments of at most 1 MiB, a window of 2 MiB, 1,000 env steps ahead in fragments "
        "of 200; version 7 of this run's weights is to be had; the trainer's spaces.",
        WELCOME(
            EPOCH, 1, 1 << 20, 2 << 20, 1000, 200, RUN, 7, POLICY, "tcp://192.0.2.7:5557", CARTPOLE
        ),
    ),
    Example(
        "WELCOME without a trainer",
        "broker -> simulator",
        "No run, no weights, no limit on steps, and no window is free.",
        WELCOME(EPOCH, 2, 1 << 20, 0, 0, 1, weights="tcp://192.0.2.7:5557", text="no window is free"),
    ),
    Example(
        "REFUSED, greet",
        "broker -> any",
        "The broker does not know this connection: send HELLO. Nothing was changed.",
        REFUSED("greet", "send HELLO first"),
    ),
    Example(
        "REFUSED, fatal",
        "broker -> any",
        "The answer to greeting 1: useless to try again unchanged.",
        REFUSED("protocol", "this broker speaks protocol 1", True, 1),
    ),
    Example(
        "FRAGMENT",
        "simulator -> broker -> runner",
        "Two steps of a CartPole episode, from its beginning, that goes on; chosen with version 7. obs has 3 rows, the "
        "other columns 2. The simulator fills in no action_dist_inputs. The body is one frame.",
        *_fragment(
            TWO_STEPS, number=9, base=9, episode="4", t0=0, steps=2, end="no", run=RUN, version=7, return_so_far=0.0
        ),
    ),
    Example(
        "FRAGMENT, the last of an episode",
        "simulator -> broker -> runner",
        "Step 199 of a Pendulum episode that was truncated there, its return before that step -150.5; 6.25 s after it "
        "began. The simulator itself has dropped 2 fragments (400 steps) since its session began.",
        *_fragment(
            LAST_STEP, number=12, base=10, episode="5", t0=199, steps=1, end="truncated", run=RUN, version=8,
            return_so_far=-150.5, seconds=6.25, dropped={"abandoned": (2, 400)},
        ),
    ),
    Example(
        "FRAGMENT of two episodes",
        "simulator -> broker -> runner",
        "Step 6 of episode 7, which ended with it (its return before was 6.0), and the first two steps of episode 8: "
        "three steps in two segments. obs has 2 rows of the first piece, then 3 of the second.",
        *_fragment(
            TWO_EPISODES, number=14, base=10, episode="worlds", t0=0, steps=3, end="no", run=RUN, version=8,
            return_so_far=0.0,
            segments=(Segment("7", 6, 1, "terminated", 6.0, 0.5), Segment("8", 0, 2, "no", 0.0, 0.25)),
        ),
    ),
    Example(
        "FRAGMENT of several agents",
        "simulator -> broker -> runner",
        "Env steps 3 and 4 of an episode of two agents that act in turn. 'left' acts by the module 'old', which is not "
        "trained and stays at version 0: its step 1 began before the fragment, with an observation of env step 2, and "
        "is complete with that of env step 4. 'right' is 'new': its step 1 goes from env step 3 to 5, by version 7.",
        *_fragment(
            IN_TURN, number=14, base=10, episode="7", t0=3, steps=2, end="no", run=RUN, version=7, return_so_far=1.0,
            modules={"old": 0, "new": 7},
            agents=(AgentRows("left", "old", 1, 1, "no", 0.5), AgentRows("right", "new", 1, 1, "no", 0.5)),
        ),
    ),
    Example(
        "FRAGMENT of an evaluation",
        "simulator -> broker -> evaluation runner",
        "The end of an episode that nobody trains on: its return is 11.0, its length 12.",
        *_fragment(
            TWO_STEPS, number=13, base=10, episode="6", t0=10, steps=2, end="terminated", run=RUN, version=8,
            return_so_far=9.0, evaluation=True,
        ),
    ),
    Example(
        "FRAGMENT, compressed",
        "simulator -> broker -> runner",
        "Two steps of images of 8x8x1 bytes: 224 bytes of columns, as one zstd frame of 37.",
        _fragment(
            TWO_IMAGES, number=14, base=10, episode="7", t0=0, steps=2, end="no", run=RUN, version=8,
            return_so_far=0.0, compression="zstd",
        )[0],
        (ZSTD_FRAME,),
    ),
    Example(
        "EVALUATE",
        "runner -> broker",
        "Ten episodes are to begin, by the weights 8 or newer ones.",
        EVALUATE(8, 10),
    ),
    Example("EVALUATE, no more", "runner -> broker", "The evaluation is over.", EVALUATE(8, 0)),
    Example(
        "TAKE",
        "runner -> broker",
        "Claim 6: fragments 9 and 10 of one simulator. RLlib has the hand-overs up to 5.",
        TAKE(6, [Claim(SIM, [9, 10])], 5),
    ),
    Example(
        "TAKEN",
        "broker -> runner",
        "Claim 6 is granted but for fragment 10; 3,200 env steps were taken since version 7.",
        TAKEN(6, [Claim(SIM, [10])], 7, 3200),
    ),
    Example(
        "RETURNED",
        "runner -> broker",
        "RLlib has everything up to hand-over 6, but for fragment 9, which was malformed.",
        RETURNED(6, [Dropped(SIM, 9, "malformed")]),
    ),
    Example(
        "ACK",
        "broker -> simulator",
        "Two outcomes, and the limits as they are now.",
        ACK([(9, "delivered"), (10, "stale")], 2 << 20, 1400, 200, RUN, 8, POLICY),
    ),
    Example(
        "ACK while an evaluation is going on",
        "broker -> simulator",
        "It wants episodes of version 8 or newer, and this simulator's next one is to be such.",
        ACK([(13, "evaluated"), (14, "unwanted")], 2 << 20, 1400, 200, RUN, 8, POLICY, 8, True),
    ),
    Example(
        "ACK of several modules",
        "broker -> simulator",
        "Version 8 of one, and the first one of another.",
        ACK([], 2 << 20, 1400, 200, RUN, 8, POLICY, modules={"old": 0, "new": 8}),
    ),
    Example("PING", "any -> broker", "Nothing else was sent for a while.", PING()),
    Example(
        "PONG",
        "broker -> any",
        "12,000 env steps were taken in this run, 400 of them since version 8; 2 runners and 3 simulators are here.",
        PONG(EPOCH, RUN, 8, POLICY, 12_000, 400, simulators=3, runners=2),
    ),
    Example(
        "PONG to the trainer",
        "broker -> trainer",
        "Somebody wants 4 runners; one was heard 0.5 s ago. The ledger: name or reason -> fragments and env steps.",
        PONG(EPOCH, RUN, 8, POLICY, 12_000, 400, 4, 3, 1, [Present(RUNNER, "runner-1@host", 0.5, "serve", True)], {
            "received": (70, 14_000), "delivered": (60, 12_000), "in_flight": (9, 1_800), "stale": (1, 200),
        }),
    ),
    Example("POOL", "trainer -> broker", "This runner is to leave.", POOL([Assigned(RUNNER, "leave")])),
    Example("DUTY", "broker -> runner", "Leave, when the learner has what you took.", DUTY("leave")),
    Example("OFFER", "runner -> broker", "This runner has version 8, 16 bytes.", OFFER(RUN, 8, len(WEIGHTS))),
    Example(
        "OFFER of a module",
        "runner -> broker",
        "The same, of one of several modules.",
        OFFER(RUN, 8, len(WEIGHTS), "new"),
    ),
    Example(
        "GET_STATE", "broker -> runner", "Send version 8 from byte 524,288 on.", GET_STATE(RUN, 8, 524_288)
    ),
    Example(
        "GET_STATE of a newcomer",
        "simulator -> broker",
        "Send the newest weights from their beginning.",
        GET_STATE(),
    ),
    Example(
        "STATE",
        "runner -> broker, broker -> simulator, PUB",
        "Version 8, whole: 16 bytes and their CRC-32.",
        STATE(RUN, 8, len(WEIGHTS), 0, zlib.crc32(WEIGHTS)),
        (WEIGHTS,),
    ),
    Example(
        "STATE, the second piece",
        "runner -> broker, broker -> simulator",
        "The last 4 bytes. (Pieces have 512 KiB; this transfer is shorter to be printed.)",
        STATE(RUN, 8, len(WEIGHTS), 12, zlib.crc32(WEIGHTS)),
        (WEIGHTS[12:],),
    ),
    Example(
        "STATE, announced",
        "PUB",
        "Version 9 has 2,000,000 bytes, too many for PUB: pull them with GET_STATE.",
        STATE(RUN, 9, 2_000_000, 0, 0xDEADBEEF),
    ),
    Example("STATE, none yet", "broker -> simulator", "There are no weights yet.", STATE("", -1, 0)),
    Example(
        "GET_CONFIG",
        "simulator -> broker, broker -> trainer",
        "Send this policy from its beginning.",
        GET_CONFIG(POLICY),
    ),
    Example(
        "CONFIG",
        "trainer -> broker, broker -> simulator",
        "The policy, whole.",
        CONFIG(POLICY, len(BLOB)),
        (BLOB,),
    ),
    Example("CONFIG, unknown", "broker -> simulator", "There is no such policy here.", CONFIG(POLICY, 0)),
    Example("BYE", "any -> broker", "An orderly leave.", BYE()),
    Example(
        "ACT",
        "reader -> broker -> service",
        "An action for one observation of CartPole, drawn from the distribution.",
        ACT(READER, 7, 1, (Column("obs", "<f4", (1, 4)),)),
        (np.array([[0.1, 0.2, 0.3, 0.4]], "<f4").tobytes(),),
    ),
    Example(
        "ACT of several agents",
        "reader -> broker -> service",
        "Actions of the module `walker` for two of its agents.",
        ACT(READER, 9, 2, (Column("obs", "<f4", (2, 1)),), module="walker", agents=("left", 4)),
        (np.array([[0.5], [-0.5]], "<f4").tobytes(),),
    ),
    Example(
        "ACT about a followed episode",
        "reader -> broker -> service",
        "Step 3 of the episode `e-1` has ended it; what would the policy see of its last observation?",
        ACT(READER, 10, 1, (Column("obs", "<f4", (1, 1)),), places=(Place("e-1", 3, 0.5, "terminated"),), acts=False),
        (np.array([[0.25]], "<f4").tobytes(),),
    ),
    Example(
        "ACT about a followed episode of several agents",
        "reader -> broker -> service",
        "Env step 1: `left` has ended without another observation, agent 4 is to act.",
        ACT(
            READER, 11, 1, (Column("walker/obs", "<f4", (1, 1)),), agents=(4,), places=(Place("e-1", 1),),
            told=(Told("left", "walker", -1.0, "terminated"), Told(4, "walker", 0.5)),
        ),
        (np.array([[0.25]], "<f4").tobytes(),),
    ),
    Example(
        "ACTION for several agents",
        "service -> broker -> reader",
        "What the policy saw of agent 4, and its action, by version 3 of `walker`.",
        ACTION(
            READER, 11, RUN, 3,
            (Column("walker/seen", "<f4", (1, 1)), Column("walker/actions", "<i8", (1,)),
             Column("walker/action_logp", "<f4", (1,)), Column("walker/action_dist_inputs", "<f4", (1, 2))),
            modules={"walker": 3},
        ),
        (
            np.array([[0.125]], "<f4").tobytes() + np.array([1], "<i8").tobytes()
            + np.array([-0.5, 0.25, 0.75], "<f4").tobytes(),
        ),
    ),
    Example(
        "ACTION",
        "service -> broker -> reader",
        "The action 1, with what a learner must know of it, by version 3 of the weights.",
        ACTION(
            READER, 7, RUN, 3,
            (Column("actions", "<i8", (1,)), Column("action_logp", "<f4", (1,)),
             Column("action_dist_inputs", "<f4", (1, 2))),
        ),
        (np.array([1], "<i8").tobytes() + np.array([-0.5, 0.25, 0.75], "<f4").tobytes(),),
    ),
    Example(
        "ACTION that refuses",
        "broker -> reader",
        "Too many requests are open.",
        ACTION(READER, 8, code="over_credit", text="64 requests (1024 bytes) are open; at most 64, and 16777216 bytes"),
    ),
    Example(
        "BYE of a runner",
        "runner -> broker",
        "An orderly leave; RLlib has the hand-overs up to 6.",
        BYE(6, [Dropped(SIM, 9, "late")]),
    ),
)  # fmt: skip


def frames_of(example: Example) -> list[bytes]:
    return [bytes(f) for f in wire.pack(example.message, example.body)]


def plain(value: Any) -> Any:
    """A msgpack value as JSON can show it: bytes as "hex:...", infinities as strings."""
    if isinstance(value, bytes):
        return f"hex:{value.hex()}"
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and value in (INF, -INF):
        return "inf" if value > 0 else "-inf"
    return value


def entry(example: Example) -> dict[str, Any]:
    frames = frames_of(example)
    return {
        "name": example.name,
        "direction": example.direction,
        "meaning": example.meaning,
        "header": plain(msgpack.unpackb(frames[0])),
        "frames": [f.hex() for f in frames],
    }


def document() -> str:
    """The golden file: one line for each part of an entry."""
    entries = []
    for example in EXAMPLES:
        parts = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in entry(example).items()]
        entries.append("  {\n" + ",\n".join(parts) + "\n  }")
    return "[\n" + ",\n".join(entries) + "\n]\n"


# ---- the file against the code --------------------------------------------------------------------------------------


def golden() -> dict[str, dict[str, Any]]:
    return {e["name"]: e for e in json.loads(FILE.read_text())}


def test_the_file_has_these_examples_and_no_other() -> None:
    assert list(golden()) == [e.name for e in EXAMPLES]


def test_every_message_and_every_role_has_an_example() -> None:
    assert {type(e.message) for e in EXAMPLES} == set(MESSAGES)
    roles = {type(e.message.peer) for e in EXAMPLES if isinstance(e.message, HELLO)}
    assert roles == {SimulatorHello, RunnerHello, TrainerHello, ObserverHello, ReaderHello, ServiceHello}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_encoding_gives_exactly_these_bytes(example: Example) -> None:
    assert [f.hex() for f in frames_of(example)] == golden()[example.name]["frames"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_decoding_gives_exactly_that_message(example: Example) -> None:
    frames = [bytes.fromhex(f) for f in golden()[example.name]["frames"]]
    message, body = wire.unpack(frames)
    assert message == example.message
    assert type(message) is type(example.message)
    assert b"".join(body) == b"".join(example.body)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_another_msgpack_reads_and_writes_the_same(example: Example) -> None:
    written = golden()[example.name]
    header = bytes.fromhex(written["frames"][0])
    decoded = msgpack.unpackb(header)
    assert plain(decoded) == written["header"]
    # Not always the same bytes: msgspec writes the map of a FRAGMENT with a 16 bit length. Any valid form is read.
    assert wire.parse_header(msgpack.packb(decoded)) == example.message


@pytest.mark.parametrize("arrays", [TWO_STEPS, LAST_STEP], ids=["two steps", "last step"])
def test_the_columns_of_a_fragment(arrays: dict[str, np.ndarray]) -> None:
    example = next(e for e in EXAMPLES if isinstance(e.message, FRAGMENT) and e.message.steps == len(arrays["actions"]))
    assert isinstance(example.message, FRAGMENT)
    decoded = from_body(example.message.columns, example.body)
    assert list(decoded) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(decoded[name], array)
        assert decoded[name].dtype == array.dtype


def test_the_columns_of_a_compressed_fragment() -> None:
    example = next(e for e in EXAMPLES if isinstance(e.message, FRAGMENT) and e.message.compression)
    assert isinstance(example.message, FRAGMENT)
    decoded = arrays_of(example.message, example.body)
    assert list(decoded) == list(TWO_IMAGES)
    for name, array in TWO_IMAGES.items():
        np.testing.assert_array_equal(decoded[name], array)


def test_the_file_is_up_to_date() -> None:
    assert FILE.read_text() == document(), "run: python tests/test_golden.py > tests/golden/frames.json"


if __name__ == "__main__":
    print(document(), end="")
