"""Fixtures that several files share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

# Before anything imports torch: as many test processes as there are CPUs, and a thread of torch's each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from core_bench import Bench
from processes import broker

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm


def pytest_collection_finish() -> None:
    """What is imported by now, torch and all, stays: the collector of cycles need not look through it again and again,
    which takes a sixth of the time of the simulated worlds."""
    gc.collect()
    gc.freeze()
    if "rllink_zmq.rllib.export" in sys.modules:
        from quick_rllib import quicken

        quicken()


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


@pytest.fixture
def addresses() -> Iterator[dict[str, str]]:
    """Those of a broker process."""
    with broker() as bound:
        yield bound


@pytest.fixture(scope="session")
def ray_environment() -> Iterator[None]:
    """Ray's as `rllink-zmq train` sets it: the tests' simulators would starve runners of a lower priority."""
    from rllink_zmq.cli.output import prepare_ray

    before = dict(os.environ)
    prepare_ray()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def ray_at_the_end(ray_environment: None) -> Iterator[None]:
    import ray

    yield
    ray.shutdown()


@pytest.fixture
def cluster(ray_at_the_end: None) -> None:
    """A Ray for the tests of one process: to start one takes as long as some of them. Those with nodes of their own end
    it, and what RLlib would start for the next ones has no more CPUs than this machine."""
    import ray

    if not ray.is_initialized():
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@pytest.fixture
def built() -> Iterator[list[Algorithm]]:
    """What is put here is stopped at the end."""
    algorithms: list[Algorithm] = []
    yield algorithms
    for algorithm in algorithms:
        algorithm.stop()
