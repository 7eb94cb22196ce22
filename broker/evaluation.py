"""Evaluations: episodes that some runner measures the policy by, and nobody trains on.

An evaluation runner says how many episodes it wants (EVALUATE), simulators are told, and those that serve send their
episodes' fragments with the flag `evaluation`. The rules:

- An episode counts from its first fragment on, or not at all. With that one it takes one of the places that are left;
  all of its fragments go to the runner that it takes the place with. So an evaluation gets the episodes that began
  first, long or short, and not those that ended first.
- A place is free again when its simulator is lost, leaves or has gone on to another episode.
- What has no place is settled at once as `unwanted`; so is what is leased when its evaluation ends. Nothing waits.
- Training's quota, lag, steps ahead and ledger know nothing of all this; there is a ledger apart.
"""

from __future__ import annotations

import logging
import math

from rllink_zmq.messages import EVALUATE, UNWANTED

from . import peers
from .events import Forward, Received
from .fragments import Fragment, Verb
from .peers import Evaluation, Peer, Runner, Simulator
from .state import BrokerState


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
        for fragment in list(runner.leased):
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
        if runner is None:
            return self._drop(fragment, UNWANTED, now)
        if header.end != "no":
            self._leave_place(sim, header.episode)
        fragment.move(Verb.LEASE)
        fragment.runner = runner
        runner.lease(fragment)
        self._actions.append(Forward(runner.route, fragment.frames))
        return None

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
        self._announce(now)
        return best

    def _leave_place(self, sim: Simulator, episode: str) -> Runner | None:
        runner = sim.evaluating.pop(episode, None)
        if runner is not None and runner.evaluation is not None:
            del runner.evaluation.open[sim, episode]
        return runner

    def _give_up(self, sim: Simulator, episode: str, now: float) -> None:
        """This episode will not come to its end: another one may have its place."""
        runner = self._leave_place(sim, episode)
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
        if wanted != self.evaluation_version:
            self.evaluation_version = wanted
            changed = self.live_simulators()
            self._say(logging.DEBUG, "evaluation", f"evaluations want episodes of version {wanted}", now)
        else:
            changed = [s for s in self.live_simulators() if (s in chosen) != (s in self.sharers)]
        self.sharers = chosen
        for sim in changed:
            self._mark(sim, now)

    def _sharers(self, places: int) -> dict[Simulator, None]:
        """As many simulators as the trainer's share says, always the same ones: of these, the first that are free."""
        share = self.trainer.hello.evaluation_share if self.trainer is not None else 0.0
        if not share or not places:
            return {}
        sims = [sim for sim in self.live_simulators() if sim.window]
        some = sorted(sims[: math.ceil(share * len(sims))], key=lambda sim: bool(sim.evaluating))
        return dict.fromkeys(some[:places])


def _need(runner: Runner, evaluation: Evaluation) -> tuple[int, int]:
    """The most places first; between equals the one that was given the least so far."""
    return evaluation.left, -runner.assigned_steps
