"""The action service of several modules at a real broker: which one answers, and by which of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fake_training import Training, broker, training, until
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from test_export import THREE, Branches, Custom
from test_service import BOX, Made, rows

from broker.server import Server
from rllink_zmq.client import Inference
from rllink_zmq.client_agents import AgentsClient, connect_agents
from rllink_zmq.client_remote import Answer, RemotePolicy
from rllink_zmq.errors import PolicyError
from rllink_zmq.messages import AgentId
from rllink_zmq.policy_agents import Crew, CrewModule, Draw, pack_crew
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of
from rllink_zmq.rllib.service_agents import AgentsActService
from rllink_zmq.spaces import agents_to_wire

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

AGENTS: tuple[AgentId, ...] = ("arm", "eye")
MODULES = ("frozen", "learner")
RUN = "000000000001-aaaaaaaa"
TWO = gym.spaces.Discrete(2)
MAPPED = {"a": "plain", "b": "branches"}


@contextmanager
def world() -> Iterator[tuple[Server, Training, dict[str, Made], AgentsActService]]:
    """`eye` chooses among three by the frozen module, `arm` moves by the one that learns."""
    made = {"frozen": Made("discrete"), "learner": Made("bounded")}
    spaces = agents_to_wire(
        dict.fromkeys(AGENTS, BOX), {"arm": made["learner"].action_space, "eye": made["frozen"].action_space}
    )
    crew = Crew(1, AGENTS, (CrewModule("frozen", 0, False), CrewModule("learner", 1, True)), (Draw(1, (1, 0)),))
    blob = pack_crew(crew, [made[name].blob for name in MODULES])
    for each in made.values():
        each.actor.version = -1  # there are no weights but those that are published
    with broker() as server, training(server, version=None, blob=blob, spaces=spaces, run=RUN) as fake:
        service = AgentsActService(server.backend, RUN, "service", {name: each.actor for name, each in made.items()})
        try:
            yield server, fake, made, service
        finally:
            service.stop()


def client(server: Server, made: dict[str, Made]) -> AgentsClient:
    return connect_agents(
        server.frontend,
        observation_spaces=dict.fromkeys(AGENTS, BOX),
        action_spaces={"arm": made["learner"].action_space, "eye": made["frozen"].action_space},
        inference="remote",
    )


def test_each_module_acts_by_its_own_published_weights() -> None:
    with world() as (server, fake, made, service):
        fake.publish(0, made["frozen"].body, "frozen")
        with client(server, made) as mine:
            episode = mine.start_episode(training_enabled=False, explore=False)
            seen: dict[AgentId, Any] = {"arm": rows(2)[0], "eye": rows(2)[1]}
            asked = episode.get_action_async(seen)
            until(lambda: service.rows == 1, "the frozen module has answered")
            assert not asked.done(), "the other one has no weights yet"
            fake.publish(3, made["learner"].body, "learner")
            actions = asked.result(timeout=20)
            assert mine.flow.remote is not None and mine.flow.remote.origin is not None
            assert mine.flow.remote.origin.versions == {"frozen": 0, "learner": 3}
            expected = {
                "arm": made["learner"].actor.act(seen["arm"][None], explore=False)["env_actions"][0],
                "eye": made["frozen"].actor.act(seen["eye"][None], explore=False)["actions"][0],
            }
            assert type(actions["eye"]) is int and actions["eye"] == expected["eye"]
            np.testing.assert_allclose(actions["arm"], expected["arm"], rtol=1e-5)
            fake.publish(4, (2 * np.frombuffer(made["learner"].body, "<f4")).tobytes(), "learner")
            until(lambda: made["learner"].actor.version == 4, "newer weights act")
            assert made["frozen"].actor.version == 0
            again = episode.get_action(seen)
            assert again["eye"] == expected["eye"] and not np.allclose(again["arm"], expected["arm"])
            assert mine.flow.remote.origin.versions == {"frozen": 0, "learner": 4}


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("gone", "there is no module 'gone' here; there are 'frozen', 'learner'"),
        ("", "this training has several modules: name the one that is to act, of 'frozen', 'learner'"),
    ],
)
def test_a_module_that_is_not_there_is_named(module: str, text: str) -> None:
    with world() as (server, fake, made, _):
        for name in MODULES:
            fake.publish(0, made[name].body, name)
        remote = RemotePolicy(server.frontend, "asks")
        remote.connection.open()
        try:

            def answered(request: int) -> bool:
                remote.look()
                return request in remote.answers

            asked = {
                name: remote.ask({"obs": rows(1)}, explore=None, evaluation=False, module=name)
                for name in (module, "learner")
            }
            found: dict[str, Answer] = {}
            for name, request in asked.items():
                until(lambda request=request: answered(request), "it answers")  # type: ignore[misc]
                found[name] = remote.answers[request]
            assert (found[module].code, found[module].text) == ("no_module", text)
            assert found["learner"].code == "" and found["learner"].origin == (RUN, 0)
        finally:
            remote.close()


def test_a_module_that_can_not_be_exported_is_asked_for() -> None:
    """Simulators whose agents are not its may act by themselves."""
    spaces = {"a": (THREE, TWO), "b": (THREE, TWO)}
    config = (
        PPOConfig()
        .environment(
            observation_space=gym.spaces.Dict({agent: each[0] for agent, each in spaces.items()}),
            action_space=gym.spaces.Dict({agent: each[1] for agent, each in spaces.items()}),
        )
        .multi_agent(policies={"plain", "branches"}, policy_mapping_fn=lambda agent, *_, **__: MAPPED[agent])
    )
    specs = {
        "plain": RLModuleSpec(module_class=Custom, observation_space=THREE, action_space=TWO),
        "branches": RLModuleSpec(module_class=Branches, observation_space=THREE, action_space=TWO),
    }
    multi = MultiRLModuleSpec(rl_module_specs=specs).build()
    blob = crew_of(config, multi)
    about = CrewManifest.of(blob).modules
    assert not about["plain"].remote_only and "data-dependent" in about["branches"].remote_only
    assert about["branches"].action_dist_inputs == 2
    actors = {name: ModuleActor(multi[name], each, TWO, True, False) for name, each in about.items()}
    wire = agents_to_wire({"a": THREE, "b": THREE}, {"a": TWO, "b": TWO})
    with broker() as server, training(server, version=None, blob=blob, spaces=wire, run=RUN) as fake:
        for name in specs:
            fake.publish(1, weights_body(about[name], multi[name].get_state()), name)
        service = AgentsActService(server.backend, RUN, "service", actors)

        def acts(agent: str, inference: Inference) -> int:
            before = service.rows
            with connect_agents(
                server.frontend, observation_spaces={agent: THREE}, action_spaces={agent: TWO}, inference=inference
            ) as mine:
                episode = mine.start_episode()
                assert episode.get_action({agent: np.zeros(3, np.float32)})[agent] in (0, 1)
                episode.end_episode({agent: np.zeros(3, np.float32)}, {"__all__": True})
            return service.rows - before

        try:
            assert [acts("a", "local"), acts("a", "auto"), acts("b", "auto"), acts("b", "remote")] == [0, 0, 1, 1]
            with pytest.raises(PolicyError, match="can only be asked for its actions"):
                acts("b", "local")
            until(lambda: fake.steps == 4, "all is taken")
            assert all(header.modules in ({"plain": 1}, {"branches": 1}) for header, _ in fake.taken)
        finally:
            service.stop()
