"""Several agents' episodes through fragments, against RLlib's own `MultiAgentEpisode` of the same trajectory: what a
learner gets must be the same, column by column, wherever fragments and calls are cut."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import msgspec
import numpy as np
import pytest
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
from ray.rllib.connectors.learner import AddOneTsToEpisodesAndTruncate
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.utils.metrics import WEIGHTS_SEQ_NO

from rllink_zmq.arrays import from_body, to_buffers
from rllink_zmq.errors import PolicyError, ProtocolError, SettingsError
from rllink_zmq.fragments import Cut, Layout, Row
from rllink_zmq.fragments_agents import ALL, AgentsBuilder, AgentsOrigin, Member, Turn, whole
from rllink_zmq.messages import FRAGMENT, MAX_AGENTS_STEPS, AgentId, AgentRows
from rllink_zmq.policy_agents import NOBODY, unpack_crew
from rllink_zmq.rllib import multi_agent_policies
from rllink_zmq.rllib.export import export_policy
from rllink_zmq.rllib.multi_agent_episodes import MultiAgentEpisodeBuilder
from rllink_zmq.rllib.multi_agent_policies import EPISODES, ask_mapping, crew_of
from rllink_zmq.session_runner import Lease
from rllink_zmq.wire import pack, unpack

MODULE_OF: dict[AgentId, str] = {"a": "p", "b": "q", "c": "p", 7: "q"}
OBSERVATION = gym.spaces.Box(-1e6, 1e6, (2,), np.float32)
ACTION = gym.spaces.Discrete(3)
SPACES = (dict.fromkeys(MODULE_OF, OBSERVATION), dict.fromkeys(MODULE_OF, ACTION))
LAYOUT = Layout(Row((2,), np.dtype(np.float32)), Row((), np.dtype(np.int64)), (), 3)
CAST = {agent: Member(module, LAYOUT) for agent, module in MODULE_OF.items()}
RUN = "000000000001-aaaaaaaa"


def mapping(agent: AgentId, episode: Any = None, **_: Any) -> str:
    return MODULE_OF[agent]


def config() -> PPOConfig:
    return (
        PPOConfig()
        .environment(
            observation_space=gym.spaces.Dict(SPACES[0]),  # type: ignore[arg-type]
            action_space=gym.spaces.Dict(SPACES[1]),  # type: ignore[arg-type]
        )
        .multi_agent(policies={"p", "q"}, policy_mapping_fn=mapping)
        .rl_module(model_config={"fcnet_hiddens": [4]})
    )


@pytest.fixture(scope="module")
def module() -> MultiRLModule:
    spaces = dict.fromkeys(("p", "q"), (OBSERVATION, ACTION))
    made: MultiRLModule = config().get_multi_rl_module_spec(spaces=spaces).build()
    return made


class Step:
    """One env step: who acts with what, and what came of it."""

    def __init__(self) -> None:
        self.actions: dict[AgentId, tuple[int, float, np.ndarray]] = {}
        self.rewards: dict[AgentId, float] = {}
        self.turn = Turn({}, {}, {})


def trajectory(seed: int, steps: int, style: str) -> tuple[Turn, list[Step]]:
    """Made-up env steps. `together`: all act in each step; `turns`: one after the other; `ragged`: agents come, go,
    skip steps, and are rewarded while they wait."""
    rng = random.Random(seed)
    agents = list(MODULE_OF)

    def observed(names: Sequence[AgentId], t: int) -> dict[AgentId, np.ndarray]:
        return {a: np.array([t, 100 * agents.index(a) + rng.random()], np.float32) for a in names}

    alive = agents[:2] if style == "ragged" else list(agents)
    first = Turn(observed(alive[:1] if style == "turns" else alive, 0))
    acting = list(first.observations)
    ended: set[AgentId] = set()
    waiting: set[AgentId] = set()
    made = []
    for t in range(1, steps + 1):
        step = Step()
        for agent in acting:
            logits = np.array([rng.random() for _ in range(3)], np.float32)
            step.actions[agent] = (rng.randrange(3), -rng.random(), logits)
        waiting |= set(acting)
        last = t == steps
        terminateds: dict[AgentId, bool] = {ALL: last}  # type: ignore[dict-item]
        if style == "turns":
            coming = [agents[t % len(agents)]]
            step.rewards = {a: rng.random() for a in waiting}
        elif style == "together":
            coming = list(alive)
            step.rewards = {a: rng.random() for a in coming}
        else:
            new = [a for a in agents if a not in alive and a not in ended and rng.random() < 0.2]
            alive += new
            coming = [a for a in alive if a in new or (a in waiting and rng.random() < 0.5)]
            step.rewards = {a: rng.random() for a in waiting}
            for agent in list(alive):
                if not last and agent in waiting and rng.random() < 0.05 and len(alive) > 1:
                    terminateds[agent] = True
                    alive.remove(agent)
                    ended.add(agent)
                    waiting.discard(agent)
                    if rng.random() < 0.5 and agent in coming:
                        coming.remove(agent)
        if last and style != "turns":
            coming = [a for a in coming if a in waiting]
        step.turn = Turn(observed(coming, t), terminateds)
        waiting -= set(coming)
        acting = [a for a in coming if not terminateds.get(a)]
        made.append(step)
    return first, made


def outputs_of(step: Step) -> dict[AgentId, dict[str, Any]]:
    """What modules gave for the actions of a step."""
    return {
        a: {Columns.ACTION_LOGP: np.float32(logp), Columns.ACTION_DIST_INPUTS: logits, WEIGHTS_SEQ_NO: 4}
        for a, (_, logp, logits) in step.actions.items()
    }


def rllibs(
    first: Turn,
    steps: Sequence[Step],
    calls: Sequence[int],
    outputs: Callable[[Step], dict[AgentId, dict[str, Any]]] = outputs_of,
) -> list[MultiAgentEpisode]:
    """The chunks that RLlib's own runner would return, cut after these env steps."""
    episode = MultiAgentEpisode(
        id_="e", observation_space=SPACES[0], action_space=SPACES[1], agent_to_module_mapping_fn=mapping
    )
    episode.add_env_reset(observations=dict(first.observations))
    chunks = []
    for t, step in enumerate(steps, 1):
        for agent in step.turn.observations:  # RLlib wants a reward with each action that is answered at once
            if agent in step.actions:
                step.rewards.setdefault(agent, 0.0)
        episode.add_env_step(
            observations=dict(step.turn.observations),
            actions={a: action for a, (action, _, _) in step.actions.items()},
            rewards=dict(step.rewards),
            terminateds=dict(step.turn.terminateds),
            truncateds=dict(step.turn.truncateds),
            extra_model_outputs=outputs(step),
        )
        if t in calls or episode.is_done:
            following = None if episode.is_done else episode.cut()
            for agent, single in list(episode.agent_episodes.items()):
                if not single:
                    del episode.agent_episodes[agent]
            chunks.append(episode.to_numpy())
            if following is not None:
                episode = following
    return chunks


