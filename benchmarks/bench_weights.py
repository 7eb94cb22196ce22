"""How long new weights take until the last of 200 simulators acts by them, against bare PUB/SUB of the same bytes.

Ours: from `ZmqEnvRunner.set_state` (in this process; the weights of RLlib's 256x256 network, 280 KB) through the
broker's process to 200 weights readers of the client library, each with a connection, a subscription and a policy of
its own, as 200 simulator processes have them; here they live in 4 processes. The clock stops when the last of them
has put the new weights into its policy: received, checked by their checksum, applied.

Bare: one PUB socket in this process sends the same frames to 200 SUB sockets, which live in the same 4 processes.
The clock stops when the last of them has received them.

Both sides are waited for with a poll, so neither has the 5 ms between two looks of a simulator that is stepping.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any

import measure
import zmq
from processes import Helper, broker, helpers

from rllink_zmq import __version__
from rllink_zmq.client_policy import PolicyReader
from rllink_zmq.messages import STATE, BoxSpace, DiscreteSpace, Spaces
from rllink_zmq.session import SimulatorSession
from rllink_zmq.transport import Connection, Subscription, set_options
from rllink_zmq.wire import pack

SUBSCRIBERS = 200
PROCESSES = 4
PAUSE = 0.3
"""Seconds between two versions: longer than a reader keeps one at least."""

FAR = 3.4028234663852886e38
SPACES = Spaces(BoxSpace((4,), "<f4", (-FAR,), (FAR,)), DiscreteSpace(2))
TOPIC = b"default_policy"


class Subscriber:
    """What one simulator process has of the client: a session, a connection and a weights reader."""

    def __init__(self, frontend: str) -> None:
        self.session = SimulatorSession(os.urandom(16), name="benchmark", package=__version__)
        self.reader = PolicyReader(frontend)
        self.connection = Connection(self.session, frontend)
        self.connection.open()
        self.applied = -1

    def look(self) -> bool:
        """Read what has come; True if the weights are newer now."""
        self.connection.look()
        self.reader.look(self.session, time.monotonic())
        origin = self.reader.origin
        before, self.applied = self.applied, origin.version if origin is not None else -1
        return self.applied > before


class Bare:
    """A SUB socket, and the version that it received last."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        set_options(self.socket, rcvhwm=4, sndhwm=1)
        self.socket.subscribe(b"")
        self.socket.connect(address)
        self.applied = -1

    def look(self) -> bool:
        """Read what has come; True if there was something."""
        before = self.applied
        while int(self.socket.get(zmq.EVENTS)) & zmq.POLLIN:
            frames = self.socket.recv_multipart(zmq.NOBLOCK)
            self.applied = int(frames[0][len(TOPIC) :])
        return self.applied > before


def subscribers(pipe: Pipe, number: int, frontend: str, bare: str) -> None:
    """`number` of both kinds. Says (kind, version, when) each time the last one of a kind has got a version."""
    kinds: dict[str, Sequence[Subscriber | Bare]] = {
        "ours": [Subscriber(frontend) for _ in range(number)],
        "bare": [Bare(bare) for _ in range(number)],
    }
    poller = zmq.Poller()
    poller.register(pipe.fileno(), zmq.POLLIN)
    ends: dict[Any, tuple[str, Subscriber | Bare]] = {}

    def register(kind: str, end: Subscriber | Bare, socket: Any) -> None:
        ends[socket] = (kind, end)
        poller.register(socket, zmq.POLLIN)

    for ours in kinds["ours"]:
        assert isinstance(ours, Subscriber)
        register("ours", ours, ours.connection.socket)
    for end in kinds["bare"]:
        assert isinstance(end, Bare)
        register("bare", end, end.socket)
    subscribed: set[int] = set()
    complete = {"ours": -1, "bare": -1}
    pipe.send("ready")
    tended = time.monotonic()
    while True:
        ready = poller.poll(50)
        if any(socket == pipe.fileno() for socket, _ in ready):
            return  # the starter hung up
        changed = {kind for kind, end in [ends[socket] for socket, _ in ready] if end.look()}
        if not ready or time.monotonic() - tended > 0.2:
            tended = time.monotonic()
            for i, end in enumerate(kinds["ours"]):
                if end.look():
                    changed.add("ours")
                assert isinstance(end, Subscriber)
                subscription: Subscription | None = end.reader._subscription
                if i not in subscribed and subscription is not None:
                    subscribed.add(i)
                    register("ours", end, subscription.socket)
        for kind in changed:
            version = min(end.applied for end in kinds[kind])
            if version > complete[kind]:
                complete[kind] = version
                pipe.send((kind, version, time.monotonic()))


