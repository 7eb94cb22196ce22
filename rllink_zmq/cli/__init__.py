"""The command line: `rllink-zmq <command>`. Commands are loaded when they are used, so that a simulator host, which
has neither ray nor a web server, pays for nothing it doesn't run.

Every option may come from the environment: RLLINK_<COMMAND>_<OPTION>.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any, NamedTuple

import click

from rllink_zmq import __version__

from . import output


class Entry(NamedTuple):
    """`module` exports `command`."""

    module: str
    help: str


COMMANDS = {
    "broker": Entry("rllink_zmq.cli.broker", "Run the broker that simulators and training meet at."),
    "train": Entry("rllink_zmq.cli.train", "Train a policy on whatever simulators are connected."),
    "simulate": Entry("rllink_zmq.cli.simulate", "Run Gymnasium environments as simulators."),
    "scale": Entry("rllink_zmq.cli.scale", "Ask for another number of runners."),
    "status": Entry("rllink_zmq.cli.status", "Show what a broker is doing."),
    "audit": Entry("rllink_zmq.cli.audit", "Compare the logs of simulators and training: was each fragment used once?"),
    "demo": Entry("rllink_zmq.cli.demo", "Broker, training and simulators on this machine, in one go."),
}


class Lazy(MutableMapping[str, click.Command]):
    """name -> command, imported when it is looked up."""

    def __init__(self) -> None:
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            command = import_module(COMMANDS[name].module).command
            assert isinstance(command, click.Command), f"{COMMANDS[name].module}.command is no click command"
            self._loaded[name] = command
        return self._loaded[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands can't be removed")

    def __iter__(self) -> Iterator[str]:
        return iter({**COMMANDS, **self._loaded})

    def __len__(self) -> int:
        return len({**COMMANDS, **self._loaded})


class LazyGroup(click.Group):
    """Lists its commands without importing them, and ends each as `output.ending` says."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        with output.ending(ctx):
            return super().invoke(ctx)


@click.group(
    cls=LazyGroup,
    commands=Lazy(),
    context_settings={"auto_envvar_prefix": "RLLINK", "help_option_names": ["-h", "--help"]},
    epilog="Options may also be environment variables: RLLINK_<COMMAND>_<OPTION>.",
)
@click.version_option(__version__, prog_name="rllink-zmq")
def main() -> None:
    """Train RLlib policies inside simulators that run their own loop."""
