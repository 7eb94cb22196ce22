"""DQN's epsilon-greedy and SAC's squashed Gaussian: the exported policy and the action service beside RLlib itself."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.utils.spaces.space_utils import unsquash_action

from rllink_zmq.errors import PolicyError
from rllink_zmq.policy import Policy, pack_policy, unpack_policy
from rllink_zmq.policy_batch import BatchPolicy
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.exploration import draw, epsilon_at, epsilon_schedule
from rllink_zmq.rllib.export import export_policy, weights_body

OBS = gym.spaces.Box(-1.0, 1.0, (4,), np.float32)
THREE = gym.spaces.Discrete(3)
TORQUES = gym.spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))
SCHEDULE = [(0, 1.0), (1000, 0.2), (3000, 0.1)]
DQNS: dict[str, dict[str, Any]] = {
    "plain": {"dueling": False, "double_q": False},
    "dueling": {},
    "atoms": {"num_atoms": 5, "v_min": -1.0, "v_max": 1.0, "dueling": False},
    "rainbow": {"num_atoms": 5, "v_min": -1.0, "v_max": 1.0},
}
MANY = 8_000


@cache
def made(name: str) -> tuple[Any, bytes, gym.Space[Any]]:
    """Module with weights that matter, its export, and the action space. Nothing changes them."""
    logging.getLogger("ray.rllib").setLevel(logging.ERROR)
    torch.manual_seed(5)
    space: gym.Space[Any] = THREE
    config: Any = SACConfig() if name.startswith("sac") else DQNConfig().training(epsilon=SCHEDULE, **DQNS[name])
    if name == "sac":
        space = TORQUES
    config.environment(observation_space=OBS, action_space=space).rl_module(model_config={"fcnet_hiddens": [16]})
    module = config.get_rl_module_spec(spaces={DEFAULT_MODULE_ID: (OBS, space)}, inference_only=True).build()
    blob = export_policy(module, OBS, space)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return module, blob, space


def policy_of(name: str, seed: int = 1) -> Policy:
    module, blob, _ = made(name)
    policy = Policy.load(blob, seed=seed)
    policy.apply(0, weights_body(blob, module.get_state()))
    return policy


def actor_of(name: str, sampled: int) -> ModuleActor:
    module, blob, space = made(name)
    manifest = unpack_policy(blob)[0]
    actor = ModuleActor(module, manifest, space, True, False, sampled=lambda: sampled)
    actor.apply(0, weights_body(blob, module.get_state()))
    return actor


def some(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(rows).uniform(-1, 1, (rows, 4)).astype(np.float32)


def shares(actions: Any) -> NDArray[Any]:
    return np.bincount(np.asarray(actions), minlength=3) / len(actions)


# ---- DQN


@pytest.mark.parametrize("name", DQNS)
@pytest.mark.parametrize("steps", [500, 9000])
def test_actions_are_as_often_what_rllibs_module_chooses(name: str, steps: int) -> None:
    """In a training that has sampled so many steps: exported, by the service, and by RLlib's module."""
    module, policy, actor = made(name)[0], policy_of(name), actor_of(name, steps)
    policy.advance(steps)
    one = np.repeat(some(1), MANY, 0)
    torch.manual_seed(steps)
    with torch.no_grad():
        theirs = shares(module.forward_exploration({Columns.OBS: torch.from_numpy(one)}, t=steps)[Columns.ACTIONS])
    acted, answered = policy.act(one), actor.act(one, True)
    for actions, logp in ((acted.actions, acted.action_logp), (answered["actions"], answered["action_logp"])):
        np.testing.assert_allclose(shares(actions), theirs, atol=0.025)
        # What is said of an action is how often it is chosen.
        said = np.array([np.exp(logp[actions == a][0]) if (actions == a).any() else 0.0 for a in range(3)])
        np.testing.assert_allclose(said, theirs, atol=0.025)
    assert acted.action_dist_inputs.shape == answered["action_dist_inputs"].shape == (MANY, 3)
    np.testing.assert_allclose(acted.action_dist_inputs[0], answered["action_dist_inputs"][0], atol=1e-5)


