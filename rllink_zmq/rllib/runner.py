"""`ZmqEnvRunner`: RLlib's EnvRunner without an environment. Its data come from the broker."""

from __future__ import annotations

import copy
import logging
import math
import socket
import threading
import time
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium as gym
import ray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core import (
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_MODULE_TO_ENV_CONNECTOR,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.framework import get_device
from ray.rllib.utils.metrics import (
    CONNECTOR_PIPELINE_TIMER,
    ENV_RESET_TIMER,
    ENV_RUNNER_STATE_SERVER_PULL_TIMER,
    ENV_STEP_TIMER,
    ENV_TO_MODULE_CONNECTOR,
    MODULE_TO_ENV_CONNECTOR,
    RLMODULE_INFERENCE_TIMER,
    SAMPLE_TIMER,
    TIME_BETWEEN_SAMPLING,
    WEIGHTS_SEQ_NO,
)
from ray.rllib.utils.typing import ResultDict, StateDict

from rllink_zmq.errors import PolicyError, ProtocolError, RllinkError
from rllink_zmq.messages import FRAGMENT
from rllink_zmq.policy import PolicyManifest
from rllink_zmq.rllib.actors import ModuleActor, PipelineActor
from rllink_zmq.rllib.audit import runner_log
from rllink_zmq.rllib.episodes import Built, EpisodeBuilder, Finished, Piece, cut
from rllink_zmq.rllib.evaluation import EvaluationLink
from rllink_zmq.rllib.exploration import epsilon_schedule
from rllink_zmq.rllib.export import weights_body
from rllink_zmq.rllib.export_connectors import own_flattening
from rllink_zmq.rllib.following import FollowedFragments, FollowingActor
from rllink_zmq.rllib.link import RunnerLink
from rllink_zmq.rllib.pieces import has_own_connectors, state_bytes
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.rewriting import Filters, FragmentConnectors, UnknownFilter
from rllink_zmq.rllib.samples import Samples
from rllink_zmq.rllib.service import MAX_ROWS, ActService
from rllink_zmq.rllib.settings import (
    LinkSettings,
    counts_agent_steps,
    explores,
    longest_chunk,
    sampling_rules,
    style_of,
    trainer_terms,
)
from rllink_zmq.sampling_evaluation import PAST, Wanted
from rllink_zmq.session_runner import Lease
from rllink_zmq.spaces import from_wire

logger = logging.getLogger("rllink_zmq")

RLLINK = "rllink"
"""The key of this package's own metrics beneath RLlib's `env_runners`."""


TIMERS: dict[str, tuple[str, ...]] = {
    "reset": (ENV_RESET_TIMER,),
    "observation": (ENV_TO_MODULE_CONNECTOR, CONNECTOR_PIPELINE_TIMER),
    "inference": (RLMODULE_INFERENCE_TIMER,),
    "action": (MODULE_TO_ENV_CONNECTOR, CONNECTOR_PIPELINE_TIMER),
}
"""Where RLlib's own runner reports what a simulator has timed."""


LAST_LAGS = 100
"""Calls of `sample()` whose largest lag is told."""

TOLD = 16
"""Values that one call of `sample()` logs of a kind, at most."""


FILTERS_KEPT = 10_000
"""Versions back whose filters a runner knows: DQN makes hundreds a second, and allows any lag."""


class Held(NamedTuple):
    """The newest weights that a runner has (parameter name -> array), and the state of the connectors with them."""

    version: int
    weights: StateDict
    connectors: bytes = b""

    def body(self, manifest: PolicyManifest) -> bytes:
        """As simulators get them."""
        return weights_body(manifest, self.weights, connectors=self.connectors)


class ZmqEnvRunner(EnvRunner, Checkpointable):
    """Hands RLlib the episodes that simulators sent to the broker.

    Made by RLlib, as a Ray actor (or in the driver, as the local runner). It joins the broker when the trainer tells
    it the run's id (`join`), offers each version of the weights that RLlib gives it, and takes fragments in `sample()`.
    One of RLlib's evaluation (`config.in_evaluation`) joins as such, and gets what simulators send for that.
    """

    kin: Any = SingleAgentEnvRunner
    """RLlib's own runner, whose ways with states and metrics these are."""

    def __init__(self, *, config: AlgorithmConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        if self.worker_index:
            # An actor of its own: what RLlib says there of its own deprecated names is nobody's to mend.
            logging.getLogger("ray._common.deprecation").setLevel(logging.ERROR)
        self.settings = LinkSettings.of(self.config)
        spaces = (self.config.observation_space, self.config.action_space)
        if not all(isinstance(s, gym.Space) for s in spaces):
            raise RllinkError(
                "ZmqEnvRunner needs the spaces in the config: rllink_zmq.rllib.attach(config, broker) puts them there"
            )
        self.spaces: dict[str, tuple[gym.Space[Any], gym.Space[Any]]] = {
            INPUT_ENV_SPACES: spaces,
            INPUT_ENV_SINGLE_SPACES: spaces,
        }
        self._callbacks: list[RLlibCallback] = [cls() for cls in _as_list(self.config.callbacks_class)]
        gpus = self.config.num_gpus_per_env_runner if self.worker_index else 0
        self._device = device = get_device(self.config, gpus)
        self._env_to_module = self.config.build_env_to_module_connector(env=None, spaces=self.spaces, device=device)
        self.spaces |= self._module_spaces()
        self._module_to_env = self.config.build_module_to_env_connector(env=None, spaces=self.spaces)
        self.module: RLModule | None = None
        self.make_module()
        # RLlib sets this one from outside, on new and on restarted runners alike (APPO, IMPALA).
        self._env_runner_state_server: Any = None
        self._weights_seq_no = 0
        self.held: Held | None = None
        self._link: RunnerLink | None = None
        self._service: ActService | None = None
        self._manifest: PolicyManifest | None = None
        self._run = ""
        self._following = threading.Lock()
        self._rules = sampling_rules(self.config, self.num_workers, self.worker_index or 0)
        self._filters = Filters(min(trainer_terms(self.config).lag_limit + 2, FILTERS_KEPT))
        self._own_connectors = has_own_connectors(self.config)
        self._connectors = self._connectors_now()
        self._builder = self._make_builder()
        self._finished: list[Finished] = []
        self._unusable_reasons: list[str] = []
        self._opened: dict[tuple[bytes, int], list[Piece]] = {}
        self._sampled_at: float | None = None
        self._fragments = 0
        self.on_restored: Any = None
        self.on_stop: Any = None
        self.on_sample: Any = None

    def _module_spaces(self) -> dict[str, tuple[gym.Space[Any], gym.Space[Any]]]:
        """Of each module: behind the env-to-module connectors."""
        return {DEFAULT_MODULE_ID: (self._env_to_module.observation_space, self.config.action_space)}

    def _make_builder(self) -> Any:
        config, evaluates = self.config, self.config.in_evaluation
        # In evaluation nothing is cut into rows, nothing is learned, and the audit is of what is trained on.
        self._pipelines: Pipelines | None = None
        connectors: Any = None
        observation_space = config.observation_space
        if self._manifest is not None and self._manifest.seen is not None:
            observation_space = from_wire(self._manifest.seen)
            connectors = FollowedFragments(observation_space, self._manifest.lookback)
        elif self._own_connectors:
            self._pipelines = Pipelines(config, module=self.module, learns=None if evaluates else self._env_to_module)
            connectors = FragmentConnectors(self._pipelines, None if evaluates else self._filters)
        return EpisodeBuilder(
            observation_space, config.action_space, self.module,
            float("inf") if evaluates else longest_chunk(config),
            None if evaluates else runner_log(self.settings.audit), connectors,
            needs_logp=trainer_terms(config).needs_logp, outputs=not epsilon_schedule(self.module),
        )  # fmt: skip

    # ---- joining

    def join(self, run: str, manifest: PolicyManifest, state: StateDict | None = None) -> bytes:
        """Connect to the broker as a runner of `run` (a new run ends an older connection), and offer the weights.
        Returns the 16 bytes of the new session.

        `state`: the learner's, to be sure of it after a restore: RLlib's own update is dropped while the one before it
        is still on its way to this actor.
        """
        self.leave()
        if self._run not in ("", run):
            self._filters.restart()
            self._builder.forget()  # what RLlib has been restored with may not go as far
            if self.held is not None:
                self._filters.own(self.held.version, self.held.connectors)
        self._run = run
        if state is not None:
            told, self.on_restored = self.on_restored, None  # this is the answer to it
            self._weights_seq_no = 0
            self.set_state(state)
            self.on_restored = told
        index = f"{self.worker_index or 0}"
        host = socket.gethostname()
        self._take_manifest(manifest)
        evaluates = self.config.in_evaluation
        address, local = self.settings.broker, not self.worker_index
        if evaluates:
            self._link = EvaluationLink(address, run, f"evaluator-{index}@{host}", self._unusable, local=local)
        else:
            prepare = self._builder.prepare
            counts = self._counted if counts_agent_steps(self.config) else None
            self._link = RunnerLink(
                address, run, f"runner-{index}@{host}", self._unusable, prepare, counts=counts, local=local
            )
        if self.held is not None:
            self._offer(self.held)
        if not evaluates:
            self._serve_actions(self._link, manifest)
        return self._link.session.session

    def _take_manifest(self, manifest: PolicyManifest) -> None:
        before, self._manifest = self._manifest, manifest
        if manifest.seen != (None if before is None else before.seen):
            self._builder = self._make_builder()  # of what runners have seen, or of what simulators have
        self._builder.dist_inputs = manifest.action_dist_inputs
        if self._pipelines is not None:
            self._pipelines.lookback = manifest.lookback

    def _serve_actions(self, link: RunnerLink, manifest: PolicyManifest) -> None:
        """Answer simulators that ask for single actions, from the first moment on by the weights that are here."""
        if self.module is None:
            return
        config, settings = self.config, self.settings

        def sampled() -> int:
            return link.pool.sampled

        try:
            if manifest.seen is not None:
                actor: ModuleActor = FollowingActor(
                    self.module, manifest, config, self._env_to_module, self._following, self._device, sampled
                )
            elif manifest.remote_only:
                actor = PipelineActor(
                    self.module,
                    manifest,
                    Pipelines(config, self._device, lookback=manifest.lookback),
                    self._device,
                    self._filters.published,
                    sampled,
                )
            else:
                actor = ModuleActor(
                    self.module, manifest, self.spaces[INPUT_ENV_SINGLE_SPACES][1], bool(config.normalize_actions),
                    bool(config.clip_actions), self._device, sampled, own_flattening(config),
                )  # fmt: skip
            if self.held is not None:
                actor.apply(self.held.version, self.held.body(manifest))
        except Exception as e:  # a module of the user's that can't be copied, say
            logger.warning("runner %s computes no single actions: %s: %s", self.worker_index, type(e).__name__, e)
            return
        self._service = ActService(
            settings.broker, link.run, link.session.name, actor, max_rows=settings.act_rows or MAX_ROWS,
            max_wait=settings.act_wait_s, explores=explores(config)[0], rounds=self._rules.style == "round",
        )  # fmt: skip
        link.on_left = self._service.stop

    def leave(self) -> None:
        """Leave the broker. Untaken fragments go to other runners at once."""
        if self._service is not None:
            self._service.stop()
            self._service = None
        if self._link is not None:
            self._link.stop()
            self._link = None
            self._opened.clear()

    @property
    def joined(self) -> bool:
        """Whether it is a runner at the broker."""
        return self._link is not None

    def _offer(self, held: Held) -> None:
        manifest = self._manifest
        if self._link is None or manifest is None:
            return
        if not self._may_travel(held, manifest):
            return
        self._link.offer(held.version, manifest.weights_bytes, lambda: held.body(manifest))

    def _may_travel(self, held: Held, manifest: PolicyManifest) -> bool:
        if manifest.connectors and len(held.connectors) + 8 > manifest.connectors:
            logger.warning(
                "version %d can't travel, simulators keep the one before: the connectors' state has grown to %d bytes, "
                "and when training began it had few enough for %d",
                held.version, len(held.connectors), manifest.connectors - 8,
            )  # fmt: skip
            return False
        # In evaluation the connectors' state may be another one than training's: simulators act by theirs.
        return not (self._own_connectors and self.config.in_evaluation)

    def connectors(self) -> StateDict:
        """The part of a state that is of the env-to-module connectors."""
        with self._following:
            return {COMPONENT_ENV_TO_MODULE_CONNECTOR: copy.deepcopy(self._env_to_module.get_state())}

    # ---- sampling

    def sample(
        self,
        *,
        num_timesteps: int | None = None,
        num_episodes: int | None = None,
        explore: bool | None = None,
        random_actions: bool = False,
        force_reset: bool = False,
    ) -> list[SingleAgentEpisode]:
        """Episode chunks that reached this runner, as `docs/rllib.md` says for each algorithm; in evaluation so many
        whole episodes, or pieces of `num_timesteps` steps together.

        Raises `RllinkError` when asked for what simulators can't serve: random actions, and a number of episodes or
        steps of a runner that trains. No training asks for one, but an evaluation without runners of its own does.
        """
        if random_actions:
            raise RllinkError("simulators act by the policy: random_actions can't be served")
        if not (num_episodes is None and num_timesteps is None) and not self.config.in_evaluation:
            raise RllinkError(
                "this runner trains: for evaluation set config.evaluation(evaluation_interval=...) before attach()"
            )
        if self._sampled_at is not None:
            self.metrics.log_value(TIME_BETWEEN_SAMPLING, time.perf_counter() - self._sampled_at)
        self.pull()
        self.metrics.log_value(WEIGHTS_SEQ_NO, self._weights_seq_no, window=1)
        with self.metrics.log_time(SAMPLE_TIMER):
            if self.config.in_evaluation:
                samples = self._evaluate(num_timesteps, num_episodes, force_reset)
            else:
                samples = self._take()
            make_callback(
                "on_sample_end",
                callbacks_objects=self._callbacks,
                callbacks_functions=self.config.callbacks_on_sample_end,
                kwargs={"env_runner": self, "metrics_logger": self.metrics, "samples": samples},
            )
        self._sampled_at = time.perf_counter()
        return samples

    def _take(self) -> list[SingleAgentEpisode]:
        if self.on_sample is not None:
            self.on_sample()
        link = self._link
        if link is None:
            logger.warning("runner %s was asked for samples before the trainer told it its run", self.worker_index)
            self._log(0, 0, ())
            return []
        rules = self._rules
        if rules.style == "exact":
            return self._draw(link)
        while True:
            leases = link.sample(rules)
            samples = self._hand_over(link, leases)
            if samples or not leases or rules.style == "round":
                return samples
            # All were refused, and an empty answer would end this algorithm's training: on to the next ones.

    def _draw(self, link: RunnerLink) -> list[SingleAgentEpisode]:
        """As many env steps as RLlib's own runner would return, or none."""
        answer = link.draw(self._rules)
        self._count_unusable()
        if answer.fresh:
            self._builder.forget()
        pieces: list[Piece] = []
        began: list[FRAGMENT] = []
        for (message, *_), first, steps in answer.portions:
            key = message.session, message.number
            pieces += cut(self._opened[key], first, steps)
            if not first:
                began.append(message)
            if first + steps == message.steps:
                del self._opened[key]
        return self._report(link, self._builder.join(pieces), began, sum(p.steps for p in answer.portions))

    def _evaluate(self, steps: int | None, episodes: int | None, fresh: bool) -> list[SingleAgentEpisode]:
        link, timeout = self._link, float(self.config.evaluation_sample_timeout_s or 120.0)
        if not isinstance(link, EvaluationLink):
            logger.warning("runner %s was asked to evaluate before the trainer told it its run", self.worker_index)
            time.sleep(timeout + PAST)  # RLlib would ask again at once, for ever
            self._log(0, 0, ())
            return []
        if episodes is None and steps is None:
            steps = int(self.config.get_rollout_fragment_length(self.worker_index or 0))
        more = self.config.evaluation_duration == "auto"
        version = self._weights_seq_no
        if self._own_connectors and style_of(self.config) == "stream":
            # Training's runners have theirs later, while training goes on, and this one offers none.
            version = min(version, max(0, link.session.version))
        wanted = Wanted(episodes, math.ceil(steps or 0), version, fresh, timeout, more)
        leases = link.evaluate(wanted)
        self._count_unusable()
        return self._hand_over(link, leases)

    def _count_unusable(self) -> None:
        unusable, self._unusable_reasons = self._unusable_reasons, []
        for reason in unusable:
            self.metrics.log_value((RLLINK, "dropped", reason), 1, reduce="lifetime_sum")

    def _unusable(self, lease: Lease) -> str:
        """Why this fragment can't be used, or ''. Of one that is to be cut to fit, what it holds is kept."""
        good, refused = self._builder.check([lease])
        for _, error in refused:
            reason = _reason(error)
            self._unusable_reasons.append(reason)
            logger.warning("a fragment was dropped: %s", error)
            return reason
        if self._rules.style == "exact" and not self.config.in_evaluation:
            self._opened[lease.message.session, lease.message.number] = good
        return ""

    def _counted(self, lease: Lease) -> Sequence[int]:
        """How many steps of agents each env step of a fragment completes that is to be cut."""
        pieces: Sequence[Any] = self._opened[lease.message.session, lease.message.number]
        return [count for piece in pieces for count in piece.counted()]

    def _hand_over(self, link: RunnerLink, leases: Sequence[Lease]) -> list[SingleAgentEpisode]:
        """RLlib's episodes of what was taken, and their metrics."""
        chunks, refused = self._builder.build(leases)
        for message, error in refused:
            reason = _reason(error)
            link.drop(message, reason)
            logger.warning("a fragment was dropped: %s", error)
            self.metrics.log_value((RLLINK, "dropped", reason), 1, reduce="lifetime_sum")
        dropped = {id(message) for message, _ in refused}
        kept = [lease.message for lease in leases if id(lease.message) not in dropped]
        return self._report(link, chunks, kept, sum(message.steps for message in kept))

    def _report(
        self, link: RunnerLink, chunks: Sequence[Built], fragments: Sequence[FRAGMENT], steps: int
    ) -> list[SingleAgentEpisode]:
        """RLlib's episodes, of these many steps; their metrics, and those of the fragments that they begin with."""
        samples = Samples(chunk.episode for chunk in chunks if chunk.episode is not None)
        self._finished += [chunk.finished for chunk in chunks if chunk.finished is not None]
        self._log_times(ENV_STEP_TIMER, [c.step_seconds for c in chunks if c.step_seconds is not None])
        told = [timings for chunk in chunks for timings in chunk.timings]
        for timed, timer in TIMERS.items():
            self._log_times(timer, [timings[timed] for timings in told if timed in timings])
        if samples:
            length = sum(map(len, samples))
            for key in ("env_to_module_sum_episodes_length_in", "env_to_module_sum_episodes_length_out"):
                self.metrics.log_value(key, length, reduce="ema")
        link.returning()
        lags = [self._weights_seq_no - message.version for message in fragments]
        self._log(steps, sum(chunk.finished is not None for chunk in chunks), lags)
        self.metrics.log_value((RLLINK, "simulators_connected"), link.pool.simulators, window=1)
        return samples

    def _log_times(self, timer: str | tuple[str, ...], seconds: Sequence[float]) -> None:
        for value in _means(seconds):
            self.metrics.log_value(timer, value, reduce="ema")

    def _log(self, steps: int, episodes: int, lags: Sequence[int]) -> None:
        # Also when nothing came: RLlib reads these keys after every call.
        self._increase_metrics(steps, episodes)
        self.num_env_steps_sampled_lifetime += steps
        if steps:
            self._log_env_steps(self._metrics_num_env_steps_sampled, steps)
        self.metrics.log_value((RLLINK, "fragments"), len(lags), reduce="lifetime_sum")
        for lag in _means([max(0, lag) for lag in lags]):
            self.metrics.log_value((RLLINK, "lag_mean"), lag, window=TOLD)
        if lags:
            self.metrics.log_value((RLLINK, "lag_max"), max(0, *lags), reduce="max", window=LAST_LAGS)

    def _increase_metrics(self, steps: int, episodes: int) -> None:
        SingleAgentEnvRunner._increase_sampled_metrics(self, steps, episodes)

    def sample_get_state_and_metrics(self) -> tuple[ray.ObjectRef, StateDict, StateDict]:
        """APPO's and IMPALA's `sample()`: the episodes go by reference, to the learners and not through the driver."""
        answer: tuple[ray.ObjectRef, StateDict, StateDict] = super().sample_get_state_and_metrics()
        if self._link is not None:
            self._link.returning_ref(answer[0])
        return answer

    def pull(self) -> None:
        """APPO and IMPALA: the weights are fetched from a server, by each runner, at the top of `sample()`."""
        if self._env_runner_state_server is None:
            return
        try:
            with self.metrics.log_time(ENV_RUNNER_STATE_SERVER_PULL_TIMER):
                state = ray.get(self._env_runner_state_server.pull_if_newer.remote(self._weights_seq_no))
        except ray.exceptions.RayError as e:
            logger.warning("the weights could not be pulled (%s), the ones from before stay", type(e).__name__)
            return
        if state is not None:
            self.set_state(state)

    def get_metrics(self) -> ResultDict:
        """What `SingleAgentEnvRunner` reports, and `rllink`: simulators connected, fragments, lag, drops by reason."""
        # All of these are over a window of the last episodes: with hundreds of simulators most would fall out of it.
        window = max(1, math.ceil(self.config.metrics_num_episodes_for_smoothing / (self.config.num_env_runners or 1)))
        for length, total, seconds in self._finished[-window:]:
            SingleAgentEnvRunner._log_episode_metrics(self, length, total, seconds)
        self._finished.clear()
        return self.metrics.reduce()

    # ---- state

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> StateDict:
        with self._following:
            state: StateDict = self.kin.get_state(self, components, not_components=not_components, **kwargs)
            # What pieces keep may change as soon as they see the next observation.
            return copy.deepcopy(state) if self._follows else state

    def set_state(self, state: StateDict) -> None:
        """RLlib's states; weights are offered to the broker. Unlike RLlib's own runner this one follows a version
        number that goes back: the learner was restored from an older checkpoint, and the trainer begins a new run."""
        restored = goes_back = False
        if COMPONENT_RL_MODULE in state:
            seq = state.get(WEIGHTS_SEQ_NO, 0)
            goes_back = 0 < seq < self._weights_seq_no
            restored = goes_back or (self._weights_seq_no == 0 and seq > 1)
            if restored:
                self._weights_seq_no = 0
            weights = state[COMPONENT_RL_MODULE]
            if isinstance(weights, ray.ObjectRef):
                weights = ray.get(weights)
            state = {**state, COMPONENT_RL_MODULE: weights}
        with self._following:
            self.kin.set_state(self, state)
        alone = not self.worker_index and not self.num_workers and COMPONENT_RL_MODULE in state
        if self._own_connectors and (alone or COMPONENT_ENV_TO_MODULE_CONNECTOR in state):
            # As all runners have it now; until the next one it only learns here what is merged then. Alone it is told
            # nothing, and has learned all that there is.
            self._connectors = self._connectors_now()
        if COMPONENT_RL_MODULE in state:
            if isinstance(self._link, EvaluationLink):
                self._link.begins()
            if goes_back:
                self._filters.restart()
            self.held = self._hold(state[COMPONENT_RL_MODULE])
            self._filters.own(self.held.version, self.held.connectors)
            self._offer(self.held)
            if restored and self.on_restored is not None:
                self.on_restored()

    @property
    def _follows(self) -> bool:
        """Whether runners follow the episodes of this training."""
        return self._manifest is not None and self._manifest.seen is not None

    def _connectors_now(self) -> bytes:
        """The connectors' state, if it travels with the weights."""
        if not self._own_connectors or self._follows:
            return b""
        try:
            return state_bytes(self._env_to_module)
        except PolicyError:
            return b""  # then runners follow episodes, and nobody else needs it

    def _hold(self, weights: StateDict) -> Held:
        return Held(self._weights_seq_no, weights, self._connectors)

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        return [
            (COMPONENT_RL_MODULE, self.module),
            (COMPONENT_ENV_TO_MODULE_CONNECTOR, self._env_to_module),
            (COMPONENT_MODULE_TO_ENV_CONNECTOR, self._module_to_env),
        ]

    # ---- RLlib's other questions

    def make_module(self) -> None:
        spec = self.config.get_rl_module_spec(env=None, spaces=self.get_spaces(), inference_only=True)
        self.module = spec.build()

    def get_spaces(self) -> dict[str, tuple[gym.Space[Any], gym.Space[Any]]]:
        """Module id, `__env__` and `__env_single__` -> (observation space, action space)."""
        return self.spaces

    def assert_healthy(self) -> None:
        """Raises AssertionError unless the constructor went through."""
        assert self.module is not None

    def stop(self) -> None:
        """Leave the broker, for good."""
        self.leave()
        if self.on_stop is not None:
            self.on_stop()


def _reason(error: ProtocolError) -> str:
    return "stale" if isinstance(error, UnknownFilter) else "malformed"


def _means(values: Sequence[float]) -> list[float]:
    """Many of one `sample()` as a few means of neighbours: each value costs as much as a step's worth of data."""
    groups = min(len(values), TOLD)
    cuts = [i * len(values) // groups for i in range(groups + 1)] if groups else [0]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


__all__ = ["RLLINK", "ZmqEnvRunner"]
