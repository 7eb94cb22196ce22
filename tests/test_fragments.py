"""`rllink_zmq.fragments`: columns, cutting, and everything that doesn't fit."""

import gymnasium as gym
import numpy as np
import pytest

from rllink_zmq.errors import EpisodeError, SpaceError
from rllink_zmq.fragments import FLOAT32_MAX, FragmentBuilder, Layout, Origin, Row, layout_of_spaces

F4 = np.dtype(np.float32)
LAYOUT = Layout(Row((3,), F4), Row((), np.dtype(np.int64)), (2,), 2)
ORIGIN = Origin("run", 7)


def obs(i):
    return np.array([i, i + 0.25, -i], np.float32)


def builder(layout=LAYOUT, kind="acted", limit=100):
    made = FragmentBuilder("e")
    made.begin(layout, kind, ORIGIN, limit)
    return made


def take(made, i, reward=None):
    made.observe(obs(i))
    made.act(i % 2, -0.5 - i, np.array([i, -i], np.float32))
    made.reward(float(i) if reward is None else reward)


def test_a_fragment_has_its_steps_and_the_observation_after_the_last():
    made = builder()
    for i in range(40):  # more than the rows it begins with
        take(made, i)
    made.observe(obs(40))
    cut = made.cut()
    assert (cut.origin, cut.t0, cut.steps, cut.return_so_far) == (ORIGIN, 0, 40, 0.0)
    assert list(cut.arrays) == ["obs", "actions", "rewards", "action_logp", "action_dist_inputs"]
    np.testing.assert_array_equal(cut.arrays["obs"], [obs(i) for i in range(41)])
    np.testing.assert_array_equal(cut.arrays["actions"], [i % 2 for i in range(40)])
    np.testing.assert_array_equal(cut.arrays["rewards"], np.arange(40))
    np.testing.assert_allclose(cut.arrays["action_logp"], [-0.5 - i for i in range(40)])
    np.testing.assert_array_equal(cut.arrays["action_dist_inputs"], [[i, -i] for i in range(40)])
    assert [a.dtype.name for a in cut.arrays.values()] == ["float32", "int64", "float32", "float32", "float32"]
    assert all(a.flags.c_contiguous for a in cut.arrays.values())


def test_the_next_fragment_begins_with_the_last_observation():
    made = builder()
    for i in range(3):
        take(made, i)
    made.observe(obs(3))
    first = made.cut()
    made.begin(LAYOUT, "acted", Origin("run", 8), 100)
    for i in range(3, 5):
        take(made, i)
    made.observe(obs(5))
    second = made.cut()
    np.testing.assert_array_equal(second.arrays["obs"][0], first.arrays["obs"][-1])
    assert (second.t0, second.steps, second.return_so_far, second.origin.version) == (3, 2, 3.0, 8)
    assert made.episode_return == 10.0
    assert made.t0 + made.steps == 5


