"""DQN with several agents: each policy explores by its own epsilon, at simulators and at runners that act for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_training import broker, training, until
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.multi_agent_episode_buffer import MultiAgentEpisodeReplayBuffer
from small_dqn import sac, several

from rllink_zmq import connect_agents
from rllink_zmq.errors import SettingsError
from rllink_zmq.rllib import attach, multi_agent_runner
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of
from rllink_zmq.rllib.multi_agent_runner import ZmqMultiAgentEnvRunner
from rllink_zmq.rllib.pipelines_agents import agents_of
from rllink_zmq.spaces import agents_to_wire

EPSILONS = {"pole_0": [(0, 1.0), (40, 0.0)], "pole_1": [(0, 0.25)]}


def config() -> Any:
    made = several(runners=0)
    specs = {name: RLModuleSpec(model_config={"epsilon": epsilon}) for name, epsilon in EPSILONS.items()}
    made.rl_module(rl_module_spec=MultiRLModuleSpec(rl_module_specs=specs))
    return attach(made, "tcp://127.0.0.1:9")


@pytest.fixture(scope="module")
def made() -> tuple[Any, ZmqMultiAgentEnvRunner, bytes]:
    ours = config()
    runner = ZmqMultiAgentEnvRunner(config=ours, worker_index=0, num_workers=0)
    return ours, runner, crew_of(ours, runner.module)  # type: ignore[arg-type]


def test_simulators_follow_each_policys_epsilon(made: tuple[Any, ZmqMultiAgentEnvRunner, bytes]) -> None:
    ours, runner, blob = made
    modules: Any = runner.module
    observation_spaces, action_spaces = agents_of(ours)
    every = agents_to_wire(observation_spaces, action_spaces)
    with broker() as server, training(server, version=None, blob=blob, spaces=every, needs_logp=False) as fake:
        for name, about in CrewManifest.of(blob).modules.items():
            fake.publish(0, weights_body(about, modules[name].get_state()), name)
        with connect_agents(
            server.frontend, observation_spaces=observation_spaces, action_spaces=action_spaces, seed=1
        ) as client:
            episode = client.start_episode()
            seen = dict.fromkeys(observation_spaces, np.zeros(4, np.float32))
            episode.get_action(seen)
            policies = client.flow.reader.policies  # type: ignore[attr-defined]
            assert {name: policy.epsilon for name, policy in policies.items()} == {"pole_0": 1.0, "pole_1": 0.25}
            for _ in range(49):
                episode.log_returns(dict.fromkeys(seen, 1.0))
                episode.get_action(seen)

            def over() -> bool:
                client.flow.look_if_due()
                return bool(policies["pole_0"].epsilon == 0.0)

            until(over, "the training has sampled 40 env steps")
            assert policies["pole_1"].epsilon == 0.25


def test_runners_act_by_each_modules_epsilon(
    made: tuple[Any, ZmqMultiAgentEnvRunner, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, runner, blob = made
    manifest = CrewManifest.of(blob)
    services: list[Any] = []
    monkeypatch.setattr(
        multi_agent_runner, "AgentsActService", lambda *args, **_: services.append(args) or SimpleNamespace(stop=None)
    )
    link = SimpleNamespace(run="run", session=SimpleNamespace(name="runner"), pool=SimpleNamespace(sampled=0))
    runner._serve_actions(link, manifest)  # type: ignore[arg-type]
    actors = services[0][3]
    modules: Any = runner.module
    for name, actor in actors.items():
        actor.apply(0, weights_body(manifest.modules[name], modules[name].get_state()))
    rows = np.random.default_rng(0).uniform(-1, 1, (2000, 4)).astype(np.float32)

    def random_share(name: str) -> float:
        """How often an action is not the best one: half of epsilon, as there are two actions."""
        answer = actors[name].act(rows, True)
        return 2 * float((answer["actions"] != answer["action_dist_inputs"].argmax(1)).mean())

    assert random_share("pole_0") == pytest.approx(1.0, abs=0.1)
    assert random_share("pole_1") == pytest.approx(0.25, abs=0.1)
    link.pool.sampled = 40
    assert random_share("pole_0") == 0.0
    assert random_share("pole_1") == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(
    "kind", ["PrioritizedEpisodeReplayBuffer", "EpisodeReplayBuffer", EpisodeReplayBuffer], ids=str
)
def test_a_replay_buffer_of_one_agent_is_refused_in_words(kind: Any) -> None:
    ours = several()
    ours.replay_buffer_config = {"type": kind, "capacity": 100}
    with pytest.raises(SettingsError, match=r"EpisodeReplayBuffer'} holds no episodes of several agents: .*MultiAgent"):
        attach(ours, "tcp://127.0.0.1:9")


@pytest.mark.parametrize("kind", ["MultiAgentEpisodeReplayBuffer", MultiAgentEpisodeReplayBuffer], ids=str)
def test_replay_buffers_of_several_agents_are_taken(kind: Any) -> None:
    for ours in (several(), several(sac())):
        ours.replay_buffer_config = {"type": kind, "capacity": 100}
        attach(ours, "tcp://127.0.0.1:9")
