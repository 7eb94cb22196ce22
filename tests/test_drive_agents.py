"""Loops for environments of several agents, against a broker and a learner's side that is not RLlib."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from click.testing import CliRunner
from fake_training import OBSERVATIONS, Training, broker, training, until
from processes import ROOT
from test_policy import BODY, discrete_blob

from broker.server import Server
from rllink_zmq.cli import main as cli
from rllink_zmq.client_agents import connect_agents
from rllink_zmq.drive_loops_agents import Agents, agents_env, drive_agents, find_agents_env
from rllink_zmq.errors import SettingsError
from rllink_zmq.messages import AgentId
from rllink_zmq.policy_agents import Crew, CrewModule, Draw, pack_crew
from rllink_zmq.spaces import agents_to_wire

sys.path.append(str(ROOT / "tests"))
RUNS = itertools.count(1)


class Relay:
    """As RLlib's `MultiAgentEnv`: a runs 4 steps alone, then b appears and both go on to step 6; b then goes on alone
    to step 8. Observations are the number of the env step, three times."""

    possible_agents = ("a", "b")

    def get_observation_space(self, agent: str) -> gym.Space[Any]:
        return OBSERVATIONS

    def get_action_space(self, agent: str) -> gym.Space[Any]:
        return gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        self.t = 0
        return {"a": self._seen()}, {}

    def step(self, actions: dict[str, int]) -> Any:
        expected = {"a"} if self.t < 4 else {"a", "b"} if self.t < 6 else {"b"}
        assert set(actions) == expected, (self.t, actions)
        self.t += 1
        seen = {"a"} if self.t < 4 else {"a", "b"} if self.t <= 6 else {"b"}
        terminateds = {"a": self.t == 6, "__all__": self.t == 8}
        return {a: self._seen() for a in seen}, dict.fromkeys(actions, 1.0), terminateds, {"__all__": False}, {}

    def _seen(self) -> np.ndarray:
        return np.full(3, self.t, np.float32)

    def close(self) -> None:
        """Nothing is open."""


class Silent(Relay):
    """As `Relay`, but it never says that all have ended: b ends by itself."""

    def step(self, actions: dict[str, int]) -> Any:
        observations, rewards, terminateds, _, infos = super().step(actions)
        return observations, rewards, {"a": terminateds["a"]}, {"b": self.t == 8}, infos


def countdown() -> Any:
    """PettingZoo's AEC form: x, y and z act in turn, and each action is worth 1 to all that are there. x ends with its
    third move, z is truncated with y's fourth, and y ends after its fifth. Observations are the number of moves."""
    from pettingzoo import AECEnv

    class Countdown(AECEnv):  # type: ignore[misc]
        metadata = {"name": "countdown_v0"}  # noqa: RUF012
        possible_agents = ["x", "y", "z"]  # noqa: RUF012

        def observation_space(self, agent: str) -> gym.Space[Any]:
            return OBSERVATIONS

        def action_space(self, agent: str) -> gym.Space[Any]:
            return gym.spaces.Discrete(2)

        def observe(self, agent: str) -> np.ndarray:
            return np.full(3, sum(self.moves.values()), np.float32)

        def reset(self, seed: int | None = None, options: Any = None) -> None:
            self.agents = list(self.possible_agents)
            self.moves = dict.fromkeys(self.agents, 0)
            self.rewards, self._cumulative_rewards = dict.fromkeys(self.agents, 0.0), dict.fromkeys(self.agents, 0.0)
            self.terminations, self.truncations = dict.fromkeys(self.agents, False), dict.fromkeys(self.agents, False)
            self.infos: dict[str, Any] = {agent: {} for agent in self.agents}
            self.agent_selection = "x"

        def step(self, action: Any) -> None:
            agent = self.agent_selection
            if self.terminations[agent] or self.truncations[agent]:
                return self._was_dead_step(action)  # type: ignore[no-any-return]
            assert action in (0, 1)
            self.moves[agent] += 1
            self._cumulative_rewards[agent] = 0.0
            self.rewards = dict.fromkeys(self.agents, 1.0)
            self._accumulate_rewards()
            ends = {
                ("x", 3): ("x", self.terminations),
                ("y", 4): ("z", self.truncations),
                ("y", 5): ("y", self.terminations),
            }
            who, flags = ends.get((agent, self.moves[agent]), ("", {}))
            flags[who] = True
            gone = [a for a in self.agents if self.terminations[a] or self.truncations[a]]
            order = [*self.agents[self.agents.index(agent) + 1 :], *self.agents]
            self.agent_selection = next((a for a in order if a not in gone), agent)
            self._deads_step_first()
            return None

    return Countdown()


