"""The crew of a training with several agents: its modules exported, and its mapping asked many times.

`policy_mapping_fn(agent_id, episode)` is the user's Python and runs here alone. Simulators get its answers for some
made-up episodes, and each of their episodes takes one of them. That is the same to a mapping that goes by the agent,
draws at random, or spreads episodes by their id; one that looks into the episode's data sees an empty one.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import msgspec
import numpy as np
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.utils.replay_buffers.multi_agent_episode_buffer import MultiAgentEpisodeReplayBuffer

from rllink_zmq.errors import PolicyError, SettingsError, SpaceError
from rllink_zmq.fragments import layout_of_spaces
from rllink_zmq.messages import MAX_MODULE_ID, MAX_MODULES, AgentId
from rllink_zmq.policy import PolicyManifest, pack_policy
from rllink_zmq.policy_agents import NOBODY, Crew, CrewModule, Draw, manifests, pack_crew, unpack_crew
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.export import export_policy
from rllink_zmq.rllib.export_connectors import check_agents_connectors
from rllink_zmq.rllib.flattening import Flattening
from rllink_zmq.rllib.following import lookback_of
from rllink_zmq.rllib.following_agents import try_following_agents
from rllink_zmq.rllib.pieces import pipeline_of, seen_spaces
from rllink_zmq.rllib.pipelines import NeedsEpisode, RefusedPiece
from rllink_zmq.rllib.pipelines_agents import AgentsPipelines, agents_of
from rllink_zmq.rllib.policies import followed, remote_manifest
from rllink_zmq.rllib.settings import explores, style_of
from rllink_zmq.rllib.trainable import NO_MEMORY_OF_AGENTS
from rllink_zmq.spaces import agents_to_wire, to_wire

logger = logging.getLogger("rllink_zmq")

BUFFERS = ("MultiAgentEpisodeReplayBuffer", "MultiAgentPrioritizedEpisodeReplayBuffer")
"""RLlib's replay buffers for several agents, by their names in a config."""

EPISODES = 64
"""Made-up episodes that the mapping is asked for."""


class CrewManifest(NamedTuple):
    """What runners must know of the modules: each one's manifest, and the agents that it may act for."""

    modules: dict[str, PolicyManifest]
    agents: dict[str, list[AgentId]]

    @classmethod
    def of(cls, blob: bytes) -> CrewManifest:
        crew, policies = unpack_crew(blob)
        draws = [draw.modules for draw in crew.draws]
        agents = {module.id: acts_for(i, crew.agents, draws) for i, module in enumerate(crew.modules)}
        return cls(manifests(crew, policies), agents)


def acts_for(module: int, agents: Sequence[AgentId], draws: Sequence[Sequence[int]]) -> list[AgentId]:
    """The agents that the module of this index may act for."""
    return [agent for i, agent in enumerate(agents) if any(draw[i] == module for draw in draws)]


def connectors_of(config: AlgorithmConfig) -> tuple[dict[AgentId, Flattening], str]:
    """Whose observations the exported policies flatten; and why `config` has connectors that they can't hold, or ''."""
    try:
        return check_agents_connectors(config), ""
    except PolicyError as error:
        return {}, str(error)


def stand_in(config: AlgorithmConfig, module: RLModule) -> list[AgentId]:
    """An agent that sees and does what `module` takes, for one that acts for nobody any more: what is still asked of it
    is asked as before. None where there is no such agent."""
    action_spaces = agents_of(config)[1]
    for agent, seen in seen_spaces(config).items():
        if (seen, action_spaces.get(agent)) == (module.observation_space, module.action_space):
            return [agent]
    return []


