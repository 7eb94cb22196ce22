"""`rllink-zmq demo`: a broker, simulators and a trainer, each in its own process, on this machine."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from rllink_zmq.audit import check_directory, read
from rllink_zmq.audit_judge import as_json as verdict_as_json
from rllink_zmq.audit_judge import in_words, judge
from rllink_zmq.errors import RllinkError

from . import output
from .train import progress_line, watch

if TYPE_CHECKING:
    from rllink_zmq.rllib.train import Progress

STOP_RETURN = 450.0
STOP_RETURNS = {"DQN": 150.0, "SAC": 150.0}
"""What CartPole comes to in a minute or two. RLlib makes some 30 updates of DQN a second, whichever way it samples."""

STOP_WITHIN_S = 10.0
PR_SET_PDEATHSIG = 1


def _end_with_parent(parent: int) -> None:
    """In the child: SIGTERM when the demo is gone, however it went. Linux only; elsewhere a killed demo leaves them."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went before
        os._exit(1)


@contextmanager
def _process(
    *arguments: str, stdout: int | None = None, stderr: IO[str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """`rllink-zmq` with these arguments, in a session of its own: Ctrl-C reaches us alone, and we stop it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rllink_zmq.cli", *arguments],
        stdin=subprocess.DEVNULL, stdout=stdout or subprocess.DEVNULL, stderr=stderr, text=True, start_new_session=True,
        preexec_fn=functools.partial(_end_with_parent, os.getpid()) if sys.platform == "linux" else None,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _check(name: str, process: subprocess.Popen[str], said: IO[str]) -> None:
    """Raises `RllinkError` with the last that a process said, if it has ended."""
    if process.poll() is not None:
        said.seek(0)
        last = " / ".join(said.read().splitlines()[-3:])
        raise RllinkError(f"the {name} process ended with exit code {process.returncode}: {last}")


def _addresses(broker: subprocess.Popen[str]) -> dict[str, Any]:
    """What the broker says when it is ready: its addresses."""
    assert broker.stdout is not None
    line = broker.stdout.readline()
    if not line:
        raise RllinkError(f"the broker ended with exit code {broker.wait()} before it was ready")
    addresses: dict[str, Any] = json.loads(line)
    return addresses


def _summary(result: dict[str, Any], reached: bool, wanted: float) -> str:
    ledger = result["ledger"]
    lines = [
        f"{'Reached' if reached else 'Did not reach'} a mean return of {wanted:g}: "
        f"{result['episode_return_mean'] or 0:.1f} after {result['env_steps']} env steps, {result['iterations']} "
        f"iterations, {result['wall_s']:.0f} s of training.",
        "The broker's ledger (fragments, env steps):",
    ]
    rows = [(name, ledger[name]) for name in ("received", "delivered")]
    rows += [(f"dropped: {reason}", count) for reason, count in ledger["dropped"].items()]
    rows += [("in flight", ledger["in_flight"])]
    lines += [f"  {name:22s} {count['fragments']:8d} {count['steps']:10d}" for name, count in rows]
    rest = [sum(count[unit] for _, count in rows[1:]) for unit in ("fragments", "steps")]
    balanced = rest == [ledger["received"]["fragments"], ledger["received"]["steps"]]
    lines.append("  It balances." if balanced else f"  It does NOT balance: the parts add up to {rest}.")
    return "\n".join(lines)


@click.command(
    epilog="""\b
Examples:
  rllink-zmq demo
  rllink-zmq demo --algo APPO --simulators 64
  rllink-zmq demo --env Acrobot-v1 --stop-return -100 --json

It exits with 1 when the return was not reached in time."""
)
@click.option("--env", default="CartPole-v1", show_default=True, help="Gymnasium id.")
@click.option("--algo", type=click.Choice(["PPO", "APPO", "IMPALA", "DQN", "SAC"]), default="PPO", show_default=True)
@click.option("--runners", type=click.IntRange(0), default=2, show_default=True, help="ZmqEnvRunner actors.")
@click.option("--simulators", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--stop-return",
    type=float,
    show_default="450, with DQN and SAC 150",
    help="Stop when the mean return is this high.",
)
@click.option(
    "--stop-time",
    type=click.FloatRange(0, min_open=True),
    default=300.0,
    show_default=True,
    help="Give up after so many seconds.",
)
@click.option("--seed", type=int)
@click.option(
    "--audit",
    type=click.Path(path_type=Path, file_okay=False),
    help="Every process logs each fragment here; at the end the logs are compared, as by `rllink-zmq audit`.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output.")
def command(
    env: str,
    algo: str,
    runners: int,
    simulators: int,
    stop_return: float | None,
    stop_time: float,
    seed: int | None,
    audit: Path | None,
    as_json: bool,
) -> None:
    """Watch a policy learn: broker, training and simulators on this machine, in one go.

    Real processes: the broker is one, the simulators another, each runner a Ray actor, the trainer this one.
    """
    if stop_return is None:
        stop_return = STOP_RETURNS.get(algo, STOP_RETURN)
    output.show_logs()
    output.prepare_ray()
    from rllink_zmq.rllib.train import TrainOptions, train

    more = ["--seed", str(seed)] if seed is not None else []
    if audit is not None:
        check_directory(audit)
        more += ["--audit", str(audit)]
    anywhere = "tcp://127.0.0.1:*"
    with _process(
        "broker", "--frontend", anywhere, "--backend", anywhere, "--weights", anywhere, "--admin", "127.0.0.1:0",
        "--log-level", "warning", stdout=subprocess.PIPE,
    ) as broker:  # fmt: skip
        addresses = _addresses(broker)
        click.echo(
            f"broker      {addresses['frontend']} (simulators), {addresses['backend']} (training)\n"
            f"simulators  {simulators} x {env}\n"
            f"training    {algo}, {runners} runners. Starting Ray takes a few seconds.",
            err=True,
        )
        with (
            tempfile.TemporaryFile("w+") as said,
            _process(
                "simulate", "--env", env, "--broker", addresses["frontend"], "--num", str(simulators), *more,
                stderr=said,
            ) as others,
        ):  # fmt: skip
            options = TrainOptions(
                addresses["backend"], env, algo, runners, stop_return=stop_return, stop_time=stop_time, seed=seed,
                audit=audit,
            )  # fmt: skip

            def work(report: Callable[[Progress], None]) -> tuple[Progress, bool]:
                def checked(progress: Progress) -> None:
                    report(progress)
                    _check("simulators'", others, said)

                return train(options, checked)

            progress, reached = watch(work, as_json)
    result = progress.as_json()
    click.echo(_summary(result, reached, stop_return), err=True)
    verdict = None if audit is None else judge(read([audit]))
    if verdict is not None:
        click.echo(f"The audit: {in_words(verdict)}", err=True)
        result["audit"] = verdict_as_json(verdict)
    if as_json:
        output.last_line(result)
    if verdict is not None and not verdict.holds:
        raise click.ClickException("the audit found promises that were broken")
    if not reached:
        raise click.ClickException(f"the return was not reached: {progress_line(progress).strip()}")
