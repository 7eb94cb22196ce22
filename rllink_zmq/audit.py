"""Audit logs: what was sent, what became of it, and what reached a train batch, as each process saw it.

One file a process and side, `<side>-<host>-<pid>-<random>.jsonl`, one JSON object a line; `docs/audit.md` says what
each line means. `Log` writes one, `read` reads them all, and `audit_judge` compares them.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import msgspec

from rllink_zmq import __version__
from rllink_zmq.errors import RllinkError, SettingsError

log = logging.getLogger("rllink_zmq")

FORMAT = 1
"""Of these files. Fields may be added under the same number."""

Side = Literal["simulator", "runner", "learner"]
SIDES: tuple[Side, ...] = ("simulator", "runner", "learner")
"""In the order a fragment meets them, which is also the order to read them in while they are being written: what is
seen as delivered was handed over before."""

SUFFIX = ".jsonl"
NAME = re.compile(rf"({'|'.join(SIDES)})-.+{re.escape(SUFFIX)}")


class AuditError(RllinkError):
    """These logs can't be judged."""


class Line(msgspec.Struct, frozen=True, tag_field="event", kw_only=True):
    """`time`: Unix seconds, for people; the judgement doesn't look at it. `session`: 32 hex digits."""

    time: float


class Opened(Line, tag="opened", frozen=True, kw_only=True):
    """The first line of a file."""

    format: int
    side: Side
    host: str
    pid: int
    package: str


class Sent(Line, tag="sent", frozen=True, kw_only=True):
    """Simulator: a fragment was submitted. `run`, `version`: of its weights."""

    session: str
    number: int
    steps: int
    run: str
    version: int


class Settled(Line, tag="settled", frozen=True, kw_only=True):
    """Simulator: it was told a fragment's outcome."""

    session: str
    number: int
    outcome: str


class Closed(Line, tag="closed", frozen=True, kw_only=True):
    """Simulator: the session ended, with so many fragments unsettled."""

    session: str
    unsettled: int


class Handed(Line, tag="handed", frozen=True, kw_only=True):
    """Runner: `sample()` gives a fragment to RLlib. The order of these lines is the order of the hand-overs."""

    session: str
    number: int
    steps: int


class Entered(Line, tag="entered", frozen=True, kw_only=True):
    """Learner: env steps `first` .. `first + steps - 1` of a fragment entered train batch `batch` of this process."""

    session: str
    number: int
    first: int
    steps: int
    batch: int


class Unnamed(Line, tag="unnamed", frozen=True, kw_only=True):
    """Learner: so many env steps of a train batch don't say of which fragment they are."""

    steps: int
    batch: int


AnyLine = Opened | Sent | Settled | Closed | Handed | Entered | Unnamed

_decoder: msgspec.json.Decoder[AnyLine] = msgspec.json.Decoder(AnyLine)
_encode = msgspec.json.Encoder().encode


# ---- writing


class Run(NamedTuple):
    """Env steps `first` .. `first + steps - 1` of a fragment, next to each other in an episode. `session`: hex."""

    session: str
    number: int
    first: int
    steps: int


