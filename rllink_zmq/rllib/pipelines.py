"""The connectors that a user configured, as RLlib's own runner would run them: where runners compute actions, and where
fragments become episodes.

A request brings one observation, so a piece may look at that one alone; `Pipelines.check` tries each with steps before
it and without, and names the one that answers differently. A piece that rewrites observations (a filter, flattening)
does so again for the fragment that the simulator sends, with the same state: the state belongs to a version of the
weights, and travels at the end of their bytes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tree  # dm_tree, which RLlib needs
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.connectors.connector_v2 import ConnectorV2
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllink_zmq.errors import PolicyError
from rllink_zmq.packing import Packing, packing_of
from rllink_zmq.rllib.recurrent import Memory
from rllink_zmq.rllib.states import from_bytes, to_bytes

TRIED = 4
"""Observations that pieces are tried with at start."""

_OUTPUTS = (Columns.ACTIONS, Columns.ACTION_LOGP, Columns.ACTION_DIST_INPUTS)


def has_own_connectors(config: AlgorithmConfig) -> bool:
    """Whether `config` changes RLlib's default pipelines."""
    return (
        config._env_to_module_connector is not None
        or config._module_to_env_connector is not None
        or not config.add_default_connectors_to_env_to_module_pipeline
        or not config.add_default_connectors_to_module_to_env_pipeline
    )


