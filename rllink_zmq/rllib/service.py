"""The action service of a runner: requests that are pending become one batch, whenever the module is free.

It has a connection and a thread of its own: it answers while `sample()` waits and while the learner learns, and a
fragment never stands in front of a request. Its weights are the published ones, under the numbers that simulators know;
a batch is of one version. It acts as RLlib's own runner does: the module's `forward_exploration` or
`forward_inference`, RLlib's distribution (`GetActions`) and the env's action (`NormalizeAndClipActions`).
"""

from __future__ import annotations

import copy
import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule

from rllink_zmq import __version__
from rllink_zmq.arrays import column_of, from_body
from rllink_zmq.errors import ProtocolError, RllinkError
from rllink_zmq.fragments import Before
from rllink_zmq.messages import (
    ACT,
    ACTION,
    ACTIONS_BEFORE,
    BEFORE,
    LOOKBACK,
    OBS_BEFORE,
    REWARDS_BEFORE,
    STARTS,
    STATE_IN,
    STATE_OUT,
    STEPS_BEFORE,
    AgentId,
    Column,
)
from rllink_zmq.packing import packing_of
from rllink_zmq.packing_actions import action_packing, env_packing
from rllink_zmq.policy import PolicyManifest
from rllink_zmq.rllib import exploration
from rllink_zmq.rllib.checking import check_rows
from rllink_zmq.rllib.export import connectors_state
from rllink_zmq.rllib.export_actions import ForEnv
from rllink_zmq.rllib.flattening import Flattening
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.session import State
from rllink_zmq.session_runner import ServiceSession
from rllink_zmq.spaces import from_wire
from rllink_zmq.transport import Connection, Subscription, beside
from rllink_zmq.transport_thread import ConnectionThread
from rllink_zmq.weights import STALLED, Wanted
from rllink_zmq.wire import Buffer

logger = logging.getLogger("rllink_zmq")

MAX_ROWS = 1024
"""Observations of one batch."""

SWITCH_INTERVAL = 0.1
"""Seconds between two weights versions to act with: a switch cuts every fragment that is being built. Where a version
is for a whole round of steps there is no such wait."""

NEWS_INTERVAL = 0.05
"""Seconds between two looks for newer weights while nobody asks."""


