"""`rllink_zmq.client`: against a real broker, with a learner's side made by hand."""

import json
import logging
import socket
import subprocess
import sys
import threading
import time
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
from fake_training import ACTIONS, OBSERVATIONS, PATIENCE, RUNS, broker, training, until
from test_policy import BODY, B, W, discrete_blob

from broker.peers import State as PeerState
from rllink_zmq import client_flow, connect
from rllink_zmq.client_policy import SWITCH_INTERVAL, PolicyReader
from rllink_zmq.errors import ConnectionTimeout, EpisodeError, RefusedError, SettingsError, SpaceError

SPACES = {"observation_space": OBSERVATIONS, "action_space": ACTIONS}


def obs(i=0):
    return np.array([i, 0.5, -1], np.float32)


@pytest.fixture(autouse=True)
def sooner(monkeypatch):
    """Waits say what they wait for after a moment."""
    monkeypatch.setattr(client_flow, "SAY_FIRST", 0.15)


@pytest.fixture
def served():
    with broker() as server:
        yield server


@pytest.fixture
def world(served):
    with training(served) as fake:
        yield served, fake


def step(episode, i, reward=1.0):
    action = episode.get_action(obs(i))
    episode.log_returns(reward)
    return action


def finished(client, fake, fragments):
    until(lambda: len(fake.taken) == fragments, f"{fragments} fragments are taken")
    until(lambda: client.flow.look() or not client.flow.session.unsettled, "all is settled")


# ---- an episode


def test_an_episode_arrives_as_it_was(world):
    server, fake = world
    with connect(server.frontend, seed=1, **SPACES) as client:
        episode = client.start_episode("first")
        actions = [step(episode, i, 0.5 * i) for i in range(20)]
        assert set(actions) <= {0, 1}
        assert episode.steps == 20
        episode.end_episode(obs(20))
        finished(client, fake, 3)
        headers = [header for header, _ in fake.taken]
        assert [(h.episode, h.t0, h.steps, h.end) for h in headers] == [
            ("first", 0, 8, "no"), ("first", 8, 8, "no"), ("first", 16, 4, "terminated"),
        ]  # fmt: skip
        assert [h.return_so_far for h in headers] == [0, 14, 60]
        assert {(h.run, h.version) for h in headers} == {(RUNS[0], 0)}
        assert [h.seconds for h in headers] == sorted(h.seconds for h in headers)
        acting = {"observation", "inference", "action"}
        assert [set(h.timings) for h in headers] == [acting | {"reset"}, acting, acting]
        assert all(0 < seconds < 1 for h in headers for seconds in h.timings.values())
        columns = {name: np.concatenate([a[name] for _, a in fake.taken]) for name in fake.taken[0][1]}
        assert columns["actions"].tolist() == actions
        np.testing.assert_array_equal(columns["rewards"], 0.5 * np.arange(20))
        for (_, before), (_, after) in pairwise(fake.taken):
            np.testing.assert_array_equal(before["obs"][-1], after["obs"][0])
        np.testing.assert_array_equal(fake.taken[-1][1]["obs"][-1], obs(20))
        policy = client.flow.reader.policy
        logits = policy.act(np.stack([obs(i) for i in range(20)])).action_dist_inputs
        np.testing.assert_allclose(columns["action_dist_inputs"], logits, atol=1e-5)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(columns["action_logp"], logp[np.arange(20), actions], atol=1e-5)
        stats = client.stats
        assert stats.connected
        assert (stats.steps, stats.fragments, stats.unsettled, stats.version) == (20, 3, 0, 0)
        assert stats.outcomes == {"delivered": (3, 20)}
        assert client.close() == 0
        assert client.close() == 0


def test_spaces_need_not_be_given(world):
    server, fake = world
    with connect(server.frontend) as client, client.start_episode() as episode:
        step(episode, 0)
        episode.end_episode(obs(1), truncated=True)
        finished(client, fake, 1)
        assert fake.taken[0][0].end == "truncated"
        assert len(episode.id) <= 64


def test_several_episodes_on_one_connection(world):
    server, fake = world
    with connect(server.frontend, episodes=3) as client:
        episodes = [client.start_episode(f"e{i}") for i in range(3)]
        for i in range(10):
            for episode in episodes:
                step(episode, i)
        with pytest.raises(EpisodeError, match=r"3 episodes are open, and connect.* was told episodes=3"):
            client.start_episode()
        for episode in episodes:
            episode.end_episode(obs(10))
        finished(client, fake, 6)
        assert sorted((h.episode, h.t0, h.steps) for h, _ in fake.taken) == [
            (f"e{i}", t0, steps) for i in range(3) for t0, steps in ((0, 8), (8, 2))
        ]
        client.start_episode("e0").abandon()  # the id is free again


