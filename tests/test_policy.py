"""`rllink_zmq.policy` with graphs made by hand: no ray, no torch. `test_export.py` has the real ones."""

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from onnx import TensorProto, helper

from rllink_zmq.errors import PolicyError
from rllink_zmq.policy import (
    Actions,
    Policy,
    PolicyManifest,
    Tensor,
    Weight,
    pack_policy,
    policy_hash,
    unpack_policy,
)

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64


def model(nodes, inputs, outputs):
    def values(described):
        return [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in described.items()]

    graph = helper.make_graph(nodes, "policy", values(inputs), values(outputs))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def discrete_blob(**changes):
    """Two actions; logits = observations @ w + b, of observations of three."""
    graph = model(
        [
            helper.make_node("Gemm", ["observations", "weights/w", "weights/b"], ["action_dist_inputs"]),
            helper.make_node("Add", ["action_dist_inputs", "noise"], ["noisy"]),
            helper.make_node("ArgMax", ["noisy"], ["actions"], axis=-1, keepdims=1),
            helper.make_node("LogSoftmax", ["action_dist_inputs"], ["logps"], axis=-1),
            helper.make_node("GatherElements", ["logps", "actions"], ["action_logp"], axis=-1),
        ],
        {
            "observations": (FLOAT, ["batch", 3]),
            "noise": (FLOAT, ["batch", 2]),
            "weights/w": (FLOAT, [3, 2]),
            "weights/b": (FLOAT, [2]),
        },
        {
            "actions": (INT64, ["batch", 1]),
            "action_logp": (FLOAT, ["batch", 1]),
            "action_dist_inputs": (FLOAT, ["batch", 2]),
        },
    )
    manifest = PolicyManifest(
        format=1,
        module="Linear",
        observation=Tensor("float32", (3,)),
        noise="gumbel",
        noise_shape=(2,),
        action=Tensor("int64", ()),
        env_action=Tensor("int64", ()),
        action_dist_inputs=2,
        opset=20,
        weights=(Weight("w", "float32", (3, 2)), Weight("b", "float32", (2,))),
    )
    return pack_policy(msgspec.structs.replace(manifest, **changes), graph)


def box_blob():
    """One action, its mean and log std both the observation (of shape ()) times w; the env gets twice the action."""
    graph = model(
        [
            helper.make_node("Constant", [], ["column"], value_ints=[-1, 1]),
            helper.make_node("Reshape", ["observations", "column"], ["rows"]),
            helper.make_node("Mul", ["rows", "weights/w"], ["mean"]),
            helper.make_node("Concat", ["mean", "mean"], ["action_dist_inputs"], axis=1),
            helper.make_node("Add", ["mean", "noise"], ["actions"]),
            helper.make_node("Neg", ["noise"], ["action_logp"]),
            helper.make_node("Add", ["actions", "actions"], ["env_actions"]),
        ],
        {"observations": (FLOAT, ["batch"]), "noise": (FLOAT, ["batch", 1]), "weights/w": (FLOAT, [1])},
        {
            "actions": (FLOAT, ["batch", 1]),
            "action_logp": (FLOAT, ["batch", 1]),
            "action_dist_inputs": (FLOAT, ["batch", 2]),
            "env_actions": (FLOAT, ["batch", 1]),
        },
    )
    one = Tensor("float32", (1,))
    manifest = PolicyManifest(
        1, "Scaled", Tensor("float32", ()), "normal", (1,), one, one, 2, 20, (Weight("w", "float32", (1,)),)
    )
    return pack_policy(manifest, graph)


W = np.array([[1, -1], [0.5, 0], [0, 2]], np.float32)
B = np.array([0.25, -0.25], np.float32)
BODY = W.tobytes() + B.tobytes()


@pytest.fixture
def policy():
    policy = Policy.load(discrete_blob(), seed=5)
    policy.apply(3, BODY)
    return policy


OBSERVATIONS = np.random.default_rng(0).normal(size=(2500, 3)).astype(np.float32)


def test_actions_are_what_weights_and_noise_make_of_observations(policy):
    noise = np.random.default_rng(1).gumbel(size=(2500, 2)).astype(np.float32)
    acted = policy.act(OBSERVATIONS, noise)
    logits = OBSERVATIONS @ W + B
    np.testing.assert_allclose(acted.action_dist_inputs, logits, atol=1e-5)
    np.testing.assert_array_equal(acted.actions, np.argmax(logits + noise, -1))
    np.testing.assert_array_equal(acted.env_actions, acted.actions)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(acted.action_logp, np.take_along_axis(logp, acted.actions[:, None], 1)[:, 0], atol=1e-5)
    assert [x.dtype.name for x in acted[:4]] == ["int64", "int64", "float32", "float32"]
    assert [x.shape for x in acted[:4]] == [(2500,), (2500,), (2500,), (2500, 2)]