class Fleet:
    """All subscribers of all processes."""

    def __init__(self, processes: Sequence[Helper]) -> None:
        self._processes = processes

    def wait(self, kind: str, version: int, within: float = 60.0) -> float:
        """When the last subscriber of `kind` got `version`, in this machine's monotonic seconds."""
        times = []
        for process in self._processes:
            while True:
                heard, got, when = process.answer(within)
                if heard == kind and got == version:
                    times.append(when)
                    break
                if heard == kind and got > version:
                    raise measure.BenchmarkError(f"{kind}: version {got} came instead of {version}")
        return max(times)


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("weights", options)
    number, of = (20, 3) if options.quick else (SUBSCRIBERS, 25)
    with measure.quiet():
        from learning import LearnerSide

        from rllink_zmq.rllib.export import weights_body
    context = zmq.Context()
    publisher = context.socket(zmq.PUB)
    set_options(publisher, rcvhwm=1, sndhwm=4)
    bare_address = f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://127.0.0.1')}"
    with broker() as addresses:
        with measure.quiet():
            learner = LearnerSide(addresses["backend"], 4000)
        runner = learner.runners[0]
        data = weights_body(learner.trainer.manifest, runner.module.get_state())
        header = STATE(learner.trainer.run, 1, len(data), 0, zlib.crc32(data))
        what = (subscribers, number // PROCESSES, addresses["frontend"], bare_address)
        with helpers(*([what] * PROCESSES)) as processes:
            fleet = Fleet(processes)
            fleet.wait("ours", learner.versions.version)
            sent = 0

            def bare() -> float:
                nonlocal sent
                sent += 1
                started = time.monotonic()
                publisher.send_multipart([TOPIC + b"%d" % sent, *pack(header, [data])], copy=False)
                return fleet.wait("bare", sent) - started

            def ours() -> float:
                started = time.monotonic()
                learner.versions.offer()
                return fleet.wait("ours", learner.versions.version) - started

            time.sleep(1.0)  # the SUBs are connected
            sides = {"ours": ours, "bare": bare}
            found: dict[str, list[float]] = {"ours": [], "bare": []}
            cpu: dict[str, list[float]] = {"ours": [], "bare": []}
            for i, side in measure.rounds(of + 2, list(sides)):
                before = sum(measure.cpu_seconds(p.pid) for p in processes)
                seconds = sides[side]()
                used = sum(measure.cpu_seconds(p.pid) for p in processes) - before
                if i >= 2:
                    found[side].append(seconds)
                    cpu[side].append(used)
                time.sleep(PAUSE)
        learner.stop()
    publisher.close(0)
    context.term()
    report.figures = {
        "bytes": len(data),
        "subscribers": number,
        **{s: {"seconds": measure.median(v), "subscribers_cpu_s": measure.median(cpu[s])} for s, v in found.items()},
    }
    report.rounds = {"seconds": found, "subscribers_cpu_s": cpu}
    report.table(
        f"{len(data):,} bytes of weights to {number} subscribers in {PROCESSES} processes ({of} rounds that alternate)",
        ("", "ms until the last has them", "fastest", "slowest", "CPU ms a subscriber"),
        [
            (name, 1e3 * measure.median(found[s]), 1e3 * min(found[s]), 1e3 * max(found[s]),
             1e3 * measure.median(cpu[s]) / number)
            for s, name in (("ours", "set_state to applied"), ("bare", "bare PUB/SUB"))
        ],
    )  # fmt: skip
    cost = measure.median(measure.ratios(cpu["ours"], cpu["bare"]))
    report.notes.append(f"CPU of the subscribers' processes, times bare PUB/SUB's: {cost:.2f}")
    what_for = f"last of {number} subscribers, times bare PUB/SUB"
    report.targets.append(measure.target(what_for, measure.ratios(found["ours"], found["bare"]), "at most", 2))
    report.show()


if __name__ == "__main__":
    main()
