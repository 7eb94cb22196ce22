"""The action service of several modules at a real broker: which one answers, and by which of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fake_training import Training, broker, training, until
from test_service import BOX, Made, rows

from broker.server import Server
from rllink_zmq.client_agents import AgentsClient, connect_agents
from rllink_zmq.client_remote import Answer, RemotePolicy
from rllink_zmq.messages import AgentId
from rllink_zmq.policy_agents import Crew, CrewModule, Draw, pack_crew
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
