"""Python's collector of cycles, out of the way of what makes thousands of objects and no cycle."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Python's collector of cycles rests. An episode is some 50 new objects, none of them in a cycle, and hundreds at
    once have it look through them, and through all that is there, again and again: a quarter of the time to build."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
