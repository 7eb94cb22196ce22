"""Episodes of several agents that a runner follows, from the simulator's side: on real sockets, with a service made by
hand."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import msgspec
import numpy as np
import pytest
from fake_follower import AgentsFollower, follower
from fake_training import Training, broker, until
from test_client_agents import AGENTS, DRAWS, MODULES, client, seen, trained
from test_drive_agents import Relay
from test_policy import discrete_blob

from broker.server import Server
from rllink_zmq.drive_loops_agents import agents_env, drive_agents_many
from rllink_zmq.errors import EpisodeError, RemovedError
from rllink_zmq.fragments_agents import ALL
from rllink_zmq.policy import pack_policy, unpack_policy
from rllink_zmq.policy_agents import Crew, CrewModule, pack_crew
from rllink_zmq.spaces import to_wire

SEEN = gym.spaces.Box(0.0, 1000.0, (2,), np.float64)


def crew() -> bytes:
    """Of policies that runners alone act by, and follow the episodes of."""
    manifest, _ = unpack_policy(discrete_blob())
    followed = msgspec.structs.replace(manifest, remote_only="it looks at others", seen=to_wire(SEEN))
    modules = tuple(CrewModule(name, 0, name != "frozen") for name in MODULES)
    return pack_crew(Crew(1, AGENTS, modules, DRAWS[:1], {}), [pack_policy(followed, b"")])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with broker() as running:
        yield running


@contextmanager
def world(server: Server, **options: Any) -> Iterator[tuple[Training, AgentsFollower]]:
    with trained(server, crew(), **options) as fake, follower(server, AgentsFollower, run=fake.run) as acting:
        acting.versions = {"frozen": 0, "learner": 2, "other": 2}
        yield fake, acting


def column(fake: Training, module: str, name: str) -> list[list[Any]]:
    return [arrays[f"{module}/{name}"].tolist() for _, arrays in fake.taken if f"{module}/{name}" in arrays]


def test_one_request_a_step_brings_what_all_have_seen(server: Server) -> None:
    with (
        world(server, fragment_steps=3) as (fake, acting),
        client(server, (0, "left", "right"), inference="remote") as mine,
    ):
        episode = mine.start_episode("all")
        for t in range(7):
            turn = {0: seen(t), "left": seen(t + 1), "right": seen(t)} if t % 2 == 0 else {"right": seen(t)}
            actions = episode.get_action(turn)
            assert actions == {agent: int(row[0]) % 2 for agent, row in turn.items()}
            episode.log_returns(dict.fromkeys(turn, t + 1.0))
        episode.end_episode({0: seen(7), "left": seen(7), "right": seen(7)}, {ALL: True})
        until(lambda: fake.steps == 7, "all env steps are taken")
    assert [t for t, *_ in acting.told] == list(range(8)) and [acts for *_, acts in acting.told] == [True] * 7 + [False]
    assert [len(agents) for _, agents, _, _ in acting.told] == [3, 1, 3, 1, 3, 1, 3, 3]
    assert acting.told[2][2] == {0: (1.0, "no"), "left": (1.0, "no"), "right": (2.0, "no")}
    assert acting.told[7][2] == {0: (7.0, "terminated"), "left": (7.0, "terminated"), "right": (7.0, "terminated")}
    headers = [header for header, _ in fake.taken]
    assert [(h.t0, h.steps, h.end) for h in headers] == [(0, 3, "no"), (3, 3, "no"), (6, 1, "terminated")]
    assert all(h.modules == {"frozen": 0, "learner": 2, "other": 2} and h.version == 2 for h in headers)
    assert [row[0] for rows in column(fake, "learner", "obs") for row in rows] == [0, 1, 4, 9, 9, 16, 25, 36, 36, 49]
    assert column(fake, "frozen", "obs") == [[[1, 0], [9, 2]], [[9, 2], [25, 4], [49, 6]], [[49, 6], [49, 7]]]


def test_where_there_is_no_room_all_steps_leave(server: Server) -> None:
    with (
        world(server, fragment_steps=100, steps_ahead=4) as (fake, acting),
        client(server, inference="remote") as mine,
        mine.start_episode() as episode,
    ):
        fake.paused = True
        for t in range(4):
            episode.get_action({("left", "right")[t % 2]: seen(t)})
            episode.log_returns({"left": 1.0})
        turn = {"left": seen(4)}
        until(lambda: not episode.can_act(turn) and mine.flow.session.unsettled_steps == 4, "all steps leave")
        fake.paused = False
        episode.get_action(turn)
        episode.end_episode({"left": seen(5), "right": seen(5)}, {ALL: True})
        until(lambda: fake.steps == 5, "all env steps are taken")
    assert [(t, acts) for t, _, _, acts in acting.told][-3:] == [(4, False), (4, True), (5, False)]
    # `right` has acted before the cut and is asked no more: its step is complete in the last fragment.
    assert column(fake, "frozen", "obs")[-1][-1] == [25, 5] and column(fake, "learner", "obs")[-1][-1] == [25, 5]


def test_agents_come_and_go(server: Server) -> None:
    """An end is told once, also that of an agent without a last observation."""
    with (
        world(server, fragment_steps=2) as (fake, acting),
        client(server, AGENTS[:2] + AGENTS[3:], inference="remote") as mine,
    ):
        with mine.start_episode() as episode:
            episode.get_action({"left": seen(0)})
            episode.log_returns({"left": 1.0})
            episode.get_action({"left": seen(1), "right": seen(1)})
            episode.log_returns({"left": 2.0, "right": 3.0})
            episode.get_action({0: seen(2), "right": seen(2)}, {"left": True})
            episode.log_returns({0: 6.0, "right": 4.0})
            episode.get_action({0: seen(3), "right": seen(3)}, {"right": True})
            episode.end_episode({0: seen(4)}, {ALL: True})
            until(lambda: fake.steps == 4, "all env steps are taken")
    assert [told for _, _, told, _ in acting.told] == [
        {"left": (0, "no")}, {"left": (1, "no"), "right": (0, "no")},
        {"left": (2, "terminated"), "right": (3, "no"), 0: (0, "no")}, {"right": (4, "terminated"), 0: (6, "no")},
        {0: (0, "terminated")},
    ]  # fmt: skip
    lefts = [row[0] for rows in column(fake, "frozen", "obs") for row in rows]
    assert lefts == [0, 1, 1], "what it would have seen is its last observation again"


def test_an_episode_that_nobody_follows_any_more_can_not_go_on(server: Server) -> None:
    with world(server) as (_, acting), client(server, inference="remote") as mine:
        with mine.start_episode() as episode:
            episode.get_action({"left": seen(0)})
            acting.forgets()
            with pytest.raises(RemovedError, match=r"refuses \(lost\)"):
                episode.get_action({"left": seen(1)})
        with mine.start_episode() as episode, pytest.raises(EpisodeError, match=r"'left' acts by .*, which looks at"):
            episode.log_action({"left": seen(1)}, {"left": 0}, {"left": -0.5})


def test_an_end_is_told_where_nobody_observes(server: Server) -> None:
    """With the next step in which somebody does; and the fragment is cut between."""
    with (
        world(server, fragment_steps=2) as (fake, acting),
        client(server, inference="remote") as mine,
        mine.start_episode() as episode,
    ):
        for t in range(2):
            episode.get_action({"left": seen(t), "right": seen(t)})
            episode.log_returns({"left": 1.0, "right": t + 3.0})
        assert episode.get_action({}, {"right": True}) == {}
        episode.get_action({"left": seen(3)})
        episode.end_episode({"left": seen(4)}, {ALL: True})
        until(lambda: fake.steps == 4, "all env steps are taken")
    assert acting.ended_at == {"right": 2}
    assert [(t, told) for t, _, told, _ in acting.told][2:] == [
        (3, {"left": (1.0, "no"), "right": (4.0, "terminated")}), (4, {"left": (0.0, "terminated")}),
    ]  # fmt: skip


def test_who_comes_as_all_others_end_begins_no_step(server: Server) -> None:
    """RLlib's episode has ended then."""
    with world(server) as (_, acting), client(server, inference="remote") as mine, mine.start_episode() as episode:
        episode.get_action({"left": seen(0)})
        turn = {"left": seen(1), "right": seen(1)}, {"left": True}
        assert episode.all_ended(*turn)
        with pytest.raises(EpisodeError, match="all its agents have ended"):
            episode.get_action(*turn)
        episode.end_episode(*turn)
    assert acting.told[-1][1:3] == (["left"], {"left": (0.0, "terminated")})


