"""Real processes for integration tests: the broker, simulators, scripts, on free ports of loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PATIENCE_S = 60.0
"""How long a condition may take on a busy machine before the test fails."""


REAL_RAY = [
    pytest.mark.ray,
    pytest.mark.usefixtures("cluster"),
    # Ray's and RLlib's own, on every build; and sockets that Ray leaves to the collector.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*invalid value encountered:RuntimeWarning"),
]
"""The `pytestmark` of a file whose tests run RLlib in this process."""


@contextmanager
def running_command(command: Sequence[str], end: signal.Signals, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with its stdout a pipe, which gets the signal `end` (by its own id) with the block."""
    running = subprocess.Popen(
        command, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, **options}
    )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.send_signal(end)
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
        for stream in (running.stdout, running.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def process(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A Python with these arguments."""
    with running_command([sys.executable, *arguments], signal.SIGTERM, **options) as running:
        yield running


@contextmanager
def rllink(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`rllink-zmq` with these arguments."""
    with process("-m", "rllink_zmq.cli", *arguments, **options) as running:
        yield running


@contextmanager
def broker(*arguments: str) -> Iterator[dict[str, str]]:
    """A broker on free ports: its addresses."""
    free = "tcp://127.0.0.1:*"
    with rllink(
        "broker", "--frontend", free, "--backend", free, "--weights", free, "--admin", "127.0.0.1:0", *arguments
    ) as running:
        assert running.stdout is not None
        line = running.stdout.readline()
        assert line, f"the broker ended with {running.wait()}"
        yield json.loads(line)


def simulators(addresses: dict[str, str], number: int = 4, env: str = "CartPole-v1", more: Sequence[str] = ()) -> Any:
    """`rllink-zmq simulate` at this broker, for a `with`."""
    return rllink(
        "simulate", "--env", env, "--broker", addresses["frontend"], "--num", str(number), *more,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def status(addresses: dict[str, str]) -> dict[str, Any]:
    """The broker's `/status`."""
    with urllib.request.urlopen(f"{addresses['admin']}/status", timeout=10) as answer:
        loaded: dict[str, Any] = json.load(answer)
    return loaded


def until(condition: Callable[[], Any], what: str, patience: float = PATIENCE_S) -> Any:
    """The first true value of `condition()`."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"after {patience:.0f} s still not: {what}")


def balanced(ledger: dict[str, Any]) -> bool:
    """received = delivered + dropped + in flight, in fragments and in steps."""
    parts = [ledger["delivered"], ledger["in_flight"], *ledger["dropped"].values()]
    return all(ledger["received"][unit] == sum(p[unit] for p in parts) for unit in ("fragments", "steps"))


def environment(**more: str) -> dict[str, str]:
    """This process's environment and `more`."""
    return {**os.environ, **more}
