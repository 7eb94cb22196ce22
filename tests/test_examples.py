"""The examples that need no Ray, against a real broker, with a trainer and a runner that are played by the test."""

from __future__ import annotations

import ast
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from fake_training import Restartable
from processes import ROOT, process
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.columns import Columns

from rllink_zmq.arrays import from_body
from rllink_zmq.messages import TrainerHello
from rllink_zmq.policy import PolicyManifest, Tensor, Weight, pack_policy, policy_hash, unpack_policy
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.session_runner import Lease, RunnerSession, TrainerSession
from rllink_zmq.spaces import spaces_to_wire
from rllink_zmq.transport import Connection

RAW_DEALER = ROOT / "examples" / "raw_dealer.py"
RUN = "0198a2b3c4d5-0badcafe"
PATIENCE_S = 90.0


class Learner:
    """The learner's side, played: a trainer with a policy, and a runner that hands over all that it is leased."""

    def __init__(self, address: str, blob: bytes, weights: bytes, spaces: tuple[gym.Space, gym.Space]) -> None:
        terms = TrainerHello(RUN, 400, 2, 400, 1, 50, spaces_to_wire(*spaces), policy_hash(blob), len(blob))
        self.trainer = TrainerSession(secrets.token_bytes(16), terms, blob, name="played")
        self.runner = RunnerSession(secrets.token_bytes(16), RUN, name="played")
        self.connections = [Connection(self.trainer, address), Connection(self.runner, address)]
        self.leases: list[Lease] = []
        self.update(0, weights)

    def update(self, version: int, weights: bytes) -> None:
        self.runner.offer(version, len(weights), lambda: weights, time.monotonic())

    def turn(self) -> None:
        """Look, take, and say that RLlib has it."""
        for connection in self.connections:
            connection.look()
        if self.runner.taken is not None:
            self.leases += self.runner.taken
            self.runner.taken = None
            self.runner.give_back(time.monotonic())
        self.runner.take(10_000, time.monotonic())
        self.connections[1].flush()
        self.connections[1].wait(0.01)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()

    @property
    def steps(self) -> int:
        return sum(lease.message.steps for lease in self.leases)


@contextmanager
def learning(
    broker: Restartable, blob: bytes, weights: bytes, spaces: tuple[gym.Space, gym.Space]
) -> Iterator[Learner]:
    learner = Learner(broker.server.backend, blob, weights, spaces)
    for connection in learner.connections:
        connection.open()
    try:
        yield learner
    finally:
        learner.close()


@pytest.fixture
def broker() -> Iterator[Restartable]:
    broker = Restartable()
    yield broker
    broker.stop()


@pytest.fixture(scope="module")
def spaces() -> tuple[gym.Space, gym.Space]:
    env = gym.make("CartPole-v1")
    return env.observation_space, env.action_space


@pytest.fixture(scope="module")
def module(spaces: tuple[gym.Space, gym.Space]) -> Any:
    """RLlib's default module for CartPole, its weights spread wide enough that actions differ in probability."""
    config = PPOConfig().environment(observation_space=spaces[0], action_space=spaces[1])
    config.rl_module(model_config={"fcnet_hiddens": [16, 16]})
    torch.manual_seed(1)
    module = config.get_rl_module_spec(env=None, spaces={"default_policy": spaces}, inference_only=True).build()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3.0)
    return module


@pytest.fixture(scope="module")
def exported(spaces: tuple[gym.Space, gym.Space], module: Any) -> tuple[bytes, bytes]:
    """The module's policy, and its weights."""
    blob = export_policy(module, *spaces)
    return blob, weights_body(unpack_policy(blob)[0], module.get_state(inference_only=True))


def raw_dealer(broker: Restartable, *arguments: str, **options: Any) -> Any:
    return process(str(RAW_DEALER), "--broker", broker.server.frontend, "--seed", "7", *arguments, **options)


def played_to_the_end(learner: Learner, running: Any, each_turn: Callable[[], None] = lambda: None) -> list[str]:
    """What the example printed."""
    deadline = time.monotonic() + PATIENCE_S
    while running.poll() is None:
        assert time.monotonic() < deadline, f"still running, {len(learner.leases)} fragments so far"
        learner.turn()
        each_turn()
    assert running.returncode == 0
    return str(running.stdout.read()).splitlines()


def episodes_of(learner: Learner) -> list[list[Lease]]:
    """The fragments of each episode, which follow each other without a gap and end with its end."""
    by_name: dict[str, list[Lease]] = {}
    for lease in learner.leases:
        by_name.setdefault(lease.message.episode, []).append(lease)
    for leases in by_name.values():
        t, total = 0, 0.0
        for message in (lease.message for lease in leases):
            assert (message.t0, message.return_so_far) == (t, total)
            t += message.steps
            total += message.steps  # CartPole gives 1 for each step
        assert [m.message.end == "no" for m in leases] == [True] * (len(leases) - 1) + [False]
    return list(by_name.values())