def fragments(first: Turn, steps: Sequence[Step], cuts: Sequence[int]) -> Iterator[Lease]:
    """What a simulator sends, cut after these env steps."""
    builder = AgentsBuilder("e", MODULE_OF)
    builder.recast(CAST, {})
    origin = AgentsOrigin.of(RUN, 4, {"p": 4, "q": 4})
    layout = whole(member.layout for member in CAST.values())
    number = 0
    turn = first
    builder.begin(layout, "acted", origin, 1000)
    for t, step in enumerate(steps, 1):
        builder.observe(turn)
        for agents in builder.to_act().values():
            for agent in agents:
                builder.took(agent, *step.actions[agent])
        builder.stepped()
        builder.rewards(step.rewards)
        turn = step.turn
        last = t == len(steps)
        if t in cuts or last:
            builder.observe(turn)
            if last:
                builder.finish("terminated")
            number += 1
            yield lease(builder.cut(), number, "terminated" if last else "no")
            builder.begin(layout, "acted", origin, 1000)


def lease(cut: Cut, number: int, end: str) -> Lease:
    columns, body = to_buffers(cut.arrays)
    message = FRAGMENT(
        bytes(16), number, 1, "e", cut.t0, cut.steps, end, RUN, 4, cut.return_so_far, columns,  # type: ignore[arg-type]
        modules=cut.modules or {}, agents=cut.agents,
    )  # fmt: skip
    return Lease(message, [bytes(b) for b in body])


