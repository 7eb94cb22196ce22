"""`rllink-zmq status`: what a broker is doing, from its HTTP admin."""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, build_opener

import click

from rllink_zmq.errors import ConnectionTimeout, RllinkError, SettingsError

from . import output

TIMEOUT = 5.0
"""Seconds the admin has to answer."""

LARGEST = 64 * 1024 * 1024
"""Bytes: a longer answer is not from a broker."""


class AdminError(RllinkError):
    """What answers at the admin's address is not a broker that is well."""


def fetch(admin: str) -> dict[str, Any]:
    """The broker's status. `admin`: "http://host:port" or "host:port".

    Raises `SettingsError` for an address that is none, `ConnectionTimeout` when nobody answers, `AdminError` when
    something else than a healthy broker does.
    """
    base = admin.rstrip("/") if "://" in admin else f"http://{admin.rstrip('/')}"
    if re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s:/]+)(:\d{1,5})?", base) is None:
        raise SettingsError(f"--admin: expected an address like http://127.0.0.1:5580, got {admin!r}")
    # Without a proxy: the admin is on this machine or on its own network.
    opener = build_opener(ProxyHandler({}))
    try:
        with opener.open(f"{base}/status", timeout=TIMEOUT) as response:
            status = json.loads(response.read(LARGEST))
    except HTTPError as e:
        raise AdminError(f"the admin at {base} answers {e.code}: {_said(e)}") from None
    except (URLError, OSError) as e:
        reason = e.reason if isinstance(e, URLError) else e
        raise ConnectionTimeout(
            f"no broker admin answers at {base}: is `rllink-zmq broker` running there, with this --admin? ({reason})"
        ) from None
    except ValueError:
        status = None
    if not isinstance(status, dict) or "ledger" not in status:
        raise AdminError(f"what answers at {base} is not a broker: is this the address of its --admin?")
    return status


def _said(error: HTTPError) -> str:
    try:
        with error:
            return str(json.loads(error.read(65_536))["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return "is this the address of a broker's --admin?"


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
        ("runners", ", ".join(f"{r['name'] or r['session'][:8]} ({r['state']})" for r in status["runners"]) or "none"),
        ("weights", f"version {weights['version']}" if weights["version"] >= 0 else "none yet"),
        ("received", _both(ledger["received"])),
        ("delivered", _both(ledger["delivered"])),
        ("in flight", f"{_both(ledger['in_flight'])}, {memory['held_bytes'] / 1e6:.1f} MB"),
        ("dropped", dropped),
    ]  # fmt: skip
    if status["waiting_for"]:
        found.append(("waiting for", ", ".join(status["waiting_for"])))
    return found


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
@click.option(
    "--admin", default="http://127.0.0.1:5580", show_default=True, metavar="URL", help="The broker's --admin address."
)
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
