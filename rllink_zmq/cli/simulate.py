"""`rllink-zmq simulate`: Gymnasium environments as simulators."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import click

from rllink_zmq.audit import check_directory
from rllink_zmq.client import Backpressure, Inference
from rllink_zmq.compression import Compression, check_compression
from rllink_zmq.errors import RllinkError
from rllink_zmq.messages import DELIVERED, EVALUATED, UNWANTED
from rllink_zmq.transport import parse_address

from . import output
from .simulate_work import SETTLE, SETTLE_INTERRUPTED, Plan, Report, Work, add, check_env, in_child

NOTHING = Report(0, 0, 0, (), {}, {}, 0)

GRACE = 5.0
"""Seconds that processes have to stop before they are killed."""


def total(reports: list[Report]) -> Report:
    """All processes together. Returns are those of the last episodes, as far as one can tell across processes."""
    outcomes: dict[str, tuple[int, int]] = {}
    dropped: dict[str, tuple[int, int]] = {}
    for report in reports:
        add(outcomes, report.outcomes)
        add(dropped, report.dropped)
    share = max(1, 100 // max(1, len(reports)))
    return Report(
        sum(r.connected for r in reports),
        sum(r.episodes for r in reports),
        sum(r.steps for r in reports),
        tuple(x for r in reports for x in r.returns[-share:]),
        outcomes,
        dropped,
        sum(r.unsettled for r in reports),
        all(r.done for r in reports),
    )


def as_json(report: Report, num: int, wall_s: float) -> dict[str, Any]:
    """The last line."""

    def pairs(totals: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
        return {reason: {"fragments": f, "steps": s} for reason, (f, s) in sorted(totals.items())}

    return {
        "simulators": num,
        "episodes": report.episodes,
        "env_steps": report.steps,
        "episode_return_mean": _mean(report.returns),
        "outcomes": pairs(report.outcomes),
        "dropped": pairs(report.dropped),
        "unsettled": report.unsettled,
        "wall_s": round(wall_s, 3),
    }


def line(report: Report, num: int, wall_s: float) -> str:
    """Where it stands, for people."""
    mean = _mean(report.returns)
    lost = {**report.outcomes, **report.dropped}
    for no_loss in (DELIVERED, EVALUATED, UNWANTED):
        lost.pop(no_loss, None)
    evaluated = report.outcomes.get(EVALUATED, (0, 0))[1]
    return (
        f"simulators {report.connected}/{num}  episodes {report.episodes}  steps {report.steps} "
        f"({report.steps / max(wall_s, 1e-9):.0f}/s)  return {'-' if mean is None else f'{mean:.1f}'}"
        + (f"  evaluated: {evaluated} steps" if evaluated else "")
        + (f"  dropped: {', '.join(f'{reason} {f}' for reason, (f, _) in sorted(lost.items()))}" if lost else "")
    )


def _mean(returns: tuple[float, ...]) -> float | None:
    return sum(returns) / len(returns) if returns else None


def here(plan: Plan, watch: Callable[[Report], None]) -> Report:
    """Run all simulators in this process. Raises `Interrupted` when a signal came before they were done."""
    work = Work(plan, watch)
    try:
        work.connect()
        with output.stopping() as stop:
            done = work.run(lambda: bool(stop))
            work.close(SETTLE if done else SETTLE_INTERRUPTED)
            report = work.report(done=done)
            watch(report)
            if not done:
                raise stop.interrupted()
            return report
    finally:
        work.close(0.0)


class Processes:
    """Simulators spread over processes of their own. They end when this one does, whatever ends it."""

    def __init__(self, plans: list[Plan]) -> None:
        context = multiprocessing.get_context("spawn")
        self.reports = [NOTHING for _ in plans]
        self._open: dict[Connection, int] = {}
        self._stopping = False
        self._processes: list[SpawnProcess] = []
        for i, plan in enumerate(plans):
            ours, theirs = context.Pipe()
            process = context.Process(target=in_child, args=(plan, theirs), daemon=True)
            process.start()
            theirs.close()
            self._open[ours] = i
            self._processes.append(process)

    @property
    def running(self) -> bool:
        return bool(self._open)

    def read(self, timeout: float) -> None:
        """Take in reports. Raises RllinkError when a process failed."""
        for pipe in wait(list(self._open), timeout):
            assert isinstance(pipe, Connection)
            i = self._open[pipe]
            try:
                message = pipe.recv()
            except EOFError:
                del self._open[pipe]
                self._processes[i].join(GRACE)
                code = self._processes[i].exitcode
                if code and not self._stopping:
                    raise RllinkError(f"a process of simulators ended with exit code {code}") from None
                continue
            if isinstance(message, str):
                raise RllinkError(message)
            self.reports[i] = message

    def stop(self) -> None:
        """Ask all to stop."""
        self._stopping = True
        for process in self._processes:
            process.terminate()

    def close(self) -> None:
        """Let none be left. Those that still run have a moment to say BYE."""
        self.stop()
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()


def spread(plans: list[Plan], watch: Callable[[Report], None]) -> Report:
    """Run processes until all are done. Raises `Interrupted` when a signal came before."""
    processes = Processes(plans)
    try:
        with output.stopping() as stop:
            give_up: float | None = None
            while processes.running and (give_up is None or time.monotonic() < give_up):
                if stop and give_up is None:
                    give_up = time.monotonic() + GRACE
                    processes.stop()
                processes.read(0.1)
                watch(total(processes.reports))
            report = total(processes.reports)
            if not report.done:
                raise stop.interrupted()
            return report
    finally:
        processes.close()


@click.command(
    epilog="""\b
