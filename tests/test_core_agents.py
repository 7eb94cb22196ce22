"""What the broker does for several agents: spaces of each, weights of each module."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest
from core_bench import RUN, Bench, fragment, messages, session, terms, training

from rllink_zmq import wire
from rllink_zmq.arrays import to_buffers
from rllink_zmq.errors import ProtocolError
from rllink_zmq.messages import (
    ACK,
    FRAGMENT,
    GET_STATE,
    OFFER,
    PING,
    REFUSED,
    STATE,
    AgentRows,
    BoxSpace,
    DictSpace,
    DiscreteSpace,
    SimulatorHello,
    Spaces,
)

Make = Callable[..., Bench]


def spaces(**sizes: int) -> Spaces:
    """Agents with observations of so many numbers."""
    return Spaces(
        DictSpace(tuple((a, BoxSpace((n,), "<f4", (-1.0,), (1.0,))) for a, n in sorted(sizes.items()))),
        DictSpace(tuple((a, DiscreteSpace(2)) for a in sorted(sizes))),
        tuple(sorted(sizes)),
    )


def offer(bench: Bench, runner: str, version: int, module: str) -> list[tuple[str, object]]:
    data = f"{module}{version}".encode()
    said = bench.send(runner, OFFER(RUN, version, len(data), module))
    return said + bench.send(runner, STATE(RUN, version, len(data), 0, zlib.crc32(data), module), data)


def asked(said: list[tuple[str, object]]) -> list[tuple[str, int]]:
    return [(m.module, m.version) for m in messages(said, GET_STATE)]  # type: ignore[arg-type]


def test_each_module_is_fetched_and_published_by_itself(benches: Make) -> None:
    bench = training(benches())
    assert asked(offer(bench, "r1", 0, "frozen")) == [("frozen", 0)]
    assert asked(offer(bench, "r1", 0, "learner")) == [("learner", 0)]
    bench.wait(1.0)
    said = offer(bench, "r1", 3, "learner")
    assert asked(said) == [("learner", 3)], "what stays is not asked for again"
    published = messages(said, STATE, "PUB")  # type: ignore[arg-type]
    assert [(m.module, m.version) for m in published] == [("learner", 3)]
    broker = bench.broker
    assert broker.module_versions == {"frozen": 0, "learner": 3}
    assert (broker.published_version, broker.version) == (3, 3)


def test_simulators_are_told_the_version_of_each_and_get_what_they_ask_for(benches: Make) -> None:
    bench = training(benches())
    offer(bench, "r1", 0, "frozen")
    offer(bench, "r1", 2, "learner")
    welcome = bench.simulator("s1", spaces=None)
    assert (welcome.version, welcome.modules) == (2, {"frozen": 0, "learner": 2})
    (answer,) = messages(bench.send("s1", GET_STATE(module="frozen")), STATE, "s1")
    assert (answer.module, answer.version) == ("frozen", 0)
    (answer,) = messages(bench.send("s1", GET_STATE(module="other")), STATE, "s1")
    assert (answer.module, answer.version, answer.size) == ("other", -1, 0)
    bench.send("s1", PING())
    (ack,) = messages(bench.wait(0.1), ACK, "s1")
    assert ack.modules == {"frozen": 0, "learner": 2}


def test_a_run_begins_with_the_modules_that_were_offered_before_its_trainer_came(benches: Make) -> None:
    bench = benches()
    bench.runner("r1")
    offer(bench, "r1", 4, "learner")
    assert bench.broker.module_versions == {}
    said = bench.hello("t", terms())
    assert asked(said) == [("learner", 4)]


def test_agents_of_a_simulator_are_the_trainers_or_fewer(benches: Make) -> None:
    bench = benches()
    bench.trainer(spaces=spaces(a=3, b=4))
    bench.simulator("s-both", spaces=spaces(a=3, b=4))
    bench.simulator("s-fewer", spaces=spaces(b=4))

    def refusal(name: str, theirs: Spaces) -> str:
        (refused,) = messages(bench.hello(name, SimulatorHello(spaces=theirs)), REFUSED, name)
        assert (refused.code, refused.fatal) == ("spaces", True)
        return str(refused.text)

    assert refusal("s-more", spaces(a=3, c=3)).startswith("the trainer knows no agent 'c', but 'a', 'b'")
    assert "of agent 'b' the trainer's observation space is Box" in refusal("s-other", spaces(a=3, b=5))
    one = Spaces(BoxSpace((3,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(2))
    assert "has several agents, this simulator's has one" in refusal("s-one", one)
    wrong = Spaces(spaces(a=3).observation, spaces(b=3).action, ("a",))
    assert refusal("s-wrong", wrong) == "the agents are 'a', and the spaces are of others"


def test_a_simulator_of_several_agents_at_a_training_of_one_is_refused(benches: Make) -> None:
    bench = benches()
    bench.trainer(spaces=Spaces(BoxSpace((3,), "<f4", (-1.0,), (1.0,)), DiscreteSpace(2)))
    (refused,) = messages(bench.hello("s", SimulatorHello(spaces=spaces(a=3))), REFUSED, "s")
    assert (refused.code, refused.fatal) == ("spaces", True)
    assert "has one agent, this simulator's has several: 'a'" in refused.text


def test_a_trainer_whose_agents_are_not_those_of_its_spaces_is_refused(benches: Make) -> None:
    bench = benches()
    bad = Spaces(spaces(a=3).observation, spaces(a=3).action, ("b",))
    (refused,) = messages(bench.hello("t", terms(spaces=bad)), REFUSED, "t")
    assert refused.code == "spaces" and refused.fatal
    assert bench.broker.trainer is None


# ---- what the wire checks of such a fragment


def several(agents: tuple[AgentRows, ...], rows: dict[str, int], modules: dict[str, int]) -> FRAGMENT:
    columns, _ = to_buffers({name: np.zeros((n,), np.float32) for name, n in rows.items()})
    return FRAGMENT(
        session=session("s"), number=1, base=1, episode="e", t0=0, steps=3, end="no", run=RUN, version=0,
        return_so_far=0.0, columns=columns, modules=modules, agents=agents,
    )  # fmt: skip


A, B = AgentRows("a", "m", 0, 2, "no", 0.0), AgentRows("b", "m", 0, 1, "no", 0.0)


def check(message: FRAGMENT) -> int:
    size = sum(4 * column.shape[0] for column in message.columns)
    return wire.check_body(message, [bytes(size)])


def test_rows_are_those_of_all_agents_of_a_module() -> None:
    check(several((A, B), {"m/obs": 5, "m/t": 5, "m/actions": 3, "m/rewards": 3}, {"m": 0}))
    check(several((), {}, {"m": 0}))


@pytest.mark.parametrize(
    ("agents", "rows", "modules", "why"),
    [
        ((A, B), {"m/obs": 5, "m/actions": 4}, {"m": 0}, "column 'm/actions' of agents 'a', 'b' with 3 steps"),
        ((A, B), {"m/obs": 3}, {"m": 0}, "column 'm/obs' of agents 'a', 'b' with 3 steps must have 5"),
        ((A,), {"m/obs": 3, "n/obs": 3}, {"m": 0, "n": 0}, "column 'n/obs' is of none of the fragment's agents'"),
        ((A,), {"m/obs": 3}, {"n": 0}, "agent 'a' of a fragment is module 'm', which is not in it"),
        ((A, A), {"m/obs": 6}, {"m": 0}, "an agent of a fragment is there twice"),
        ((), {}, {}, "a fragment of 3 steps has no columns"),
    ],
)
def test_what_does_not_add_up_names_the_column_or_the_agent(
    agents: tuple[AgentRows, ...], rows: dict[str, int], modules: dict[str, int], why: str
) -> None:
    with pytest.raises(ProtocolError, match=why):
        check(several(agents, rows, modules))


def test_a_fragment_of_several_agents_is_routed_like_any_other(benches: Make) -> None:
    bench = training(benches())
    bench.simulator("s1", spaces=None)
    columns, _ = to_buffers({"m/obs": np.zeros(5, np.float32)})
    said = bench.send("s1", fragment("s1", 1, columns=columns, modules={"m": 0}, agents=(A, B)), bytes(20))
    assert [to for to, m in said if isinstance(m, FRAGMENT)] == ["r1"]