def test_no_noise_is_the_most_likely_action(policy):
    best = np.argmax(OBSERVATIONS @ W + B, -1)
    np.testing.assert_array_equal(policy.act(OBSERVATIONS, np.zeros((2500, 2))).actions, best)
    np.testing.assert_array_equal(policy.act(OBSERVATIONS, explore=False).actions, best)
    assert [policy.act_one(row, explore=False).actions for row in OBSERVATIONS[:100]] == best[:100].tolist()


def test_some_explore_and_some_do_not(policy):
    best = np.argmax(OBSERVATIONS @ W + B, -1)
    explore = np.arange(2500) % 2 == 0
    drawn = policy.act(OBSERVATIONS, explore=explore).actions
    np.testing.assert_array_equal(drawn[~explore], best[~explore])
    assert (drawn[explore] != best[explore]).any()


def test_act_one_is_act_with_the_same_noise(policy):
    """However the rows are split into calls, across the ends of noise blocks too."""
    other = Policy.load(discrete_blob(), seed=5)
    other.apply(3, BODY)
    expected = other.act(OBSERVATIONS)
    for row in range(1500):
        one = policy.act_one(OBSERVATIONS[row])
        assert isinstance(one, Actions)
        assert one.env_actions == one.actions == expected.actions[row]
        assert type(one.actions) is int
        assert one.action_logp == pytest.approx(expected.action_logp[row], abs=1e-5)
        np.testing.assert_allclose(one.action_dist_inputs, expected.action_dist_inputs[row], atol=1e-5)
    rest = policy.act(OBSERVATIONS[1500:])
    np.testing.assert_array_equal(rest.actions, expected.actions[1500:])


def test_another_seed_acts_otherwise(policy):
    other = Policy.load(discrete_blob(), seed=6)
    other.apply(3, BODY)
    assert np.any(other.act(OBSERVATIONS).actions != policy.act(OBSERVATIONS).actions)


def test_actions_follow_the_distribution(policy):
    rows = 40_000
    acted = policy.act(np.tile(OBSERVATIONS[:1], (rows, 1)))
    p = np.exp(acted.action_dist_inputs[0]) / np.exp(acted.action_dist_inputs[0]).sum()
    counts = np.bincount(acted.actions, minlength=2)
    assert ((counts - rows * p) ** 2 / (rows * p)).sum() < 10.8  # chi-square, 1 degree of freedom, p = 0.001


def test_a_box_policy_scales_for_the_env_and_keeps_the_action():
    policy = Policy.load(box_blob(), seed=1)
    policy.apply(0, np.float32([3]).tobytes())
    acted = policy.act(np.float32([1, 2]), np.float32([[0.5], [0.0]]))
    np.testing.assert_array_equal(acted.actions, [[3.5], [6]])
    np.testing.assert_array_equal(acted.env_actions, [[7], [12]])
    np.testing.assert_array_equal(acted.action_dist_inputs, [[3, 3], [6, 6]])
    draws = policy.act(np.zeros(20_000)).actions
    assert abs(draws.mean()) < 0.03
    assert abs(draws.std() - 1) < 0.03


def test_what_act_one_returns_for_the_env_is_the_callers():
    policy = Policy.load(box_blob(), seed=1)
    policy.apply(0, np.float32([3]).tobytes())
    first = policy.act_one(np.array(1.0))
    kept, view = first.env_actions.copy(), first.actions
    np.testing.assert_allclose(kept, 2 * view)
    policy.act_one(np.array(100.0))
    np.testing.assert_array_equal(first.env_actions, kept)
    assert abs(view[0] - 300) < 10  # a view: the docstring says so