def test_what_was_cut_is_not_written_to_any_more():
    made = builder(limit=4)
    for i in range(4):
        take(made, i)
    made.observe(obs(4))
    cut = made.cut()
    before = {name: array.copy() for name, array in cut.arrays.items()}
    made.begin(LAYOUT, "acted", ORIGIN, 4)
    for i in range(4, 8):
        take(made, i)
    for name, array in cut.arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_a_cut_before_the_last_step_loses_nothing():
    made = builder()
    for i in range(5):
        take(made, i)
    made.reward(100.0)
    first = made.cut_before_last()
    assert (first.t0, first.steps, first.return_so_far) == (0, 4, 0.0)
    np.testing.assert_array_equal(first.arrays["obs"], [obs(i) for i in range(5)])
    assert (made.t0, made.steps, made.origin) == (4, 1, ORIGIN)
    assert made.cut_before_last() is None
    made.reward(1000.0)
    take(made, 5)
    made.observe(obs(6))
    second = made.cut()
    assert (second.t0, second.steps, second.return_so_far) == (4, 2, 6.0)
    np.testing.assert_array_equal(second.arrays["obs"], [obs(4), obs(5), obs(6)])
    np.testing.assert_array_equal(second.arrays["actions"], [0, 1])
    np.testing.assert_array_equal(second.arrays["rewards"], [1104.0, 5.0])
    np.testing.assert_allclose(second.arrays["action_logp"], [-4.5, -5.5])
    np.testing.assert_array_equal(second.arrays["action_dist_inputs"], [[4, -4], [5, -5]])
    assert made.episode_return == 6 + 1104 + 5


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("acted", ["obs", "actions", "rewards", "action_logp", "action_dist_inputs"]),
        ("logged", ["obs", "actions", "rewards", "action_logp"]),
    ],
)
def test_columns_and_bytes_of_each_kind(kind, names):
    made = builder(kind=kind)
    for i in range(20):
        made.observe(obs(i))
        if kind == "acted":
            made.act(1, -0.5, np.zeros(2, np.float32))
        else:
            made.log(1, -0.5)
    assert made.nbytes == 12 + 20 * LAYOUT.step_bytes(kind)
    made.observe(obs(20))
    expected = made.nbytes
    cut = made.cut()
    assert list(cut.arrays) == names
    assert sum(a.nbytes for a in cut.arrays.values()) == expected
    assert LAYOUT.most_steps(kind, expected) == 20
    assert LAYOUT.most_steps(kind, expected - 1) == 19
    assert LAYOUT.most_steps(kind, 1) == 0


def test_rewards_add_up_in_float64_and_none_is_zero():
    made = builder()
    for i in range(3):
        made.observe(obs(i))
        made.act(0, -1.0, np.zeros(2, np.float32))
        if i != 1:
            for _ in range(10):
                made.reward(0.1)
    made.reward(np.float32(2))
    assert made.episode_return == pytest.approx(4.0, abs=1e-12)
    made.observe(obs(3))
    np.testing.assert_allclose(made.cut().arrays["rewards"], [1, 0, 3])


def test_observations_are_cast_where_nothing_is_lost():
    made = builder()
    for given in (np.array([1.5, 2, 3]), [1, 2, 3], np.array([1, 2, 3], np.int64), np.array([True, False, True])):
        made.observe(given)
    images = builder(Layout(Row((2, 2), np.dtype(np.uint8)), Row((), np.dtype(np.int64)), (2,), 2))
    kept = images.observe(np.array([[0, 255], [1, 2]], np.int64))
    assert kept.dtype == np.uint8
    floats = builder(Layout(Row((4, 9), F4), Row((), np.dtype(np.int64)), (2,), 2))  # more than `FEW` numbers
    floats.observe(np.full((4, 9), 1e30, np.float32))
    scalar = builder(Layout(Row((), np.dtype(np.int64)), Row((), np.dtype(np.int64)), (2,), 2))
    scalar.observe(3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.zeros(4, np.float32), r"expected one observation of shape \(3,\), got shape \(4,\)"),
        (np.zeros((1, 3), np.float32), r"shape \(1, 3\)"),
        (np.float32(1), r"shape \(\)"),
        (np.zeros(3, complex), "dtype float32, got complex128"),
        (np.array(["a", "b", "c"]), "dtype float32"),
        (np.array([None, None, None]), "got object"),
        ([[1, 2], [3]], "got no array"),
        ({"a": 1}, r"shape \(\)"),
        (np.array([0, np.nan, 0], np.float32), r"finite observation, got nan \(entry 1 of 3\)"),
        (np.array([0, 0, np.inf], np.float32), r"got inf \(entry 2 of 3\)"),
        (np.array([np.inf, -np.inf, 0], np.float32), r"got inf \(entry 0 of 3\)"),
        (np.array([1e300, 0, 0]), "got inf"),
    ],
)
def test_an_observation_that_does_not_fit_is_refused(given, says):
    made = builder()
    with pytest.raises(EpisodeError, match=says) as caught:
        made.observe(given)
    assert "episode 'e'" in str(caught.value)
    take(made, 0)  # and nothing has happened
    made.observe(obs(1))
    np.testing.assert_array_equal(made.cut().arrays["obs"], [obs(0), obs(1)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_number_in_a_large_observation_is_found(bad):
    made = builder(Layout(Row((5, 5), F4), Row((), np.dtype(np.int64)), (2,), 2))
    given = np.ones((5, 5), np.float32)
    made.observe(given)
    given[3, 4] = bad
    with pytest.raises(EpisodeError, match="entry 19 of 25"):
        made.observe(given)


def test_integers_that_a_dtype_can_not_hold_are_refused():
    made = builder(Layout(Row((2,), np.dtype(np.uint8)), Row((), np.dtype(np.int64)), (2,), 2))
    for given in (np.array([256, 0]), np.array([-1, 0]), np.array([0.5, 0])):
        with pytest.raises(EpisodeError, match="uint8"):
            made.observe(given)


def test_another_observation_than_the_one_sent_is_refused():
    made = builder()
    take(made, 0)
    made.observe(obs(1))
    made.cut()
    made.begin(LAYOUT, "acted", ORIGIN, 100)
    with pytest.raises(EpisodeError, match="another observation of step 1"):
        made.observe(obs(2))
    made.observe(obs(1))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (np.nan, "finite reward .*got nan"),
        (np.inf, "got inf"),
        (1e39, "got 1e\\+39"),
        ("much", "one number as reward, got str much"),
        (None, "NoneType"),
        (np.zeros(2), "ndarray"),
    ],
)
def test_a_reward_that_is_no_number_is_refused(given, says):
    made = builder()
    take(made, 0, 1.0)
    with pytest.raises(EpisodeError, match=says):
        made.reward(given)
    assert made.episode_return == 1.0


