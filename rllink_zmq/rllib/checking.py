"""What rows of observations and actions must be to belong to a space, as they travel."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from rllink_zmq.errors import ProtocolError
from rllink_zmq.packing import Packing


def check_rows(
    name: str, rows: NDArray[Any], space: gym.Space[Any], packing: Packing | None = None, *, actions: bool = False
) -> None:
    """Raises `ProtocolError`, with `name` or that of the part, unless (n, *shape) `rows` are of `space`; of a space of
    several parts they are packed by `packing`. `actions`: those of Discrete and MultiDiscrete count from 0."""
    if packing is None:
        _check(name, rows, space, actions)
        return
    if rows.dtype != np.uint8 or rows.shape[1:] != (packing.nbytes,):
        raise ProtocolError(
            f"'{name}' has rows of {rows.dtype}{list(rows.shape[1:])}, {'actions' if actions else 'observations'} "
            f"of this space are packed as uint8[{packing.nbytes}]"
        )
    for part, values in zip(packing.parts, packing.arrays(rows.view(np.uint8)), strict=True):
        _check(part.name, values, part.space, actions)


def _check(name: str, values: NDArray[Any], space: gym.Space[Any], actions: bool) -> None:
    shape = space.shape or ()
    if values.shape[1:] != shape:
        raise ProtocolError(f"'{name}' has rows of shape {list(values.shape[1:])}, the space has {list(shape)}")
    if isinstance(space, gym.spaces.Box) and (values.dtype.kind == "f") != (np.dtype(space.dtype).kind == "f"):
        raise ProtocolError(f"'{name}' is of {values.dtype}, the space of {space.dtype}")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ProtocolError(f"'{name}' holds NaN or infinity")
    if isinstance(space, gym.spaces.Discrete):
        # RLlib's policies count actions from 0, whatever the space's start.
        low = 0 if actions else int(space.start)
        if values.dtype.kind not in "iu" or values.min() < low or values.max() >= low + int(space.n):
            raise ProtocolError(f"'{name}' must be integers from {low} to {low + int(space.n) - 1}")
    elif isinstance(space, gym.spaces.MultiDiscrete):
        lows = np.zeros_like(space.start) if actions else space.start
        within = values.dtype.kind in "iu" and ((values >= lows) & (values < lows + space.nvec)).all()
        if not within:
            raise ProtocolError(f"'{name}' must be integers from {lows.tolist()}, of {space.nvec.tolist()} values")
    elif isinstance(space, gym.spaces.MultiBinary) and not np.isin(values, (0, 1)).all():
        raise ProtocolError(f"'{name}' must be zeros and ones")