class Pipelines:
    """A config's env-to-module and module-to-env pipelines. They never learn of what they see (a filter's statistics),
    only from `set_state`. Not for two threads.

    `learns`: an env-to-module pipeline of the same config that shall learn instead, by `learn`.
    """

    def __init__(self, config: AlgorithmConfig, device: Any = None, *, learns: Any = None) -> None:
        self.observation_space: gym.Space[Any] = config.observation_space
        self.action_space: gym.Space[Any] = config.action_space
        self._packing: Packing | None = packing_of(self.observation_space)
        spaces = dict.fromkeys((INPUT_ENV_SPACES, INPUT_ENV_SINGLE_SPACES), (self.observation_space, self.action_space))
        self.to_module = config.build_env_to_module_connector(env=None, spaces=spaces, device=device)
        self.to_env = config.build_module_to_env_connector(env=None, spaces=spaces)
        made = 0 if config._env_to_module_connector is None else _count_own(config, self.to_module)
        self._own: list[ConnectorV2] = self.to_module.connectors[:made]
        for piece in self._own:
            if getattr(piece, "_update_stats", None):
                piece._update_stats = False  # RLlib's MeanStdFilter, which has no public name for it
        self._learning: list[ConnectorV2] = [] if learns is None else learns.connectors[:made]
        self.stateful = bool(state_bytes(self.to_module))

    # ---- state

    @property
    def state(self) -> bytes:
        """Of the env-to-module pieces; b'' where they have none. Raises `PolicyError` for what can't travel."""
        return state_bytes(self.to_module)

    def set_state(self, state: bytes) -> None:
        """As of `state`. Raises `PolicyError` for bytes that are none."""
        if state:
            self.to_module.set_state(from_bytes(state))

    # ---- acting

    def act(
        self, module: Any, rows: NDArray[Any], explore: bool, memory: Memory, before: Sequence[torch.Tensor]
    ) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any]]]:
        """Columns of an answer for (B, *row) observations as they travel: RLlib's pipelines around `module`; and its
        memory after the step, which was `before`."""
        return self._act(module, self._episodes(self._each(rows)), explore, memory, before)

    def _act(
        self,
        module: Any,
        episodes: list[SingleAgentEpisode],
        explore: bool,
        memory: Memory,
        before: Sequence[torch.Tensor],
    ) -> tuple[dict[str, NDArray[Any]], list[NDArray[Any]]]:
        shared: dict[str, Any] = {}
        with torch.no_grad():
            batch = self.to_module(
                rl_module=module, batch={}, episodes=episodes, explore=explore, shared_data=shared
            )  # fmt: skip
            if memory:
                batch[Columns.STATE_IN] = memory.nested(before)  # to RLlib these episodes begin
            out = module.forward_exploration(batch) if explore else module.forward_inference(batch)
            after = [array.numpy(force=True) for array in memory.flat(out[Columns.STATE_OUT])] if memory else []
            answer = self.to_env(
                rl_module=module, batch=dict(out), episodes=episodes, explore=explore, shared_data=shared
            )  # fmt: skip
        if Columns.ACTIONS not in answer or Columns.ACTION_DIST_INPUTS not in answer:
            raise PolicyError(
                f"{type(module).__name__} and the module-to-env pieces answer with {sorted(answer)}: a learner of PPO, "
                f"APPO or IMPALA needs {Columns.ACTIONS} and {Columns.ACTION_DIST_INPUTS}"
            )
        count = len(episodes)
        columns = {name: _stacked(answer[name], count) for name in _OUTPUTS if name in answer}
        if Columns.ACTION_LOGP not in columns:
            columns[Columns.ACTION_LOGP] = np.zeros(count, np.float32)
        if Columns.ACTIONS_FOR_ENV in answer:
            columns["env_actions"] = _stacked(answer[Columns.ACTIONS_FOR_ENV], count)
        return columns, after

    # ---- fragments

    def rewritten(self, observations: Any, count: int) -> tuple[Any, gym.Space[Any]]:
        """What an RLlib runner would have in its episodes for `count` observations, a structure of (count, ...) arrays,
        and its space: the same, unless a piece rewrites them."""
        if not self._own:
            return observations, self.observation_space
        each = [tree.map_structure(lambda a, i=i: a[i], observations) for i in range(count)]
        episodes = self._episodes(each)
        found = _seen(self._own, episodes)
        if all(one is other for one, other in zip(found, each, strict=True)):
            return observations, self.observation_space
        return tree.map_structure(lambda *leaves: np.stack(leaves), *found), episodes[0].observation_space

    def learn(self, observations: Any, first: int, count: int) -> None:
        """Let the pipeline that learns see observations `first` .. `count - 1`, in their order."""
        if self.stateful and self._learning:
            each = [tree.map_structure(lambda a, i=i: a[i], observations) for i in range(first, count)]
            _seen(self._learning, self._episodes(each))

    def _each(self, rows: NDArray[Any]) -> list[Any]:
        if self._packing is None:
            return list(rows)
        unpacked = self._packing.arrays(rows)
        return [self._packing.structure([array[i] for array in unpacked]) for i in range(len(rows))]

    def _episodes(self, observations: Iterable[Any]) -> list[SingleAgentEpisode]:
        """One of one observation each."""
        episodes = []
        for observation in observations:
            episode = SingleAgentEpisode(observation_space=self.observation_space, action_space=self.action_space)
            episode.add_env_reset(observation)
            episodes.append(episode)
        return episodes

    # ---- at start

    def check(self, module: RLModule) -> int:
        """Try them all; returns how many `action_dist_inputs` an action has. Raises `PolicyError`, with the name of a
        piece that fails, or that answers differently when it doesn't see the steps before."""
        space = copy.deepcopy(self.observation_space)
        space.seed(0)
        samples = [tree.map_structure(_moderate, space.sample()) for _ in range(TRIED)]
        actions = copy.deepcopy(self.action_space)
        actions.seed(0)
        (alone,), (past,) = self._episodes([samples[-1]]), self._episodes([samples[0]])
        past.id_ = alone.id_  # by which batches name what is in them
        memory = Memory(module)
        outputs = {Columns.STATE_OUT: memory.nested(memory.start)} if memory else {}
        for sample in samples[1:]:
            past.add_env_step(sample, actions.sample(), 1.0, extra_model_outputs=outputs)
        batches: list[dict[str, Any]] = [{}, {}]
        shared: list[dict[str, Any]] = [{}, {}]
        for piece in self.to_module.connectors:
            name = type(piece).__name__
            state = copy.deepcopy(piece.get_state())
            for i, episode in enumerate((alone, past)):
                if state:
                    piece.set_state(state)
                try:
                    batches[i] = piece(
                        rl_module=module, batch=batches[i], episodes=[episode], explore=True, shared_data=shared[i]
                    )
                except Exception as error:  # a user's piece may raise anything
                    where = "for one observation" if i == 0 else "for an episode of several steps"
                    raise PolicyError(
                        f"the env-to-module piece {name} fails {where}: {type(error).__name__}: {error}"
                    ) from error
            if not _same(batches[0], batches[1]) or not _same(alone.get_observations(-1), past.get_observations(-1)):
                raise PolicyError(
                    f"the env-to-module piece {name} looks at the steps before, and a request to the action service "
                    f"brings one observation: have the environment give what it needs (gymnasium.wrappers."
                    f"FrameStackObservation stacks frames, for example) and leave {name} out"
                )
        try:
            before = [torch.from_numpy(array) for array in memory.starts(TRIED)]
            answer, _ = self._act(module, self._episodes(samples), True, memory, before)
        except PolicyError:
            raise
        except Exception as error:  # a user's module or piece
            raise PolicyError(
                f"{type(module).__name__} can't act behind the configured connectors: {type(error).__name__}: {error}"
            ) from error
        return int(answer[Columns.ACTION_DIST_INPUTS].reshape(TRIED, -1).shape[1])


