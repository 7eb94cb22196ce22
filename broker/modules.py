"""The weights of each module: what is published of them, and what is being fetched."""

from __future__ import annotations

from typing import NamedTuple

from rllink_zmq.transfer import Download

from .peers import Runner

TRANSFER_IDLE = 20.0
"""Seconds without a request after which a transfer to simulators is over, or given up."""

KEPT = 4
"""Versions beside the newest that are served to the end. More simulators on slow links than that begin again now and
then, which costs them time; more versions would cost the broker memory."""


class Published(NamedTuple):
    version: int
    data: bytes
    crc: int
    asked: float


class Module:
    """The weights of one module: what is published of them, and what is being fetched. `kept`: older versions that are
    still being sent; `asked`: when the newest was asked for last."""

    __slots__ = ("asked", "crc", "data", "download", "fetched", "fetching", "id", "kept", "published", "source")

    def __init__(self, module: str) -> None:
        self.id = module
        self.published = -1
        self.data = b""
        self.crc = 0
        self.asked = float("-inf")
        self.kept: dict[int, Published] = {}
        self.source: Runner | None = None
        self.fetching = -1
        self.fetched = float("-inf")
        self.download: Download | None = None

    def keep(self, now: float) -> None:
        """Newer weights are here. Those from before are served to the end where a transfer of them is under way: with
        versions that come faster than a slow link can carry one, none would ever arrive."""
        self.kept = {version: kept for version, kept in self.kept.items() if now - kept.asked < TRANSFER_IDLE}
        if self.data and now - self.asked < TRANSFER_IDLE and len(self.kept) < KEPT:
            self.kept[self.published] = Published(self.published, self.data, self.crc, now)
        self.asked = float("-inf")  # nobody has asked for the newer ones yet