def test_many_episodes_in_one_forward_pass(world):
    server, fake = world
    with connect(server.frontend, episodes=4) as client:
        episodes = [client.start_episode(f"e{i}", training_enabled=i < 3) for i in range(4)]
        for t in range(9):
            actions = client.get_actions(episodes, np.stack([obs(t)] * 4))
            assert actions.shape == (4,)
            for episode in episodes:
                episode.log_returns(1.0)
        assert client.can_act(episodes, [obs(9)] * 4)
        for episode in episodes:
            episode.end_episode(obs(9))
        finished(client, fake, 6)
        assert all(h.episode != "e3" for h, _ in fake.taken)
        for bad in ([], [episodes[0]] * 2):
            with pytest.raises(EpisodeError, match="different episodes and one observation for each"):
                client.get_actions(bad, [obs()] * 2)
        with pytest.raises(EpisodeError, match="get_actions after the end"):
            client.get_actions(episodes[:1], [obs()])
        with connect(server.frontend) as other, pytest.raises(EpisodeError, match="another client's"):
            other.get_actions([client.start_episode()], [obs()])


def test_episodes_that_are_not_trained_on_send_nothing(world):
    server, fake = world
    with connect(server.frontend) as client:
        episode = client.start_episode(training_enabled=False)
        for i in range(client_flow.UNSENT_STEPS + 10):
            step(episode, i)
        assert episode.steps == episode.episode_return == client_flow.UNSENT_STEPS + 10
        episode.end_episode(obs())
        assert client.stats.steps == client.stats.fragments == 0
    assert not fake.taken


def test_evaluation_acts_as_the_trainer_says_or_as_it_is_told(served):
    best = [int(np.argmax(obs(i / 50) @ W + B)) for i in range(100)]

    def played(client, **how):
        episode = client.start_episode(training_enabled=False, **how)
        actions = [step(episode, i / 50) for i in range(100)]
        episode.end_episode(obs())
        return actions

    with training(served, blob=discrete_blob(evaluation_explores=False)):
        with connect(served.frontend, seed=1) as client:
            assert played(client) == best
            assert played(client, explore=True) != best
            episodes = [client.start_episode(training_enabled=False) for _ in range(1)]
            assert client.get_actions(episodes, [obs(7 / 50)]).tolist() == [best[7]]
            episodes[0].abandon()
            with pytest.raises(EpisodeError, match="explore is for episodes that are not trained on"):
                client.start_episode(explore=False)


def test_a_training_that_does_not_explore_has_the_most_likely_actions(served):
    """Of single episodes, of several together, and of worlds in columns."""
    best = [int(np.argmax(obs(i / 50) @ W + B)) for i in range(30)]
    with training(served, blob=discrete_blob(explores=False)):
        with connect(served.frontend, seed=1, episodes=2) as client:
            one, other = client.start_episode(), client.start_episode()
            assert [step(one, i / 50) for i in range(30)] == best
            both = [client.get_actions([one, other], [obs(i / 50)] * 2).tolist() for i in range(30)]
            assert both == [[action] * 2 for action in best]
        with connect(served.frontend, seed=1, episodes=2) as client:
            vector, columns = client.vector(2), []
            for i in range(30):
                columns.append(vector.get_actions(np.stack([obs(i / 50)] * 2)).tolist())
                vector.log_step(np.zeros(2), [False] * 2, [False] * 2)
            assert columns == both


def test_actions_of_the_simulators_own(world):
    server, fake = world
    with connect(server.frontend) as client:
        episode = client.start_episode()
        for i in range(3):
            episode.log_action(obs(i), i % 2, -0.5)
            episode.log_returns(i)
        step(episode, 3)  # the policy's: another fragment
        step(episode, 4)
        episode.log_action(obs(5), 1, -0.7)
        episode.end_episode(obs(6))
        finished(client, fake, 3)
        assert [(h.t0, h.steps, len(h.columns)) for h, _ in fake.taken] == [(0, 3, 4), (3, 2, 5), (5, 1, 4)]
        assert {(h.run, h.version) for h, _ in fake.taken} == {(RUNS[0], 0)}


