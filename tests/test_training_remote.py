"""Real simulators whose actions runners compute: single actions, connectors of the user's, masks."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import alternating_env
import image_env
import pytest
from processes import REAL_RAY, ROOT, balanced, environment, process, rllink, simulators, status, until
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.connectors.env_to_module import FlattenObservations, MeanStdFilter, PrevActionsPrevRewards
from ray.rllib.connectors.env_to_module.frame_stacking import FrameStackingEnvToModule
from ray.rllib.connectors.learner.frame_stacking import FrameStackingLearner
from small_ppo import appo, only_staleness, ppo, streams

from rllink_zmq.rllib import attach
from rllink_zmq.rllib.states import from_bytes

pytestmark = REAL_RAY


def test_an_example_trains_with_action_masks_here_and_remotely(addresses: dict[str, str]) -> None:
    """A forbidden action ends the simulator."""
    examples = environment(PYTHONPATH=str(ROOT / "examples"))
    simulate = ("simulate", "--env", "action_masking:Auction-v0", "--broker", addresses["frontend"], "--num", "2")
    with (
        rllink(*simulate, stdout=subprocess.DEVNULL, env=examples) as local,
        rllink(*simulate, "--inference", "remote", stdout=subprocess.DEVNULL, env=examples) as remote,
        process(
            str(ROOT / "examples" / "action_masking.py"), "--broker", addresses["backend"], "--iterations", "8",
            stderr=subprocess.DEVNULL,
        ) as training,
    ):  # fmt: skip
        out, _ = training.communicate(timeout=180)
        shown = status(addresses)
        assert local.poll() is None and remote.poll() is None
    assert training.returncode == 0, out
    returns = [float(line.split()[-1]) for line in out.splitlines() if line.startswith("iteration")]
    assert len(returns) == 8 and returns[-1] > returns[0] + 0.8, returns
    assert shown["acting"]["answered"] > 1000
    assert balanced(shown["ledger"]) and only_staleness(shown["ledger"])


def learns(
    config: Any, env: str, addresses: dict[str, str], built: list[Algorithm], *, above: float, within: float
) -> None:
    """Four simulators of `env` ask for each action: the mean return gets above that many within so many seconds."""
    with rllink(
        "simulate", "--env", env, "--broker", addresses["frontend"], "--num", "4", "--inference", "remote",
        stdout=subprocess.DEVNULL, env=environment(PYTHONPATH=str(Path(__file__).parent)),
    ):  # fmt: skip
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        learned = f"the mean return is above {above}"
        until(lambda: algorithm.train()["env_runners"]["episode_return_mean"] > above, learned, within)
    assert only_staleness(status(addresses)["ledger"])


@pytest.mark.long
def test_frames_are_stacked_for_simulators_that_ask(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """What one picture doesn't tell is learned: runners stack what requests bring, the learner what fragments do."""
    observation_space, action_space = image_env.MOVING_SPACES
    config = (
        ppo(batch=500)
        .environment(None, observation_space=observation_space, action_space=action_space)
        .env_runners(
            env_to_module_connector=lambda *_: FrameStackingEnvToModule(num_frames=2), episode_lookback_horizon=2
        )
        .learners(learner_connector=lambda *_: FrameStackingLearner(num_frames=2))
        .training(lr=2e-3, num_epochs=6)
        .rl_module(model_config={"conv_filters": [[8, 3, 2], [16, 3, 2]], "fcnet_hiddens": [32]})
    )
    learns(config, "image_env:Moving-v0", addresses, built, above=8.0, within=150)


