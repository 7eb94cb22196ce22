"""`connect(inference="remote")`: against a real broker, with a service and a learner's side made by hand."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fake_service import Service, service
from fake_training import ACTIONS, OBSERVATIONS, RUNS, Restartable, Training, broker, training, until
from numpy.typing import NDArray

from broker.server import Server
from rllink_zmq import client_flow, connect
from rllink_zmq.drive_loops import drive_many
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.errors import ConnectionTimeout, EpisodeError, PolicyError, SettingsError

SPACES: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}
World = tuple[Server, Training, Service]


def obs(i: float = 0) -> NDArray[Any]:
    return np.array([i, 0.5, -1], np.float32)


@pytest.fixture(autouse=True)
def sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits say what they wait for after a moment."""
    monkeypatch.setattr(client_flow, "SAY_FIRST", 0.15)


@pytest.fixture
def world() -> Iterator[World]:
    with broker() as server, training(server) as learner, service(server) as acting:
        yield server, learner, acting


def test_an_episode_is_what_the_service_chose(world: World) -> None:
    server, learner, _acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        with client.start_episode() as episode:
            actions = []
            for i in range(20):
                actions.append(episode.get_action(obs(i % 7)))
                episode.log_returns(1.0)
            episode.end_episode(obs(3))
        assert actions == [i % 7 % 2 for i in range(20)]
        assert all(type(action) is int for action in actions)
        until(lambda: learner.steps == 20, "all is taken")
    columns = {name: np.concatenate([a[name] for _, a in learner.taken]) for name in learner.taken[0][1]}
    assert columns["actions"].tolist() == actions
    assert set(columns["action_logp"].tolist()) == {-0.5}
    assert columns["action_dist_inputs"][:, 0].tolist() == actions
    assert {(h.run, h.version) for h, _ in learner.taken} == {(RUNS[0], 0)}
    assert learner.taken[-1][0].end == "terminated"


