"""Several agents' episodes in parts, as DQN and SAC want them, in RLlib's own replay buffers: what these hold must be
the uncut episode, agent by agent, wherever fragments and calls are cut."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.connectors.common import AddObservationsFromEpisodesToBatch
from ray.rllib.connectors.learner import AddNextObservationsFromEpisodesToTrainBatch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.utils.replay_buffers.multi_agent_episode_buffer import MultiAgentEpisodeReplayBuffer
from ray.rllib.utils.replay_buffers.multi_agent_prioritized_episode_buffer import (
    MultiAgentPrioritizedEpisodeReplayBuffer,
)
from test_agents_episodes import (
    ACTION,
    MODULE_OF,
    OBSERVATION,
    SPACES,
    agents_data,
    assert_same,
    changed,
    config,
    fragments,
    mapping,
    rllibs,
    trajectory,
)

from rllink_zmq.messages import AgentId
from rllink_zmq.rllib.episodes import cut
from rllink_zmq.rllib.multi_agent_episodes import AgentsBuilt, MultiAgentEpisodeBuilder
from rllink_zmq.session_runner import Lease

STYLES = ("together", "turns", "ragged")
BUFFERS: dict[str, Callable[..., Any]] = {
    "uniform": MultiAgentEpisodeReplayBuffer,
    "prioritized": MultiAgentPrioritizedEpisodeReplayBuffer,
}
CONFIGS: dict[str, type[Any]] = {"DQN": DQNConfig, "SAC": SACConfig}


def config_of(algo: str) -> Any:
    spaces = config()
    return (
        CONFIGS[algo]()
        .environment(observation_space=spaces.observation_space, action_space=spaces.action_space)
        .multi_agent(policies={"p", "q"}, policy_mapping_fn=mapping)
        .rl_module(model_config={"fcnet_hiddens": [4], "head_fcnet_hiddens": []})
    )


@pytest.fixture(scope="module")
def modules() -> dict[str, MultiRLModule]:
    spaces = dict.fromkeys(("p", "q"), (OBSERVATION, ACTION))
    return {algo: config_of(algo).get_multi_rl_module_spec(spaces=spaces).build() for algo in CONFIGS}


def builder_of(module: MultiRLModule) -> MultiAgentEpisodeBuilder:
    made = MultiAgentEpisodeBuilder(*SPACES, module, mapping, needs_logp=False)
    made.dist_inputs = {"p": 3, "q": 3}
    return made


def answers(builder: MultiAgentEpisodeBuilder, leases: Sequence[Lease], share: int) -> Iterator[list[AgentsBuilt]]:
    """What calls of `share` env steps would return: the chunks of each; of the last one what is left."""
    good, refused = builder.check(leases)
    assert not refused, refused
    stock = [(piece, 0) for piece in good]
    while stock:
        missing, pieces = share, []
        while missing and stock:
            piece, first = stock.pop(0)
            count = min(missing, piece.message.steps - first)
            pieces += cut([piece], first, count)
            missing -= count
            if first + count < piece.message.steps:
                stock.insert(0, (piece, first + count))
        yield builder.join(pieces)


def episodes_of(built: Sequence[AgentsBuilt]) -> list[MultiAgentEpisode]:
    assert all(chunk.episode is not None for chunk in built), "env steps that nobody completed are handed over, too"
    return [chunk.episode for chunk in built if chunk.episode is not None]


def told(data: Mapping[AgentId, Any], names: Sequence[str] = ()) -> dict[AgentId, Any]:
    """`agents_data` of these columns, and of those that every episode has."""
    always = ("module", "terminated", "obs", "actions", "rewards", *names)
    return {agent: [{name: chunk[name] for name in always} for chunk in chunks] for agent, chunks in data.items()}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("share", "seed"), [(1, 0), (3, 1), (13, 2)])
@pytest.mark.parametrize(("algo", "kind"), [("DQN", "prioritized"), ("SAC", "uniform")])
def test_what_a_buffer_holds_is_the_uncut_episode(
    modules: dict[str, MultiRLModule], algo: str, kind: str, share: int, style: str, seed: int
) -> None:
    steps = 40
    first, made = trajectory(seed, steps, style)
    cuts = random.Random(seed).sample(range(1, steps), 8)
    buffer = BUFFERS[kind](capacity=10_000)
    builder = builder_of(modules[algo])
    sizes = []
    for built in answers(builder, list(fragments(first, made, cuts)), share):
        sizes.append(sum(map(len, episodes_of(built))))
        buffer.add(episodes_of(built))
    assert set(sizes[:-1]) <= {share} and sum(sizes) == steps == buffer.get_num_timesteps()
    (theirs,) = rllibs(first, made, ())
    (held,) = buffer.episodes
    columns = ("weights_seq_no",) if algo == "DQN" else ("weights_seq_no", "action_logp", "action_dist_inputs")
    assert_same(told(agents_data([held]), columns), told(agents_data([theirs]), columns))
    of_algo = {name for single in held.agent_episodes.values() for name in single.extra_model_outputs}
    assert of_algo == set(columns), "as RLlib's own runner has them"
    assert (held.env_t_started, held.env_t, held.is_terminated) == (0, steps, True)
    (uncut,) = episodes_of(builder_of(modules[algo]).build(list(fragments(first, made, cuts)))[0])
    assert_same({a: held.env_t_to_agent_t[a].data for a in held.agent_ids},
                {a: uncut.env_t_to_agent_t[a].data for a in theirs.agent_ids})  # fmt: skip
    rows = Counter[str]()
    for agent, single in theirs.agent_episodes.items():
        rows[MODULE_OF[agent]] += len(single)
    assert {name: buffer.get_num_timesteps(name) for name in rows} == rows
    indices = [index[:3] for each in buffer._module_to_indices.values() for index in each]
    assert len(indices) == len(set(indices)) == sum(rows.values())
    assert built[-1].finished is not None
    assert built[-1].finished.total == pytest.approx(theirs.get_return())
    assert {agent: n for agent, (_, n, _) in built[-1].finished.agents.items()} == {
        agent: len(single) for agent, single in theirs.agent_episodes.items()
    }


def transitions(first: Any, made: Sequence[Any]) -> dict[AgentId, list[tuple[Any, ...]]]:
    """Of each agent in the uncut episode: observation, action, reward, next observation, whether it ended with it."""
    (theirs,) = rllibs(first, made, ())
    found: dict[AgentId, list[tuple[Any, ...]]] = {}
    for agent, single in theirs.agent_episodes.items():
        obs = np.asarray(single.get_observations())
        acted, rewards = np.asarray(single.get_actions()), np.asarray(single.get_rewards())
        found[agent] = [
            (tuple(obs[i]), int(acted[i]), float(rewards[i]), tuple(obs[i + 1]),
             single.is_terminated and i == len(single) - 1)
            for i in range(len(single))
        ]  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("algo", "kind", "style"),
    [("DQN", "prioritized", "ragged"), ("DQN", "uniform", "turns"), ("SAC", "uniform", "together")],
)
def test_learner_draws_steps_of_the_trajectory(
    modules: dict[str, MultiRLModule], algo: str, kind: str, style: str
) -> None:
    """RLlib's sampling, with a gap in an episode and one that is let go; then its pipeline of the learner."""
    buffer = BUFFERS[kind](capacity=70, seed=3)
    builder = builder_of(modules[algo])
    known = set()
    for number in range(4):
        first, made = trajectory(number, 30, style)
        leases = list(fragments(first, made, (4, 9, 10, 21)))
        if number % 2:
            del leases[1]  # dropped on the way
        leases = [changed(one, session=bytes([number] * 16)) for one in leases]
        for built in answers(builder, leases, 2):
            buffer.add(episodes_of(built))
        known |= {(agent, *one) for agent, some in transitions(first, made).items() for one in some}
    assert buffer.get_num_episodes_evicted() and any("@9" in one.id_ for one in buffer.episodes)
    drawn = buffer.sample(num_items=100, n_step=1, gamma=0.99, beta=0.4, sample_episodes=True)
    for one in drawn:
        (obs, after), (action,), (reward,) = one.get_observations(), one.get_actions(), one.get_rewards()
        found = (one.agent_id, tuple(obs), int(action), pytest.approx(float(reward)), tuple(after), one.is_terminated)
        assert any(found == each for each in known if each[1] == found[1]), found
        assert one.module_id == MODULE_OF[one.agent_id]
    batch = learner_batch(algo, modules[algo], drawn)
    assert batch.keys() == {"p", "q"}
    for columns in batch.values():
        assert len(columns[Columns.OBS]) == len(columns[Columns.NEXT_OBS]) == len(columns[Columns.ACTIONS]) == 100
        assert {Columns.REWARDS, Columns.TERMINATEDS, Columns.TRUNCATEDS, "weights", "n_step"} <= columns.keys()