def test_rewards_whose_sum_is_too_large_are_refused():
    made = builder()
    take(made, 0, 0.9 * FLOAT32_MAX)
    with pytest.raises(EpisodeError, match="finite reward"):
        made.reward(0.9 * FLOAT32_MAX)


def test_a_reward_before_a_step_is_refused():
    made = builder()
    with pytest.raises(EpisodeError, match="there is none yet"):
        made.reward(1.0)
    take(made, 0)
    made.observe(obs(1))
    made.cut()
    with pytest.raises(EpisodeError, match="was cut with the observation after it"):
        made.reward(1.0)


def test_a_policy_of_nan_is_noticed():
    made = builder()
    made.observe(obs(0))
    for logp in (np.nan, -np.inf):
        with pytest.raises(EpisodeError, match=r"version 7 of run run.*diverged"):
            made.act(0, float(logp), np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("action", "logp", "says"),
    [
        (2, -1.0, "expected an action of 0 to 1, got 2"),
        (-1, -1.0, "got -1"),
        (0.5, -1.0, "dtype int64, got float64"),
        ([1], -1.0, r"shape \(\), got shape \(1,\)"),
        (1, np.nan, "finite action_logp"),
        (1, "x", "one number as action_logp"),
    ],
)
def test_a_logged_action_that_does_not_fit_is_refused(action, logp, says):
    made = builder(kind="logged")
    made.observe(obs(0))
    with pytest.raises(EpisodeError, match=says):
        made.log(action, logp)
    assert made.steps == 0


def test_a_logged_box_action_must_be_finite():
    made = builder(Layout(Row((3,), F4), Row((2,), F4)), kind="logged")
    made.observe(obs(0))
    with pytest.raises(EpisodeError, match="finite action, got nan"):
        made.log([0.0, np.nan], -1.0)
    made.log([0.0, 7.5], -1.0)


