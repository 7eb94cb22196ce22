"""`ZmqMultiAgentEnvRunner`: RLlib's MultiAgentEnvRunner without an environment. Its data come from the broker."""

from __future__ import annotations

import logging
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule, MultiRLModuleSpec
from ray.rllib.env.multi_agent_env_runner import MultiAgentEnvRunner
from ray.rllib.utils.metrics import (
    NUM_AGENT_STEPS_SAMPLED,
    NUM_AGENT_STEPS_SAMPLED_LIFETIME,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    NUM_EPISODES_LIFETIME,
    NUM_MODULE_STEPS_SAMPLED,
    NUM_MODULE_STEPS_SAMPLED_LIFETIME,
)
from ray.rllib.utils.typing import ResultDict, StateDict

from rllink_zmq.messages import FRAGMENT, AgentId
from rllink_zmq.policy import PolicyManifest
from rllink_zmq.rllib.actors import ModuleActor, PipelineActor
from rllink_zmq.rllib.audit import runner_log
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.flattening import FlattenedAgents
from rllink_zmq.rllib.following import lookback_of
from rllink_zmq.rllib.following_agents import FollowedAgents, FollowingAgents, seen_of
from rllink_zmq.rllib.link import RunnerLink
from rllink_zmq.rllib.multi_agent_episodes import AgentsFinished, MultiAgentEpisodeBuilder
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, connectors_of, is_trained, stand_in
from rllink_zmq.rllib.pipelines_agents import AgentsConnectors, AgentsPipelines, agents_of
from rllink_zmq.rllib.runner import Held, ZmqEnvRunner
from rllink_zmq.rllib.service import MAX_ROWS
from rllink_zmq.rllib.service_agents import AgentsActService
from rllink_zmq.rllib.settings import counts_agent_steps, explores, longest_chunk, trainer_terms

logger = logging.getLogger("rllink_zmq")