def test_actions_whose_probability_nobody_knows(served):
    """A training with a replay buffer takes them; where one is known it travels, in a fragment of its own."""
    with connect(served.frontend, **SPACES) as client, training(served, needs_logp=False) as fake:
        episode = client.start_episode()
        for i in range(3):
            episode.log_action(obs(i), i % 2)
        episode.log_action(obs(3), 1, -0.7)
        step(episode, 4)
        episode.log_action(obs(5), 0)
        episode.end_episode(obs(6))
        finished(client, fake, 4)
        shown = [(h.t0, h.steps, "action_logp" in arrays) for h, arrays in fake.taken]
        assert shown == [(0, 3, False), (3, 1, True), (4, 1, True), (5, 1, False)]
        assert fake.taken[0][1]["actions"].tolist() == [0, 1, 0]


def test_an_algorithm_that_needs_the_probability_says_so_at_once(served):
    with connect(served.frontend, **SPACES) as client, training(served):
        episode = client.start_episode()
        episode.log_action(obs(), 0, -0.5)
        with pytest.raises(EpisodeError, match=r"PPO, APPO, IMPALA\): give action_logp"):
            episode.log_action(obs(1), 0)
        episode.log_action(obs(1), 0, -0.5)


def test_logging_actions_needs_no_policy(served):
    with connect(served.frontend, **SPACES) as client, training(served, version=None) as fake:
        episode = client.start_episode()
        for i in range(4):
            episode.log_action(obs(i), 0, -0.5)
        episode.end_episode(obs(4))
        finished(client, fake, 1)
        assert (fake.taken[0][0].version, fake.taken[0][0].run) == (0, RUNS[0])
        assert client.flow.reader.policy is None


def test_logging_actions_without_spaces_learns_the_layout(served, caplog):
    """The trainer came after the client's WELCOME, which could not name its spaces."""
    with connect(served.frontend) as client, training(served, version=None) as fake:
        episode = client.start_episode()
        episode.log_action(obs(), 0, -0.5)
        episode.end_episode(obs(1))
        finished(client, fake, 1)


# ---- calls out of order


def test_calls_out_of_order(world):
    server, _ = world
    with connect(server.frontend, episodes=2) as client:
        episode = client.start_episode("one")
        with pytest.raises(EpisodeError, match="'one' is open already"):
            client.start_episode("one")
        with pytest.raises(EpisodeError, match="1 to 64 characters, got 65"):
            client.start_episode("x" * 65)
        with pytest.raises(EpisodeError, match="1 to 64 characters, got 0"):
            client.start_episode("")
        with pytest.raises(EpisodeError, match="there is none yet"):
            episode.log_returns(1.0)
        with pytest.raises(EpisodeError, match="ends without a step"):
            episode.end_episode(obs())
        step(episode, 0)
        episode.end_episode(obs(1))
        for call, do in {
            "get_action": lambda: episode.get_action(obs()),
            "can_act": lambda: episode.can_act(obs()),
            "log_action": lambda: episode.log_action(obs(), 0, -1.0),
            "log_returns": lambda: episode.log_returns(1.0),
            "end_episode": lambda: episode.end_episode(obs()),
        }.items():
            with pytest.raises(EpisodeError, match=f"{call} after the end of episode 'one'"):
                do()
        late = client.start_episode()
        step(late, 0)
    for do in (lambda: late.get_action(obs()), lambda: late.end_episode(obs())):
        with pytest.raises(EpisodeError, match="client is closed"):
            do()
    with pytest.raises(EpisodeError, match="client is closed"):
        client.start_episode()


def test_data_that_does_not_fit_changes_nothing(world):
    server, fake = world
    with connect(server.frontend, **SPACES) as client:
        episode = client.start_episode()
        for bad, says in (
            (np.zeros(4, np.float32), r"shape \(3,\), got shape \(4,\)"),
            (np.array([0, np.nan, 0], np.float32), "got nan"),
            (np.zeros(3, complex), "complex128"),
        ):
            with pytest.raises(EpisodeError, match=says):
                episode.get_action(bad)
        step(episode, 0)
        with pytest.raises(EpisodeError, match="finite reward"):
            episode.log_returns(float("inf"))
        with pytest.raises(EpisodeError, match="got nan"):
            episode.get_action(np.full(3, np.nan, np.float32))
        with pytest.raises(EpisodeError, match="got nan"):
            episode.end_episode(np.full(3, np.nan, np.float32))
        episode.get_action([1, 2, 3])
        episode.end_episode(np.array([4.0, 5, 6]))
        finished(client, fake, 1)
        np.testing.assert_array_equal(fake.taken[0][1]["obs"], [obs(0), [1, 2, 3], [4, 5, 6]])
        np.testing.assert_array_equal(fake.taken[0][1]["rewards"], [1, 0])