@pytest.mark.parametrize("name", DQNS)
def test_without_exploring_the_best_action_is_taken(name: str) -> None:
    module, policy, actor = made(name)[0], policy_of(name), actor_of(name, 0)
    rows = some(200)
    best = module.forward_inference({Columns.OBS: torch.from_numpy(rows)})[Columns.ACTIONS].numpy()
    acted, answered = policy.act(rows, explore=False), actor.act(rows, False)
    for actions, logp in ((acted.actions, acted.action_logp), (answered["actions"], answered["action_logp"])):
        np.testing.assert_array_equal(actions, best)
        np.testing.assert_array_equal(logp, 0.0)
    assert [policy.act_one(row, explore=False)[1] for row in rows[:20]] == best[:20].tolist()


def test_one_at_a_time_and_in_a_bound_batch_epsilon_is_the_same() -> None:
    policy = policy_of("dueling")
    policy.advance(500)
    row = some(1)[0]
    singly = shares([policy.act_one(row)[1] for _ in range(4000)])
    bound = BatchPolicy(policy, 1000)
    batches = shares(np.concatenate([bound.act(np.repeat(row[np.newaxis], 1000, 0)).actions.copy() for _ in range(4)]))
    whole = shares(policy.act(np.repeat(row[np.newaxis], 4000, 0)).actions)
    for found in (singly, batches):
        np.testing.assert_allclose(found, whole, atol=0.03)
    mixed = policy.act(np.repeat(row[np.newaxis], 4000, 0), explore=np.arange(4000) < 2000)
    assert len(set(mixed.actions[2000:].tolist())) == 1 < len(set(mixed.actions[:2000].tolist()))


@pytest.mark.parametrize("epsilon", [SCHEDULE, 0.3, [(0, 1.0), (10, 0.05)]])
def test_the_schedule_is_rllibs(epsilon: Any) -> None:
    config = DQNConfig().environment(observation_space=OBS, action_space=THREE).training(epsilon=epsilon)
    module = config.get_rl_module_spec(spaces={DEFAULT_MODULE_ID: (OBS, THREE)}, inference_only=True).build()
    schedule = epsilon_schedule(module)
    for steps in (0, 3, 10, 11, 500, 1000, 2000, 3000, 10_000):
        assert epsilon_at(schedule, steps) == pytest.approx(module.epsilon_schedule.update(steps), abs=1e-6)


def test_a_random_action_is_one_that_rllib_would_take() -> None:
    """One that isn't masked by minus infinity. Where all Q-values are zero any will do, and NaN is not hidden."""
    noise = torch.from_numpy(np.random.default_rng(0).gumbel(size=(3000, 3)).astype(np.float32))
    everything = torch.ones(3000, 1)
    masked = torch.tensor([0.5, -float("inf"), 0.1]).expand(3000, 3)
    actions, logp = draw(masked, noise, everything)
    assert set(actions.flatten().tolist()) == {0, 2} and logp.exp().allclose(torch.tensor(0.5))
    actions, _ = draw(torch.zeros(3000, 3), noise, everything)
    assert set(actions.flatten().tolist()) == {0, 1, 2}
    _, logp = draw(torch.full((3000, 3), float("nan")), noise, everything)
    assert logp.isnan().all()


class Optimist(DefaultDQNTorchRLModule):
    """Explores in a way of its own."""

    def _forward_exploration(self, batch: Any, t: int) -> Any:
        return self._forward_inference(batch)


def test_a_module_that_explores_in_its_own_way_is_not_taken_for_dqns() -> None:
    config = DQNConfig().environment(observation_space=OBS, action_space=THREE)
    config.rl_module(rl_module_spec=RLModuleSpec(module_class=Optimist))
    module = config.get_rl_module_spec(spaces={DEFAULT_MODULE_ID: (OBS, THREE)}, inference_only=True).build()
    assert epsilon_schedule(module) == ()
    with pytest.raises(PolicyError, match="Optimist"):
        export_policy(module, OBS, THREE)


