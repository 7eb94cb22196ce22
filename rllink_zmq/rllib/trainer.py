"""The trainer: one per Algorithm, in its process. It begins the run, exports the policy, and tells the runners.

RLlib makes the runners before anything of ours can know the Algorithm; `TrainerCallback` picks it up from there.
"""

from __future__ import annotations

import functools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EVALUATION_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    SAMPLE_TIMER,
    WEIGHTS_SEQ_NO,
)

from rllink_zmq import __version__
from rllink_zmq.errors import RllinkError
from rllink_zmq.messages import Duty, Spaces, TrainerHello
from rllink_zmq.policy import policy_hash, unpack_policy
from rllink_zmq.rllib.multi_agent_policies import CrewManifest, crew_of
from rllink_zmq.rllib.pipelines_agents import agents_of
from rllink_zmq.rllib.policies import policy_of
from rllink_zmq.rllib.pool import Member, Pool
from rllink_zmq.rllib.recurrent import send_what_acts
from rllink_zmq.rllib.settings import KEY, LinkSettings, trainer_terms
from rllink_zmq.session import State
from rllink_zmq.session_runner import TrainerSession
from rllink_zmq.spaces import agents_to_wire, spaces_to_wire
from rllink_zmq.transport import Connection
from rllink_zmq.transport_thread import ConnectionThread

logger = logging.getLogger("rllink_zmq")

SAY_EVERY = 5.0
RUNNER_TIMEOUT = 10.0
JOIN_WITHIN = 60.0


def new_run_id() -> str:
    """Sortable by start time: 12 hex digits of Unix milliseconds, a dash, 8 random ones."""
    return f"{time.time_ns() // 1_000_000:012x}-{secrets.token_hex(4)}"


