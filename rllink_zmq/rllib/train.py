"""What `rllink-zmq train` runs: a config, an Algorithm, iterations until it is told to stop."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.appo import APPOConfig
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.impala import IMPALAConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig

from rllink_zmq.errors import SettingsError
from rllink_zmq.rllib.attach import DEFAULT_BROKER, attach
from rllink_zmq.rllib.runner import RLLINK
from rllink_zmq.rllib.settings import KEY

logger = logging.getLogger("rllink_zmq")

ALGORITHMS: dict[str, Callable[[], AlgorithmConfig]] = {
    "PPO": PPOConfig, "APPO": APPOConfig, "IMPALA": IMPALAConfig, "DQN": DQNConfig, "SAC": SACConfig,
}  # fmt: skip

STARTING_POINT: dict[str, dict[str, Any]] = {
    # For small control tasks; RLlib's own defaults learn CartPole several times slower. `--config` overrides each.
    "PPO": {
        "train_batch_size_per_learner": 2000,
        "minibatch_size": 256,
        "num_epochs": 6,
        "lr": 1e-3,
        "grad_clip": 0.5,
        "vf_loss_coeff": 0.01,
        "vf_clip_param": 1e6,
        "use_kl_loss": False,
    },
    "APPO": {
        "train_batch_size_per_learner": 500,
        "lr": 5e-4,
        "vf_loss_coeff": 0.05,
        "entropy_coeff": 0.0,
        "num_learners": 0,
        "min_time_s_per_iteration": 1,
    },
    "IMPALA": {
        "train_batch_size_per_learner": 500,
        "lr": 1e-3,
        "vf_loss_coeff": 0.05,
        "entropy_coeff": 0.0,
        "num_learners": 0,
        "min_time_s_per_iteration": 1,
    },
    # An update for four steps on CartPole, one for each on Pendulum; an iteration is half a thousand of steps.
    "DQN": {
        # RLlib makes one update in each round of all runners: short rounds, so that steps are not wasted.
        "lr": 1e-3,
        "train_batch_size_per_learner": 64,
        "rollout_fragment_length": 2,  # at least n_step
        "n_step": 2,
        "target_network_update_freq": 200,
        "num_steps_sampled_before_learning_starts": 500,
        "epsilon": [(0, 1.0), (3000, 0.05)],
        "min_sample_timesteps_per_iteration": 500,
    },
    "SAC": {
        "actor_lr": 6e-4,
        "critic_lr": 6e-4,
        "alpha_lr": 6e-4,
        "train_batch_size_per_learner": 128,
        "rollout_fragment_length": 1,
        "num_steps_sampled_before_learning_starts": 500,
        "min_sample_timesteps_per_iteration": 500,
    },
}
"""What `train` sets on top of RLlib's defaults."""

NETWORKS: dict[str, dict[str, Any]] = {
    "DQN": {"fcnet_hiddens": [64, 64], "fcnet_activation": "relu", "head_fcnet_hiddens": []},
    "SAC": {"fcnet_hiddens": [64], "head_fcnet_hiddens": [64]},
}
"""For observations that are vectors."""

CHECKPOINT_EVERY_S = 60.0
CHECKPOINTS_KEPT = 2
POOL_FILE = "rllink-pool.json"
RUNNERS = 2
LINK_KEYS = {"lag_limit": int, "steps_ahead": int, "fragment_steps": int, "act_rows": int, "act_wait_s": float}


@dataclass(frozen=True)
class TrainOptions:
    """The options of `rllink-zmq train`. Times in seconds; None = no such limit."""

    broker: str = DEFAULT_BROKER
    env: str | None = None
    algo: str = "PPO"
    runners: int | None = None
    config: Path | None = None
    stop_return: float | None = None
    stop_steps: int | None = None
    stop_time: float | None = None
    checkpoint: Path | None = None
    resume: Path | None = None
    ray_address: str | None = None
    seed: int | None = None
    audit: Path | None = None


