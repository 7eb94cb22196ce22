"""`rllink-zmq scale`: another number of runners, while training goes on."""

from __future__ import annotations

import time
from typing import Any

import click

from rllink_zmq.errors import ConnectionTimeout
from rllink_zmq.messages import MOST_WANTED

from . import admin as broker_admin
from . import output
from .admin import AdminError, fetch

LOOK_EVERY = 0.5


@click.command(
    epilog="""\b
Examples:
  rllink-zmq scale 8
  rllink-zmq scale 2 --wait
  rllink-zmq scale 0 --admin http://10.0.0.1:5580

With 0 training waits, and goes on when there are runners again. Each runner needs a CPU that Ray has free: its share
is the config's num_cpus_per_env_runner (0.1 unless set).""",
)
@click.argument("number", type=click.IntRange(0, MOST_WANTED), metavar="N")
@broker_admin.option
@click.option("--wait", is_flag=True, help="Return when exactly N runners serve.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=120.0, show_default=True,
    help="Seconds that --wait waits. The exit code is 1 after that.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object as the last line of standard output.")
def command(number: int, admin: str, wait: bool, timeout: float, as_json: bool) -> None:
    """Ask the trainer for N runners."""
    began = time.monotonic()
    broker_admin.scale(admin, number)
    reached = False
    missing = f"asked for {number} runners"
    with output.stopping() as stop:
        while wait and not reached:
            if stop.wait(LOOK_EVERY):
                raise stop.interrupted()
            status = _look(admin)
            reached, missing = _compare(status, number)
            if not reached and time.monotonic() - began > timeout:
                raise AdminError(f"not {number} runners after {timeout:g} s: {missing}")
    waited = time.monotonic() - began
    click.echo(f"{number} runners serve, after {waited:.1f} s" if reached else missing, err=True)
    if as_json:
        output.last_line({"runners": number, "reached": reached, "wall_s": round(waited, 3)})


def _look(admin: str) -> dict[str, Any] | None:
    """None while the broker is away: it may be being restarted."""
    try:
        return fetch(admin)
    except ConnectionTimeout:
        return None


def _compare(status: dict[str, Any] | None, number: int) -> tuple[bool, str]:
    """Whether exactly `number` runners serve, and how it stands in words."""
    if status is None:
        return False, "the broker does not answer"
    trainer = status["trainer"]
    if trainer is None:
        return False, "the trainer is gone"
    if trainer["runners_wanted"] != number:
        return False, f"meanwhile somebody asked for {trainer['runners_wanted']}"
    here = [r for r in status["runners"] if r["run_id"] == trainer["run_id"]]
    serving = sum(r["duty"] == "serve" and r["state"] == "live" for r in here)
    leaving = sum(r["duty"] == "leave" for r in here)
    words = f"{serving} serve" + (f", {leaving} are leaving" if leaving else "")
    return serving == number and not leaving, words
