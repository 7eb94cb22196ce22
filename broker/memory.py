"""What this process does with memory that has been freed.

A broker frees as much as it receives, gigabytes a second. glibc gives the end of its heap back to the system whenever
some hundred kilobytes of it are free, and maps large blocks one by one: each fragment then costs page faults, and the
kernel clears the same pages again and again.
"""

from __future__ import annotations

import ctypes
import os

KEPT = 64 << 20
"""Bytes at the end of a heap (there is one for each thread) that stay with the process once they have been used."""

MAPPED = 32 << 20
"""Blocks from this size on are mapped by themselves: the most that glibc allows, more than any frame has."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h, see mallopt(3)

SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
"""Environment variables of glibc's. Whoever sets one of them has chosen."""


def keep_freed_memory() -> bool:
    """Have malloc keep what is freed, within `KEPT`. False where that can't be said (a C library that is not glibc) or
    where somebody has said otherwise (`SETTINGS`)."""
    if any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mapped, kept = mallopt(_M_MMAP_THRESHOLD, MAPPED), mallopt(_M_TRIM_THRESHOLD, KEPT)
    return bool(mapped and kept)