class Progress(NamedTuple):
    """One iteration. `wall_s` counts training alone, not the set-up. `link`: simulators, ledger, version, run_id."""

    iterations: int
    env_steps: int
    episode_return_mean: float | None
    wall_s: float
    lag_mean: float | None
    link: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """The keys of `--json`."""
        return {
            "iterations": self.iterations,
            "env_steps": self.env_steps,
            "episode_return_mean": self.episode_return_mean,
            "wall_s": round(self.wall_s, 3),
            "ledger": self.link.get("ledger"),
            "simulators": self.link.get("simulators"),
            "weights": {"run_id": self.link.get("run_id"), "version": self.link.get("version")},
        }


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file of AlgorithmConfig attributes, `model_config` and `rllink`. Raises `SettingsError` in words."""
    try:
        loaded = yaml.safe_load(path.read_text())
    except OSError as e:
        raise SettingsError(f"--config {path}: {e.strerror}") from None
    except yaml.YAMLError as e:
        raise SettingsError(f"--config {path} is no YAML: {' '.join(str(e).split())}") from None
    if not isinstance(loaded or {}, dict):
        raise SettingsError(f"--config {path}: expected a mapping like 'lr: 0.0003', got {type(loaded).__name__}")
    return dict(loaded or {})


def make_config(options: TrainOptions) -> AlgorithmConfig:
    """The config of a training, attached to the broker; waits for the first simulator if no env is given.

    Raises `SettingsError` for an unknown algorithm, or a key that the algorithm's config doesn't have.
    """
    for name in ("ray.rllib", "ray._common.deprecation"):  # advice on RLlib's own names and defaults
        logging.getLogger(name).setLevel(logging.ERROR)
    if options.algo not in ALGORITHMS:
        raise SettingsError(f"--algo must be one of {', '.join(ALGORITHMS)}, it is {options.algo!r}")
    config = ALGORITHMS[options.algo]()
    changes = dict(STARTING_POINT[options.algo])
    own = read_config(options.config) if options.config is not None else {}
    link = own.pop("rllink", None) or {}
    model = own.pop("model_config", None)
    for key, value in (("rllink", link), ("model_config", model)):
        if not isinstance(value or {}, dict):
            raise SettingsError(f"--config: {key!r} must be a mapping, it is {value!r}")
    for name, value in link.items():
        if name not in LINK_KEYS:
            raise SettingsError(f"--config: 'rllink' has no setting {name!r}; it has {', '.join(LINK_KEYS)}")
        kind = LINK_KEYS[name]
        if type(value) is not int and type(value) is not kind:
            what = "a whole number" if kind is int else "a number"
            raise SettingsError(f"--config: {name!r} of 'rllink' must be {what}, it is {value!r}")
    for name in own:
        if not hasattr(config, name) or inspect.ismethod(getattr(config, name)):
            close = difflib.get_close_matches(name, list(vars(config)), 3)
            hint = f": did you mean {' or '.join(close)}?" if close else ""
            raise SettingsError(f"--config: {options.algo} has no setting {name!r}{hint}")
    changes.update(own)
    config.update_from_dict(changes)
    runners = options.runners if options.runners is not None else _runners_of(options.resume)
    # With none of its own RLlib samples in this process: a pool that was scaled to 0 begins with one, and parks it.
    config.env_runners(num_env_runners=max(1, runners) if options.runners is None else runners)
    config.debugging(seed=options.seed, log_level="ERROR")
    if options.env is not None:
        config.environment(options.env)
    attach(config, options.broker, audit=options.audit, **link)
    if options.runners is None:
        config.env_config[KEY]["runners"] = runners
    if model is not None:
        config.rl_module(model_config=model)
    elif len(config.observation_space.shape or ()) == 1:
        network = {"fcnet_hiddens": [64, 64], "fcnet_activation": "tanh"}
        config.rl_module(model_config=NETWORKS.get(options.algo, network))
    if own:
        try:
            config.copy(copy_frozen=False).validate()
        except (TypeError, ValueError) as e:
            raise SettingsError(f"--config {options.config}: RLlib refuses it: {e}") from e
    return config


def start_ray(options: TrainOptions, config: AlgorithmConfig) -> None:
    """Join the cluster at `--ray-address`, or start Ray here with enough logical CPUs for the config.

    The process's signal handlers stay as they are: Ray's own end it at SIGTERM without any clean-up.
    """
    ours = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    _init_ray(options, config)
    if threading.current_thread() is threading.main_thread():
        for s, handler in ours.items():
            signal.signal(s, handler)


def _init_ray(options: TrainOptions, config: AlgorithmConfig) -> None:
    if options.ray_address is not None:
        try:
            ray.init(address=options.ray_address, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as e:
            raise SettingsError(f"--ray-address {options.ray_address}: {str(e).splitlines()[0]}") from None
        return
    aggregators = getattr(config, "num_aggregator_actors_per_learner", 0) * max(1, config.num_learners)
    needed = math.ceil(config.num_env_runners * config.num_cpus_per_env_runner) + config.num_learners + aggregators + 1
    # "local": without it Ray would join a cluster that somebody has started on this machine.
    ray.init(
        address="local",
        num_cpus=max(needed, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.ERROR,
    )


def train(options: TrainOptions, report: Callable[[Progress], None]) -> tuple[Progress, bool]:
    """Train until a stop criterion holds. Returns the last progress, and whether `stop_return` was reached (True if
    there is none). Saves a checkpoint every minute and at the end, also at an interruption, if asked to.

    Raises `SettingsError`, `PolicyError`, `RefusedError` in words for what a user can mend.
    """
    config = make_config(options)
    start_ray(options, config)
    algorithm: Algorithm | None = None
    try:
        algorithm = config.build_algo()
        if options.resume is not None:
            restore(algorithm, options.resume)
        return _iterate(algorithm, options, report)
    finally:
        if algorithm is not None:
            algorithm.stop()
        ray.shutdown()


def _iterate(algorithm: Algorithm, options: TrainOptions, report: Callable[[Progress], None]) -> tuple[Progress, bool]:
    started = saved = time.monotonic()
    progress = Progress(0, 0, None, 0.0, None, algorithm.rllink_trainer.status())
    try:
        while True:
            result = algorithm.train()
            progress = _progress(result, progress, time.monotonic() - started)
            report(progress)
            if options.checkpoint is not None and time.monotonic() - saved > CHECKPOINT_EVERY_S:
                save(algorithm, options.checkpoint)
                saved = time.monotonic()
            done = _done(progress, options)
            if done is not None:
                return progress._replace(link=algorithm.rllink_trainer.status()), done
    finally:
        if options.checkpoint is not None:
            save(algorithm, options.checkpoint)


def _progress(result: dict[str, Any], before: Progress, wall_s: float) -> Progress:
    mine = result.get("env_runners") or {}

    def number(value: Any, otherwise: float | None) -> float | None:
        return otherwise if value is None or math.isnan(value) else float(value)

    steps = number(mine.get("num_env_steps_sampled_lifetime"), None)
    return Progress(
        int(result["training_iteration"]),
        before.env_steps if steps is None else int(steps),
        number(mine.get("episode_return_mean"), before.episode_return_mean),
        wall_s,
        number((mine.get(RLLINK) or {}).get("lag_mean"), None),
        result.get(RLLINK) or before.link,
    )


def _done(progress: Progress, options: TrainOptions) -> bool | None:
    """None = go on; else whether the wanted return was reached."""
    reached = progress.episode_return_mean is not None and (
        options.stop_return is not None and progress.episode_return_mean >= options.stop_return
    )
    if reached:
        return True
    if (options.stop_steps is not None and progress.env_steps >= options.stop_steps) or (
        options.stop_time is not None and progress.wall_s >= options.stop_time
    ):
        return options.stop_return is None
    return None


# ---- checkpoints


def save(algorithm: Algorithm, folder: Path) -> Path:
    """Save `checkpoint-<iteration>` in `folder`, whole or not at all, and remove all but the newest two."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"checkpoint-{algorithm.iteration:06d}"
    partial = folder / f".partial-{os.getpid()}"
    algorithm.save_to_path(str(partial))
    (partial / POOL_FILE).write_text(json.dumps({"runners": algorithm.rllink_trainer.pool.target}))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    for old in _by_age(folder)[:-CHECKPOINTS_KEPT]:
        shutil.rmtree(old)
    return final