def learner_batch(algo: str, module: MultiRLModule, episodes: Sequence[Any]) -> dict[str, Any]:
    pipeline = config_of(algo).build_learner_connector(config().observation_space, config().action_space)
    pipeline.insert_after(AddObservationsFromEpisodesToBatch, AddNextObservationsFromEpisodesToTrainBatch())
    made: dict[str, Any] = pipeline(
        rl_module=module, batch={}, episodes=list(episodes), explore=False, shared_data={}
    )  # fmt: skip
    return made


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("style", STYLES)
def test_an_episode_that_is_let_go_while_it_goes_on(modules: dict[str, MultiRLModule], kind: str, style: str) -> None:
    """Two long ones do not fit: the buffer lets the older go, and gets its rest."""
    buffer = BUFFERS[kind](capacity=60)
    builder = builder_of(modules["DQN"])
    flows = []
    for number in range(2):
        first, made = trajectory(number, 60, style)
        leases = [changed(one, session=bytes([number] * 16)) for one in fragments(first, made, range(5, 60, 5))]
        flows.append(answers(builder, leases, 3))
    for both in zip(*flows, strict=True):
        for built in both:
            buffer.add(episodes_of(built))
            # RLlib raises for a module of which nothing is there.
            held = [module for module in buffer.get_module_ids() if buffer._module_to_indices[module]]
            for _ in range(3 if held else 0):
                buffer.sample(num_items=4, n_step=1, beta=0.4, modules_to_sample=held)
                for module in held if kind == "prioritized" else ():
                    buffer.update_priorities(np.ones(4), module)
    assert buffer.get_num_episodes_evicted() >= 2


