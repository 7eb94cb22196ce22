"""The audit logs, and what they prove: every promise is broken once here, and found."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from rllink_zmq.audit import (
    AuditError,
    Closed,
    Entered,
    Handed,
    Line,
    Log,
    Records,
    Run,
    Sent,
    Settled,
    Side,
    Unnamed,
    read,
    read_one,
)
from rllink_zmq.audit_judge import APART, PROMISES, Verdict, as_json, in_words, judge
from rllink_zmq.cli import main
from rllink_zmq.errors import SettingsError

SESSION = "ab" * 16
RAW = bytes.fromhex(SESSION)


def sent(number: int, steps: int = 4) -> Sent:
    return Sent(time=0.0, session=SESSION, number=number, steps=steps, run="r", version=1)


def settled(number: int, outcome: str = "delivered") -> Settled:
    return Settled(time=0.0, session=SESSION, number=number, outcome=outcome)


def closed(unsettled: int = 0) -> Closed:
    return Closed(time=0.0, session=SESSION, unsettled=unsettled)


def handed(number: int, steps: int = 4) -> Handed:
    return Handed(time=0.0, session=SESSION, number=number, steps=steps)


def entered(number: int, first: int = 0, steps: int = 4, batch: int = 1) -> Entered:
    return Entered(time=0.0, session=SESSION, number=number, first=first, steps=steps, batch=batch)


def log(side: Side, *lines: Any, name: str = "1") -> Records:
    return Records(f"{side}-{name}.jsonl", side, lines, False)


def verdict(simulator: list[Line], runner: list[Line], learner: list[Line]) -> Verdict:
    return judge([log("simulator", *simulator), log("runner", *runner), log("learner", *learner)])


def broken(found: Verdict) -> dict[str, list[int]]:
    return {name: [breach.number for breach in breaches] for name, breaches in found.broken.items()}


# ---- the judgement


def test_fragments_that_were_used_once_keep_every_promise() -> None:
    numbers = range(1, 6)
    found = verdict(
        [*map(sent, numbers), *map(settled, numbers), closed()],
        [handed(n) for n in numbers],
        [entered(n) for n in numbers],
    )
    assert found.holds and found.sent == found.used == found.outcomes["delivered"] == (5, 20)
    assert not any(count for count, _ in found.apart.values())
    assert "Every promise was kept." in in_words(found)
    assert found.sessions == 1 and found.logs == {"simulator": 1, "runner": 1, "learner": 1}


@pytest.mark.parametrize(
    ("promise", "simulator", "runner", "learner"),
    [
        ("lost", [sent(1), settled(1)], [], []),
        ("dropped", [sent(1), sent(2), settled(1), settled(2)], [handed(1), handed(2)], [entered(2)]),
        ("incomplete", [sent(1), settled(1)], [handed(1)], [entered(1, steps=3)]),
        ("incomplete", [sent(1), settled(1)], [handed(1)], [entered(1, first=1, steps=3)]),
        ("incomplete", [sent(1), settled(1)], [handed(1)], [entered(1, steps=5)]),
        ("incomplete", [sent(1), settled(1)], [handed(1)], [entered(1, 0, 1), entered(1, 2, 2)]),
        ("twice", [sent(1), settled(1)], [handed(1)], [entered(1), entered(1, batch=2)]),
        ("twice", [sent(1), settled(1)], [handed(1)], [entered(1), entered(1, first=3, steps=1)]),
        ("twice", [sent(1), settled(1)], [handed(1), handed(1)], [entered(1)]),
        ("twice", [sent(1), settled(1, "handover_cut")], [handed(1)], [entered(1), entered(1)]),
        ("twice", [sent(1)], [handed(1)], [entered(1), entered(1)]),
        ("untrue", [sent(1), settled(1, "stale")], [handed(1)], [entered(1)]),
        ("untrue", [sent(1), settled(1, "duplicate")], [handed(1)], [entered(1)]),
        ("untrue", [sent(1), settled(1, "unknown")], [], []),
        ("resettled", [sent(1), settled(1), settled(1, "stale")], [], []),
        ("no_outcome", [sent(1), closed(0)], [], []),
    ],
)
def test_each_broken_promise_is_found(
    promise: str, simulator: list[Line], runner: list[Line], learner: list[Line]
) -> None:
    others = [sent(9), settled(9)]
    found = verdict([*simulator, *others], [*runner, handed(9)], [*learner, entered(9)])
    assert broken(found) == {promise: [1]} and not found.holds
    words = in_words(found)
    assert f"BROKEN, 1 x {promise}: {PROMISES[promise]}" in words and f"{SESSION} number 1 " in words
    assert as_json(found)["broken"][promise]["first"][0]["number"] == 1


def test_steps_without_a_name_are_found() -> None:
    found = verdict([sent(1), settled(1)], [handed(1)], [entered(1), Unnamed(time=0.0, steps=7, batch=1)])
    assert list(found.broken) == ["unnamed"]
    assert "7 steps, seen by learner-1.jsonl" in in_words(found)


@pytest.mark.parametrize(
    ("name", "simulator", "runner", "learner"),
    [
        ("used_though_cut", [sent(1), settled(1, "handover_cut")], [handed(1)], [entered(1)]),
        ("held", [sent(1), settled(1)], [handed(9), handed(1)], []),
        ("unsettled", [sent(1)], [], []),
        ("unsettled", [sent(1), closed(1)], [], []),
        ("used_unsettled", [sent(1)], [handed(1)], [entered(1)]),
        ("used_unsettled", [sent(1), closed(1)], [handed(1)], [entered(1)]),
        ("unsent", [], [handed(1)], [entered(1)]),
    ],
)
def test_what_is_allowed_is_counted_apart(
    name: str, simulator: list[Line], runner: list[Line], learner: list[Line]
) -> None:
    other = [handed(9)] if handed(9) not in runner else []
    found = verdict([sent(9), settled(9), *simulator], [*runner, *other], [*learner, entered(9)])
    assert found.holds
    assert {what: count for what, count in found.apart.items() if count[0]} == {name: (1, 4)}
    assert APART[name] in in_words(found)


@pytest.mark.parametrize("outcome", ["stale", "late", "handover_cut", "malformed", "a_reason_of_tomorrow"])
def test_what_was_dropped_and_not_used_is_only_counted(outcome: str) -> None:
    found = verdict([sent(1), settled(1, outcome)], [], [])
    assert found.holds and found.outcomes == {outcome: (1, 4)} and found.used == (0, 0)


def test_a_fragment_may_be_split_between_learners_and_batches() -> None:
    first = log("learner", entered(1, 0, 1), entered(1, 3, 1, batch=2), name="1")
    second = log("learner", entered(1, 1, 2), name="2")
    found = judge([log("simulator", sent(1), settled(1)), log("runner", handed(1)), first, second])
    assert found.holds and found.used == (1, 4)


def test_of_two_learners_the_slower_one_says_what_was_overtaken() -> None:
    numbers = (1, 2, 3)
    simulator = log("simulator", *map(sent, numbers), *map(settled, numbers))
    runner = log("runner", *map(handed, numbers))
    fast, slow = log("learner", entered(3), name="1"), log("learner", entered(1), name="2")
    assert judge([simulator, runner, fast, slow]).apart["held"] == (1, 4)
    assert broken(judge([simulator, runner, fast])) == {"dropped": [1, 2]}


def test_what_another_runner_handed_over_overtakes_nothing() -> None:
    simulator = log("simulator", sent(1), sent(2), settled(1), settled(2))
    runners = [log("runner", handed(1), name="1"), log("runner", handed(2), name="2")]
    assert judge([simulator, *runners, log("learner", entered(2))]).apart["held"] == (1, 4)


def test_only_the_first_breaches_are_printed() -> None:
    found = verdict([x for n in range(1, 41) for x in (sent(n), settled(n))], [], [])
    words = in_words(found)
    assert words.count(SESSION) == 10 and "and 30 more" in words
    told = as_json(found)["broken"]["lost"]
    assert told["fragments"] == 40 and len(told["first"]) == 10


# ---- writing and reading


def write_all(directory: Path) -> None:
    """A simulator's, a runner's and a learner's log, with one fragment that was used once."""
    simulator, runner, learner = (Log(directory, side) for side in ("simulator", "runner", "learner"))
    simulator.sent(RAW, 1, 4, "r", 7)
    runner.handed([(RAW, 1, 4)])
    learner.entered([Run(SESSION, 1, 0, 4)], 0, 1)
    simulator.settled(RAW, 1, "delivered")
    simulator.closed(RAW, 0)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_all(tmp_path / "a" / "b")
    found = judge(read([tmp_path]))
    assert found.holds and found.used == (1, 4) and found.logs == {"simulator": 1, "runner": 1, "learner": 1}
    (simulator,) = (tmp_path / "a" / "b").glob("simulator-*")
    lines = [json.loads(line) for line in simulator.read_text().splitlines()]
    assert [line.pop("event") for line in lines] == ["opened", "sent", "settled", "closed"]
    assert all(line.pop("time") > 1e9 for line in lines)
    assert lines[0]["side"] == "simulator" and lines[0]["pid"] == os.getpid() and lines[0]["format"] == 1
    assert lines[1:] == [
        {"session": SESSION, "number": 1, "steps": 4, "run": "r", "version": 7},
        {"session": SESSION, "number": 1, "outcome": "delivered"},
        {"session": SESSION, "unsettled": 0},
    ]