def crew_of(config: AlgorithmConfig, module: MultiRLModule, exported: dict[bytes, bytes] | None = None) -> bytes:
    """The blob of all modules of `module` behind the connectors of `config`, and of the mapping. Where one can't be
    exported a warning says why, and that simulators have to ask. `exported`: what is known of earlier calls with this
    config, and grows: an export takes seconds, and RLlib's modules of one architecture need one. Raises `PolicyError`,
    with the module's name, for one that runners can't act by either, and `SettingsError`, with the agent's, for a
    mapping that names no module."""
    exported = {} if exported is None else exported
    flattenings, why = connectors_of(config)
    around = AgentsPipelines(config, learns=pipeline_of(config)) if why else None
    if why:
        logger.warning("simulators have to ask for all actions: %s", why)
    observation_spaces, action_spaces = agents_of(config)
    agents = list(observation_spaces)
    ids = sorted(map(str, module.keys()))
    check_module_ids(ids)
    draws, failures = ask_mapping(config, agents, ids)
    acting = {name: acts_for(i, agents, [draw.modules for draw in draws]) for i, name in enumerate(ids)}
    acting = {name: mine or stand_in(config, module[name]) for name, mine in acting.items()}
    if around is not None:
        casts = [
            {agent: ids[i] for agent, i in zip(agents, draw.modules, strict=True) if i != NOBODY} for draw in draws
        ]
        behind = _behind_connectors(config, module, around, acting, casts, why)
    blobs: list[bytes] = []
    places: dict[bytes, int] = {}
    modules = []
    for name in ids:
        sees = _spaces_of(name, acting[name], observation_spaces, action_spaces, flattenings)
        if around is not None and acting[name]:
            blob = behind[name]
        else:
            blob = _export(config, module, name, sees, exported)
        modules.append(CrewModule(name, places.setdefault(blob, len(places)), is_trained(config, name)))
        if len(blobs) < len(places):
            blobs.append(blob)
    return pack_crew(Crew(1, tuple(agents), tuple(modules), tuple(draws), failures), blobs)


def check_multi_agent(config: AlgorithmConfig) -> None:
    """Raises `SettingsError` for what can't be trained with several agents."""
    if style_of(config) == "exact":
        _check_buffer(config)
    check_module_ids(sorted(map(str, config.policies)))


def _check_buffer(config: AlgorithmConfig) -> None:
    """Raises `SettingsError` for a replay buffer that holds no episodes of several agents: RLlib's default."""
    kind = config.replay_buffer_config["type"]
    name = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__
    fits = name in BUFFERS if isinstance(kind, str) else issubclass(kind, MultiAgentEpisodeReplayBuffer)
    if not fits:
        raise SettingsError(
            f"replay_buffer_config={{'type': {name!r}}} holds no episodes of several agents: "
            f"config.training(replay_buffer_config={{'type': 'MultiAgentPrioritizedEpisodeReplayBuffer', 'capacity': "
            f"50000, 'alpha': 0.6, 'beta': 0.4}}), say, or 'MultiAgentEpisodeReplayBuffer'"
        )


def check_module_ids(ids: Sequence[str]) -> None:
    """Raises `SettingsError` for module ids that can't travel."""
    if len(ids) > MAX_MODULES:
        raise SettingsError(f"{len(ids)} policies; at most {MAX_MODULES} travel")
    for name in ids:
        if not 1 <= len(name) <= MAX_MODULE_ID or "/" in name:
            raise SettingsError(f"the policy id {name!r}: 1 to {MAX_MODULE_ID} characters without a '/' travel")


def dict_of_agents(spaces: Mapping[AgentId, gym.Space[Any]]) -> gym.spaces.Dict:
    """As a config has them. Ids may be integers, which Gymnasium takes and its types don't know."""
    return gym.spaces.Dict(dict(spaces))  # type: ignore[arg-type]


def spaces_of_agents(env: Any) -> tuple[gym.spaces.Dict, gym.spaces.Dict]:
    """Of a `MultiAgentEnv`: of all agents that there may be."""
    agents = list(env.possible_agents)
    if not agents:
        raise SettingsError(
            f"{type(env).__name__} names no possible_agents: give it all that there may be, or the spaces of each to "
            f"config.environment(observation_space=..., action_space=...)"
        )
    return (
        dict_of_agents({agent: env.get_observation_space(agent) for agent in agents}),
        dict_of_agents({agent: env.get_action_space(agent) for agent in agents}),
    )