def test_leaving_an_episode_abandons_it(world):
    server, fake = world
    with connect(server.frontend) as client:
        with client.start_episode() as episode:  # without an end
            for i in range(10):
                step(episode, i)
        with pytest.raises(ZeroDivisionError), client.start_episode() as episode:
            step(episode, 0)
            raise ZeroDivisionError
        with client.start_episode():
            pass
        assert client.stats.dropped == {"abandoned": (2, 3)}
        with client.start_episode() as episode:
            step(episode, 0)
            episode.end_episode(obs(1))
        finished(client, fake, 2)
        assert [h.dropped for h, _ in fake.taken] == [{}, {"abandoned": (2, 3)}]
        assert not client.flow.builders


# ---- weights


def test_newer_weights_are_used_at_fragment_starts_alone(world):
    server, fake = world
    with connect(server.frontend, episodes=2, seed=3) as client:
        one, two = client.start_episode("one"), client.start_episode("two")
        for i in range(3):
            step(one, i)
            step(two, i)
        newer = np.float32([[9, -9], [9, -9], [-9, 9]]).tobytes() + np.float32([30, -30]).tobytes()
        fake.publish(1, newer)
        until(lambda: client.flow.look() or client.flow.reader.origin.version == 1, "version 1 is there")
        assert [step(one, i) for i in range(3, 6)] == [0, 0, 0]
        step(two, 3)
        for episode, last in ((one, 6), (two, 4)):
            episode.end_episode(obs(last))
        finished(client, fake, 4)
        assert sorted((h.episode, h.version, h.t0, h.steps) for h, _ in fake.taken) == [
            ("one", 0, 0, 3), ("one", 1, 3, 3), ("two", 0, 0, 3), ("two", 1, 3, 1),
        ]  # fmt: skip
        np.testing.assert_allclose(
            next(a for h, a in fake.taken if (h.episode, h.version) == ("two", 1))["action_dist_inputs"][0],
            obs(3) @ np.float32([[9, -9], [9, -9], [-9, 9]]) + np.float32([30, -30]),
            rtol=1e-5,
        )


def test_a_storm_of_versions_does_not_make_fragments_of_one_step(world):
    server, fake = world
    with connect(server.frontend) as client:
        episode = client.start_episode()
        started, i, version = time.monotonic(), 0, 0
        while time.monotonic() - started < 6 * SWITCH_INTERVAL:
            version += 1
            fake.publish(version)
            step(episode, i)
            i += 1
            time.sleep(0.005)
        episode.end_episode(obs(i))
        until(lambda: fake.steps == i)
        assert len({h.version for h, _ in fake.taken}) <= 8


def test_a_round_is_sampled_by_its_own_weights(served):
    """Little may be ahead of one: simulators rest until they have the weights that they have been told of, except those
    that never wait."""
    with training(served, rounds=True, steps_ahead=1) as fake, connect(served.frontend, **SPACES) as client:
        episode = client.start_episode()
        step(episode, 0)
        flow = client.flow
        reader = flow.reader
        assert flow.session.fresh and not flow.rests
        reader._read_at = float("inf")  # what is published doesn't get here
        fake.publish(1)
        until(lambda: not episode.can_act(obs(1)) and flow.session.version == 1, "it is told")
        assert reader.behind(flow.session) and flow.rests and not episode.can_act(obs(1))
        assert "version 1 are on their way" in flow.why("acted")
        flow.drops = True
        assert not flow.rests
        flow.drops = False
        reader._read_at = 0.0
        step(episode, 1)
        assert reader.origin.version == 1
        episode.end_episode(obs(2))
        finished(client, fake, 2)
        assert [h.version for h, _ in fake.taken] == [0, 1]


def test_large_weights_are_pulled(served):
    """Beyond `weights_inline`: PUB only announces them."""
    with broker(weights_inline=16) as server, training(server) as fake, connect(server.frontend) as client:
        episode = client.start_episode()
        step(episode, 0)
        fake.publish(5)
        until(lambda: client.flow.look() or client.flow.reader.origin.version == 5, "version 5 is there")