class Trainer:
    """One Algorithm's presence at the broker. `run` is the current run's id; `ledger()` asks the broker for its."""

    def __init__(self, algorithm: Algorithm) -> None:
        config = algorithm.config
        self.settings = LinkSettings.of(config)
        self._group: EnvRunnerGroup = algorithm.env_runner_group
        self._evaluators: dict[int, bytes] = {}
        self._sampled_before = -1.0
        self._owner = algorithm
        self._terms = trainer_terms(config)
        local = self._local = algorithm.env_runner
        self._exported: dict[bytes, bytes] = {}
        self._spaces, blob, self.manifest = _offered(algorithm, self._exported)
        self._modules = self._modules_ever()
        self._module_specs: MultiRLModuleSpec | None = None
        self.run = new_run_id()
        self.pool = Pool(self, self._group, self.settings.runner_timeout_s or RUNNER_TIMEOUT, self.settings.runners)
        self._policy, self._policy_bytes = policy_hash(blob), len(blob)
        self._algorithm = type(algorithm).__name__
        self.session = TrainerSession(
            secrets.token_bytes(16), self._hello(), blob, name=self._algorithm, package=__version__
        )
        self._pongs = 0
        self._answered = threading.Event()
        self._thread = ConnectionThread(Connection(self.session, self.settings.broker), self._step, "rllink-trainer")
        self._thread.start()
        self._await_welcome()
        recurrent = self._send_what_acts()
        self._first = self._learned()
        # What RLlib gave the runners when it made them may lack a part that acts.
        given = self._first if recurrent else None
        self._tell(None, given)
        self._tell_evaluators(None, given)
        self.pool.start()
        if local is not None:
            local.on_restored = self.begin_run
            local.on_stop = self.stop
            local.on_sample = self._before_local_sample

    def _hello(self) -> TrainerHello:
        terms = self._terms
        return TrainerHello(
            run=self.run,
            quota=terms.quota,
            lag_limit=terms.lag_limit,
            steps_ahead=terms.steps_ahead,
            runners=self.pool.target,
            fragment_steps=terms.fragment_steps,
            spaces=self._spaces,
            policy=self._policy,
            policy_bytes=self._policy_bytes,
            evaluation_share=float(self.settings.evaluation_share),
            lease_steps=terms.lease_steps,
            sampled=self._sampled_steps(),
            needs_logp=terms.needs_logp,
            rounds=terms.rounds,
            agents=terms.agents,
        )

    def _sampled_steps(self) -> int:
        """Env steps that the training has sampled, in all its runs."""
        metrics = getattr(self._owner, "metrics", None)
        key = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
        return 0 if metrics is None else int(metrics.peek(key, default=0))

    def _await_welcome(self) -> None:
        """Wait for the broker, saying so every 5 s. Raises the refusal, for example when it has a trainer already."""
        session, started, said = self.session, time.monotonic(), 0.0
        pause = 0.05
        while session.state is not State.LIVE:
            if session.refusal is not None:
                self.stop()
                raise session.refusal
            waited = time.monotonic() - started
            if waited - said >= SAY_EVERY:
                said = waited
                why = session.notice or "is `rllink-zmq broker` running there?"
                logger.warning("waiting for the broker at %s (%.0f s): %s", self.settings.broker, waited, why)
            self._thread.join(pause)
            if not self._thread.is_alive():
                raise RllinkError(f"the connection to the broker at {self.settings.broker} could not be opened")

    def _send_what_acts(self) -> frozenset[str]:
        """Have the learners give runners all that recurrent modules act by. Returns the ids of these."""
        manifest = self.manifest
        modules = manifest.modules if isinstance(manifest, CrewManifest) else {DEFAULT_MODULE_ID: manifest}
        recurrent = {name: about for name, about in modules.items() if about.state}
        for name, about in recurrent.items():
            send_what_acts(self._owner.learner_group, [weight.name for weight in about.weights], name)
        return frozenset(recurrent)

    def _learned(self) -> dict[str, Any]:
        """The learner's weights, as a state of runners. Of RLlib's main thread alone: learners may be learning."""
        state: dict[str, Any] = self._owner.learner_group.get_state(
            components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True
        )[COMPONENT_LEARNER]  # fmt: skip
        return state

    def _tell(self, only: list[int] | None, state: dict[str, Any] | None) -> None:
        """Have the runners that sample join this run, with the learner's weights if given."""
        if not self._group.num_remote_env_runners():
            self._join_local(state)
            return
        run, manifest = self.run, self.manifest
        results = self._group._worker_manager.foreach_actor(
            lambda runner: runner.join(run, manifest, state), remote_actor_ids=only, timeout_seconds=JOIN_WITHIN
        )
        sessions = {r.actor_id: r.get() for r in results if r.ok}
        self.pool.adopt(sessions)
        if not sessions:
            logger.warning("no runner could be told to join run %s", run)

    def _tell_evaluators(self, only: list[int] | None, state: dict[str, Any] | None) -> None:
        """Have RLlib's evaluation runners join this run, if there are any."""
        group = self._owner.eval_env_runner_group
        if group is None:
            return
        run, manifest = self.run, self.manifest
        if not group.num_remote_env_runners():
            if group.local_env_runner is not None:
                self._evaluators[0] = group.local_env_runner.join(run, manifest, state)
            return
        results = group._worker_manager.foreach_actor(
            lambda runner: runner.join(run, manifest, state), remote_actor_ids=only, timeout_seconds=JOIN_WITHIN
        )
        joined = {r.actor_id: r.get() for r in results if r.ok}
        self._evaluators.update(joined)
        if not joined:
            logger.warning("no evaluation runner could be told to join run %s", run)

    def _join_local(self, state: dict[str, Any] | None = None) -> None:
        """The local runner samples: there is no other one."""
        if self._local is not None:
            self._local.join(self.run, self.manifest, state)

    def _before_local_sample(self) -> None:
        """RLlib has no other runner: there is none, or all are gone."""
        self.pool.sweep()
        if self._local is not None and not self._local.joined:
            self._join_local()

    def joining(self) -> Callable[[Any], bytes]:
        """What a new runner has to do before RLlib sees it: what RLlib did with its first ones, and `join`."""
        run, manifest, first = self.run, self.manifest, self._first
        modules = self._module_specs
        server = getattr(self._owner, "_env_runner_state_server", None)
        held = self._local.held if self._local is not None else None
        pieces = self._local.connectors() if self._local is not None else {}

        def join(runner: Any) -> bytes:
            if modules is not None:
                runner.have_modules(modules)
            runner.set_state({**first, **pieces})
            if held is not None:
                runner.set_state({COMPONENT_RL_MODULE: held.weights, WEIGHTS_SEQ_NO: held.version})
            if server is not None:
                runner._env_runner_state_server = server
                runner.pull()
            session: bytes = runner.join(run, manifest)
            return session

        return join

    def assign(self, duties: dict[bytes, Duty]) -> None:
        """Tell the broker what runners are to do, by session."""
        self._thread.call(lambda now: self.session.assign(duties, now))

    def change_runners(self, number: int) -> None:
        """Tell the broker how many runners there are to be, and whoever is restored from a checkpoint."""
        self._owner.config.env_config[KEY]["runners"] = number
        self._thread.call(lambda now: self.session.change(self._hello(), now))
        if not number:
            logger.warning("scaled to 0 runners: training waits until there are more (rllink-zmq scale N)")

    def take_over(self) -> None:
        """Let APPO's and IMPALA's next batch, as far as it has been collected, belong to this process and not to the
        runners that made it: they may be leaving, and with 0 runners the batch will not be full."""
        packs = getattr(self._owner, "_episode_packs_being_built", [])
        for i, ref in enumerate(packs):
            try:
                packs[i] = ray.put(ray.get(ref))
            except RayError as e:
                logger.debug("episodes of a runner that is gone: %s", e)

    def sweep(self) -> None:
        """Between two training steps, in RLlib's main thread: the pool takes shape. Raises `RefusedError` when the
        broker serves another trainer by now."""
        if self.session.refusal is not None:
            raise self.session.refusal
        self.pool.sweep()
        local = self._local
        if local is not None and local.joined and self._group.num_healthy_remote_env_runners():
            local.leave()

    def tell_sampled(self) -> None:
        """Have the broker know, after it was asked how things are, how many env steps the training has sampled. It
        counts by itself, but for what came before the checkpoint that RLlib has restored without a word."""
        sampled = self._sampled_steps()
        if self.session.pool.sampled < sampled:
            terms = self._hello()
            self._thread.call(lambda now: self.session.change(terms, now))
        else:
            self._thread.call(lambda now: self.session.note(sampled))

    def begin_run(self) -> None:
        """A new run: a checkpoint was loaded, and the weights' version numbers may have gone back."""
        previous, self.run = self.run, new_run_id()
        if self.run <= previous:  # the clock's milliseconds did not move, or it was set back
            self.run = f"{int(previous[:12], 16) + 1:012x}-{secrets.token_hex(4)}"
        terms = self._hello()
        self._thread.call(lambda now: self.session.change(terms, now)).result(timeout=10)
        self._await_welcome()
        self._first = self._learned()
        # The checkpoint's filters, too: RLlib hands them out later than its weights.
        state = {**self._first, **(self._local.connectors() if self._local is not None else {})}
        self._tell(None, state)
        self._tell_evaluators(None, state)

    def _modules_ever(self, before: frozenset[str] = frozenset()) -> frozenset[str]:
        """The modules that this run has had, of a training with several agents."""
        return before | self.manifest.modules.keys() if isinstance(self.manifest, CrewManifest) else before

    def recast(self) -> None:
        """Policies were added or removed, or agents are mapped to others: the run goes on, and what is on its way
        stays. Where a policy comes back under an id that this run has had, a new run begins: version numbers must not
        mean two things; and where a recurrent one comes, of which RLlib has given runners a part. Raises `PolicyError`
        for a module that can't be exported, `SettingsError` for a mapping or an id that can't be used: simulators go
        on with what they have."""
        before = self.manifest.modules
        spaces, blob, manifest = _offered(self._owner, self._exported)
        if policy_hash(blob) == self._policy:
            return
        self._spaces, self.manifest = spaces, manifest
        self._module_specs = self._owner.config.rl_module_spec
        self._policy, self._policy_bytes = policy_hash(blob), len(blob)
        come = manifest.modules.keys() - before.keys()
        others = any(
            about != before[name]
            for name, about in manifest.modules.items()
            if name in before and manifest.agents[name]
        )
        recurrent = come & self._send_what_acts()
        self.session.blob = blob
        if others or recurrent or come & self._modules:
            self._modules = frozenset()
            self.begin_run()
        else:
            terms = self._hello()
            self._thread.call(lambda now: self.session.change(terms, now)).result(timeout=10)
            self._await_welcome()
            self._first = self._learned()
            for group in (self._group, self._owner.eval_env_runner_group):
                if group is not None:
                    group.foreach_env_runner(lambda runner: runner.recast(manifest) if runner.joined else None)
        self._modules = self._modules_ever(self._modules)
        gone = before.keys() - manifest.modules.keys()
        logger.info("policies: %s; new: %s; removed: %s", *(", ".join(sorted(n)) or "none" for n in (
            manifest.modules.keys(), come, gone)))  # fmt: skip

    def runners_recreated(self, indices: list[int], is_evaluation: bool) -> None:
        """Restarted runners are new sessions of the same run."""
        if is_evaluation:
            self._tell_evaluators(indices, None)
        else:
            self._tell(indices, None)

    def evaluation_starts(self) -> None:
        """Have evaluation runners join that RLlib has brought back without a word (while it waited for them)."""
        group = self._owner.eval_env_runner_group
        self._sampled_before = self._sampled()
        if group is None or not group.num_remote_env_runners():
            return
        asked = group._worker_manager.foreach_actor(lambda runner: runner.joined, timeout_seconds=RUNNER_TIMEOUT)
        missing = [r.actor_id for r in asked if r.ok and not r.get()]
        if missing:
            self._tell_evaluators(missing, None)

    def evaluation_ended(self, results: dict[str, Any]) -> None:
        """RLlib shows the numbers of the evaluation before when no runner has answered: take them out."""
        if 0 <= self._sampled_before == self._sampled():
            results.pop(ENV_RUNNER_RESULTS, None)

    def _sampled(self) -> float:
        """How long evaluation's `sample()` took: every answer measures it anew. -1: there was none yet."""
        key = (EVALUATION_RESULTS, ENV_RUNNER_RESULTS, SAMPLE_TIMER)
        return float(self._owner.metrics.peek(key, default=-1.0))

    def status(self, timeout: float = 2.0) -> dict[str, Any]:
        """`ledger`, `simulators`, `version`, `run_id` as the broker knows them now, or did when it was last heard."""
        session = self.session
        self._answered.clear()
        self._thread.call(session.ask)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self._thread.is_alive() and not self._answered.wait(0.1):
            pass
        named = dict(session.ledger)

        def pair(name: str) -> dict[str, int]:
            fragments, steps = named.pop(name, (0, 0))
            return {"fragments": fragments, "steps": steps}

        ledger: dict[str, Any] = {name: pair(name) for name in ("received", "delivered", "in_flight")}
        ledger["dropped"] = {reason: pair(reason) for reason in sorted(named)}
        pool = session.pool
        return {"ledger": ledger, "simulators": pool.simulators, "version": pool.version, "run_id": self.run}

    def _step(self, now: float) -> float:
        """The connection's thread has looked at the socket."""
        if self.session.pongs != self._pongs:
            self._pongs = self.session.pongs
            self._answered.set()
        return float("inf")

    def stop(self) -> None:
        """Release the runners from what they wait for, and say BYE."""
        group = self._owner.eval_env_runner_group
        actors = group._worker_manager.actors() if group is not None else {}
        self.pool.end(Member(actors.get(id_), id_, id_, session) for id_, session in self._evaluators.items())
        self._thread.stop()


