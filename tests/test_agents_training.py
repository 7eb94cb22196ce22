"""Several agents trained by RLlib, from simulators behind a broker."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import pytest
import small_dqn
from fake_training import broker
from processes import REAL_RAY, ROOT

from broker.server import Server
from rllink_zmq import connect_agents, drive_agents
from rllink_zmq.audit import read
from rllink_zmq.audit_judge import judge
from rllink_zmq.client import Inference
from rllink_zmq.drive_loops_agents import agents_env
from rllink_zmq.errors import SettingsError

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm

pytestmark = REAL_RAY

sys.path.append(str(ROOT / "examples"))


@contextmanager
def simulators(
    server: Server,
    *make: Callable[[], Any],
    inference: Inference | Sequence[Inference] = "local",
    training_enabled: bool | None = None,
    **options: Any,
) -> Iterator[None]:
    """One for each of these, in a thread of its own. `inference`: of all, or of each."""
    inferences = [inference] * len(make) if isinstance(inference, str) else inference
    stop = threading.Event()
    failed: list[BaseException] = []

    def work(i: int, env: Any) -> None:
        agents = agents_env(env)
        try:
            with connect_agents(
                server.frontend,
                observation_spaces=agents.observation_spaces,
                action_spaces=agents.action_spaces,
                seed=i,
                inference=inferences[i],
                **options,
            ) as client:
                drive_agents(client, env, seed=i, stop=stop.is_set, training_enabled=training_enabled)
        except BaseException as e:
            traceback.print_exc()  # the training waits for its steps, and shows no reason
            failed.append(e)

    threads = [threading.Thread(target=work, args=(i, one())) for i, one in enumerate(make)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed


@pytest.fixture
def server() -> Iterator[Server]:
    with broker() as running:
        yield running


def build(config: Any, server: Server, **options: Any) -> Algorithm:
    from rllink_zmq.rllib import attach

    return attach(config, server.backend, **options).build_algo()


def test_a_policy_learns_against_a_frozen_one(cluster: None, server: Server, built: list[Algorithm]) -> None:
    """PettingZoo's both forms at once. The frozen policy is published once, and RLlib's metrics are there."""
    import rock_paper_scissors as example
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    with simulators(server, example.together, example.in_turn):
        algorithm = build(example.config(), server)
        built.append(algorithm)
        first = algorithm.train()
        returns: dict[str, float] = {}
        for _ in range(25):
            result = algorithm.train()
            returns = result["env_runners"]["agent_episode_returns_mean"]
            if returns["player_0"] > 7.0:
                break
        assert returns["player_0"] > 7.0 > -7.0 > returns["player_1"]
        versions = server.core.module_versions  # type: ignore[union-attr]
        assert versions["likes_rock"] == 0 < versions["learner"]
        sampled = first["env_runners"]
        assert sampled["num_env_steps_sampled"] >= 600
        assert set(sampled["num_agent_steps_sampled"]) == {"player_0", "player_1"}
        assert set(sampled["module_episode_returns_mean"]) == {"learner", "likes_rock"}
        assert set(sampled["agent_steps"]) == {"player_0", "player_1"}
        dropped = result["rllink"]["ledger"]["dropped"]
        assert not dropped.keys() - {"stale"}, dropped
        # Another opponent, with the same simulators in the same run; then the first one goes.
        run = algorithm.rllink_trainer.run
        algorithm.add_module(
            "likes_paper", RLModuleSpec.from_module(algorithm.get_module("likes_rock")),
            new_agent_to_module_mapping_fn=lambda agent, *_, **__: "learner" if agent == "player_0" else "likes_paper",
            new_should_module_be_updated=["learner"],
        )  # fmt: skip
        algorithm.remove_module("likes_rock", new_should_module_be_updated=["learner"])
        for _ in range(2):
            algorithm.train()  # what was on its way
        lifetime = ("env_runners", "num_module_steps_sampled_lifetime")
        before = dict(algorithm.metrics.peek(lifetime))
        result = algorithm.train()
        grown = {name: steps - before.get(name, 0) for name, steps in algorithm.metrics.peek(lifetime).items()}
        assert grown["learner"] >= 300 and grown["likes_paper"] >= 300 and grown["likes_rock"] == 0, grown
        assert result["env_runners"]["num_env_steps_sampled"] >= 600
        assert result["rllink"]["run_id"] == run
        assert "likes_paper" in server.core.module_versions  # type: ignore[union-attr]
        dropped = result["rllink"]["ledger"]["dropped"]
        assert not dropped.keys() - {"stale", "malformed", "abandoned"}, dropped


def test_each_agent_has_its_policy(cluster: None, server: Server, built: list[Algorithm], tmp_path: Path) -> None:
    """MultiAgentCartPole, whose agents end one by one. Batches are of agents' steps. A checkpoint brings the policies
    back."""
    import multi_agent_cartpole as example

    config = example.config().env_runners(num_env_runners=0).training(train_batch_size_per_learner=800, num_epochs=4)
    config.multi_agent(count_steps_by="agent_steps")
    with simulators(server, example.make, example.make):
        algorithm = build(config, server)
        built.append(algorithm)
        best = 0.0
        for _ in range(16):
            result = algorithm.train()
            sampled = result["env_runners"]
            steps = sum(sampled["num_agent_steps_sampled"].values())
            assert 800 <= steps <= 800 + 2 * 100 and sampled["num_env_steps_sampled"] < steps, "a fragment more at most"
            best = max(best, sampled["episode_return_mean"])
            if best > 60.0:
                break
        assert best > 60.0, "two random policies come to 45"
        versions = server.core.module_versions  # type: ignore[union-attr]
        assert set(versions) == {"pole_0", "pole_1"} and min(versions.values()) > 0
        before = algorithm.get_module("pole_0").get_state()
        path = algorithm.save_to_path(str(tmp_path / "checkpoint"))
        algorithm.restore_from_path(path)
        run = algorithm.rllink_trainer.run
        after = algorithm.get_module("pole_0").get_state()
        assert all((before[name] == after[name]).all() for name in before)
        result = algorithm.train()
        assert result["rllink"]["run_id"] == run
        assert sum(result["env_runners"]["num_agent_steps_sampled"].values()) >= 800


@pytest.mark.long
@pytest.mark.parametrize("algo", ["APPO", "IMPALA"])
def test_streams_train_several_agents(cluster: None, server: Server, built: list[Algorithm], algo: str) -> None:
    import multi_agent_cartpole as example
    from ray.rllib.algorithms import appo, impala
    from ray.rllib.examples.envs.classes.multi_agent import MultiAgentCartPole

    config = (
        {"APPO": appo.APPOConfig, "IMPALA": impala.IMPALAConfig}[algo]()
        .environment(MultiAgentCartPole, env_config={"num_agents": 2})
        .multi_agent(policies={"p", "q"}, policy_mapping_fn=lambda agent, episode, **_: "pq"[hash(episode.id_) % 2])
        .env_runners(num_env_runners=1, rollout_fragment_length=50)
        .training(train_batch_size_per_learner=200)
        .rl_module(model_config={"fcnet_hiddens": [16]})
        .reporting(min_time_s_per_iteration=1)
    )
    if algo == "IMPALA":
        config.multi_agent(count_steps_by="agent_steps")
    with simulators(server, example.make, example.make):
        algorithm = build(config, server)
        built.append(algorithm)
        for _ in range(20):
            result = algorithm.train()
            if result["rllink"]["version"] > 2:
                break
        assert result["rllink"]["version"] > 2
        assert set(result["env_runners"]["module_episode_returns_mean"]) == {"p", "q"}


@pytest.mark.long
def test_runners_act_for_several_agents(cluster: None, server: Server, built: list[Algorithm]) -> None:
    """The one that learns and the frozen one, each by the version of it that is published."""
    import rock_paper_scissors as example

    with simulators(server, example.together, example.in_turn, inference="remote"):
        algorithm = build(example.config(), server)
        built.append(algorithm)
        first = algorithm.train()["env_runners"]["agent_episode_returns_mean"]["player_0"]
        for _ in range(25):
            result = algorithm.train()
            last = result["env_runners"]["agent_episode_returns_mean"]["player_0"]
            if last > first + 3.0:
                break
        assert last > first + 3.0, "it learns"
        acts = server.core.acts  # type: ignore[union-attr]
        assert acts["answered"] >= 1000 and acts["refused"] == 0
        dropped = result["rllink"]["ledger"]["dropped"]
        assert not dropped.keys() - {"stale"}, dropped


def test_policies_learn_behind_a_filter(cluster: None, server: Server, built: list[Algorithm]) -> None:
    """Runners act behind RLlib's own pipelines; the frozen policy's weights are published again where its filter has
    moved. The statistics are of each step, once."""
    import multi_agent_cartpole as example
    from ray.rllib.connectors.env_to_module import MeanStdFilter

    config = (
        example.config()
        .multi_agent(policies_to_train=["pole_0"])
        .env_runners(env_to_module_connector=lambda env, spaces, device: MeanStdFilter(multi_agent=True))
        .training(train_batch_size_per_learner=500, minibatch_size=125)
    )
    with simulators(server, *[example.make] * 4, inference="auto"):
        algorithm = build(config, server)
        built.append(algorithm)
        returns = []
        while len(returns) < 20:
            result = algorithm.train()
            returns.append(result["env_runners"]["agent_episode_returns_mean"])
            if returns[-1]["0"] > 60.0:
                break
        acts = server.core.acts  # type: ignore[union-attr]
    assert returns[-1]["0"] > 60.0 > returns[-1]["1"], returns
    assert acts["answered"] > 500 and acts["refused"] == 0
    versions = server.core.module_versions  # type: ignore[union-attr]
    assert versions["pole_0"] == versions["pole_1"] == len(returns)
    assert not result["rllink"]["ledger"]["dropped"].keys() - {"stale"}
    (stats,) = _statistics(algorithm, 0)
    lifetime = algorithm.metrics.peek(("env_runners", "num_agent_steps_sampled_lifetime", "0"))
    assert lifetime <= stats.num_pushes <= lifetime * 1.2, "and of each episode's end"


def _statistics(algorithm: Algorithm, agent: int) -> list[Any]:
    """What the filter has learned of an agent."""
    import tree

    piece = algorithm.env_runner._env_to_module.connectors[0]
    return tree.flatten(piece._filters[agent].running_stats)


def test_agents_that_remember_and_see_several_parts(
    cluster: None, server: Server, built: list[Algorithm], tmp_path: Path
) -> None:
    """One policy is recurrent, the other one not; one simulator acts by itself, the other one asks. An action that is
    none of the space ends a simulator. An audit finds every promise kept."""
    import parted_env
    from ray.rllib.algorithms.ppo import PPOConfig
    from ray.rllib.connectors.env_to_module import FlattenObservations
    from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec
    from ray.rllib.env.multi_agent_env import make_multi_agent

    make = make_multi_agent("Parted-v0")
    model = {"fcnet_hiddens": [16]}
    lstm = model | {"use_lstm": True, "lstm_cell_size": 8, "max_seq_len": 5, "vf_share_layers": False}
    config = (
        PPOConfig()
        .environment(
            observation_space=gym.spaces.Dict(dict.fromkeys(range(2), parted_env.OBSERVATIONS)),  # type: ignore[misc]
            action_space=gym.spaces.Dict(dict.fromkeys(range(2), parted_env.ACTIONS)),  # type: ignore[misc]
        )
        .multi_agent(policies={"one", "other"}, policy_mapping_fn=lambda agent, *_, **__: ("one", "other")[agent])
        .env_runners(
            num_env_runners=1,
            env_to_module_connector=lambda env, spaces, device: FlattenObservations(multi_agent=True),
        )
        .training(train_batch_size_per_learner=400, minibatch_size=200, num_epochs=6, lr=1e-2, gamma=0.0)
        .rl_module(
            rl_module_spec=MultiRLModuleSpec(
                rl_module_specs={"one": RLModuleSpec(model_config=lstm), "other": RLModuleSpec(model_config=model)}
            )
        )
    )

    def one() -> Any:
        return make({"num_agents": 2})

    audit = {"audit": tmp_path / "logs"}
    with simulators(server, one, one, inference=("local", "remote"), compression="zstd", **audit):
        algorithm = build(config, server, **audit)
        built.append(algorithm)
        first = algorithm.train()["env_runners"]["module_episode_returns_mean"]
        returns = [first]
        while len(returns) < 25:
            result = algorithm.train()
            returns.append(result["env_runners"]["module_episode_returns_mean"])
            if min(returns[-1][name] - first[name] for name in first) > 2.0:
                break
        assert min(returns[-1][name] - first[name] for name in ("one", "other")) > 2.0, returns
        acts = server.core.acts  # type: ignore[union-attr]
        assert acts["answered"] >= 100 and acts["refused"] == 0
        dropped = result["rllink"]["ledger"]["dropped"]
        assert not dropped.keys() - {"stale"}, dropped
        # A recurrent policy that comes later: RLlib has given runners a part of it, and a new run begins.
        run = algorithm.rllink_trainer.run
        algorithm.add_module(
            "later", RLModuleSpec.from_module(algorithm.get_module("one")),
            new_agent_to_module_mapping_fn=lambda agent, *_, **__: ("one", "later")[agent],
        )  # fmt: skip
        assert algorithm.rllink_trainer.run > run
        for _ in range(3):
            result = algorithm.train()
        assert result["env_runners"]["num_module_steps_sampled"].keys() >= {"one", "later"}
        assert server.core.module_versions["later"] > 0  # type: ignore[union-attr]
    algorithm.stop()
    built.clear()
    verdict = judge(read([tmp_path / "logs"]))
    assert not any(verdict.broken.values()), verdict.broken
    fragments, steps = verdict.used
    trained = (len(returns) + 3) * 2 * 400
    assert fragments >= 40 and trained * 0.5 < steps < trained * 2.0, "each agent's steps count"


def test_dqn_trains_several_agents(cluster: None, server: Server, built: list[Algorithm]) -> None:
    """One policy learns, the other is frozen; one simulator acts by itself, and a runner acts for the other. RLlib gets
    exactly as many steps as it asks for, and its replay buffer takes them."""
    import multi_agent_cartpole as example
    from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

    config = small_dqn.several().multi_agent(policies_to_train=["pole_0"])
    with simulators(server, example.make, example.make, inference=("local", "remote")):
        algorithm = build(config, server)
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
        acts = server.core.acts  # type: ignore[union-attr]
    sampled = results[-1]["env_runners"]
    steps = sampled[NUM_ENV_STEPS_SAMPLED_LIFETIME]
    assert steps >= 400 and steps % 4 == 0
    buffer = algorithm.local_replay_buffer
    assert buffer.get_num_timesteps() == steps
    for name in ("pole_0", "pole_1"):
        lifetime = algorithm.metrics.peek(("env_runners", "num_module_steps_sampled_lifetime", name))
        assert buffer.get_num_timesteps(name) == lifetime > 100
    learners = results[-1]["learners"]
    assert np.isfinite(learners["pole_0"]["qf_loss"]) and "qf_loss" not in learners.get("pole_1", {})
    versions = server.core.module_versions  # type: ignore[union-attr]
    assert versions["pole_1"] == 0 < versions["pole_0"]
    assert acts["answered"] > 50 and acts["refused"] == 0
    assert set(sampled["agent_episode_returns_mean"]) == {"0", "1"}
    ledger = results[-1]["rllink"]["ledger"]
    assert not ledger["dropped"], ledger


@pytest.mark.long
def test_dqn_counts_steps_of_agents(cluster: None, server: Server, built: list[Algorithm]) -> None:
    """Each call has as many env steps as complete five steps of agents: three, or more where a pole has fallen."""
    import multi_agent_cartpole as example

    sampled: list[list[int]] = []

    def on_sample_end(*, samples: Any, **_: Any) -> None:
        steps = sum(len(single) for episode in samples for single in episode.agent_episodes.values())
        sampled.append([sum(map(len, samples)), steps])

    config = (
        small_dqn.several(runners=0)
        .env_runners(rollout_fragment_length=5)
        .multi_agent(count_steps_by="agent_steps")
        .callbacks(on_sample_end=on_sample_end)
    )
    with simulators(server, example.make, example.make):
        algorithm = build(config, server)
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
    assert len(sampled) >= 50
    assert {steps for _, steps in sampled} == {5, 6}
    assert all(3 <= env_steps <= 5 for env_steps, _ in sampled)
    assert np.isfinite(results[-1]["learners"]["pole_0"]["qf_loss"])
    assert not results[-1]["rllink"]["ledger"]["dropped"]


@pytest.mark.long
def test_sac_trains_several_agents(cluster: None, server: Server, built: list[Algorithm]) -> None:
    import multi_agent_cartpole as example
    from small_dqn import sac

    with simulators(server, example.make, example.make):
        algorithm = build(small_dqn.several(sac()), server)
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
    steps = results[-1]["env_runners"]["num_env_steps_sampled_lifetime"]
    assert steps >= 400 and steps % 8 == 0, "an iteration takes a second at least, and each call 8 env steps"
    for name in ("pole_0", "pole_1"):
        assert np.isfinite(results[-1]["learners"][name]["qf_loss"])
        assert server.core.module_versions[name] > 10  # type: ignore[union-attr]
    assert not results[-1]["rllink"]["ledger"]["dropped"]


def test_evaluation_of_several_agents(cluster: None, server: Server, built: list[Algorithm]) -> None:
    """A simulator that is there for it serves, and one of those that train; the most likely actions are taken."""
    import multi_agent_cartpole as example
    from ray.rllib.core.rl_module.rl_module import RLModuleSpec

    config = example.config().training(train_batch_size_per_learner=500).evaluation(
        evaluation_interval=1, evaluation_num_env_runners=1, evaluation_duration=6, evaluation_sample_timeout_s=30,
        evaluation_config={"explore": False},
    )  # fmt: skip
    with simulators(server, example.make, example.make), simulators(server, example.make, training_enabled=False):
        algorithm = build(config.env_runners(num_env_runners=0), server, evaluation_share=0.3)
        built.append(algorithm)
        results = [algorithm.train() for _ in range(2)]
        # Another policy for one of the agents: evaluation has it, too.
        algorithm.add_module(
            "late", RLModuleSpec.from_module(algorithm.get_module("pole_1")),
            new_agent_to_module_mapping_fn=lambda agent, *_, **__: "late" if agent else "pole_0",
            new_should_module_be_updated=["pole_0", "late"],
        )  # fmt: skip
        last = algorithm.train()["evaluation"]["env_runners"]
    assert last["num_episodes"] == 6 and last["num_module_steps_sampled"].get("late", 0) > 0
    for result in results:
        mine = result["evaluation"]["env_runners"]
        assert mine["num_episodes"] == 6
        assert set(mine["agent_episode_returns_mean"]) == set(mine["agent_steps"]) == {"0", "1"}
        assert mine["agent_steps"] == mine["agent_episode_returns_mean"], "each step is worth 1"
        assert sum(mine["module_episode_returns_mean"].values()) == pytest.approx(mine["episode_return_mean"])
        assert mine["episode_return_min"] <= mine["episode_return_mean"] <= mine["episode_return_max"]
        assert mine["episode_len_mean"] * 6 == pytest.approx(mine["num_env_steps_sampled"])
        assert result["env_runners"]["num_env_steps_sampled"] >= 500
    ledger = server.core.evaluation_ledger.as_json()  # type: ignore[union-attr]
    each = [*(result["evaluation"]["env_runners"] for result in results), last]
    sampled = sum(one["num_env_steps_sampled"] for one in each)
    assert ledger["delivered"]["steps"] == sampled, "an evaluation takes what it counts"
    assert not results[-1]["rllink"]["ledger"]["dropped"].keys() - {"stale", "abandoned"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda c: c.evaluation(evaluation_config={"policy_mapping_fn": lambda *_, **__: "pole_0"}),
            "agents are mapped to policies as in training",
        ),
        (lambda c: c.multi_agent(policies={41 * "a"}), "1 to 40 characters"),
    ],
)
def test_what_can_not_be_trained_is_refused_in_words(change: Callable[[Any], Any], why: str) -> None:
    import multi_agent_cartpole as example

    from rllink_zmq.rllib import attach

    with pytest.raises(SettingsError, match=why):
        attach(change(example.config()), "tcp://127.0.0.1:5556")
