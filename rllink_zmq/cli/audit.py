"""`rllink-zmq audit`."""

from __future__ import annotations

from pathlib import Path

import click

from rllink_zmq.audit import AuditError, read
from rllink_zmq.audit_judge import as_json, in_words, judge

from . import output


@click.command(
    epilog="""\b
Examples:
  rllink-zmq audit runs/audit
  rllink-zmq audit from-simulator-hosts/* from-ray-hosts/*
  rllink-zmq audit runs/audit --json | tail -1

The logs are those of `rllink-zmq simulate --audit DIR` and `rllink-zmq train --audit DIR`; each process writes its own
on its own host. Exit code 0: every promise was kept; 1: one was broken; 2: these logs can't tell."""
)
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "json_wanted", is_flag=True, help="One JSON object as the last line of standard output.")
def command(directories: tuple[Path, ...], json_wanted: bool) -> None:
    """Say whether each fragment acked as delivered entered a train batch once, none twice, and where the rest ended."""
    try:
        verdict = judge(read(directories))
    except AuditError as e:
        raise click.BadParameter(str(e), param_hint="DIR") from None
    click.echo(in_words(verdict), err=json_wanted)
    if json_wanted:
        output.last_line(as_json(verdict))
    if not verdict.holds:
        raise click.exceptions.Exit(1)
