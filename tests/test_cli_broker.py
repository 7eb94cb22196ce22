"""`rllink-zmq broker` and `rllink-zmq status`, as commands and as processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from rllink_zmq import __version__
from rllink_zmq.cli import COMMANDS, main, output
from rllink_zmq.cli.broker import Size
from rllink_zmq.errors import PolicyError

ROOT = Path(__file__).parent.parent
ANY = "tcp://127.0.0.1:*"
FREE = ("--frontend", ANY, "--backend", ANY, "--weights", ANY, "--admin", "127.0.0.1:0")
TIMEOUT = 30.0


def run(*arguments: str, env: Mapping[str, str] | None = None) -> Any:
    return CliRunner().invoke(main, arguments, env=env)


@contextmanager
def broker(*arguments: str, module: str = "rllink_zmq.cli", env: Mapping[str, str] | None = None) -> Iterator[Any]:
    """A broker process and the line it says when it is ready."""
    command = ["broker"] if module == "rllink_zmq.cli" else []
    process = subprocess.Popen(
        [sys.executable, "-m", module, *command, *arguments],
        cwd=ROOT, env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


# ---- the broker's process -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("module", ["rllink_zmq.cli", "broker"])
def test_a_signal_stops_it_cleanly(signum: signal.Signals, module: str) -> None:
    with broker(*FREE, module=module) as (process, ready):
        assert ready["event"] == "ready"
        process.send_signal(signum)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0, err
        last = json.loads(out.splitlines()[-1])
        assert last["event"] == "stopped"
        assert last["ledger"]["received"] == {"fragments": 0, "steps": 0}
        assert "Traceback" not in err
        assert ready["frontend"] in err


def test_status_of_a_running_broker() -> None:
    with broker(*FREE) as (_, ready):
        plain = run("status", "--admin", ready["admin"])
        assert plain.exit_code == 0, plain.output
        assert "simulators: 0 connected" in plain.stdout
        assert "waiting for: " in plain.stdout
        found = run("status", "--json", "--admin", ready["admin"].removeprefix("http://"))
        assert found.exit_code == 0
        status = json.loads(found.stdout.splitlines()[-1])
        assert status["package"] == __version__
        assert status["addresses"] == {k: ready[k] for k in ("frontend", "backend", "weights", "admin")}
        assert run("status", env={"RLLINK_STATUS_ADMIN": ready["admin"]}).exit_code == 0


def test_status_watch_ends_with_a_signal() -> None:
    with broker(*FREE) as (_, ready):
        watching = subprocess.Popen(
            [sys.executable, "-m", "rllink_zmq.cli", "status", "--watch", "--json", "--admin", ready["admin"]],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert watching.stdout is not None
            for _ in range(2):
                assert json.loads(watching.stdout.readline())["simulators"] == 0
            watching.send_signal(signal.SIGINT)
            _, err = watching.communicate(timeout=10)
            assert (watching.returncode, err) == (0, "")
        finally:
            watching.kill()
            watching.communicate()


def test_options_from_the_environment() -> None:
    env = {
        "RLLINK_BROKER_FRONTEND": ANY,
        "RLLINK_BROKER_BACKEND": ANY,
        "RLLINK_BROKER_WEIGHTS": "tcp://0.0.0.0:*",
        "RLLINK_BROKER_ADMIN": "off",
        "RLLINK_BROKER_INSECURE": "1",
        "RLLINK_BROKER_LOG_LEVEL": "warning",
    }
    with broker(env=env) as (process, ready):
        assert ready["weights"].startswith("tcp://0.0.0.0:")
        assert ready["admin"] is None
        process.terminate()
        _, err = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "can read the weights" in err
        assert "INFO" not in err


def test_a_second_broker_at_the_same_ports() -> None:
    with broker(*FREE) as (_, ready):
        done = run("broker", *FREE[2:], "--frontend", ready["frontend"])
        assert done.exit_code == 1
        assert done.stderr == (
            f"Error: can't bind --frontend {ready['frontend']}: the port is in use, perhaps by another broker; "
            f"stop that one, or choose another port\n"
        )


# ---- what it refuses ------------------------------------------------------------------------------------------


def test_other_machines_need_insecure() -> None:
    done = run("broker", *FREE, "--frontend", "tcp://0.0.0.0:*")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: --frontend tcp://0.0.0.0:* can be reached from other machines")
    assert "--insecure" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_none() -> None:
    done = run("broker", *FREE, "--backend", "localhost")
    assert done.exit_code == 1
    assert done.stderr == "Error: --backend: expected an address like tcp://127.0.0.1:5555, got 'localhost'\n"


def test_windows_larger_than_the_memory() -> None:
    done = run("broker", *FREE, "--memory", "1MiB", "--fragment-bytes", "1MiB")
    assert done.exit_code == 1
    assert "--memory" in done.stderr


def test_a_typo_is_answered_with_the_right_word() -> None:
    done = run("broker", "--fronted", ANY)
    assert done.exit_code == 2
    assert "--frontend" in done.stderr


def test_an_unknown_command() -> None:
    done = run("brokr")
    assert done.exit_code == 2
    assert "brokr" in done.stderr


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 1 << 30), ("512MB", 512_000_000), ("1.5 KiB", 1536), ("65536", 65536), ("2g", 2_000_000_000)],
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "1TBs", "1e9", "nan"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a size like 1GiB"):
        Size().convert(text, None, None)


# ---- status without a broker ----------------------------------------------------------------------------------


def test_status_without_a_broker() -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    done = run("status", "--admin", f"http://127.0.0.1:{port}")
    assert done.exit_code == 1
    assert done.stderr.startswith(
        f"Error: no broker admin answers at http://127.0.0.1:{port}: is `rllink-zmq broker` running"
    )
    assert done.stdout == ""


@contextmanager
def web(code: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("code", "body", "said"),
    [
        (200, b"<html>", "is not a broker"),
        (200, b"[]", "is not a broker"),
        (200, b"\xff\xfe", "is not a broker"),
        (404, b"nothing here", "answers 404"),
        (503, b'{"error": "it is overloaded"}', "answers 503: it is overloaded"),
    ],
)
def test_status_of_something_else(code: int, body: bytes, said: str) -> None:
    with web(code, body) as url:
        done = run("status", "--admin", url)
    assert done.exit_code == 1
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("admin", ["", "file:///etc/hosts", "http://", "http://x y", "ftp://127.0.0.1:1"])
def test_status_of_no_address(admin: str) -> None:
    done = run("status", "--admin", admin)
    assert done.exit_code == 1
    assert "expected an address like http://127.0.0.1:5580" in done.stderr


# ---- the group ------------------------------------------------------------------------------------------------


def test_help_lists_all_and_loads_none() -> None:
    code = (
        "import sys; from rllink_zmq.cli import main; main(['--help'], standalone_mode=False); "
        "print([m for m in sys.modules if m.startswith('rllink_zmq.cli.') and not m.endswith('.output')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("command", ["broker", "status"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_shows_examples(command: str, option: str) -> None:
    done = run(command, option)
    assert done.exit_code == 0
    assert f"  rllink-zmq {command}\n" in done.output


def test_insecure_says_what_it_means() -> None:
    said = " ".join(run("broker", "-h").output.split())
    for meaning in ("read the weights", "made-up episodes", "memory grow"):
        assert meaning in said


def test_version() -> None:
    done = run("--version")
    assert done.exit_code == 0
    assert __version__ in done.output


# ---- how commands end -----------------------------------------------------------------------------------------


def end(body: Any) -> Any:
    """The result of a command of the group that does this."""
    main.add_command(click.Command("probe", callback=body))
    return run("probe")


def test_a_known_error_is_one_line() -> None:
    def body() -> None:
        raise PolicyError("this is\nwrong: do that")

    done = end(body)
    assert (done.exit_code, done.stderr, done.stdout) == (1, "Error: this is wrong: do that\n", "")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_work_says_how_far_it_came(signum: signal.Signals, code: int) -> None:
    def body() -> None:
        with output.running() as so_far:
            so_far["done"] = 3
            os.kill(os.getpid(), signum)
            threading.Event().wait(TIMEOUT)

    before = [signal.getsignal(s) for s in output.SIGNALS]
    done = end(body)
    assert done.exit_code == code
    assert json.loads(done.stdout) == {"done": 3, "interrupted": signum.name}
    assert [signal.getsignal(s) for s in output.SIGNALS] == before


def test_stopping_lets_the_work_end_by_itself() -> None:
    def body() -> None:
        with output.stopping() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(TIMEOUT)
            assert stop.signum == signal.SIGTERM
        output.last_line({"ended": True})

    done = end(body)
    assert (done.exit_code, done.stdout) == (0, '{"ended": true}\n')


def test_a_second_signal_does_not_wait() -> None:
    def body() -> None:
        with output.stopping() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.wait(TIMEOUT)
            time.sleep(1.1 * output.SAME_SIGNAL_S)
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(TIMEOUT)

    assert end(body).exit_code == 130


def test_a_signal_that_comes_twice_at_once_is_one() -> None:
    """timeout(1) sends it to the process and to its group."""

    def asked() -> None:
        with output.stopping() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.wait(TIMEOUT)
            os.kill(os.getpid(), signal.SIGTERM)
        output.last_line({"ended": True})

    def interrupted() -> None:
        with output.running():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                threading.Event().wait(TIMEOUT)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                output.last_line({"ended": True})

    assert (end(asked).exit_code, end(asked).stdout) == (0, '{"ended": true}\n')
    done = end(interrupted)
    assert done.exit_code == 143
    assert done.stdout.splitlines() == ['{"ended": true}', '{"interrupted": "SIGTERM"}']
