"""Simulators of several agents on real sockets, with a learner's side that is not RLlib."""

from __future__ import annotations

import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from fake_training import ACTIONS, OBSERVATIONS, Restartable, Training, broker, training, until
from test_policy import BODY, B, W, discrete_blob

from broker.server import Server
from rllink_zmq.client import connect
from rllink_zmq.client_agents import AgentsClient, connect_agents
from rllink_zmq.errors import EpisodeError, PolicyError, RefusedError, RemovedError, SpaceError
from rllink_zmq.fragments_agents import ALL
from rllink_zmq.messages import AgentId
from rllink_zmq.policy_agents import NOBODY, Crew, CrewModule, Draw, pack_crew
from rllink_zmq.spaces import agents_to_wire

AGENTS: tuple[AgentId, ...] = (0, "left", "lost", "right")
"""`lost` is mapped to no module."""
MODULES = ("frozen", "learner", "other")
DRAWS = (Draw(3, (2, 0, NOBODY, 1)), Draw(1, (2, 1, NOBODY, 1)))
NUMBERS = itertools.count(1)
STRONG = (100 * W).tobytes() + B.tobytes()
"""Weights by which an action is all but certain."""


def spaces(agents: Sequence[AgentId] = AGENTS) -> tuple[dict[AgentId, Any], dict[AgentId, Any]]:
    return dict.fromkeys(agents, OBSERVATIONS), dict.fromkeys(agents, ACTIONS)


def crew(draws: Sequence[Draw] = DRAWS[:1], modules: Sequence[str] = MODULES) -> bytes:
    made = tuple(CrewModule(name, 0, name != "frozen") for name in modules)
    return pack_crew(Crew(1, AGENTS, made, tuple(draws), {"lost": "the mapping raises KeyError"}), [discrete_blob()])


@contextmanager
def trained(
    server: Server, blob: bytes = b"", versions: dict[str, int] | None = None, **options: Any
) -> Iterator[Training]:
    """A run of its own, after all before."""
    run, every = f"{next(NUMBERS):012x}-aaaaaaaa", agents_to_wire(*spaces())
    with training(server, version=None, blob=blob or crew(), spaces=every, run=run, **options) as fake:
        for module, version in (versions or {"frozen": 0, "learner": 2, "other": 2}).items():
            fake.publish(version, BODY, module)
        yield fake


def client(server: Server, agents: Sequence[AgentId] = ("left", "right"), **options: Any) -> AgentsClient:
    observation_spaces, action_spaces = spaces(agents)
    return connect_agents(
        server.frontend, observation_spaces=observation_spaces, action_spaces=action_spaces, seed=1, **options
    )


def seen(value: float) -> np.ndarray:
    return np.full(3, value, np.float32)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with broker() as running:
        yield running


def test_agents_that_act_in_turn_make_fragments_of_what_is_complete(server: Server) -> None:
    with trained(server, fragment_steps=3) as fake, client(server) as mine:
        episode = mine.start_episode("turns")
        order = ("left", "right")
        for t in range(7):
            actions = episode.get_action({order[t % 2]: seen(t)})
            assert list(actions) == [order[t % 2]] and actions[order[t % 2]] in (0, 1)
            episode.log_returns({"left": 1.0, "right": -0.5} if t else {"left": 1.0})
        episode.end_episode({"right": seen(7)}, {ALL: True})
        until(lambda: fake.steps == 7, "all env steps are taken")
    headers = [header for header, _ in fake.taken]
    assert [(h.t0, h.steps, h.end) for h in headers] == [(0, 3, "no"), (3, 3, "no"), (6, 1, "terminated")]
    assert all(h.modules == {"frozen": 0, "learner": 2} and h.version == 2 for h in headers)
    # left acts at 0, 2, 4, 6 and sees at 0, 2, 4, 6; its last step is complete with the end, by what it saw last.
    left = [rows for h in headers for rows in h.agents if rows.agent == "left"]
    assert [(rows.module, rows.t0, rows.steps, rows.end) for rows in left] == [
        ("frozen", 0, 1, "no"), ("frozen", 1, 2, "no"), ("frozen", 3, 1, "terminated"),
    ]  # fmt: skip
    arrays = [columns for _, columns in fake.taken]
    np.testing.assert_array_equal(np.concatenate([a["frozen/t"] + h.t0 for h, a in fake.taken]), [0, 2, 2, 4, 6, 6, 7])
    np.testing.assert_array_equal(np.concatenate([a["frozen/obs"][:, 0] for a in arrays]), [0, 2, 2, 4, 6, 6, 6])
    np.testing.assert_allclose(np.concatenate([a["frozen/rewards"] for a in arrays]), [2, 2, 2, 1])
    np.testing.assert_allclose(np.concatenate([a["learner/rewards"] for a in arrays]), [-1, -1, -1])
    # What has been given for a step that hangs over a cut counts with the step.
    assert [round(h.return_so_far, 6) for h in headers] == [0.0, 1.0, 4.0]
    for header, columns in fake.taken:
        modules = {rows.module for rows in header.agents}
        names = ("obs", "actions", "rewards", "action_logp", "action_dist_inputs", "t")
        assert columns.keys() == {f"{module}/{name}" for module in modules for name in names}