def test_one_policy_a_process(world):
    server, _ = world
    with connect(server.frontend) as one, connect(server.frontend) as two, connect(server.frontend, seed=5) as other:
        for client in (one, two, other):
            until(lambda client=client: client.ready, "there is a policy")
        assert one.flow.reader is two.flow.reader
        assert one.flow.reader is not other.flow.reader
        one.close()
        step(two.start_episode(), 0)
    assert not PolicyReader._all


def test_another_client_goes_on_when_the_one_that_pulls_is_closed(served):
    with connect(served.frontend) as one, connect(served.frontend) as two:
        assert not one.ready
        assert not two.ready
        with training(served) as fake:
            until(lambda: one.flow.look() or one.flow.session.run != "", "one has heard of the run")
            one.close(0)
            until(lambda: two.ready, "two has the policy")
            fake.publish(1)


def test_a_policy_that_gives_nan_is_an_error(served):
    body = np.full(8, np.nan, np.float32).tobytes()
    with training(served, body=body), connect(served.frontend) as client:
        with pytest.raises(EpisodeError, match="diverged"):
            client.start_episode().get_action(obs())


def test_a_new_run_with_another_policy(served):
    with connect(served.frontend) as client:
        with training(served), client.start_episode() as episode:
            step(episode, 0)
            step(episode, 1)
        blob = discrete_blob(module="Another")
        with training(served, run=RUNS[1], blob=blob) as fake, client.start_episode() as episode:
            until(lambda: client.flow.look() or client.flow.session.run == RUNS[1], "the new run is known")
            for i in range(3):
                step(episode, i)
            episode.end_episode(obs(3))
            finished(client, fake, 1)
            assert fake.taken[0][0].run == RUNS[1]
            assert client.flow.reader.policy.manifest.module == "Another"


# ---- room


def test_it_waits_for_room_and_says_why(served, caplog):
    with training(served, steps_ahead=20, fragment_steps=4) as fake, connect(served.frontend) as client:
        fake.paused = True
        until(lambda: client.ready, "there is a policy")
        episode = client.start_episode()
        for i in range(20):
            assert episode.can_act(obs(i))
            step(episode, i)
        assert not episode.can_act(obs(20))
        assert not episode.can_act(obs(20))
        assert client.stats.steps == 20
        assert not client.flow.builders[episode.id].steps  # all of it was sent
        threading.Timer(0.4, lambda: setattr(fake, "paused", False)).start()
        started = time.monotonic()
        episode.get_action(obs(20))
        assert time.monotonic() - started > 0.2
        assert "20 steps are on their way and none was taken yet" in caplog.text
        episode.log_returns(1.0)
        episode.end_episode(obs(21))
        until(lambda: fake.steps == 21)
        assert client.close() == 0


def test_one_that_cannot_pause_drops_whole_fragments_and_counts_them(served, caplog):
    with (
        training(served, steps_ahead=20, fragment_steps=4) as fake,
        connect(served.frontend, on_backpressure="drop") as client,
    ):
        fake.paused = True
        until(lambda: client.ready)
        with client.start_episode() as episode:
            for i in range(100):
                episode.get_action(np.full(3, i % 7, np.float32))
                episode.log_returns(1.0)
            sent, dropped = client.stats.fragments * 4, client.stats.dropped["backpressure"]
            assert sent <= 24 and dropped[1] >= 70, "it never waited"
            fake.paused = False
            until(lambda: (client.flow.look(), client.flow.session.unsettled)[1] == {}, "there is room again")
            before = client.stats.fragments
            for i in range(12):
                episode.get_action(np.full(3, i % 7, np.float32))
                episode.log_returns(1.0)
            episode.end_episode(np.zeros(3, np.float32))
        client.close()
        steps = client.stats.dropped["backpressure"][1] + fake.steps
        assert client.stats.fragments > before and steps == 112, "each step was sent or counted"
        last = fake.taken[-1][0]
        assert (last.end, last.t0 + last.steps, last.return_so_far + last.steps) == ("terminated", 112, 112.0)
        assert last.dropped["backpressure"] == client.stats.dropped["backpressure"]
    assert caplog.text.count("fragments are dropped; more are only counted") == 1


def test_after_a_refusal_to_act_the_same_observation_is_expected(served):
    with training(served, steps_ahead=4, fragment_steps=4) as fake, connect(served.frontend) as client:
        fake.paused = True
        episode = client.start_episode()
        for i in range(4):
            step(episode, i)
        assert not episode.can_act(obs(4))
        with pytest.raises(EpisodeError, match="was cut with the observation after it"):
            episode.log_returns(1.0)
        with pytest.raises(EpisodeError, match="truncated=True"):
            episode.end_episode(obs(4))
        fake.paused = False
        until(lambda: episode.can_act(obs(4)), "there is room")
        with pytest.raises(EpisodeError, match="another observation of step 4"):
            episode.get_action(obs(5))
        episode.get_action(obs(4))
        episode.end_episode(obs(5))
        until(lambda: fake.steps == 5)