def _said(columns: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(f"{name} {np.dtype(dtype)}{list(shape)}" for name, (dtype, shape) in columns.items())


Asked: TypeAlias = tuple[ACT, Sequence[Buffer]]
"""A request, and its body."""


class OwnPolicy(Wanted):
    """Published weights, for a process that has the module itself."""

    def told(self, run: str, version: int, policy: str, now: float) -> None:
        super().told(run, version, "", now)

    @property
    def newest(self) -> tuple[int, bytes] | None:
        """Version and body of this run's newest weights."""
        held = self.weights
        return (held.version, held.data) if held is not None and held.run == self.run else None


class ModuleActor:
    """A copy of `module` that acts, on `device` (the runner's GPU, say). `version`: its weights', -1 before the first.
    `sampled()`: env steps that the training has sampled, by which DQN's epsilon goes. `flattening`: the
    FlattenObservations before the module. Not for two threads at once."""

    def __init__(
        self,
        module: RLModule,
        manifest: PolicyManifest,
        action_space: gym.Space[Any],
        normalize: bool,
        clip: bool,
        device: Any = "cpu",
        sampled: Callable[[], int] = lambda: 0,
        flattening: Flattening | None = None,
    ) -> None:
        self.manifest = manifest
        self._sampled = sampled
        self._flattening = flattening
        self.version = -1
        self._device = torch.device(device)
        self._module: Any = copy.deepcopy(module.unwrapped()).to(self._device)
        self._module.eval()
        self._state = self._module.state_dict()
        self._action_space = action_space
        self._actions = action_packing(action_space)
        self._env_actions = env_packing(action_space)
        spaces = [part.space for part in self._actions.parts] if self._actions else [action_space]
        self._for_env = [ForEnv(space, normalize, clip) for space in spaces]
        self._packing = None if manifest.packed is None else packing_of(from_wire(manifest.packed))
        self.memory = Memory(self._module)
        self.dtype = np.dtype(manifest.observation.dtype)
        self.shape = manifest.observation.shape

    def apply(self, version: int, body: bytes) -> None:
        """Act with these weights from now on. `body`: the manifest's, back to back. Raises RllinkError for another
        size."""
        if len(body) != self.manifest.weights_bytes:
            raise RllinkError(f"weights {version} have {len(body)} bytes, expected {self.manifest.weights_bytes}")
        self.version = -1  # what fails in the middle leaves no version at all
        offset = 0
        with torch.no_grad():
            for weight in self.manifest.weights:
                count = int(np.prod(weight.shape, dtype=np.int64))
                sent = np.frombuffer(body, np.dtype(weight.dtype).newbyteorder("<"), count, offset)
                self._state[weight.name].copy_(torch.from_numpy(sent.reshape(weight.shape).copy()))
                offset += weight.nbytes
        self.version = version

    def act(
        self,
        observations: NDArray[Any],
        explore: bool,
        state: Sequence[NDArray[Any]] | None = None,
        starts: NDArray[np.bool_] | None = None,
        earlier: Sequence[Before | None] | None = None,
        agents: Sequence[AgentId] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Columns of an answer for (B, *shape) observations of the policy's dtype.

        `state`: a recurrent module's memory before the step, (B, *shape) each, in the manifest's order; in rows that
        `starts` an episode it is the initial one, whatever is given. None = all rows start. `earlier`: for each row the
        steps before it, for who looks at them; None where there are none. `agents`: whose each row is, for who asks.
        """
        before = self.memory.starts(len(observations))
        if state is not None:
            goes_on = np.ones(len(observations), bool) if starts is None else ~starts
            for array, given in zip(before, state, strict=True):
                array[goes_on] = given[goes_on]
        given_on = [torch.from_numpy(array).to(self._device) for array in before]
        columns = self._compute(observations, explore, given_on, earlier, agents)
        if state is None or (starts is not None and starts.any()):
            # Who begins is told with what.
            columns |= {STATE_IN + name: array for name, array in zip(self.memory.names, before, strict=True)}
        return columns

    def not_finite(self, observations: NDArray[Any]) -> NDArray[np.bool_]:
        """(B,): which of (B, *shape) observations hold NaN or infinity."""
        arrays = [observations] if self._packing is None else self._packing.arrays(observations)
        bad = np.zeros(len(observations), bool)
        for array in arrays:
            if array.dtype.kind == "f":
                bad |= ~np.isfinite(array.reshape(len(array), -1)).all(1)
        return bad

    @property
    def agents(self) -> Collection[AgentId]:
        """Whose rows it must be told of; nobody's, where one is like another."""
        return ()

    def misfit_before(self, before: Before) -> str:
        """Why steps can't have come before; '' if they can."""
        if self.not_finite(before.observations).any():
            return f"'{OBS_BEFORE}' holds NaN or infinity"
        if not np.isfinite(before.rewards).all():
            return f"'{REWARDS_BEFORE}' holds NaN or infinity"
        try:
            check_rows(ACTIONS_BEFORE, before.actions, self._action_space, self._actions, actions=True)
        except ProtocolError as error:
            return str(error)
        return ""

    @property
    def lookback(self) -> int:
        """How many earlier observations it looks at."""
        return self.manifest.lookback

    def _compute(
        self,
        observations: NDArray[Any],
        explore: bool,
        before: Sequence[torch.Tensor],
        earlier: Sequence[Before | None] | None,
        agents: Sequence[AgentId] | None,
    ) -> dict[str, NDArray[Any]]:
        with torch.no_grad():
            batch = self.memory.batch(self._given(observations), before)
            module = self._module
            out, after = self.memory.answer(exploration.forward(module, batch, explore, self._sampled()))
            dist_inputs = out[Columns.ACTION_DIST_INPUTS]
            if Columns.ACTIONS in out:
                actions, logp = out[Columns.ACTIONS], out[Columns.ACTION_LOGP]
            else:
                drawn_from = module.get_exploration_action_dist_cls().from_logits(dist_inputs)
                if explore:
                    actions = drawn_from.sample()
                else:
                    greedy = module.get_inference_action_dist_cls().from_logits(dist_inputs).to_deterministic()
                    actions = greedy.sample()
                logp = drawn_from.logp(actions)
            columns = {"action_logp": logp, "action_dist_inputs": dist_inputs}
            columns |= self._acted(actions, len(dist_inputs))
            columns |= {STATE_OUT + name: array for name, array in zip(self.memory.names, after, strict=True)}
            return {name: np.ascontiguousarray(torch.as_tensor(array).cpu().numpy()) for name, array in columns.items()}

    def _acted(self, actions: Any, rows: int) -> dict[str, Any]:
        """The columns of actions that were drawn: an array, or dicts and tuples of them."""
        if self._actions is None or self._env_actions is None:
            columns = {"actions": actions}
            if self._for_env[0].transforms:
                columns["env_actions"] = self._for_env[0](actions.cpu())
            return columns
        packed = self._actions.join(tree.map_structure(lambda tensor: tensor.cpu().numpy(), actions), rows)
        parts = [
            for_env(torch.from_numpy(array)).numpy() if for_env.transforms else array
            for for_env, array in zip(self._for_env, self._actions.arrays(packed), strict=True)
        ]
        return {"actions": packed, "env_actions": self._env_actions.join(self._env_actions.structure(parts), rows)}

    def _given(self, observations: NDArray[Any]) -> Any:
        """(B, *shape) as the module takes them."""
        arrays = [observations] if self._packing is None else self._packing.arrays(observations)
        tensors = [torch.from_numpy(array).to(self._device) for array in arrays]
        if self._flattening is not None:
            return self._flattening(tensors)
        return tensors[0] if self._packing is None else self._packing.structure(tensors)


class PipelineActor(ModuleActor):
    """Acts behind the connectors that the user configured, by RLlib's own pipelines. `on_state(version, state)`: told
    of the state that these have at each version."""

    def __init__(
        self,
        module: RLModule,
        manifest: PolicyManifest,
        pipelines: Pipelines,
        device: Any = "cpu",
        on_state: Callable[[int, bytes], None] | None = None,
        sampled: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(module, manifest, pipelines.action_space, False, False, device, sampled)
        self._pipelines = pipelines
        self._on_state = on_state

    @property
    def agents(self) -> Collection[AgentId]:
        return self._pipelines.agents

    def apply(self, version: int, body: bytes) -> None:
        super().apply(version, body)
        self.version = -1
        state = connectors_state(self.manifest, body)
        self._pipelines.set_state(state)
        self.version = version
        if self._on_state is not None:
            self._on_state(version, state)

    def _compute(
        self,
        observations: NDArray[Any],
        explore: bool,
        before: Sequence[torch.Tensor],
        earlier: Sequence[Before | None] | None,
        agents: Sequence[AgentId] | None,
    ) -> dict[str, NDArray[Any]]:
        pipelines = self._pipelines
        newest = pipelines.each(observations)
        befores = earlier or [None] * len(newest)
        histories = [pipelines.history(before, one) for before, one in zip(befores, newest, strict=True)]
        columns, after = pipelines.act(
            self._module, histories, explore, self.memory, before, self._sampled(), agents if self.agents else None
        )
        return columns | {STATE_OUT + name: array for name, array in zip(self.memory.names, after, strict=True)}


class ActService:
    """Answers ACT for one run. `max_rows`: observations of one batch; `max_wait`: seconds that its first request may
    wait for company. `explores`: whether training draws its actions; evaluation does as the manifest says. `rounds`:
    training samples a round of steps for each version. `module`: the name that requests give to what `actor` has."""

    module = ""
    _topics: tuple[str, ...] = ()

    def __init__(
        self,
        address: str,
        run: str,
        name: str,
        actor: ModuleActor,
        *,
        max_rows: int = MAX_ROWS,
        max_wait: float = 0.0,
        explores: bool = True,
        rounds: bool = False,
    ) -> None:
        self.actor = actor
        self._switch_interval = 0.0 if rounds else SWITCH_INTERVAL
        self._explores = explores
        self.run = run
        self.batches = self.rows = 0
        self._address = address
        self._max_rows = max_rows
        self._max_wait = max_wait
        self._first_at: float | None = None
        self._wanted = self._wants()
        self._subscription: Subscription | None = None
        self._asked_greeting = 0
        self._switched = float("-inf")
        self._news_at = 0.0
        self._columns: dict[tuple[str, int, tuple[str, ...]], tuple[Column, ...]] = {}
        self.session = ServiceSession(secrets.token_bytes(16), run, name=name, package=__version__)
        self.session.on_message = self._wanted.answer
        self._thread = ConnectionThread(Connection(self.session, address), self._step, f"{name}-acting")
        self._thread.start()

    def stop(self) -> None:
        """Say BYE: what is open goes to others."""
        self._thread.stop()
        if self._subscription is not None and not self._thread.is_alive():
            self._subscription.close()
            self._subscription = None

    # ---- in the thread

    def _step(self, now: float) -> float:
        session = self.session
        if session.asked or now >= self._news_at:
            self._news_at = now + NEWS_INTERVAL
            self._read_weights(now)
        asked = self._answerable()
        if not asked:
            self._first_at = None
            return self._news_at
        if self._first_at is None:
            self._first_at = now
        pending = sum(message.rows for message, _ in asked.values())
        if now < self._first_at + self._max_wait and pending < self._max_rows:
            return self._first_at + self._max_wait
        self._first_at = None
        rows = count = 0
        for message, _ in asked.values():
            if count and rows + message.rows > self._max_rows:
                break
            rows += message.rows
            count += 1
        self._answer_all([session.asked.pop(key) for key in list(asked)[:count]], now)
        return now if self._answerable() else self._news_at

    def _answerable(self) -> dict[tuple[bytes, int], Asked]:
        """What is asked of a module whose weights are here."""
        return self.session.asked if self.actor.version >= 0 else {}

    def _answer_all(self, batch: Sequence[Asked], now: float) -> None:
        for explore in (True, False):
            some = [(message, body) for message, body in batch if self._draws(message) is explore]
            if some:
                self._answer(some, explore, now)

    def _answer(self, batch: Sequence[Asked], explore: bool, now: float) -> None:
        """One forward pass for all that fits; a reason for each that doesn't."""
        actor = self.actor
        fit: list[ACT] = []
        bodies: list[Sequence[Buffer]] = []
        for message, body in batch:
            why = self._misfit(message, body)
            if why:
                self._refuse(message, "malformed", why, now)
                continue
            fit.append(message)
            bodies.append(body)
        if not fit:
            return
        rows = sum(message.rows for message in fit)
        try:
            if actor.memory or actor.lookback or actor.agents:
                asked = [from_body(message.columns, body) for message, body in zip(fit, bodies, strict=True)]
                observations = np.concatenate([one["obs"] for one in asked])
            else:
                joined = bytearray().join(buffer for body in bodies for buffer in body)
                observations = np.frombuffer(joined, actor.dtype).reshape(rows, *actor.shape)
                asked = []
            bad = actor.not_finite(observations)
            if bad.any():
                self._answer(self._without(fit, bodies, bad, now), explore, now)
                return
            arrays = self._act_on(fit, asked, observations, explore) if asked else actor.act(observations, explore)
        except Exception as e:  # a user's module may raise anything; who asked is told, and the service goes on
            if len(fit) > 1:  # perhaps for one of them alone: an observation that overflows, say
                for one in zip(fit, bodies, strict=True):
                    self._answer([one], explore, now)
                return
            logger.warning("the module can't act: %s: %s", type(e).__name__, e)
            text = f"{type(e).__name__}: {e}"[:1000]
            for message in fit:
                self._say(message, ACTION(message.session, message.request, code="failed", text=text), b"", now)
            return
        self.batches += 1
        self.rows += rows
        if rows == len(fit):
            # Each asks for one: their columns' bytes lie side by side, so that an answer is one slice.
            flat = [array.reshape(rows, -1).view(np.uint8) for array in arrays.values()]
            beside_each_other = np.concatenate(flat, axis=1)
            width, data = beside_each_other.shape[1], beside_each_other.tobytes()
            columns = self._columns_of(arrays, 1)
            for i, message in enumerate(fit):
                self._give(message, columns, data[i * width : (i + 1) * width], now)
            return
        first = 0
        for message in fit:
            last = first + message.rows
            answer = b"".join(array[first:last].tobytes() for array in arrays.values())
            self._give(message, self._columns_of(arrays, message.rows), answer, now)
            first = last

    def _without(
        self, fit: Sequence[ACT], bodies: Sequence[Sequence[Buffer]], bad: NDArray[np.bool_], now: float
    ) -> list[Asked]:
        """The requests that have no row of these; the others are told."""
        rest = []
        first = 0
        for message, body in zip(fit, bodies, strict=True):
            rows = bad[first : first + message.rows]
            first += message.rows
            if rows.any():
                text = f"the observation in row {int(rows.argmax())} holds NaN or infinity"
                self._say(message, ACTION(message.session, message.request, code="malformed", text=text), b"", now)
            else:
                rest.append((message, body))
        return rest

    def _act_on(
        self,
        fit: Sequence[ACT],
        asked: Sequence[dict[str, NDArray[Any]]],
        observations: NDArray[Any],
        explore: bool,
    ) -> dict[str, NDArray[Any]]:
        """Columns of the answer for requests that may bring more than an observation: memory, or what came before."""
        actor = self.actor
        memory = actor.memory
        state = memory.starts(len(observations))
        starts = np.ones(len(observations), bool)
        earlier: list[Before | None] = []
        first = 0
        for message, arrays in zip(fit, asked, strict=True):
            rows = slice(first, first + message.rows)
            first += message.rows
            if memory and STATE_IN + memory.names[0] in arrays:
                starts[rows] = arrays.get(STARTS, False)
                for array, name in zip(state, memory.names, strict=True):
                    array[rows] = arrays[STATE_IN + name]
            counts = arrays[STEPS_BEFORE].tolist() if OBS_BEFORE in arrays else []
            for i, count in enumerate(counts):
                earlier.append(Before(*(arrays[name][i, actor.lookback - count :] for name in BEFORE)))
            earlier += [None] * (message.rows - len(counts))
        agents = [agent for message in fit for agent in message.agents] if actor.agents else None
        columns = actor.act(observations, explore, state, starts, earlier, agents)
        if actor.lookback:
            columns[LOOKBACK] = np.full(len(observations), actor.lookback, np.int32)
        return columns

    def _columns_of(self, arrays: dict[str, NDArray[Any]], rows: int) -> tuple[Column, ...]:
        key = (self.module, rows, tuple(arrays))
        columns = self._columns.get(key)
        if columns is None:
            columns = tuple(column_of(name, array[:1].repeat(rows, 0)) for name, array in arrays.items())
            if rows <= 64:
                self._columns[key] = columns
        return columns

    def _give(self, message: ACT, columns: tuple[Column, ...], body: bytes, now: float) -> None:
        self._say(message, ACTION(message.session, message.request, self.run, self.actor.version, columns), body, now)

    def _refuse(self, message: ACT, code: str, text: str, now: float) -> None:
        self._say(message, ACTION(message.session, message.request, code=code, text=text), b"", now)

    def _say(self, message: ACT, answer: ACTION, body: bytes, now: float) -> None:
        self.session.answer(answer, [body] if body else [], now)

    def _draws(self, message: ACT) -> bool:
        if message.explore is not None:
            return message.explore
        return self.actor.manifest.evaluation_explores if message.evaluation else self._explores

    def _misfit(self, message: ACT, body: Sequence[Buffer]) -> str:
        """Why this request can't be answered; '' when it can."""
        actor, column = self.actor, message.columns[0]
        if message.module != self.module:
            return f"there is no module '{message.module}' here: leave it out"
        if actor.agents and not message.agents:
            return f"expected 'agents', whose each of the {message.rows} rows is: connectors may treat them differently"
        rest = message.columns[1:]
        if column.name != "obs" or (rest and not actor.memory and not actor.lookback):
            names = ", ".join(c.name for c in message.columns)
            return f"expected one column 'obs', got {names}"
        if column.shape[1:] != actor.shape or np.dtype(column.dtype) != actor.dtype:
            return (
                f"expected observations of {actor.dtype}{list(actor.shape)}, got {np.dtype(column.dtype)}"
                f"{list(column.shape[1:])}: start the simulator with the trainer's environment"
            )
        return self._misfit_beside(rest, body) if rest else ""

    def _misfit_beside(self, rest: Sequence[Column], body: Sequence[Buffer]) -> str:
        """Why what comes beside the observations doesn't fit."""
        actor = self.actor
        memory, lookback = actor.memory, actor.lookback
        found = {c.name: (c.dtype, c.shape[1:]) for c in rest}
        named = zip(memory.names, memory.start, strict=True)
        expected = {STATE_IN + name: (array.dtype.str, array.shape) for name, array in named}
        action = actor.manifest.action
        history = {
            OBS_BEFORE: (actor.dtype.str, (lookback, *actor.shape)),
            ACTIONS_BEFORE: (np.dtype(action.dtype).str, (lookback, *action.shape)),
            REWARDS_BEFORE: ("<f4", (lookback,)),
            STEPS_BEFORE: ("<i4", ()),
        }
        told = {name: found.pop(name) for name in history if name in found}
        if told and (told != history or not lookback):
            return f"expected {_said(history)}, or none of them where all rows begin an episode; got {_said(told)}"
        if told:
            columns = (Column("obs", actor.dtype.str, (rest[0].shape[0], *actor.shape)), *rest)
            arrays = from_body(columns, body)
            counts = arrays[STEPS_BEFORE]
            if counts.min() < 0 or counts.max() > lookback:
                return f"'{STEPS_BEFORE}' must be from 0 to {lookback}"
            there = np.arange(lookback) >= (lookback - counts.astype(np.int64))[:, np.newaxis]
            if there.any() and (why := actor.misfit_before(Before(*(arrays[name][there] for name in BEFORE)))):
                return why
        if found.get(STARTS) == ("|b1", ()):
            del found[STARTS]
        if found and found != expected:
            return (
                f"expected the policy's memory before this step, {_said(expected)}, or none of it where all rows "
                f"begin an episode; got {_said(found)}"
            )
        return ""

    # ---- weights

    def _read_weights(self, now: float) -> None:
        session, wanted = self.session, self._wanted
        if session.state is not State.LIVE:
            return
        self._tell(now)
        address = beside(self._address, session.weights_address) if session.weights_address else ""
        if self._subscription is not None and self._subscription.address != address:
            self._subscription.close()
            self._subscription = None
        if self._subscription is None and address:
            self._subscription = Subscription(address, self._topics)
        if self._subscription is not None:
            for message, body in self._subscription.read():
                wanted.news(message, body, now)
        moved = wanted.moved
        if session.greeting != self._asked_greeting or (moved is not None and now - moved >= STALLED):
            self._asked_greeting = session.greeting
            wanted.restart(now)
        session.ask(wanted.asks(now), now)
        self._switch(now)

    def _wants(self) -> Wanted:
        """What it is to hear of, from the beginning."""
        return OwnPolicy()

    def _tell(self, now: float) -> None:
        self._wanted.told(self.session.run, self.session.version, "", now)

    def _switch(self, now: float) -> None:
        """Act by the newest weights from now on."""
        wanted = self._wanted
        assert isinstance(wanted, OwnPolicy)
        newest = wanted.newest
        if newest is None or wanted.run != self.run or newest[0] <= self.actor.version:
            return
        if self.actor.version >= 0 and now - self._switched < self._switch_interval:
            return
        try:
            self.actor.apply(*newest)
        except Exception as e:  # torch's own errors too; the next version may fit
            logger.warning("weights %d can't be acted by: %s", newest[0], e)
        self._switched = now