def test_an_action_that_hangs_over_new_weights_says_which_chose_it(server: Server) -> None:
    with trained(server, fragment_steps=100) as fake, client(server) as mine:
        with mine.start_episode() as episode:
            episode.get_action({"left": seen(0), "right": seen(0)})
            episode.get_action({"left": seen(1)})  # right has not been answered
            fake.publish(3, STRONG, "learner")
            until(lambda: mine.ready and mine.flow.reader.origin.version == 3, "the new weights are here")  # type: ignore[union-attr]
            episode.get_action({"left": seen(2)})
            episode.end_episode({"left": seen(3), "right": seen(3)}, {ALL: True})
        until(lambda: fake.steps == 3, "all env steps are taken")
        (old, _), (new, columns) = fake.taken
        assert (old.version, old.modules, old.steps) == (2, {"frozen": 0, "learner": 2}, 2)
        assert (new.version, new.modules, new.steps) == (3, {"frozen": 0, "learner": 3}, 1)
        assert [(r.agent, r.t0, r.steps, r.first) for r in old.agents] == [("left", 0, 2, -1)]
        assert [(r.agent, r.t0, r.steps, r.first) for r in new.agents] == [("left", 2, 1, -1), ("right", 0, 1, 2)]
        np.testing.assert_array_equal(columns["learner/t"], [-2, 1])


def test_only_what_these_agents_need_is_fetched(server: Server) -> None:
    with trained(server) as fake, client(server, ("right",)) as mine:
        with mine.start_episode() as episode:
            episode.get_action({"right": seen(0)})
        reader = mine.flow.reader
        assert list(reader.policies) == ["learner"]
        assert reader._subscription is not None and reader._subscription.topics == ("learner",)
        with client(server, ("left",)) as also:
            assert also.flow.reader is not reader or list(reader.policies) == ["learner"]
            with also.start_episode() as episode:
                episode.get_action({"left": seen(0)})
        assert fake.trainer.refusal is None


def test_a_frozen_module_is_no_reason_for_lag(server: Server) -> None:
    with trained(server, versions={"frozen": 0, "learner": 9, "other": 7}) as fake, client(server, ("left", 0)) as mine:
        until(lambda: mine.ready and mine.flow.session.version == 9, "the newest version is known")
        episode = mine.start_episode()
        episode.get_action({"left": seen(0), 0: seen(1)})
        episode.end_episode({"left": seen(1), 0: seen(1)}, {ALL: True})
        until(lambda: fake.steps == 1, "it is taken")
        ((header, _),) = fake.taken
        assert header.modules == {"frozen": 0, "other": 7}
        assert header.version == 9, "'other' is at its newest, and 'frozen' doesn't learn"


def test_each_episode_takes_one_of_the_mappings_draws(server: Server) -> None:
    with trained(server, crew(DRAWS)), client(server) as mine:
        modules = []
        for _ in range(40):
            with mine.start_episode() as episode:
                episode.get_action({"left": seen(0), "right": seen(0)})
                modules.append(episode.builder.agents["left"].module)
                assert episode.builder.agents["right"].module == "learner"
        assert 20 <= modules.count("frozen") <= 38 and set(modules) == {"frozen", "learner"}