def test_episodes_that_wait_for_each_other_do_not_wait_for_ever(served):
    """All room is held by steps of episodes that aren't being asked: they are sent before anything waits."""
    with training(served, steps_ahead=6, fragment_steps=100) as fake, connect(served.frontend, episodes=3) as client:
        episodes = [client.start_episode() for _ in range(3)]
        for i in range(40):
            for episode in episodes:
                step(episode, i)
        for _ in range(20):
            step(episodes[0], 40)
        for episode, last in zip(episodes, (40, 40, 40), strict=True):
            episode.end_episode(obs(last))
        until(lambda: fake.steps == 140)
        for name in {e.id for e in episodes}:
            parts = [(h, a) for h, a in fake.taken if h.episode == name]
            assert [h.t0 for h, _ in parts] == list(np.cumsum([0, *(h.steps for h, _ in parts)])[:-1])
            for (_, a), (_, b) in pairwise(parts):
                np.testing.assert_array_equal(a["obs"][-1], b["obs"][0])


def test_the_byte_window_holds(caplog):
    """Every step of 32 bytes; two fragments of 512 bytes may be on their way."""
    with broker(fragment_bytes=512) as server, training(server, fragment_steps=1000) as fake:
        with connect(server.frontend, **SPACES) as client:
            fake.paused = True
            until(lambda: client.ready, "there is a policy")
            episode = client.start_episode()
            i = 0
            while episode.can_act(obs(i)):
                step(episode, i)
                i += 1
            session = client.flow.session
            assert session.window <= session.unsettled_bytes <= session.window + 512
            assert all(kept.size <= 512 for kept in session.unsettled.values())
            assert i > 20
            fake.paused = False
            for _ in range(100):
                step(episode, i)
                i += 1
            episode.end_episode(obs(i))
            until(lambda: fake.steps == i)
            assert client.close() == 0
            assert set(client.stats.outcomes) == {"delivered"}


def test_room_that_was_promised_is_there() -> None:
    """A fragment that leaves takes more than its steps: the next step may not fit any more."""
    with broker(fragment_bytes=4000) as server, training(server, fragment_steps=8) as fake:
        fake.paused = True
        with connect(server.frontend) as client:
            until(lambda: client.ready)
            session = client.flow.session
            with client.start_episode() as episode:
                while episode.can_act(obs()):
                    credit = client.flow.credit
                    client.flow.measure()
                    assert client.flow.credit > 0, (session.unsettled_bytes, session.window)
                    client.flow.credit = credit  # nothing of it is to be mended by looking at it
                    episode.get_action(obs())
            assert session.unsettled_bytes >= session.window - 100
            fake.paused = False


def test_no_window_is_said(caplog):
    with broker(fragment_bytes=1000, memory=2000) as server, training(server) as fake:
        with connect(server.frontend) as one, connect(server.frontend) as two:
            episode = two.start_episode()
            until(lambda: two.ready)
            assert not episode.can_act(obs())
            threading.Timer(0.4, lambda: one.flow.connection.close()).start()
            episode.get_action(obs())
            assert "has no window for this simulator. no window is free" in caplog.text
            episode.end_episode(obs(1))
            until(lambda: fake.steps == 1)


def test_a_step_that_no_fragment_holds(served):
    with broker(fragment_bytes=40) as server, training(server), connect(server.frontend) as client:
        with pytest.raises(EpisodeError, match="one step takes 48 bytes, a fragment may have 40"):
            client.start_episode().get_action(obs())


def test_too_many_episodes_for_the_window():
    with broker(fragment_bytes=100) as server, training(server, fragment_steps=10) as fake:
        with connect(server.frontend, episodes=20) as client:
            fake.paused = True
            episodes = [client.start_episode() for _ in range(20)]
            with pytest.raises(EpisodeError, match="use more clients with fewer episodes"):
                for episode in episodes:
                    step(episode, 0)
            for episode in episodes:
                episode.abandon()
            fake.paused = False
            episodes = [client.start_episode() for _ in range(20)]
            with pytest.raises(EpisodeError, match="use more clients with fewer episodes"):
                client.get_actions(episodes, [obs()] * 20)


