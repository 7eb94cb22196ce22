"""The tests' own exports are those that torch makes."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from quick_exports import DONE_ONCE
from test_export import SMALL, ppo_module

from rllink_zmq.rllib.export import export_policy


def test_a_policy_is_the_same_as_torchs_exporter_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = Box(-1, 1, (3,), np.float32), Discrete(2)
    module = ppo_module(*spaces, **SMALL)
    quick = [export_policy(module, *spaces) for _ in range(2)]
    for owner, name in DONE_ONCE:
        monkeypatch.setattr(owner, name, staticmethod(getattr(owner, name).__wrapped__))
    assert quick == [export_policy(module, *spaces)] * 2
