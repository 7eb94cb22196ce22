"""FlattenObservations of several agents, in graphs and fragments, against RLlib's own runner on the same env steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, Tuple
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core.columns import Columns
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from test_agents_episodes import RUN, assert_same, lease

from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.errors import SettingsError, SpaceError
from rllink_zmq.fragments_agents import AgentsBuilder, AgentsOrigin, Member, Turn, whole
from rllink_zmq.messages import AgentId
from rllink_zmq.policy import Policy
from rllink_zmq.policy_agents import unpack_crew
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.export_connectors import check_agents_connectors
from rllink_zmq.rllib.flattening import FlattenedAgents
from rllink_zmq.rllib.multi_agent_episodes import MultiAgentEpisodeBuilder
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of
from rllink_zmq.rllib.trainable import check_trainable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

NESTED = Dict({"goal": Discrete(3), "scene": Tuple((MultiBinary(2), Box(-1.0, 1.0, (2,), np.float32)))})
PLAIN = Box(-1.0, 1.0, (3,), np.float32)
STEPS = 12


def seen(agent: AgentId, t: int) -> Any:
    if agent == "flat":
        return np.array([t, 1, -t], np.float32) / STEPS
    lamps = np.array([t % 2, agent == "b"], np.int8)
    return {"goal": t % 3, "scene": (lamps, np.array([t / STEPS, 0.5], np.float32))}


class Env(MultiAgentEnv):
    """Two agents that see several parts, and one that sees numbers."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.possible_agents = self.agents = ["a", "b", "flat"]
        self.observation_spaces = {"a": NESTED, "b": NESTED, "flat": PLAIN}
        self.action_spaces = dict.fromkeys(self.agents, Discrete(3))
        self._t = 0

    def _look(self) -> dict[str, Any]:
        return {agent: seen(agent, self._t) for agent in self.agents}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        self._t = 0
        return self._look(), {}

    def step(self, actions: Any) -> Any:
        self._t += 1
        rewards = {agent: float(action) + self._t for agent, action in actions.items()}
        return self._look(), rewards, {"__all__": self._t == STEPS}, {"__all__": False}, {}


def flattening(agents: Sequence[str] | None) -> Callable[..., Any]:
    return lambda env, spaces, device: FlattenObservations(multi_agent=True, agent_ids=agents)


def config(agents: Sequence[str] | None = None) -> PPOConfig:
    return (
        PPOConfig()
        .environment(Env)
        .multi_agent(policies={"p", "q"}, policy_mapping_fn=lambda a, *_, **__: "q" if a == "flat" else "p")
        .env_runners(num_env_runners=0, env_to_module_connector=flattening(agents))
        .rl_module(model_config={"fcnet_hiddens": [4]})
    )


@pytest.mark.parametrize("agents", [None, ("a", "b")])
def test_modules_see_and_learners_get_what_rllibs_do(agents: Sequence[str] | None) -> None:
    theirs_config = config(agents)
    runner = MultiAgentEnvRunner(config=theirs_config, worker_index=0)
    (theirs,) = runner.sample(num_episodes=1)
    env = Env()
    mine = config(agents).environment(
        observation_space=Dict(env.observation_spaces), action_space=Dict(env.action_spaces)
    )
    blob = crew_of(mine, runner.module)
    crew, blobs = unpack_crew(blob)
    manifest = CrewManifest.of(blob)
    assert manifest.agents == {"p": ["a", "b"], "q": ["flat"]}
    flattenings = check_agents_connectors(mine)
    assert set(flattenings) == {"a", "b", *(() if agents else ("flat",))}
    policies, actors = {}, {}
    for one in crew.modules:
        about = manifest.modules[one.id]
        body = weights_body(about, runner.module.get_state(), one.id)
        policies[one.id] = Policy.load(blobs[one.policy], seed=0)
        policies[one.id].apply(0, body)
        actors[one.id] = ModuleActor(
            runner.module[one.id], about, Discrete(3), True, False,
            flattening=flattenings.get(manifest.agents[one.id][0]),
        )  # fmt: skip
        actors[one.id].apply(0, body)
    layouts = {name: layout_of_policy(policy.manifest) for name, policy in policies.items()}
    mapping = {"a": "p", "b": "p", "flat": "q"}
    builder = AgentsBuilder("e", env.agents)
    builder.recast({agent: Member(module, layouts[module]) for agent, module in mapping.items()}, {})
    origin = AgentsOrigin.of(RUN, 4, {"p": 4, "q": 4})
    builder.begin(whole(layouts[m] for m in mapping.values()), "acted", origin, 100)
    env.reset()
    for t in range(STEPS):
        builder.observe(Turn({agent: seen(agent, t) for agent in env.agents}))
        for module, its in builder.to_act().items():
            rows = np.stack(builder.rows_of(its))
            told = policies[module].act(rows).action_dist_inputs
            asked = actors[module].act(rows, True)["action_dist_inputs"]
            np.testing.assert_allclose(asked, told, atol=1e-6)
            for i, agent in enumerate(its):
                single = theirs.agent_episodes[agent]
                logits = single.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS, t)
                np.testing.assert_allclose(told[i], logits, atol=1e-6)
                logp = single.get_extra_model_outputs(Columns.ACTION_LOGP, t)
                builder.took(agent, single.get_actions(t), float(logp), logits)
        builder.stepped()
        builder.rewards({agent: theirs.agent_episodes[agent].get_rewards(t) for agent in env.agents})
    builder.observe(Turn({agent: seen(agent, STEPS) for agent in env.agents}))
    builder.finish("terminated")
    made = MultiAgentEpisodeBuilder(
        env.observation_spaces,
        env.action_spaces,
        runner.module,
        lambda a, *_: mapping[a],
        connectors=FlattenedAgents(flattenings),
    )  # fmt: skip
    ((built,), refused) = made.build([lease(builder.cut(), 1, "terminated")])
    assert not refused and built.episode is not None
    ours = built.episode
    theirs = theirs.to_numpy()
    for agent in env.agents:
        one, other = ours.agent_episodes[agent], theirs.agent_episodes[agent]
        assert one.get_observations().dtype == other.get_observations().dtype == np.float32
        for get in ("get_observations", "get_actions", "get_rewards"):
            assert_same(getattr(one, get)(), getattr(other, get)())
    assert_same(learner_batch(mine, runner.module, ours), learner_batch(mine, runner.module, theirs))
    runner.stop()