@pytest.mark.parametrize("kind", BUFFERS)
@pytest.mark.parametrize("style", STYLES)
def test_after_an_answer_that_may_be_lost_no_episode_goes_on_under_its_id(
    modules: dict[str, MultiRLModule], kind: str, style: str
) -> None:
    buffer, builder = BUFFERS[kind](capacity=1000), builder_of(modules["DQN"])
    first, made = trajectory(5, 30, style)
    for number, built in enumerate(answers(builder, list(fragments(first, made, (9,))), 5)):
        if number == 2:
            builder.forget()  # this one is
        else:
            buffer.add(episodes_of(built))
        if number == 3:
            assert episodes_of(built)[0].id_.endswith("@15")
    assert buffer.get_num_timesteps() == 25
    buffer.sample(num_items=50, n_step=1, beta=0.4)


def test_what_was_taken_before_its_policy_was_removed_is_handed_over() -> None:
    """A runner keeps parts for calls to come, and policies may be removed meanwhile."""
    spaces = dict.fromkeys(("p", "q"), (OBSERVATION, ACTION))
    module = config_of("DQN").get_multi_rl_module_spec(spaces=spaces).build()
    builder = builder_of(module)
    before, after = fragments(*trajectory(1, 20, "together"), (8,))
    kept, _ = builder.check([before])
    module.remove_module("q")
    (built,) = builder.join(cut(kept, 3, 5))
    assert built.episode is not None and built.episode.agent_ids == set(MODULE_OF)
    _, ((_, error),) = builder.check([after])
    assert "there is no policy 'q' of agent" in str(error)


@pytest.mark.parametrize("kind", BUFFERS)
def test_an_agent_that_goes_on_from_elsewhere_has_another_episode(modules: dict[str, MultiRLModule], kind: str) -> None:
    """RLlib's buffers would stop the training where an agent's observations of two chunks don't meet."""
    buffer, builder = BUFFERS[kind](capacity=1000), builder_of(modules["DQN"])
    whole = list(fragments(*trajectory(1, 20, "together"), (8,)))
    other = list(fragments(*trajectory(2, 20, "together"), (8,)))
    names = []
    for one in (whole[0], other[1]):
        built, refused = builder.build([one])
        assert not refused
        names += [episode.id_.partition("@")[2] for episode in episodes_of(built)]
        buffer.add(episodes_of(built))
    assert names == ["", "8"]
    built, _ = builder_of(modules["DQN"]).build([whole[0], other[1]])
    assert [episode.id_.partition("@")[2] for episode in episodes_of(built)] == ["", "8"], "in one answer, too"


def test_a_name_that_is_used_again_is_another_episode(modules: dict[str, MultiRLModule]) -> None:
    """The buffer still holds the one that has ended."""
    builder, buffer = builder_of(modules["DQN"]), MultiAgentEpisodeReplayBuffer(capacity=1000)
    for number in (1, 2):
        (one,) = fragments(*trajectory(number, 10, "together"), ())
        built, _ = builder.build([changed(one, number=number)])
        buffer.add(episodes_of(built))
    assert buffer.get_num_timesteps() == 20 and buffer.get_num_episodes() == 2