def test_agents_come_and_go(server: Server) -> None:
    with trained(server) as fake, client(server, (0, "left", "right")) as mine:
        episode = mine.start_episode()
        assert list(episode.get_action({"left": seen(0)})) == ["left"]
        episode.log_returns({"left": 1.0})
        assert sorted(episode.get_action({"left": seen(1), 0: seen(1)}), key=str) == [0, "left"]
        episode.log_returns({"left": 2.0, 0: 5.0})
        # left ends with this observation, 0 without one; right appears.
        actions = episode.get_action({"left": seen(2), "right": seen(2)}, {"left": True, 0: True})
        assert list(actions) == ["right"]
        with pytest.raises(EpisodeError, match="agent 'left', which has ended"):
            episode.log_returns({"left": 1.0})
        with pytest.raises(EpisodeError, match=r"agent 'left' has ended .*, and is given an observation"):
            episode.get_action({"left": seen(3)})
        episode.end_episode({"right": seen(3)}, {ALL: False}, {ALL: True})
        until(lambda: fake.steps == 3, "all env steps are taken")
        ((header, columns),) = fake.taken
        ends = {r.agent: (r.steps, r.end) for r in header.agents}
        assert ends == {"left": (2, "terminated"), 0: (1, "terminated"), "right": (1, "truncated")}
        assert header.end == "truncated" and episode.episode_return == 8.0
        np.testing.assert_array_equal(columns["other/obs"][:, 0], [1, 1])


def test_what_the_simulator_chose_itself_comes_without_dist_inputs(server: Server) -> None:
    with trained(server) as fake, client(server) as mine:
        episode = mine.start_episode()
        episode.log_action({"left": seen(0)}, {"left": 1}, {"left": -0.5})
        with pytest.raises(EpisodeError, match="an action for agent 'right', which has no observation to act on"):
            episode.log_action({"left": seen(1)}, {"left": 1, "right": 0}, {"left": -0.5, "right": -0.5})
        with pytest.raises(EpisodeError, match=r"all logged .* or all are the policies'"):
            episode.get_action({"left": seen(1)})
        with pytest.raises(EpisodeError, match="agent 'left' is to act, and has no action"):
            episode.log_action({"left": seen(1)}, {}, {})
        episode.log_action({"left": seen(1)}, {"left": 0}, {"left": -0.25})
        episode.end_episode({"left": seen(2)}, {ALL: True})
        until(lambda: fake.steps == 2, "all env steps are taken")
        ((_, columns),) = fake.taken
        assert "frozen/action_dist_inputs" not in columns
        np.testing.assert_array_equal(columns["frozen/actions"], [1, 0])


def test_actions_of_no_known_probability_are_for_replay_buffers(server: Server) -> None:
    with trained(server, needs_logp=False, fragment_steps=2) as fake, client(server) as mine:
        episode = mine.start_episode()
        for t in range(2):
            episode.log_action({"left": seen(t)}, {"left": t})
        with pytest.raises(EpisodeError, match="with action_logps or without"):
            episode.log_action({"left": seen(2)}, {"left": 1}, {"left": -0.5})
        with pytest.raises(EpisodeError, match="agent 'left' is to act, and has no action"):
            episode.log_action({"left": seen(2)}, {})
        episode.log_action({"left": seen(2)}, {"left": 1})
        episode.end_episode({"left": seen(3)}, {ALL: True})
        until(lambda: fake.steps == 3, "all env steps are taken")
        assert all("frozen/action_logp" not in columns for _, columns in fake.taken)
        assert [a for _, columns in fake.taken for a in columns["frozen/actions"]] == [0, 1, 1]
    with trained(server) as _, client(server) as mine, mine.start_episode() as episode:
        until(lambda: mine.ready, "it knows the training")
        with pytest.raises(EpisodeError, match="corrects for how probable each action was"):
            episode.log_action({"left": seen(0)}, {"left": 1})


