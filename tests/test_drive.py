"""Loops: environments that count, so that what arrives can be told from what happened."""

import threading
import time
from itertools import pairwise
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from counting_env import LONGEST, Counting
from fake_training import broker, training, until
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from rllink_zmq import connect
from rllink_zmq.drive_loops import _wake, drive, drive_many
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.errors import SettingsError, VectorError


@pytest.fixture
def world():
    with broker() as server, training(server, fragment_steps=4) as fake:
        yield server, fake


def episodes_of(fake):
    """(session, episode id) -> its fragments, checked for gaps."""
    found = {}
    for header, arrays in fake.taken:
        found.setdefault((header.session, header.episode), []).append((header, arrays))
    for parts in found.values():
        parts.sort(key=lambda part: part[0].t0)
        assert parts[0][0].t0 == 0
        for (h, a), (k, b) in pairwise(parts):
            assert k.t0 == h.t0 + h.steps
            np.testing.assert_array_equal(a["obs"][-1], b["obs"][0])
            assert h.end == "no"
    return list(found.values())


def check_episode(parts):
    """That it is what `Counting` does, from its first observation to its last."""
    obs = np.concatenate([parts[0][1]["obs"][:1], *(a["obs"][1:] for _, a in parts)])
    rewards = np.concatenate([a["rewards"] for _, a in parts])
    np.testing.assert_array_equal(obs[:, 1], np.arange(len(obs)))
    assert len(set(obs[:, 0])) == 1
    np.testing.assert_array_equal(rewards, 1 + np.arange(len(rewards)))
    k = int(obs[0, 0])
    if parts[-1][0].end != "no":
        assert len(rewards) == min(k + 1, LONGEST)
        assert parts[-1][0].end == ("truncated" if k % 3 == 2 else "terminated")
    return k


def test_one_environment(world):
    server, fake = world
    with connect(server.frontend) as client:
        summary = drive(client, Counting(), episodes=6, seed=7)
        assert client.close() == 0
    assert (summary.episodes, summary.steps) == (6, 21)
    assert summary.episode_return_mean == pytest.approx(np.mean([1, 3, 6, 10, 15, 21]))
    assert summary.wall_s > 0
    found = episodes_of(fake)
    assert sorted(check_episode(parts) for parts in found) == list(range(6))
    assert all(a["obs"][0, 2] == 7 for parts in found for _, a in parts)


def test_a_number_of_steps(world):
    server, fake = world
    with connect(server.frontend) as client:
        summary = drive(client, Counting(), steps=8)
        assert client.close() == 0
        assert client.stats.dropped == {}
    assert (summary.episodes, summary.steps, fake.steps) == (3, 8, 8)
    assert sorted(parts[-1][0].end for parts in episodes_of(fake)) == [
        "terminated", "terminated", "truncated", "truncated",
    ]  # fmt: skip


def test_nothing_asked_for_is_nothing_done(world):
    server, _ = world
    with connect(server.frontend) as client:
        assert drive(client, Counting(), episodes=0).episode_return_mean is None
        assert drive(client, Counting(), stop=lambda: True).steps == 0


def test_stop_is_heard_while_it_waits(caplog):
    with broker() as server, connect(server.frontend) as client:  # no training
        started = time.monotonic()
        summary = drive(client, Counting(), stop=lambda: time.monotonic() > started + 0.3)
        assert summary.steps == 0
        assert time.monotonic() - started < 5


def test_a_failing_environment_abandons_its_episode(world):
    server, _ = world

    class Failing(Counting):
        def step(self, action):
            if self.episode == 2:
                raise ZeroDivisionError
            return super().step(action)

    with connect(server.frontend) as client:
        with pytest.raises(ZeroDivisionError):
            drive(client, Failing())
        assert client.stats.dropped == {"abandoned": (1, 1)}
        assert not client.flow.builders


def test_many_clients_in_one_thread(world):
    server, fake = world
    clients = [connect(server.frontend, name=str(i)) for i in range(12)]
    summary = drive_many([(client, Counting()) for client in clients], episodes=5, seed=100)
    assert (summary.episodes, summary.steps) == (60, 12 * 15)
    assert sum(client.close() for client in clients) == 0
    found = episodes_of(fake)
    assert len(found) == 60
    for parts in found:
        check_episode(parts)
    assert sorted({int(a["obs"][0, 2]) for parts in found for _, a in parts}) == list(range(100, 112))


def test_one_that_waits_does_not_stop_the_others(world):
    """One of the two has nothing to act with: its broker has no training."""
    server, fake = world
    with broker() as idle, connect(idle.frontend) as waits, connect(server.frontend) as goes:
        stop = threading.Event()
        seats = [(waits, Counting()), (goes, Counting())]
        thread = threading.Thread(target=drive_many, args=(seats,), kwargs={"stop": stop.is_set})
        thread.start()
        until(lambda: fake.steps > 200)
        stop.set()
        thread.join()
        assert waits.stats.steps == 0


