"""Evaluation: the connection of an evaluation runner, and what RLlib's evaluation settings may ask for."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllink_zmq import __version__
from rllink_zmq.errors import RefusedError, RllinkError, SettingsError
from rllink_zmq.rllib.link import SAY_EVERY, RunnerLink
from rllink_zmq.sampling import PROGRESS_WAIT, Next
from rllink_zmq.sampling_evaluation import PAST, Evaluation, Wanted
from rllink_zmq.session import State
from rllink_zmq.session_evaluator import EvaluatorSession
from rllink_zmq.session_runner import Lease

logger = logging.getLogger("rllink_zmq")

ELSEWHERE = {
    "env": "each simulator has its own environment",
    "env_config": "each simulator has its own environment",
    "observation_space": "simulators run one environment",
    "action_space": "simulators run one environment",
    "env_runner_cls": "evaluation runners are ZmqEnvRunners, too",
    "model_config": "simulators have one policy, that of training",
    "rl_module_spec": "simulators have one policy, that of training",
    "env_to_module_connector": "what acts is training's",
    "module_to_env_connector": "what acts is training's",
    "policies": "simulators have one policy for each agent, that of training",
    "policy_mapping_fn": "agents are mapped to policies as in training",
    "normalize_actions": "simulators have one policy, that of training",
    "clip_actions": "simulators have one policy, that of training",
}
"""What an evaluation config may not say otherwise than training's, and why."""


def check_evaluation(config: AlgorithmConfig) -> None:
    """Raises `SettingsError` for an evaluation that simulators can't serve."""
    own = config.evaluation_config
    if isinstance(own, AlgorithmConfig):
        own = own.to_dict()
    for name, why in ELSEWHERE.items():
        for key in (name, f"_{name}"):
            if key in (own or {}) and own[key] != getattr(config, key, None):
                raise SettingsError(f"config.evaluation(evaluation_config={{{name!r}: ...}}): {why}; remove it")
    if config.evaluation_parallel_to_training and not config.evaluation_num_env_runners:
        raise SettingsError(
            "config.evaluation(evaluation_parallel_to_training=True) needs evaluation_num_env_runners >= 1: the local "
            "runner would evaluate in the process that trains"
        )
    if config.evaluation_duration == "auto" and not config.evaluation_parallel_to_training:
        raise SettingsError("evaluation_duration='auto' needs evaluation_parallel_to_training=True")
    if config.evaluation_interval and not config.evaluation_sample_timeout_s:
        raise SettingsError("evaluation_sample_timeout_s must be positive: without it an evaluation may wait for ever")


class EvaluationLink(RunnerLink):
    """One run's conversation of this evaluation runner with the broker at `address`. `check`: why a fragment can't be
    used, or ''; the connection's thread calls it, during `evaluate` alone."""

    session: EvaluatorSession

    def __init__(
        self, address: str, run: str, name: str, check: Callable[[Lease], str], *, local: bool = False
    ) -> None:
        session = EvaluatorSession(secrets.token_bytes(16), run, name=name, package=__version__)
        self._evaluation = Evaluation(session, check)
        super().__init__(address, run, name, local=local, session=session)

    def begins(self) -> None:
        """RLlib begins an evaluation."""
        self._thread.call(lambda now: self._evaluation.begins())

    def evaluate(self, wanted: Wanted) -> list[Lease]:
        """What this call of `sample()` is of: whole episodes, or pieces where steps are wanted. Says every 10 s what it
        waits for. With less than wanted it comes back around `wanted.timeout`, and says what to do."""
        result: Future[list[Lease]] = Future()

        def begin(now: float) -> None:
            self._evaluation.call(wanted, now)
            self._result = result

        try:
            self._thread.call(begin).result(timeout=30)
        except RllinkError:
            if self.left():
                return self._nothing(PROGRESS_WAIT)
            raise
        started = time.monotonic()
        while True:
            try:
                leases = result.result(timeout=SAY_EVERY)
            except RefusedError as e:
                if self._local:
                    raise
                logger.warning("evaluation runner '%s' can't go on: %s", self.session.name, e)
                return self._nothing(wanted.timeout + PAST)
            except FutureTimeout:
                if result.done():
                    raise
                if self.left():
                    return self._nothing(PROGRESS_WAIT)
                if not self._thread.is_alive():
                    raise RllinkError(f"the connection to the broker at {self.address} has ended") from None
                logger.warning("%s", self.waiting(time.monotonic() - started))
                continue
            waited = time.monotonic() - started
            if self._evaluation.missing and self.session.duty == "serve":
                logger.warning("%s (evaluation_sample_timeout_s is over)", self.waiting(waited))
            return leases

    def _nothing(self, seconds: float) -> list[Lease]:
        """RLlib asks again at once whoever answers in time."""
        self._stopped.wait(seconds)
        return []

    def waiting(self, seconds: float) -> str:
        """What this runner waits for, in words."""
        session = self.session
        if session.state is not State.LIVE:
            why = f"no broker answers at {self.address}"
        elif not session.pool.simulators:
            why = "no simulator is connected: start one with `rllink-zmq simulate --evaluate`"
        else:
            why = (
                f"{session.pool.simulators} simulators are connected: do any serve evaluations? Start some with "
                "`rllink-zmq simulate --evaluate`, or let a share of them do it: attach(..., evaluation_share=0.2)"
            )
        who, missing = f"evaluation runner '{session.name}'", self._evaluation.missing
        return f"{who} has waited {seconds:.0f} s for {missing}: {why}. {session.notice}".rstrip()

    def stop(self) -> None:
        """Say BYE."""
        self._stopped.set()
        self._thread.call(lambda now: self._evaluation.cancel())
        self._thread.stop()

    # ---- in the thread

    def _step(self, now: float) -> float:
        session, result = self.session, self._result
        if session.refusal is not None and result is not None:
            self._result = None
            result.set_exception(session.refusal)
            return float("inf")
        if self._evaluation.step(now) is Next.RETURN and result is not None:
            self._result = None
            result.set_result(self._evaluation.take_out())
        if session.duty in ("leave", "end") and session.state is State.LIVE and self._result is None:
            self._thread.stop()
        return self._evaluation.wake