# ---- connections


def closed_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def test_no_broker():
    started = time.monotonic()
    with pytest.raises(ConnectionTimeout, match=r"gave up after 0.5 s: no broker answers at tcp://127.0.0.1:\d+"):
        connect(closed_address(), timeout=0.5)
    assert 0.4 < time.monotonic() - started < 3
    assert not PolicyReader._all


def test_a_broker_that_comes_late(caplog):
    address = closed_address()
    found = []
    thread = threading.Thread(target=lambda: found.append(connect(address, timeout=None)))
    thread.start()
    until(lambda: "no broker answers at" in caplog.text, "it says what it waits for")
    from broker.server import Server

    server = Server(frontend=address, backend="tcp://127.0.0.1:*", weights="tcp://127.0.0.1:*", admin=None)
    server.bind()
    runs = threading.Thread(target=server.run)
    runs.start()
    thread.join(PATIENCE)
    assert found[0].stats.connected
    found[0].close()
    server.stop()
    runs.join()
    server.close()


def test_no_training_is_said(served, caplog):
    with connect(served.frontend) as client:
        assert not client.ready
        episode = client.start_episode()
        assert not episode.can_act(obs())
        ready = threading.Event()

        def later():
            until(lambda: "no trainer has begun a run" in caplog.text, "it says what it waits for")
            with training(served) as fake:
                ready.set()
                until(lambda: fake.steps == 1)

        thread = threading.Thread(target=later)
        thread.start()
        episode.get_action(obs())
        assert ready.is_set()
        episode.end_episode(obs(1))
        assert client.close() == 0
        thread.join()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"address": "localhost:5555"}, SettingsError, "expected an address like"),
        ({"episodes": 0}, SettingsError, "episodes of 1 to"),
        ({"observation_space": OBSERVATIONS}, SpaceError, "both observation_space and action_space or neither"),
        ({"observation_space": gym.spaces.Text(3), "action_space": ACTIONS}, SpaceError, "Text"),
    ],
)
def test_arguments_that_can_not_be_used(arguments, error, says):
    with pytest.raises(error, match=says):
        connect(**arguments)
    assert not PolicyReader._all


def test_other_spaces_are_refused(served):
    other = gym.spaces.Box(-1, 1, (5,), np.float32)
    with training(served), pytest.raises(RefusedError, match=r"trainer's observation space is .*\[3\]"):
        connect(served.frontend, observation_space=other, action_space=ACTIONS)


def test_spaces_that_a_later_trainer_refuses(served):
    other = gym.spaces.Box(-1, 1, (5,), np.float32)
    with connect(served.frontend, observation_space=other, action_space=ACTIONS) as client:
        episode = client.start_episode()
        with training(served):
            with pytest.raises(RefusedError, match="start it with the trainer's environment"):
                episode.get_action(np.zeros(5, np.float32))
            with pytest.raises(RefusedError):
                client.ready  # noqa: B018


def test_a_broker_that_restarts_gets_everything_once(caplog):
    from broker.server import Server

    def run(server):
        server.bind()
        thread = threading.Thread(target=server.run)
        thread.start()
        return thread

    first = Server(frontend="tcp://127.0.0.1:*", backend="tcp://127.0.0.1:*", weights="tcp://127.0.0.1:*", admin=None)
    thread = run(first)
    addresses = {"frontend": first.frontend, "backend": first.backend, "weights": first.weights}
    with training(first, fragment_steps=4) as fake, connect(first.frontend) as client:
        episode = client.start_episode()
        for i in range(10):
            step(episode, i)
        until(lambda: client.flow.look() or fake.steps == 8)
        fake.paused = True
        for i in range(10, 20):
            step(episode, i)
        first.stop()
        thread.join()
        first.close()
        for i in range(20, 30):
            step(episode, i)
        second = Server(**addresses, admin=None)
        thread = run(second)
        fake.paused = False
        try:
            episode.end_episode(obs(30))
            assert client.close(PATIENCE) == 0
            assert sorted((h.t0, h.steps) for h, _ in fake.taken) == [(t, 4) for t in range(0, 28, 4)] + [(28, 2)]
        finally:
            second.stop()
            thread.join()
            second.close()


def test_closing_says_bye(served):
    with connect(served.frontend, name="polite") as client:
        session = client.flow.session.session
    until(lambda: served.core.simulators[session].state is PeerState.GONE, "the broker has heard BYE")


