"""`connect_agents(inference="remote")`: against a real broker, with a service and a learner's side made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from click.testing import CliRunner
from fake_service import Service, service
from fake_training import OBSERVATIONS, Training, broker, until
from test_client_agents import MODULES, client, seen, trained
from test_drive_agents import Relay, played, trained_on

from broker.server import Server
from rllink_zmq.cli import main as cli
from rllink_zmq.client_agents import connect_agents
from rllink_zmq.drive_loops_agents import agents_env, drive_agents_many
from rllink_zmq.errors import ConnectionTimeout, EpisodeError, PolicyError, RemovedError, SettingsError
from rllink_zmq.fragments_agents import ALL


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with broker() as running:
        yield running


@contextmanager
def world(server: Server, **options: Any) -> Iterator[tuple[Training, Service]]:
    with trained(server, **options) as fake, service(server, run=fake.run) as acting:
        acting.versions = {"frozen": 0, "learner": 2, "other": 2}
        yield fake, acting


def test_each_module_that_acts_is_asked_once_a_step(server: Server) -> None:
    with (
        world(server, fragment_steps=3) as (fake, acting),
        client(server, (0, "left", "right"), inference="remote") as mine,
    ):
        episode = mine.start_episode("all")
        for t in range(7):
            turn = {0: seen(t), "left": seen(t + 1), "right": seen(t)} if t % 2 == 0 else {"right": seen(t)}
            if t % 2 == 0 and t:
                assert episode.waiting == {0, "left", "right"}
            actions = episode.get_action(turn)
            assert actions == {agent: int(row[0]) % 2 for agent, row in turn.items()}
            assert all(type(action) is int for action in actions.values())
            episode.log_returns(dict.fromkeys(turn, 1.0))
        episode.end_episode({0: seen(7), "left": seen(7), "right": seen(7)}, {ALL: True})
        until(lambda: fake.steps == 7, "all env steps are taken")
    assert sorted(acting.modules) == ["frozen"] * 4 + ["learner"] * 7 + ["other"] * 4
    assert not mine.flow.reader.policies, "nothing is loaded here"
    headers = [header for header, _ in fake.taken]
    assert [(h.t0, h.steps, h.end) for h in headers] == [(0, 3, "no"), (3, 3, "no"), (6, 1, "terminated")]
    assert all(h.modules == {"frozen": 0, "learner": 2, "other": 2} and h.version == 2 for h in headers)
    arrays = [columns for _, columns in fake.taken]
    for module, count in (("frozen", 4), ("learner", 7), ("other", 4)):
        parts = [a for a in arrays if f"{module}/actions" in a]
        assert sum(len(a[f"{module}/actions"]) for a in parts) == count
        for a in parts:
            np.testing.assert_array_equal(a[f"{module}/actions"], a[f"{module}/action_dist_inputs"][:, 0])
            np.testing.assert_array_equal(a[f"{module}/actions"], a[f"{module}/obs"][:-1, 0] % 2)
            assert set(a[f"{module}/action_logp"].tolist()) == {-0.5}


def test_all_are_asked_before_any_answer_is_waited_for(server: Server) -> None:
    with world(server) as (_, acting), client(server, (0, "left", "right"), inference="remote") as mine:
        acting.held = True
        with mine.start_episode() as episode:
            asked = episode.get_action_async({0: seen(1), "left": seen(2), "right": seen(3)})
            assert mine.flow.remote is not None and len(mine.flow.remote.session.open_acts) == 3
            assert not asked.done()
            with pytest.raises(EpisodeError, match="has asked for actions already"):
                episode.get_action({0: seen(1)})
            with pytest.raises(ConnectionTimeout):
                asked.result(timeout=0.05)
            acting.held = False
            assert asked.result() == {0: 1, "left": 0, "right": 1}
            with pytest.raises(EpisodeError, match="taken already"):
                asked.result()
            assert episode.steps == 1


def test_another_version_of_one_module_ends_the_fragment(server: Server) -> None:
    with world(server, fragment_steps=100) as (fake, acting), client(server, inference="remote") as mine:
        with mine.start_episode() as episode:
            episode.get_action({"left": seen(0), "right": seen(0)})
            episode.get_action({"left": seen(1)})  # right has not been answered
            fake.publish(3, module="learner")
            episode.get_action({"left": seen(2)})  # the frozen one is what it was
            acting.versions["learner"] = 3
            episode.get_action({"left": seen(3), "right": seen(3)})
            episode.end_episode({"left": seen(4), "right": seen(4)}, {ALL: True})
        until(lambda: fake.steps == 4, "all env steps are taken")
    (old, _), (new, columns) = fake.taken
    assert (old.version, old.modules, old.steps) == (2, {"frozen": 0, "learner": 2}, 3)
    assert (new.version, new.modules, new.steps) == (3, {"frozen": 0, "learner": 3}, 1)
    assert [(r.agent, r.t0, r.steps, r.first) for r in old.agents] == [("left", 0, 3, -1), ("right", 0, 1, -1)]
    assert [(r.agent, r.t0, r.steps, r.first) for r in new.agents] == [("left", 3, 1, -1), ("right", 1, 1, -1)]
    np.testing.assert_array_equal(columns["learner/obs"][:, 0], [3, 4])


def test_a_module_that_the_service_does_not_have(server: Server) -> None:
    with world(server) as (fake, acting), client(server, inference="remote") as mine:
        del acting.versions["learner"]
        with mine.start_episode() as episode:
            with pytest.raises(
                RemovedError, match=r"refuses \(no_module\) to act for agent 'right' by module 'learner'"
            ):
                episode.get_action({"left": seen(1), "right": seen(1)})
            assert episode.steps == 0
            acting.versions["learner"] = 2
            assert episode.get_action({"left": seen(1), "right": seen(1)}) == {"left": 1, "right": 1}
            episode.end_episode({"left": seen(2), "right": seen(2)}, {ALL: True})
        until(lambda: fake.steps == 1, "the step is taken")


def test_a_request_that_is_given_up_costs_nothing(server: Server) -> None:
    with world(server) as (fake, acting), client(server, inference="remote") as mine:
        acting.held = True
        episode = mine.start_episode()
        episode.get_action_async({"left": seen(1), "right": seen(1)})
        episode.abandon()
        flow = mine.flow
        assert flow.reserved == 0 and flow.remote is not None and not flow.remote.session.open_acts
        acting.held = False
        with mine.start_episode() as episode:
            episode.get_action({"left": seen(1), "right": seen(1)})
            episode.end_episode({"left": seen(2), "right": seen(2)}, {ALL: True})
        until(lambda: fake.steps == 1, "the step is taken")


def test_a_service_of_fewer_requests_is_asked_one_after_the_other() -> None:
    with broker(act_requests=1) as server, world(server) as (_, acting):
        with client(server, (0, "left", "right"), inference="remote") as mine, mine.start_episode() as episode:
            for t in range(3):
                turn = {0: seen(t), "left": seen(t), "right": seen(t)}
                assert episode.get_action(turn) == dict.fromkeys(turn, t % 2)
        assert sorted(acting.modules) == sorted(MODULES * 3)


def test_where_the_policy_can_not_run_runners_are_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from rllink_zmq.policy import Policy

    def fails(*_: Any) -> Policy:
        raise PolicyError("no ONNX Runtime here")

    monkeypatch.setattr(Policy, "load", fails)
    with world(server) as (_, acting):
        with client(server) as mine, mine.start_episode() as episode, pytest.raises(PolicyError):
            episode.get_action({"left": seen(1)})
        with client(server, inference="auto") as mine, mine.start_episode() as episode:
            assert episode.get_action({"left": seen(1)}) == {"left": 1}
        with client(server, inference="auto") as mine, mine.start_episode() as episode:
            until(lambda: episode.can_act({"left": seen(1)}), "it may ask")
            assert episode.get_action({"left": seen(1)}) == {"left": 1}
        assert acting.modules == ["frozen"] * 2
    with pytest.raises(SettingsError, match="inference"):
        client(server, inference="elsewhere")


def test_simulators_of_one_process_wait_together() -> None:
    """And ask for what their agents are mapped to, as they come and go."""
    envs = [Relay(), Relay(), Relay()]
    agents = agents_env(envs[0])
    observed, acted = agents.observation_spaces, agents.action_spaces
    with (
        broker() as server,
        trained_on(server, ["a", "b"], OBSERVATIONS, gym.spaces.Discrete(2)) as fake,
        service(server, run=fake.run) as acting,
        ExitStack() as stack,
    ):
        acting.versions = {"m": 4}
        clients = [
            stack.enter_context(
                connect_agents(server.frontend, observation_spaces=observed, action_spaces=acted, inference="remote")
            )
            for _ in envs
        ]
        summary = drive_agents_many(zip(clients, envs, strict=True), episodes=2)
        assert (summary.episodes, summary.steps, summary.episode_return_mean) == (6, 48, 10.0)
        assert played(fake, 48) == {"a": 6 * 6, "b": 6 * 4}
        assert {tuple(h.modules.items()) for h, _ in fake.taken} == {(("m", 4),)}
        assert max(len(rows) for _, rows in acting.asked) == 2, "both agents of a module are one request"
        arguments = ["simulate", "--env", "test_drive_agents:Relay", "--broker", server.frontend, "--episodes", "2"]
        result = CliRunner().invoke(cli, [*arguments, "--inference", "remote", "--json"])
        assert result.exit_code == 0, result.output
        assert '"env_steps": 16' in result.output and '"unsettled": 0' in result.output
