"""Train RLlib policies inside simulators that run their own loop.

`connect(address)` gives a simulator its `Client`; everything else of this package serves that, or the other end.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rllink_zmq.client import Client as Client
    from rllink_zmq.client import Episode as Episode
    from rllink_zmq.client import connect as connect
    from rllink_zmq.client_agents import AgentsClient as AgentsClient
    from rllink_zmq.client_agents import AgentsEpisode as AgentsEpisode
    from rllink_zmq.client_agents import connect_agents as connect_agents
    from rllink_zmq.drive_loops import drive as drive
    from rllink_zmq.drive_loops_agents import drive_agents as drive_agents
    from rllink_zmq.drive_loops_vector import drive_vector as drive_vector

__version__ = "0.1.0"
__all__ = [
    "AgentsClient", "AgentsEpisode", "Client", "Episode", "__version__", "connect", "connect_agents", "drive",
    "drive_agents", "drive_vector",
]  # fmt: skip

_HOME = {
    "AgentsClient": "client_agents",
    "AgentsEpisode": "client_agents",
    "connect_agents": "client_agents",
    "drive_agents": "drive_loops_agents",
    "Client": "client",
    "Episode": "client",
    "connect": "client",
    "drive": "drive_loops",
    "drive_vector": "drive_loops_vector",
}


def __getattr__(name: str) -> Any:
    # Late, so that a broker host needs no NumPy policy runtime and `import rllink_zmq` costs nothing.
    if name in _HOME:
        return getattr(import_module(f"rllink_zmq.{_HOME[name]}"), name)
    raise AttributeError(f"module 'rllink_zmq' has no attribute {name!r}")