def test_the_broker_may_be_restarted() -> None:
    """Weights of each module are offered and published again, and the episode goes on."""
    broker = Restartable()
    try:
        with trained(broker.server, fragment_steps=2) as fake, client(broker.server) as mine:
            episode = mine.start_episode()
            for t in range(5):
                episode.get_action({"left": seen(t), "right": seen(t)})
            broker.restart()
            fake.publish(3, STRONG, "learner")
            reader = mine.flow.reader
            until(
                lambda: mine.ready and reader.origin is not None and reader.origin.versions["learner"] == 3,
                "it is back",
            )
            for t in range(5, 8):
                episode.get_action({"left": seen(t), "right": seen(t)})
            episode.end_episode({"left": seen(8), "right": seen(8)}, {ALL: True})
            # A client has no thread: it may not have greeted the new broker yet when the weights are there.
            until(lambda: mine.flow.look() or {h.t0 for h, _ in fake.taken} >= {0, 2, 4, 5}, "all env steps are taken")
            assert broker.server.core is not None
            assert broker.server.core.module_versions == {"frozen": 0, "learner": 3, "other": 2}
            with client(broker.server, (0,)) as late, late.start_episode() as another:
                assert another.get_action({0: seen(0)})[0] in (0, 1)
    finally:
        broker.stop()


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_wherever_it_is_cut(seed: int) -> None:
    """Agents come, go, wait and end at random, in small windows, while weights change and the learner pauses: each
    agent's steps and rewards arrive once, in fragments that are no larger than they may be."""
    rng = random.Random(seed)
    agents: tuple[AgentId, ...] = (0, "left", "right")
    with broker(fragment_bytes=4096) as server:
        steps_ahead, fragment_steps = rng.choice([0, 40]), rng.choice([1, 3, 50])
        with (
            trained(server, crew(DRAWS), steps_ahead=steps_ahead, fragment_steps=fragment_steps) as fake,
            client(server, agents) as mine,
        ):
            acted: Counter[AgentId] = Counter()
            total = steps = 0.0
            for number in range(8):
                fake.publish(3 + number, rng.choice([BODY, STRONG]), rng.choice(["learner", "other"]))
                fake.paused = number % 3 == 1
                episode = mine.start_episode()
                waiting: set[AgentId] = set()
                ended: set[AgentId] = set()
                present = set(rng.sample(agents, 2))
                now, ends = {name: seen(rng.random()) for name in present}, dict[AgentId, bool]()
                for t in range(rng.choice([1, 2, 60])):
                    if t and not present:
                        break
                    if rng.random() < 0.3:
                        episode.can_act(now, ends)
                    fake.paused = fake.paused and rng.random() < 0.95
                    acting = set(episode.get_action(now, ends))
                    assert acting == {name for name in now if name not in ends}
                    acted.update(acting)
                    waiting |= acting
                    rewards = {name: rng.random() for name in waiting if rng.random() < 0.7}
                    episode.log_returns(rewards)
                    total, steps = total + sum(rewards.values()), steps + 1
                    come = {name for name in agents if name not in present | ended and rng.random() < 0.1}
                    present |= come
                    seeing = come | {name for name in waiting if rng.random() < 0.5}
                    ends = {name: True for name in waiting if rng.random() < 0.03}
                    seeing -= {name for name in ends if rng.random() < 0.5}
                    present -= ends.keys()
                    ended |= ends.keys()
                    waiting -= seeing | ends.keys()
                    now = {name: seen(rng.random()) for name in seeing}
                episode.end_episode(now, {**ends, ALL: True})
            fake.paused = False
            until(lambda: fake.steps == steps, "all env steps are taken")
    taken: Counter[AgentId] = Counter()
    for header, columns in fake.taken:
        assert sum(array.nbytes for array in columns.values()) <= 4096
        taken.update({rows.agent: rows.steps for rows in header.agents})
    assert taken == acted
    arrived = [columns[name].sum() for _, columns in fake.taken for name in columns if name.endswith("/rewards")]
    assert sum(arrived) == pytest.approx(total, rel=1e-5)


# ---- what doesn't fit


def test_an_agent_that_the_mapping_does_not_know(server: Server) -> None:
    with trained(server) as fake, client(server, ("left", "lost")) as mine:
        with mine.start_episode() as episode:
            with pytest.raises(EpisodeError, match="agent 'lost' is mapped to no module: the mapping raises KeyError"):
                episode.get_action({"lost": seen(0)})
        # Nothing else is lost: the same simulator goes on without it.
        episode = mine.start_episode()
        episode.get_action({"left": seen(0)})
        episode.end_episode({"left": seen(1)}, {ALL: True})
        until(lambda: fake.steps == 1, "it is taken")


def test_an_agent_that_is_not_there(server: Server) -> None:
    with trained(server), client(server) as mine, mine.start_episode() as episode:
        with pytest.raises(EpisodeError, match=r"there is no agent 'centre'.*'left', 'right'"):
            episode.get_action({"centre": seen(0)})
        episode.get_action({"left": seen(0)})
        with pytest.raises(EpisodeError, match="there is no agent 'centre'"):
            episode.log_returns({"centre": 1.0})
        with pytest.raises(EpisodeError, match="agent 'left': expected one observation of shape"):
            episode.get_action({"left": np.zeros(4, np.float32)})
        with pytest.raises(EpisodeError, match="agent 'left': expected a finite reward"):
            episode.log_returns({"left": float("nan")})


