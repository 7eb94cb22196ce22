"""`attach()` on real AlgorithmConfigs, without a Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.marwil import MARWILConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from rllink_zmq.errors import ConnectionTimeout, SettingsError, SpaceError
from rllink_zmq.rllib import ZmqEnvRunner, attach
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.settings import LinkSettings, sampling_rules, trainer_terms
from rllink_zmq.rllib.trainer import TrainerCallback, new_run_id

NOWHERE = "tcp://127.0.0.1:9"


def ppo() -> PPOConfig:
    return PPOConfig().environment("CartPole-v1")


def test_it_sets_what_it_says_and_takes_the_spaces_of_the_env() -> None:
    config = attach(ppo(), NOWHERE)
    assert config.env_runner_cls is ZmqEnvRunner
    assert config.observation_space.shape == (4,) and config.action_space == gym.spaces.Discrete(2)
    assert TrainerCallback in config.callbacks_class
    assert (config.sample_timeout_s, config.num_cpus_per_env_runner) == (10.0, 0.1)
    assert config.env_runner_health_probe_timeout_s == 0.2
    assert LinkSettings.of(config).broker == NOWHERE


def test_what_the_user_chose_stays() -> None:
    class Mine(RLlibCallback):
        pass

    config = ppo().env_runners(sample_timeout_s=33.0, num_cpus_per_env_runner=2).callbacks(callbacks_class=Mine)
    attach(config, NOWHERE)
    assert (config.sample_timeout_s, config.num_cpus_per_env_runner) == (33.0, 2)
    assert config.callbacks_class == [Mine, TrainerCallback]
    attach(config, NOWHERE)
    assert config.callbacks_class == [Mine, TrainerCallback]


def test_the_settings_survive_copies_and_dicts() -> None:
    config = attach(ppo(), NOWHERE, lag_limit=3)
    assert LinkSettings.of(config.copy()).lag_limit == 3
    assert LinkSettings.of(PPOConfig().update_from_dict(config.to_dict())).lag_limit == 3


def test_appo_is_kept_from_dropping_batches() -> None:
    config = attach(APPOConfig().environment("CartPole-v1"), NOWHERE)
    assert config.max_requests_in_flight_per_learner == 100


def test_terms_of_ppo_and_appo() -> None:
    terms = trainer_terms(attach(ppo().training(train_batch_size_per_learner=2000), NOWHERE))
    assert (terms.quota, terms.lag_limit, terms.steps_ahead, terms.fragment_steps) == (2000, 2, 2000, 200)
    config = APPOConfig().environment("CartPole-v1").training(train_batch_size_per_learner=500)
    terms = trainer_terms(attach(config, NOWHERE))
    assert (terms.quota, terms.lag_limit, terms.steps_ahead, terms.fragment_steps) == (500, 20, 1000, 50)


def test_rules_of_ppo_and_appo() -> None:
    rules = sampling_rules(attach(ppo().training(train_batch_size_per_learner=2001), NOWHERE), 2)
    assert (rules.style, rules.share, rules.quota, rules.timeout) == ("round", 1001, 2001, 10.0)
    config = APPOConfig().environment("CartPole-v1").env_runners(num_envs_per_env_runner=4)
    assert sampling_rules(attach(config, NOWHERE), 3)[:2] == ("stream", 200)


def test_what_a_replay_buffer_cant_do_with_is_refused(tmp_path: Path) -> None:
    config = DQNConfig().environment("CartPole-v1")
    with pytest.raises(SettingsError, match="an audit proves that each was trained on once"):
        attach(config, NOWHERE, audit=tmp_path)


SEQUENCES = {"replay_buffer_config": {"type": "EpisodeReplayBuffer", "capacity": 100}}
MEMORY = {"use_lstm": True, "max_seq_len": 4}


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        (lambda: SACConfig().environment("Pendulum-v1"), SEQUENCES, "RLlib's SAC knows no memory"),
        (lambda: DQNConfig().environment("CartPole-v1"), SEQUENCES | {"num_atoms": 5}, r"\(num_atoms=5\) of sequences"),
        (lambda: DQNConfig().environment("CartPole-v1"), SEQUENCES | {"n_step": 3}, "n_step=1 alone, and it is 3"),
    ],
)
def test_a_memory_that_rllib_cant_train_is_refused(config: Any, changes: dict[str, Any], says: str) -> None:
    made = config().training(**changes).rl_module(model_config=MEMORY)
    with pytest.raises(SettingsError, match=says):
        attach(made, NOWHERE)
    attach(made.rl_module(model_config={"max_seq_len": 4}), NOWHERE)


def test_a_memory_in_a_spec_is_seen_too() -> None:
    made = SACConfig().environment("Pendulum-v1").rl_module(rl_module_spec=RLModuleSpec(model_config=MEMORY))
    with pytest.raises(SettingsError, match="RLlib's SAC knows no memory"):
        attach(made, NOWHERE)


def test_a_memory_of_several_agents_is_refused_with_a_replay_buffer() -> None:
    from small_dqn import several

    with pytest.raises(SettingsError, match="use_lstm: RLlib's replay buffers of several agents draw single steps"):
        attach(several().rl_module(model_config=MEMORY), NOWHERE)


def test_a_module_of_ones_own_has_no_memory_with_sac() -> None:
    from recurrent_module import made

    with pytest.raises(SettingsError, match=r"Recurrent has a memory\. RLlib's SAC knows no memory"):
        policy_of(attach(SACConfig().environment("Pendulum-v1"), NOWHERE), made())


@pytest.mark.parametrize(
    ("buffer", "model", "warned"),
    [
        ({"type": "EpisodeReplayBuffer"}, MEMORY, False),
        ({"type": "EpisodeReplayBuffer"}, {"use_lstm": True}, True),
        ({"type": "PrioritizedEpisodeReplayBuffer"}, MEMORY, True),
        (None, MEMORY, True),
        (None, {}, False),
    ],
)
def test_a_memory_that_dqn_would_not_learn_is_told(
    buffer: Any, model: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = DQNConfig().environment("CartPole-v1").rl_module(model_config=model)
    if buffer is not None:
        config.training(replay_buffer_config=buffer)
    attach(config, NOWHERE)
    assert ("it trains as if each began an episode" in caplog.text) is warned


def test_dqn_and_sac_get_what_rllibs_own_runner_returns() -> None:
    config = DQNConfig().environment("CartPole-v1").env_runners(num_env_runners=2, num_envs_per_env_runner=3)
    attach(config.training(n_step=(2, 5)), NOWHERE)
    terms, rules = trainer_terms(config), sampling_rules(config, 2, 1)
    assert (rules.style, rules.share, rules.ahead) == ("exact", 15, 16)
    assert (terms.quota, terms.steps_ahead, terms.fragment_steps, terms.lease_steps) == (30, 120, 16, 31)
    assert terms.lag_limit > 100_000
    sac = attach(SACConfig().environment("Pendulum-v1"), NOWHERE, lag_limit=7, steps_ahead=9, fragment_steps=3)
    terms = trainer_terms(sac)
    assert sampling_rules(sac, 0).share == terms.quota == 1
    assert (terms.lag_limit, terms.steps_ahead, terms.fragment_steps) == (7, 9, 3)


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (lambda: MARWILConfig().environment("CartPole-v1"), SettingsError, "MARWIL doesn't sample .* use PPO, APPO"),
        (lambda: PPOConfig().environment("CartPole-v11"), SettingsError, "CartPole-v11.* can't be made here"),
        (
            lambda: ppo().evaluation(evaluation_interval=1, evaluation_config={"env": "Pendulum-v1"}),
            SettingsError,
            r"evaluation_config=\{'env'.*each simulator has its own",
        ),
        (
            lambda: ppo().evaluation(evaluation_interval=1, evaluation_config={"clip_actions": True}),
            SettingsError,
            "'clip_actions'.*one policy",
        ),
        (
            lambda: ppo().evaluation(evaluation_interval=1, evaluation_parallel_to_training=True),
            SettingsError,
            "evaluation_num_env_runners >= 1",
        ),
        (
            lambda: ppo().evaluation(evaluation_interval=1, evaluation_duration="auto", evaluation_num_env_runners=1),
            SettingsError,
            "needs evaluation_parallel_to_training",
        ),
        (
            lambda: ppo().evaluation(evaluation_interval=1, evaluation_sample_timeout_s=0),
            SettingsError,
            "evaluation_sample_timeout_s must be positive",
        ),
        (lambda: ppo().env_runners(batch_mode="complete_episodes"), SettingsError, "complete_episodes"),
        (
            lambda: PPOConfig().environment(
                observation_space=gym.spaces.Dict({"a": gym.spaces.Text(2)}), action_space=gym.spaces.Discrete(2)
            ),
            SpaceError,
            "a Text space",
        ),
        (
            lambda: PPOConfig().environment(
                observation_space=gym.spaces.Box(0, 1, (2,), np.float32), action_space=gym.spaces.MultiBinary(3)
            ),
            SpaceError,
            "MultiBinary",
        ),
        (
            lambda: ppo().api_stack(enable_rl_module_and_learner=False, enable_env_runner_and_connector_v2=False),
            SettingsError,
            "new API stack",
        ),
    ],
)
def test_what_it_refuses(config: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        attach(config(), NOWHERE)


@pytest.mark.parametrize("settings", [{"lag_limit": -1}, {"steps_ahead": -5}, {"fragment_steps": -1}])
def test_settings_out_of_range(settings: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="must be at least 1"):
        attach(ppo(), NOWHERE, **settings)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(SettingsError, match="evaluation_share must be from 0 to 1"):
        attach(ppo(), NOWHERE, evaluation_share=share)


def test_an_evaluation_that_says_what_training_does_is_none_of_its_own() -> None:
    config = ppo().evaluation(evaluation_interval=2, evaluation_config={"explore": False, "env": "CartPole-v1"})
    assert attach(config, NOWHERE, evaluation_share=0.25).evaluation_interval == 2


def test_an_address_that_is_none() -> None:
    with pytest.raises(SettingsError, match=r"expected an address like tcp://127.0.0.1:5555, got 'localhost'"):
        attach(ppo(), "localhost")


def test_without_a_broker_the_spaces_are_waited_for_and_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConnectionTimeout, match=r"is `rllink-zmq broker` running there"):
        attach(PPOConfig(), NOWHERE, spaces_timeout=1.0)


def test_a_config_that_was_not_attached() -> None:
    with pytest.raises(SettingsError, match=r"call rllink_zmq\.rllib\.attach"):
        LinkSettings.of(AlgorithmConfig())


def test_run_ids_sort_by_time() -> None:
    ids = [new_run_id() for _ in range(5)]
    assert len(set(ids)) == 5 and [i[:12] for i in ids] == sorted(i[:12] for i in ids)


@pytest.mark.parametrize(
    "actions",
    [gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Box(-1, 1, (2,)), gym.spaces.Dict(a=gym.spaces.Discrete(2))],
    ids=["MultiDiscrete", "Box", "Dict"],
)
def test_dqn_has_discrete_actions(actions: gym.Space[Any]) -> None:
    config = DQNConfig().environment(observation_space=gym.spaces.Box(-1, 1, (3,)), action_space=actions)
    with pytest.raises(SpaceError, match="DQN has a value for each of a Discrete's actions"):
        attach(config, NOWHERE)


def test_actions_that_hold_nothing() -> None:
    space = gym.spaces.Box(-1, 1, (0,))
    config = PPOConfig().environment(observation_space=gym.spaces.Box(-1, 1, (3,)), action_space=space)
    with pytest.raises(SpaceError, match=r"shape \[0\], which holds nothing"):
        attach(config, NOWHERE)