def sent(cut: Cut, number: int, end: str) -> Lease:
    """The same, over the wire."""
    one = lease(cut, number, end)
    message, body = unpack(pack(one.message, one.body))
    return Lease(message, body)  # type: ignore[arg-type]


def ours(module: MultiRLModule, leases: Sequence[Lease], calls: Sequence[int]) -> list[MultiAgentEpisode]:
    """The chunks of calls that end after these env steps (where a fragment ends)."""
    builder = MultiAgentEpisodeBuilder(*SPACES, module, mapping)
    builder.dist_inputs = {"p": 3, "q": 3}
    chunks: list[MultiAgentEpisode] = []
    pending: list[Lease] = []
    for one in leases:
        pending.append(one)
        done = one.message.t0 + one.message.steps
        if done in calls or one.message.end != "no":
            built, refused = builder.build(pending)
            assert not refused, refused
            chunks += [chunk.episode for chunk in built if chunk.episode is not None]
            pending = []
    return chunks


def agents_data(chunks: Sequence[MultiAgentEpisode]) -> dict[AgentId, list[dict[str, Any]]]:
    """Of each agent what each chunk has of it."""
    found: dict[AgentId, list[dict[str, Any]]] = {}
    for chunk in chunks:
        for agent, single in chunk.agent_episodes.items():
            if not len(single):
                continue
            found.setdefault(agent, []).append(
                {
                    "module": single.module_id,
                    "t_started": single.t_started,
                    "terminated": single.is_terminated,
                    "obs": single.get_observations(slice(0, None)),
                    "actions": single.get_actions(slice(0, None)),
                    "rewards": single.get_rewards(slice(0, None)),
                    **{
                        name: single.get_extra_model_outputs(name, slice(0, None))
                        for name in single.extra_model_outputs
                    },
                }
            )
    return found


def assert_same(left: Any, right: Any, where: str = "") -> None:
    if isinstance(left, Mapping):
        assert left.keys() == right.keys(), (where, left.keys(), right.keys())
        for key in left:
            assert_same(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), (where, len(left), len(right))
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{where}[{i}]")
    elif isinstance(left, str):
        assert left == right, where
    else:
        np.testing.assert_allclose(np.asarray(left), np.asarray(right), rtol=1e-6, err_msg=where)


@pytest.mark.parametrize("style", ["together", "turns", "ragged"])
@pytest.mark.parametrize("seed", range(6))
def test_a_whole_episode_is_the_same_wherever_it_was_cut(module: MultiRLModule, style: str, seed: int) -> None:
    steps = 40
    first, made = trajectory(seed, steps, style)
    (theirs,) = rllibs(first, made, ())
    cuts = random.Random(seed).sample(range(1, steps), 12)
    for some in ((), cuts, range(1, steps)):
        (mine,) = ours(module, list(fragments(first, made, some)), ())
        assert_same(agents_data([mine]), agents_data([theirs]))
        assert (mine.env_t, mine.env_t_started, mine.is_terminated) == (theirs.env_t, 0, True)
        for agent in mine.agent_ids:
            theirs_of, mine_of = theirs.env_t_to_agent_t[agent].data, mine.env_t_to_agent_t[agent].data
            assert len(mine_of) == steps + 1
            # RLlib counts the env step twice in which an agent is terminated without an observation.
            assert mine_of == theirs_of or len(theirs_of) == steps + 2
        assert mine.get_return() == pytest.approx(theirs.get_return())


@pytest.mark.parametrize("style", ["together", "turns", "ragged"])
@pytest.mark.parametrize("seed", range(3))
def test_learner_gets_the_same_where_calls_are_cut(module: MultiRLModule, style: str, seed: int) -> None:
    """No step is lost or there twice, wherever calls end; and RLlib's learner pipeline takes each call's chunks."""
    steps = 40
    first, made = trajectory(seed, steps, style)
    calls = sorted(random.Random(seed).sample(range(1, steps), 4))
    mine = ours(module, list(fragments(first, made, calls)), calls)
    (whole_episode,) = rllibs(first, made, ())
    for agent, chunks in agents_data(mine).items():
        (one,) = agents_data([whole_episode])[agent]
        joined = {
            name: np.concatenate([c[name][: -1 if name == "obs" and c is not chunks[-1] else None] for c in chunks])
            for name in one
            if isinstance(one[name], np.ndarray)
        }
        assert_same(joined, {name: one[name] for name in joined}, f"{agent}")
        starts = [chunk["t_started"] for chunk in chunks]
        assert starts == list(np.cumsum([0, *(len(chunk["actions"]) for chunk in chunks[:-1])]))
    for chunk in mine:
        batch = learner_batch(module, [chunk])
        for name in batch:
            rows = sum(len(s) + 1 for s in chunk.agent_episodes.values() if s.module_id == name)
            assert len(batch[name][Columns.OBS]) == rows