def spaces_of(env: Agents) -> dict[str, Any]:
    return {"observation_spaces": env.observation_spaces, "action_spaces": env.action_spaces}


def trained_on(server: Server, agents: list[AgentId], space: Any, action: Any, fragment_steps: int = 100) -> Any:
    module = (CrewModule("m", 0, True),)
    draws = (Draw(1, (0,) * len(agents)),)
    spaces = agents_to_wire(dict.fromkeys(agents, space), dict.fromkeys(agents, action))
    blob = pack_crew(Crew(1, spaces.agents, module, draws), [discrete_blob()])
    return training(
        server, version=None, blob=blob, spaces=spaces, run=f"{next(RUNS):012x}-aaaaaaaa", fragment_steps=fragment_steps
    )


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with broker() as running:
        yield running


def played(fake: Training, steps: int) -> dict[Any, int]:
    until(lambda: fake.steps >= steps, "all env steps are taken")
    found: dict[Any, int] = {}
    for header, _ in fake.taken:
        for rows in header.agents:
            found[rows.agent] = found.get(rows.agent, 0) + rows.steps
    return found


def test_agents_of_rllibs_kind_come_and_go(server: Server) -> None:
    env = Relay()
    with trained_on(server, ["a", "b"], OBSERVATIONS, gym.spaces.Discrete(2)) as fake:
        fake.publish(0, BODY, "m")
        agents = agents_env(env)
        observed, acted = agents.observation_spaces, agents.action_spaces
        with connect_agents(server.frontend, observation_spaces=observed, action_spaces=acted) as client:
            summary = drive_agents(client, env, episodes=2, seed=3)
            assert (summary.episodes, summary.steps, summary.episode_return_mean) == (2, 16, 10.0)
            assert drive_agents(client, env, steps=5).steps == 5
        assert played(fake, 21) == {"a": 6 + 6 + 5, "b": 4 + 4 + 1}
        ends = [header.end for header, _ in fake.taken]
        assert ends.count("terminated") == 2 and ends[-1] == "truncated"


def test_the_episode_is_over_when_all_have_ended(server: Server) -> None:
    """RLlib ends it then, whatever `__all__` says; here at a cut, too."""
    with trained_on(server, ["a", "b"], OBSERVATIONS, gym.spaces.Discrete(2), fragment_steps=1) as fake:
        fake.publish(0, BODY, "m")
        with connect_agents(server.frontend, **spaces_of(agents_env(Silent()))) as client:
            summary = drive_agents(client, Silent(), episodes=2)
            assert (summary.episodes, summary.steps, summary.episode_return_mean) == (2, 16, 10.0)
        assert played(fake, 16) == {"a": 12, "b": 8}
        ends = [(r.agent, r.end) for header, _ in fake.taken for r in header.agents if r.end != "no"]
        assert ends == 2 * [("a", "terminated"), ("b", "truncated")]


def test_agents_in_turn_end_one_by_one(server: Server) -> None:
    """Each gets what it was given since it acted last, until its end, and the dead step with None."""
    agents = agents_env(countdown())
    with trained_on(server, ["x", "y", "z"], OBSERVATIONS, gym.spaces.Discrete(2), fragment_steps=4) as fake:
        fake.publish(0, BODY, "m")
        with connect_agents(server.frontend, **spaces_of(agents)) as client:
            summary = drive_agents(client, countdown(), episodes=2)
        # x moves in 0, 3, 6; y in 1, 4, 7, 9, 10 and z in 2, 5, 8; x sees the first 7 moves, z 10 and y 11.
        assert (summary.episodes, summary.steps) == (2, 22)
        assert played(fake, 22) == {"x": 6, "y": 10, "z": 6}
        assert summary.episode_return_mean == 7 + 10 + 8
        ends = {(r.agent, r.end) for header, _ in fake.taken for r in header.agents if r.end != "no"}
        assert ends == {("x", "terminated"), ("y", "terminated"), ("z", "truncated")}