def check_agents(observation_space: Any, action_space: Any) -> None:
    """Raises `SettingsError` unless these are of several agents, and `SpaceError`, with the agent's name, for one that
    can't travel."""
    if not (isinstance(observation_space, gym.spaces.Dict) and isinstance(action_space, gym.spaces.Dict)):
        raise SettingsError(
            "a multi-agent config needs the spaces of each agent: config.environment(observation_space="
            "gymnasium.spaces.Dict({agent: space, ...}), action_space=...)"
        )
    agents_to_wire(dict(observation_space.spaces.items()), dict(action_space.spaces.items()))
    for agent, space in observation_space.spaces.items():
        try:
            layout_of_spaces(space, action_space.spaces[agent])
        except SpaceError as e:
            raise SpaceError(f"agent {agent!r}: {e}") from None


def is_trained(config: AlgorithmConfig, module: str) -> bool:
    """Whether the learner changes this module's weights."""
    trained = config.policies_to_train
    if trained is None:
        return True
    return bool(trained(module, None)) if callable(trained) else module in trained


def ask_mapping(
    config: AlgorithmConfig, agents: Sequence[AgentId], modules: Sequence[str]
) -> tuple[list[Draw], dict[AgentId, str]]:
    """What `policy_mapping_fn` answers: its draws, and why it fails for an agent. Raises `SettingsError` when it fails
    for all of them."""
    counts: Counter[tuple[int, ...]] = Counter()
    failures: dict[AgentId, str] = {}
    for _ in range(EPISODES):
        episode = MultiAgentEpisode(agent_to_module_mapping_fn=config.policy_mapping_fn)
        draw = []
        for agent in agents:
            try:
                module = config.policy_mapping_fn(agent, episode)
            except Exception as e:  # the user's function: whoever has such an agent is told
                failures[agent] = f"policy_mapping_fn({agent!r}, episode) raises {type(e).__name__}: {e}"[:4000]
                draw.append(NOBODY)
                continue
            if module not in modules:
                failures[agent] = (
                    f"policy_mapping_fn({agent!r}, episode) answers {module!r}, which is none of the policies: "
                    f"{', '.join(modules)}"
                )[:4000]
                draw.append(NOBODY)
                continue
            draw.append(modules.index(module))
        counts[tuple(draw)] += 1
    if all(set(draw) == {NOBODY} for draw in counts):
        raise SettingsError(f"no agent is mapped to a policy: {next(iter(failures.values()))}")
    return [Draw(count, draw) for draw, count in counts.items()], failures


