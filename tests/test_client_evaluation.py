"""Episodes of simulators that RLlib's evaluation counts: a real broker, with an evaluation runner made by hand."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from counting_env import Counting
from fake_service import service
from fake_training import ACTIONS, OBSERVATIONS, RUNS, Training, broker, training, until
from numpy.typing import NDArray
from test_policy import discrete_blob

from broker.server import Server
from rllink_zmq import Client, connect
from rllink_zmq.client_flow import EVALUATION_STEPS, SERVICES_SWITCH
from rllink_zmq.drive_loops import drive, drive_many
from rllink_zmq.messages import FRAGMENT, TrainerHello
from rllink_zmq.sampling import Next
from rllink_zmq.sampling_evaluation import Evaluation, Wanted
from rllink_zmq.session import State
from rllink_zmq.session_evaluator import EvaluatorSession
from rllink_zmq.transport import Connection, poll

SPACES: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
World = tuple[Server, Training, "Evaluator"]


class Evaluator:
    """An evaluation runner in a thread. `returned`: what the last call that ended has returned, None before."""

    def __init__(self, backend: str) -> None:
        self.session = EvaluatorSession(os.urandom(16), RUNS[0], name="evaluator")
        self.returned: list[FRAGMENT] | None = None
        self._evaluation = Evaluation(self.session)
        self._connection = Connection(self.session, backend)
        self._wanted: Wanted | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        until(lambda: self.session.state is State.LIVE, "the evaluator greets")

    def evaluate(self, episodes: int, version: int = 0) -> None:
        """Begin a call."""
        self.returned = None
        self._wanted = Wanted(episodes, 0, version, True, 60.0)

    def stop(self) -> None:
        self._stop = True
        self._thread.join()

    def _work(self) -> None:
        self._connection.open()
        calling = False
        while not self._stop:
            poll([self._connection], None, 0.002)
            self._connection.look()
            wanted, self._wanted = self._wanted, None
            if wanted is not None:
                self._evaluation.call(wanted, time.monotonic())
                calling = True
            if self._evaluation.step(time.monotonic()) is Next.RETURN and calling:
                calling = False
                self.returned = [lease.message for lease in self._evaluation.take_out()]
            self._connection.flush()
        self._connection.close()


@pytest.fixture
def world() -> Iterator[World]:
    with broker() as server, training(server, blob=discrete_blob(evaluation_explores=False)) as learner:
        evaluator = Evaluator(server.backend)
        yield server, learner, evaluator
        evaluator.stop()


def obs(i: float = 0) -> NDArray[Any]:
    return np.array([i, 0.5, -1], np.float32)


def told(client: Client, version: int = 0) -> None:
    """Until the client knows that these weights are evaluated."""

    def heard() -> bool:
        client.flow.look()
        return client.ready and client.flow.session.evaluation == version

    until(heard, f"it is told of an evaluation of version {version}")


def play(client: Client, steps: int, **how: Any) -> bool:
    """One episode with a reward of 0.5 a step. Whether it was trained on."""
    with client.start_episode(**how) as episode:
        for i in range(steps):
            episode.get_action(obs(i % 7))
            episode.log_returns(0.5)
        episode.end_episode(obs(3))
    return episode.training_enabled


def test_an_episode_for_evaluation_arrives_whole_and_is_not_trained_on(world: World) -> None:
    server, learner, evaluator = world
    with connect(server.frontend, **SPACES) as client:
        evaluator.evaluate(1)
        told(client)
        assert not play(client, 2 * EVALUATION_STEPS, training_enabled=False)
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")
        assert client.close() == 0
        stats = client.stats
    parts = evaluator.returned or []
    assert [(m.t0, m.steps, m.end) for m in parts] == [
        (0, 1, "no"), (1, EVALUATION_STEPS, "no"), (EVALUATION_STEPS + 1, EVALUATION_STEPS - 1, "terminated"),
    ]  # fmt: skip
    assert [m.return_so_far for m in parts] == [0.0, 0.5, 0.5 * (EVALUATION_STEPS + 1)]
    assert stats.steps == 0 and {r: n for r, (n, _) in stats.outcomes.items()} == {"evaluated": 3}
    assert not learner.taken


def test_nothing_is_sent_that_nobody_asked_for(world: World) -> None:
    server, _, evaluator = world
    with connect(server.frontend, **SPACES) as client:
        with client.start_episode(training_enabled=False) as episode:
            episode.get_action(obs())
            evaluator.evaluate(1)
            told(client)
            for i in range(50):
                episode.get_action(obs(i % 7))
            episode.end_episode(obs())
        assert client.stats.fragments == 0, "it had begun before"
        play(client, 5, training_enabled=False, explore=False)
        assert client.stats.fragments == 0, "it acts as its simulator says, not as the evaluation does"
        play(client, 5, training_enabled=False)
        assert client.stats.fragments > 0


def test_what_is_not_wanted_any_longer_is_not_sent_on(world: World) -> None:
    server, _, evaluator = world
    with connect(server.frontend, **SPACES) as first, connect(server.frontend, **SPACES) as second:
        evaluator.evaluate(1)
        told(first), told(second)
        with (
            first.start_episode(training_enabled=False) as one,
            second.start_episode(training_enabled=False) as other,
        ):
            other.get_action(obs())
            for i in range(3):
                one.get_action(obs(i))
            until(lambda: "evaluated" in (first.flow.look(), first.stats.outcomes)[1], "the first has the place")
            for i in range(1, 3):
                other.get_action(obs(i))
            until(lambda: "unwanted" in (second.flow.look(), second.stats.outcomes)[1], "the second has none")
            sent = second.stats.fragments
            for i in range(3 * EVALUATION_STEPS):
                other.get_action(obs(i % 7))
            other.end_episode(obs())
            assert other.steps == 3 + 3 * EVALUATION_STEPS and second.stats.fragments == sent
            one.end_episode(obs())
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")
        assert {m.session for m in evaluator.returned or []} == {first.flow.session.session}


def test_the_first_step_waits_for_the_weights_that_are_evaluated(world: World) -> None:
    server, learner, evaluator = world
    with connect(server.frontend, **SPACES) as client:
        told(client, -1)
        evaluator.evaluate(1, version=1)
        told(client, 1)
        episode = client.start_episode(training_enabled=False)
        assert not episode.can_act(obs())
        learner.publish(1)
        until(lambda: episode.can_act(obs()), "the weights are there")
        episode.get_action(obs())
        episode.end_episode(obs())
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")
    assert [m.version for m in evaluator.returned or []] == [1]


def test_an_evaluation_that_ends_is_not_waited_for(world: World) -> None:
    server, _, evaluator = world
    with connect(server.frontend, **SPACES) as client:
        told(client, -1)
        evaluator.evaluate(1, version=1)
        told(client, 1)
        episode = client.start_episode(training_enabled=False)
        assert not episode.can_act(obs())
        evaluator.evaluate(0)
        told(client, -1)
        assert episode.can_act(obs())
        episode.get_action(obs())
        episode.end_episode(obs())
        assert client.stats.fragments == 0


def test_it_needs_no_room_for_training(world: World) -> None:
    server, learner, evaluator = world
    learner.paused = True
    terms = learner.trainer.terms
    limited = TrainerHello(**{f: getattr(terms, f) for f in terms.__struct_fields__} | {"steps_ahead": 16})
    learner._todo.put(lambda: learner.trainer.change(limited, time.monotonic()))
    with connect(server.frontend, episodes=2, **SPACES) as client:
        until(lambda: client.flow.look() or client.flow.session.steps_limit > 0, "the steps are limited")
        evaluator.evaluate(1)
        told(client)
        with client.start_episode(training_enabled=True) as trained:
            while trained.can_act(obs()):
                trained.get_action(obs())
            assert trained.steps == 16
            play(client, 3 * EVALUATION_STEPS, training_enabled=False)
            assert not trained.can_act(obs())
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")


# ---- as the trainer wants


def share(learner: Training, part: float, **more: Any) -> None:
    terms = learner.trainer.terms
    shared = TrainerHello(**{f: getattr(terms, f) for f in terms.__struct_fields__} | {"evaluation_share": part} | more)
    learner._todo.put(lambda: learner.trainer.change(shared, time.monotonic()))


def test_an_episode_is_what_the_trainer_wants_it_for(world: World) -> None:
    server, learner, evaluator = world
    with connect(server.frontend, **SPACES) as client:
        evaluator.evaluate(2)
        told(client)
        assert not client.evaluates and play(client, 5)
        share(learner, 0.5)
        until(lambda: client.flow.look() or client.evaluates, "it is asked to serve")
        assert play(client, 5, training_enabled=True)
        assert not play(client, 5)
        assert not play(client, 5)
        until(lambda: evaluator.returned is not None, "the evaluation has its episodes")
        until(lambda: client.flow.look() or not client.evaluates, "it is asked no more")
        assert play(client, 5)
    assert sum(header.steps for header, _ in learner.taken) == 15


def test_who_chooses_actions_itself_trains_though_it_was_asked_to_serve(world: World) -> None:
    server, learner, evaluator = world
    share(learner, 1.0)
    with connect(server.frontend, **SPACES) as client:
        evaluator.evaluate(1)
        until(lambda: client.flow.look() or client.evaluates, "it is asked to serve")
        with client.start_episode() as episode:
            assert not episode.training_enabled
            episode.log_action(obs(), 1, -0.7)
            assert episode.training_enabled
            episode.end_episode(obs())
        with client.start_episode(training_enabled=False) as episode:
            episode.log_action(obs(), 1, -0.7)
            episode.end_episode(obs())
            assert not episode.training_enabled
        until(lambda: learner.steps == 1, "one step is trained on")
        client.flow.look()
    assert evaluator.returned is None


class Endless(gym.Env[Any, Any]):
    """Its episodes have no end, unless `short`."""

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def __init__(self) -> None:
        self.short = False
        self.resets = self.steps = 0

    def reset(self, **_: Any) -> Any:
        self.resets += 1
        self.steps = 0
        return obs(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        return obs(self.steps % 7), 1.0, self.short and self.steps >= 40, False, {}


def test_a_loop_that_waits_for_room_serves_meanwhile(world: World) -> None:
    """Training stands still, its episode would not end, and the loop evaluates all the same."""
    server, learner, evaluator = world
    learner.paused = True
    share(learner, 1.0, steps_ahead=16)
    env = Endless()
    with connect(server.frontend, **SPACES) as client:
        until(lambda: client.flow.look() or client.flow.session.steps_limit > 0, "the steps are limited")

        def stop() -> bool:
            if env.steps == 16 and evaluator.returned is None and not env.short:
                env.short = True
                evaluator.evaluate(2)
            return evaluator.returned is not None

        drive(client, env, stop=stop)
        assert client.stats.dropped == {}, "all steps of the episode that was left had been sent"
        learner.paused = False
        assert client.close() == 0
    assert [m.end for m in evaluator.returned or []].count("terminated") == 2
    assert sum(m.steps for m in evaluator.returned or []) == 80
    assert learner.steps >= 16


def test_a_loop_that_is_to_train_or_to_evaluate_does_just_that(world: World) -> None:
    server, learner, evaluator = world
    share(learner, 1.0)
    with connect(server.frontend) as one, connect(server.frontend) as other:
        evaluator.evaluate(3)
        told(one), told(other)
        drive(one, Counting(), episodes=4, training_enabled=True)
        assert evaluator.returned is None
        drive_many(
            [(other, Counting())], stop=lambda: evaluator.returned is not None, training_enabled=False
        )  # fmt: skip
        assert other.stats.steps == 0 and set(other.stats.outcomes) <= {"evaluated", "unwanted"}
    assert {m.session for m in evaluator.returned or []} == {other.flow.session.session}
    assert {header.session for header, _ in learner.taken} == {one.flow.session.session}


def test_one_that_drops_gives_an_evaluation_up_rather_than_wait(world: World) -> None:
    server, _, evaluator = world
    with connect(server.frontend, on_backpressure="drop", **SPACES) as client:
        evaluator.evaluate(2)
        told(client)
        client.flow.session.window = 100  # until the next ACK: room for a step, and for no fragment
        with client.start_episode(training_enabled=False) as episode:
            for i in range(3):
                episode.get_action(obs(i))
                client.flow.session.window = 1
            assert episode.builder.evaluation is None
            episode.end_episode(obs())
        play(client, 5, training_enabled=False)


# ---- the service acts


def test_services_act_for_evaluation(world: World) -> None:
    server, learner, evaluator = world
    with service(server) as acting, connect(server.frontend, inference="remote", **SPACES) as client:
        evaluator.evaluate(1)
        until(lambda: client.flow.look() or client.flow.session.evaluation == 0, "it is told")
        began = time.monotonic()
        play(client, 5, training_enabled=False)
        assert time.monotonic() - began < SERVICES_SWITCH + 2
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")
        assert set(acting.how) == {(None, True)}
    assert [(m.t0, m.steps) for m in evaluator.returned or []] == [(0, 1), (1, 4)]
    assert not learner.taken


def test_a_loop_that_asks_services_serves(world: World) -> None:
    server, learner, evaluator = world
    share(learner, 1.0)
    with service(server), connect(server.frontend, inference="remote") as client:
        evaluator.evaluate(3)
        drive(client, Counting(), stop=lambda: evaluator.returned is not None)
    assert [m.end != "no" for m in evaluator.returned or []].count(True) == 3
