"""`rllink-zmq train`."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rllink_zmq import __version__
from rllink_zmq.audit import check_directory
from rllink_zmq.session_runner import ObserverSession
from rllink_zmq.transport import Connection

from . import output

if TYPE_CHECKING:
    from rllink_zmq.rllib.train import Progress

logger = logging.getLogger("rllink_zmq")

SAY_AFTER = 3.0
"""Seconds of waiting after which a person is told what for, again and again."""


def progress_line(progress: Progress) -> str:
    """One iteration in one line."""
    mean = progress.episode_return_mean
    link = progress.link
    dropped = (link.get("ledger") or {}).get("dropped") or {}
    lost = ", ".join(f"{reason} {count['fragments']}" for reason, count in dropped.items() if count["fragments"])
    return (
        f"iteration {progress.iterations:4d}  steps {progress.env_steps:8d}  "
        f"return {'     -' if mean is None else f'{mean:6.1f}'}  simulators {link.get('simulators', 0):3d}  "
        f"weights v{link.get('version', -1)}  lag {'-' if progress.lag_mean is None else f'{progress.lag_mean:.1f}'}  "
        f"{progress.wall_s:6.1f} s{f'  dropped: {lost}' if lost else ''}"
    )


def await_broker(address: str) -> None:
    """Wait until a broker answers at `address`, and say so. Before Ray is started: that takes longer than this.

    Raises `SettingsError` for an address that can't be used, `RefusedError` when the broker refuses us.
    """
    session = ObserverSession(secrets.token_bytes(16), name="train", package=__version__)
    connection = Connection(session, address)
    connection.open()
    try:
        waited = 0.0
        while not connection.until(lambda: bool(session.epoch), SAY_AFTER):
            waited += SAY_AFTER
            logger.warning(
                "waiting for the broker at %s (%.0f s): is `rllink-zmq broker` running there?", address, waited
            )
    finally:
        connection.close()


def watch(work: Callable[[Callable[[Progress], None]], tuple[Progress, bool]], as_json: bool) -> tuple[Progress, bool]:
    """Run `work(report)` showing its progress: redrawn on a terminal, a line an iteration elsewhere. Interrupted, what
    was reached so far is still the last line of JSON."""
    ending: AbstractContextManager[dict[str, Any]] = output.running() if as_json else nullcontext({})
    with ending as so_far, output.Progress() as bar:

        def report(progress: Progress) -> None:
            line = progress_line(progress)
            if output.on_terminal():
                bar.show(line, time.monotonic())
            else:
                click.echo(line, err=True)
            so_far.update(progress.as_json())

        return work(report)


@click.command(
    epilog="""\b
Examples:
  rllink-zmq train --env CartPole-v1 --stop-return 450
  rllink-zmq train --broker tcp://10.0.0.5:5556 --runners 8 --ray-address auto --checkpoint runs/first
  rllink-zmq train --algo APPO --config appo.yaml --stop-time 600 --json
  rllink-zmq train --resume runs/first --checkpoint runs/first
  rllink-zmq train --checkpoint runs/first --auto-resume

It exits with 1 when --stop-return was asked for and not reached."""
)
@click.option("--broker", default="tcp://127.0.0.1:5556", show_default=True, help="The broker's backend address.")
@click.option("--env", help="Gymnasium id, for its spaces alone. Without it: the spaces of the first simulator.")
@click.option("--algo", type=click.Choice(["PPO", "APPO", "IMPALA", "DQN", "SAC"]), default="PPO", show_default=True)
@click.option(
    "--runners", type=click.IntRange(0), help="ZmqEnvRunner actors.  [default: 2, or as many as the checkpoint had]"
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="YAML of AlgorithmConfig settings, `model_config`, and `rllink: {lag_limit, steps_ahead, fragment_steps, "
    "act_rows, act_wait_s}`.",
)
@click.option("--stop-return", type=float, help="Stop when the mean return is this high.")
@click.option("--stop-steps", type=click.IntRange(1), help="Stop after so many env steps.")
@click.option("--stop-time", type=click.FloatRange(0, min_open=True), help="Stop after so many seconds of training.")
@click.option(
    "--checkpoint", type=click.Path(path_type=Path, file_okay=False), help="Save here, every minute and last."
)
@click.option(
    "--resume", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Go on from a checkpoint."
)
@click.option("--auto-resume", is_flag=True, help="Go on from --checkpoint if there is one already, else begin anew.")
@click.option("--ray-address", help="Join this Ray cluster ('auto' finds one); without it Ray starts here.")
@click.option("--seed", type=int)
@click.option(
    "--audit",
    type=click.Path(path_type=Path, file_okay=False),
    help="Runners and learners log every fragment here, each on its host, for `rllink-zmq audit`.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output.")
def command(
    broker: str,
    env: str | None,
    algo: str,
    runners: int | None,
    config: Path | None,
    stop_return: float | None,
    stop_steps: int | None,
    stop_time: float | None,
    checkpoint: Path | None,
    resume: Path | None,
    auto_resume: bool,
    ray_address: str | None,
    seed: int | None,
    audit: Path | None,
    as_json: bool,
) -> None:
    """Train a policy on whatever simulators are connected to a broker."""
    if auto_resume and (checkpoint is None or resume is not None):
        raise click.UsageError(
            "--auto-resume goes on from where --checkpoint saves: give --checkpoint, and no --resume"
        )
    output.show_logs()
    output.prepare_ray()
    if audit is not None:
        check_directory(audit)
    await_broker(broker)
    from rllink_zmq.rllib.train import TrainOptions, has_checkpoint, newest_checkpoint, train

    if auto_resume and checkpoint is not None and has_checkpoint(checkpoint):
        resume = checkpoint
    if resume is not None:
        newest_checkpoint(resume)
    options = TrainOptions(
        broker, env, algo, runners, config, stop_return, stop_steps, stop_time, checkpoint, resume, ray_address, seed,
        audit,
    )  # fmt: skip
    progress, reached = watch(lambda report: train(options, report), as_json)
    if as_json:
        output.last_line(progress.as_json())
    if not reached:
        raise click.ClickException(f"the mean return did not reach {stop_return:g}: {progress_line(progress).strip()}")
