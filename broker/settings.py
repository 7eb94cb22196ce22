"""What a broker can be told, with each default explained. Resolved once, at the edge."""

from __future__ import annotations

from dataclasses import dataclass

MiB = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Times are seconds, sizes are bytes."""

    fragment_bytes: int = 1 * MiB
    """The largest fragment body. Simulators are told and cut there; 36 steps of 84x84x4 bytes fit."""

    memory: int = 1024 * MiB
    """The sum of all windows granted at once: fragments the broker holds never exceed it."""

    window_fragments: int = 2
    """A simulator's window is this many fragments of `fragment_bytes`, so that one can be built while one travels."""

    lease_bytes: int = 8 * MiB
    """Fragments sent to one runner and not yet taken by it. Small, so that a new runner soon gets its share."""

    ack_interval: float = 0.01
    """Outcomes wait this long, so that one ACK carries many."""

    runner_silence: float = 15.0
    """A runner that says nothing for this long is lost: its untaken fragments go to others."""

    runner_grace: float = 10.0
    """A lost runner may come back this long before what it had taken is settled as `handover_cut`."""

    simulator_grace: float = 15.0
    """A lost simulator keeps its window this long."""

    probe_interval: float = 1.0
    """Silent peers are probed this often; a dead connection shows at the probe."""

    simulator_silence: float = 20.0
    """Simulators that said nothing for this long are probed."""

    hold: float = 4.0
    """After its start the broker leases nothing until as many runners greeted as the trainer counts, at most this
    long: a runner of the time before may hold fragments that are about to be resent."""

    outcome_keep: float = 3600.0
    """Outcomes of a simulator that is gone are kept this long, for the case that it comes back and repeats."""

    weights_inline: int = 1 * MiB
    """Weights up to this size are published whole; larger ones are announced and pulled."""

    weights_interval: float = 0.02
    """New weights are fetched from runners at most this often; only the newest matters."""

    act_requests: int = 64
    """Requests for actions that one peer may have open; more are answered with `over_credit`."""

    act_bytes: int = 16 * MiB
    """And the bytes of their observations, unless it is a single request."""

    act_memory: int = 256 * MiB
    """The bytes of all open requests for actions together."""

    act_patience: float = 1.0
    """Requests of a service that answers nothing for this long go to another one, too."""

    transfer_timeout: float = 5.0
    """A transfer (weights, policy) that does not move for this long is begun anew with another offerer."""

    def __post_init__(self) -> None:
        if self.fragment_bytes * self.window_fragments > self.memory:
            raise ValueError(
                f"memory is {self.memory} bytes, but one window takes {self.fragment_bytes * self.window_fragments}: "
                f"raise --memory or lower --fragment-bytes"
            )