def test_a_reward_before_the_first_action_is_nobodys(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with trained(server), client(server) as mine, mine.start_episode() as episode:
        episode.get_action({"left": seen(0)})
        with caplog.at_level(logging.WARNING, "rllink_zmq"):
            episode.log_returns({"left": 1.0, "right": 2.0})
        assert "a reward of 2.0 for agent 'right', which has not acted yet, is nobody's" in caplog.text
        assert episode.episode_return == 1.0


def test_truncated_agents_need_an_observation(server: Server) -> None:
    with trained(server), client(server) as mine, mine.start_episode() as episode:
        episode.get_action({"left": seen(0), "right": seen(0)})
        with pytest.raises(EpisodeError, match="agent 'right' has acted and was truncated, and there is no"):
            episode.end_episode({"left": seen(1)}, {}, {ALL: True})


def test_when_all_have_ended_the_episode_is_to_be(server: Server) -> None:
    with trained(server), client(server) as mine, mine.start_episode() as episode:
        episode.get_action({"left": seen(0)})
        with pytest.raises(EpisodeError, match="all its agents have ended: call end_episode"):
            episode.get_action({"left": seen(1)}, {"left": True})
        with pytest.raises(EpisodeError, match="is over for all agents: call end_episode"):
            episode.get_action({}, {ALL: True})


def test_when_all_have_ended_at_a_cut_the_episode_can_still_be_ended(server: Server) -> None:
    with trained(server, fragment_steps=1) as fake, client(server) as mine, mine.start_episode() as episode:
        for t in range(2):
            episode.get_action({"left": seen(t), "right": seen(t)})
            episode.log_returns({"left": 1.0, "right": 1.0})
        ends = {"left": True}, {"right": True}
        last = {"left": seen(2), "right": seen(2)}
        assert episode.all_ended(last, *ends)
        for call in (episode.get_action, episode.can_act):
            with pytest.raises(EpisodeError, match="all its agents have ended: call end_episode"):
                call(last, *ends)
        episode.end_episode(last, *ends)
        until(lambda: fake.steps == 2, "both env steps are taken")
        assert {(r.agent, r.end) for r in fake.taken[-1][0].agents} == {("left", "terminated"), ("right", "truncated")}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (({"left": seen(1), "right": np.zeros(4)},), "agent 'right': expected one observation of shape"),
        (({0: seen(1), "left": np.full(3, np.nan)},), "agent 'left'.*finite"),
        (({"left": seen(1), "centre": seen(1)},), "there is no agent 'centre'"),
        (({"left": seen(1)}, {"centre": True}), "there is no agent 'centre'"),
        (({"left": seen(1)}, {}, {"right": True}), "agent 'right' has acted and was truncated, and there is no"),
    ],
    ids=["shape", "nan", "unknown", "unknown ends", "truncated"],
)
def test_a_call_that_is_refused_counts_for_nobody(server: Server, wrong: Any, why: str) -> None:
    with trained(server) as fake, client(server, (0, "left", "right")) as mine, mine.start_episode() as episode:
        episode.get_action({"left": seen(0), "right": seen(0)})
        episode.log_returns({"left": 1.0})
        for call in (episode.get_action, episode.end_episode):
            with pytest.raises(EpisodeError, match=why):
                call(*wrong)
        assert sorted(episode.get_action({"left": seen(1), "right": seen(1)})) == ["left", "right"]
        with pytest.raises(EpisodeError, match="agent 'right' has acted and was truncated"):
            episode.end_episode({"left": seen(2)}, {}, {ALL: True})
        episode.end_episode({"left": seen(2), "right": seen(2)}, {}, {ALL: True})
        until(lambda: fake.steps == 2, "both env steps are taken")
        ((header, columns),) = fake.taken
        assert [(r.agent, r.steps, r.end) for r in header.agents] == [
            ("left", 2, "truncated"),
            ("right", 2, "truncated"),
        ]
        np.testing.assert_array_equal(columns["frozen/obs"][:, 0], [0, 1, 2])


def test_env_steps_in_which_nobody_acts(server: Server) -> None:
    with trained(server, fragment_steps=2) as fake, client(server) as mine, mine.start_episode() as episode:
        for _ in range(3):
            assert episode.get_action({}) == {}
        assert list(episode.get_action({"right": seen(3)})) == ["right"]
        assert episode.get_action({}) == {}
        episode.log_returns({"right": 2.0})
        episode.end_episode({}, {ALL: True})
        until(lambda: fake.steps == 5, "all env steps are taken")
    assert [(h.steps, [(r.agent, r.steps) for r in h.agents]) for h, _ in fake.taken] == [
        (2, []), (2, []), (1, [("right", 1)]),
    ]  # fmt: skip
    np.testing.assert_array_equal(fake.taken[-1][1]["learner/t"], [-1, 1])
    np.testing.assert_array_equal(fake.taken[-1][1]["learner/rewards"], [2.0])


