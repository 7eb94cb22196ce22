"""Recurrent policies beside RLlib's own runner: the same steps must be the same to the learner."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.examples.envs.classes.stateless_cartpole import StatelessCartPole
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllink_zmq.arrays import to_buffers
from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.fragments import Cut, FragmentBuilder, Origin
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.policy import Policy
from rllink_zmq.rllib.episodes import EpisodeBuilder
from rllink_zmq.rllib.export import export_policy, weights_body
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.session_runner import Lease
from rllink_zmq.wire import pack, unpack

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CALLS, STEPS = 3, 45
"""Calls of `sample()`, and env steps of each: chunks begin in the middle of episodes, too."""


class Rllib(NamedTuple):
    """RLlib's own side: a runner's samples, call by call, the module they were made with, and a learner of it."""

    config: PPOConfig
    samples: list[list[SingleAgentEpisode]]
    module: Any
    learner: Any
    blob: bytes
    body: bytes


def config_of(max_seq_len: int, **model: Any) -> PPOConfig:
    return (
        PPOConfig()
        .environment(StatelessCartPole)
        .env_runners(num_env_runners=0, num_envs_per_env_runner=2, rollout_fragment_length=STEPS // 2)
        .rl_module(
            model_config={
                "use_lstm": True, "lstm_cell_size": 6, "fcnet_hiddens": [8], "max_seq_len": max_seq_len,
                "vf_share_layers": False, **model,
            }
        )
        .debugging(seed=4)
    )  # fmt: skip


def sampled(config: PPOConfig) -> Rllib:
    torch.manual_seed(5)
    runner = SingleAgentEnvRunner(config=config, worker_index=0)
    module = runner.module.unwrapped()
    with torch.no_grad():
        for parameter in module.parameters():  # RLlib's own start is nearly the same at all observations
            parameter += 0.3 * torch.randn(parameter.shape)
    samples = [runner.sample(num_timesteps=STEPS) for _ in range(CALLS)]
    spaces = runner.env.single_observation_space, runner.env.single_action_space
    learner = config.build_learner(spaces={DEFAULT_MODULE_ID: spaces})
    learner.module[DEFAULT_MODULE_ID].set_state(module.get_state())
    blob = export_policy(module, *spaces)
    body = weights_body(blob, module.get_state())
    runner.stop()
    return Rllib(config, samples, module, learner, blob, body)


@pytest.fixture(scope="module", params=["apart", "shared"])
def rllib(request: pytest.FixtureRequest) -> Rllib:
    return sampled(config_of(7, vf_share_layers=request.param == "shared"))


def as_fragment(cut: Cut, name: str, end: str) -> Lease:
    """A fragment as it comes out of the wire."""
    columns, body = to_buffers(cut.arrays)
    message = FRAGMENT(
        b"s" * 16, 1, 1, name, cut.t0, cut.steps, end, "run", 3, cut.return_so_far, columns  # type: ignore[arg-type]
    )  # fmt: skip
    read, frames = unpack(pack(message, body))
    assert isinstance(read, FRAGMENT)
    return Lease(read, frames)


class Simulated:
    """A simulator that goes through the steps of RLlib's runner, and remembers by the exported policy."""

    def __init__(self, rllib: Rllib, length: int) -> None:
        self._policy = Policy.load(rllib.blob, seed=0)
        self._policy.apply(0, rllib.body)
        self._layout = layout_of_policy(self._policy.manifest)
        self._length = length
        self._builders: dict[str, FragmentBuilder] = {}

    def fragments(self, episode: SingleAgentEpisode) -> list[Lease]:
        """A chunk of RLlib's, in fragments of `length`."""
        builder = self._builders.setdefault(episode.id_, FragmentBuilder(episode.id_))
        observations = np.asarray(episode.get_observations())
        actions, rewards = episode.get_actions(), episode.get_rewards()
        logps = episode.get_extra_model_outputs(Columns.ACTION_LOGP)
        leases = []
        for t in range(len(episode)):
            if not builder.steps:
                builder.begin(self._layout, "acted", Origin("run", 3), self._length)
            row = builder.observe(observations[t])
            acted = self._policy.act_one(row, True, builder.state)
            builder.act(actions[t], float(logps[t]), acted.action_dist_inputs, acted.state)
            builder.reward(float(rewards[t]))
            last = t + 1 == len(episode)
            if last or builder.steps == self._length:
                builder.observe(observations[t + 1])
                end = "terminated" if last and episode.is_terminated else "no"
                leases.append(as_fragment(builder.cut(), episode.id_, end))
        return leases


def ours(rllib: Rllib, length: int) -> list[list[SingleAgentEpisode]]:
    simulated, builder = Simulated(rllib, length), EpisodeBuilder(StatelessCartPole().observation_space,
        gym.spaces.Discrete(2), rllib.module)  # fmt: skip
    calls = []
    for call in rllib.samples:
        leases = [lease for episode in call for lease in simulated.fragments(episode)]
        built, refused = builder.build(leases)
        assert not refused
        calls.append([chunk.episode for chunk in built])
    return calls


def learned_from(rllib: Rllib, episodes: list[SingleAgentEpisode], max_seq_len: int) -> dict[str, NDArray[Any]]:
    """What the learner's own pipeline makes of the episodes, GAE with the critic's values included."""
    learner = rllib.learner
    for module in (learner.module[DEFAULT_MODULE_ID], learner.module[DEFAULT_MODULE_ID].unwrapped()):
        module.model_config["max_seq_len"] = max_seq_len
    batch = learner._learner_connector(
        rl_module=learner.module, batch={}, episodes=copy.deepcopy(episodes), shared_data={}, metrics=MetricsLogger()
    )[DEFAULT_MODULE_ID]
    flat: dict[str, NDArray[Any]] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                put(f"{name}/{key}", inner)
        else:
            flat[name] = value.detach().numpy()

    put("", batch)
    return flat


@pytest.mark.parametrize("max_seq_len", [1, 4, 20])
@pytest.mark.parametrize("length", [1, 5, 64])
def test_the_learner_gets_what_rllibs_own_runner_gives_it(rllib: Rllib, length: int, max_seq_len: int) -> None:
    calls = ours(rllib, length)
    starts = {episode.t_started > 0 for call in rllib.samples for episode in call}
    assert starts == {True, False}  # or the chunks that begin in the middle of an episode weren't tried
    for theirs, mine in zip(rllib.samples, calls, strict=True):
        assert [(len(e), e.t_started, e.is_done) for e in mine] == [(len(e), e.t_started, e.is_done) for e in theirs]
        expected = learned_from(rllib, theirs, max_seq_len)
        found = learned_from(rllib, mine, max_seq_len)
        assert found.keys() == expected.keys()
        names = set(expected)
        assert {"/obs", "/actions", "/action_logp", "/loss_mask", "/advantages", "/value_targets"} <= names
        assert {f"/state_in/{name}" for name in Memory(rllib.module).names} <= names
        for name in sorted(names - {"/weights_seq_no"}):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=2e-5, err_msg=name)
            assert found[name].dtype.kind == expected[name].dtype.kind, name  # RLlib: an int32 action