def test_a_policy_that_is_removed_ends_the_episode_and_not_the_simulator(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    env, spaces = (
        Relay(),
        agents_to_wire(dict.fromkeys("ab", OBSERVATIONS), dict.fromkeys("ab", gym.spaces.Discrete(2))),
    )

    def crew(module: str) -> bytes:
        return pack_crew(Crew(1, spaces.agents, (CrewModule(module, 0, True),), (Draw(1, (0, 0)),)), [discrete_blob()])

    step, steps = env.step, itertools.count(1)

    def stepping(actions: dict[str, int]) -> Any:
        if next(steps) == 20:  # in the middle of the third episode
            fake.recast(crew("next"))
            fake.publish(1, BODY, "next")
            until(lambda: client.ready and "next" in client.flow.reader.policies, "the simulator has it")
        return step(actions)

    env.step = stepping  # type: ignore[method-assign]
    run = f"{next(RUNS):012x}-aaaaaaaa"
    with training(server, version=None, blob=crew("m"), spaces=spaces, run=run, fragment_steps=4) as fake:
        fake.publish(0, BODY, "m")
        with connect_agents(server.frontend, **spaces_of(agents_env(env))) as client:
            summary = drive_agents(client, env, episodes=4)
            assert summary.episodes == 4 and summary.steps > 32
        until(lambda: sum(h.end == "terminated" for h, _ in fake.taken) == 4, "four episodes have come to their ends")
        assert {module for header, _ in fake.taken for module in header.modules} == {"m", "next"}
        assert "the policy 'm' by which agent" in caplog.text


def test_pettingzoos_forms_come_to_the_same(server: Server) -> None:
    """Rock-paper-scissors of 15 rounds: both move at once, or one after the other. Rewards add up to nothing."""
    pytest.importorskip("pettingzoo")
    sys.path.append(str(ROOT / "examples"))
    import rock_paper_scissors as example

    for make, per_round in ((example.together, 1), (example.in_turn, 2)):
        agents = agents_env(make())
        observed, acted = agents.observation_spaces, agents.action_spaces
        assert list(observed) == ["player_0", "player_1"]
        with trained_on(server, list(observed), example.SEEN, gym.spaces.Discrete(3)) as fake:
            with connect_agents(server.frontend, observation_spaces=observed, action_spaces=acted) as client:
                episode = client.start_episode()
                outcome = agents.reset(1)
                rounds = 0
                assert set(outcome) == ({"player_0", "player_1"} if per_round == 1 else {"player_0"})
                episode.abandon()
                step = agents.step(dict.fromkeys(outcome, 0))
                while not step.over:
                    rounds += 1
                    step = agents.step({agent: 0 for agent in step.observations if not step.terminateds.get(agent)})
                assert rounds + 1 == 15 * per_round
                assert step.truncateds["__all__"] and set(step.observations) == {"player_0", "player_1"}
            assert fake.trainer.refusal is None


def test_command_line_runs_several_agents(server: Server) -> None:
    with trained_on(server, ["a", "b"], OBSERVATIONS, gym.spaces.Discrete(2)) as fake:
        fake.publish(0, BODY, "m")
        arguments = ["simulate", "--env", "test_drive_agents:Relay", "--broker", server.frontend, "--num", "2"]
        result = CliRunner().invoke(cli, [*arguments, "--episodes", "3", "--seed", "1", "--json"])
        assert result.exit_code == 0, result.output
        assert '"episodes": 6' in result.output and '"env_steps": 48' in result.output
        assert played(fake, 48) == {"a": 36, "b": 24}
        shown = CliRunner().invoke(cli, [*arguments, "--episodes", "1", "--evaluate", "--json"])
        assert shown.exit_code == 0, shown.output
        assert '"episodes": 2' in shown.output and fake.steps == 48, "nobody trains on what is there for evaluations"
        refused = CliRunner().invoke(cli, [*arguments, "--vector", "4"])
        assert refused.exit_code != 0
        assert "has several agents, which can't go with --vector yet" in f"{refused.output}{refused.exception}"


def test_the_package_has_functions_under_these_names() -> None:
    import rllink_zmq

    assert callable(rllink_zmq.drive_agents) and callable(rllink_zmq.connect_agents)


def test_names_on_the_command_line() -> None:
    assert find_agents_env("CartPole-v1") is None
    assert find_agents_env("gymnasium:CartPole-v1") is None
    made = find_agents_env("test_drive_agents:Relay")
    assert made is not None and made().possible_agents == ("a", "b")
    with pytest.raises(SettingsError, match="the module can't be imported"):
        find_agents_env("pettingzoo:classic/no_such_v9")
    with pytest.raises(SettingsError, match="expected an environment of several agents"):
        agents_env(gym.make("CartPole-v1"))
