"""Evaluation with several agents: a real broker, an evaluation runner made by hand, and what a runner builds of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fake_service import service
from fake_training import Training, broker, told, until
from test_client_agents import BODY, MODULES, client, seen, spaces, trained
from test_client_evaluation import Evaluator
from test_drive_agents import Relay

from broker.server import Server
from rllink_zmq.client_agents import AgentsClient
from rllink_zmq.client_flow import EVALUATION_STEPS
from rllink_zmq.drive_loops_agents import drive_agents
from rllink_zmq.fragments_agents import ALL
from rllink_zmq.rllib.multi_agent_episodes import AgentsFinished, MultiAgentEpisodeBuilder
from rllink_zmq.sampling_evaluation import Wanted

World = tuple[Server, Training, Evaluator]


@pytest.fixture
def world() -> Iterator[World]:
    with broker() as server, trained(server) as learner:
        evaluator = Evaluator(server.backend, learner.run)
        yield server, learner, evaluator
        evaluator.stop()


def share(learner: Training, part: float, **more: Any) -> None:
    terms = msgspec.structs.replace(learner.trainer.terms, evaluation_share=part, **more)
    learner._todo.put(lambda: learner.trainer.change(terms, time.monotonic()))


def play(mine: AgentsClient, steps: int, **how: Any) -> bool:
    """`left` and `right` act in turn, with a reward of 0.5 for all that have acted. Whether it was trained on."""
    order = ("left", "right")
    with mine.start_episode(**how) as episode:
        for t in range(steps):
            episode.get_action({order[t % 2]: seen(t % 7)})
            episode.log_returns(dict.fromkeys(order if t else order[:1], 0.5))
        episode.end_episode({order[steps % 2]: seen(0)}, {ALL: True})
    return episode.training_enabled


def builder() -> MultiAgentEpisodeBuilder:
    return MultiAgentEpisodeBuilder(*spaces(), dict.fromkeys(MODULES), lambda agent, *_, **__: "")  # type: ignore[arg-type]


def finished(evaluator: Evaluator) -> list[AgentsFinished]:
    """What a runner makes of the answer: episodes, each in one piece."""
    built, refused = builder().build(evaluator.leases)
    assert not refused and all(one.finished is not None for one in built)
    return [one.finished for one in built if one.finished is not None]


def test_an_episode_for_evaluation_arrives_whole_and_is_not_trained_on(world: World) -> None:
    server, learner, evaluator = world
    steps = 2 * EVALUATION_STEPS
    with client(server) as mine:
        evaluator.evaluate(1, version=2)
        told(mine, 2)
        assert not play(mine, steps, training_enabled=False)
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")
        assert mine.close() == 0
        stats = mine.stats
    parts = evaluator.returned or []
    assert [(m.t0, m.steps, m.end) for m in parts] == [
        (0, 1, "no"), (1, EVALUATION_STEPS, "no"), (EVALUATION_STEPS + 1, EVALUATION_STEPS - 1, "terminated"),
    ]  # fmt: skip
    assert stats.steps == 0 and {r: n for r, (n, _) in stats.outcomes.items()} == {"evaluated": 3}
    assert not learner.taken
    (whole,) = finished(evaluator)
    assert (whole.length, whole.total) == (steps, 0.5 * (2 * steps - 1))
    assert whole.agents == {
        "left": ("frozen", steps // 2, 0.5 * steps), "right": ("learner", steps // 2, 0.5 * (steps - 1)),
    }  # fmt: skip


def test_steps_are_pieces_of_episodes(world: World) -> None:
    server, learner, evaluator = world
    with client(server) as mine:
        evaluator.ask(Wanted(None, 50, 2, True, 60.0))
        told(mine, 2)
        for _ in range(4):
            play(mine, 20, training_enabled=False)
        until(lambda: evaluator.returned is not None, "the evaluation has its steps")
    built, refused = builder().build(evaluator.leases)
    assert not refused and not learner.taken
    assert sum(len(one.episode) for one in built if one.episode is not None) >= 50
    assert [one.finished.length for one in built if one.finished is not None][:2] == [20, 20]


def test_runners_act_for_it(world: World) -> None:
    server, learner, evaluator = world
    with service(server, run=learner.run) as acting:
        acting.versions = {"frozen": 0, "learner": 2, "other": 2}
        with client(server, inference="remote") as mine:
            evaluator.evaluate(1, version=2)
            until(lambda: mine.flow.look() or mine.flow.session.evaluation == 2, "it is told")
            assert not play(mine, 10, training_enabled=False)
            until(lambda: evaluator.returned is not None, "the evaluation has its episode")
        assert set(acting.how) == {(None, True)}, "each request says that it is for evaluation"
    assert [one.length for one in finished(evaluator)] == [10]
    assert not learner.taken


def test_the_first_step_waits_for_the_weights_that_are_evaluated(world: World) -> None:
    server, learner, evaluator = world
    with client(server) as mine:
        told(mine, -1)
        evaluator.evaluate(1, version=3)
        told(mine, 3)
        episode = mine.start_episode(training_enabled=False)
        assert not episode.can_act({"left": seen(0)})
        learner.publish(3, BODY, "learner")
        until(lambda: episode.can_act({"left": seen(0)}), "the weights are there")
        episode.get_action({"left": seen(0)})
        episode.end_episode({"left": seen(0)}, {ALL: True})
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")
    assert [(m.version, m.modules) for m in evaluator.returned or []] == [(3, {"frozen": 0})]


def test_an_episode_is_what_the_trainer_wants_it_for(world: World) -> None:
    server, learner, evaluator = world
    with client(server) as mine:
        evaluator.evaluate(1, version=2)
        told(mine, 2)
        assert not mine.evaluates and play(mine, 5)
        share(learner, 0.5)
        until(lambda: mine.flow.look() or mine.evaluates, "it is asked to serve")
        assert play(mine, 5, training_enabled=True)
        with mine.start_episode() as episode:
            assert not episode.training_enabled
            episode.log_action({"left": seen(0)}, {"left": 1}, {"left": -0.7})
            assert episode.training_enabled, "an evaluation is of the policies' actions"
            episode.end_episode({"left": seen(0)}, {ALL: True})
        assert not play(mine, 5)
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")
        until(lambda: mine.flow.look() or not mine.evaluates, "it is asked no more")
        assert play(mine, 5)
    until(lambda: learner.steps == 16, "what was trained on is taken")


class Runner(Relay):
    """Counts its steps and resets. Without `short` its episodes have no end."""

    possible_agents = ("left", "right")  # type: ignore[assignment]

    def __init__(self, *, short: bool = True) -> None:
        self.short = short
        self.resets = self.total = 0

    def reset(self, **_: Any) -> Any:
        self.resets += 1
        self.t = 0
        return {"left": self._seen()}, {}

    def step(self, actions: Any) -> Any:
        self.t += 1
        self.total += 1
        over = self.short and self.t >= 8
        return {"left": seen(self.t % 7)}, {"left": 1.0}, {"__all__": over}, {"__all__": False}, {}


def test_a_loop_that_is_there_for_evaluations_rests_between_them(world: World) -> None:
    server, learner, evaluator = world
    env = Runner()
    calls, most, rests_until = 0, 0, 0.0

    def stop() -> bool:
        """Two evaluations of three episodes, with a rest after the first."""
        nonlocal calls, most, rests_until
        if calls == 1 and evaluator.returned is not None and mine.flow.session.evaluation < 0:
            if not rests_until and not mine.flow.builders:  # what it is in the middle of goes on to its end
                most, rests_until = env.total, time.monotonic() + 0.3
            assert not rests_until or env.total == most, "it does nothing between them"
        if not calls or (0 < rests_until < time.monotonic() and calls == 1):
            calls += 1
            evaluator.evaluate(3, version=2)
            return False
        return calls == 2 and evaluator.returned is not None

    with client(server, ("left", "right")) as mine:
        drive_agents(mine, env, stop=stop, training_enabled=False)
        assert mine.stats.steps == 0 and set(mine.stats.outcomes) <= {"evaluated", "unwanted"}
    assert calls == 2 and [m.end for m in evaluator.returned or []].count("terminated") == 3
    assert not learner.taken


def test_a_loop_that_waits_for_room_serves_meanwhile(world: World) -> None:
    """Training stands still, its episode would not end, and the loop evaluates all the same."""
    server, learner, evaluator = world
    learner.paused = True
    share(learner, 1.0, steps_ahead=16)
    env = Runner(short=False)
    with client(server, ("left", "right")) as mine:
        until(lambda: mine.flow.look() or mine.flow.session.steps_limit > 0, "the steps are limited")

        def stop() -> bool:
            if env.t == 16 and evaluator.returned is None and not env.short:
                env.short = True
                evaluator.evaluate(2, version=2)
            return evaluator.returned is not None

        env.t = 0
        drive_agents(mine, env, stop=stop)
        assert mine.stats.dropped == {}, "all steps of the episode that was left had been sent"
        learner.paused = False
        assert mine.close() == 0
    assert [one.length for one in finished(evaluator)] == [8, 8]
    assert learner.steps >= 16
