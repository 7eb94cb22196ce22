"""A broker and a learner's side without RLlib, in threads: what simulators need to be tested on real sockets."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import gymnasium as gym
import msgspec
import numpy as np
from test_policy import BODY, discrete_blob

from broker.server import Server
from broker.settings import Settings
from rllink_zmq.compression import arrays_of
from rllink_zmq.messages import FRAGMENT, Spaces, TrainerHello
from rllink_zmq.policy import policy_hash
from rllink_zmq.session import State
from rllink_zmq.session_runner import RunnerSession, TrainerSession
from rllink_zmq.spaces import spaces_to_wire
from rllink_zmq.transport import Connection, poll

OBSERVATIONS = gym.spaces.Box(-10.0, 10.0, (3,), np.float32)
ACTIONS = gym.spaces.Discrete(2)
RUNS = ("000000000001-aaaaaaaa", "000000000002-bbbbbbbb")
PATIENCE = 20.0


def until(condition: Callable[[], bool], what: str = "condition", patience: float = PATIENCE) -> None:
    """Wait for what another thread does."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {patience} s"
        time.sleep(0.002)


def pieces(header: FRAGMENT, arrays: dict[str, Any]) -> Iterator[tuple[FRAGMENT, dict[str, Any]]]:
    """A fragment as it is, or one of several episodes as if each of its segments had come alone."""
    row = step = 0
    for part in header.segments:
        rows, steps = slice(row, row + part.steps + 1), slice(step, step + part.steps)
        alone = msgspec.structs.replace(
            header, episode=part.episode, t0=part.t0, steps=part.steps, end=part.end,
            return_so_far=part.return_so_far, seconds=part.seconds,
        )  # fmt: skip
        yield alone, {name: values[rows if len(values) > header.steps else steps] for name, values in arrays.items()}
        row, step = row + part.steps + 1, step + part.steps
    if not header.segments:
        yield header, arrays


class Training:
    """`taken`: (header, arrays) of every piece of an episode, in order. `paused`: nothing is taken meanwhile."""

    def __init__(
        self,
        backend: str,
        *,
        blob: bytes = discrete_blob(),
        observation_space: Any = OBSERVATIONS,
        action_space: Any = ACTIONS,
        steps_ahead: int = 0,
        fragment_steps: int = 8,
        run: str = RUNS[0],
        spaces: Spaces | None = None,
        needs_logp: bool = True,
        rounds: bool = False,
    ) -> None:
        self.taken: list[tuple[FRAGMENT, dict[str, Any]]] = []
        self.paused = False
        self.run = run
        spaces = spaces or spaces_to_wire(observation_space, action_space)
        terms = TrainerHello(
            run, 1000, 1_000_000, steps_ahead, 1, fragment_steps, spaces, policy_hash(blob), len(blob),
            needs_logp=needs_logp, rounds=rounds,
        )  # fmt: skip
        self.trainer = TrainerSession(os.urandom(16), terms, blob, name="fake")
        self.runner = RunnerSession(os.urandom(16), run, name="fake")
        self._connections = [Connection(self.trainer, backend), Connection(self.runner, backend)]
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stop = False
        self._thread = threading.Thread(target=self._work)

    @property
    def steps(self) -> int:
        return sum(header.steps for header, _ in self.taken)

    def publish(self, version: int, body: bytes = BODY, module: str = "") -> None:
        """Offer weights; the broker fetches and publishes them."""
        self._todo.put(lambda: self.runner.offer(version, len(body), lambda: body, time.monotonic(), module))

    def recast(self, blob: bytes) -> None:
        """The trainer has another policy, in the same run."""
        trainer = self.trainer
        terms = msgspec.structs.replace(trainer.terms, policy=policy_hash(blob), policy_bytes=len(blob))

        def change() -> None:
            trainer.blob = blob
            trainer.change(terms, time.monotonic())

        self._todo.put(change)

    def start(self) -> None:
        self._thread.start()
        until(lambda: all(c.endpoint.state is State.LIVE for c in self._connections), "the learner's side greets")

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def _work(self) -> None:
        for connection in self._connections:
            connection.open()
        runner = self.runner
        while not self._stop:
            poll(self._connections, None, 0.005)
            for connection in self._connections:
                connection.look()
            while not self._todo.empty():
                self._todo.get()()
            if runner.taken is not None:
                for lease in runner.taken:
                    self.taken += pieces(lease.message, arrays_of(lease.message, lease.body))
                runner.taken = None
                runner.give_back(time.monotonic())
            if not self.paused:
                runner.take(1 << 30, time.monotonic())
            for connection in self._connections:
                connection.flush()
        for connection in self._connections:
            connection.close()


class Restartable:
    """A broker in a thread. `restart` makes an empty one at the same addresses."""

    def __init__(self) -> None:
        self._addresses = dict.fromkeys(("frontend", "backend", "weights"), "tcp://127.0.0.1:*")
        self._start()

    def _start(self) -> None:
        self.server = Server(Settings(), admin=None, **self._addresses)
        self.server.bind()
        self._addresses = {name: getattr(self.server, name) for name in self._addresses}
        self._thread = threading.Thread(target=self.server.run, name="broker")
        self._thread.start()

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(10)
        self.server.close()

    def restart(self) -> None:
        self.stop()
        self._start()


@contextmanager
def broker(**settings: Any) -> Iterator[Server]:
    """A broker on free ports."""
    free = "tcp://127.0.0.1:*"
    server = Server(Settings(**settings), frontend=free, backend=free, weights=free, admin=None)
    server.bind()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
        server.close()


@contextmanager
def training(server: Server, *, version: int | None = 0, body: bytes = BODY, **options: Any) -> Iterator[Training]:
    """A learner's side at `server`, which has published `version` (None: nothing)."""
    fake = Training(server.backend, **options)
    fake.start()
    if version is not None:
        fake.publish(version, body)
    try:
        yield fake
    finally:
        fake.stop()


class Told(Protocol):
    """A client, of one agent or of several."""

    flow: Any

    @property
    def ready(self) -> bool: ...


def told(client: Told, version: int) -> None:
    """Until the client knows that these weights are evaluated."""

    def heard() -> bool:
        client.flow.look()
        return bool(client.ready and client.flow.session.evaluation == version)

    until(heard, f"it is told of an evaluation of version {version}")