def test_observations_are_cast(policy):
    float64 = OBSERVATIONS[:4].astype(np.float64)
    noise = np.zeros((4, 2))
    np.testing.assert_array_equal(policy.act(float64, noise).actions, policy.act(OBSERVATIONS[:4], noise).actions)
    a = policy.act_one(float64[0]).action_dist_inputs.copy()
    np.testing.assert_array_equal(a, policy.act_one(OBSERVATIONS[0]).action_dist_inputs)
    with pytest.raises(PolicyError, match="complex128"):
        policy.act(OBSERVATIONS[:1].astype(complex))


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 4), (2, 3, 1), ()])
def test_observations_of_another_shape_are_refused(policy, shape):
    with pytest.raises(PolicyError, match=r"\(B, 3\)"):
        policy.act(np.zeros(shape, np.float32))
    if shape != (3,):
        with pytest.raises(PolicyError, match=r"\(3,\)"):
            policy.act_one(np.zeros(shape, np.float32))


def test_noise_of_another_shape_is_refused(policy):
    with pytest.raises(PolicyError, match=r"noise of shape \(B, 2\)"):
        policy.act(OBSERVATIONS[:2], np.zeros((1, 2)))


def test_acting_needs_weights():
    policy = Policy.load(discrete_blob())
    assert policy.version is None
    for act in (lambda: policy.act(OBSERVATIONS), lambda: policy.act_one(OBSERVATIONS[0])):
        with pytest.raises(PolicyError, match="no weights yet"):
            act()


def test_weights_of_another_size_change_nothing(policy):
    before = policy.act(OBSERVATIONS, np.zeros((2500, 2))).action_dist_inputs
    assert policy.weights_bytes == len(BODY) == 32
    for body in (BODY[:-1], BODY + b"\0", b""):
        with pytest.raises(PolicyError, match=f"have {len(body)} bytes.* wants 32"):
            policy.apply(4, body)
    assert policy.version == 3
    np.testing.assert_array_equal(policy.act(OBSERVATIONS, np.zeros((2500, 2))).action_dist_inputs, before)


def test_new_weights_replace_the_old_and_are_copied(policy):
    body = bytearray(np.zeros(8, np.float32).tobytes())
    policy.apply(4, memoryview(body))
    body[:] = b"\xff" * len(body)
    assert policy.version == 4
    np.testing.assert_array_equal(policy.act_one(OBSERVATIONS[0]).action_dist_inputs, [0, 0])
    np.testing.assert_array_equal(policy.act(OBSERVATIONS[:1]).action_dist_inputs, [[0, 0]])


def test_the_hash_is_the_blobs():
    assert policy_hash(discrete_blob()) == policy_hash(discrete_blob()) == Policy.load(discrete_blob()).hash
    assert len(policy_hash(b"")) == 32
    assert policy_hash(discrete_blob()) != policy_hash(box_blob())


def test_a_damaged_blob_is_refused():
    blob = discrete_blob()
    manifest, graph = unpack_policy(blob)
    assert pack_policy(manifest, graph) == blob
    random = np.random.default_rng(0)
    damaged = [b"", b"\x93", blob[:100], blob + b"\0", random.bytes(300), blob.replace(b"Linear", b"Line\xffr")]
    for bad in damaged:
        with pytest.raises(PolicyError, match="not an exported policy"):
            unpack_policy(bad)
    with pytest.raises(PolicyError, match="refuses the policy's graph"):
        Policy.load(pack_policy(manifest, graph[: len(graph) // 2]))


@pytest.mark.parametrize(
    "changes",
    [
        {"observation": Tensor("float32", (4,))},
        {"observation": Tensor("float64", (3,))},
        {"noise_shape": (3,)},
        {"action_dist_inputs": 4},
        {"action": Tensor("int64", (2,)), "env_action": Tensor("int64", (2,))},
        {"env_action": Tensor("float32", ())},
        {"weights": (Weight("w", "float32", (3, 2)),)},
        {"weights": (Weight("w", "float32", (3, 2)), Weight("b", "float32", (3,)))},
    ],
)
def test_a_graph_that_is_not_what_its_manifest_says_is_refused(changes):
    with pytest.raises(PolicyError, match="the policy's graph has"):
        Policy.load(discrete_blob(**changes))


def test_claims_without_bounds_are_refused():
    for changes in (
        {"weights": (Weight("w", "float64", (1 << 20, 1 << 20)),)},
        {"observation": Tensor("float32", (1 << 30, 1 << 30))},
        {"noise_shape": (1 << 30,)},
    ):
        with pytest.raises(PolicyError, match="limit"):
            unpack_policy(discrete_blob(**changes))


def test_importing_it_loads_no_runtime():
    heavy = "{'onnxruntime', 'torch', 'ray', 'zmq'}"
    code = f"import sys, rllink_zmq.policy; sys.exit(bool({heavy} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
