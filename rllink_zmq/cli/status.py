"""`rllink-zmq status`: what a broker is doing, from its HTTP admin."""

from __future__ import annotations

import sys
from typing import Any

import click

from rllink_zmq.errors import ConnectionTimeout

from . import admin as broker_admin
from . import output
from .admin import fetch

MANY = 1_000_000
"""More episodes than anybody counts: an evaluation by steps takes as many as come."""


def rows(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Status as (what, words)."""
    ledger, weights, memory, process = (status[k] for k in ("ledger", "weights", "memory", "process"))
    trainer = status["trainer"]
    dropped = ", ".join(f"{d['fragments']} {reason}" for reason, d in ledger["dropped"].items()) or "none"
    found = [
        ("broker", f"{status['package']}, up {status['uptime_s']:.0f} s, {process['rss_bytes'] / 1e6:.0f} MB, "
                   f"{process['cpu_s']:.1f} s of CPU"),
        ("simulators", f"{status['simulators']} connected"),
        ("trainer", f"{trainer['name'] or 'unnamed'}, run {trainer['run_id']}" if trainer else "none"),
        ("runners", ", ".join(_runner(r) for r in status["runners"] if r["pool"] == "training") or "none"),
        ("weights", f"version {weights['version']}" if weights["version"] >= 0 else "none yet"),
        ("round", _round(status["round"])),
        ("received", _both(ledger["received"])),
        ("delivered", _both(ledger["delivered"])),
        ("in flight", f"{_both(ledger['in_flight'])}, {memory['held_bytes'] / 1e6:.1f} MB"),
        ("dropped", dropped),
    ]  # fmt: skip
    if any(r["pool"] == "evaluation" for r in status["runners"]) or status["evaluation"]["ledger"]["received"]["steps"]:
        found.append(("evaluation", _evaluation(status)))
    unfinished = {what: n for what, n in status["unfinished_episodes"].items() if n}
    if unfinished:
        found.append(("unfinished episodes", ", ".join(f"{n} {what}" for what, n in unfinished.items())))
    if status["waiting_for"]:
        found.append(("waiting for", ", ".join(status["waiting_for"])))
    return found


def _evaluation(status: dict[str, Any]) -> str:
    evaluation = status["evaluation"]
    runners = ", ".join(_runner(r) for r in status["runners"] if r["pool"] == "evaluation") or "no runner"
    if evaluation["version"] is not None or evaluation["episodes_open"]:
        many = evaluation["episodes_wanted"] > MANY
        wanted = "more are wanted" if many else f"{evaluation['episodes_wanted']} more are wanted"
        now = f"{evaluation['episodes_open']} episodes are open, {wanted}"
    else:
        now = "none is going on"
    return f"{runners}; {now}; {evaluation['ledger']['delivered']['steps']} steps so far"


def _round(round_: dict[str, Any]) -> str:
    slow = ", ".join(f"{s['name'] or 'a simulator'} ({s['silent_s']:.0f} s)" for s in round_["held_back_by"])
    return f"{round_['steps']} of {round_['quota']} steps" + (f", waiting for {slow}" if slow else "")


def _runner(runner: dict[str, Any]) -> str:
    doing = {"serve": "", "park": ", parked", "leave": ", leaving", "end": ", ending"}[runner["duty"]]
    return f"{runner['name'] or runner['session'][:8]} ({runner['state']}{doing})"


def _both(pair: dict[str, int]) -> str:
    return f"{pair['fragments']} fragments, {pair['steps']} steps"


@click.command(
    epilog="""\b
Examples:
  rllink-zmq status
  rllink-zmq status --watch
  rllink-zmq status --json | tail -1
  rllink-zmq status --admin http://10.0.0.1:5580""",
)
@broker_admin.option
@click.option("--watch", is_flag=True, help="Look again every second, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object on the last line of stdout.")
def command(admin: str, watch: bool, as_json: bool) -> None:
    """Show what a broker is doing: who is connected, and its ledger.

    Exit code 1 when no broker answers.
    """
    status = fetch(admin)
    if not watch:
        _show(status, as_json)
        return
    with output.stopping() as stop:
        if sys.stdout.isatty() and not as_json:
            _live(admin, status, stop)
            return
        while not stop:
            _show(status, as_json)
            if not stop.wait(1.0):
                status = fetch(admin)


def _show(status: dict[str, Any], as_json: bool) -> None:
    if as_json:
        output.last_line(status)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(_table(status))
    else:
        for what, words in rows(status):
            click.echo(f"{what}: {words}")


def _table(status: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for what, words in rows(status):
        # Text: names come from peers, and must not be read as markup.
        table.add_row(Text(what, style="bold"), Text(words))
    return table


def _live(admin: str, status: dict[str, Any], stop: output.Stop) -> None:
    """Redraw until somebody stops it. A broker that is restarted meanwhile comes back into view."""
    from rich.live import Live
    from rich.text import Text

    with Live(_table(status), refresh_per_second=4) as live:
        while not stop.wait(1.0):
            try:
                live.update(_table(fetch(admin)))
            except ConnectionTimeout as e:
                live.update(Text(str(e)))
