"""`Client.vector`: columns in, columns out, against a real broker."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fake_service import service
from fake_training import ACTIONS, OBSERVATIONS, Training, broker, training, until
from gymnasium.vector import SyncVectorEnv
from numpy.typing import NDArray

from broker.server import Server
from rllink_zmq import connect
from rllink_zmq.client import Client
from rllink_zmq.client_vector import Vector
from rllink_zmq.drive_loops_vector import drive_vector
from rllink_zmq.errors import EpisodeError

N = 5
SPACES: dict[str, Any] = {"observation_space": OBSERVATIONS, "action_space": ACTIONS, "episodes": N}
World = tuple[Server, Training]


@pytest.fixture
def world() -> Iterator[World]:
    with broker() as server, training(server, fragment_steps=4) as fake:
        yield server, fake


class Worlds:
    """Counts: world i's k-th episode takes i + 1 steps. An observation is (world, episode, step), and a world whose
    episode has ended begins the next one in the same step."""

    def __init__(self) -> None:
        self.episode = np.zeros(N, np.int64)
        self.at = np.zeros(N, np.int64)

    def observe(self) -> NDArray[np.float32]:
        return np.stack([np.arange(N), self.episode, self.at], axis=1).astype(np.float32)

    def step(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The last observations, and who has ended."""
        self.at += 1
        last, over = self.observe(), self.at == np.arange(N) + 1
        self.episode += over
        self.at[over] = 0
        return last, over

    def run(self, vector: Vector, steps: int) -> list[float]:
        returns: list[float] = []
        for _ in range(steps):
            actions = vector.get_actions(self.observe())
            assert actions.shape == (N,) and set(actions.tolist()) <= {0, 1}
            last, over = self.step()
            returns += vector.log_step(last[:, 2], over, np.zeros(N, bool), last).tolist()
        return returns


def check(fake: Training, steps: int, *, gaps: bool = False) -> None:
    """All that came is what happened: `steps` steps of each world."""
    found: defaultdict[str, list[Any]] = defaultdict(list)
    for header, arrays in fake.taken:
        found[header.episode].append((header, arrays))
    seen: defaultdict[int, set[tuple[int, int]]] = defaultdict(set)
    for parts in found.values():
        for header, arrays in parts:
            world, episode = (int(x) for x in arrays["obs"][0, :2])
            assert (arrays["obs"][:, 0] == world).all() and (arrays["obs"][:, 1] == episode).all()
            assert arrays["obs"][:, 2].tolist() == list(range(header.t0, header.t0 + header.steps + 1))
            assert arrays["rewards"].tolist() == list(range(header.t0 + 1, header.t0 + header.steps + 1))
            assert header.return_so_far == sum(range(header.t0 + 1))
            stopped = header is parts[-1][0] and header.end == "truncated"  # by `Vector.end`
            assert header.end == ("terminated" if header.t0 + header.steps == world + 1 else "no") or stopped
            assert arrays["action_dist_inputs"].shape == (header.steps, 2)
            assert not seen[world] & {(episode, header.t0 + i) for i in range(header.steps)}
            seen[world] |= {(episode, header.t0 + i) for i in range(header.steps)}
        for (a, _), (b, _) in pairwise(parts):
            assert gaps or b.t0 == a.t0 + a.steps
    if not gaps:
        assert all(len(seen[world]) == steps for world in range(N))


