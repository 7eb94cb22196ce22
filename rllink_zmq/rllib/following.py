"""Episodes that a runner follows: for connectors of the user's own that need more of an episode than a request brings.

As in RLlib's own runner the episode is here, from its first observation on, and the pieces see it with each step: they
may look at all of it, keep what they have seen in themselves, draw, learn. What they make of each observation goes into
the answer, and from there into the fragment, so that the learner gets what the policy saw. The price: an episode ends
where its runner does.
"""

from __future__ import annotations

import copy
import threading
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.spaces.space_utils import unbatch

from rllink_zmq.arrays import Buffer, from_body
from rllink_zmq.errors import PolicyError, ProtocolError, RllinkError
from rllink_zmq.fragments import FLOAT32_MAX, observed_as
from rllink_zmq.messages import ACT, FRAGMENT, LOOKBACK, SEEN, SEEN_REWARD, STATE_IN, STATE_OUT, AgentId, Place
from rllink_zmq.policy import PolicyManifest
from rllink_zmq.rllib.actors import ModuleActor
from rllink_zmq.rllib.drawn import moderate, seeded
from rllink_zmq.rllib.exploration import forward
from rllink_zmq.rllib.flattening import Came
from rllink_zmq.rllib.pieces import cant_act, state_of
from rllink_zmq.rllib.pipelines import Pipelines
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.spaces import from_wire

FORGOTTEN = 600.0
"""Seconds after which an episode of which nothing was heard is followed no longer."""

ENDED = 60.0
"""Seconds for which the last answer of an episode that has ended is kept: it may be lost on its way."""

MOST = 10_000
"""Episodes that are followed at once."""

MOST_BACK = 1024
"""Steps before a fragment, at most, that it brings for the learner's connectors to look at."""


class LostError(RllinkError):
    """Nobody follows this episode, or not from where it is said to be."""


class Followed:
    """An episode that goes on here. `t`: of its newest observation; `heard`: when that came. `acted`: what was told for
    it, for RLlib's `add_env_step`; None = nothing yet. `place`, `brought`: the newest observation's, as it came;
    `shown`: pieces have seen it, and may have rewritten it; `looked`: what they made of it, where no action was wanted.
    `ended`: the last answer, of one that is over. `modules`: of several agents, by which each acts, and `observed`: who
    has a newest observation."""

    def __init__(self, key: tuple[bytes, str]) -> None:
        self.key = key
        self.episode: Any = None
        self.place = Place("e", 0)
        self.brought: Any = None
        self.shown = False
        self.looked: _Looked | None = None
        self.modules: dict[AgentId, str] = {}
        self.observed: list[AgentId] = []
        self.t = 0
        self.heard = time.monotonic()
        self.acted: tuple[Any, Any] | None = None
        self.ended: Any = None


class _Looked(NamedTuple):
    """What the pieces made of an episode's newest observation, for the action that is wanted later."""

    batch: Any
    shared: dict[str, Any]


