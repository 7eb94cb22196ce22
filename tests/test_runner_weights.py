"""What weights cost a runner that gets them every few milliseconds, as DQN and SAC give them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from small_dqn import dqn

from rllink_zmq.policy import Policy, unpack_policy
from rllink_zmq.rllib import attach, runner
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of
from rllink_zmq.rllib.multi_agent_runner import ZmqMultiAgentEnvRunner
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.runner import ZmqEnvRunner

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning")]


class Link:
    """Keeps the newest offer, as a `RunnerLink` does."""

    def __init__(self) -> None:
        self.offers = 0
        self.newest: tuple[int, int, Callable[[], bytes]] = (-1, 0, bytes)

    def offer(self, version: int, size: int, load: Callable[[], bytes]) -> None:
        self.offers += 1
        self.newest = (version, size, load)

    def stop(self) -> None: ...


def test_weights_that_nobody_fetches_are_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = attach(dqn(0), "tcp://127.0.0.1:9")
    one = ZmqEnvRunner(config=config, worker_index=0, num_workers=0)
    assert one.module is not None
    blob = policy_of(config, one.module)
    link = Link()
    one._link, one._manifest = link, unpack_policy(blob)[0]  # type: ignore[assignment]
    encoded: list[Any] = []
    real = runner.weights_body
    monkeypatch.setattr(runner, "weights_body", lambda *a, **k: encoded.append(a) or real(*a, **k))
    weights = {"default_policy": one.module.get_state()}
    began = time.process_time()
    for version in range(1, 201):
        one.set_state({"rl_module": weights, "weights_seq_no": version})
    seconds = (time.process_time() - began) / 200
    assert link.offers == 200 and not encoded
    version, size, load = link.newest
    body = load()
    assert (version, len(body), len(encoded)) == (200, size, 1)
    Policy.load(blob).apply(version, body)
    print(f"{seconds * 1e6:.0f} us of CPU for a state that nobody fetches")
    assert seconds < 0.01


class ModuleLink(Link):
    """Keeps each offer, by module."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, int]] = []

    def offer(self, version: int, size: int, load: Callable[[], bytes], module: str = "") -> None:
        assert len(load()) == size
        self.told.append((module, version))


def test_each_module_is_offered_when_it_has_changed() -> None:
    """A frozen one once, and again when it gets other weights, alone or with the others; a new one as of now."""
    spaces = gym.spaces.Dict(a=gym.spaces.Box(-1, 1, (3,)), b=gym.spaces.Box(-1, 1, (3,)))
    actions = gym.spaces.Dict(a=gym.spaces.Discrete(2), b=gym.spaces.Discrete(2))
    config = PPOConfig().environment(observation_space=spaces, action_space=actions)
    config.multi_agent(
        policies={"learns", "stays"}, policies_to_train=["learns"],
        policy_mapping_fn=lambda agent, *_, **__: "learns" if agent == "a" else "stays",
    )  # fmt: skip
    config.rl_module(model_config={"fcnet_hiddens": [4]})
    one = ZmqMultiAgentEnvRunner(config=attach(config, "tcp://127.0.0.1:9"), worker_index=0, num_workers=0)
    assert one.module is not None
    manifest = CrewManifest.of(crew_of(one.config, one.module))
    link = ModuleLink()
    one._take_manifest(manifest)
    one._link = link  # type: ignore[assignment]

    def given(version: int, **weights: Any) -> list[tuple[str, int]]:
        """What is offered when RLlib hands this out."""
        link.told = []
        one.set_state({"rl_module": weights, "weights_seq_no": version})
        return sorted(link.told)

    learned, stays = ({k: np.array(v) for k, v in one.module[m].get_state().items()} for m in ("learns", "stays"))
    other = {name: value + 1.0 for name, value in stays.items()}
    assert given(0, learns=learned, stays=stays) == [("learns", 0), ("stays", 0)]
    assert given(1, learns=learned) == [("learns", 1)]
    assert given(2, learns=learned, stays=stays) == [("learns", 2)]
    assert given(3, learns=learned, stays=other) == [("learns", 3), ("stays", 3)]
    assert given(4, stays=stays) == [("stays", 4)]
    assert given(5, stays=stays) == []
    # A frozen module comes, and one goes; the other's version stands.
    was = {"learns": one.module["learns"], "new": one.module["stays"]}
    one.have_modules(MultiRLModuleSpec(rl_module_specs={n: RLModuleSpec.from_module(m) for n, m in was.items()}))
    assert set(one.module.keys()) == {"learns", "new"}
    link.told = []
    given(5, learns=learned, new=other)
    one.recast(
        CrewManifest(
            {"learns": manifest.modules["learns"], "new": manifest.modules["stays"]}, {"learns": ["a"], "new": ["b"]}
        )
    )
    assert sorted(link.told) == [("learns", 5), ("new", 5)]
    # The first one learns no more: what it is by then is offered once.
    one.config = one.config.copy(copy_frozen=False).multi_agent(policies_to_train=[])
    assert given(6, learns=learned, new=other) == [("learns", 6)]
    assert given(7, learns=learned, new=other) == []


def test_after_a_restore_no_episode_goes_on_under_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the replay buffer was restored with may not go as far as what the runner has handed over."""
    config = attach(dqn(0), "tcp://127.0.0.1:9")
    one = ZmqEnvRunner(config=config, worker_index=0, num_workers=0)
    assert one.module is not None
    manifest = unpack_policy(policy_of(config, one.module))[0]
    forgot: list[str] = []
    monkeypatch.setattr(one._builder, "forget", lambda: forgot.append(one._run))
    for run in ("run 1", "run 1", "run 2"):
        one.join(run, manifest)
    one.leave()
    assert forgot == ["run 1"], "with a new run, and not where it joins the same one again"