# ---- examples/raw_dealer.py ------------------------------------------------------------------------------------------


def test_raw_dealer_names_nothing_of_ours() -> None:
    source = RAW_DEALER.read_text()
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert name not in ("__import__", "import_module", "exec", "eval"), f"{name} can import anything"
    third_party = names - sys.stdlib_module_names
    assert third_party == {"gymnasium", "msgpack", "numpy", "zmq"}
    assert "rllink" not in source.lower()
    assert not names & {"importlib", "runpy", "pickle"}


def test_raw_dealer_acts_by_the_policy_and_is_delivered(
    broker: Restartable, spaces: tuple[gym.Space, gym.Space], module: Any, exported: tuple[bytes, bytes]
) -> None:
    with learning(broker, *exported, spaces) as learner, raw_dealer(broker, "--episodes", "400") as running:

        def newer_after_200_steps() -> None:
            if learner.steps > 200 and learner.runner.offered_version == 0:
                learner.update(1, exported[1])

        printed = played_to_the_end(learner, running, newer_after_200_steps)
    assert printed[-1] == f"outcomes: {{'delivered': {len(learner.leases)}}}, unsettled: 0"
    assert len(episodes_of(learner)) == 400
    assert {lease.message.version for lease in learner.leases} == {0, 1}
    assert max(lease.message.steps for lease in learner.leases) <= 50

    builder = EpisodeBuilder(*spaces, module)
    lengths = []
    for lease in learner.leases:
        (built,), refused = builder.build([lease])
        assert not refused
        episode = built[0]
        lengths.append(len(episode))
        batch = {Columns.OBS: torch.from_numpy(np.array(episode.get_observations()[:-1]))}
        with torch.no_grad():
            logits = module.forward_exploration(batch)[Columns.ACTION_DIST_INPUTS].double()
        actions = torch.from_numpy(np.array(episode.get_actions()))
        expected = torch.log_softmax(logits, -1)[torch.arange(len(actions)), actions]
        np.testing.assert_allclose(episode.get_extra_model_outputs(Columns.ACTION_LOGP), expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            episode.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS), logits, rtol=0, atol=1e-4
        )
    assert sum(lengths) == learner.steps > 200


def test_raw_dealer_draws_from_any_other_policy_with_equal_probability(
    broker: Restartable, spaces: tuple[gym.Space, gym.Space]
) -> None:
    manifest = PolicyManifest(
        format=1, module="Other", observation=Tensor("float32", (4,)), noise="gumbel", noise_shape=(2,),
        action=Tensor("int64", ()), env_action=Tensor("int64", ()), action_dist_inputs=2, opset=20,
        weights=(Weight("kernel", "float32", (2, 3, 4)), Weight("scale", "float64", ())),
    )  # fmt: skip
    # More than a frame, so that the policy comes in pieces.
    blob = pack_policy(manifest, secrets.token_bytes(1_200_000))
    with (
        learning(broker, blob, bytes(manifest.weights_bytes), spaces) as learner,
        raw_dealer(broker, "--episodes", "5") as running,
    ):
        printed = played_to_the_end(learner, running)
    assert printed[-1] == f"outcomes: {{'delivered': {len(learner.leases)}}}, unsettled: 0"
    assert len(episodes_of(learner)) == 5
    for lease in learner.leases:
        logp = from_body(lease.message.columns, lease.body)["action_logp"]
        np.testing.assert_allclose(logp, np.log(0.5), rtol=1e-6)


def test_raw_dealer_goes_on_with_a_broker_that_was_restarted(
    broker: Restartable, spaces: tuple[gym.Space, gym.Space], exported: tuple[bytes, bytes]
) -> None:
    restarts = [100, 400]
    with learning(broker, *exported, spaces) as learner, raw_dealer(broker, "--episodes", "60") as running:

        def restart() -> None:
            if restarts and learner.steps > restarts[0]:
                restarts.pop(0)
                broker.restart()

        printed = played_to_the_end(learner, running, restart)
    assert not restarts
    keys = [(lease.message.session, lease.message.number) for lease in learner.leases]
    assert len(set(keys)) == len(keys), "handed over twice"
    assert printed[-1] == f"outcomes: {{'delivered': {len(keys)}}}, unsettled: 0"
    assert len(episodes_of(learner)) == 60


def test_raw_dealer_says_why_it_is_refused(
    broker: Restartable, spaces: tuple[gym.Space, gym.Space], exported: tuple[bytes, bytes]
) -> None:
    other = (gym.spaces.Box(-1, 1, (3,)), spaces[1])
    with learning(broker, *exported, other) as learner:
        deadline = time.monotonic() + PATIENCE_S
        while not learner.trainer.epoch and time.monotonic() < deadline:
            learner.turn()
        with raw_dealer(broker, "--episodes", "1", stderr=subprocess.PIPE) as running:
            while running.poll() is None and time.monotonic() < deadline:
                learner.turn()
            assert running.returncode == 1
            said = running.stderr.read()
    assert "refused (spaces): " in said and "Box" in said
