"""`rllink-zmq broker`: the place where simulators and training meet."""

from __future__ import annotations

import gc
import logging
import re
import sys
from typing import Any

import click

from rllink_zmq.errors import SettingsError

from . import output

UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "kib": 1 << 10, "m": 10**6, "mb": 10**6, "mib": 1 << 20,
         "g": 10**9, "gb": 10**9, "gib": 1 << 30}  # fmt: skip

INSECURE = (
    "--insecure: whoever can reach these ports can read the weights, send made-up episodes, and make this process's "
    "memory grow without bound (a message that never ends). Let only machines you trust reach them."
)


class Size(click.ParamType[int]):
    """Bytes: a number with an optional unit, as in 1GiB, 512MB, 65536."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
        if match is None or match[2] not in UNITS or not float(match[1]):
            self.fail(f"expected a size like 1GiB, 512MB or 65536, got {value!r}", param, ctx)
        return int(float(match[1]) * UNITS[match[2]])


@click.command(
    epilog="""\b
Examples:
  rllink-zmq broker
  rllink-zmq broker --memory 4GiB --fragment-bytes 2MiB
  rllink-zmq broker --frontend tcp://10.0.0.1:5555 --insecure
  RLLINK_BROKER_LOG_LEVEL=debug rllink-zmq broker

It runs until Ctrl-C or SIGTERM. On stdout: a line of JSON with the addresses once it is ready (not on a terminal), and
one with the ledger when it stops.""",
)
@click.option(
    "--frontend", default="tcp://127.0.0.1:5555", show_default=True, metavar="ADDRESS", help="Simulators dial this."
)
@click.option(
    "--backend", default="tcp://127.0.0.1:5556", show_default=True, metavar="ADDRESS", help="Training dials this."
)
@click.option(
    "--weights",
    default="tcp://127.0.0.1:5557",
    show_default=True,
    metavar="ADDRESS",
    help="New weights are published here. Simulators are told.",
)
@click.option(
    "--admin",
    default="127.0.0.1:5580",
    show_default=True,
    metavar="HOST:PORT",
    help="HTTP: /healthz, /readyz, /status. 'off' for none.",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Allow addresses that other machines can reach. There is no encryption and nobody is asked for a key: whoever "
    "reaches a port can read the weights, send made-up episodes and make the broker's memory grow without bound.",
)
@click.option(
    "--memory",
    type=Size(),
    default="1GiB",
    show_default=True,
    help="What all fragments in flight may take. Simulators beyond it wait.",
)
@click.option(
    "--fragment-bytes", type=Size(), default="1MiB", show_default=True, help="The largest fragment of an episode."
)
@click.option("--log-level", type=click.Choice(output.LEVELS, case_sensitive=False), default="info", show_default=True)
def command(
    frontend: str,
    backend: str,
    weights: str,
    admin: str,
    insecure: bool,
    memory: int,
    fragment_bytes: int,
    log_level: str,
) -> None:
    """Run the broker that simulators and training meet at.

    Simulators dial the frontend, `rllink-zmq train` dials the backend. An address is like tcp://127.0.0.1:5555, or
    tcp://127.0.0.1:* for any free port.
    """
    from broker.memory import keep_freed_memory
    from broker.server import Server
    from broker.settings import Settings

    output.show_logs(log_level)
    log = logging.getLogger("rllink_zmq.broker")
    try:
        settings = Settings(fragment_bytes=fragment_bytes, memory=memory)
    except ValueError as e:
        raise SettingsError(str(e)) from None
    server = Server(
        settings,
        frontend=frontend,
        backend=backend,
        weights=weights,
        admin=None if admin.lower() in ("", "off", "none") else admin,
        insecure=insecure,
    )
    with output.stopping(server.stop):
        server.bind()
        try:
            if insecure:
                log.warning("%s", INSECURE)
            log.info("simulators dial %s, training dials %s", server.frontend, server.backend)
            log.info("weights are published at %s, status at %s", server.weights, server.admin or "no address")
            if not sys.stdout.isatty():
                addresses = {"frontend": server.frontend, "backend": server.backend, "weights": server.weights}
                output.last_line({"event": "ready", **addresses, "admin": server.admin})
            # What lives long here is what is in flight, none of it in cycles: looking for some took 4 % of the time.
            gc.freeze()
            gc.set_threshold(100_000, 20, 50)
            keep_freed_memory()
            server.run()
            ledger = server.core.ledger.as_json() if server.core is not None else {}
        finally:
            server.close()
        log.info("stopped")
        output.last_line({"event": "stopped", "ledger": ledger})