@pytest.mark.parametrize("style", ["together", "turns", "ragged"])
@pytest.mark.parametrize("seed", range(3))
def test_learner_batch_of_a_whole_episode_is_rllibs(module: MultiRLModule, style: str, seed: int) -> None:
    first, made = trajectory(seed, 30, style)
    (theirs,) = rllibs(first, made, ())
    (mine,) = ours(module, list(fragments(first, made, (3, 4, 11, 20))), ())
    assert_same(learner_batch(module, [mine]), learner_batch(module, [theirs]))


def learner_batch(module: MultiRLModule, episodes: Sequence[MultiAgentEpisode]) -> dict[str, Any]:
    """Each module's columns, its rows in the order of agents: a set has none of its own."""
    spaces = config().observation_space, config().action_space
    pipeline = config().build_learner_connector(*spaces)
    pipeline.prepend(AddOneTsToEpisodesAndTruncate())
    episodes = [one.from_state(one.get_state()) for one in episodes]
    batch = pipeline(rl_module=module, batch={}, episodes=episodes, explore=False, shared_data={})
    found: dict[str, Any] = {}
    for name, columns in batch.items():
        arrays = {c: np.asarray(v) for c, v in columns.items() if c not in (Columns.INFOS,)}
        order = np.lexsort(arrays[Columns.OBS].T)
        found[name] = {c: v[order] for c, v in arrays.items()}
    return found


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_agents_that_act_together_are_rllibs(module: MultiRLModule, seed: int) -> None:
    """Where steps hang over a cut RLlib's own runner loses some of them, or raises; where none do, it is compared."""
    first, made = trajectory(seed, 40, "together")
    calls = sorted(random.Random(seed).sample(range(1, 40), 4))
    theirs = rllibs(first, made, calls)
    mine = ours(module, list(fragments(first, made, calls)), calls)
    assert_same(agents_data(mine), agents_data(theirs))
    for one, other in zip(mine, theirs, strict=True):
        assert (one.env_t_started, one.env_t) == (other.env_t_started, other.env_t)
        assert_same(learner_batch(module, [one]), learner_batch(module, [other]))


@pytest.mark.parametrize("style", ["together", "turns", "ragged"])
@pytest.mark.parametrize("seed", range(3))
def test_an_episodes_return_is_whole_wherever_calls_are_cut(module: MultiRLModule, style: str, seed: int) -> None:
    """Also what an agent is given for a step that hangs over a cut: it is counted once, with the step."""
    first, made = trajectory(seed, 40, style)
    (theirs,) = rllibs(first, made, ())
    builder = MultiAgentEpisodeBuilder(*SPACES, module, mapping)
    builder.dist_inputs = {"p": 3, "q": 3}
    for one in fragments(first, made, sorted(random.Random(seed).sample(range(1, 40), 4))):
        ((*_, built), _) = builder.build([one])
    assert built.finished is not None and built.finished.length == 40
    assert built.finished.total == pytest.approx(theirs.get_return())
    assert sum(total for _, _, total in built.finished.agents.values()) == pytest.approx(theirs.get_return())


# ---- what doesn't fit


def changed(one: Lease, **changes: Any) -> Lease:
    return Lease(msgspec.structs.replace(one.message, **changes), one.body)


def renamed(one: Lease) -> tuple[AgentRows, ...]:
    rows = one.message.agents
    return (msgspec.structs.replace(rows[0], agent="x"), *rows[1:])


def with_columns(one: Lease, change: Callable[[dict[str, np.ndarray]], None]) -> Lease:
    arrays = {name: array.copy() for name, array in from_body(one.message.columns, one.body).items()}
    change(arrays)
    columns, body = to_buffers(arrays)
    return Lease(msgspec.structs.replace(one.message, columns=columns), [bytes(b) for b in body])