def _seen(pieces: Sequence[ConnectorV2], episodes: list[SingleAgentEpisode]) -> list[Any]:
    """The newest observations of episodes, after these pieces."""
    batch: dict[str, Any] = {}
    shared: dict[str, Any] = {}
    for piece in pieces:
        batch = piece(rl_module=None, batch=batch, episodes=episodes, explore=True, shared_data=shared)
    return [episode.get_observations(-1) for episode in episodes]


class Filters:
    """The state of the env-to-module pieces at each version of the weights, as far as this runner knows it. Several
    threads may use it. `keep`: how many versions back."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._own: dict[int, bytes] = {}
        self._published: dict[int, bytes] = {}

    def own(self, version: int, state: bytes) -> None:
        """RLlib gave this runner these weights when its pieces were in this state."""
        self._note(self._own, version, state)

    def published(self, version: int, state: bytes) -> None:
        """This state came with the weights that simulators' actions are chosen by."""
        self._note(self._published, version, state)

    def _note(self, known: dict[int, bytes], version: int, state: bytes) -> None:
        with self._lock:
            known[version] = state
            for old in [v for v in known if v < version - self._keep]:
                del known[old]

    def at(self, version: int) -> bytes | None:
        """The state at this version. What was published goes before what this runner would have published."""
        with self._lock:
            return self._published.get(version, self._own.get(version))

    def restart(self) -> None:
        """A new run: its versions begin anew."""
        with self._lock:
            self._own.clear()
            self._published.clear()


def state_bytes(pipeline: ConnectorV2) -> bytes:
    """The state of a pipeline's pieces, to travel; b'' where they have none. Raises `PolicyError`."""
    state = {name: inner for name, inner in pipeline.get_state().items() if inner}
    return to_bytes(state) if state else b""


def _count_own(config: AlgorithmConfig, pipeline: Any) -> int:
    """How many pieces at the beginning of the pipeline are the user's."""
    plain = config.copy(copy_frozen=False)
    plain._env_to_module_connector = None
    spaces = dict.fromkeys((INPUT_ENV_SPACES, INPUT_ENV_SINGLE_SPACES), (config.observation_space, config.action_space))
    return len(pipeline.connectors) - len(plain.build_env_to_module_connector(env=None, spaces=spaces).connectors)


def _moderate(value: Any) -> Any:
    array = np.asarray(value)
    return np.clip(array, -10.0, 10.0).astype(array.dtype) if array.dtype.kind == "f" else value


def _stacked(values: Any, count: int) -> NDArray[Any]:
    """A column of `count` rows out of what a pipeline made: a list of rows, or an array of them."""
    array: NDArray[Any] = np.stack([np.asarray(v) for v in values]) if isinstance(values, list) else np.asarray(values)
    if len(array) != count:
        raise PolicyError(f"the module-to-env pieces make {len(array)} rows of {count} observations")
    return np.ascontiguousarray(array)


def _same(one: Any, other: Any) -> bool:
    """Two structures of lists, dicts, arrays and tensors."""
    mine, its = tree.flatten_with_path(one), tree.flatten_with_path(other)
    if [path for path, _ in mine] != [path for path, _ in its]:
        return False
    return all(_equal(a, b) for (_, a), (_, b) in zip(mine, its, strict=True))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        one, other = one.numpy(force=True), torch.as_tensor(other).numpy(force=True)
    if isinstance(one, np.ndarray | np.generic | float | int):
        a, b = np.asarray(one), np.asarray(other)
        return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)
    return type(one) is type(other)  # what else is in a batch: episodes and such


__all__ = ["Filters", "Pipelines", "has_own_connectors", "state_bytes"]