def test_what_a_followed_episode_does_not_take(server: Server) -> None:
    with world(server) as (_, acting), client(server, inference="remote") as mine:
        with mine.start_episode() as episode, pytest.raises(EpisodeError, match="begins without any observation"):
            episode.get_action({})
        with mine.start_episode() as episode:
            episode.get_action_async({"left": seen(0)}).forget()
            with pytest.raises(EpisodeError, match="the runner that follows the episode has been told"):
                episode.get_action({"left": seen(0), "right": seen(0)})
            episode.get_action({"left": seen(0)})
            acting.refuses = "no_module"
            with pytest.raises(RemovedError, match="no_module"):
                episode.end_episode({"left": seen(1)}, {ALL: True})


def test_once_there_is_room_again_nothing_is_dropped_any_more(server: Server) -> None:
    with world(server, fragment_steps=2, steps_ahead=4) as (fake, _):
        fake.paused = True
        with client(server, inference="remote", on_backpressure="drop") as mine, mine.start_episode() as episode:
            session = mine.flow.session

            def settled() -> bool:
                mine.flow.look()
                return not session.unsettled

            for t in range(20):
                episode.get_action({"left": seen(t)})
            dropped = session.dropped["backpressure"][1]
            fake.paused = False
            for t in range(20):
                until(settled, "there is room")
                episode.get_action({"left": seen(t)})
            episode.end_episode({"left": seen(20)}, {ALL: True})
            until(lambda: fake.steps + session.dropped["backpressure"][1] == 40, "all is counted")
            assert 10 <= dropped <= session.dropped["backpressure"][1] <= dropped + 2


