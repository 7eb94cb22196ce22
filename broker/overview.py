"""What `/status` and `/readyz` show: for people, and read alone."""

from __future__ import annotations

from typing import Any

from . import peers
from .events import Side
from .peers import Simulator
from .state import BrokerState

STRAGGLERS = 5
STRAGGLER_S, STRAGGLER_TIMES = 1.0, 4.0
"""A simulator that may go on and has sent nothing for this long, and so many times the median, holds a round back."""


class Overview(BrokerState):
    """How things are."""

    def status(self, now: float) -> dict[str, Any]:
        """What `/status` shows."""
        sims = [p for p in self.routes[Side.FRONT].values() if type(p) is Simulator]
        at_simulators: dict[str, list[int]] = {}
        for sim in self.simulators.values():
            for reason, (fragments, steps) in sim.dropped.items():
                total = at_simulators.setdefault(reason, [0, 0])
                total[0] += fragments
                total[1] += steps
        trainer = self.trainer
        return {
            "epoch": self.epoch.hex(),
            "uptime_s": round(now - self.started, 3),
            "simulators": len(sims),
            "sampled_by": sum(1 for s in sims if s.high),
            "runners": [
                {
                    "name": r.name,
                    "session": r.session.hex(),
                    "state": r.state.value,
                    "pool": "evaluation" if r.evaluates else "training",
                    "duty": r.duty,
                    "run_id": r.run,
                    "leased_steps": r.leased_steps,
                    "taken_fragments": sum(map(len, r.takes.values())),
                    "assigned_steps": r.assigned_steps,
                    "silent_s": round(now - r.heard, 1),
                }
                for r in self.runners.values()
                if r.state is not peers.State.GONE
            ],
            "trainer": None
            if trainer is None or trainer.state is not peers.State.LIVE
            else {
                "name": trainer.name,
                "run_id": trainer.hello.run,
                "runners": trainer.hello.runners,
                "runners_wanted": trainer.hello.runners if self.wanted is None else self.wanted,
                "quota": trainer.hello.quota,
                "lag_limit": trainer.hello.lag_limit,
                "steps_ahead": trainer.hello.steps_ahead,
            },
            "weights": {
                "run_id": self.run,
                "version": self.published_version,
                "bytes": sum(len(m.data) for m in self.modules.values()),
            },
            "policy": self.policy_ready,
            "ledger": self.ledger.as_json(),
            "dropped_at_simulators": {k: {"fragments": v[0], "steps": v[1]} for k, v in sorted(at_simulators.items())},
            "memory": {
                "held_bytes": self.held_bytes,
                "granted_bytes": self.windows,
                "limit_bytes": self.settings.memory,
            },
            "unfinished_episodes": dict(self.unfinished),
            "round": self._round(sims, now),
            "evaluation": self._evaluation(),
            "acting": {
                "services": len(self.services),
                "readers": len(self.readers),
                "open_requests": sum(len(r.requests) for r in self.readers.values()),
                "unserved_requests": len(self.unserved),
                **self.acts,
            },
            "malformed_messages": self.malformed,
            "waiting_for": self.waiting_for(),
        }

    def _evaluation(self) -> dict[str, Any]:
        """What evaluations want, who serves them, and their own ledger."""
        runners = [r for r in self.runners.values() if r.state is peers.State.LIVE and r.evaluates]
        wanted = [r.evaluation for r in runners if r.evaluation is not None]
        return {
            "runners": len(runners),
            "version": self.evaluation_version if self.evaluation_version >= 0 else None,
            "episodes_wanted": sum(e.left for e in wanted),
            "episodes_open": sum(len(e.open) for e in wanted),
            "share": self.trainer.hello.evaluation_share if self.trainer is not None else 0.0,
            "ledger": self.evaluation_ledger.as_json(),
        }

    def _round(self, sims: list[Simulator], now: float) -> dict[str, Any]:
        """How far the steps for the next weights are, and which simulators are waited for."""
        quota = self.trainer.hello.quota if self.trainer is not None else 0
        sims = [s for s in sims if not s.evaluating]
        idle = sorted(now - s.heard_of_steps for s in sims)
        found: list[dict[str, Any]] = []
        if idle and self.pool() and self.round_steps < quota and not self.waiting:
            late = max(STRAGGLER_S, STRAGGLER_TIMES * idle[len(idle) // 2])
            slow = [s for s in sims if now - s.heard_of_steps > late and self._may_go_on(s)]
            slow.sort(key=lambda s: s.heard_of_steps)
            found = [{"name": s.name, "silent_s": round(now - s.heard_of_steps, 1)} for s in slow[:STRAGGLERS]]
        return {"version": self.version, "steps": self.round_steps, "quota": quota, "held_back_by": found}

    def _may_go_on(self, sim: Simulator) -> bool:
        """It has room for more steps than are on their way."""
        limit = self.steps_granted(sim)[0]
        under_way = sum(f.header.steps for f in sim.open.values() if not f.credited)
        return sim.window > 0 and (not limit or sim.taken_steps + under_way < limit)

    def waiting_for(self) -> list[str]:
        """What is missing for training to go on, in words; [] when nothing is."""
        missing = []
        if not self.trained():
            missing.append("a trainer (rllink-zmq train)")
        elif not self.pool():
            none = self.trainer is not None and not self.trainer.hello.runners
            missing.append("a runner: the pool was scaled to 0 (rllink-zmq scale)" if none else "a runner")
        elif not self.policy_ready:
            missing.append("the policy from the trainer")
        elif self.published_version < 0:
            missing.append("the first weights from a runner")
        if not self.simulators_live:
            missing.append("a simulator (rllink-zmq simulate)")
        return missing
