"""What 500 simulators that wait cost the broker: heartbeats, ZeroMQ's and ours.

`rllink-zmq simulate --num 500` without a trainer: all are connected, and wait. The broker's CPU time with them, against
the same broker's without anybody.
"""

from __future__ import annotations

import subprocess
import time

import measure
from processes import broker, command, status

SETTLE_S = 5.0


def main() -> None:
    options = measure.options(__doc__)
    report = measure.Report("idle", options)
    number, seconds, of = (20, 2.0, 1) if options.quick else (500, 30.0, 3)
    found: dict[str, list[float]] = {"nobody": [], "simulators": []}
    with broker() as addresses:

        def share() -> float:
            """Part of a core that the broker uses."""
            time.sleep(SETTLE_S if not options.quick else 0.5)
            before = measure.cpu_seconds(addresses["pid"])
            time.sleep(seconds)
            return (measure.cpu_seconds(addresses["pid"]) - before) / seconds

        simulate = ("simulate", "--env", "CartPole-v1", "--broker", addresses["frontend"], "--num", str(number))
        for _ in range(of):
            found["nobody"].append(share())
            with command(*simulate, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
                measure.until(lambda: status(addresses)["simulators"] == number, "all are connected", 90.0)
                found["simulators"].append(share())
            measure.until(lambda: not status(addresses)["simulators"], "all have left")
    report.rounds = dict(found)
    more = [100 * (a - b) for a, b in zip(found["simulators"], found["nobody"], strict=True)]
    middle = {name: 100 * measure.median(values) for name, values in found.items()}
    report.figures = {"simulators": number, "percent_of_a_core": middle, "heartbeats_percent": measure.median(more)}
    report.table(
        f"{number} simulators that wait: the broker's CPU time, % of a core",
        ("", "% of a core"),
        [("nobody is connected", middle["nobody"]), (f"{number} simulators", middle["simulators"])],
    )
    report.targets.append(measure.target(f"heartbeats of {number} simulators, % of a core", more, "at most", 1.0))
    report.show()


if __name__ == "__main__":
    main()