def test_what_comes_is_what_happened(world: World) -> None:
    server, fake = world
    with connect(server.frontend, **SPACES) as client:
        worlds, vector = Worlds(), client.vector(N)
        returns = worlds.run(vector, 60)
        assert len(returns) == sum(60 // (i + 1) for i in range(N))
        assert sorted(set(returns)) == [sum(range(1, i + 2)) for i in range(N)]
        assert vector.episode_returns[0] == 0
        assert vector.end(worlds.observe()).tolist() == []  # 60 steps end an episode of each
        vector.abandon()
        assert client.close() == 0 and client.stats.steps == 60 * N
    check(fake, 60)
    assert len({header.number for header, _ in fake.taken}) == 15, "a block has 4 rows, as the broker says"


def test_new_weights_end_a_block(world: World) -> None:
    server, fake = world
    with connect(server.frontend, **SPACES) as client:
        worlds, vector = Worlds(), client.vector(N)
        worlds.run(vector, 10)
        fake.publish(3)
        until(lambda: client.ready and client.flow.reader.origin is not None and client.flow.reader.origin.version == 3)
        worlds.run(vector, 10)
        vector.end(worlds.observe())
        vector.abandon()
        assert client.close() == 0
    check(fake, 20)
    versions: dict[int, set[int]] = defaultdict(set)
    for header, _ in fake.taken:
        versions[header.number].add(header.version)
    assert set(map(len, versions.values())) == {1} and {3} in versions.values()


def test_it_waits_for_room_and_goes_on() -> None:
    with broker() as tight, training(tight, steps_ahead=3 * N, fragment_steps=4) as fake:
        fake.paused = True
        with connect(tight.frontend, **SPACES) as client:
            until(lambda: client.ready)
            worlds, vector = Worlds(), client.vector(N)
            steps = 0
            while vector.can_act(worlds.observe()):
                worlds.run(vector, 1)
                steps += 1
            assert steps == 3 and client.stats.steps == client.stats.unsettled * N == 15
            fake.paused = False
            with pytest.raises(EpisodeError, match="have been given already"):
                vector.get_actions(worlds.observe() + 1)
            worlds.run(vector, 7)
            vector.end(worlds.observe())
            vector.abandon()
            assert client.close() == 0
        check(fake, 10)


def test_where_it_can_not_wait_blocks_are_dropped(world: World) -> None:
    with broker() as tight, training(tight, steps_ahead=3 * N, fragment_steps=2) as fake:
        with connect(tight.frontend, on_backpressure="drop", **SPACES) as client:
            worlds, vector = Worlds(), client.vector(N)
            worlds.run(vector, 4)
            fake.paused = True
            worlds.run(vector, 100)
            fake.paused = False
            until(lambda: not client.stats.unsettled or (client.ready and not client.stats.unsettled))
            worlds.run(vector, 6)
            vector.end(worlds.observe())
            vector.abandon()
            assert client.close() == 0
            fragments, steps = client.stats.dropped["backpressure"]
            assert fragments > 10 and steps + fake.steps == 110 * N
        check(fake, 0, gaps=True)


def test_a_block_is_cut_into_fragments_that_the_broker_takes() -> None:
    space = gym.spaces.Box(-10, 10, (3,), np.float32)
    row = 3 * 4 + 8 + 8 + 8 + 12  # of a step and the observation after its piece
    with broker(fragment_bytes=2 * N * row // 2) as small, training(small, fragment_steps=4) as fake:
        with connect(small.frontend, observation_space=space, action_space=ACTIONS, episodes=N) as client:
            worlds, vector = Worlds(), client.vector(N)
            worlds.run(vector, 12)
            vector.end(worlds.observe())
            vector.abandon()
            assert client.close() == 0
            assert set(client.stats.outcomes) == {"delivered"}
    check(fake, 12)


def test_worlds_that_no_window_holds_are_told_so() -> None:
    with broker(fragment_bytes=80) as tiny, training(tiny), connect(tiny.frontend, **SPACES) as client:
        with pytest.raises(
            EpisodeError, match=r"5 episodes need .* bytes for a step each, this client's window has 160"
        ):
            client.vector(N).get_actions(np.zeros((N, 3), np.float32))


def test_actions_of_the_service(world: World) -> None:
    server, fake = world
    with service(server), connect(server.frontend, inference="remote", **SPACES) as client:
        worlds, vector = Worlds(), client.vector(N)
        worlds.run(vector, 30)
        vector.end(worlds.observe())
        vector.abandon()
        assert client.close() == 0
    check(fake, 30)


def bad(rows: int, value: float) -> NDArray[np.float32]:
    values = np.zeros((rows, 3), np.float32)
    values[min(rows - 1, 2), 1] = value
    return values


@pytest.mark.parametrize(
    ("observations", "says"),
    [
        (bad(4, 0), r"expected observations of 5 worlds, float32 of shape \(5, 3\), got float32 of shape \(4, 3\)"),
        (bad(5, math.nan), "world 2's is nan .entry 1 of 3."),
        (np.full((5, 3), "a"), "convert it before"),
    ],
)
def test_observations_that_do_not_fit(world: World, observations: Any, says: str) -> None:
    with connect(world[0].frontend, **SPACES) as client, pytest.raises(EpisodeError, match=says):
        client.vector(N).get_actions(observations)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rewards": np.zeros(4)}, r"expected rewards of 5 worlds, float64 of shape \(5,\)"),
        ({"rewards": np.array([0, 0, 0, math.inf, 0])}, "world 3's is inf"),
        ({"terminated": np.zeros(5)}, "expected terminated of 5 worlds, bool"),
        ({"terminated": np.arange(5) == 4, "last_observations": None}, "world 4 has ended: log_step needs"),
        ({"truncated": np.ones(5, bool), "last_observations": bad(5, math.inf)}, "finite last observations"),
    ],
)
def test_a_step_that_does_not_fit_is_not_logged(world: World, changes: dict[str, Any], says: str) -> None:
    server, fake = world
    good = {
        "rewards": np.ones(N), "terminated": np.zeros(N, bool), "truncated": np.zeros(N, bool),
        "last_observations": bad(N, 0),
    }  # fmt: skip
    with connect(server.frontend, **SPACES) as client:
        vector = client.vector(N)
        vector.get_actions(bad(N, 0))
        with pytest.raises(EpisodeError, match=says):
            vector.log_step(**good | changes)
        vector.log_step(**good)
        vector.end(bad(N, 0))
        vector.abandon()
        assert client.close() == 0
    assert [a["rewards"].tolist() for _, a in fake.taken] == [[1.0]] * N
    assert {header.end for header, _ in fake.taken} == {"truncated"}