def test_closing_says_bye_from_a_process_that_ends_at_once(served):
    code = f"from rllink_zmq import connect; connect({served.frontend!r}, name='short').close()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    (peer,) = served.core.simulators.values()
    until(lambda: peer.state is PeerState.GONE, "the broker has heard BYE")


def test_closing_tells_what_was_not_settled(served, caplog):
    with training(served) as fake, connect(served.frontend) as client:
        fake.paused = True
        episode = client.start_episode()
        for i in range(9):
            step(episode, i)
        episode.end_episode(obs(9))
        assert client.close(0.2) == 2
        assert "closed while 2 fragments (9 steps) were on their way" in caplog.text


def test_dropped_fragments_are_said_once(served, caplog):
    caplog.set_level(logging.WARNING)
    with connect(served.frontend, **SPACES) as client:
        with training(served):
            until(lambda: client.ready, "there is a policy")
            episode = client.start_episode()
            for i in range(3):
                step(episode, i)
        with training(served, run=RUNS[1]) as fake:
            until(lambda: client.flow.look() or client.flow.session.run == RUNS[1], "the new run is known")
            episode.end_episode(obs(3))
            until(lambda: client.flow.look() or not client.flow.session.unsettled, "all is settled")
            assert client.stats.outcomes == {"old_run": (1, 3)}
            assert "a fragment was dropped (old_run)" in caplog.text
            assert not fake.taken


def test_a_body_of_one_version_is_never_acted_on_by_two(world):
    """Clients in threads of their own share a policy that is switched under them."""
    server, fake = world
    stop = threading.Event()

    def simulate():
        with connect(server.frontend) as client:
            while not stop.is_set():
                with client.start_episode() as episode:
                    for i in range(30):
                        step(episode, i)
                    episode.end_episode(obs(30))

    threads = [threading.Thread(target=simulate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for version in range(1, 6):
        time.sleep(1.2 * SWITCH_INTERVAL)
        body = BODY[:24] + np.float32([version, -version]).tobytes()
        fake.publish(version, body)
    time.sleep(1.2 * SWITCH_INTERVAL)
    stop.set()
    for thread in threads:
        thread.join()
    versions = set()
    for header, arrays in list(fake.taken):
        versions.add(header.version)
        bias = np.float32([header.version, -header.version]) if header.version else np.float32([0.25, -0.25])
        weights = np.frombuffer(BODY[:24], np.float32).reshape(3, 2)
        np.testing.assert_allclose(arrays["action_dist_inputs"], arrays["obs"][:-1] @ weights + bias, atol=1e-4)
    assert len(versions) > 3


# ---- the audit


def told(directory):
    """The lines of the one log in `directory`, as (event, number or unsettled, steps or outcome)."""
    (path,) = directory.glob("simulator-*")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        (line["event"], line.get("number", line.get("unsettled")), line.get("steps", line.get("outcome")))
        for line in lines[1:]
    ]


def test_an_audit_tells_what_was_sent_and_what_became_of_it(world, tmp_path):
    server, fake = world
    with connect(server.frontend, seed=1, audit=tmp_path, **SPACES) as client:
        episode = client.start_episode()
        for i in range(20):
            step(episode, i)
        episode.end_episode(obs(20))
        unseen = client.start_episode(training_enabled=False)
        step(unseen, 0)
        unseen.end_episode(obs(1))
        finished(client, fake, 3)
    lines = told(tmp_path)
    assert [line for line in lines if line[0] == "sent"] == [("sent", 1, 8), ("sent", 2, 8), ("sent", 3, 4)]
    assert sorted(line for line in lines if line[0] == "settled") == [("settled", n, "delivered") for n in (1, 2, 3)]
    assert lines[-1] == ("closed", 0, None) and len(lines) == 7
    for n in (1, 2, 3):
        assert lines.index(("sent", n, 4 if n == 3 else 8)) < lines.index(("settled", n, "delivered"))


def test_an_audit_tells_what_was_not_settled_at_the_end(world, tmp_path):
    server, fake = world
    fake.paused = True
    with connect(server.frontend, audit=tmp_path, **SPACES) as client:
        episode = client.start_episode()
        for i in range(8):
            step(episode, i)
        episode.end_episode(obs(8))
        assert client.close(0.2) == 1
    assert told(tmp_path) == [("sent", 1, 8), ("closed", 1, None)]


def test_an_audit_directory_that_cannot_be_is_refused(served, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"the audit directory .* can't be made"):
        connect(served.frontend, audit=tmp_path / "file" / "logs")