class ZmqMultiAgentEnvRunner(ZmqEnvRunner):
    """Hands RLlib the multi-agent episodes that simulators sent to the broker, and offers each module's weights by
    itself: one that isn't trained once, and again when it is given other weights."""

    kin = MultiAgentEnvRunner

    def make_module(self) -> None:
        spec = self.config.get_multi_rl_module_spec(env=None, spaces=self.get_spaces(), inference_only=True)
        self.module = spec.build()

    def _module_spaces(self) -> dict[str, tuple[gym.Space[Any], gym.Space[Any]]]:
        observation, action = self._env_to_module.observation_space, self._env_to_module.action_space
        return {module: (observation[module], action[module]) for module in observation.spaces}

    @property
    def _modules(self) -> MultiRLModule:
        assert isinstance(self.module, MultiRLModule)
        return self.module

    def _make_builder(self) -> MultiAgentEpisodeBuilder:
        config = self.config
        evaluates, modules = config.in_evaluation, self._modules
        self._flattenings, own = connectors_of(config)
        observation_spaces, action_spaces = agents_of(config)
        manifest: Any = self._manifest
        seen = {} if manifest is None else seen_of(manifest.modules, manifest.agents)
        self._seen: FollowedAgents | None = None
        connectors: AgentsConnectors | None = None
        if seen:
            observation_spaces |= seen
            self._seen = FollowedAgents(config, observation_spaces, lookback_of(config))
        elif own:
            learns = None if evaluates else self._env_to_module
            connectors = AgentsConnectors(config, modules, learns, None if evaluates else self._filters)
        self._behind = connectors
        return MultiAgentEpisodeBuilder(
            observation_spaces, action_spaces, modules, config.policy_mapping_fn,
            float("inf") if evaluates else longest_chunk(config),
            self._seen or connectors or FlattenedAgents(self._flattenings),
            None if evaluates else runner_log(self.settings.audit),
            needs_logp=trainer_terms(config).needs_logp,
        )  # fmt: skip

    def _actor(
        self,
        name: str,
        manifest: PolicyManifest,
        agents: Sequence[AgentId],
        around: AgentsPipelines | None,
        sampled: Callable[[], int],
    ) -> ModuleActor:
        """Acts by the module `name` for `agents`: for one that sees as they do, where there is none any more."""
        config, modules = self.config, self._modules
        module = modules[name]
        agents = agents or stand_in(config, module)
        if around is not None and agents:
            pipelines = around.of(name, agents, manifest.lookback).apart()
            return PipelineActor(module, manifest, pipelines, self._device, self._filters.published, sampled)
        return ModuleActor(
            module, manifest, module.action_space, bool(config.normalize_actions), bool(config.clip_actions),
            self._device, sampled, self._flattenings.get(agents[0]) if agents else None,
        )  # fmt: skip

    # ---- weights

    @property
    def _follows(self) -> bool:
        manifest: Any = self._manifest
        return _follows(manifest)

    def _take_manifest(self, manifest: Any) -> None:
        self._versions: dict[str, int] = {}
        self._frozen: dict[str, int] = {}
        self._since = 0
        self._know(manifest)

    def _know(self, manifest: Any) -> None:
        assert isinstance(manifest, CrewManifest)
        before: Any = self._manifest
        self._manifest = manifest  # type: ignore[assignment]
        if _follows(manifest) or _follows(before):
            self._builder = self._make_builder()  # of what runners have seen, or of what simulators have
        if self._seen is not None:
            self._seen.recast(manifest.modules)
        self._builder.dist_inputs = {name: each.action_dist_inputs for name, each in manifest.modules.items()}
        if self._behind is not None:
            self._behind.recast({name: each.lookback for name, each in manifest.modules.items()})
            self._builder.recast()

    def have_modules(self, spec: MultiRLModuleSpec) -> None:
        """Those of the training as it is now; this runner was made with those that it began with."""
        module: Any = self.module
        for name in set(module.keys()) - spec.rl_module_specs.keys():
            module.remove_module(name)
        for name in spec.rl_module_specs.keys() - set(module.keys()):
            module.add_module(name, spec.rl_module_specs[name].build())

    def recast(self, manifest: CrewManifest) -> None:
        """The run goes on with these modules. One that is new is offered with the version of the newest weights."""
        self._know(manifest)
        if self.held is not None:
            self._since = self.held.version
            self._offer(self.held)
        if self._service is not None and self._link is not None:
            self._service.stop()
            self._service = None
            self._serve_actions(self._link, manifest)

    def _serve_actions(self, link: RunnerLink, manifest: Any) -> None:
        """Answer simulators that ask for single actions: each module by its weights that are published."""
        multi: Any = self.module
        if multi is None:
            return
        config, settings = self.config, self.settings

        def sampled() -> int:
            return link.pool.sampled

        try:
            around = AgentsPipelines(config, self._device) if self._behind is not None else None
            actors = {
                name: self._actor(name, about, manifest.agents[name], around, sampled)
                for name, about in manifest.modules.items()
            }
            following = None
            if self._follows:
                agents = {name: mine or stand_in(config, self._modules[name]) for name, mine in manifest.agents.items()}
                following = FollowingAgents(
                    config, actors, agents, self._env_to_module, self._following, self._device, sampled
                )
        except Exception as e:  # a module of the user's that can't be copied, say
            logger.warning("runner %s computes no single actions: %s: %s", self.worker_index, type(e).__name__, e)
            return
        self._service = AgentsActService(
            settings.broker, link.run, link.session.name, actors, max_rows=settings.act_rows or MAX_ROWS,
            max_wait=settings.act_wait_s, explores=explores(config)[0], rounds=self._rules.style == "round",
            following=following,
        )  # fmt: skip
        link.on_left = self._service.stop

    def _hold(self, weights: StateDict) -> Held:
        """RLlib hands out the weights of those modules alone that have learned."""
        before = self.held.weights if self.held is not None else {}
        self._given = frozenset(weights)
        if self._connectors:
            self._given = frozenset({**before, **weights})  # what its connectors do is new with all of them
        return Held(self._weights_seq_no, {**before, **weights}, self._connectors)

    def _offer(self, held: Held) -> None:
        manifest: Any = self._manifest
        if self._link is None or manifest is None:
            return
        for name, about in manifest.modules.items():
            known = self._versions.get(name)
            if name not in held.weights or (known is not None and (name not in self._given or held.version <= known)):
                continue
            version = held.version
            if not self._may_travel(held, about):
                return
            load = partial(weights_body, about, held.weights[name], connectors=held.connectors)
            if not is_trained(self.config, name):
                # It is handed out as it was with the others, or with weights that somebody has set.
                checksum = zlib.crc32(load())
                if known is not None and checksum == self._frozen.get(name):
                    self._filters.own(known, held.connectors)  # what it acts behind is still this
                    continue
                self._frozen[name] = checksum
                version = self._since if known is None else held.version
            self._versions[name] = version
            self._filters.own(version, held.connectors)
            self._link.offer(version, about.weights_bytes, load, name)

    # ---- metrics

    def _report(self, link: RunnerLink, chunks: Sequence[Any], fragments: Sequence[FRAGMENT], steps: int) -> list[Any]:
        agents: Counter[AgentId] = Counter()
        modules: Counter[str] = Counter()
        for chunk in chunks:
            for agent, single in chunk.episode.agent_episodes.items() if chunk.episode is not None else ():
                agents[agent] += len(single)
                modules[single.module_id] += len(single)
        for counts, now, ever in (
            (agents, NUM_AGENT_STEPS_SAMPLED, NUM_AGENT_STEPS_SAMPLED_LIFETIME),
            (modules, NUM_MODULE_STEPS_SAMPLED, NUM_MODULE_STEPS_SAMPLED_LIFETIME),
        ):
            for name, count in counts.items():
                self.metrics.log_value((now, str(name)), count, reduce="sum")
                self.metrics.log_value((ever, str(name)), count, reduce="lifetime_sum")
        return super()._report(link, chunks, fragments, steps)

    def _increase_metrics(self, steps: int, episodes: int) -> None:
        log = self.metrics.log_value
        log(NUM_ENV_STEPS_SAMPLED, steps, reduce="sum")
        log(NUM_ENV_STEPS_SAMPLED_LIFETIME, steps, reduce="lifetime_sum", with_throughput=True)
        log(NUM_EPISODES, episodes, reduce="sum")
        log(NUM_EPISODES_LIFETIME, episodes, reduce="lifetime_sum")
        if counts_agent_steps(self.config):
            for agent in self.config.observation_space.spaces:  # RLlib adds up what they sampled, also where none did
                log((NUM_AGENT_STEPS_SAMPLED, str(agent)), 0, reduce="sum")

    def get_metrics(self) -> ResultDict:
        """What `MultiAgentEnvRunner` reports, and `rllink` as `ZmqEnvRunner` does."""
        ended: Sequence[Any] = self._finished
        for finished in ended:
            assert isinstance(finished, AgentsFinished)
            MultiAgentEnvRunner._log_episode_metrics(
                self, finished.length, finished.total, finished.seconds, *_by_agent(finished.agents)
            )
        self._finished.clear()
        return self.metrics.reduce()


def _follows(manifest: CrewManifest | None) -> bool:
    """Whether runners follow the episodes of these modules."""
    return manifest is not None and any(about.seen is not None for about in manifest.modules.values())


def _by_agent(
    agents: Mapping[AgentId, tuple[str, int, float]],
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Returns of agents, returns of modules, steps of agents."""
    returns = {str(agent): total for agent, (_, _, total) in agents.items()}
    modules: defaultdict[str, float] = defaultdict(float)
    for module, _, total in agents.values():
        modules[module] += total
    return returns, modules, {str(agent): steps for agent, (_, steps, _) in agents.items()}


__all__ = ["ZmqMultiAgentEnvRunner"]
