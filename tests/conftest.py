"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from core_bench import Bench


@pytest.fixture
def benches() -> Iterator[Callable[..., Bench]]:
    """Makes benches; what always holds must hold at the end."""
    made: list[Bench] = []

    def make(**settings: Any) -> Bench:
        made.append(Bench(**settings))
        return made[-1]

    yield make
    for bench in made:
        bench.broker.check_invariants()
