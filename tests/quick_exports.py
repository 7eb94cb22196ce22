"""torch's exporter without what it does again and again: it makes its table of ONNX functions at each export, and walks
through all of torch's operators some fifty times in one. Together that is half of an export's time, and tests make more
than a hundred."""

from __future__ import annotations

import functools
from typing import Any

import torch._export.utils as utils
from torch.onnx._internal.exporter._registration import ONNXRegistry

DONE_ONCE: list[tuple[Any, str]] = [(ONNXRegistry, "from_torchlib"), (utils, "_materialize_cpp_cia_ops")]


def quicken() -> None:
    """From here on this process's exports are quicker, and answer the same (`test_quick_exports.py`)."""
    for owner, name in DONE_ONCE:
        setattr(owner, name, staticmethod(functools.cache(getattr(owner, name))))
