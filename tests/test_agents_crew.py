"""Episodes that are open while the crew is read again: another policy has come, or another client of the process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import gymnasium as gym
import numpy as np
import pytest
from fake_training import Training, broker, training, until
from test_policy import BODY, discrete_blob
from test_recurrent_acting import ACTIONS, OBSERVATIONS, blob, body

from broker.server import Server
from rllink_zmq.client_agents import connect_agents
from rllink_zmq.errors import EpisodeError
from rllink_zmq.fragments import layout_of_spaces
from rllink_zmq.policy_agents import Crew, CrewModule, Draw, pack_crew
from rllink_zmq.spaces import agents_to_wire

AGENTS = ("a", "b")
SPACES = {
    "observation_spaces": dict.fromkeys(AGENTS, OBSERVATIONS),
    "action_spaces": dict.fromkeys(AGENTS, ACTIONS),
}


def crew(modules: tuple[str, ...], draw: tuple[int, ...], *blobs: bytes) -> bytes:
    policies = blobs or (blob(),)
    made = tuple(CrewModule(name, i if blobs else 0, True) for i, name in enumerate(modules))
    return pack_crew(Crew(1, AGENTS, made, (Draw(1, draw),), {}), policies)


@contextmanager
def trained_on(policies: bytes) -> Iterator[tuple[Server, Training]]:
    spaces = agents_to_wire(*SPACES.values())  # type: ignore[arg-type]
    with broker() as server, training(
        server, version=None, blob=policies, spaces=spaces, run="000000000001-aaaaaaaa", fragment_steps=4
    ) as fake:  # fmt: skip
        yield server, fake


def seen() -> dict[str, np.ndarray]:
    return {agent: np.zeros(3, np.float32) for agent in AGENTS}


@pytest.mark.parametrize("change", ["another policy", "another client"])
def test_an_episode_with_a_memory_goes_on(change: str) -> None:
    with trained_on(crew(("p",), (0, 0))) as (server, fake), ExitStack() as stack:
        fake.publish(2, body(1), "p")
        mine = stack.enter_context(connect_agents(server.frontend, **SPACES))  # type: ignore[arg-type]
        episode = mine.start_episode()
        episode.get_action(seen())
        before = mine.flow.reader.crew
        if change == "another client":
            stack.enter_context(connect_agents(server.frontend, **SPACES))  # type: ignore[arg-type]
        else:
            fake.recast(crew(("p", "z"), (0, 0)))
            fake.publish(3, body(2), "z")

        def read_again() -> bool:
            episode.log_returns({"a": 1.0})
            episode.get_action(seen())
            return mine.flow.reader.crew is not before and episode.builder.crew is mine.flow.reader.crew

        until(read_again, "the crew is read again, and the episode goes on with it")
        episode.end_episode(seen(), {"__all__": True})
        assert mine.close() == 0


def test_rows_of_several_parts_are_compared_part_by_part() -> None:
    def nested(n: int) -> gym.Space[dict[str, object]]:
        return gym.spaces.Dict(goal=gym.spaces.Discrete(n), scene=gym.spaces.Box(-1, 1, (2,)))

    one, same, other = (layout_of_spaces(nested(n), gym.spaces.Discrete(2)) for n in (3, 3, 4))
    assert one.like(same) and not one.like(other)


def test_a_step_that_one_agent_may_not_log_is_nobodys() -> None:
    """The policy of one of them has a memory: the call may be made again as it should be."""
    with trained_on(crew(("plain", "recurrent"), (0, 1), discrete_blob(), blob())) as (server, fake):
        fake.publish(2, BODY, "plain")
        fake.publish(2, body(1), "recurrent")
        with connect_agents(server.frontend, **SPACES) as mine:  # type: ignore[arg-type]
            episode = mine.start_episode()
            with pytest.raises(EpisodeError, match="agent 'b' acts by the recurrent policy 'recurrent'"):
                episode.log_action(seen(), {"a": 0, "b": 0}, {"a": -1.0, "b": -1.0})
            assert set(episode.get_action(seen())) == set(AGENTS)
            episode.abandon()