def nan(arrays: dict[str, np.ndarray]) -> None:
    arrays["q/rewards"][0] = np.nan


def no_logp(arrays: dict[str, np.ndarray]) -> None:
    del arrays["p/action_logp"]


def backwards(arrays: dict[str, np.ndarray]) -> None:
    arrays["p/t"][:2] = 1, 0


def too_early(arrays: dict[str, np.ndarray]) -> None:
    arrays["p/t"][0] = -1_000_000


def complete_before(arrays: dict[str, np.ndarray]) -> None:
    arrays["p/t"][:2] = -1, 0


def removed(one: Lease) -> Lease:
    first, *rest = one.message.agents
    return changed(
        one, agents=(msgspec.structs.replace(first, module="gone"), *rest), modules={"gone": 4, "p": 4, "q": 4}
    )


def overflowing(arrays: dict[str, np.ndarray]) -> None:
    times = arrays["p/t"].astype(np.int64)
    times[1:3] = 2**63 - 1, -(2**63)
    arrays["p/t"] = times


def of_integers(arrays: dict[str, np.ndarray]) -> None:
    arrays["p/obs"] = arrays["p/obs"].astype(np.int64)


def shorter(arrays: dict[str, np.ndarray]) -> None:
    arrays["q/actions"] = arrays["q/actions"][:-1]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda one: changed(one, modules={"p": 4, "gone": 4}), "there is no policy 'gone' in this training"),
        (
            lambda one: changed(one, modules={}, agents=()),
            "the training has several agents, and this fragment is of one",
        ),
        (lambda one: changed(one, agents=renamed(one)), "there is no agent 'x' in this training"),
        (lambda one: with_columns(one, overflowing), "agent 'a': 'p/t' must be one rising integer"),
        (lambda one: with_columns(one, of_integers), "agent 'a' .module 'p'.: 'obs' is of int64, the space of float32"),
        (lambda one: with_columns(one, nan), "agent 'b' .module 'q'.: 'rewards' must be one finite number a step"),
        (lambda one: with_columns(one, no_logp), "agent 'a' .module 'p'.: .*a fragment needs 'action_logp'"),
        (lambda one: with_columns(one, backwards), "agent 'a': 'p/t' must be one rising integer"),
        (lambda one: with_columns(one, too_early), "agent 'a': 'p/t' begins before the episode does"),
        (lambda one: with_columns(one, complete_before), "agent 'a': a step was complete before this fragment"),
        (removed, "there is no policy 'gone' of agent 'a' in this training"),
        (lambda one: with_columns(one, shorter), "agent .* .module 'q'.: .*'actions'"),
    ],
    ids=[
        "module",
        "single",
        "agent",
        "overflow",
        "integers",
        "nan",
        "missing",
        "times",
        "too early",
        "complete before",
        "removed",
        "length",
    ],
)
def test_a_fragment_that_does_not_fit_is_refused_by_name_and_nothing_else_is(
    module: MultiRLModule, spoil: Callable[[Lease], Lease], why: str
) -> None:
    first, made = trajectory(1, 6, "together")
    before, one, after = fragments(first, made, (2, 4))
    bad = spoil(one)
    builder = MultiAgentEpisodeBuilder(*SPACES, module, mapping)
    built, refused = builder.build([before, bad, after])
    assert [message.number for message, _ in refused] == [2]
    assert re.search(why, str(refused[0].error)), refused[0].error
    chunks = [chunk.episode for chunk in built]
    assert [len(chunk) for chunk in chunks if chunk is not None] == [2, 2]
    assert chunks[1] is not None and chunks[1].id_.endswith("@4"), "the rest after a gap has another id"


# ---- the mapping


def asked(function: Callable[..., Any]) -> Any:
    config_ = config().multi_agent(policies={"p", "q"}, policy_mapping_fn=function)
    return ask_mapping(config_, ["a", "b"], ["p", "q"])


def test_draws_are_what_the_mapping_answers() -> None:
    draws, failures = asked(lambda agent, episode, **_: "p" if agent == "a" else "q")
    assert ([(d.weight, d.modules) for d in draws], failures) == ([(EPISODES, (0, 1))], {})
    sides, failures = asked(lambda agent, episode, **_: "pq"[(hash(episode.id_) + (agent == "a")) % 2])
    assert {d.modules for d in sides} == {(0, 1), (1, 0)} and not failures, "self-play, with random sides"
    assert sum(d.weight for d in sides) == EPISODES


