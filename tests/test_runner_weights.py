"""What weights cost a runner that gets them every few milliseconds, as DQN and SAC give them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from small_dqn import dqn

from rllink_zmq.policy import Policy, unpack_policy
from rllink_zmq.rllib import attach, runner
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.runner import ZmqEnvRunner

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Link:
    """Keeps the newest offer, as a `RunnerLink` does."""

    def __init__(self) -> None:
        self.offers = 0
        self.newest: tuple[int, int, Callable[[], bytes]] = (-1, 0, bytes)

    def offer(self, version: int, size: int, load: Callable[[], bytes]) -> None:
        self.offers += 1
        self.newest = (version, size, load)

    def stop(self) -> None: ...


def test_weights_that_nobody_fetches_are_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = attach(dqn(0), "tcp://127.0.0.1:9")
    one = ZmqEnvRunner(config=config, worker_index=0, num_workers=0)
    assert one.module is not None
    blob = policy_of(config, one.module)
    link = Link()
    one._link, one._manifest = link, unpack_policy(blob)[0]  # type: ignore[assignment]
    encoded: list[Any] = []
    real = runner.weights_body
    monkeypatch.setattr(runner, "weights_body", lambda *a, **k: encoded.append(a) or real(*a, **k))
    weights = {"default_policy": one.module.get_state()}
    began = time.process_time()
    for version in range(1, 201):
        one.set_state({"rl_module": weights, "weights_seq_no": version})
    seconds = (time.process_time() - began) / 200
    assert link.offers == 200 and not encoded
    version, size, load = link.newest
    body = load()
    assert (version, len(body), len(encoded)) == (200, size, 1)
    Policy.load(blob).apply(version, body)
    print(f"{seconds * 1e6:.0f} us of CPU for a state that nobody fetches")
    assert seconds < 0.01
