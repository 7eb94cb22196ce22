"""What `attach()` writes into an AlgorithmConfig, and what runners and the trainer read back from it.

It lives in `config.env_config["rllink_zmq"]`, a plain dict: that survives copies, checkpoints and Tune.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import gymnasium as gym
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.algorithms.impala.impala import IMPALAConfig
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.algorithms.sac.sac import SACConfig

from rllink_zmq.errors import SettingsError
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.sampling import SamplingRules, Style
from rllink_zmq.session_runner import env_steps

KEY = "rllink_zmq"

ROUND_LINGER = 0.2
"""Seconds that a PPO runner waits for more after its first data."""

STREAM_LINGER = 2.0
"""Seconds that an APPO runner waits for more after its first data before it returns a short answer."""

ANY_LAG = 1_000_000
"""A replay buffer holds steps that are much older than what may be on its way."""

EXACT_FRAGMENT = 16
"""Env steps of DQN's and SAC's fragments, at most. A runner cuts them to what RLlib asks for."""

EXACT_AHEAD = 64
"""Env steps on their way for DQN and SAC, at least: a tenth of a second of what they train on, so that a call finds
them there, and four fragments, so that two runners have some though there is one simulator. With more simulators their
fragments are shorter; each may always have one of one step on its way."""


@dataclass(frozen=True)
class LinkSettings:
    """Zeros mean: the default of the algorithm (`trainer_terms`)."""

    broker: str
    """The broker's backend address."""

    lag_limit: int = 0
    """The most learner updates that the weights of a fragment may be old: an older one is dropped as `stale`. Default 2
    for PPO (usually 1: sampling overlaps with learning), 20 for APPO and IMPALA (they correct for it by V-trace),
    practically none for DQN and SAC (a replay buffer holds much older ones)."""

    steps_ahead: int = 0
    """Env steps that all simulators together may have on their way; in PPO while the learner learns: a batch that is
    asked for has always room. Default `(lag_limit - 1)` learner updates' worth for PPO: the next batch is sampled while
    the learner learns, by the weights from before. 1 there = simulators rest meanwhile (but for a step of each
    episode), as RLlib's own runners do: more is learned from each step, and nothing is sampled during an update.
    Default 2 updates' worth for APPO and IMPALA; for DQN and SAC 64, or what RLlib asks for in four rounds if that is
    more."""

    runner_timeout_s: float = 0.0
    """A runner that the broker has not heard for so many seconds is killed, and started again. Default 10."""

    fragment_steps: int = 0
    """The longest fragment in env steps; the broker tells shorter ones when there are many simulators. Default 200 for
    PPO; `rollout_fragment_length * num_envs_per_env_runner` for APPO and IMPALA, which count calls; 16 for DQN and SAC,
    whose runners cut them to fit."""

    runners: int = -1
    """How many runners the pool was last scaled to; -1 = the config's `num_env_runners`. Travels with checkpoints."""

    act_rows: int = 0
    """Observations of one batch of the action service, at most. Default 1,024."""

    act_wait_s: float = 0.0
    """Seconds that the first request of a batch may wait for others. By default none does: a batch is what came while
    the module was busy with the one before."""

    evaluation_share: float = 0.0
    """The part of the simulators, 0 to 1, that RLlib's evaluation may have episodes of while it goes on; rounded up. 0:
    only those that are started for that serve (`rllink-zmq simulate --evaluate`)."""

    audit: str = ""
    """A directory for the audit logs of runners and learners, each on its own host; "" = none."""

    @classmethod
    def of(cls, config: AlgorithmConfig) -> LinkSettings:
        """The settings in `config`. Raises `SettingsError` when `attach()` was not called on it."""
        stored = (config.env_config or {}).get(KEY)
        if not stored:
            raise SettingsError("this config was not attached: call rllink_zmq.rllib.attach(config, broker) first")
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in stored.items() if k in known})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explores(config: AlgorithmConfig) -> tuple[bool, bool]:
    """Whether actions are drawn in training, and in evaluation."""
    own, evaluation = bool(config.explore), config.evaluation_config
    if isinstance(evaluation, AlgorithmConfig):
        return own, bool(evaluation.explore)
    return own, bool((evaluation or {}).get("explore", own))


def style_of(config: AlgorithmConfig) -> Style:
    """How the algorithm samples: PPO collects a batch in rounds, APPO and IMPALA stream, DQN and SAC want an exact
    number of steps. Raises `SettingsError` for anything else."""
    if isinstance(config, IMPALAConfig):  # APPO's too
        return "stream"
    if isinstance(config, PPOConfig):
        return "round"
    if isinstance(config, DQNConfig | SACConfig):
        return "exact"
    name = type(config).__name__.removesuffix("Config")
    raise SettingsError(
        f"{name} doesn't sample by env runners that this package knows: use PPO, APPO, IMPALA, DQN or SAC"
    )