def test_an_agent_that_the_mapping_fails_for_is_left_out_with_its_reason() -> None:
    draws, failures = asked(lambda agent, episode, **_: {"a": "p"}[agent])
    assert [d.modules for d in draws] == [(0, NOBODY)]
    assert failures == {"b": "policy_mapping_fn('b', episode) raises KeyError: 'b'"}
    _, failures = asked(lambda agent, episode, **_: "p" if agent == "a" else "r")
    assert failures == {"b": "policy_mapping_fn('b', episode) answers 'r', which is none of the policies: p, q"}
    with pytest.raises(SettingsError, match="no agent is mapped to a policy: policy_mapping_fn"):
        asked(lambda agent, episode, **_: None)


def test_a_policy_that_can_not_be_exported_is_named(module: MultiRLModule) -> None:
    strange = config().environment(
        observation_space=gym.spaces.Dict(SPACES[0]),  # type: ignore[arg-type]
        action_space=gym.spaces.Dict(dict.fromkeys(MODULE_OF, gym.spaces.MultiBinary(2))),  # type: ignore[arg-type]
    )
    with pytest.raises(PolicyError, match="the policy 'p': "):
        crew_of(strange, module)


class Mine(DefaultPPOTorchRLModule):
    """A class of the user's may make anything of its settings."""


def test_a_crew_has_each_architecture_once(module: MultiRLModule, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is exported once, as long as the class is RLlib's."""
    frozen = config().multi_agent(policies={"p", "q"}, policy_mapping_fn=mapping, policies_to_train=["q"])
    exports: list[str] = []

    def counted(module: Any, *args: Any, **kwargs: Any) -> bytes:
        exports.append(type(module).__name__)
        return export_policy(module, *args, **kwargs)

    monkeypatch.setattr(multi_agent_policies, "export_policy", counted)
    exported: dict[bytes, bytes] = {}
    crew, policies = unpack_crew(crew_of(frozen, module, exported))
    assert exports == ["DefaultPPOTorchRLModule"]
    wide = config().rl_module(model_config={"fcnet_hiddens": [5]})
    spaces = dict.fromkeys(("p", "q"), (OBSERVATION, ACTION))
    for changed, count, last in (
        (wide.get_multi_rl_module_spec(spaces=spaces), 2, "DefaultPPOTorchRLModule"),
        (config().rl_module(rl_module_spec=RLModuleSpec(Mine)).get_multi_rl_module_spec(spaces=spaces), 4, "Mine"),
    ):
        crew_of(frozen, changed.build(), exported)
        assert (len(exports), exports[-1]) == (count, last), "another width, and a class that isn't RLlib's"
    assert crew.agents == (7, "a", "b", "c") or set(crew.agents) == set(MODULE_OF)
    assert len(policies) == 1 and [(m.id, m.policy, m.trained) for m in crew.modules] == [
        ("p", 0, False),
        ("q", 0, True),
    ]
    assert crew.needed(["a", "c"]) == ["p"] and crew.needed([7, "a"]) == ["p", "q"]


def test_an_agent_whose_spaces_are_not_its_modules_is_refused(module: MultiRLModule) -> None:
    first, made = trajectory(0, 4, "together")
    (one,) = fragments(first, made, ())
    builder = MultiAgentEpisodeBuilder({**SPACES[0], "a": gym.spaces.Box(-1, 1, (5,))}, SPACES[1], module, mapping)
    ((refusal),) = builder.build([one])[1]
    assert "the policy 'p' takes other observations than agent 'a' has" in str(refusal.error)


def test_a_fragment_of_very_many_env_steps_is_refused() -> None:
    first, made = trajectory(0, 4, "turns")
    (one,) = fragments(first, made, ())
    empty = msgspec.structs.replace(one.message, steps=MAX_AGENTS_STEPS + 1, agents=(), columns=())
    with pytest.raises(ProtocolError, match=f"at most {MAX_AGENTS_STEPS} env steps, this one {MAX_AGENTS_STEPS + 1}"):
        unpack(pack(empty, []))