def _offered(algorithm: Algorithm, exported: dict[bytes, bytes]) -> tuple[Spaces, bytes, Any]:
    """What this training is of, as the broker is told: its spaces, its policy, and what runners must know of it.
    `exported`: as of `crew_of`."""
    config, local = algorithm.config, algorithm.env_runner
    several = config.is_multi_agent
    make = config.get_multi_rl_module_spec if several else config.get_rl_module_spec
    module = (
        local.module
        if local is not None
        else make(env=None, spaces=algorithm.spaces, inference_only=True).build()
    )  # fmt: skip
    if several:
        blob = crew_of(config, module, exported)
        return agents_to_wire(*agents_of(config)), blob, CrewManifest.of(blob)
    blob = policy_of(config, module)
    return spaces_to_wire(config.observation_space, config.action_space), blob, unpack_policy(blob)[0]


def followed(change: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    """A method of RLlib's `Algorithm` that `then` follows, before it returns: simulators and runners follow it."""

    @functools.wraps(change)
    def changed(*args: Any, **kwargs: Any) -> Any:
        result = change(*args, **kwargs)
        then()
        return result

    return changed


class TrainerCallback(RLlibCallback):
    """Begins the run when the Algorithm is there, and keeps the runners in it. `attach()` adds it to the config's."""

    trainer: Trainer | None = None

    def on_algorithm_init(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        self.trainer = Trainer(algorithm)
        algorithm.rllink_trainer = self.trainer
        # RLlib restores last how much was sampled, after the weights, whose runs have begun by then.
        algorithm.set_state = followed(algorithm.set_state, self.trainer.tell_sampled)
        if algorithm.config.is_multi_agent:
            algorithm.add_module = followed(algorithm.add_module, self.trainer.recast)
            algorithm.remove_module = followed(algorithm.remove_module, self.trainer.recast)

    def on_checkpoint_loaded(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        if self.trainer is not None:
            self.trainer.begin_run()

    def on_env_runners_recreated(
        self, *, algorithm: Algorithm, env_runner_indices: list[int], is_evaluation: bool, **kwargs: Any
    ) -> None:
        if self.trainer is not None:
            self.trainer.runners_recreated(env_runner_indices, is_evaluation)

    def on_evaluate_start(self, *, algorithm: Algorithm, **kwargs: Any) -> None:
        if self.trainer is not None:
            self.trainer.evaluation_starts()

    def on_evaluate_end(self, *, algorithm: Algorithm, evaluation_metrics: dict[str, Any], **kwargs: Any) -> None:
        if self.trainer is not None:
            self.trainer.evaluation_ended(evaluation_metrics)

    def on_train_result(self, *, algorithm: Algorithm, result: dict[str, Any], **kwargs: Any) -> None:
        if self.trainer is not None:
            self.trainer.sweep()
            result["rllink"] = self.trainer.status()
            self.trainer.tell_sampled()
