"""Talks to a broker's HTTP admin."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import click

from rllink_zmq.errors import ConnectionTimeout, RllinkError, SettingsError

TIMEOUT = 5.0
"""Seconds the admin has to answer."""

LARGEST = 64 * 1024 * 1024
"""Bytes: a longer answer is not from a broker."""

option = click.option(
    "--admin", default="http://127.0.0.1:5580", show_default=True, metavar="URL", help="The broker's --admin address."
)


class AdminError(RllinkError):
    """What answers at the admin's address is not a broker that is well, or it doesn't do what it was asked for."""


def fetch(admin: str) -> dict[str, Any]:
    """The broker's status. `admin`: "http://host:port" or "host:port".

    Raises `SettingsError` for an address that is none, `ConnectionTimeout` when nobody answers, `AdminError` when
    something else than a healthy broker does.
    """
    status = _call(admin, "/status", None)
    if not isinstance(status, dict) or "ledger" not in status:
        raise AdminError(f"what answers at {admin} is not a broker: is this the address of its --admin?")
    return status


def scale(admin: str, runners: int) -> None:
    """Ask for that many runners. Raises as `fetch` does, and `AdminError` when there is no trainer."""
    _call(admin, "/scale", {"runners": runners})


def _call(admin: str, path: str, body: dict[str, Any] | None) -> Any:
    """None for an answer that is no JSON."""
    base = admin.rstrip("/") if "://" in admin else f"http://{admin.rstrip('/')}"
    found = re.fullmatch(r"https?://(\[[0-9a-fA-F:.]+\]|[^\s:/]+)(?::(\d{1,5}))?", base)
    if found is None or int(found[2] or 0) > 65_535:
        raise SettingsError(f"--admin: expected an address like http://127.0.0.1:5580, got {admin!r}")
    # Without a proxy: the admin is on this machine or on its own network.
    opener = build_opener(ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"{base}{path}", data=data, headers={"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=TIMEOUT) as response:
            return json.loads(response.read(LARGEST))
    except HTTPError as e:
        said = _said(e)
        if e.code == 409:
            raise AdminError(said) from None
        raise AdminError(f"the admin at {base} answers {e.code}: {said}") from None
    except (URLError, OSError) as e:
        reason = e.reason if isinstance(e, URLError) else e
        raise ConnectionTimeout(
            f"no broker admin answers at {base}: is `rllink-zmq broker` running there, with this --admin? ({reason})"
        ) from None
    except ValueError:
        return None


def _said(error: HTTPError) -> str:
    try:
        with error:
            return str(json.loads(error.read(65_536))["error"])
    except (ValueError, KeyError, TypeError, OSError):
        return "is this the address of a broker's --admin?"