def test_calls_out_of_order(world: World) -> None:
    none = np.zeros(N, bool)
    with connect(world[0].frontend, **SPACES) as client:
        with pytest.raises(EpisodeError, match="expected 1 to 5 worlds"):
            client.vector(N + 1)
        with client.start_episode(), pytest.raises(EpisodeError, match="1 episodes are open"):
            client.vector(N)
        vector = client.vector(N)
        with pytest.raises(EpisodeError, match="worlds that are stepped together"):
            client.start_episode()
        with pytest.raises(EpisodeError, match="call get_actions first"):
            vector.log_step(np.zeros(N), none, none)
        vector.get_actions(bad(N, 0))
        with pytest.raises(EpisodeError, match=r"log_step\(\) says first"):
            vector.get_actions(bad(N, 0))
        with pytest.raises(EpisodeError, match='inference="remote"'):
            vector.get_actions_async(bad(N, 0))
        vector.abandon()
        assert client.stats.dropped == {"abandoned": (1, N)}
        with pytest.raises(EpisodeError, match="after abandon"):
            vector.end(bad(N, 0))


def test_a_policy_that_looks_back_is_refused_and_driven_by_episodes(world: World) -> None:
    class Ten(gym.Env[Any, Any]):
        observation_space, action_space = OBSERVATIONS, ACTIONS

        def reset(self, **_: Any) -> Any:
            self.at = 0
            return np.zeros(3, np.float32), {}

        def step(self, action: Any) -> Any:
            self.at += 1
            return np.zeros(3, np.float32), 1.0, self.at == 10, False, {}

    server, fake = world
    with service(server) as serves, connect(server.frontend, inference="remote", **SPACES) as client:
        serves.lookback = 2
        vector = client.vector(3)
        with pytest.raises(EpisodeError, match="looks at earlier observations, which the vector form doesn't serve"):
            vector.get_actions(np.zeros((3, 3), np.float32))
        vector.abandon()
        assert drive_vector(client, SyncVectorEnv([Ten] * 3), episodes=6).episodes >= 6
        assert client.close() == 0
    assert all(not header.episode.startswith("w") for header, _ in fake.taken) and fake.taken


def test_rows_in_which_all_worlds_rest_are_no_steps(world: World) -> None:
    server, fake = world
    with connect(server.frontend, **SPACES) as client:
        vector: Vector = client.vector(N)
        none, every = np.zeros(N, bool), np.ones(N, bool)
        for i in range(9):
            rests = i % 3 == 2
            vector.get_actions(np.full((N, 3), i, np.float32), every if rests else None)
            ends = every if i % 3 == 1 else none
            returns = vector.log_step(np.ones(N), ends, none, np.full((N, 3), i + 1, np.float32))
            assert returns.tolist() == ([2.0] * N if i % 3 == 1 else [])
        vector.end(np.zeros((N, 3)))
        vector.abandon()
        assert client.close() == 0
    assert fake.steps == 6 * N
    assert len({header.episode for header, _ in fake.taken}) == 3 * N
    assert isinstance(client, Client)


def test_what_all_worlds_end_with_must_be_finite_and_nothing_changes_before(world: World) -> None:
    server, fake = world
    zeros, never = np.zeros((N, 3), np.float32), np.zeros(N, bool)
    with connect(server.frontend, **SPACES) as client:
        vector = client.vector(N)
        vector.get_actions(zeros)
        vector.log_step(np.ones(N), never, never)
        spoiled = zeros.copy()
        spoiled[3, 1] = np.nan
        with pytest.raises(EpisodeError, match="expected finite last observations, world 3's is nan"):
            vector.end(spoiled)
        assert vector.end(zeros).tolist() == [1.0] * N
        assert vector.episode_returns.tolist() == [0.0] * N
        until(lambda: sum(header.steps for header, _ in fake.taken) == N)
    assert {header.end for header, _ in fake.taken} == {"truncated"}


def test_a_world_whose_episode_goes_on_cant_rest(world: World) -> None:
    server, _ = world
    zeros, never = np.zeros((N, 3), np.float32), np.zeros(N, bool)
    second = np.arange(N) == 2
    with connect(server.frontend, **SPACES) as client:
        vector = client.vector(N)
        vector.get_actions(zeros)
        vector.log_step(np.ones(N), never, never)
        with pytest.raises(EpisodeError, match="world 2 is in the middle of an episode and can't rest"):
            vector.get_actions(zeros, second)
        vector.get_actions(zeros)
        vector.log_step(np.ones(N), second, never, zeros)
        vector.get_actions(zeros, second)
        vector.log_step(np.ones(N), never, never)
