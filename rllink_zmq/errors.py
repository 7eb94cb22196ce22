"""The tree of errors. Everything this package raises on purpose is an `RllinkError`.

::

    RllinkError
    ├── ProtocolError        bytes that are not a message of this protocol, or a message out of its bounds
    ├── RefusedError         the broker refused this peer for good (`code` says why, `text` what to do)
    ├── ConnectionTimeout    a wait with a deadline ended (also a `TimeoutError`)
    ├── PolicyError          a policy that can't be exported, loaded, fed or that has no weights yet
    ├── EpisodeError         a call out of order, or data that doesn't fit the spaces (also a `ValueError`)
    │   ├── VectorError      a policy that the vector form of a client can't serve
    │   └── RemovedError     what an episode went on with is gone: an agent's policy, or who followed the episode
    ├── SpaceError           a Gymnasium space that this package can't carry (also a `ValueError`)
    └── SettingsError        a setting out of its range, an address that can't be used (also a `ValueError`)

Each message says what was expected, what came, and what to do. `code` is for machines: it travels on the wire
and never changes; the text may.
"""


class RllinkError(Exception):
    """Anything this package raises on purpose."""


class ProtocolError(RllinkError):
    """Bytes that are not a message of this protocol. `code` is what a peer is told in REFUSED."""

    def __init__(self, text: str, code: str = "malformed") -> None:
        super().__init__(text)
        self.code = code


class RefusedError(RllinkError):
    """The broker will not serve this peer. Trying again unchanged is useless."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"the broker refused the connection ({code}): {text}")
        self.code = code
        self.text = text


class ConnectionTimeout(RllinkError, TimeoutError):
    """A wait ended at its deadline. The text says what was waited for."""


class PolicyError(RllinkError):
    """A policy can't be exported, loaded or fed."""


class EpisodeError(RllinkError, ValueError):
    """A call out of order, or an observation, action or reward that doesn't fit."""


class VectorError(EpisodeError):
    """A policy that the vector form of a client can't serve; an episode for each world can."""


class RemovedError(EpisodeError):
    """The policy by which an agent acts was removed from the training, or is another agent's now, or the runner that
    followed the episode is gone: this one can't go on, and the next one can."""


class SpaceError(RllinkError, ValueError):
    """A space this package can't carry over the wire."""


class SettingsError(RllinkError, ValueError):
    """A setting is out of its range or an address can't be used."""
