"""An action service without RLlib, in a thread: what clients need to be tested on real sockets."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import msgspec
import numpy as np
from fake_training import RUNS, until
from numpy.typing import NDArray

from broker.server import Server
from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.messages import ACT, ACTION, LOOKBACK
from rllink_zmq.session import State
from rllink_zmq.session_runner import ServiceSession
from rllink_zmq.transport import Connection

Reply: TypeAlias = tuple[ACTION, dict[str, NDArray[Any]]]


class Service:
    """Answers with the parity of the first number of an observation, as the weights `version`. `asked`: (request, rows)
    of all that came, `beside`: their other columns; `how`: whether it is to explore, and for evaluation. `lookback`:
    how many earlier observations it says it looks at. `held`: answers nothing meanwhile; `refuses`: with this code.
    `versions`: of each module, if there are several; others are refused. `modules`: of all requests.
    """

    def __init__(self, backend: str, run: str = RUNS[0]) -> None:
        self.version = 0
        self.held = False
        self.refuses = ""
        self.asked: list[tuple[int, NDArray[Any]]] = []
        self.beside: list[dict[str, NDArray[Any]]] = []
        self.how: list[tuple[bool | None, bool]] = []
        self.lookback = 0
        self.versions: dict[str, int] = {}
        self.modules: list[str] = []
        self.session = ServiceSession(os.urandom(16), run, name="fake service")
        self._connection = Connection(self.session, backend)
        self._stop = False
        self._thread = threading.Thread(target=self._work)

    def start(self) -> None:
        self._thread.start()
        until(lambda: self.session.state is State.LIVE, "the service greets")

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def answer(self, message: ACT, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        actions = rows[:, 0].astype(np.int64) % 2
        return {
            "actions": actions,
            "action_logp": np.full(len(rows), -0.5, np.float32),
            "action_dist_inputs": np.stack([actions, 1 - actions], axis=1).astype(np.float32),
        }

    def reply(self, message: ACT, arrays: dict[str, NDArray[Any]]) -> Reply | None:
        """The header of an answer, but for what all have, and its columns; None = no answer."""
        rows = arrays.pop("obs")
        self.beside.append({name: array.copy() for name, array in arrays.items()})
        self.asked.append((message.request, rows))
        self.how.append((message.explore, message.evaluation))
        self.modules.append(message.module)
        told = ACTION(message.session, message.request)
        refuses = self.refuses or ("no_module" if self.versions and message.module not in self.versions else "")
        return (self.refused(told, refuses), {}) if refuses else (told, self.answer(message, rows))

    @staticmethod
    def refused(told: ACTION, code: str) -> ACTION:
        return msgspec.structs.replace(told, code=code, text="no such thing")

    def _work(self) -> None:
        session = self.session
        self._connection.open()
        while not self._stop:
            self._connection.wait(0.005)
            self._connection.look()
            if self.held:
                continue
            asked, session.asked = session.asked, {}
            for message, body in asked.values():
                reply = self.reply(message, from_body(message.columns, body))
                if reply is None:
                    continue
                header, answer = reply
                if self.lookback and "actions" in answer:
                    answer[LOOKBACK] = np.full(message.rows, self.lookback, np.int32)
                columns, buffers = to_buffers(answer)
                version = self.versions.get(message.module, self.version)
                if not header.code:
                    header = msgspec.structs.replace(header, run=session.my_run, version=version, columns=columns)
                session.answer(header, buffers, time.monotonic())
            self._connection.flush()
        self._connection.close()


@contextmanager
def service(server: Server, **options: Any) -> Iterator[Service]:
    """A service at `server`."""
    fake = Service(server.backend, **options)
    fake.start()
    try:
        yield fake
    finally:
        fake.stop()