@pytest.mark.long
def test_what_was_done_before_is_seen_by_simulators_that_ask(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """The observation tells nothing, and the next action depends on the last one."""
    observation_space, action_space = alternating_env.SPACES
    config = (
        ppo(batch=500)
        .environment(None, observation_space=observation_space, action_space=action_space)
        .env_runners(env_to_module_connector=lambda *_: [PrevActionsPrevRewards(), FlattenObservations()])
        .training(lr=5e-3, num_epochs=6, gamma=0.0)
    )
    learns(config, "alternating_env:Alternating-v0", addresses, built, above=17.0, within=100)


def test_a_filter_travels_with_the_weights(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """A policy that only runners can compute: who can ask does, who can't is told why."""
    config = ppo().env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    with simulators(addresses, more=("--inference", "auto")):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(3)]
        with rllink(
            "simulate", "--env", "CartPole-v1", "--broker", addresses["frontend"], stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as local:  # fmt: skip
            _, told = local.communicate(timeout=60)
            assert local.returncode == 1 and "can only be asked for its actions" in told and "MeanStdFilter" in told
        until(lambda: status(addresses)["simulators"] == 4, "it is gone")
        results.append(algorithm.train())
        shown = status(addresses)
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    assert balanced(shown["ledger"]) and only_staleness(shown["ledger"])
    assert shown["acting"]["answered"] >= 2000

    assert "dropped" not in results[-1]["env_runners"]["rllink"]
    for seen, published in algorithm.env_runner_group.foreach_env_runner(pushes, local_env_runner=False):
        assert seen >= 2000 and published >= 1000


def pushes(runner: Any) -> tuple[int, int]:
    """How many observations a runner's filter has seen: as it learned, and as came with the newest weights."""
    published = from_bytes(runner._filters.at(runner.held.version))
    learned = runner._env_to_module.get_state()
    seen = [state["MeanStdFilter"][None]["running_stats"][0]["num_pushes"] for state in (learned, published)]
    return seen[0], seen[1]


@pytest.mark.long
def test_a_lone_runners_filter_is_published_and_comes_back_with_a_checkpoint(
    addresses: dict[str, str], built: list[Algorithm], tmp_path: Path
) -> None:
    config = ppo(runners=0).env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter())
    with simulators(addresses, more=("--inference", "remote")):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        for _ in range(3):
            algorithm.train()
        saved, published = pushes(algorithm.env_runner)
        assert saved >= 1500 and published >= 1000
        algorithm.save_to_path(tmp_path)
        for _ in range(2):
            algorithm.train()
        assert pushes(algorithm.env_runner)[1] > saved
        algorithm.restore_from_path(tmp_path)
        assert pushes(algorithm.env_runner) == (saved, saved), "the filter of then, with the weights of then"
        result = algorithm.train()
    assert result["env_runners"]["num_env_steps_sampled"] >= 500 and "dropped" not in result["env_runners"]["rllink"]


@pytest.mark.long
def test_appo_trains_behind_a_filter(addresses: dict[str, str], built: list[Algorithm]) -> None:
    config = appo(batch=40).env_runners(
        env_to_module_connector=lambda env, spaces, device: MeanStdFilter(), rollout_fragment_length=10
    )
    with simulators(addresses, more=("--inference", "remote")):
        algorithm = attach(config, addresses["backend"]).build_algo()
        built.append(algorithm)
        results = streams(algorithm)
    assert all("dropped" not in r.get("env_runners", {}).get("rllink", {}) for r in results)
    assert only_staleness(status(addresses)["ledger"])


def test_remote_simulators_train(addresses: dict[str, str], built: list[Algorithm]) -> None:
    """Runners act for them, while they sample and while the learner learns; one that goes takes nothing with it."""
    with simulators(addresses, more=("--inference", "remote")):
        algorithm = attach(ppo(), addresses["backend"]).build_algo()
        built.append(algorithm)
        results = [algorithm.train() for _ in range(3)]
        shown = status(addresses)
        assert shown["acting"]["services"] == 2 and shown["acting"]["answered"] >= 1500
        assert balanced(shown["ledger"]) and only_staleness(shown["ledger"])
        pids = algorithm.env_runner_group.foreach_env_runner(lambda _: os.getpid(), local_env_runner=False)
        os.kill(pids[0], signal.SIGKILL)
        until(lambda: status(addresses)["acting"]["services"] == 1, "its service is gone")

        def acts_again() -> bool:
            results.append(algorithm.train())
            return bool(status(addresses)["acting"]["services"] == 2)

        until(acts_again, "the runner that was killed acts again")
        shown = status(addresses)
    mine = results[-1]["env_runners"]
    assert all(r["env_runners"]["num_env_steps_sampled"] >= 500 for r in results)
    assert mine["rllink"]["lag_max"] <= 2 and mine["weights_seq_no"] >= len(results) - 1 >= 3
    assert balanced(shown["ledger"]) and set(shown["ledger"]["dropped"]) <= {"stale", "handover_cut"}
    assert shown["simulators"] == 4, "they have noticed nothing"
