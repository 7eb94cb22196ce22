"""torch's exporter and RLlib's connectors without what they do again and again, for tests, which make hundreds of them.

The exporter makes its table of ONNX functions at each export, and walks through all of torch's operators some fifty
times in one: half of an export's time. Each connector piece reads the source of all functions that are being called, to
know the arguments of the innermost: under pytest 0.05 s for each, and a pipeline has ten.
"""

from __future__ import annotations

import functools
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import torch._export.utils as utils
from ray.rllib.connectors import connector_v2
from torch.onnx._internal.exporter._registration import ONNXRegistry

DONE_ONCE: list[tuple[Any, str]] = [(ONNXRegistry, "from_torchlib"), (utils, "_materialize_cpp_cia_ops")]


def quicken() -> None:
    """From here on this process's exports and connectors are quicker, and the same (`test_quick_rllib.py`)."""
    for owner, name in DONE_ONCE:
        setattr(owner, name, staticmethod(functools.cache(getattr(owner, name))))
    quick = SimpleNamespace(stack=_innermost, getargvalues=inspect.getargvalues)
    connector_v2.inspect = quick  # type: ignore[attr-defined]


def _innermost() -> list[SimpleNamespace]:
    """Of `inspect.stack()`: who calls, and who calls that."""
    caller = sys._getframe(1)
    return [SimpleNamespace(frame=caller), SimpleNamespace(frame=caller.f_back)]