class Follower(ABC):
    """Follows episodes by `pipelines`, which see each of their observations once. `longest`: RLlib's own runner begins
    a new chunk after so many steps, with `horizon` of them to look back at. Not for two threads."""

    def __init__(self, pipelines: Any, longest: float, horizon: int) -> None:
        self.pipelines = pipelines
        self._longest, self._horizon = longest, horizon
        self._episodes: OrderedDict[tuple[bytes, str], Followed] = OrderedDict()
        self._ended: OrderedDict[tuple[bytes, str], Followed] = OrderedDict()
        self._shared: dict[str, Any] = {}

    def place(self, session: bytes, place: Place, brought: Any) -> Followed:
        """The episode that goes on with what was `brought`. Raises `LostError`."""
        key = (session, place.episode)
        ended = self._ended.get(key)
        if ended is not None and ended.t == place.t:
            return ended  # the answer has been lost
        known = self._episodes.get(key)
        if place.t == 0 and (known is None or known.t or self._begins_anew(known, brought)):
            self._forget_old()
            known = Followed(key)
            known.episode = self._begun(known, copy.deepcopy(brought))
            self._episodes[key] = known
            self._ended.pop(key, None)  # the name is used again
        elif known is None:
            raise LostError(f"episode '{place.episode}' is not followed here (any more)")
        elif place.t > known.t and self._has_acted(known):
            if len(known.episode) >= self._longest and self._may_cut(known.episode):
                known.episode = known.episode.cut(len_lookback_buffer=self._horizon)
            try:
                self._go_on(known, place, copy.deepcopy(brought))
            except Exception:
                del self._episodes[key]  # RLlib's episode may be anywhere
                raise
            known.t, known.acted, known.shown, known.looked = place.t, None, False, None
        elif place.t != known.t:
            raise LostError(f"episode '{place.episode}' is at step {known.t} here, not at {place.t}")
        elif self._tells_more(known, place, brought):
            known.looked = known.acted = None  # what was answered has been given up
        known.place, known.brought = place, brought
        known.heard = time.monotonic()
        self._episodes.move_to_end(key)
        return known

    def _forget_old(self) -> None:
        now = time.monotonic()
        for kept, seconds in ((self._episodes, FORGOTTEN), (self._ended, ENDED)):
            while kept and (next(iter(kept.values())).heard < now - seconds or len(kept) >= MOST):
                kept.popitem(last=False)

    def see(self, known: Followed, module: Any, explore: bool) -> Any:
        """What the pieces make of an episode's newest observations, where no action is wanted (yet)."""
        if known.ended is None and known.looked is None and known.acted is None:
            batch = self._batch([known], module, explore)
            if known.episode.is_done:
                known.ended, known.episode = self._seen(known), None
                self._ended[known.key] = self._episodes.pop(known.key)
            else:
                known.looked = _Looked(batch, dict(self._shared))
        return self._seen(known) if known.ended is None else known.ended

    def newest(self, known: Followed) -> Any:
        """What the pieces have made of them."""
        return self._seen(known)

    def act(
        self, episodes: Sequence[Followed], module: Any, explore: bool, sampled: int
    ) -> list[tuple[list[int], Any]]:
        """Actions for the newest observations: parts of `episodes`, by their indices, and what is answered for each
        part."""
        looked = {i for i, known in enumerate(episodes) if known.looked is not None}
        parts = [[i for i in range(len(episodes)) if i not in looked], *([i] for i in sorted(looked))]
        found = []
        with torch.no_grad():
            for part in filter(None, parts):
                mine = [episodes[i] for i in part]
                kept, mine[0].looked = mine[0].looked, None
                if kept is None:
                    batch = self._batch(mine, module, explore)
                else:
                    batch, self._shared = kept
                found.append((part, self._acted(mine, batch, module, explore, sampled)))
        return found

    def _batch(self, several: Sequence[Followed], module: Any, explore: bool) -> Any:
        """What the pieces make of these. Where they have been shown an observation before (they failed, or the answer
        has been lost) it is as it came."""
        for known in several:
            if known.shown:
                self._again(known, copy.deepcopy(known.brought))
            known.shown = True
        episodes = [known.episode for known in several]
        to_module: Any = self.pipelines.to_module
        return to_module(rl_module=module, batch={}, episodes=episodes, explore=explore, shared_data=self._shared)

    def _may_cut(self, episode: Any) -> bool:
        return True

    def _tells_more(self, known: Followed, place: Place, brought: Any) -> bool:
        """Whether something else is told of a step than before."""
        told = (place.reward, place.end) == (known.place.reward, known.place.end)
        return not (told and alike(brought, known.brought))

    def _begins_anew(self, known: Followed, brought: Any) -> bool:
        """Whether an episode begins that can't be the one that has begun under its name."""
        return False

    def _has_acted(self, known: Followed) -> bool:
        return known.acted is not None

    @abstractmethod
    def _begun(self, known: Followed, brought: Any) -> Any:
        """RLlib's episode, with its first observations."""

    @abstractmethod
    def _go_on(self, known: Followed, place: Place, brought: Any) -> None:
        """Its next step."""

    @abstractmethod
    def _again(self, known: Followed, brought: Any) -> None:
        """Its newest observations once more, as they came."""

    @abstractmethod
    def _seen(self, known: Followed) -> Any:
        """Its newest observations as the pieces have left them, as they travel."""

    @abstractmethod
    def _acted(self, episodes: Sequence[Followed], batch: Any, module: Any, explore: bool, sampled: int) -> Any:
        """What is answered, and each episode's action is kept."""