Examples:
  rllink-zmq simulate --env CartPole-v1
  rllink-zmq simulate --env CartPole-v1 --num 200 --processes 2
  rllink-zmq simulate --env my_package:MySim-v0 --broker tcp://10.0.0.5:5555
  rllink-zmq simulate --env CartPole-v1 --vector 64
  rllink-zmq simulate --env CartPole-v1 --inference remote
  rllink-zmq simulate --env CartPole-v1 --evaluate --episodes 20
  rllink-zmq simulate --env CartPole-v1 --episodes 100 --seed 1 --json

Each simulator has its own connection and session, as if it were a process of its own. They wait for a broker and for
training to begin, and say what they wait for."""
)
@click.option(
    "--env", required=True, metavar="ID",
    help="A Gymnasium id; 'module:Name-v0' imports the module first. Of several agents: 'pettingzoo:classic/rps_v2', "
    "or a function or class, 'module:name'.",
)  # fmt: skip
@click.option("--broker", default="tcp://127.0.0.1:5555", show_default=True, help="The broker's frontend address.")
@click.option("--num", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Simulators.")
@click.option(
    "--vector", type=click.IntRange(1, 100_000), metavar="N",
    help="Each simulator is a vector of N environments, which act together over one connection.",
)  # fmt: skip
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="Spread over so many.")
@click.option(
    "--on-backpressure", type=click.Choice(["pause", "drop"]), default="pause", show_default=True,
    help="While the trainer takes no more steps: wait, or go on and drop whole fragments.",
)  # fmt: skip
@click.option(
    "--inference", type=click.Choice(["local", "remote", "auto"]), default="local", show_default=True,
    help="Who computes actions: these processes, the runners, or the runners where these can't.",
)  # fmt: skip
@click.option(
    "--compression", type=click.Choice(["none", "zstd"]), default="none", show_default=True,
    help="Of what is sent: zstd makes images much smaller, for some microseconds a step.",
)  # fmt: skip
@click.option(
    "--evaluate", is_flag=True,
    help="Serve the trainer's evaluations: nothing is trained on, and actions are as its evaluation config says. "
    "Once it has had one, they wait for the next.",
)  # fmt: skip
@click.option("--episodes", type=click.IntRange(1), help="Of each simulator; without it they run until Ctrl-C.")
@click.option("--seed", type=int, help="Of the environments and of the policy's draws.")
@click.option(
    "--audit", type=click.Path(file_okay=False), help="Write a log of every fragment here, for `rllink-zmq audit`."
)
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object as the last line of standard output.")
def command(
    env: str,
    broker: str,
    num: int,
    vector: int | None,
    processes: int,
    on_backpressure: Backpressure,
    inference: Inference,
    compression: str,
    evaluate: bool,
    episodes: int | None,
    seed: int | None,
    audit: str | None,
    json_wanted: bool,
) -> None:
    """Run Gymnasium environments as simulators."""
    output.show_logs()
    parse_address(broker)
    check_env(env)
    compressed: Compression | None = "zstd" if compression == "zstd" else None
    check_compression(compressed)
    if audit is not None:
        check_directory(Path(audit))
    processes = min(processes, num)
    plans, first = [], 0
    for i in range(processes):
        count = num // processes + (i < num % processes)
        plans.append(
            Plan(
                env,
                broker,
                first,
                count,
                episodes,
                seed,
                audit,
                on_backpressure,
                inference,
                evaluate,
                compressed,
                vector or 0,
            )
        )
        first += count
    started = time.monotonic()
    ending: AbstractContextManager[dict[str, Any]] = output.running() if json_wanted else nullcontext({})
    with ending as so_far, output.Progress() as progress:

        def watch(report: Report) -> None:
            now = time.monotonic()
            so_far.update(as_json(report, num, now - started))
            progress.show(line(report, num, now - started), now)

        watch(NOTHING)
        report = here(plans[0], watch) if processes == 1 else spread(plans, watch)
    wall_s = time.monotonic() - started
    click.echo(line(report, num, wall_s), err=True)
    if json_wanted:
        output.last_line(as_json(report, num, wall_s))
