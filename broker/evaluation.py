"""Evaluations: episodes that some runner measures the policy by, and nobody trains on.

An evaluation runner says how many episodes it wants (EVALUATE), simulators are told, and those that serve send their
episodes' fragments with the flag `evaluation`. The rules:

- An episode counts from its first fragment on, or not at all. With that one it takes one of the places that are left;
  all of its fragments go to the runner that it takes the place with. So an evaluation gets the episodes that began
  first, long or short, and not those that ended first.
- A place is free again when its simulator is lost, leaves or has gone on to another episode.
- What has no place is settled at once as `unwanted`; so is what is leased when its evaluation ends. Nothing waits.
- A runner is leased no more than `lease_bytes`; the rest of its episodes waits here, in its order.
- Training's quota, lag, steps ahead and ledger know nothing of all this; there is a ledger apart.
"""

from __future__ import annotations

import logging
import math

from rllink_zmq.messages import EVALUATE, MANY, UNWANTED

from . import peers
from .events import Forward, Received
from .fragments import Fragment, Verb
from .peers import Evaluation, Peer, Runner, Simulator
from .state import BrokerState

SERVES_WITHIN = 5.0
"""Seconds in which a simulator that is asked to serve begins with it, or others are asked as well."""


class Evaluating(BrokerState):
    """Which evaluations want episodes, who serves them, and what goes where."""

    def _on_evaluate(self, runner: Peer, message: EVALUATE, event: Received, now: float) -> None:
        if not isinstance(runner, Runner) or not runner.evaluates:
            return self._refuse(event.side, event.route, "unexpected", "only evaluation runners send EVALUATE", now)
        self._end_evaluation(runner, now)
        if message.episodes:
            runner.evaluation = Evaluation(message.version, message.episodes)
        return self._announce(now)

    def _end_evaluation(self, runner: Runner, now: float) -> None:
        """It wants nothing more. What it has not taken is nobody's."""
        evaluation, runner.evaluation = runner.evaluation, None
        if evaluation is None:
            return
        for sim, episode in evaluation.open:
            del sim.evaluating[episode]
        for fragment in [*runner.leased, *evaluation.waiting]:
            self._drop(fragment, UNWANTED, now)
        self._announce(now)

    # ---- fragments

    def _route_evaluation(self, fragment: Fragment, now: float) -> None:
        """To the runner that its episode has a place with."""
        sim, header = fragment.simulator, fragment.header
        if header.run != self.run:
            return self._drop(fragment, "old_run", now)
        runner = (
            sim.evaluating.get(header.episode) if header.t0 else self._place(sim, header.episode, header.version, now)
        )
        if runner is None or runner.evaluation is None:
            return self._drop(fragment, UNWANTED, now)
        if header.end != "no":
            self._leave_place(sim, header.episode, now)
        runner.evaluation.waiting.append(fragment)
        return self._lease_evaluated(runner)

    def _lease_evaluated(self, runner: Runner) -> None:
        """What waits for this runner, as far as it has room; an idle one always has room for one fragment."""
        waiting, limit = (runner.evaluation.waiting if runner.evaluation else ()), self.settings.lease_bytes
        while waiting and (not runner.leased or runner.leased_bytes + waiting[0].size <= limit):
            fragment = waiting.popleft()
            fragment.move(Verb.LEASE)
            fragment.runner = runner
            runner.lease(fragment)
            self._actions.append(Forward(runner.route, fragment.frames))

    def _place(self, sim: Simulator, episode: str, version: int, now: float) -> Runner | None:
        """Where an episode that begins with these weights is wanted most."""
        for older in list(sim.evaluating)[: max(0, len(sim.evaluating) + 1 - sim.episodes)]:
            self._give_up(sim, older, now)  # it has no more of them at once: its end never came
        best: Runner | None = None
        for runner in self._evaluators():
            evaluation = runner.evaluation
            if evaluation is None or not evaluation.left or version < evaluation.version:
                continue
            if best is None or best.evaluation is None or _need(runner, evaluation) > _need(best, best.evaluation):
                best = runner
        if best is None or best.evaluation is None or episode in sim.evaluating:
            return None
        best.evaluation.left -= 1
        best.evaluation.open[sim, episode] = None
        sim.evaluating[episode] = best
        sim.shirks = False
        self._announce(now)
        return best

    def _leave_place(self, sim: Simulator, episode: str, now: float) -> Runner | None:
        runner = sim.evaluating.pop(episode, None)
        sim.asked_since = now
        if runner is not None and runner.evaluation is not None:
            del runner.evaluation.open[sim, episode]
        return runner

    def _give_up(self, sim: Simulator, episode: str, now: float) -> None:
        """This episode will not come to its end: another one may have its place."""
        runner = self._leave_place(sim, episode, now)
        if runner is not None and runner.evaluation is not None:
            runner.evaluation.left += 1
            self._announce(now)

    def _spoiled(self, fragment: Fragment, now: float) -> None:
        """Its runner can't use it. Another episode may have the place, once."""
        if fragment.header.end == "no":
            self._give_up(fragment.simulator, fragment.header.episode, now)
        elif fragment.runner is not None and fragment.runner.evaluation is not None:
            fragment.runner.evaluation.left += 1  # its episode left the place when it came
            self._announce(now)

    def _give_up_all(self, sim: Simulator, now: float) -> None:
        for episode in list(sim.evaluating):
            self._give_up(sim, episode, now)

    # ---- who serves

    def _evaluators(self) -> list[Runner]:
        return [r for r in peers.live(self.runners) if r.evaluates and r.run == self.run]

    def _announce(self, now: float) -> None:
        """Tell simulators whether an evaluation wants episodes, and which of them are to serve it."""
        open_ = [r.evaluation for r in self._evaluators() if r.evaluation is not None and r.evaluation.left]
        wanted = max((e.version for e in open_), default=-1)
        chosen = self._sharers(sum(e.left for e in open_))
        for sim in chosen.keys() - self.sharers.keys():
            sim.asked_since = now
        if wanted != self.evaluation_version:
            self.evaluation_version = wanted
            changed = self.live_simulators()
            self._say(logging.DEBUG, "evaluation", f"evaluations want episodes of version {wanted}", now)
        else:
            changed = [s for s in self.live_simulators() if (s in chosen) != (s in self.sharers)]
        self.sharers = chosen
        for sim in changed:
            self._mark(sim, now)

    def _watch_sharers(self, now: float) -> None:
        """Once a `probe_interval`: who was asked to serve, and doesn't?"""
        if self.evaluation_version < 0:
            return
        if self.published_version >= self.evaluation_version:  # else they wait for the weights
            for sim in self.sharers:
                if not sim.evaluating and now - sim.asked_since > SERVES_WITHIN:
                    sim.shirks = True
        self._announce(now)  # who serves may have come or gone, too

    def _sharers(self, places: int) -> dict[Simulator, None]:
        """As many simulators as the trainer's share says, always the same ones: of these, the first that are free. Who
        shirks is asked, but doesn't count. Beside a training that an evaluation goes on with, one is left to it."""
        share = self.trainer.hello.evaluation_share if self.trainer is not None else 0.0
        if not share or not places:
            return {}
        sims = [sim for sim in self.live_simulators() if sim.window]
        number = min(math.ceil(share * len(sims)), len(sims) - (places > MANY))
        some = _first(sims, number)
        return dict.fromkeys(_first(sorted(some, key=lambda sim: bool(sim.evaluating)), places))


def _first(sims: list[Simulator], number: int) -> list[Simulator]:
    """So many of them, and those before that shirk."""
    some = list[Simulator]()
    for sim in sims:
        if number <= 0:
            break
        some.append(sim)
        number -= not sim.shirks
    return some


def _need(runner: Runner, evaluation: Evaluation) -> tuple[int, int]:
    """The most places first; between equals the one that was given the least so far."""
    return evaluation.left, -runner.assigned_steps