def test_layouts_of_spaces():
    box = gym.spaces.Box(-1, 1, (2, 3), np.float64)
    layout = layout_of_spaces(box, gym.spaces.Discrete(5, start=3))
    assert layout == Layout(Row((2, 3), F4), Row((), np.dtype(np.int64)), (5,), 0)
    assert layout_of_spaces(gym.spaces.Discrete(4), box).choices == ()
    several = layout_of_spaces(gym.spaces.MultiBinary(3), gym.spaces.MultiDiscrete([2, 5]))
    assert several == Layout(Row((3,), np.dtype(np.int8)), Row((2,), np.dtype(np.int64)), (2, 5), 0)
    with pytest.raises(SpaceError, match="actions of MultiBinary"):
        layout_of_spaces(box, gym.spaces.MultiBinary(3))


def test_a_logged_action_of_several_entries_fits_each_of_them():
    space = gym.spaces.MultiDiscrete([2, 5])
    made = builder(layout_of_spaces(gym.spaces.Discrete(4), space), kind="logged")
    made.observe(1)
    made.log([1, 4], -1.0)
    made.observe(1)
    with pytest.raises(EpisodeError, match="an action of 0 to 1, got 2"):
        made.log([2, 4], -1.0)


def test_observations_of_several_parts_are_one_row():
    space = gym.spaces.Dict({"b": gym.spaces.Discrete(3), "a": gym.spaces.Box(-1, 1, (2,), np.float64)})
    made = builder(layout_of_spaces(space, gym.spaces.Discrete(2)), kind="logged")
    row = made.observe({"b": 2, "a": np.array([0.5, -1.0])})
    assert row.tobytes() == np.array([0.5, -1.0], "<f4").tobytes() + np.array(2, "<i8").tobytes()
    assert made.observe(row) is row
    made.log(1, 0.0)
    made.observe({"b": 1, "a": np.zeros(2)})
    cut = made.cut()
    assert cut.arrays["obs"].shape == (2, 16) and cut.arrays["obs"].dtype == np.uint8
    for wrong, text in (
        ({"a": np.zeros(2)}, r"has no obs\['b'\]"),
        ({"b": 1, "a": np.zeros(3)}, r"one obs\['a'\] of shape \(2,\), got shape \(3,\)"),
        ({"b": 1, "a": np.array([0.0, np.nan])}, r"a finite obs\['a'\], got nan"),
        ({"b": 0.5, "a": np.zeros(2)}, r"obs\['b'\] of dtype int64, got float64"),
        (np.zeros(16, np.uint16), r"has no obs\['a'\]"),
    ):
        with pytest.raises(EpisodeError, match=text):
            made.observe(wrong)


def test_earlier_observations_are_kept_over_cuts_and_cost_a_step_nothing():
    layout = layout_of_spaces(gym.spaces.Box(0, 1000, (2,), np.float32), gym.spaces.Discrete(2))
    looking = layout._replace(lookback=3)
    assert looking.step_bytes("acted") == layout.step_bytes("acted")
    assert looking.last_bytes == layout.last_bytes + 3 * (8 + 8 + 4), "an observation, an action, a reward"
    made = FragmentBuilder("e")
    seen = []
    for t in range(9):
        if t in (0, 2, 3, 7):
            made.begin(looking, "acted", Origin("r", 0), 8)
        made.observe(np.full(2, t, np.float32))
        before, last = made.before(), list(range(max(0, t - 3), t))
        assert before.observations[:, 0].tolist() == last and before.actions.tolist() == [i % 2 for i in last]
        assert before.rewards.tolist() == last
        made.act(t % 2, -1.0, np.zeros(0, np.float32))
        made.reward(float(t))
        if t in (1, 2, 6, 8):
            made.observe(np.full(2, t + 1, np.float32))
            seen.append(made.cut().arrays)
    earlier = [arrays["obs_before"][:, 0].tolist() if "obs_before" in arrays else [] for arrays in seen]
    assert earlier == [[], [0, 1], [0, 1, 2], [4, 5, 6]]
    assert [arrays["rewards_before"].tolist() for arrays in seen[1:]] == earlier[1:]
    assert [arrays["actions_before"].tolist() for arrays in seen[1:]] == [[0, 1], [0, 1, 0], [0, 1, 0]]