def test_rewards_are_what_the_runner_has_made_of_them(server: Server) -> None:
    with world(server, fragment_steps=2) as (fake, acting), client(server, inference="remote") as mine:
        acting.shapes = -2.0
        with mine.start_episode() as episode:
            for t in range(3):
                episode.get_action({"left": seen(t), "right": seen(t)})
                episode.log_returns({"left": 1.0, "right": 2.0})
            episode.end_episode({"left": seen(3), "right": seen(3)}, {ALL: True})
            assert episode.episode_return == -18.0
        until(lambda: fake.steps == 3, "all env steps are taken")
    assert column(fake, "learner", "rewards") == [[-4, -4], [-4]] or column(fake, "frozen", "rewards") == [
        [-4, -4],
        [-4],
    ]


class Couple(Relay):
    """`Relay` with agents that the crew knows."""

    possible_agents = ("left", "right")

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return _named(super().reset()[0]), {}

    def step(self, actions: dict[str, int]) -> Any:
        told = super().step({("a", "b")[agent == "right"]: action for agent, action in actions.items()})
        return (*map(_named, told[:4]), {})


def _named(told: dict[str, Any]) -> dict[str, Any]:
    return {{"a": "left", "b": "right"}.get(agent, agent): value for agent, value in told.items()}


def test_loops_begin_the_next_episode(server: Server) -> None:
    with world(server, fragment_steps=2, steps_ahead=9) as (fake, acting):
        clients = [client(server, inference="remote") for _ in range(2)]
        threading.Timer(0.2, acting.forgets).start()
        summary = drive_agents_many([(one, agents_env(Couple())) for one in clients], episodes=40)
        for one in clients:
            one.close()
        until(lambda: sum(header.end != "no" for header, _ in fake.taken) == 80, "all ends are taken")
    assert summary.episodes == 80