def test_a_schedule_that_does_not_rise_is_refused() -> None:
    manifest, graph = unpack_policy(made("dueling")[1])
    import msgspec

    broken = msgspec.structs.replace(manifest, epsilon=((0.0, 1.0), (5.0, 0.5), (5.0, 0.1)))
    with pytest.raises(PolicyError, match="must rise in env steps"):
        unpack_policy(pack_policy(broken, graph))


# ---- SAC


@pytest.mark.parametrize("way", ["exported", "service"])
def test_sac_draws_from_rllibs_distribution(way: str) -> None:
    module, policy, actor = made("sac")[0], policy_of("sac"), actor_of("sac", 0)
    one = np.repeat(some(1), MANY, 0)
    if way == "exported":
        acted = policy.act(one)
        actions, logp, inputs, env = acted.actions, acted.action_logp, acted.action_dist_inputs, acted.env_actions
    else:
        columns = actor.act(one, True)
        actions, logp, inputs, env = (
            columns[n] for n in ("actions", "action_logp", "action_dist_inputs", "env_actions")
        )
    theirs = module.forward_exploration({Columns.OBS: torch.from_numpy(one)})[Columns.ACTION_DIST_INPUTS]
    np.testing.assert_allclose(inputs, theirs.detach().numpy(), atol=1e-5)
    distribution = module.get_exploration_action_dist_cls().from_logits(torch.from_numpy(np.asarray(inputs)))
    expected = distribution.logp(torch.from_numpy(np.asarray(actions))).numpy()
    inside = np.abs(actions).max(1) < 0.999  # at the very ends the inverse of tanh is rounding alone
    assert inside.mean() > 0.5
    np.testing.assert_allclose(logp[inside], expected[inside], atol=5e-3)
    torch.manual_seed(0)
    drawn = distribution.sample().numpy()
    for quantile in (0.1, 0.5, 0.9):
        below = (actions < np.quantile(drawn, quantile, 0)).mean(0)  # of two samples of 8,000: five times its deviation
        np.testing.assert_allclose(below, quantile, atol=0.04)
    np.testing.assert_allclose(env[:50], [unsquash_action(a, TORQUES) for a in actions[:50]], rtol=1e-5, atol=1e-5)


def test_without_exploring_sac_does_what_rllib_does() -> None:
    """Its deterministic action is the mean as it is, not squashed; the environment gets it clipped."""
    module, policy, actor = made("sac")[0], policy_of("sac"), actor_of("sac", 0)
    rows = some(100)
    inputs = module.forward_inference({Columns.OBS: torch.from_numpy(rows)})[Columns.ACTION_DIST_INPUTS]
    greedy = module.get_inference_action_dist_cls().from_logits(inputs).to_deterministic().sample().detach().numpy()
    acted, answered = policy.act(rows, explore=False), actor.act(rows, False)
    for actions, env in ((acted.actions, acted.env_actions), (answered["actions"], answered["env_actions"])):
        np.testing.assert_allclose(actions, greedy, atol=1e-5)
        np.testing.assert_allclose(env, [unsquash_action(a, TORQUES) for a in greedy], rtol=1e-5, atol=1e-5)


def test_sac_with_discrete_actions_draws_from_its_logits() -> None:
    module, policy = made("sac_discrete")[0], policy_of("sac_discrete")
    one = np.repeat(some(1), MANY, 0)
    acted = policy.act(one)
    logits = module.forward_exploration({Columns.OBS: torch.from_numpy(one[:1])})[Columns.ACTION_DIST_INPUTS]
    np.testing.assert_allclose(shares(acted.actions), torch.softmax(logits[0], -1).detach().numpy(), atol=0.025)
