"""The broker's cost: a fragment's way through it against forwarding alone, bytes against zmq.proxy, 1,000 against 10.

Real processes on tcp: 100 DEALERs (one process) send real FRAGMENT messages; the broker decodes, checks, queues and
leases them to two runners (another process), which TAKE what there is, one TAKE after the other, and say RETURNED; ACKs
go back.

- small: 64 bytes a fragment. Fragments per second of CPU of the broker's process, against a Python loop of two ROUTERs
  that forwards the very same frames and does nothing else (nothing comes back through it). `tuned` is the same loop
  with the broker's own way of calling pyzmq.
- large: 200 KB a fragment. Bytes/s on the wall against `zmq.proxy` (C; ROUTER in front, DEALER behind) with the same
  frames, from the same senders to the same receiver, the same number on their way. `bare broker`: the least that the
  protocol asks of a broker in Python, without any books; as it waits for nothing smart, its CPU time is what counts.
- core: `core.handle` alone, no sockets, 1,000 simulators against 10: FRAGMENT, TAKE, RETURNED, ticks, per fragment.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from math import inf
from typing import Any

import measure
from broker_forwarders import bare_broker, c_proxy, plain_loop, tuned_loop
from broker_load import (
    LOADS,
    RUN,
    SIMULATORS,
    SMALL,
    SPACES,
    TAKE_OF,
    Way,
    body_of,
    fragment,
    hello,
    receiver,
    senders,
    trainer_hello,
)
from processes import SPAWN, Helper, broker, helpers

from broker.core import Broker
from broker.events import Forward, Received, Side, Tick
from broker.settings import Settings
from rllink_zmq.messages import RETURNED, TAKE, Claim, Message, RunnerHello, SimulatorHello, encode
from rllink_zmq.session_runner import TrainerSession
from rllink_zmq.transport import Connection
from rllink_zmq.transport_thread import ConnectionThread
from rllink_zmq.wire import check_body, parse_header

FORWARDERS = {"plain loop": plain_loop, "tuned loop": tuned_loop, "zmq.proxy": c_proxy, "bare broker": bare_broker}
BROKERS = ("broker", "bare broker")

# ---- the core alone


class Core:
    """A broker core with `number` simulators and 2 runners, fed as fast as it goes: 10,000 fragments a second of its
    own clock, each runner taking every 20."""

    def __init__(self, number: int) -> None:
        self.now = 0.0
        self.broker = Broker(Settings(memory=4096 << 20), b"epoch---", "tcp://127.0.0.1:1", self.now)
        trainer = trainer_hello()
        self._in(Side.BACK, b"trainer", hello(os.urandom(16), trainer))
        for route in (b"a", b"b"):
            self._in(Side.BACK, route, hello(os.urandom(16), RunnerHello(RUN)))
        self.sessions = [os.urandom(16) for _ in range(number)]
        for i, session in enumerate(self.sessions):
            self._in(Side.FRONT, b"s%d" % i, hello(session, SimulatorHello(spaces=SPACES)))
        self.numbers = [0] * number
        self.turn = itertools.cycle(range(number))
        self.leased: dict[bytes, list[tuple[bytes, int]]] = {b"a": [], b"b": []}
        self.k = 0
        self.now = 5.0

    def _in(self, side: Side, route: bytes, message: Message) -> None:
        self.broker.handle(Received(side, route, message, (encode(message),), 0), self.now)

    def events(self, number: int) -> Iterator[Received]:
        body = body_of(SMALL)
        for _ in range(number):
            i = next(self.turn)
            self.numbers[i] += 1
            header = encode(fragment(self.sessions[i], self.numbers[i], max(1, self.numbers[i] - 2), SMALL))
            message = parse_header(header)
            yield Received(Side.FRONT, b"s%d" % i, message, (header, body), check_body(message, (body,)))

    def run(self, number: int) -> dict[str, float]:
        """CPU seconds in `handle`, per fragment: of fragments' own events, and of all of them."""
        events = list(self.events(number))
        handle, clock = self.broker.handle, time.thread_time
        fragments = others = 0.0
        for start in range(0, number, 100):
            began = clock()
            outs = []
            for event in events[start : start + 100]:
                self.now += 1e-4
                outs.append(handle(event, self.now))
            fragments += clock() - began
            for actions, event in zip(outs, events[start:], strict=False):
                for action in actions:
                    if type(action) is Forward:
                        message = event.message
                        self.leased[action.route].append((message.session, message.number))
            asked = list(self._takes())
            began = clock()
            for take, returned in asked:
                handle(take, self.now)
                handle(returned, self.now)
            handle(Tick(), self.now)
            others += clock() - began
        if self.broker.ledger.delivered[0] != sum(self.numbers):
            raise measure.BenchmarkError(f"not all delivered: {self.broker.ledger.as_json()}")
        return {"fragment": fragments / number, "all": (fragments + others) / number}

    def _takes(self) -> Iterator[tuple[Received, Received]]:
        for route, keys in self.leased.items():
            while keys:
                batch, keys[:] = keys[:TAKE_OF], keys[TAKE_OF:]
                claims: dict[bytes, list[int]] = {}
                for session, number in batch:
                    claims.setdefault(session, []).append(number)
                self.k += 1
                take = TAKE(self.k, [Claim(s, n) for s, n in claims.items()])
                yield (
                    Received(Side.BACK, route, take, (b"",), 0),
                    Received(Side.BACK, route, RETURNED(self.k), (b"",), 0),
                )


