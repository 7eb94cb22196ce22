"""How commands speak and end.

- People read stderr: log lines, progress. Programs read stdout: JSON, one object a line; the last line is the result.
- An error we know is one line, "Error: ...", exit code 1; a wrong option is click's, exit code 2.
- Ctrl-C and SIGTERM stop cleanly. Work that was interrupted before it was done ends with 130 or 143.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from rllink_zmq.errors import RllinkError

LEVELS = ("debug", "info", "warning", "error")
SIGNALS = (signal.SIGINT, signal.SIGTERM)

SAME_SIGNAL_S = 0.3
"""Seconds within which a signal that comes again is the same one: timeout(1) and shells send it to a process and to its
group. It must not break off what the first one has begun to end."""

RAY_SETTINGS = {
    # How long a call of an actor that has died waits for the cause of its death, before RLlib hears of it at all.
    "RAY_timeout_ms_task_wait_for_death_info": "100",
    # Ray's own is 15: runners that share CPUs with simulators would be starved by them.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "PYTHONWARNINGS": "ignore::DeprecationWarning",
}


class Interrupted(BaseException):
    """A signal ended the command before its work was done. Not an `Exception`: nothing on the way should swallow it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return Interrupted, (self.signum,)  # Ray copies what it finds as the cause of an exception


class Stop:
    """Whether somebody asked to stop: true once a signal came. `signum` is the first one, 0 before it."""

    def __init__(self) -> None:
        self.signum = 0
        self._asked = threading.Event()

    def __bool__(self) -> bool:
        return self._asked.is_set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but not longer than until somebody asks to stop. True when somebody did."""
        return self._asked.wait(seconds)

    def ask(self, signum: int = 0) -> None:
        self.signum = self.signum or signum
        self._asked.set()

    def interrupted(self) -> Interrupted:
        """To be raised by a command whose work is not done."""
        return Interrupted(self.signum or signal.SIGINT)


@contextmanager
def stopping(on_stop: Callable[[], None] | None = None) -> Iterator[Stop]:
    """SIGINT and SIGTERM ask the block to stop: `Stop` becomes true and `on_stop` is called, in the main thread,
    between two instructions (it should do no more than set something). A second signal of the same block interrupts it
    at once with `Interrupted`. Signals are left alone in any thread but the main one."""
    stop = Stop()

    def handle(signum: int, _: FrameType | None) -> None:
        again = bool(stop)
        stop.ask(signum)
        if again:
            raise Interrupted(signum)
        if on_stop is not None:
            on_stop()

    with _handling(handle):
        yield stop


@contextmanager
def running() -> Iterator[dict[str, Any]]:
    """Around work that has a result only at its end: keep in the dict what is reached so far. When a signal interrupts
    the work this is printed as the last line, with `interrupted` naming the signal."""
    so_far: dict[str, Any] = {}
    try:
        yield so_far
    except (Interrupted, KeyboardInterrupt, SystemExit, SystemError) as e:
        signum = _signal_of(e)
        if signum:
            last_line({**so_far, "interrupted": signal.Signals(signum).name})
        raise


@contextmanager
def ending(ctx: click.Context) -> Iterator[None]:
    """Around a whole command: known errors become one line and exit code 1, signals 128 + their number."""

    def handle(signum: int, _: FrameType | None) -> None:
        raise Interrupted(signum)

    try:
        with _handling(handle):
            yield
    except RllinkError as e:
        raise click.ClickException(" ".join(str(e).split())) from e
    except (Interrupted, KeyboardInterrupt, SystemExit, SystemError) as e:
        signum = _signal_of(e)
        if not signum:
            raise
        click.echo("Interrupted." if signum == signal.SIGINT else "Terminated.", err=True)
        ctx.exit(128 + signum)


def _signal_of(error: BaseException) -> int:
    """The signal that ended the work, 0 for none."""
    if isinstance(error, Interrupted):
        return error.signum
    if isinstance(error, SystemError):  # Ray's compiled code was interrupted, and tells it so
        return error.__cause__.signum if isinstance(error.__cause__, Interrupted) else 0
    if isinstance(error, SystemExit):
        # Ray replaces our handler of SIGTERM by its own, which exits with the signal's number.
        return signal.SIGTERM if error.code == signal.SIGTERM else 0
    return signal.SIGINT


@contextmanager
def _handling(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    last: dict[int, float] = {}

    def once(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - last.get(signum, -SAME_SIGNAL_S) >= SAME_SIGNAL_S:
            last[signum] = now
            handle(signum, frame)

    before = {s: signal.signal(s, once) for s in SIGNALS}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)


def last_line(value: Mapping[str, Any]) -> None:
    """The result: one JSON object on one line of stdout."""
    click.echo(json.dumps(value, separators=(", ", ": "), default=str))


def on_terminal() -> bool:
    """Somebody watches: stderr is a terminal. What is drawn goes there, stdout stays for results."""
    return sys.stderr.isatty()


def show_logs(level: str = "info") -> None:
    """Log lines of this package go to stderr: coloured on a terminal, plain elsewhere."""
    handler: logging.Handler
    if on_terminal():
        from rich.console import Console
        from rich.logging import RichHandler

        handler = RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=False)
        handler.setFormatter(logging.Formatter("%(message)s", "%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("rllink_zmq")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


def prepare_ray() -> None:
    """To be called before ray is imported: no usage report, no banner for each worker, no advice on metrics; a death is
    told at once."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)


class Progress:
    """One line about where a long work is: redrawn on a terminal, else a plain line every `every` seconds at most.

    Use as a context manager; `show(text, now)` as often as you like, `now` being monotonic seconds.
    """

    def __init__(self, every: float = 5.0) -> None:
        self._every = every
        self._shown: float | None = None
        self._live: Any = None

    def __enter__(self) -> Progress:
        if on_terminal():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.__exit__(None, None, None)
            self._live = None

    def show(self, text: str, now: float) -> None:
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(text))
        elif self._shown is None or now - self._shown >= self._every:
            self._shown = now
            click.echo(text, err=True)
