"""The tests' quick exports are those that torch makes, and their connectors those of RLlib."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete
from quick_rllib import DONE_ONCE
from ray.rllib.connectors import connector_v2
from ray.rllib.connectors.env_to_module import MeanStdFilter
from test_export import SMALL, ppo_module

from rllink_zmq.rllib.export import export_policy


def test_a_policy_is_the_same_as_torchs_exporter_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = Box(-1, 1, (3,), np.float32), Discrete(2)
    module = ppo_module(*spaces, **SMALL)
    quick = [export_policy(module, *spaces) for _ in range(2)]
    for owner, name in DONE_ONCE:
        monkeypatch.setattr(owner, name, staticmethod(getattr(owner, name).__wrapped__))
    assert quick == [export_policy(module, *spaces)] * 2


def test_a_connector_knows_the_arguments_that_it_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which RLlib makes it again from a checkpoint."""
    assert connector_v2.inspect is not inspect  # type: ignore[attr-defined]
    quick = MeanStdFilter(multi_agent=True, clip_by_value=3.0).get_ctor_args_and_kwargs()
    monkeypatch.setattr(connector_v2, "inspect", inspect)
    assert quick == MeanStdFilter(multi_agent=True, clip_by_value=3.0).get_ctor_args_and_kwargs()
    assert quick[1]["clip_by_value"] == 3.0