# ---- the benchmark


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("broker", options)
    with broker() as addresses, helpers(*((start,) for start in FORWARDERS.values())) as forwarders:
        _sockets(report, options, addresses, dict(zip(FORWARDERS, forwarders, strict=True)))
    _core(report, options)
    report.show()


def _sockets(
    report: measure.Report, options: argparse.Namespace, addresses: dict[str, Any], forwarders: dict[str, Helper]
) -> None:
    ways = {"broker": Way(True, addresses["frontend"], addresses["backend"])}
    ways |= {name: Way(name in BROKERS, *helper.ready) for name, helper in forwarders.items()}
    pids = {"broker": addresses["pid"], **{name: helper.pid for name, helper in forwarders.items()}}
    index = {name: i for i, name in enumerate(ways)}
    trainer = ConnectionThread(
        Connection(TrainerSession(os.urandom(16), trainer_hello(), b"-"), addresses["backend"]),
        lambda _: inf,
        "trainer",
    )
    trainer.start()
    received = SPAWN.Value("Q", 0, lock=False)
    ends = [(end, list(ways.values()), received) for end in (receiver, senders)]
    with helpers(ends[0]) as (receiving,), helpers(ends[1]) as (sending,):
        for helper in forwarders.values():
            helper.answer()
        load_pids = (receiving.pid, sending.pid)

        def run(name: str, load: str, number: int) -> dict[str, float]:
            before = [measure.cpu_seconds(pid) for pid in (pids[name], *load_pids)]
            seconds = sending.ask(index[name], load, number)
            time.sleep(0.05)
            used = [measure.cpu_seconds(pid) - b for pid, b in zip((pids[name], *load_pids), before, strict=True)]
            return {
                "per_cpu_s": number / used[0], "per_s": number / seconds, "cores": used[0] / seconds,
                "us_of_all": 1e6 * sum(used) / number,
            }  # fmt: skip

        for load, sides, number, of in (
            ("small", ("broker", "plain loop", "tuned loop"), *((6_000, 1) if options.quick else (40_000, 9))),
            (
                "large",
                ("broker", "zmq.proxy", "tuned loop", "bare broker"),
                *((300, 1) if options.quick else (3_000, 11)),
            ),
        ):
            found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for side in sides:
                run(side, load, number // 4)
            for _, side in measure.rounds(of, sides):
                found[side].append(run(side, load, number))
            report.rounds[load] = found
            _tell(report, load, found)
    trainer.stop()


def _tell(report: measure.Report, load: str, found: dict[str, list[dict[str, float]]]) -> None:
    size = len(body_of(LOADS[load]))
    middle = {s: {k: measure.median([r[k] for r in rs]) for k in rs[0]} for s, rs in found.items()}
    report.figures[load] = {"bytes": size, **middle}
    rows = [
        (s, m["per_cpu_s"], 1e6 / m["per_cpu_s"], m["us_of_all"], m["per_s"], m["per_s"] * size / 1e6, m["cores"])
        for s, m in middle.items()
    ]
    report.table(
        f"{size:,} bytes a fragment, {SIMULATORS} connections (medians of rounds that alternate)",
        (
            "",
            "fragments/s of CPU",
            "CPU µs a fragment",
            "... with the load's",
            "fragments/s, wall",
            "MB/s, wall",
            "cores",
        ),
        rows,
    )

    def against(side: str, key: str) -> list[float]:
        return measure.ratios([r[key] for r in found["broker"]], [r[key] for r in found[side]])

    if load == "small":
        what = "64-byte fragments per second of CPU, part of a plain loop's"
        report.targets.append(measure.target(what, against("plain loop", "per_cpu_s"), "at least", 0.5))
        tuned = measure.median(against("tuned loop", "per_cpu_s"))
        report.notes.append(f"part of the tuned loop's fragments per second of CPU: {tuned:.2f}")
    else:
        what = "200 KB fragments, bytes/s on the wall, part of zmq.proxy's"
        report.targets.append(measure.target(what, against("zmq.proxy", "per_s"), "at least", 0.9))
        cost = measure.median(against("zmq.proxy", "per_cpu_s"))
        report.notes.append(f"part of zmq.proxy's bytes per second of CPU: {cost:.2f}")
        for side in ("broker", "bare broker", "tuned loop"):
            wall, cpu = (_part_of_proxy(found, side, key) for key in ("per_s", "us_of_all"))
            report.notes.append(f"{side}: {wall:.2f} of zmq.proxy's bytes/s; with both CPUs busy throughout {cpu:.2f}")


def _part_of_proxy(found: dict[str, list[dict[str, float]]], side: str, key: str) -> float:
    """What `side` has of zmq.proxy's bytes/s: on the wall, or by what a fragment takes of all processes' CPU time."""
    ours, theirs = ([r[key] for r in found[s]] for s in (side, "zmq.proxy"))
    return measure.median(measure.ratios(ours, theirs) if key == "per_s" else measure.ratios(theirs, ours))


def _core(report: measure.Report, options: argparse.Namespace) -> None:
    sizes = (10, 1000)
    cores = {str(n): Core(n) for n in sizes}
    number, of = (2_000, 2) if options.quick else (10_000, 15)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in cores}
    for core in cores.values():
        core.run(number)
    for _, name in measure.rounds(of, list(cores)):
        found[name].append(cores[name].run(number))
    for core in cores.values():
        core.broker.check_invariants()
    report.rounds["core"] = found
    middle = {n: {k: measure.median([r[k] for r in rs]) for k in rs[0]} for n, rs in found.items()}
    report.figures["core"] = middle
    report.table(
        "core.handle, CPU µs a fragment",
        ("simulators", "FRAGMENT", "with its part of TAKE, RETURNED, ticks"),
        [(int(n), m["fragment"] * 1e6, m["all"] * 1e6) for n, m in middle.items()],
    )
    few, many = ([r["all"] for r in found[str(n)]] for n in sizes)
    what = "core.handle at 1,000 simulators, times at 10"
    report.targets.append(measure.target(what, measure.ratios(many, few), "at most", 1.3))
    few, many = ([r["fragment"] for r in found[str(n)]] for n in sizes)
    own = measure.median(measure.ratios(many, few))
    report.notes.append(f"FRAGMENT events alone: {own:.2f} times")


if __name__ == "__main__":
    main()