@dataclass(frozen=True)
class Terms:
    """What the broker is told of the training. In learner updates and env steps; `quota`, `steps_ahead` and
    `fragment_steps` in those of `agents` if that isn't 0. `lease_steps`: where RLlib waits for every runner in each
    step of the training none may sit on what another one lacks; 0 = any number. `needs_logp`: the losses of PPO, APPO
    and IMPALA correct for how probable each action was. `rounds`: `quota` steps are sampled for each version of the
    weights."""

    quota: int
    lag_limit: int
    steps_ahead: int
    fragment_steps: int
    lease_steps: int = 0
    needs_logp: bool = True
    rounds: bool = False
    agents: int = 0


def trainer_terms(config: AlgorithmConfig) -> Terms:
    """The terms of `config`, defaults filled in. Raises `SettingsError` for a setting out of its range."""
    settings = LinkSettings.of(config)
    if not 0 <= settings.runner_timeout_s < math.inf:
        raise SettingsError(f"runner_timeout_s must be positive (0 = the default), it is {settings.runner_timeout_s}")
    if not 0 <= settings.act_wait_s <= 1.0:
        raise SettingsError(f"act_wait_s must be from 0 to 1 s, it is {settings.act_wait_s}")
    if not 0 <= settings.evaluation_share <= 1:
        raise SettingsError(f"evaluation_share must be from 0 to 1, it is {settings.evaluation_share}")
    for name in ("lag_limit", "steps_ahead", "fragment_steps", "act_rows"):
        if getattr(settings, name) < 0:
            raise SettingsError(f"{name} must be at least 1 (0 = the default), it is {getattr(settings, name)}")
    style = style_of(config)
    lag = settings.lag_limit or {"round": 2, "stream": 20, "exact": ANY_LAG}[style]
    if style == "exact":
        quota = exact_share(config) * max(1, int(config.num_env_runners))
        ahead, length = max(EXACT_AHEAD, 4 * quota), EXACT_FRAGMENT
    else:
        quota = int(config.total_train_batch_size)
        ahead = quota * max(1, lag - 1) if style == "round" else quota * 2
        length = 200 if style == "round" else _stream_share(config)
    length = settings.fragment_steps or length
    most = exact_share(config) + length if style == "exact" else 0
    return Terms(
        quota, lag, settings.steps_ahead or ahead, length, most, needs_logp=style != "exact", rounds=style == "round",
        agents=_agents(config),
    )  # fmt: skip


def sampling_rules(config: AlgorithmConfig, runners: int, index: int = 0) -> SamplingRules:
    """How one of `runners` runners, RLlib's number `index`, answers `sample()`."""
    terms, style = trainer_terms(config), style_of(config)
    timeout = float(config.sample_timeout_s or 60.0)
    weigh = agent_steps if counts_agent_steps(config) else env_steps
    if style == "exact":
        return SamplingRules(
            style, exact_share(config, index), terms.quota, timeout, linger=0.0, ahead=terms.fragment_steps, weigh=weigh
        )
    if style == "round":
        share = math.ceil(terms.quota / max(1, runners))
        return SamplingRules(style, share, terms.quota, timeout, ROUND_LINGER, weigh=weigh)
    return SamplingRules(style, _stream_share(config), terms.quota, timeout, STREAM_LINGER, weigh=weigh)


def longest_chunk(config: AlgorithmConfig) -> float:
    """Env steps of the longest piece of an episode that a runner hands over."""
    return trainer_terms(config).fragment_steps if style_of(config) == "stream" else math.inf


def exact_share(config: AlgorithmConfig, index: int = 0) -> int:
    """Steps, as the config counts them, that RLlib's own runner number `index` would return from each call."""
    length = int(config.get_rollout_fragment_length(worker_index=index))
    return length * max(1, int(config.num_envs_per_env_runner))


def counts_agent_steps(config: AlgorithmConfig) -> bool:
    """Whether RLlib's batches are of so many steps of agents, and not of their environment."""
    return bool(config.is_multi_agent and config.count_steps_by == "agent_steps")


def agent_steps(message: FRAGMENT) -> int:
    """The steps of agents that a fragment completes."""
    return sum(rows.steps for rows in message.agents)


def _agents(config: AlgorithmConfig) -> int:
    """How many there are, where their steps count. Settings are checked before there are spaces."""
    spaces = config.observation_space
    return len(spaces.spaces) if counts_agent_steps(config) and isinstance(spaces, gym.spaces.Dict) else 0


def _stream_share(config: AlgorithmConfig) -> int:
    length = config.rollout_fragment_length
    return (length if isinstance(length, int) else 50) * max(1, int(config.num_envs_per_env_runner))