def _by_age(folder: Path) -> list[Path]:
    """Its checkpoints, the newest last. By time: another training's may be there, with higher iterations."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: (path.stat().st_mtime_ns, path.name))


def has_checkpoint(folder: Path) -> bool:
    """Whether `save` has saved one in `folder`."""
    return bool(_by_age(folder))


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in `folder`, or `folder` itself if it is one. Raises `SettingsError` if there is none."""
    if (folder / "rllib_checkpoint.json").exists() or (folder / "metadata.json").exists():
        return folder.resolve()
    found = _by_age(folder)
    if not found:
        raise SettingsError(f"--resume {folder}: no checkpoint there (expected {folder}/checkpoint-000123)")
    return found[-1].resolve()


def _runners_of(folder: Path | None) -> int:
    """As many as the pool was last scaled to, or `RUNNERS`."""
    if folder is None:
        return RUNNERS
    try:
        return int(json.loads((newest_checkpoint(folder) / POOL_FILE).read_text())["runners"])
    except (OSError, ValueError, KeyError, TypeError):
        return RUNNERS  # of a user's script, or of an older version


def restore(algorithm: Algorithm, folder: Path) -> None:
    """Go on from the newest checkpoint in `folder`, as a new run: what was done by weights before it is dropped."""
    algorithm.restore_from_path(str(newest_checkpoint(folder)))
    algorithm.rllink_trainer.begin_run()
