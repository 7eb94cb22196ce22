"""Train RLlib policies inside simulators that run their own loop.

`connect(address)` gives a simulator its `Client`; everything else of this package serves that, or the other end.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rllink_zmq.client import Client as Client
    from rllink_zmq.client import Episode as Episode
    from rllink_zmq.client import connect as connect
    from rllink_zmq.drive_loops import drive as drive
    from rllink_zmq.drive_loops import drive_vector as drive_vector

__version__ = "0.1.0"
__all__ = ["Client", "Episode", "__version__", "connect", "drive", "drive_vector"]

_HOME = {
    "Client": "client",
    "Episode": "client",
    "connect": "client",
    "drive": "drive_loops",
    "drive_vector": "drive_loops",
}


def __getattr__(name: str) -> Any:
    # Late, so that a broker host needs no NumPy policy runtime and `import rllink_zmq` costs nothing.
    if name in _HOME:
        return getattr(import_module(f"rllink_zmq.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rllink_zmq' has no attribute {name!r}")