class Log:
    """Writes one file, made at the first line. Every call is one `write` of whole lines and nothing is kept back: a
    process that is killed has told all but what it was just telling.

    A copy in another process (forked or sent there) writes a file of its own. A disk that fails ends the log with an
    error in the program's log, not the program.
    """

    def __init__(self, directory: str | os.PathLike[str], side: Side) -> None:
        self.directory = Path(directory).expanduser().absolute()
        self.side = side
        self.path: Path | None = None
        self._file = -1
        self._pid = 0

    @classmethod
    def shared(cls, directory: str | os.PathLike[str], side: Side) -> Log:
        """This process's one for this directory and side, as long as somebody holds it."""
        key = (Path(directory).expanduser().absolute(), side)
        found = _shared.get(key)
        if found is None:
            found = _shared[key] = cls(directory, side)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Log, (self.directory, self.side)

    def __del__(self) -> None:
        if self._file >= 0 and self._pid == os.getpid():
            os.close(self._file)

    def open(self) -> None:
        """Make the file, if that isn't done. Raises SettingsError if it can't be."""
        pid = os.getpid()
        if self._pid == pid:
            return
        if self._file >= 0:  # the parent's: ours from here on is another
            os.close(self._file)
            self._file = -1
        host = socket.gethostname()
        name = f"{self.side}-{re.sub(r'[^A-Za-z0-9.]', '_', host)}-{pid}-{secrets.token_hex(4)}{SUFFIX}"
        check_directory(self.directory)
        try:
            self._file = os.open(self.directory / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as e:
            raise SettingsError(f"the audit log {self.directory / name} can't be made: {e.strerror}") from None
        self._pid, self.path = pid, self.directory / name
        self._write([Opened(time=_now(), format=FORMAT, side=self.side, host=host, pid=pid, package=__version__)])

    def sent(self, session: bytes, number: int, steps: int, run: str, version: int) -> None:
        """A fragment was submitted. To be told before it can leave."""
        self._tell([Sent(time=_now(), session=session.hex(), number=number, steps=steps, run=run, version=version)])

    def settled(self, session: bytes, number: int, outcome: str) -> None:
        """A fragment has an outcome."""
        self._tell([Settled(time=_now(), session=session.hex(), number=number, outcome=outcome)])

    def closed(self, session: bytes, unsettled: int) -> None:
        """A session has ended."""
        self._tell([Closed(time=_now(), session=session.hex(), unsettled=unsettled)])

    def handed(self, fragments: Iterable[tuple[bytes, int, int]]) -> None:
        """These (session, number, steps) are about to be RLlib's, in this order."""
        now = _now()
        self._tell([Handed(time=now, session=s.hex(), number=n, steps=steps) for s, n, steps in fragments])

    def entered(self, runs: Iterable[Run], unnamed: int, batch: int) -> None:
        """These steps entered a train batch, and `unnamed` others."""
        now = _now()
        lines: list[Line] = [
            Entered(time=now, session=r.session, number=r.number, first=r.first, steps=r.steps, batch=batch)
            for r in runs
        ]
        if unnamed:
            lines.append(Unnamed(time=now, steps=unnamed, batch=batch))
        self._tell(lines)

    def _tell(self, lines: Sequence[Line]) -> None:
        self.open()
        if lines:
            self._write(lines)

    def _write(self, lines: Sequence[Line]) -> None:
        if self._file < 0:
            return
        text = b"".join(_encode(line) + b"\n" for line in lines)
        try:
            while text:
                text = text[os.write(self._file, text) :]
        except OSError as e:
            log.error("the audit log %s ends here, it can't be written: %s", self.path, e.strerror)
            os.close(self._file)
            self._file = -1


_shared: WeakValueDictionary[tuple[Path, str], Log] = WeakValueDictionary()


def check_directory(directory: Path) -> None:
    """Make it, if it isn't there. Raises SettingsError if logs can't be written into it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SettingsError(f"the audit directory {directory} can't be made: {e.strerror}") from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise SettingsError(f"the audit directory {directory} can't be written to")


def _now() -> float:
    return round(time.time(), 3)


# ---- reading


class Records(NamedTuple):
    """One file. `torn`: its last line was not finished, and is left out."""

    name: str
    side: Side
    lines: tuple[AnyLine, ...]
    torn: bool


def read(directories: Iterable[Path]) -> list[Records]:
    """All logs in these directories and beneath, simulators' first. A log that was copied counts once.

    Raises AuditError for a directory that doesn't exist or holds no log, a file that is none of ours, and when only one
    side's logs are there.
    """
    found: dict[str, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise AuditError(
                f"{directory} is no directory: give what `simulate --audit` and `train --audit` were given"
            )
        here = [path for path in directory.rglob(f"*{SUFFIX}") if NAME.fullmatch(path.name)]
        if not here:
            raise AuditError(
                f"there are no audit logs in {directory}: `simulate --audit {directory}` and "
                f"`train --audit {directory}` write them"
            )
        for path in here:
            if path.name not in found or path.stat().st_size > found[path.name].stat().st_size:
                found[path.name] = path
    logs = [read_one(found[name]) for side in SIDES for name in sorted(found) if name.startswith(f"{side}-")]
    _check_sides({records.side for records in logs if records.lines})
    return logs


def _check_sides(sides: set[Side]) -> None:
    if "simulator" not in sides:
        raise AuditError(
            "no simulator's log is there: run `rllink-zmq simulate --audit DIR` (or connect(..., audit=DIR)), and give "
            "the directories of all hosts"
        )
    if "learner" not in sides:
        raise AuditError(
            "no learner's log is there: nothing has entered a train batch, or training ran without "
            "`rllink-zmq train --audit DIR` (attach(..., audit=DIR)), or its directory was not given"
        )


def read_one(path: Path) -> Records:
    """One log. Raises AuditError for a line that is none of ours, but for a last one without its end."""
    lines: list[AnyLine] = []
    torn = False
    try:
        for number, (text, whole) in enumerate(_split(path.read_bytes()), 1):
            if not whole:
                torn = True
                break
            try:
                lines.append(_decoder.decode(text))
            except msgspec.DecodeError as e:
                raise AuditError(f"{path}, line {number}, is no line of an audit log: {e}") from None
    except OSError as e:
        raise AuditError(f"{path} can't be read: {e.strerror}") from None
    side = SIDES[0]
    if lines:
        first = lines[0]
        if not isinstance(first, Opened):
            raise AuditError(f"{path} does not begin as an audit log does, with the event 'opened'")
        if first.format != FORMAT:
            raise AuditError(f"{path} is of format {first.format}, this is {FORMAT}: use rllink-zmq {first.package}")
        side = first.side
    return Records(path.name, side, tuple(lines[1:]) if lines else (), torn)


def _split(text: bytes) -> Iterator[tuple[bytes, bool]]:
    *whole, last = text.split(b"\n")
    for line in whole:
        yield line, True
    if last:
        yield last, False