def learner_batch(config: PPOConfig, module: Any, episode: MultiAgentEpisode) -> dict[str, Any]:
    pipeline = config.build_learner_connector(config.observation_space, config.action_space)
    batch = pipeline(rl_module=module, batch={}, episodes=[episode], explore=False, shared_data={})
    found = {}
    for name, columns in batch.items():
        arrays = {column: np.asarray(values) for column, values in columns.items() if column != Columns.INFOS}
        order = np.lexsort(arrays[Columns.OBS].T)  # the episodes' agents are a set
        found[name] = {column: array[order] for column, array in arrays.items() if column != "weights_seq_no"}
    return found


def test_what_the_simulator_chose_itself_is_flattened_for_the_learner() -> None:
    env = Env()
    mine = config().environment(observation_space=Dict(env.observation_spaces), action_space=Dict(env.action_spaces))
    runner = MultiAgentEnvRunner(config=config(), worker_index=0)
    flattenings = check_agents_connectors(mine)
    layout = layout_of_policy(CrewManifest.of(crew_of(mine, runner.module)).modules["p"])
    builder = AgentsBuilder("e", env.agents)
    builder.recast({"a": Member("p", layout)}, {})
    builder.begin(whole([layout]), "logged", AgentsOrigin.of(RUN, 4, {"p": 4}), 100)
    for t in range(3):
        builder.observe(Turn({"a": seen("a", t)}))
        builder.logged("a", t % 3, -1.0)
        builder.stepped()
        builder.rewards({"a": 1.0})
    builder.observe(Turn({"a": seen("a", 3)}))
    builder.finish("terminated")
    made = MultiAgentEpisodeBuilder(
        env.observation_spaces,
        env.action_spaces,
        runner.module,
        lambda *_: "p",
        connectors=FlattenedAgents(flattenings),
    )  # fmt: skip
    ((built,), refused) = made.build([lease(builder.cut(), 1, "terminated")])
    assert not refused and built.episode is not None
    single = built.episode.agent_episodes["a"]
    rows = single.get_observations()[:-1]
    import torch

    with torch.no_grad():
        out = runner.module["p"].forward_exploration({Columns.OBS: torch.tensor(rows)})
    given = single.get_extra_model_outputs(Columns.ACTION_DIST_INPUTS)
    np.testing.assert_allclose(given, out[Columns.ACTION_DIST_INPUTS].numpy(), atol=1e-6)
    runner.stop()


def spaced(made: PPOConfig) -> PPOConfig:
    env = Env()
    return made.environment(observation_space=Dict(env.observation_spaces), action_space=Dict(env.action_spaces))


def test_what_can_not_be_trained_is_told_with_the_agents_name() -> None:
    unflattened = spaced(config())
    unflattened._env_to_module_connector = None
    with pytest.raises(SpaceError, match=r"agent 'a': RLlib can't train on these observations.*multi_agent=True"):
        check_trainable(unflattened)
    with pytest.raises(SettingsError, match="can't be built for these agents"):
        check_trainable(spaced(config(("a",))))  # RLlib has one space for a policy
    check_trainable(spaced(config()))