class SingleFollower(Follower):
    """Of one agent. `seen_space`: of what the pieces make of observations."""

    pipelines: Pipelines

    def __init__(
        self, pipelines: Pipelines, seen_space: gym.Space[Any], memory: Memory, longest: float, horizon: int
    ) -> None:
        super().__init__(pipelines, longest, horizon)
        self._memory = memory
        self._rows = SeenRows(seen_space)

    def _begun(self, known: Followed, brought: Any) -> Any:
        pipelines = self.pipelines
        episode = SingleAgentEpisode(observation_space=pipelines.observation_space, action_space=pipelines.action_space)
        episode.add_env_reset(brought)
        return episode

    def _go_on(self, known: Followed, place: Place, brought: Any) -> None:
        if place.t != known.t + 1:
            raise LostError(f"episode '{place.episode}' is at step {known.t} here, not at {place.t}")
        assert known.acted is not None
        action, outputs = known.acted
        known.episode.add_env_step(
            brought, action, place.reward, terminated=place.end == "terminated", truncated=place.end == "truncated",
            extra_model_outputs=outputs,
        )  # fmt: skip

    def _again(self, known: Followed, brought: Any) -> None:
        episode = known.episode
        episode.observations.data[-1] = brought
        if known.t:
            episode.rewards.data[-1] = known.place.reward
            episode.is_terminated, episode.is_truncated = (
                known.place.end == end for end in ("terminated", "truncated")
            )

    def _seen(self, known: Followed) -> dict[str, NDArray[Any]]:
        episode = known.episode
        return self._rows.both(episode.get_observations(-1), episode.rewards.data[-1] if known.t else 0.0)

    def _acted(
        self, episodes: Sequence[Followed], batch: Any, module: Any, explore: bool, sampled: int
    ) -> dict[str, NDArray[Any]]:
        memory, several = self._memory, [known.episode for known in episodes]
        before = [array.numpy(force=True) for array in memory.flat(batch[Columns.STATE_IN])] if memory else []
        out = forward(module, batch, explore, sampled)
        after = [array.numpy(force=True) for array in memory.flat(out[Columns.STATE_OUT])] if memory else []
        to_env: Any = self.pipelines.to_env
        answer = to_env(rl_module=module, batch=dict(out), episodes=several, explore=explore, shared_data=self._shared)
        columns = self.pipelines.columns_of(answer, len(several), module)
        columns |= stacked([self._seen(known) for known in episodes])
        columns |= {STATE_OUT + name: array for name, array in zip(memory.names, after, strict=True)}
        if any(known.t == 0 for known in episodes):
            columns |= {STATE_IN + name: array for name, array in zip(memory.names, before, strict=True)}
        actions = unbatch(answer[Columns.ACTIONS])
        rest = {name: rows for name, rows in answer.items() if name not in ACTIONS}
        for i, known in enumerate(episodes):
            known.acted = actions[i], {name: rows[i] for name, rows in rest.items()}
        return columns


ACTIONS = (Columns.ACTIONS, Columns.ACTIONS_FOR_ENV)


