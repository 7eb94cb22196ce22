"""Which runner gets the next fragment. A plain function over loads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Load(Protocol):
    """What is known of a runner: fragments leased to it and not yet taken, and all it was ever leased."""

    leased_steps: int
    leased_bytes: int
    assigned_steps: int


L = TypeVar("L", bound=Load)


def choose(
    loads: Iterable[L], size: int, limit: int, preferred: L | None = None, steps: int = 0, most_steps: int = 0
) -> L | None:
    """The runner for a fragment of `size` bytes and so many `steps`, or None when no runner has room for it.

    The one with the fewest steps to do; between equals the one that was given the least so far. `preferred`, which
    has the episode's earlier fragments, keeps it unless it is full or has more than twice the least to do.
    A runner has room while its leased bytes stay within `limit`, and its leased steps within `most_steps` (0 = any
    number); an idle one always has room for one fragment.
    """
    best: L | None = None
    for load in loads:
        if _full(load, size, limit, steps, most_steps):
            continue
        if (
            best is None
            or load.leased_steps < best.leased_steps
            or (load.leased_steps == best.leased_steps and load.assigned_steps < best.assigned_steps)
        ):
            best = load
    if best is None or preferred is None or preferred is best:
        return best
    if _full(preferred, size, limit, steps, most_steps):
        return best
    if preferred.leased_steps > 2 * best.leased_steps + 1:
        return best
    return preferred


def _full(load: Load, size: int, limit: int, steps: int, most_steps: int) -> bool:
    if not load.leased_bytes:
        return False
    return load.leased_bytes + size > limit or (0 < most_steps < load.leased_steps + steps)