def test_they_share_a_small_limit():
    with broker() as tight, training(tight, steps_ahead=20, fragment_steps=4) as fake:
        clients = [connect(tight.frontend) for _ in range(10)]
        summary = drive_many([(client, Counting()) for client in clients], episodes=10)
        assert summary.episodes == 100
        assert sum(client.close() for client in clients) == 0
        assert fake.steps == summary.steps
        assert all(set(client.stats.outcomes) == {"delivered"} for client in clients)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_of_environments(world, mode):
    server, fake = world
    envs = SyncVectorEnv([Counting] * 3, autoreset_mode=mode)
    with connect(server.frontend, episodes=3) as client:
        summary = drive_vector(client, envs, episodes=30, seed=3)
        assert client.close() == 0
    assert summary.episodes >= 30
    assert fake.steps == summary.steps
    found = episodes_of(fake)
    ks = sorted(check_episode(parts) for parts in found)
    assert ks[:27] == [k for k in range(9) for _ in range(3)]


def test_a_vector_cut_off_by_steps(world):
    server, fake = world
    envs = SyncVectorEnv([Counting] * 2)
    with connect(server.frontend, episodes=2) as client:
        summary = drive_vector(client, envs, steps=20)
        assert client.close() == 0
        assert client.stats.dropped == {}
    assert 20 <= summary.steps <= 21
    assert fake.steps == summary.steps


def test_a_vector_needs_as_many_episodes_and_a_mode(world):
    server, _ = world
    with connect(server.frontend) as client:
        envs = SyncVectorEnv([Counting] * 2)
        with pytest.raises(SettingsError, match=r"connect\(..., episodes=2\)"):
            drive_vector(client, envs)
        envs.metadata = {}
        with pytest.raises(SettingsError, match="autoreset_mode"):
            drive_vector(client, envs)
        assert not client.flow.builders


def test_a_vector_that_waits_is_stopped(world):
    with broker() as idle, connect(idle.frontend, episodes=2) as client:
        started = time.monotonic()
        summary = drive_vector(client, SyncVectorEnv([Counting] * 2), stop=lambda: time.monotonic() > started + 0.2)
        assert summary.steps == 0


class Pairs(gym.Env):
    """Two steps an episode; its observation is a dict of a count and the same in an array."""

    def __init__(self):
        self.observation_space = gym.spaces.Dict({"n": gym.spaces.Discrete(9), "v": gym.spaces.Box(0, 9, (2,))})
        self.action_space = gym.spaces.Discrete(2)
        self.n = 0

    def _observation(self):
        return {"n": self.n, "v": np.full(2, self.n, np.float32)}

    def reset(self, *, seed=None, options=None):
        self.n = 0
        return self._observation(), {}

    def step(self, action):
        self.n += 1
        return self._observation(), 1.0, self.n == 2, False, {}


class Noting:
    """Stands for a client, and keeps the observations that its episodes are given."""

    def __init__(self):
        session = SimpleNamespace(episodes=2)
        connection = SimpleNamespace(flush=lambda: None)
        self.flow = SimpleNamespace(
            session=session, remote=None, connections=[], look=lambda: None, connection=connection
        )  # fmt: skip
        self.seen = []

    def vector(self, worlds):
        def refuse(*_):
            raise VectorError("a policy that looks back")

        return SimpleNamespace(can_act=refuse, abandon=lambda: None)

    def start_episode(self, **options):
        seen = []
        self.seen.append(seen)
        builder = SimpleNamespace(follows=False)
        note = SimpleNamespace(
            log_returns=lambda reward: None, abandon=lambda: None, steps=1, episode_return=0.0, builder=builder
        )  # fmt: skip
        note.open = True
        note.end_episode = lambda observation, truncated: seen.append((observation, "end"))

        def ending(observation, truncated):
            seen.append((observation, "end"))
            return SimpleNamespace(done=lambda: True, result=lambda: None)

        note.ending = ending
        note.seen = seen
        return note

    def can_act(self, episodes, observations):
        return True

    def get_actions(self, episodes, observations):
        for episode, observation in zip(episodes, observations, strict=True):
            episode.seen.append((observation, "act"))
        return np.zeros(len(episodes), np.int64)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_vector_of_environments_with_observations_of_several_parts(mode):
    client = Noting()
    drive_vector(client, SyncVectorEnv([Pairs] * 2, autoreset_mode=mode), episodes=4)
    whole = [seen for seen in client.seen if len(seen) == 3]
    assert len(whole) == 4
    for seen in whole:
        assert [(int(o["n"]), o["v"].tolist(), what) for o, what in seen] == [
            (0, [0.0, 0.0], "act"),
            (1, [1.0, 1.0], "act"),
            (2, [2.0, 2.0], "end"),
        ]


def test_a_client_that_was_looked_at_tries_again():
    """The look may have read what it waits for, and nothing else will come."""
    looked = []
    reader = SimpleNamespace(origin=object())
    flow = SimpleNamespace(
        connections=[], reader=reader, remote=object(), rests=False, look_at=0.0, look=lambda: looked.append(True),
        session=SimpleNamespace(next_deadline=lambda: float("inf")),
    )  # fmt: skip
    seat = SimpleNamespace(
        client=SimpleNamespace(flow=flow), origin=reader.origin, due=float("inf"), blocked=True
    )  # fmt: skip
    _wake([seat], 0.0)
    assert looked and not seat.blocked
