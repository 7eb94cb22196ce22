"""Recurrent policies of several agents: each agent has a memory of its own, and the learner gets what RLlib's gets."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.learner import AddOneTsToEpisodesAndTruncate
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from test_agents_episodes import (
    ACTION,
    MODULE_OF,
    OBSERVATION,
    RUN,
    SPACES,
    Step,
    agents_data,
    assert_same,
    config,
    mapping,
    outputs_of,
    sent,
    trajectory,
    with_columns,
)
from test_agents_episodes import rllibs as whole_episode

from rllink_zmq.client_policy import layout_of_policy
from rllink_zmq.errors import EpisodeError
from rllink_zmq.fragments_agents import AgentsBuilder, AgentsOrigin, Member, Turn, whole
from rllink_zmq.messages import STATE_IN, AgentId
from rllink_zmq.policy import Policy
from rllink_zmq.policy_agents import manifests, unpack_crew
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.multi_agent_episodes import MultiAgentEpisodeBuilder
from rllink_zmq.rllib.multi_agent_policies import crew_of
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.session_runner import Lease

SEQUENCE = 5


def recurrent() -> PPOConfig:
    return config().rl_module(
        model_config={
            "use_lstm": True, "lstm_cell_size": 3, "fcnet_hiddens": [4], "max_seq_len": SEQUENCE,
            "vf_share_layers": False,
        }
    )  # fmt: skip


class Side(NamedTuple):
    module: MultiRLModule
    policies: dict[str, Policy]


@pytest.fixture(scope="module")
def side() -> Side:
    torch.manual_seed(2)
    module = recurrent().get_multi_rl_module_spec(spaces=dict.fromkeys(("p", "q"), (OBSERVATION, ACTION))).build()
    with torch.no_grad():
        for single in module.values():
            for parameter in single.parameters():
                parameter += 0.3 * torch.randn(parameter.shape)
    crew, blobs = unpack_crew(crew_of(recurrent(), module))
    policies = {}
    for one in crew.modules:
        policies[one.id] = Policy.load(blobs[one.policy], seed=0)
        policies[one.id].apply(0, weights_body(manifests(crew, blobs)[one.id], module.get_state(), one.id))
    return Side(module, policies)


def small(turn: Turn) -> Turn:
    """The same, for a network's sake."""
    return turn._replace(observations={a: v / np.float32(100) for a, v in turn.observations.items()})


def made(seed: int, steps: int, style: str) -> tuple[Turn, list[Step]]:
    first, found = trajectory(seed, steps, style)
    for step in found:
        step.turn = small(step.turn)
    return small(first), found


class Remembered(NamedTuple):
    """What the simulator's policy gave for one action: logits and the memory after it."""

    logits: np.ndarray
    state: list[np.ndarray]


def simulated(
    side: Side, first: Turn, steps: Sequence[Step], cuts: Sequence[int]
) -> tuple[list[Lease], dict[AgentId, list[Remembered]]]:
    """The fragments of a simulator that remembers by the exported policies, cut after these env steps; and what it
    remembered, agent by agent."""
    layouts = {name: layout_of_policy(policy.manifest) for name, policy in side.policies.items()}
    builder = AgentsBuilder("e", MODULE_OF)
    builder.recast({agent: Member(module, layouts[module]) for agent, module in MODULE_OF.items()}, {})
    origin = AgentsOrigin.of(RUN, 4, {"p": 4, "q": 4})
    layout = whole(layouts[module] for module in MODULE_OF.values())
    found: dict[AgentId, list[Remembered]] = {}
    leases: list[Lease] = []
    turn = first
    builder.begin(layout, "acted", origin, 1000)
    for t, step in enumerate(steps, 1):
        builder.observe(turn)
        for module, agents in builder.to_act().items():
            acted = side.policies[module].act(np.stack(builder.rows_of(agents)), state=builder.memories(agents))
            for i, agent in enumerate(agents):
                action, logp, _ = step.actions[agent]
                logits, state = acted.action_dist_inputs[i], [array[i] for array in acted.state]
                builder.took(agent, action, logp, logits, state)
                found.setdefault(agent, []).append(Remembered(logits.copy(), [array.copy() for array in state]))
        builder.stepped()
        builder.rewards(step.rewards)
        turn, last = step.turn, t == len(steps)
        if t in cuts or last:
            builder.observe(turn)
            if last:
                builder.finish("terminated")
            leases.append(sent(builder.cut(), len(leases) + 1, "terminated" if last else "no"))
            builder.begin(layout, "acted", origin, 1000)
    return leases, found


def rllibs(
    side: Side, first: Turn, steps: Sequence[Step], remembered: Mapping[AgentId, list[Remembered]]
) -> MultiAgentEpisode:
    """The episode as RLlib's own runner would have it, whose modules remembered the same."""
    memories = {module: Memory(side.module[module]) for module in ("p", "q")}
    taken: dict[AgentId, Iterator[Remembered]] = {agent: iter(each) for agent, each in remembered.items()}

    def outputs(step: Step) -> dict[AgentId, dict[str, Any]]:
        told = outputs_of(step)
        for agent, mine in told.items():
            one = next(taken[agent])
            mine[Columns.ACTION_DIST_INPUTS] = one.logits
            mine[Columns.STATE_OUT] = memories[MODULE_OF[agent]].nested(one.state)
        return told

    (episode,) = whole_episode(first, steps, (), outputs)
    return episode