def test_a_policy_that_was_removed(server: Server) -> None:
    with client(server) as mine:
        with trained(server):
            episode = mine.start_episode()
            episode.get_action({"left": seen(0), "right": seen(0)})
        fewer = crew([Draw(1, (0, 0, NOBODY, 0))], ["learner"])
        with trained(server, fewer, {"learner": 0}) as fake:
            until(lambda: mine.ready and mine.flow.session.run == fake.run, "the next run's weights are here")
            with pytest.raises(RemovedError, match="the policy 'frozen' by which agent 'left' acts was removed"):
                episode.get_action({"left": seen(1), "right": seen(1)})
            episode.abandon()
            episode = mine.start_episode()
            episode.get_action({"left": seen(0), "right": seen(0)})
            episode.end_episode({"left": seen(1), "right": seen(1)}, {ALL: True})
            until(lambda: any(header.run == fake.run for header, _ in fake.taken), "the new policy's steps are taken")


def test_policies_are_added_and_removed_in_mid_run(server: Server) -> None:
    """`right` changes over to a new module; `left`, and an episode without `right`, go on as if nothing were."""
    every = agents_to_wire(*spaces())
    run = f"{next(NUMBERS):012x}-aaaaaaaa"
    with training(server, version=None, blob=crew(), spaces=every, run=run, fragment_steps=4) as fake:
        for module in MODULES:
            fake.publish(2, BODY, module)
        with client(server) as mine, client(server, ("left",)) as other:
            both, alone = mine.start_episode(), other.start_episode("alone")
            both.get_action({"left": seen(0), "right": seen(0)})
            alone.get_action({"left": seen(0)})
            fake.recast(crew([Draw(1, (0, 0, NOBODY, 1))], ["frozen", "new"]))
            until(lambda: mine.ready is False, "the new policies are here, and the new module's weights are not")
            fake.publish(3, STRONG, "new")
            until(lambda: mine.ready, "they are")
            with pytest.raises(RemovedError, match="the policy 'learner' by which agent 'right' acts was removed"):
                both.get_action({"left": seen(1), "right": seen(1)})
            both.abandon()
            for t in range(1, 6):
                alone.get_action({"left": seen(t)})
            alone.end_episode({"left": seen(6)}, {ALL: True})
            with mine.start_episode("after") as episode:
                episode.get_action({"left": seen(0), "right": seen(0)})
                episode.end_episode({"left": seen(1), "right": seen(1)}, {ALL: True})
            until(lambda: fake.steps == 8, "all env steps are taken, of before and of after")
            (after,) = [header for header, _ in fake.taken if header.episode == "after"]
            assert after.modules == {"frozen": 2, "new": 3}
            assert sum(header.steps for header, _ in fake.taken if header.episode == "alone") == 6
            assert {header.run for header, _ in fake.taken} == {run}


def test_agents_that_the_trainer_does_not_have_are_refused(server: Server) -> None:
    with trained(server):
        with pytest.raises(RefusedError, match="the trainer knows no agent 'centre'"):
            client(server, ("left", "centre"))
        other = {"left": gym.spaces.Box(-1, 1, (5,), np.float32)}
        with pytest.raises(RefusedError, match="of agent 'left' the trainer's observation space is"):
            connect_agents(server.frontend, observation_spaces=other, action_spaces={"left": ACTIONS})
    with pytest.raises(SpaceError, match="agent 'left': a Text space"):
        connect_agents(
            server.frontend, observation_spaces={"left": gym.spaces.Text(3)}, action_spaces={"left": ACTIONS}
        )


def test_a_client_of_one_agent_is_told_what_it_needs(server: Server) -> None:
    with trained(server), connect(server.frontend) as one, one.start_episode() as episode:
        with pytest.raises(PolicyError, match="has several agents: a simulator of theirs uses connect_agents"):
            episode.get_action(seen(0))
    with trained(server), pytest.raises(RefusedError, match="has several agents, this simulator's has one"):
        connect(server.frontend, observation_space=OBSERVATIONS, action_space=ACTIONS)
