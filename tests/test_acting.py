"""The broker's part in single actions: who is asked, who is told, and what becomes of a request whose service goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from core_bench import NEXT_RUN, RUN, Bench, Said, fragment, messages, session, training

from broker.events import Side
from rllink_zmq.messages import (
    ACT,
    ACTION,
    REFUSED,
    WELCOME,
    Column,
    ObserverHello,
    Place,
    ReaderHello,
    ServiceHello,
)

COLUMNS = (Column("obs", "|u1", (1,)),)


@pytest.fixture
def bench(benches: Callable[..., Bench]) -> Bench:
    """A training, a service "b1" and a reader "s1"."""
    bench = training(benches(act_requests=4, act_bytes=100))
    serves(bench, "b1")
    reads(bench, "s1")
    return bench


def serves(bench: Bench, name: str, run: str = RUN) -> Said:
    return bench.hello(name, ServiceHello(run))


def reads(bench: Bench, name: str) -> WELCOME:
    (welcome,) = messages(bench.hello(name, ReaderHello()), WELCOME)
    return welcome  # type: ignore[no-any-return]


def act(name: str, request: int, rows: int = 1) -> ACT:
    return ACT(session(name), request, rows, (Column("obs", "|u1", (rows,)),))


def asks(bench: Bench, name: str, request: int, rows: int = 1) -> Said:
    return bench.send(name, act(name, request, rows), bytes(rows))


def answers(bench: Bench, by: str, name: str, request: int) -> Said:
    return bench.send(by, ACTION(session(name), request, RUN, 0, COLUMNS), b"a")


def acting(bench: Bench) -> dict[str, Any]:
    shown: dict[str, Any] = bench.broker.status(bench.now)["acting"]
    return shown


def test_a_request_goes_to_the_service_and_its_answer_back_unchanged(bench: Bench) -> None:
    assert asks(bench, "s1", 1) == [("b1", act("s1", 1))]
    assert acting(bench)["open_requests"] == 1
    assert answers(bench, "b1", "s1", 1) == [("s1", ACTION(session("s1"), 1, RUN, 0, COLUMNS))]
    assert answers(bench, "b1", "s1", 1) == [], "the second answer finds no request"
    assert (acting(bench)["open_requests"], acting(bench)["answered"]) == (0, 1)


def test_readers_are_told_their_credit(bench: Bench) -> None:
    assert reads(bench, "s2").requests == 4


def test_the_service_with_the_fewest_observations_is_asked(bench: Bench) -> None:
    serves(bench, "b2")
    assert asks(bench, "s1", 1, rows=8)[0][0] == "b1"
    assert [asks(bench, "s1", n)[0][0] for n in (2, 3)] == ["b2", "b2"]
    answers(bench, "b1", "s1", 1)
    assert asks(bench, "s1", 4)[0][0] == "b1"


def test_a_repeated_request_is_computed_once(bench: Bench) -> None:
    asks(bench, "s1", 1)
    assert asks(bench, "s1", 1) == []


def test_over_its_credit_a_reader_is_told_at_once_and_the_service_hears_nothing(bench: Bench) -> None:
    for n in range(1, 5):
        asks(bench, "s1", n)
    ((to, refused),) = asks(bench, "s1", 5)
    assert (to, refused.code, refused.request) == ("s1", "over_credit", 5)
    assert "4 requests (4 bytes) are open; at most 4" in refused.text
    reads(bench, "s2")
    assert asks(bench, "s2", 1) == [("b1", act("s2", 1))], "others are served"
    answers(bench, "b1", "s1", 1)
    assert asks(bench, "s1", 6) == [("b1", act("s1", 6))]
    assert acting(bench)["refused"] == 1


def test_one_request_may_be_as_large_as_a_message(bench: Bench) -> None:
    assert asks(bench, "s1", 1, rows=101)[0][0] == "b1"
    assert asks(bench, "s1", 2)[0][1].code == "over_credit"


def test_all_requests_together_have_a_limit(benches: Callable[..., Bench]) -> None:
    bench = training(benches(act_memory=10))
    for name in ("s1", "s2"):
        reads(bench, name)
    assert asks(bench, "s1", 1, rows=8) == []
    assert asks(bench, "s2", 1, rows=3)[0][1].code == "over_credit"
    assert asks(bench, "s2", 2, rows=2) == []
    bench.bye("s1")
    assert asks(bench, "s2", 3, rows=8) == []
    bench.unreachable("s2")
    assert bench.broker.act_bytes == 0


def test_requests_wait_for_the_first_service(benches: Callable[..., Bench]) -> None:
    bench = training(benches())
    reads(bench, "s1")
    assert asks(bench, "s1", 1) == []
    assert acting(bench)["unserved_requests"] == 1
    assert ("b1", act("s1", 1)) in serves(bench, "b1")
    assert acting(bench)["unserved_requests"] == 0


@pytest.mark.parametrize("how", ["lost", "bye", "greets again"])
def test_what_a_service_has_not_answered_goes_to_another(bench: Bench, how: str) -> None:
    serves(bench, "b2")
    assert asks(bench, "s1", 1)[0][0] == "b1"
    if how == "lost":
        said = bench.unreachable("b1")
    elif how == "bye":
        said = bench.bye("b1")
    else:
        said = bench.hello("b1/again", ServiceHello(RUN))
    assert ("b2", act("s1", 1)) in said
    assert acting(bench)["moved"] == 1
    assert answers(bench, "b2", "s1", 1)[0][0] == "s1"


def test_a_service_that_hangs_is_not_waited_for(bench: Bench) -> None:
    serves(bench, "b2")
    asks(bench, "s1", 1)
    said = bench.wait(bench.broker.settings.act_patience + 1.1)
    assert ("b2", act("s1", 1)) in said
    assert answers(bench, "b1", "s1", 1)[0][0] == "s1", "whoever is first"
    assert answers(bench, "b2", "s1", 1) == []


def test_a_service_that_hangs_comes_last_until_it_answers(bench: Bench) -> None:
    serves(bench, "b2")
    asks(bench, "s1", 1)
    bench.wait(bench.broker.settings.act_patience + 1.1)
    answers(bench, "b2", "s1", 1)
    assert [asks(bench, "s1", n)[0][0] for n in (2, 3)] == ["b2", "b2"], "though b1 has nothing to do"
    answers(bench, "b1", "s1", 1)
    assert asks(bench, "s1", 4)[0][0] == "b1"


def follows(bench: Bench, name: str, request: int, by: str = "") -> str:
    """Which service a request about an episode that is followed goes to; `by` which it is already."""
    follower = session(by) if by else b""
    message = ACT(session(name), request, 1, COLUMNS, places=(Place("e", request),), follower=follower)
    ((to, sent),) = messages_with_routes(bench.send(name, message, b"a"))
    assert sent == message
    return to


def messages_with_routes(said: Said) -> list[tuple[str, Any]]:
    return [(to, message) for to, message in said if isinstance(message, ACT)]


def test_requests_about_followed_episodes_stay_with_one_service(bench: Bench) -> None:
    """Whatever that has to do; and each service follows as many readers as the others do."""
    for name in ("b2", "b3"):
        serves(bench, name)
    for name in ("s2", "s3", "s4"):
        reads(bench, name)
    mine = {name: follows(bench, name, 1) for name in ("s1", "s2", "s3")}
    assert set(mine.values()) == {"b1", "b2", "b3"}
    for name, service in mine.items():
        answers(bench, service, name, 1)
        assert [follows(bench, name, n, service) for n in (2, 3, 4)] == [service] * 3
        for n in (2, 3, 4):
            answers(bench, service, name, n)
    assert asks(bench, "s4", 1, rows=8)[0][0] == "b1"
    assert asks(bench, "s4", 2)[0][0] == "b2", "others go where there is least to do"
    assert follows(bench, next(n for n, s in mine.items() if s == "b1"), 5, "b1") == "b1"
    assert follows(bench, "s4", 3) in mine.values(), "who is new is followed, too"


def test_readers_whose_episodes_begin_are_followed_by_who_has_the_fewest(bench: Bench) -> None:
    for name in ("s2", "s3", "s4"):
        reads(bench, name)
    for name in ("s1", "s2", "s3", "s4"):
        assert follows(bench, name, 1) == "b1", "there is no other one"
        answers(bench, "b1", name, 1)
    serves(bench, "b2")
    assert [follows(bench, name, 2) for name in ("s1", "s2", "s3", "s4")] == ["b2", "b2", "b1", "b1"]
    assert follows(bench, "s3", 3) == "b1", "what it has asked for stays together"


def test_a_broker_that_has_just_started_knows_who_follows(bench: Bench) -> None:
    """From the request itself."""
    serves(bench, "b2")
    assert [follows(bench, "s1", n, by) for n, by in ((1, "b2"), (2, "b1"))] == ["b2", "b1"]


@pytest.mark.parametrize("how", ["lost", "bye"])
def test_where_the_service_is_gone_another_one_follows(bench: Bench, how: str) -> None:
    serves(bench, "b2")
    assert follows(bench, "s1", 1, "b1") == "b1"
    said = {
        "lost": lambda: bench.unreachable("b1"),
        "bye": lambda: bench.bye("b1"),
    }[how]()
    assert [to for to, _ in messages_with_routes(said)] == ["b2"]
    answers(bench, "b2", "s1", 1)
    assert follows(bench, "s1", 2, "b2") == "b2"


def test_a_service_that_is_slow_keeps_the_episodes_that_it_follows(bench: Bench) -> None:
    """They would be lost with another one. Those that only begin may begin there."""
    serves(bench, "b2")
    reads(bench, "s2")
    assert (follows(bench, "s1", 1, "b1"), follows(bench, "s2", 1)) == ("b1", "b2")
    said = bench.wait(bench.broker.settings.act_patience + 1.1)
    assert [(to, message.session) for to, message in messages_with_routes(said)] == [("b1", session("s2"))]


def test_a_service_that_greets_again_follows_as_before(bench: Bench) -> None:
    serves(bench, "b2")
    assert follows(bench, "s1", 1, "b1") == "b1"
    said = bench.hello("b1/again", ServiceHello(RUN))
    assert [to for to, _ in messages_with_routes(said)] == ["b1/again"], "it has the episode"
    bench.send("b1/again", ACTION(session("s1"), 1, RUN, 0, COLUMNS), b"a")
    assert follows(bench, "s1", 2, "b1") == "b1/again"


def test_a_long_queue_that_moves_is_not_computed_twice(bench: Bench) -> None:
    serves(bench, "b2")
    for n in range(1, 5):
        asks(bench, "s1", n, rows=4)
    for n in range(1, 5):
        said = bench.wait(0.9)
        assert messages(said, ACT) == []
        by = "b1" if n % 2 else "b2"
        answers(bench, by, "s1", n)
        answers(bench, "b2" if n % 2 else "b1", "s1", 99)


def test_another_role_on_a_connection_ends_the_one_before(bench: Bench) -> None:
    """Whoever does that: neither the broker nor what it holds for others may suffer."""
    asks(bench, "s1", 1)
    bench.simulator("s1")
    assert session("s1") not in bench.broker.readers and bench.broker.act_bytes == 0
    bench.bye("s1")
    reads(bench, "s1")
    bench.simulator("s5")
    reads(bench, "s5")
    bench.unreachable("s5")
    bench.wait(60.0)
    assert bench.broker.simulators_live == 0 and bench.broker.windows == 0
    bench.hello("b1", ObserverHello())
    assert bench.broker.services == []
    bench.bye("b1")
    serves(bench, "b1")


def test_the_only_service_keeps_what_it_has(bench: Bench) -> None:
    asks(bench, "s1", 1)
    assert messages(bench.wait(5.0), ACT) == []
    assert answers(bench, "b1", "s1", 1)[0][0] == "s1"


@pytest.mark.parametrize("how", ["lost", "bye"])
def test_who_is_gone_is_not_answered(bench: Bench, how: str) -> None:
    asks(bench, "s1", 1)
    if how == "lost":
        bench.unreachable("s1")
    else:
        bench.bye("s1")
    assert answers(bench, "b1", "s1", 1) == []
    assert acting(bench)["open_requests"] == 0


def test_who_comes_back_asks_again(bench: Bench) -> None:
    asks(bench, "s1", 1)
    bench.hello("s1/again", ReaderHello())
    assert bench.send("s1/again", act("s1", 1), b"\0") == [("b1", act("s1", 1))]
    assert answers(bench, "b1", "s1", 1)[0][0] == "s1/again"


def test_a_service_of_an_ended_run_is_refused(bench: Bench) -> None:
    asks(bench, "s1", 1)
    bench.bye("t")
    said = bench.hello("t2", training_terms(NEXT_RUN))
    assert messages(said, REFUSED, "b1")[0].code == "old_run"
    assert acting(bench)["services"] == 0 and acting(bench)["unserved_requests"] == 1
    assert messages(serves(bench, "b1"), REFUSED)[0].code == "old_run"
    assert ("b3", act("s1", 1)) in serves(bench, "b3", NEXT_RUN)


def training_terms(run: str) -> Any:
    from core_bench import terms

    return terms(run)


def test_a_service_of_a_run_that_has_not_begun_waits_for_it(bench: Bench) -> None:
    serves(bench, "b3", NEXT_RUN)
    asks(bench, "s1", 1)
    bench.bye("t")
    assert ("b3", act("s1", 1)) in bench.hello("t2", training_terms(NEXT_RUN))


def test_who_may_say_what(bench: Bench) -> None:
    bench.simulator("s2")
    for name, message, body, text in (
        ("s2", act("s2", 1), b"\0", "only a reader sends ACT"),
        ("r1", act("r1", 1), b"\0", "only a reader sends ACT"),
        ("r1", ACTION(session("s1"), 1), b"", "only a service sends ACTION"),
        ("s1", act("s9", 1), b"\0", "this request names another session"),
        ("s1", fragment("s1", 1), None, "only a simulator sends FRAGMENT"),
    ):
        said = bench.send(name, message, *([] if body is None else [body]))
        assert [m.text for m in messages(said, REFUSED)] == [text]
    assert bench.broker.routes[Side.FRONT][b"s1"].session == session("s1")
