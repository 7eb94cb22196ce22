"""One episode of a simulator."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rllink_zmq.client_flow import Flow
from rllink_zmq.client_followed import Ending
from rllink_zmq.client_remote import PendingAction, PendingActions, forget_looked, request
from rllink_zmq.errors import EpisodeError
from rllink_zmq.fragments import End, FragmentBuilder, Kind
from rllink_zmq.policy import Actions, Policy

_now = time.monotonic
_clock = time.perf_counter


class Episode:
    """One episode. Get one with `Client.start_episode`, and end it with `end_episode`.

    For each step: `get_action` (or `log_action`), step the simulation, `log_returns`. As a context manager: leaving
    it without `end_episode` abandons it: what isn't sent yet is discarded and counted.
    """

    def __init__(self, flow: Flow, builder: FragmentBuilder, *, undecided: bool = False) -> None:
        """Use `Client.start_episode`. `undecided`: it was left to the trainer what this episode is for."""
        self.id = builder.episode
        self.training_enabled = builder.sent
        self.builder = builder
        self.open = True
        self._flow = flow
        self._undecided = undecided
        self._cost = 1 if builder.sent or builder.evaluation is not None else 0
        self._started: float | None = _now()
        self._pending: PendingActions | None = None
        self._ending: Ending | None = None

    @property
    def steps(self) -> int:
        """Actions so far."""
        return self.builder.t0 + self.builder.steps

    @property
    def asks(self) -> bool:
        """Whether an action that the service was asked for has not been taken yet."""
        return self._pending is not None and not self._pending.taken

    @property
    def episode_return(self) -> float:
        """The sum of all rewards so far."""
        return self.builder.episode_return

    def get_action(self, observation: Any) -> Any:
        """The policy's action for `observation`, as `env.step` wants it (an int for Discrete, else an array).

        `observation`: as the environment's observation space describes it; integers and float64 are cast. Waits, and
        says why in the log every 5 s, while there is no policy or no room for another step. Raises EpisodeError for
        an observation that doesn't fit and after the end, RefusedError when the broker refuses this simulator.
        """
        flow, builder = self._flow, self.builder
        if flow.remote is not None:
            return self.get_action_async(observation).result()
        reader = flow.reader
        while True:
            if not (
                0 < builder.steps < builder.limit
                and builder.origin is reader.origin
                and builder.kind == "acted"
                and flow.credit > 0
                and _now() < flow.look_at
            ):
                self._asked("get_action")
                flow.prepare([(builder, observation)], "acted", wait=True)
                if flow.asks:
                    return self.get_action_async(observation).result()
            with reader.lock:
                policy = reader.policy
                # Another thread may have switched the policy: this fragment has one version's actions only.
                if builder.origin is reader.origin and policy is not None:
                    if not builder.steps:
                        acted = _act_timed(builder, policy, observation)
                        break
                    row = builder.observe(observation)
                    acted = policy.act_one(row, explores(builder, policy), builder.state)
                    builder.act(acted.actions, acted.action_logp, acted.action_dist_inputs, acted.state)
                    break
        flow.credit -= self._cost
        return acted.env_actions

    def get_action_async(self, observation: Any) -> PendingAction:
        """Ask the service for an action, and go on: `result()` of what is returned is the action, `done()` says whether
        it is there. With `connect(inference="remote")` alone. One at a time for an episode; several episodes may have
        one open each. Waits and raises as `get_action` does, but for the answer. All of the last step's reward is
        logged before: the policy may look at it.
        """
        flow = self._flow
        if flow.remote is None:
            raise EpisodeError('get_action_async asks the action service: connect(..., inference="remote")')
        self._asked("get_action_async")
        if self.asks:
            raise EpisodeError(f"episode '{self.id}' has asked for an action already: take its result() first")
        self._pending = request(flow, flow.remote, [(self.builder, observation)])
        return PendingAction(self._pending)

    def can_act(self, observation: Any) -> bool:
        """Whether `get_action(observation)` would return at once; with the service: whether it may ask. Never waits.

        When it would not, what has been built is sent, with `observation` as the last one of its fragment: the next
        call must have the same observation, and all of the last step's reward must have been logged before.
        """
        flow = self._flow
        acts = flow.reader if flow.remote is None else flow.remote
        if flow.remote is not None and not flow.remote.room:
            flow.look_if_due()
            return False
        if self.builder.origin is acts.origin and self._goes_on("acted"):
            return True
        self._asked("can_act")
        return self._flow.prepare([(self.builder, observation)], "acted", wait=False) is not None

    def log_action(self, observation: Any, action: Any, action_logp: float | None = None) -> None:
        """A step whose action the simulator chose itself: a script, a human, another policy.

        `action`: in the action space as RLlib trains on it (for Box before unsquashing and clipping). `action_logp`:
        the natural logarithm of the probability (density) that it was chosen with, which the losses of PPO, APPO and
        IMPALA need; None: nobody knows, which is enough for DQN and SAC. Waits like `get_action`.
        Raises EpisodeError for an observation or action that doesn't fit, without a log-probability where the training
        needs it, after the end, and where the policy looks back (it is recurrent, or stacks frames): a step that it did
        not take would leave a hole. An action that the service was asked for is given up.
        """
        if self._pending is not None:
            self._pending.forget()
        undecided = self.open and self._undecided and not self.steps
        if not self.training_enabled and logs_in_evaluation(self.builder, undecided=undecided):
            self.training_enabled, self._cost = True, 1
        kind: Kind = "given" if action_logp is None else "logged"
        if not self._goes_on(kind):
            self.check_open("log_action")
            self._flow.prepare([(self.builder, observation)], kind, wait=True)
        self.builder.observe(observation)
        self.builder.log(action, action_logp)
        self._flow.credit -= self._cost

    def log_returns(self, reward: float) -> None:
        """Add `reward` to the reward of the last action. Several calls add up; none means 0.

        Raises EpisodeError before the first action, after the end, and for NaN or infinity; where the policy looks at
        earlier rewards also while the next action is under way.
        """
        if not self.open:
            self.check_open("log_returns")
        if self.builder.asked and self.builder.layout is not None and self.builder.layout.looks_back:
            raise EpisodeError(
                f"episode '{self.id}': the policy looks at earlier rewards, and the next action is under way: log all "
                f"of a step's reward before that is asked for"
            )
        self.builder.reward(reward)

    def end_episode(self, observation: Any, truncated: bool = False) -> None:
        """The episode is over: `observation` is what the last action led to. `truncated`: it was cut short (a time
        limit) rather than finished. Raises EpisodeError for an episode without a step, and the second time. Where a
        runner follows the episode it waits for what that makes of the observation, and raises RemovedError if the
        runner is gone."""
        self.finish(observation, truncated)
        self._flow.connection.flush()

    def finish(self, observation: Any, truncated: bool) -> None:
        """`end_episode` for callers that go on at once: what is queued may leave with the next look."""
        self.ending(observation, truncated).result()

    def ending(self, observation: Any, truncated: bool) -> Ending:
        """`finish` for callers that go on meanwhile, where a runner follows the episode. Takes no other call from then
        on, but for `abandon`."""
        self.check_open("end_episode")
        if not self.steps:
            raise EpisodeError(
                f"episode '{self.id}' ends without a step: call get_action first, or abandon() if there was none"
            )
        end: End = "truncated" if truncated else "terminated"
        if self.builder.steps:
            self.builder.observe(observation)
        elif not truncated:
            raise EpisodeError(
                f"episode '{self.id}': the last observation was given to can_act or get_action, so that more steps "
                f"were to follow: call end_episode instead of them, or end it with truncated=True"
            )
        self.open = False
        if self._pending is not None:
            self._pending.forget()
        self._ending = Ending(self._flow, self.builder, end)
        return self._ending

    def abandon(self) -> None:
        """End the episode as if the simulator had been lost: what isn't sent yet is discarded and counted."""
        if self._ending is not None:
            self._ending.give_up()
        if self.open:
            self._flow.abandon(self.builder)
            self._leave()

    def check_open(self, call: str) -> None:
        """Raises EpisodeError after the end."""
        if self._flow.closed:
            raise EpisodeError(f"{call} of episode '{self.id}', whose client is closed: connect() again")
        if not self.open:
            raise EpisodeError(f"{call} after the end of episode '{self.id}': start another one with start_episode()")

    def __enter__(self) -> Episode:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.abandon()

    def _asked(self, call: str) -> None:
        """The first call with an observation shows that the environment has been reset."""
        self.check_open(call)
        if self._started is not None:
            self.builder.timings["reset"] = _now() - self._started
            self._started = None

    def _goes_on(self, kind: Kind) -> bool:
        """The quick answer, for nearly every step: one more step of this fragment, and nothing to look at before."""
        builder, flow = self.builder, self._flow
        return 0 < builder.steps < builder.limit and builder.kind == kind and flow.credit > 0 and _now() < flow.look_at

    def _leave(self) -> None:
        self.open = False
        if self._pending is not None:
            self._pending.forget()
        forget_looked(self.builder)
        self.builder.limit = 0
        self._flow.builders.pop(self.id, None)


def logs_in_evaluation(builder: FragmentBuilder, *, undecided: bool) -> bool:
    """The simulator chooses the actions of an episode that isn't trained on, and an evaluation is of the policy's. Who
    has left it to the trainer (`undecided`) trains: then it is True."""
    builder.evaluation = None
    builder.sent = builder.sent or undecided
    return undecided


def explores(builder: FragmentBuilder, policy: Policy) -> bool:
    """Whether the actions of this episode are drawn."""
    if builder.sent:
        return policy.manifest.explores
    return policy.manifest.evaluation_explores if builder.explore is None else builder.explore


def _act_timed(builder: FragmentBuilder, policy: Policy, observation: Any) -> Actions:
    """A fragment's first step, with an eye on the clock."""
    began = _clock()
    row = builder.observe(observation)
    taken = _clock()
    acted = policy.act_one(row, explores(builder, policy), builder.state)
    chosen = _clock()
    builder.act(acted.actions, acted.action_logp, acted.action_dist_inputs, acted.state)
    builder.timings |= {"observation": taken - began, "inference": chosen - taken, "action": _clock() - chosen}
    return acted