def ours(side: Side, leases: Sequence[Lease], calls: Sequence[int] = ()) -> list[MultiAgentEpisode]:
    """The chunks of calls that end after these env steps."""
    builder = MultiAgentEpisodeBuilder(*SPACES, side.module, mapping)
    builder.dist_inputs = {"p": 3, "q": 3}
    chunks: list[MultiAgentEpisode] = []
    pending: list[Lease] = []
    for one in leases:
        pending.append(one)
        if one.message.t0 + one.message.steps in calls or one.message.end != "no":
            built, refused = builder.build(pending)
            assert not refused, refused
            chunks += [chunk.episode for chunk in built if chunk.episode is not None]
            pending = []
    return chunks


def sequences(side: Side, episodes: Sequence[MultiAgentEpisode]) -> dict[str, Any]:
    """What a learner trains on: each module's sequences with what they begin with, in the order of their observations:
    the episodes' agents are in no particular one."""
    pipeline = recurrent().build_learner_connector(recurrent().observation_space, recurrent().action_space)
    pipeline.prepend(AddOneTsToEpisodesAndTruncate())
    episodes = [one.from_state(one.get_state()) for one in episodes]
    batch = pipeline(rl_module=side.module, batch={}, episodes=episodes, explore=False, shared_data={})
    found: dict[str, Any] = {}
    for name, columns in batch.items():
        arrays = {c: np.asarray(v) for c, v in columns.items() if c not in (Columns.INFOS, Columns.STATE_IN)}
        for part, value in zip(
            Memory(side.module[name]).names, Memory(side.module[name]).flat(columns[Columns.STATE_IN]), strict=True
        ):
            arrays[f"{Columns.STATE_IN}/{part}"] = np.asarray(value)
        rows = len(arrays[Columns.OBS])
        order = np.lexsort(arrays[Columns.OBS].reshape(rows, -1).T)
        found[name] = {c: v[order] for c, v in arrays.items()}
    return found


@pytest.mark.parametrize("style", ["together", "turns", "ragged"])
@pytest.mark.parametrize("seed", range(2))
def test_a_learner_gets_what_rllibs_runner_gives_it(side: Side, style: str, seed: int) -> None:
    """Wherever fragments are cut, and in the middle of steps that wait for their end, too."""
    first, steps = made(seed, 30, style)
    cuts = sorted(random.Random(seed).sample(range(1, 30), 9))
    leases, remembered = simulated(side, first, steps, cuts)
    theirs = rllibs(side, first, steps, remembered)
    (mine,) = ours(side, leases)
    batch = sequences(side, [mine])
    assert_same(batch, sequences(side, [theirs]))
    starts = [columns[f"{Columns.STATE_IN}/actor/h"] for columns in batch.values()]
    assert max(map(np.ptp, starts)) > 0.01  # sequences don't all begin with zeros
    assert batch["p"][Columns.OBS].shape[1] == SEQUENCE


@pytest.mark.parametrize("style", ["together", "ragged"])
def test_memory_is_the_modules_own_and_goes_on_over_cuts(side: Side, style: str) -> None:
    """Each agent's memory after each step is what the RLModule remembers of its observations, all at once."""
    first, steps = made(5, 24, style)
    leases, remembered = simulated(side, first, steps, (4, 5, 13, 20))
    chunks = ours(side, leases, (5, 20))
    for agent, parts in agents_data(chunks).items():
        module = side.module[MODULE_OF[agent]]
        memory = Memory(module)
        rows = [part["obs"][: len(part["actions"])] for part in parts]
        count = sum(map(len, rows))
        assert count == len(remembered[agent])
        state = [torch.from_numpy(array) for array in memory.starts(1)]
        singles = [chunk.agent_episodes[agent] for chunk in chunks if agent in chunk.agent_episodes]
        for row, single in zip(rows, (one for one in singles if len(one)), strict=True):
            for t, observation in enumerate(row):
                with torch.no_grad():
                    out = module.forward_exploration(memory.batch(torch.tensor(observation[np.newaxis]), state))
                _, state = memory.answer(out)
                told = single.get_extra_model_outputs(Columns.STATE_OUT, t)
                for expected, given in zip(state, memory.flat(told), strict=True):
                    np.testing.assert_allclose(given, expected[0].numpy(), atol=1e-5)


def test_a_fragment_without_its_memory_is_refused_by_name(side: Side) -> None:
    first, steps = made(1, 6, "together")
    (one,), _ = simulated(side, first, steps, ())

    def forget(arrays: dict[str, np.ndarray]) -> None:
        del arrays[f"q/{STATE_IN}actor/c"]

    (refusal,) = MultiAgentEpisodeBuilder(*SPACES, side.module, mapping).build([with_columns(one, forget)])[1]
    assert "agent 'b' (module 'q')" in str(refusal.error)
    assert f"no '{STATE_IN}actor/c'" in str(refusal.error)


def test_an_action_of_the_simulators_own_is_refused_for_a_policy_that_remembers(side: Side) -> None:
    layout = layout_of_policy(side.policies["p"].manifest)
    builder = AgentsBuilder("e", MODULE_OF)
    builder.recast({"a": Member("p", layout)}, {})
    builder.begin(whole([layout]), "logged", AgentsOrigin.of(RUN, 4, {"p": 4}), 10)
    builder.observe(Turn({"a": np.zeros(2, np.float32)}))
    with pytest.raises(EpisodeError, match="agent 'a' acts by the recurrent policy 'p'"):
        builder.check_logged("a", 0, -1.0)
