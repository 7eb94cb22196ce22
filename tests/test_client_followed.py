"""Episodes that a runner follows, from the simulator's side: against a real broker, with a service made by hand."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fake_follower import follower
from fake_service import service
from fake_training import ACTIONS, OBSERVATIONS, Training, broker, training, until
from numpy.typing import NDArray

from broker.server import Server
from rllink_zmq import client_followed, connect
from rllink_zmq.drive_loops import drive, drive_many
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.errors import EpisodeError, RemovedError

SPACES: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS, "inference": "remote"}


def obs(i: float = 0) -> NDArray[Any]:
    return np.array([i, 0.5, -1], np.float32)


@pytest.fixture
def server() -> Iterator[Server]:
    with broker() as running:
        yield running


def played(client: Any, steps: int) -> str:
    """An episode of so many steps: its id."""
    with client.start_episode() as episode:
        for i in range(steps):
            assert episode.get_action(obs(i)) == i % 2
            episode.log_returns(i + 1.0)
        episode.end_episode(obs(steps))
        return str(episode.id)


def taken(learner: Training) -> list[tuple[int, int, list[float], list[float]]]:
    return [
        (header.t0, header.version, arrays["obs"][:, 0].tolist(), arrays["rewards"].tolist())
        for header, arrays in learner.taken
    ]


def test_fragments_have_what_the_runner_saw(server: Server) -> None:
    """Up to the observation with which the episode ends; and the runner is told of each step once."""
    with training(server, fragment_steps=3) as learner, follower(server) as acting:
        with connect(server.frontend, **SPACES) as client:
            episode = played(client, 8)
            until(lambda: learner.steps == 8, "all is taken")
    heard = acting.heard[episode]
    assert heard == [(t, t, float(t), "no", True) for t in range(8)] + [(8, 8, 8, "terminated", False)]
    assert taken(learner) == [
        (0, 0, [0, 1, 4, 9], [1, 2, 3]), (3, 0, [9, 16, 25, 36], [4, 5, 6]), (6, 0, [36, 49, 64], [7, 8]),
    ]  # fmt: skip
    assert learner.taken[-1][0].end == "terminated"
    assert learner.taken[1][1]["obs"].dtype == np.float64 and learner.taken[1][1]["obs"].shape == (4, 2)
    np.testing.assert_array_equal(learner.taken[1][1]["obs_before"], [[1, 1], [4, 2]])


def test_a_fragment_is_of_one_version(server: Server) -> None:
    with training(server, fragment_steps=100) as learner, follower(server) as acting:
        with connect(server.frontend, **SPACES) as client, client.start_episode() as episode:
            for i in range(6):
                acting.version = i // 4
                episode.get_action(obs(i))
                episode.log_returns(1.0)
            episode.end_episode(obs(6), truncated=True)
            until(lambda: learner.steps == 6, "all is taken")
    assert taken(learner) == [(0, 0, [0, 1, 4, 9, 16], [1.0] * 4), (4, 1, [16, 25, 36], [1.0] * 2)]
    assert learner.taken[-1][0].end == "truncated"


@pytest.mark.parametrize("waits", [True, False])
def test_where_there_is_no_room_all_steps_leave(server: Server, waits: bool) -> None:
    """Also the last one: what the runner makes of the observation after it is asked for alone. It is told the reward as
    it was logged, also then."""
    with training(server, fragment_steps=100, steps_ahead=4) as learner, follower(server) as acting:
        learner.paused = True
        acting.shapes = 2.0
        with connect(server.frontend, **SPACES) as client, client.start_episode() as episode:
            for i in range(4):
                episode.get_action(obs(i))
                episode.log_returns(i + 1.0)
            sent = client.flow.session
            if waits:
                threading.Timer(0.5, lambda: setattr(learner, "paused", False)).start()
            else:
                until(lambda: not episode.can_act(obs(4)) and sent.unsettled_steps == 4, "all steps leave")
                learner.paused = False
            episode.get_action(obs(4))
            episode.log_returns(5.0)
            episode.end_episode(obs(5))
            until(lambda: learner.steps == 5, "all is taken")
    rows = [(t0, seen, rewards) for t0, _, seen, rewards in taken(learner)]
    assert rows[-1] == (4, [16, 25], [10]) and rows[-2][1][-1] == 16
    assert [reward for _, _, rewards in rows for reward in rewards] == [2, 4, 6, 8, 10]
    heard = acting.heard[episode.id][4:6]
    assert [(t, reward, acts) for t, _, reward, _, acts in heard] == [(4, 4.0, False), (4, 4.0, True)]


def test_an_episode_that_nobody_follows_any_more_can_not_go_on(server: Server) -> None:
    with training(server) as learner, follower(server) as acting, connect(server.frontend, **SPACES) as client:
        with client.start_episode() as episode:
            episode.get_action(obs(0))
            episode.log_returns(1.0)
            acting.forgets()
            with pytest.raises(RemovedError, match=r"refuses \(lost\)"):
                episode.get_action(obs(1))
        with client.start_episode() as episode:
            episode.get_action(obs(0))
            acting.forgets()
            with pytest.raises(RemovedError, match=r"refuses \(lost\)"):
                episode.end_episode(obs(1))
        played(client, 2)
        until(lambda: learner.steps == 2, "the next episode is taken")
        assert client.flow.session.dropped["abandoned"] == (2, 2)


def test_a_runner_that_does_not_answer_at_the_end_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_followed, "FOLLOWER_ANSWERS", 0.1)
    with training(server), follower(server) as acting, connect(server.frontend, **SPACES) as client:
        with client.start_episode() as episode:
            episode.get_action(obs(0))
            acting.held = True
            with pytest.raises(RemovedError, match=r"the runner that follows episode .* doesn't answer"):
                episode.end_episode(obs(1))


def test_what_the_policy_did_not_do_is_not_logged(server: Server) -> None:
    with training(server), follower(server), connect(server.frontend, **SPACES) as client:
        played(client, 1)
        with client.start_episode() as episode:
            with pytest.raises(EpisodeError, match="looks at the steps before"):
                episode.log_action(obs(0), 0, -0.5)
            asked = episode.get_action_async(obs(0))
            with pytest.raises(EpisodeError, match="expected a finite observation"):
                episode.get_action(obs(np.nan)) if asked.result() == 0 else None
            asked = episode.get_action_async(obs(1))
            with pytest.raises(EpisodeError, match="looks at earlier rewards, and the next action is under way"):
                episode.log_returns(1.0)
            assert asked.result() == 1


class Steps(gym.Env[Any, Any]):
    """Five steps, whose observations and rewards are their numbers."""

    observation_space, action_space = OBSERVATIONS, ACTIONS

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._t = 0
        return obs(0), {}

    def step(self, action: int) -> Any:
        self._t += 1
        return obs(self._t), float(self._t), self._t == 5, False, {}


def complete(learner: Training) -> bool:
    """Whether each episode that has ended is whole, and of what the runner saw."""
    found: dict[str, list[float]] = {}
    for header, arrays in learner.taken:
        rows = found.setdefault(header.episode, [])
        assert len(rows) == header.t0
        rows += arrays["obs"][:-1, 0].tolist()
        if header.end != "no":
            assert [*rows, arrays["obs"][-1, 0]] == [0, 1, 4, 9, 16, 25]
    return True


@pytest.mark.parametrize("steps_ahead", [0, 7])
def test_loops_begin_the_next_episode(server: Server, steps_ahead: int, caplog: pytest.LogCaptureFixture) -> None:
    with training(server, fragment_steps=2, steps_ahead=steps_ahead) as learner, follower(server) as acting:
        clients = [connect(server.frontend, **SPACES) for _ in range(3)]
        threading.Timer(0.3, acting.forgets).start()
        with caplog.at_level(logging.WARNING):
            summary = drive_many([(client, Steps()) for client in clients], episodes=60)
        for client in clients:
            client.close()
        until(lambda: learner.steps >= 3 * 60 * 5, "all is taken")
    assert summary.episodes == 180 and complete(learner)
    ended = [header for header, _ in learner.taken if header.end == "terminated"]
    assert len(ended) == 180 and {header.return_so_far + sum(a["rewards"]) for header, a in learner.taken if
                                  header.end == "terminated"} == {15.0}  # fmt: skip


def test_an_episode_that_is_cut_off_by_steps_ends_as_the_runner_saw_it(server: Server) -> None:
    with training(server) as learner, follower(server), connect(server.frontend, **SPACES) as client:
        drive(client, Steps(), steps=8)
        until(lambda: learner.steps == 8, "all is taken")
    assert [header.end for header, _ in learner.taken][-1] == "truncated"
    assert learner.taken[-1][1]["obs"][:, 0].tolist() == [0, 1, 4, 9]


def test_worlds_are_stepped_with_an_episode_each(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with training(server) as learner, follower(server) as acting:
        with connect(server.frontend, episodes=3, **SPACES) as client:
            envs = gym.vector.SyncVectorEnv([Steps] * 3)
            threading.Timer(0.3, acting.forgets).start()
            drive_vector(client, envs, episodes=90)
            until(lambda: learner.steps >= 450, "all is taken")
    assert complete(learner)


def test_what_has_no_room_is_dropped_where_that_is_wanted(server: Server) -> None:
    with training(server, fragment_steps=4, steps_ahead=8) as learner, follower(server):
        learner.paused = True
        with connect(server.frontend, on_backpressure="drop", **SPACES) as client:
            played(client, 30)
            dropped = client.flow.session.dropped["backpressure"][1]
            assert 18 <= dropped <= 26
            learner.paused = False
            until(lambda: learner.steps == 30 - dropped, "the rest is taken")


def test_once_there_is_room_again_nothing_is_dropped_any_more(server: Server) -> None:
    with training(server, fragment_steps=4, steps_ahead=8) as learner, follower(server):
        learner.paused = True
        with connect(server.frontend, on_backpressure="drop", **SPACES) as client, client.start_episode() as episode:
            for i in range(30):
                episode.get_action(obs(i))
            dropped = client.flow.session.dropped["backpressure"][1]
            learner.paused = False
            until(lambda: client.flow.look() or not client.flow.session.unsettled, "there is room")  # type: ignore[func-returns-value]
            for i in range(40):
                episode.get_action(obs(i))
                until(lambda: client.flow.look() or not client.flow.session.unsettled, "it is taken")  # type: ignore[func-returns-value]
            episode.end_episode(obs(40))
            until(lambda: learner.steps + client.flow.session.dropped["backpressure"][1] == 70, "all is counted")
            assert client.flow.session.dropped["backpressure"][1] <= dropped + 4


def test_an_episode_that_is_asked_for_leaves_room_for_another_one(server: Server) -> None:
    """Its step is all the room there is; the answer that nobody has taken tells what the runner saw."""
    with training(server, steps_ahead=2) as learner, follower(server):
        with connect(server.frontend, episodes=2, **SPACES) as client:
            one, other = client.start_episode(), client.start_episode()
            one.get_action(obs(1))
            one.log_returns(1.0)
            pending = one.get_action_async(obs(2))
            assert other.get_action(obs(3)) == 1
            assert pending.result() == 0
            one.end_episode(obs(4))
            other.end_episode(obs(5))
            until(lambda: learner.steps == 3, "all is taken")
    found = {(header.episode == one.id, *arrays["obs"][:, 0].tolist()) for header, arrays in learner.taken}
    assert found == {(True, 1, 4), (True, 4, 16), (False, 9, 25)}


def test_rewards_are_what_the_runner_has_made_of_them(server: Server) -> None:
    with training(server, fragment_steps=3) as learner, follower(server) as acting:
        acting.shapes = -2.0
        with connect(server.frontend, **SPACES) as client:
            played(client, 5)
            until(lambda: learner.steps == 5, "all is taken")
    assert [rewards for _, _, _, rewards in taken(learner)] == [[-2, -4, -6], [-8, -10]]
    assert learner.taken[-1][0].return_so_far == -12.0


def test_a_refused_batch_takes_no_step_of_any_episode(server: Server) -> None:
    """One of them has begun where nobody followed it."""
    with (
        training(server) as learner,
        service(server) as plain,
        connect(server.frontend, episodes=2, **SPACES) as client,
    ):
        old = client.start_episode()
        old.get_action(obs(0))
        plain.stop()
        with follower(server):
            fresh = client.start_episode()
            with pytest.raises(RemovedError):
                client.get_actions([fresh, old], [obs(1), obs(1)])
            assert (fresh.steps, old.steps) == (0, 1)
            old.abandon()
            assert fresh.get_action(obs(1)) == 1
            fresh.end_episode(obs(2))
            until(lambda: learner.steps == 1, "its step is taken")


def test_a_loop_goes_on_while_an_episode_ends(server: Server) -> None:
    """The runner doesn't say what it saw at the end: other clients have their turns, the loop can be stopped, and it
    sleeps meanwhile (one that didn't would go round some 50,000 times in that second)."""
    with (
        training(server, fragment_steps=2),
        follower(server) as acting,
        connect(server.frontend, **SPACES) as one,
        connect(server.frontend, **SPACES) as other,
    ):
        acting.holds_ends = True
        looked: list[float] = []

        def stop() -> bool:
            if acting.held_ends == 2:
                looked.append(time.monotonic())
            return bool(looked) and looked[-1] - looked[0] > 1.0

        drive_many([(one, Steps()), (other, Steps())], stop=stop)
        assert max(b - a for a, b in pairwise(looked)) < client_followed.FOLLOWER_ANSWERS / 2
        assert len(looked) < 10_000


def test_a_vector_that_is_cut_off_by_steps_ends_as_the_runner_saw_it(server: Server) -> None:
    with training(server) as learner, follower(server), connect(server.frontend, episodes=3, **SPACES) as client:
        drive_vector(client, gym.vector.SyncVectorEnv([Steps] * 3), steps=9)
        until(lambda: learner.steps == 9, "all is taken")
    assert [header.end for header, _ in learner.taken if header.end != "no"] == ["truncated"] * 3