def test_requests_and_fragments_bring_the_steps_before_them(world: World) -> None:
    """Whoever answers an episode's first request says how many are wanted."""
    server, learner, acting = world
    acting.lookback = 2
    with connect(server.frontend, inference="remote", **SPACES) as client:
        with client.start_episode() as episode:
            for i in range(7):
                acting.version = i // 4
                pending = episode.get_action_async(obs(i))
                if i:
                    with pytest.raises(EpisodeError, match="looks at earlier rewards, and the next action is under"):
                        episode.log_returns(100.0)
                pending.result()
                episode.log_returns(i + 0.5)
                episode.log_returns(0.25)
            episode.end_episode(obs(7))
        until(lambda: learner.steps == 7, "all is taken")
        with client.start_episode() as episode, pytest.raises(EpisodeError, match="looks at the steps before"):
            episode.log_action(obs(0), 0, -0.5)
    earlier = [
        [] if not beside else beside["obs_before"][0][2 - beside["steps_before"][0] :, 0].tolist()
        for beside in acting.beside
    ]
    assert earlier == [[], [0], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]]
    assert acting.beside[1]["obs_before"][0][0].tolist() == [0, 0, 0], "what isn't there yet is zeros"
    rewards = [beside["rewards_before"][0].tolist() for beside in acting.beside[1:]]
    assert rewards == [[0, 0.75], [0.75, 1.75], [1.75, 2.75], [2.75, 3.75], [3.75, 4.75], [4.75, 5.75]]
    actions = [beside["actions_before"][0].tolist() for beside in acting.beside[1:]]
    assert actions == [[0, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]
    found = []
    for header, arrays in learner.taken:
        before = arrays["obs_before"][:, 0].tolist() if "obs_before" in arrays else []
        found.append((header.t0, header.version, before, arrays["obs"][:, 0].tolist()))
    assert found == [(0, 0, [], [0, 1, 2, 3, 4]), (4, 1, [2, 3], [4, 5, 6, 7])]
    second = learner.taken[1][1]
    assert second["rewards_before"].tolist() == [2.75, 3.75] and second["actions_before"].tolist() == [0, 1]


def test_a_step_that_fills_the_room_leaves_while_the_next_one_is_asked_for() -> None:
    """One episode's built step and its open request are all the room that is left when many simulators have come: the
    other episode still goes on."""
    with broker() as server, training(server, steps_ahead=16) as learner, service(server) as acting:
        with connect(server.frontend, inference="remote", episodes=2, **SPACES) as client:
            one, other = client.start_episode(), client.start_episode()
            one.get_action(obs(1))
            one.log_returns(1.0)
            acting.held = True
            pending = one.get_action_async(obs(2))
            with connect(server.frontend, inference="remote", episodes=14, **SPACES):
                other.log_action(obs(6), 0, -0.5)
                other.end_episode(obs(6))  # its ACK tells

                def shrunk() -> bool:
                    client.flow.look()
                    return client.flow.session.steps_limit == 3

                until(shrunk)
                other = client.start_episode()
                threading.Timer(0.3, lambda: setattr(acting, "held", False)).start()
                other.get_action(obs(3))
                other.log_returns(1.0)
                assert pending.result(5.0) == 0
                one.log_returns(2.0)
                one.end_episode(obs(4))
                other.end_episode(obs(5))
                until(lambda: learner.steps == 4, "all is taken")
    taken = [(h.episode == one.id, h.t0, a["obs"][:, 0].tolist(), a["rewards"].tolist()) for h, a in learner.taken]
    assert sorted(taken) == [
        (False, 0, [3, 5], [1.0]), (False, 0, [6, 6], [0.0]), (True, 0, [1, 2], [1.0]), (True, 1, [2, 4], [2.0]),
    ]  # fmt: skip


def test_a_fragment_has_one_version_whoever_answered(world: World) -> None:
    server, learner, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        episode = client.start_episode()
        for i in range(9):
            acting.version = i // 3
            episode.get_action(obs(i % 4))
            episode.log_returns(float(i))
        episode.end_episode(obs(1))
        until(lambda: learner.steps == 9, "all is taken")
    assert [(h.t0, h.steps, h.version, h.return_so_far) for h, _ in learner.taken] == [
        (0, 3, 0, 0.0), (3, 3, 1, 3.0), (6, 3, 2, 15.0),
    ]  # fmt: skip
    for header, arrays in learner.taken:
        assert arrays["obs"][:, 0].tolist() == [(header.t0 + i) % 4 if header.t0 + i < 9 else 1 for i in range(4)]


def test_several_actions_are_open_at_once(world: World) -> None:
    server, learner, acting = world
    with connect(server.frontend, inference="remote", episodes=3, **SPACES) as client:
        episodes = [client.start_episode() for _ in range(3)]
        acting.held = True
        asked = [episode.get_action_async(obs(i)) for i, episode in enumerate(episodes)]
        assert not any(action.done() for action in asked)
        with pytest.raises(EpisodeError, match="has asked for an action already"):
            episodes[0].get_action_async(obs(5))
        acting.held = False
        assert [action.result() for action in reversed(asked)] == [0, 1, 0]
        with pytest.raises(EpisodeError, match="taken already"):
            asked[0].result()
        for i, episode in enumerate(episodes):
            episode.log_returns(1.0)
            episode.end_episode(obs(i + 1))
        until(lambda: learner.steps == 3, "all is taken")
    assert sorted(a["obs"][:, 0].tolist() for _, a in learner.taken) == [[0, 1], [1, 2], [2, 3]]


def test_one_request_for_many_episodes(world: World) -> None:
    server, learner, acting = world
    with connect(server.frontend, inference="remote", episodes=4, **SPACES) as client:
        episodes = [client.start_episode() for _ in range(4)]
        actions = client.get_actions(episodes, [obs(i) for i in range(4)])
        assert actions.tolist() == [0, 1, 0, 1]
        assert [rows.shape for _, rows in acting.asked] == [(4, 3)]
        for episode in episodes:
            episode.log_returns(1.0)
            episode.end_episode(obs())
        until(lambda: learner.steps == 4, "all is taken")


def test_evaluation_says_so(world: World) -> None:
    server, learner, acting = world
    with connect(server.frontend, inference="remote", episodes=2, **SPACES) as client:
        trained = client.start_episode()
        for how in ({}, {"explore": False}):
            with client.start_episode(training_enabled=False, **how) as episode:
                episode.get_action(obs(1))
        assert acting.how == [(None, True), (False, True)]
        with client.start_episode(training_enabled=False) as episode:
            with pytest.raises(EpisodeError, match="ask twice"):
                client.get_actions([trained, episode], [obs(), obs()])
    assert not learner.taken


def test_an_action_that_is_not_waited_for_any_longer(world: World) -> None:
    server, learner, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        episode = client.start_episode()
        episode.get_action(obs())
        episode.log_returns(1.0)
        acting.held = True
        episode.get_action_async(obs(1))
        episode.end_episode(obs(1), truncated=True)
        acting.held = False
        with client.start_episode() as following:
            assert following.get_action(obs(5)) == 1
            following.log_returns(1.0)
            following.end_episode(obs(6))
        until(lambda: learner.steps == 2, "all is taken")
        assert client.flow.reserved == 0


def test_without_a_service_it_waits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with broker() as server, training(server):
        with connect(server.frontend, inference="remote", **SPACES) as client:
            episode = client.start_episode()
            asked = episode.get_action_async(obs(1))
            with caplog.at_level(logging.WARNING, "rllink_zmq"):
                with pytest.raises(ConnectionTimeout, match=r"gave up after 0\.4 s"):
                    asked.result(timeout=0.4)
            assert "1 requests for actions are open" in caplog.text and "no runner has answered" in caplog.text
            with service(server):
                assert asked.result() == 1


def test_another_service_answers_when_the_first_is_gone(world: World) -> None:
    server, _learner, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        episode = client.start_episode()
        acting.held = True
        asked = episode.get_action_async(obs(3))
        until(lambda: acting.session.asked != {}, "the first one has it")
        with service(server) as other:
            acting.stop()
            assert asked.result() == 1
            assert len(other.asked) == 1


def test_the_broker_may_be_restarted() -> None:
    """The new one has never heard of the request: it is sent again, and the service greets again."""
    broker = Restartable()
    try:
        with training(broker.server), service(broker.server) as acting:
            with connect(broker.server.frontend, inference="remote", **SPACES) as client:
                episode = client.start_episode()
                assert episode.get_action(obs(1)) == 1
                episode.log_returns(1.0)
                acting.held = True
                asked = episode.get_action_async(obs(2))
                until(lambda: acting.session.asked != {}, "the service has it")
                broker.restart()
                acting.held = False
                assert asked.result(timeout=20) == 0
    finally:
        broker.stop()


@pytest.mark.parametrize(("code", "error"), [("malformed", EpisodeError), ("failed", PolicyError)])
def test_a_refusal_is_an_error_with_its_reason_and_the_next_one_may_go_through(
    world: World, code: str, error: type[Exception]
) -> None:
    server, _learner, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        episode = client.start_episode()
        acting.refuses = code
        with pytest.raises(error, match=rf"the action service refuses \({code}\): no such thing"):
            episode.get_action(obs(1))
        acting.refuses = ""
        assert episode.get_action(obs(1)) == 1
        assert client.flow.reserved == 0


def test_what_is_too_much_is_asked_again_after_a_moment(world: World) -> None:
    server, _, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        acting.refuses = "over_credit"
        asked = client.start_episode().get_action_async(obs(1))
        until(lambda: asked.done() or len(acting.asked) >= 3, "it has been asked again")
        acting.refuses = ""
        assert asked.result() == 1


def test_an_observation_that_does_not_fit_is_not_sent(world: World) -> None:
    server, _learner, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        episode = client.start_episode()
        with pytest.raises(EpisodeError, match="shape"):
            episode.get_action(np.zeros(4, np.float32))
        with pytest.raises(EpisodeError, match="finite"):
            episode.get_action(obs(np.nan))
        assert client.flow.reserved == 0
        assert episode.get_action(obs(1)) == 1
        assert len(acting.asked) == 1


def test_where_the_policy_can_not_run_auto_asks_the_service(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server, _learner, _acting = world
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with connect(server.frontend, inference="auto", **SPACES) as client:
        with caplog.at_level(logging.WARNING, "rllink_zmq"):
            assert client.start_episode().get_action(obs(1)) == 1
    assert "the policy can't run here" in caplog.text
    with connect(server.frontend, inference="local", seed=5, **SPACES) as client:
        with pytest.raises(ImportError):
            client.start_episode().get_action(obs(1))


def test_auto_is_local_where_it_can_be(world: World) -> None:
    server, _learner, acting = world
    with connect(server.frontend, inference="auto", **SPACES) as client:
        client.start_episode().get_action(obs(1))
        assert client.flow.remote is None
    assert not acting.asked


def test_async_is_for_the_service(world: World) -> None:
    server, _learner, _acting = world
    with connect(server.frontend, **SPACES) as client:
        with pytest.raises(EpisodeError, match='inference="remote"'):
            client.start_episode().get_action_async(obs())
    with pytest.raises(SettingsError, match="expected inference"):
        connect(server.frontend, inference="cloud")  # type: ignore[arg-type]


class Counting(gym.Env[NDArray[np.float32], int]):
    """Counts to 5."""

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        self._at = 0
        return obs(0), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        assert action == self._at % 2
        self._at += 1
        return obs(self._at), 1.0, self._at == 5, False, {}


def test_drivers_ask_the_service(world: World) -> None:
    server, learner, _acting = world
    clients = [connect(server.frontend, inference="remote", **SPACES) for _ in range(3)]
    summary = drive_many([(client, Counting()) for client in clients], episodes=4)
    assert (summary.episodes, summary.steps, summary.episode_return_mean) == (12, 60, 5.0)
    until(lambda: learner.steps == 60, "all is taken")
    for client in clients:
        client.close()


def test_a_vector_asks_once_a_step(world: World) -> None:
    server, _learner, acting = world
    envs = gym.vector.SyncVectorEnv([Counting] * 3)
    with connect(server.frontend, inference="remote", episodes=3, **SPACES) as client:
        summary = drive_vector(client, envs, episodes=6)
    assert summary.episodes == 6
    assert {rows.shape for _, rows in acting.asked} <= {(3, 3)}


def test_what_was_sent_is_what_is_trained_on(world: World) -> None:
    """The simulation may write into its own array meanwhile, and into the action."""
    server, learner, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        episode = client.start_episode()
        seen = obs(1)
        acting.held = True
        asked = episode.get_action_async(seen)
        seen[0] = 6.0
        acting.held = False
        assert asked.result() == 1
        episode.log_returns(1.0)
        actions = client.get_actions([episode], [obs(2)])
        actions[0] = 1
        episode.log_returns(1.0)
        episode.end_episode(obs(3))
        until(lambda: learner.steps == 2, "all is taken")
    assert np.concatenate([a["obs"] for _, a in learner.taken])[:, 0].tolist() == [1.0, 2.0, 3.0]
    assert np.concatenate([a["actions"] for _, a in learner.taken]).tolist() == [1, 0]


def test_an_action_can_be_given_up_and_chosen_otherwise(world: World) -> None:
    server, learner, acting = world
    with connect(server.frontend, inference="remote", **SPACES) as client:
        episode = client.start_episode()
        acting.held = True
        asked = episode.get_action_async(obs(1))
        with pytest.raises(EpisodeError, match="has asked for an action"):
            client.get_actions([episode], [obs(1)])
        episode.log_action(obs(1), 0, -0.1)
        assert asked.done()
        with pytest.raises(EpisodeError, match="was given up"):
            asked.result()
        episode.log_returns(1.0)
        other = episode.get_action_async(obs(2))
        other.forget()
        acting.held = False
        assert episode.get_action(obs(2)) == 0
        episode.log_returns(1.0)
        episode.end_episode(obs(3))
        until(lambda: learner.steps == 2, "all is taken")
        assert client.flow.reserved == 0
    assert [arrays["actions"].tolist() for _, arrays in learner.taken] == [[0], [0]]


def test_without_spaces_and_before_the_trainer() -> None:
    with broker() as server:
        with connect(server.frontend, inference="remote") as client:
            episode = client.start_episode()
            assert not episode.can_act(obs(1))
            with training(server), service(server):
                assert episode.get_action(obs(1)) == 1


def test_a_driver_stops_though_nobody_answers(world: World) -> None:
    server, _, acting = world
    acting.held = True
    looks = iter(range(30))
    with connect(server.frontend, inference="remote", episodes=2, **SPACES) as client:
        envs = gym.vector.SyncVectorEnv([Counting] * 2)
        assert drive_vector(client, envs, stop=lambda: next(looks, None) is None).steps == 0
    with connect(server.frontend, inference="remote", **SPACES) as client:
        looks = iter(range(30))
        assert drive_many([(client, Counting())], stop=lambda: next(looks, None) is None).steps == 0
    acting.held = False