def stacked(rows: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Columns of some rows."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def alike(one: Any, other: Any) -> bool:
    """Whether two observations are the same."""
    mine, its = tree.flatten(one), tree.flatten(other)
    return len(mine) == len(its) and all(np.array_equal(a, b) for a, b in zip(mine, its, strict=True))


class SeenRows:
    """How what the pieces make of an observation travels: `row`."""

    def __init__(self, space: gym.Space[Any]) -> None:
        self.row, self._packing = observed_as(space)

    def of(self, seen: Any) -> NDArray[Any]:
        """One row. Raises `PolicyError` for what is not of the space."""
        if self._packing is not None:
            return self._packing.pack(seen, _cast)
        return _cast(seen, "an observation", self.row.shape, self.row.dtype)

    def both(self, seen: Any, reward: Any) -> dict[str, NDArray[Any]]:
        """With what they have left of the last reward. Raises `PolicyError` for what isn't finite, too: a fragment
        could not bring it."""
        if not abs(reward) <= FLOAT32_MAX:
            raise PolicyError(f"the env-to-module pieces make a reward of {reward}: it must be a finite float32")
        return {SEEN: self.of(seen), SEEN_REWARD: np.array(reward, np.float64)}


def _cast(value: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    array = np.asarray(value)
    if array.shape != shape:
        raise PolicyError(
            f"the env-to-module pieces make {what} of shape {list(array.shape)}, and their space says {list(shape)}"
        )
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise PolicyError(f"the env-to-module pieces make {what} of {array.dtype}, and their space says {dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise PolicyError(f"the env-to-module pieces make {what} that holds NaN or infinity")
    return array.astype(dtype)


def space_of(declared: gym.Space[Any], seen: Any) -> gym.Space[Any]:
    """Of what pieces have made of an observation, which they may declare to be something else."""
    if isinstance(declared, gym.spaces.Dict | gym.spaces.Tuple) or isinstance(seen, dict | tuple):
        return declared
    array, row = np.asarray(seen), observed_as(declared)[0]
    if array.shape == row.shape and np.can_cast(array.dtype, row.dtype, "same_kind"):
        return declared
    limits = np.finfo(array.dtype) if array.dtype.kind == "f" else np.iinfo(array.dtype)
    return gym.spaces.Box(limits.min, limits.max, array.shape, array.dtype)  # type: ignore[arg-type]


Asked: TypeAlias = tuple[ACT, Sequence[Followed]]
"""A request, and the episodes that it is about."""


class Answer(NamedTuple):
    """To one request: its columns, and by which version; of several modules, by which each of them."""

    columns: dict[str, NDArray[Any]]
    version: int
    modules: Mapping[str, int] = {}


class Follows(Protocol):
    """Who acts for a service that follows episodes."""

    def follow(self, message: ACT, body: Sequence[Buffer]) -> Sequence[Followed]: ...

    def answer(self, some: Sequence[Asked], explore: bool) -> Sequence[Answer]: ...


class FollowingActor(ModuleActor):
    """Acts behind connectors that see whole episodes. `lives`: an env-to-module pipeline of the config that learns of
    what it sees, which nobody else touches but under `lock`. An evaluation's episodes teach nothing."""

    def __init__(
        self,
        module: RLModule,
        manifest: PolicyManifest,
        config: AlgorithmConfig,
        lives: Any,
        lock: threading.Lock,
        device: Any = "cpu",
        sampled: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(module, manifest, config.action_space, False, False, device, sampled)
        assert manifest.seen is not None
        seen, terms = from_wire(manifest.seen), (longest_of(config), config.episode_lookback_horizon)
        self._lock = lock
        self._lives = lives
        self._taught = -1
        self._trains = SingleFollower(Pipelines(config, device, lives=lives), seen, self.memory, *terms)
        self._evaluates = SingleFollower(Pipelines(config, device), seen, self.memory, *terms)

    def follow(self, message: ACT, body: Sequence[Buffer]) -> list[Followed]:
        """The episodes that go on with this request's rows. Raises `LostError`, and `ProtocolError` for observations
        that nobody can act by."""
        observations = from_body(message.columns, body)["obs"]
        bad = self.not_finite(observations)
        if bad.any():
            raise ProtocolError(f"the observation in row {int(bad.argmax())} holds NaN or infinity")
        follower = self._trains
        if message.evaluation:
            follower = self._evaluates
            self._teach(message.places)
        each = follower.pipelines.each(observations)
        return [follower.place(message.session, place, one) for place, one in zip(message.places, each, strict=True)]

    def answer(self, some: Sequence[Asked], explore: bool) -> list[Answer]:
        """What is answered to each of some requests, which are all of training or all of evaluation, and want actions
        all or none."""
        message = some[0][0]
        follower, module = self._evaluates if message.evaluation else self._trains, self._module
        episodes = [known for _, each in some for known in each]
        with self._lock:
            if message.acts:
                columns = joined(follower.act(episodes, module, explore, self._sampled()), len(episodes))
                columns[LOOKBACK] = np.full(len(episodes), self.lookback, np.int32)
            else:
                with torch.no_grad():
                    columns = stacked([follower.see(known, module, explore) for known in episodes])
        told, first = [], 0
        for _, each in some:
            rows = slice(first, first + len(each))
            told.append(Answer({name: array[rows] for name, array in columns.items()}, self.version))
            first += len(each)
        return told

    def _teach(self, places: Sequence[Place]) -> None:
        """Episodes of an evaluation begin with what has been learned until then, by the version that is evaluated."""
        if self._taught != self.version and any(place.t == 0 for place in places):
            self._taught = self.version
            with self._lock:
                copy_state(self._lives, self._evaluates.pipelines.to_module)


def joined(parts: Sequence[tuple[list[int], dict[str, NDArray[Any]]]], rows: int) -> dict[str, NDArray[Any]]:
    """The columns of parts of some rows, in the order of these."""
    if len(parts) == 1:
        return dict(parts[0][1])
    made: dict[str, NDArray[Any]] = {}
    for indices, columns in parts:
        for name, array in columns.items():
            if name not in made:
                made[name] = np.zeros((rows, *array.shape[1:]), array.dtype)
            made[name][indices] = array
    return made


def copy_state(one: Any, other: Any) -> None:
    """Pieces of `other` are in the state that those of `one` are in, as far as they tell it."""
    state = state_of(one)
    if state:
        other.set_state(copy.deepcopy(state))


def longest_of(config: AlgorithmConfig) -> float:
    """After how many steps RLlib's own runner begins a new chunk of an episode."""
    if config.batch_mode == "complete_episodes":
        return float("inf")
    return float(max(1, config.get_rollout_fragment_length(worker_index=1)))


def lookback_of(config: AlgorithmConfig) -> int:
    """How many steps before a fragment its learner may look at."""
    return min(MOST_BACK, int(config.episode_lookback_horizon))


def try_following(config: AlgorithmConfig, module: RLModule) -> tuple[gym.Space[Any], int]:
    """The space of what the pieces make of observations, and how many `action_dist_inputs` an action has. Raises
    `PolicyError` for what can't act in that way either."""
    pipelines = Pipelines(config, lives=Pipelines(config).to_module)
    space = seeded(pipelines.observation_space)
    first, second = (tree.map_structure(moderate, space.sample()) for _ in range(2))
    try:
        episode = SingleAgentEpisode(observation_space=pipelines.observation_space, action_space=pipelines.action_space)
        episode.add_env_reset(first)
        with torch.no_grad():
            pipelines.to_module(rl_module=module, batch={}, episodes=[episode], explore=True, shared_data={})
        seen = space_of(episode.observation_space, episode.get_observations(-1))
        follower = SingleFollower(pipelines, seen, Memory(module), float("inf"), 0)
        for t, one in enumerate((first, second)):
            known = follower.place(b"", Place("e", t), one)
            ((_, columns),) = follower.act([known], module, True, 0)
    except PolicyError:
        raise
    except Exception as error:  # a user's module or piece
        raise cant_act(type(module).__name__, error) from error
    return seen, int(columns[Columns.ACTION_DIST_INPUTS].reshape(1, -1).shape[1])


class FollowedFragments:
    """Fragments of followed episodes, whose observations are what the policy saw, of `space`: what `EpisodeBuilder`
    asks of connectors. `seen_space`: of what the module is given, with several agents."""

    first = -1

    def __init__(self, space: gym.Space[Any], lookback: int, seen_space: gym.Space[Any] | None = None) -> None:
        self.seen_space = seen_space or space
        self.lookback = lookback
        self._space = space

    def rewrite(self, message: FRAGMENT, came: Came) -> tuple[Any, gym.Space[Any]]:
        """As they came. Raises `ProtocolError` for those of a simulator that chose its actions itself: no policy has
        seen them."""
        if all(column.name != Columns.ACTION_DIST_INPUTS for column in message.columns):
            raise ProtocolError(
                "runners follow this training's episodes, and nobody has seen the observations of a simulator that "
                "chooses its actions itself. Let the policy act (get_action)"
            )
        return came.observations, self._space

    def learn(self, message: Any, came: Came) -> None:
        """Nothing: the pieces have seen them."""

    def dist_inputs(self, module: Any, message: Any, came: Came) -> None:
        """None: what `module` itself makes of them."""


__all__ = [
    "FollowedFragments", "FollowingActor", "LostError", "longest_of", "lookback_of", "try_following",
]  # fmt: skip
