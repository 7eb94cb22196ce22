"""A simulator on another host than the broker's: it knows the frontend's address and nothing else."""

from __future__ import annotations

import threading

import pytest
from fake_training import ACTIONS, OBSERVATIONS, training, until

from broker.server import Server
from rllink_zmq import connect
from rllink_zmq.errors import SettingsError
from rllink_zmq.transport import beside


@pytest.mark.parametrize(
    ("dialed", "told", "reached"),
    [
        ("tcp://10.0.0.5:5555", "tcp://0.0.0.0:5557", "tcp://10.0.0.5:5557"),
        ("tcp://broker.local:5555", "tcp://*:5557", "tcp://broker.local:5557"),
        ("tcp://[fe80::1]:5555", "tcp://[::]:5557", "tcp://[fe80::1]:5557"),
        ("tcp://10.0.0.5:5555", "tcp://10.0.0.9:5557", "tcp://10.0.0.9:5557"),
    ],
)
def test_the_weights_address_is_where_the_simulator_can_reach_it(dialed: str, told: str, reached: str) -> None:
    assert beside(dialed, told) == reached


def test_an_address_told_that_is_none() -> None:
    with pytest.raises(SettingsError):
        beside("tcp://127.0.0.1:1", "inproc://x")


def test_policy_and_published_weights_reach_it_through_the_address_it_dialed() -> None:
    """The broker binds all interfaces; the simulator comes by another address than the learner's side."""
    anywhere = "tcp://0.0.0.0:*"
    server = Server(frontend=anywhere, backend="tcp://127.0.0.1:*", weights=anywhere, admin=None, insecure=True)
    server.bind()
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        port = server.frontend.rpartition(":")[2]
        with (
            training(server) as fake,
            connect(
                f"tcp://127.0.0.2:{port}", observation_space=OBSERVATIONS, action_space=ACTIONS, timeout=20
            ) as client,
        ):
            assert client.flow.session.weights_address.startswith("tcp://0.0.0.0:")
            until(lambda: client.ready, "policy and weights are there")
            fake.publish(5)
            until(lambda: client.ready and client.stats.version == 5, "the next version is there")
            episode = client.start_episode()
            episode.get_action(OBSERVATIONS.sample())
            episode.log_returns(1.0)
            episode.end_episode(OBSERVATIONS.sample())
            until(lambda: fake.steps == 1 and client.ready, "the step is taken")
            assert fake.taken[0][0].version in (0, 5)
    finally:
        server.stop()
        thread.join()
        server.close()
