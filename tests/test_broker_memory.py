"""What is freed stays with the broker's process, so that fragments cost no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from broker.memory import SETTINGS

FAULTS = """
import ctypes, resource, sys
from broker.memory import keep_freed_memory
kept = keep_freed_memory() if "keep" in sys.argv else False
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(200_000) for _ in range(100)]
    for block in blocks:
        ctypes.memset(block, 1, 200_000)
    for block in blocks:
        libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, faults[-1])
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's malloc that is told")


def run(*arguments: str, **environment: str) -> tuple[str, int]:
    """Whether memory is kept, and the page faults of using and freeing 100 blocks of 200 KB once more."""
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS} | environment
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, env=env, timeout=60, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@glibc
def test_what_is_used_again_costs_no_page_faults() -> None:
    kept, faults = run("keep")
    assert kept == "True"
    # By default the same blocks fault for each page again, or for each group of pages that the kernel makes at once.
    assert 10 * faults < run()[1]


@glibc
def test_who_has_set_malloc_otherwise_is_heard() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
