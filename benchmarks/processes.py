"""The processes that benchmarks start, on free ports of loopback, each ended by its own id."""

from __future__ import annotations

import json
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from measure import BenchmarkError

SPAWN = multiprocessing.get_context("spawn")
"""A fresh Python, as on a host of its own: nothing is inherited but what is passed."""

ANSWER_WITHIN = 120.0
"""Seconds that a process may take to answer one question."""


@contextmanager
def command(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """`rllink-zmq` with these arguments, its stdout a pipe."""
    running = subprocess.Popen(
        [sys.executable, "-m", "rllink_zmq.cli", *arguments],
        **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True, **options},
    )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.send_signal(signal.SIGTERM)
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
        if running.stdout is not None:
            running.stdout.close()


@contextmanager
def broker(*arguments: str, **options: Any) -> Iterator[dict[str, Any]]:
    """A broker on free ports: its addresses, and its `pid`. `options`: of `subprocess.Popen`."""
    free = "tcp://127.0.0.1:*"
    with command(
        "broker", "--frontend", free, "--backend", free, "--weights", free, "--admin", "127.0.0.1:0",
        "--log-level", "warning", *arguments, **options,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        line = running.stdout.readline()
        if not line:
            raise BenchmarkError(f"the broker ended with {running.wait()}")
        yield {**json.loads(line), "pid": running.pid}


def status(addresses: dict[str, Any]) -> dict[str, Any]:
    """The broker's `/status`."""
    import urllib.request

    with urllib.request.urlopen(f"{addresses['admin']}/status", timeout=10) as answer:
        loaded: dict[str, Any] = json.load(answer)
    return loaded


class Helper:
    """A process that runs `function(connection, *arguments)` and answers questions over a pipe.

    What it sends first says that it is ready, and is kept in `ready`.
    """

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self._mine, theirs = SPAWN.Pipe()
        self._name = function.__name__
        self._process = SPAWN.Process(target=function, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.ready: Any = None

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def tell(self, *question: Any) -> None:
        """Send a question, and don't wait for its answer."""
        self._mine.send(question)

    def answer(self, within: float = ANSWER_WITHIN) -> Any:
        """The next thing it sends. Raises `BenchmarkError` when it ends or takes too long."""
        if not self._mine.poll(within):
            raise BenchmarkError(f"{self._name} has not answered within {within:.0f} s")
        try:
            return self._mine.recv()
        except EOFError:
            raise BenchmarkError(f"{self._name} has ended with {self._process.exitcode}") from None

    def has_said(self) -> bool:
        """Whether `answer` would return at once."""
        return self._mine.poll(0)

    def ask(self, *question: Any) -> Any:
        self.tell(*question)
        return self.answer()

    def wait_ready(self) -> None:
        self.ready = self.answer()

    def stop(self) -> None:
        self._mine.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


@contextmanager
def helpers(*wanted: tuple[Any, ...]) -> Iterator[list[Helper]]:
    """One `Helper(function, *arguments)` each, started together, all of them ready."""
    started: list[Helper] = []
    try:
        started.extend(Helper(*what) for what in wanted)
        for helper in started:
            helper.wait_ready()
        yield started
    finally:
        for helper in started:
            helper.stop()


def questions(connection: Connection) -> Iterator[tuple[Any, ...]]:
    """What a helper is asked, until its starter hangs up."""
    while True:
        try:
            yield connection.recv()
        except (EOFError, OSError, KeyboardInterrupt):
            return
