"""Episodes of simulators that RLlib's evaluation counts: a real broker, with an evaluation runner made by hand."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from counting_env import Counting
from fake_service import service
from fake_training import ACTIONS, OBSERVATIONS, RUNS, Training, broker, told, training, until
from numpy.typing import NDArray
from test_policy import discrete_blob

from broker.server import Server
from rllink_zmq import Client, connect
from rllink_zmq.client_flow import EVALUATION_STEPS, SERVICES_SWITCH
from rllink_zmq.drive_loops import drive, drive_many
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.messages import FRAGMENT, TrainerHello
from rllink_zmq.sampling import Next
from rllink_zmq.sampling_evaluation import Evaluation, Wanted
from rllink_zmq.session import State
from rllink_zmq.session_evaluator import EvaluatorSession
from rllink_zmq.session_runner import Lease
from rllink_zmq.transport import Connection, poll

SPACES: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
World = tuple[Server, Training, "Evaluator"]


class Evaluator:
    """An evaluation runner in a thread. `returned`: what the last call that ended has returned, None before; `leases`:
    the same, with their bodies."""

    def __init__(self, backend: str, run: str = RUNS[0]) -> None:
        self.session = EvaluatorSession(os.urandom(16), run, name="evaluator")
        self.returned: list[FRAGMENT] | None = None
        self.leases: list[Lease] = []
        self._evaluation = Evaluation(self.session)
        self._connection = Connection(self.session, backend)
        self._wanted: Wanted | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        until(lambda: self.session.state is State.LIVE, "the evaluator greets")

    def evaluate(self, episodes: int, version: int = 0) -> None:
        """Begin a call for so many."""
        self.ask(Wanted(episodes, 0, version, True, 60.0))

    def ask(self, wanted: Wanted) -> None:
        """Begin a call."""
        self.returned, self._wanted = None, wanted

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
                self.leases = self._evaluation.take_out()
                self.returned = [lease.message for lease in self.leases]
            self._connection.flush()
        self._connection.close()


@contextmanager
def evaluating(**settings: Any) -> Iterator[World]:
    blob = discrete_blob(evaluation_explores=False)
    with broker(**settings) as server, training(server, blob=blob) as learner:
        evaluator = Evaluator(server.backend)
        yield server, learner, evaluator
        evaluator.stop()


@pytest.fixture
def world() -> Iterator[World]:
    with evaluating() as one:
        yield one


def obs(i: float = 0) -> NDArray[Any]:
    return np.array([i, 0.5, -1], np.float32)


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
        told(client, 0)
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
            told(client, 0)
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
        told(first, 0), told(second, 0)
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
        told(client, 0)
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
        told(client, 0)
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
        self.resets = self.steps = self.total = 0

    def reset(self, **_: Any) -> Any:
        self.resets += 1
        self.steps = 0
        return obs(), {}

    def step(self, action: Any) -> Any:
        self.steps += 1
        self.total += 1
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
        told(one, 0), told(other, 0)
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
        told(client, 0)
        size = client.flow.session.window + client.flow.session.fragment_bytes
        with client.start_episode(training_enabled=False) as episode:
            for i in range(3):
                episode.get_action(obs(i))
                client.flow.session.unsettled_bytes = size
            assert episode.builder.evaluation is None
            episode.end_episode(obs())
        play(client, 5, training_enabled=False)


# ---- room


@pytest.mark.parametrize("number", [2, 4, 8])
def test_several_episodes_are_evaluated_in_a_window_that_they_fill_together(number: int) -> None:
    with evaluating(fragment_bytes=4000) as (server, _, evaluator):
        with connect(server.frontend, episodes=number, **SPACES) as client:
            evaluator.evaluate(number)
            told(client, 0)
            episodes = [client.start_episode(training_enabled=False) for _ in range(number)]
            for i in range(200):
                client.get_actions(episodes, [obs(i % 7)] * number)
                for episode in episodes:
                    episode.log_returns(1.0)
            assert all(episode.builder.evaluation is not None for episode in episodes)
            for episode in episodes:
                episode.end_episode(obs())
            until(lambda: evaluator.returned is not None, "the evaluation has its episodes")
            assert client.close() == 0 and set(client.stats.outcomes) == {"evaluated"}


@pytest.mark.parametrize("loop", ["drive", "of one's own"])
def test_a_window_full_of_steps_to_train_on_leaves_room_for_an_evaluation(loop: str) -> None:
    """Training stands still until the evaluation has come to its end."""
    began = time.monotonic()
    with evaluating(fragment_bytes=4000) as (server, learner, evaluator):
        learner.paused = True
        share(learner, 1.0)
        env = Endless()
        with connect(server.frontend, episodes=2, **SPACES) as client:
            client.flow.session.episodes = 1 if loop == "drive" else 2
            until(lambda: client.ready, "it can act")
            with client.start_episode(training_enabled=True) as trained:
                while trained.can_act(obs()):
                    trained.get_action(obs())
                assert client.flow.session.unsettled_bytes >= client.flow.session.window - 100
                evaluator.evaluate(2)
                until(lambda: client.flow.look() or client.evaluates, "it is asked to serve")
                if loop != "drive":
                    play(client, 5 * EVALUATION_STEPS, training_enabled=False)
                    play(client, 5 * EVALUATION_STEPS, training_enabled=False)
            env.short = True
            drive(client, env, stop=lambda: evaluator.returned is not None)
            until(lambda: evaluator.returned is not None, "the evaluation has its episodes")
            assert time.monotonic() < began + 15, "nothing but this helps it"
            learner.paused = False
            assert client.close() == 0
        assert "over_window" not in client.stats.outcomes


# ---- loops that are there for evaluations


def test_an_episode_that_is_cut_off_does_not_count(world: World) -> None:
    server, _, evaluator = world
    with connect(server.frontend, episodes=2, **SPACES) as client:
        evaluator.evaluate(2)
        told(client, 0)
        drive(client, Endless(), steps=20, training_enabled=False)
        envs = gym.vector.SyncVectorEnv([Endless, Endless])
        drive_vector(client, envs, steps=20, training_enabled=False)
        client.close()
        assert evaluator.returned is None
    with connect(server.frontend, **SPACES) as client:
        drive(client, Counting(), stop=lambda: evaluator.returned is not None, training_enabled=False)
    assert {m.session for m in evaluator.returned or []} == {client.flow.session.session}


def test_a_loop_waits_for_the_next_evaluation_and_is_there_at_once(world: World) -> None:
    server, _, evaluator = world
    env = Endless()
    began: list[int] = []

    def stop() -> bool:
        if not began and env.steps > 100:  # no trainer's evaluation yet: it shows what the policy does
            began.append(env.resets)
            evaluator.evaluate(1)
        if len(began) == 1 and client.flow.evaluations and env.steps >= 5 and env.resets > began[0]:
            env.short = True  # it has left the episode that was worthless, for one that counts
            began.append(env.resets)
        if len(began) == 2 and evaluator.returned is not None:
            still.append(still[-1] if still else time.monotonic())
            if time.monotonic() > still[0] + 0.2:
                began.append(env.resets)
        if len(began) == 3 and time.monotonic() > still[0] + 0.6:
            assert env.resets == began[2], "between evaluations it does nothing"
            began.append(env.resets)
            evaluator.evaluate(2)
        return len(began) == 4 and evaluator.returned is not None

    still: list[float] = []
    with connect(server.frontend, **SPACES) as client:
        drive(client, env, stop=stop, training_enabled=False)
    assert env.resets >= began[3] + 2


def test_a_vector_waits_for_the_next_evaluation_and_is_there_at_once(world: World) -> None:
    server, _, evaluator = world
    inner = [Endless(), Endless()]
    envs = gym.vector.SyncVectorEnv([lambda: inner[0], lambda: inner[1]])
    steps: list[int] = []
    since: list[float] = []

    def count() -> int:
        return sum(env.total for env in inner)

    def stop() -> bool:
        if not since and count() > 100:
            since.append(inner[0].resets)
            evaluator.evaluate(2)
        if len(since) == 1 and inner[0].resets > since[0]:  # it has left episodes that were worthless
            inner[0].short = inner[1].short = True
        if len(since) == 1 and evaluator.returned is not None:
            since.append(time.monotonic())
        if len(since) == 2 and time.monotonic() > since[1] + 0.2 and not steps:
            steps.append(count())
        if len(since) == 2 and time.monotonic() > since[1] + 0.6:
            assert count() == steps[0], "between evaluations it does nothing"
            since.append(0.0)
            evaluator.evaluate(2)
        return len(since) == 3 and evaluator.returned is not None

    with connect(server.frontend, episodes=2, **SPACES) as client:
        drive_vector(client, envs, stop=stop, training_enabled=False)
    assert count() > steps[0]


def test_one_with_several_episodes_serves_only_where_it_says_so(world: World) -> None:
    server, learner, evaluator = world
    share(learner, 1.0)
    with connect(server.frontend, episodes=2, **SPACES) as client:
        evaluator.evaluate(1)
        until(lambda: client.flow.look() or client.evaluates, "it is asked to serve")
        with client.start_episode() as one, client.start_episode() as other:
            assert one.training_enabled and other.training_enabled
            client.get_actions([one, other], [obs(), obs()])
        assert not play(client, 5, training_enabled=not client.evaluates)
        until(lambda: evaluator.returned is not None, "the evaluation has its episode")


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