def test_a_copy_of_a_log_counts_once(tmp_path: Path) -> None:
    write_all(tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        copy = tmp_path / "b" / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(path.read_bytes()[:-20])  # copied while it was written
    assert judge(read([tmp_path / "a", tmp_path / "b"])).holds
    assert judge(read([tmp_path / "b", tmp_path / "a", tmp_path / "a"])).used == (1, 4)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    write_all(tmp_path)
    (simulator,) = tmp_path.glob("simulator-*")
    whole = simulator.read_bytes()
    for cut in range(1, len(whole)):
        simulator.write_bytes(whole[:-cut])
        records = read_one(simulator)
        assert records.torn == (not whole[:-cut].endswith(b"\n"))
        assert len(records.lines) == max(0, whole[:-cut].count(b"\n") - 1)
    simulator.write_bytes(whole[:-10])
    found = judge(read([tmp_path]))
    assert found.holds and found.torn == 1 and "a last line that was not finished" in in_words(found)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json\n", "line 1, is no line of an audit log"),
        ('{"event":"closed","time":1,"session":"a","unsettled":0}\n', "does not begin as an audit log does"),
        (
            '{"event":"opened","time":1,"format":99,"side":"runner","host":"h","pid":1,"package":"9.0"}\n',
            "is of format 99, this is 1: use rllink-zmq 9.0",
        ),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "runner-x.jsonl"
    path.write_text(text)
    with pytest.raises(AuditError, match=says):
        read_one(path)


def test_fields_of_later_versions_are_passed_over(tmp_path: Path) -> None:
    write_all(tmp_path)
    (simulator,) = tmp_path.glob("simulator-*")
    simulator.write_text(simulator.read_text().replace('"steps":4', '"steps":4,"mood":"good"'))
    assert judge(read([tmp_path])).holds


def test_clients_of_a_process_share_a_file_until_the_last_is_gone(tmp_path: Path) -> None:
    one, two = Log.shared(tmp_path, "simulator"), Log.shared(str(tmp_path), "simulator")
    assert one is two and Log.shared(tmp_path, "runner") is not one
    one.open()
    one.open()
    assert len(list(tmp_path.iterdir())) == 1
    del one, two
    gc.collect()
    Log.shared(tmp_path, "simulator").open()
    assert len(list(tmp_path.iterdir())) == 2


def _tell(log: Log) -> None:
    log.closed(RAW, 0)


@pytest.mark.parametrize("way", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_another_process_writes_a_file_of_its_own(tmp_path: Path, way: str) -> None:
    mine = Log(tmp_path, "simulator")
    mine.open()
    process = multiprocessing.get_context(way).Process(target=_tell, args=(mine,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    mine.closed(RAW, 1)
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    assert sorted(line.unsettled for f in files for line in read_one(f).lines if isinstance(line, Closed)) == [0, 1]


def test_a_process_that_is_killed_has_told_everything(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from rllink_zmq.audit import Log\n"
        "log = Log(sys.argv[1], 'simulator')\n"
        "for n in range(1, 501): log.sent(b'x' * 16, n, 1, 'r', 0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60)
    assert done.returncode == -9
    (path,) = tmp_path.iterdir()
    assert [line.number for line in read_one(path).lines if isinstance(line, Sent)] == list(range(1, 501))


def test_a_directory_that_cannot_be_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="can't be made"):
        Log(tmp_path / "file" / "logs", "simulator").open()


def test_a_full_disk_ends_the_log_and_not_the_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Log(tmp_path, "simulator")
    full.open()

    def no_space(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", no_space)
        full.closed(RAW, 0)
    assert "ends here, it can't be written: No space left on device" in caplog.text
    full.closed(RAW, 0)
    (path,) = tmp_path.iterdir()
    assert read_one(path).lines == ()


# ---- the command


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["audit", *map(str, arguments)])


def test_the_command_says_that_every_promise_was_kept(tmp_path: Path) -> None:
    write_all(tmp_path)
    result = run(tmp_path, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["holds"] and told["used"] == {"fragments": 1, "steps": 4}
    assert "Every promise was kept." in run(tmp_path).stdout


def test_the_command_ends_with_1_when_a_promise_was_broken(tmp_path: Path) -> None:
    write_all(tmp_path)
    Log(tmp_path, "learner").entered([Run(SESSION, 1, 2, 2)], 0, 1)
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "BROKEN, 1 x twice" in result.stdout and "steps in a batch: 0-3, 2-3" in result.stdout
    assert json.loads(run(tmp_path, "--json").stdout.splitlines()[-1])["holds"] is False


def test_the_command_says_what_it_misses(tmp_path: Path) -> None:
    def refused(*directories: Path) -> str:
        result = run(*directories)
        assert result.exit_code == 2, result.output
        return " ".join(result.stderr.split())

    assert "is no directory" in refused(tmp_path / "nowhere")
    (tmp_path / "notes.jsonl").write_text("{}\n")
    assert "there are no audit logs in" in refused(tmp_path)
    write_all(tmp_path / "all")
    for side in ("simulator", "learner"):
        some = tmp_path / side
        write_all(some)
        next(some.glob(f"{side}-*")).unlink()
        assert f"no {side}'s log is there" in refused(some)
    assert run().exit_code == 2


def test_a_log_of_which_nothing_is_left_is_no_side(tmp_path: Path) -> None:
    write_all(tmp_path)
    next(tmp_path.glob("learner-*")).write_bytes(b"")
    assert run(tmp_path).exit_code == 2