class _Sees(NamedTuple):
    """What a module's agents see and do, and what is done to their observations before it sees them."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    flattening: Flattening | None = None


def _spaces_of(
    module: str,
    agents: Sequence[AgentId],
    observation_spaces: Mapping[AgentId, gym.Space[Any]],
    action_spaces: Mapping[AgentId, gym.Space[Any]],
    flattenings: Mapping[AgentId, Flattening],
) -> _Sees | None:
    """Of the agents that it may act for; None where there is none. Raises `SettingsError` where they differ."""
    for agent in agents[1:]:
        first = agents[0]
        if (observation_spaces[agent], action_spaces[agent]) != (observation_spaces[first], action_spaces[first]):
            raise SettingsError(
                f"the policy '{module}' acts for the agents {first!r} and {agent!r}, whose spaces differ: give them "
                f"policies of their own"
            )
    if not agents:
        return None
    agent = agents[0]
    return _Sees(observation_spaces[agent], action_spaces[agent], flattenings.get(agent))


def _export(
    config: AlgorithmConfig,
    module: MultiRLModule,
    name: str,
    sees: _Sees | None,
    exported: dict[bytes, bytes],
) -> bytes:
    single = module[name]
    _check_memory(config, module, name)
    observation_space, action_space, flattening = sees or _Sees(single.observation_space, single.action_space)
    key = _architecture(single, observation_space, action_space, flattening)
    if key in exported:
        return exported[key]
    try:
        blob = export_policy(
            single,
            observation_space,
            action_space,
            normalize_actions=bool(config.normalize_actions),
            clip_actions=bool(config.clip_actions),
            explores=explores(config)[0],
            evaluation_explores=explores(config)[1],
            flattening=flattening,
        )
    except PolicyError as error:
        why = f"the policy '{name}': {error}"
        blob = _remote_policy(config, single, observation_space, action_space, flattening, why)
        logger.warning("simulators have to ask for the actions of this policy: the policy '%s': %s", name, error)
        return blob
    if key:
        exported[key] = blob
    return blob


def _behind_connectors(
    config: AlgorithmConfig,
    module: MultiRLModule,
    around: AgentsPipelines,
    agents: Mapping[str, Sequence[AgentId]],
    casts: Sequence[Mapping[AgentId, str]],
    why: str,
) -> dict[str, bytes]:
    """The blobs of modules that runners alone act by, behind connectors of the user's own. `agents`: for whom each may
    act; `casts`: who acts by which, in several episodes. Raises `PolicyError`, with the piece that no runner could act
    behind."""
    told: dict[str, dict[str, Any]] = {}
    try:
        for name, mine in agents.items():
            _check_memory(config, module, name)
            pipelines = around.of(name, mine) if mine else None
            if pipelines is None:
                continue
            inputs = pipelines.check_agents(module, casts[0])
            connectors = pipelines.room(config)
            told[name] = {
                "action_dist_inputs": inputs, "connectors": connectors, "lookback": pipelines.lookback,
            }  # fmt: skip
    except RefusedPiece:
        raise
    except PolicyError as error:  # perhaps a piece fails because it looks for other agents
        logger.warning("the policy '%s': %s", name, error)
        # The same whatever policies there are: another reason would be another policy.
        needs = isinstance(error, NeedsEpisode)
        why = followed(why, error if needs else "the connectors fail where an agent is alone in its episode")
        stand_ins = [
            {**casts[0], mine[0]: name}
            for name, mine in agents.items()
            if mine and all(name not in cast.values() for cast in casts)
        ]
        spaces, inputs_of = try_following_agents(config, module, [*casts, *stand_ins])
        told = {
            name: {
                "action_dist_inputs": inputs_of[name], "lookback": lookback_of(config),
                "seen": to_wire(spaces[mine[0]]),
            }
            for name, mine in agents.items()
            if mine
        }  # fmt: skip
    blobs = {}
    for name, about in told.items():
        sees = around.of(name, agents[name])
        try:
            manifest = remote_manifest(
                module[name].unwrapped(), sees.observation_space, sees.action_space, why,
                explores=explores(config)[0], evaluation_explores=explores(config)[1], **about,
            )  # fmt: skip
        except PolicyError as error:
            raise PolicyError(f"the policy '{name}': {error}") from error
        blobs[name] = pack_policy(manifest, b"")
    return blobs


def _check_memory(config: AlgorithmConfig, module: MultiRLModule, name: str) -> None:
    if style_of(config) == "exact" and module[name].is_stateful():
        raise SettingsError(f"the policy '{name}' has a memory. {NO_MEMORY_OF_AGENTS}")


def _architecture(
    module: RLModule, observation_space: gym.Space[Any], action_space: gym.Space[Any], flattening: Flattening | None
) -> bytes:
    """The same for modules of RLlib's own that differ in their weights alone; b'' for a class that isn't RLlib's."""
    kind, catalog = type(module.unwrapped()), type(module.catalog)
    if not all(each.__module__.startswith("ray.rllib.") for each in (kind, catalog)):
        return b""
    built = (
        f"{kind.__module__}.{kind.__qualname__} {catalog.__qualname__} {module.model_config} {flattening is not None}"
    )
    return msgspec.msgpack.encode((built, to_wire(observation_space), to_wire(action_space)))


def _remote_policy(
    config: AlgorithmConfig,
    module: RLModule,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    flattening: Flattening | None,
    why: str,
) -> bytes:
    """The blob of a module that runners alone act by. Raises `PolicyError`, with `why` it can't be exported, where they
    can't either."""
    try:
        manifest = remote_manifest(
            module, observation_space, action_space, why, action_dist_inputs=1, evaluation_explores=explores(config)[1]
        )
        normalize, clip = bool(config.normalize_actions), bool(config.clip_actions)
        actor = ModuleActor(module, manifest, action_space, normalize, clip, flattening=flattening)
        tried = actor.act(np.zeros((2, *actor.shape), actor.dtype), explore=True)
    except Exception as error:  # a user's module
        text = f"{why}; and runners can't act by it: {type(error).__name__}: {error}"
        raise PolicyError(text) from error
    inputs = tried["action_dist_inputs"].reshape(2, -1).shape[1]
    return pack_policy(msgspec.structs.replace(manifest, action_dist_inputs=inputs), b"")
