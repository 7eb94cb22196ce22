"""`rllink-zmq simulate`, in processes of its own."""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import processes
import pytest
from click.testing import CliRunner
from fake_training import broker, training, until

from broker.peers import State
from rllink_zmq.cli import main

ENV = "counting_env:Counting-v0"
PATIENCE = 60.0


@contextmanager
def simulate(address, *arguments, env=ENV):
    """The command, with --json and pipes."""
    more = processes.environment(PYTHONPATH=str(Path(__file__).parent))
    with processes.rllink(
        "simulate", "--env", env, "--broker", address, "--json", *arguments, stderr=processes.subprocess.PIPE, env=more
    ) as running:
        yield running


def ended(running):
    """(exit code, last line of stdout or None, stderr)"""
    out, err = running.communicate(timeout=PATIENCE)
    lines = out.splitlines()
    return running.returncode, json.loads(lines[-1]) if lines else None, err


@pytest.fixture
def served():
    with broker() as server:
        yield server


@pytest.fixture
def world(served):
    with training(served) as fake:
        yield served, fake


def all_gone(server):
    return all(peer.state is State.GONE for peer in server.core.simulators.values())


@pytest.mark.parametrize("arguments", [["--num", "3"], ["--num", "3", "--processes", "2"]])
def test_so_many_episodes_each(world, arguments):
    server, fake = world
    with simulate(server.frontend, "--episodes", "5", "--seed", "1", *arguments) as running:
        code, result, err = ended(running)
    assert code == 0, err
    assert {k: result[k] for k in ("simulators", "episodes", "env_steps", "dropped", "unsettled")} == {
        "simulators": 3, "episodes": 15, "env_steps": 45, "dropped": {}, "unsettled": 0,
    }  # fmt: skip
    assert result["episode_return_mean"] == pytest.approx(np.mean([1, 3, 6, 10, 15]))
    assert result["outcomes"] == {"delivered": {"fragments": len(fake.taken), "steps": 45}}
    assert result["wall_s"] > 0
    assert len(server.core.simulators) == 3
    until(lambda: all_gone(server), "the broker has heard BYE")
    assert len({a["obs"][0, 2] for _, a in fake.taken}) == 3  # each environment has a seed of its own
    assert "episodes 15  steps 45" in err


def test_evaluation_is_not_trained_on(world):
    server, fake = world
    with simulate(server.frontend, "--num", "2", "--episodes", "5", "--seed", "1", "--evaluate") as running:
        code, result, err = ended(running)
    assert code == 0, err
    assert result["episodes"] == 10 and result["episode_return_mean"] == pytest.approx(np.mean([1, 3, 6, 10, 15]))
    assert result["outcomes"] == {} and not fake.taken


@pytest.mark.parametrize("arguments", [["--num", "2"], ["--num", "4", "--processes", "2"]])
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_all(world, arguments, signum, expected):
    server, fake = world
    with simulate(server.frontend, *arguments) as running:
        until(lambda: fake.steps > 50, "they work", PATIENCE)
        running.send_signal(signum)
        code, result, err = ended(running)
    assert code == expected, err
    assert result["interrupted"] == signum.name
    assert result["env_steps"] >= 50
    assert "Traceback" not in err
    until(lambda: all_gone(server), "the broker has heard BYE")


@pytest.mark.parametrize("arguments", [[], ["--num", "2", "--processes", "2"]])
def test_no_broker(arguments):
    with simulate("tcp://127.0.0.1:1", *arguments) as running:
        started = time.monotonic()
        for line in running.stderr:
            if "no broker answers at tcp://127.0.0.1:1" in line:
                break
        assert time.monotonic() - started < 20  # 2 s, and the imports on a busy machine
        running.send_signal(signal.SIGINT)
        code, _, err = ended(running)
    assert code == 130
    assert "Traceback" not in err


def test_a_signal_while_it_waits_for_training(served):
    with simulate(served.frontend, "--episodes", "1") as running:
        until(lambda: len(served.core.simulators) == 1, "it is connected", PATIENCE)
        running.send_signal(signal.SIGTERM)
        code, result, _ = ended(running)
    assert code == 143
    assert result["episodes"] == 0


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_processes_end_with_their_parent(world):
    server, fake = world
    with simulate(server.frontend, "--num", "2", "--processes", "2") as running:
        until(lambda: len(server.core.simulators) == 2 and fake.steps > 20, "they work", PATIENCE)
        running.kill()
        running.wait()
        until(lambda: all_gone(server), "all have said BYE")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_a_process_that_dies_is_an_error(world):
    server, fake = world
    with simulate(server.frontend, "--num", "2", "--processes", "2") as running:
        until(lambda: len(server.core.simulators) == 2 and fake.steps > 20, "they work", PATIENCE)
        workers = [p for p in children(running.pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        code, _, err = ended(running)
    assert code == 1
    assert "Error: a process of simulators ended with exit code -9" in err
    assert not any(Path(f"/proc/{p}").exists() for p in workers)


@pytest.mark.parametrize("arguments", [[], ["--num", "2", "--processes", "2"]])
def test_other_spaces_are_refused_in_one_sentence(served, arguments):
    other = gym.spaces.Box(-1, 1, (7,), np.float32)
    with training(served, observation_space=other), simulate(served.frontend, *arguments) as running:
        code, result, err = ended(running)
    assert code == 1
    assert result is None
    assert len([line for line in err.splitlines() if line.startswith("Error: the broker refused")]) == 1
    assert "the trainer's observation space is" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--env", "CartPol-v1"], 1, "did you mean CartPole-v1"),
        (["--env", "CartPole-v99"], 1, "did you mean CartPole-v1"),
        (["--env", "xyz"], 1, "knows no such environment"),
        (["--env", "no_such_module:X-v0"], 1, "no_such_module"),
        (["--env", "CartPole-v1", "--broker", "localhost"], 1, "expected an address like"),
        (["--env", "CartPole-v1", "--num", "0"], 2, "--num"),
        ([], 2, "--env"),
    ],
)
def test_what_can_not_be_started(arguments, code, says):
    result = CliRunner().invoke(main, ["simulate", *arguments])
    assert result.exit_code == code, result.output
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_module_beside_which_it_is_started_is_found(world, tmp_path):
    """As a script there would find it. (`python -m` does anyway; the installed command is a script elsewhere.)"""
    server, _ = world
    (tmp_path / "beside.py").write_text("from counting_env import *\n")
    main = "import sys; sys.path.remove(''); from rllink_zmq.cli import main; main()"
    options = ("--env", "beside:Counting-v0", "--broker", server.frontend, "--num", "2", "--processes", "2", "--json")
    paths = f"{processes.ROOT}:{processes.ROOT / 'tests'}"
    with processes.process(
        "-c", main, "simulate", *options, "--episodes", "2", cwd=tmp_path, stderr=processes.subprocess.PIPE,
        env=processes.environment(PYTHONPATH=paths),
    ) as running:  # fmt: skip
        code, result, err = ended(running)
    assert code == 0, err
    assert result["episodes"] == 4


def test_spaces_that_do_not_travel(served):
    result = CliRunner().invoke(main, ["simulate", "--env", "counting_env:Talking-v0", "--broker", served.frontend])
    assert result.exit_code == 1
    assert "a Text space; Box, Discrete" in result.output


def test_help_has_examples():
    result = CliRunner().invoke(main, ["simulate", "--help"])
    assert result.exit_code == 0
    assert "rllink-zmq simulate --env CartPole-v1 --num 200 --processes 2" in result.output
