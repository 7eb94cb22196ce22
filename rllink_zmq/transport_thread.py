"""A connection with a thread of its own, for the processes whose main thread belongs to somebody else (Ray, RLlib).

The thread owns the socket and the session. Others hand it functions with `call`; nobody else touches either.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import zmq

from rllink_zmq.errors import RllinkError
from rllink_zmq.transport import Connection

T = TypeVar("T")
logger = logging.getLogger("rllink_zmq")


class ConnectionThread(threading.Thread):
    """Runs `connection` until `stop()`. `step(now)` is called whenever something came and when it asked to be: it
    returns the time of its next call, or infinity."""

    def __init__(self, connection: Connection, step: Callable[[float], float], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.connection = connection
        self._step = step
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._ear.setblocking(False)
        self._stopping = False
        self._ended = threading.Event()

    def call(self, function: Callable[[float], T]) -> Future[T]:
        """Have `function(now)` run in the thread. The future fails with `RllinkError` when the thread has ended."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function(self.connection.clock()))
            except Exception as e:  # whatever it was, the caller gets it
                future.set_exception(e)

        if self._ended.is_set():
            future.set_exception(RllinkError("the connection to the broker is closed"))
            return future
        self._calls.put(run)
        self._ring()
        return future

    def stop(self, timeout: float = 3.0) -> None:
        """Say BYE, close and end the thread. Safe to call twice, and from any thread."""
        self._stopping = True
        self._ring()
        if self.is_alive() and threading.current_thread() is not self:
            self.join(timeout)

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # it is rung already, or the thread is gone
            self._bell.send(b"\0")

    def run(self) -> None:
        connection = self.connection
        try:
            connection.open()
            while not self._stopping:
                self._turn(connection)
        except Exception:
            logger.exception("the connection to the broker at %s ended with an error", connection.address)
        finally:
            connection.close()
            self._ended.set()
            self._drain()
            self._bell.close()
            self._ear.close()

    def _turn(self, connection: Connection) -> None:
        self._drain()
        connection.look()
        due = min(self._step(connection.clock()), connection.endpoint.next_deadline())
        connection.flush()
        wait = max(0.0, min(due - connection.clock(), 1.0))
        poller = zmq.Poller()
        if connection.socket is not None:
            poller.register(connection.socket, zmq.POLLIN)
        poller.register(self._ear, zmq.POLLIN)
        ready: dict[Any, int] = dict(poller.poll(int(wait * 1000) + 1 if wait else 0))
        if self._ear.fileno() in ready:
            try:
                self._ear.recv(4096)
            except BlockingIOError:
                return

    def _drain(self) -> None:
        while True:
            try:
                call = self._calls.get_nowait()
            except queue.Empty:
                return
            call()
