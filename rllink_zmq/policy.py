"""The exported policy: observations in, actions and what RLlib must know of them out.

A policy is a *graph* (ONNX, made by `rllink_zmq.rllib.export`) and a `PolicyManifest`. Both travel as one `bytes`
object, the *blob*, in CONFIG. The blob holds the architecture and no weights; `policy_hash` of it is the
architecture's identity. Weights travel as the *body* of STATE: the bytes of the manifest's `weights` back to back, in
its order, C order, little endian. A new version is new inputs to the same graph, never a new session.

The graph, for a batch of B (its dynamic dimension `batch`):

========================  ==========================  ==========================================================
input, in this order      shape                       what
========================  ==========================  ==========================================================
``observations``          (B, *observation.shape)     as the environment gave them, cast to `observation.dtype`
``noise``                 (B, *noise_shape)           float32; independent draws of `noise`
``epsilon``               (B, 1)                      float32; if there is an `epsilon`: its value now, 0 for the best
``state_in/<name>``       (B, *its shape)             a recurrent policy's memory before this step: one for each `state`
``weights/<name>``        as in the manifest          one for each weight, in the manifest's order
========================  ==========================  ==========================================================

A packed observation (of a Dict or Tuple; see `rllink_zmq.packing`) is not one input but one for each of its parts, in
their order: ``observations/0``, ``observations/1`` and so on, (B, *shape) each. So are packed actions, among the
outputs: ``actions/0``, and ``env_actions/0`` where the environment wants something else than that; rows of as many
entries as the part has.

======================  ==========  ==================================================================================
output                  shape       what
======================  ==========  ==================================================================================
``actions``             (B, n)      the action RLlib trains on, one row of n = number of entries of `action.shape`
``action_logp``         (B, 1)      its log-probability, float32
``action_dist_inputs``  (B, k)      the distribution's inputs (logits, or means and log stds), float32
``env_actions``         (B, m)      what `env.step` wants; left out where the action goes to the environment as it is
``state_out/<name>``    (B, ...)    the memory after this step, each of the shape of its ``state_in/<name>``
======================  ==========  ==================================================================================

Zeros as noise give the most likely action. This module needs numpy, msgspec and, from `Policy.load` on, onnxruntime.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from rllink_zmq.errors import PolicyError
from rllink_zmq.messages import DictSpace, Space, TupleSpace

if TYPE_CHECKING:
    from onnxruntime import IOBinding, OrtValue, SessionOptions

MAX_BLOB_BYTES = 64 * 1024 * 1024
"""No graph without weights comes near it."""
MAX_WEIGHTS_BYTES = 1 << 30
MAX_ROW_BYTES = 64 * 1024 * 1024
"""One observation, one row of noise."""

MAX_STATES = 32
"""Arrays of a recurrent policy's memory."""

NOISE_BLOCK_BYTES = 64 * 1024
"""Noise is drawn this much at a time (at most 1024 rows): a draw for each step would cost more than its numbers."""

Buffer: TypeAlias = bytes | bytearray | memoryview
DType: TypeAlias = Literal[
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
]
Shape: TypeAlias = Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(max_length=8)]
Noise: TypeAlias = Literal["gumbel", "normal"]
NoiseRun: TypeAlias = tuple[Noise, Annotated[int, Meta(ge=1, lt=1 << 24)]]
"""So many numbers of a row of noise, one after the other."""
EpsilonPoint: TypeAlias = tuple[Annotated[float, Meta(ge=0, lt=1 << 53)], Annotated[float, Meta(ge=0, le=1)]]


class Tensor(Struct, frozen=True, array_like=True):
    """One row (an observation, an action) without the batch dimension. `dtype` is NumPy's name."""

    dtype: DType
    shape: Shape

    @property
    def size(self) -> int:
        """How many entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.size * np.dtype(self.dtype).itemsize


def split_rows(rows: NDArray[np.uint8], parts: Sequence[Tensor]) -> list[NDArray[Any]]:
    """(B, bytes of all parts) -> (B, *shape) of each part, copied."""
    arrays: list[NDArray[Any]] = []
    at = 0
    for part in parts:
        array = np.empty((len(rows), *part.shape), part.dtype)
        if array.size:
            array.reshape(len(rows), -1).view(np.uint8)[...] = rows[:, at : at + part.nbytes]
        arrays.append(array)
        at += part.nbytes
    return arrays


def join_rows(parts: Sequence[NDArray[Any]], rows: int) -> NDArray[np.uint8]:
    """(B, ...) of each part -> (B, bytes of all parts)."""
    flat = [np.ascontiguousarray(part).reshape(rows, -1).view(np.uint8) for part in parts]
    return np.concatenate(flat, axis=1)


class Weight(Struct, frozen=True, array_like=True):
    """One array of the weights: a parameter or a buffer of the RLModule, under its `state_dict` name."""

    name: Annotated[str, Meta(min_length=1, max_length=512)]
    dtype: DType
    shape: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return Tensor(self.dtype, self.shape).nbytes


class State(Struct, frozen=True, array_like=True):
    """One array of a recurrent policy's memory, without the batch dimension. `initial`: its bytes at an episode's start
    (C order, little endian); none = zeros."""

    name: Annotated[str, Meta(min_length=1, max_length=48)]
    dtype: DType
    shape: Shape
    initial: bytes = b""

    @property
    def start(self) -> NDArray[Any]:
        """The array at an episode's start: `shape`. Raises PolicyError if `initial` has another size."""
        tensor = Tensor(self.dtype, self.shape)
        if not self.initial:
            return np.zeros(self.shape, self.dtype)
        if len(self.initial) != tensor.nbytes:
            raise PolicyError(
                f"the policy's state '{self.name}' starts with {len(self.initial)} bytes, not {tensor.nbytes}"
            )
        return (
            np.frombuffer(self.initial, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape).astype(self.dtype)
        )


class PolicyManifest(Struct, frozen=True):
    """What a client must know to run the graph. `module` is the RLModule's class. `action` is what RLlib trains on,
    `env_action` what `env.step` wants. `action_dist_inputs`: how many for one action. `opset`: ONNX's.
    `explores`, `evaluation_explores`: whether episodes that are trained on, and those that are not, draw their actions,
    or take the most likely ones.
    `packed`: the observations' space where they are packed, each row of `observation` being the bytes of `parts`.
    `packed_action`: the actions' space where they are packed, each row of `action` being the bytes of `action_parts`,
    and each of `env_action` those of `env_action_parts`. `noise_runs`: what a row of noise is made of, where its
    numbers are not all `noise`.
    `remote_only`: why this policy can't run but where the learner's modules are; there is no graph then. `connectors`:
    bytes at the end of a version's, which are the state of such a policy's connectors. `state`: the memory of a
    recurrent policy. `lookback`: how many steps before the newest observation such connectors look at. `seen`: runners
    follow the episodes of this policy, and this is the space of what fragments have for observations. `epsilon`: (env
    steps sampled in the training, value) in rising order, linear in between: the input of an epsilon-greedy graph."""

    format: Literal[1]
    module: Annotated[str, Meta(max_length=256)]
    observation: Tensor
    noise: Noise
    noise_shape: Shape
    action: Tensor
    env_action: Tensor
    action_dist_inputs: Annotated[int, Meta(ge=1, lt=1 << 24)]
    opset: Annotated[int, Meta(ge=1, lt=1000)]
    weights: Annotated[tuple[Weight, ...], Meta(max_length=16_384)]
    explores: bool = True
    evaluation_explores: bool = True
    packed: Space | None = None
    parts: Annotated[tuple[Tensor, ...], Meta(max_length=256)] = ()
    remote_only: Annotated[str, Meta(max_length=4096)] = ""
    connectors: Annotated[int, Meta(ge=0, lt=1 << 30)] = 0
    state: Annotated[tuple[State, ...], Meta(max_length=MAX_STATES)] = ()
    lookback: Annotated[int, Meta(ge=0, le=1024)] = 0
    packed_action: Space | None = None
    action_parts: Annotated[tuple[Tensor, ...], Meta(max_length=256)] = ()
    env_action_parts: Annotated[tuple[Tensor, ...], Meta(max_length=256)] = ()
    noise_runs: Annotated[tuple[NoiseRun, ...], Meta(max_length=256)] = ()
    epsilon: Annotated[tuple[EpsilonPoint, ...], Meta(max_length=1024)] = ()
    seen: Space | None = None

    @property
    def weights_bytes(self) -> int:
        """Size of a weights body."""
        return sum(weight.nbytes for weight in self.weights) + self.connectors


class Actions(NamedTuple):
    """What a policy answers for B observations (`Policy.act`) or for one (`Policy.act_one`, which see)."""

    env_actions: Any
    """(B, *env_action.shape): for `env.step`, never for RLlib. Of several parts: dicts and tuples of such arrays."""
    actions: Any
    """(B, *action.shape): for RLlib, never for `env.step`. Of several parts: rows of their bytes."""
    action_logp: Any
    """(B,) float32."""
    action_dist_inputs: NDArray[np.float32]
    """(B, k) float32."""
    state: tuple[NDArray[Any], ...] = ()
    """The memory after the step, for the next call: (B, *shape) for each of the manifest's `state`."""


_Blob: TypeAlias = tuple[PolicyManifest, bytes]
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[_Blob] = msgspec.msgpack.Decoder(_Blob)


def pack_policy(manifest: PolicyManifest, graph: bytes) -> bytes:
    """The blob of a manifest and a serialised ONNX model."""
    return _encoder.encode((manifest, graph))


def unpack_policy(blob: Buffer) -> tuple[PolicyManifest, bytes]:
    """Manifest and ONNX model of a blob. Raises PolicyError for anything that `pack_policy` would not have made."""
    size = memoryview(blob).nbytes
    if size > MAX_BLOB_BYTES:
        raise PolicyError(f"a policy of {size} bytes is over the limit of {MAX_BLOB_BYTES}")
    try:
        manifest, graph = _decoder.decode(blob)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PolicyError(f"not an exported policy, or one of another version of this package: {error}") from error
    if manifest.weights_bytes > MAX_WEIGHTS_BYTES:
        raise PolicyError(f"weights of {manifest.weights_bytes} bytes are over the limit of {MAX_WEIGHTS_BYTES}")
    for what, space, row, parts in (
        ("an observation", manifest.packed, manifest.observation, manifest.parts),
        ("an action", manifest.packed_action, manifest.action, manifest.action_parts),
        ("an environment's action", manifest.packed_action, manifest.env_action, manifest.env_action_parts),
    ):
        taken = Tensor("uint8", (sum(part.nbytes for part in parts),))
        if (space is not None or parts) and (space is None or row != taken or count_leaves(space) != len(parts)):
            raise PolicyError(f"the {len(parts)} parts of {what} take {taken.nbytes} bytes, a row is {row}")
    if manifest.noise_runs and (sum(count for _, count in manifest.noise_runs),) != manifest.noise_shape:
        raise PolicyError(f"a row of noise is {manifest.noise_shape}, and made of {manifest.noise_runs}")
    if any(a[0] >= b[0] for a, b in pairwise(manifest.epsilon)):
        raise PolicyError(f"the schedule of epsilon must rise in env steps, it is {manifest.epsilon}")
    noise = Tensor("float32", manifest.noise_shape)
    states = [Tensor(state.dtype, state.shape) for state in manifest.state]
    rows = (manifest.observation, manifest.action, manifest.env_action, noise, *states)
    if max(part.nbytes for part in rows) > MAX_ROW_BYTES:
        raise PolicyError(
            f"one row of observations, actions, noise or state is over the limit of {MAX_ROW_BYTES} bytes"
        )
    return manifest, graph


def policy_hash(blob: Buffer) -> str:
    """Identity of an architecture, 32 hex digits: the same for every export of it, whatever its weights."""
    return hashlib.blake2b(blob, digest_size=16).hexdigest()


def count_leaves(space: Space) -> int:
    """How many arrays a value of this space is made of."""
    if isinstance(space, DictSpace):
        return sum(count_leaves(inner) for _, inner in space.spaces)
    return sum(map(count_leaves, space.spaces)) if isinstance(space, TupleSpace) else 1


def structured(space: Space, leaves: Iterator[Any]) -> Any:
    """Dicts and tuples of `leaves`, as `space` has them."""
    if isinstance(space, DictSpace):
        return {key: structured(inner, leaves) for key, inner in space.spaces}
    if isinstance(space, TupleSpace):
        return tuple([structured(inner, leaves) for inner in space.spaces])
    return next(leaves)


class Policy:
    """A policy that acts. Make one with `Policy.load`, give it weights with `apply`, then `act` or `act_one`.

    Not for two threads at once: `apply` writes where `act` reads. Actions depend on `seed`, the weights and the
    observations in the order they came, not on how they were split into calls. A recurrent policy remembers nothing
    itself: what a call answers as `state` is the next one's, of the same episode.
    """

    def __init__(self, blob: Buffer, threads: int, seed: int | None) -> None:
        """Use `Policy.load`."""
        self.manifest, self._graph = unpack_policy(blob)
        if self.manifest.remote_only:
            raise PolicyError(
                f"this policy can only be asked for its actions (connect(inference='remote'), simulate --inference "
                f"remote): {self.manifest.remote_only}"
            )
        self.hash = policy_hash(blob)
        self.version: Any = None
        """What `apply` was given last; None before."""
        self.epsilon = self.manifest.epsilon[0][1] if self.manifest.epsilon else 0.0
        """Of an epsilon-greedy policy, now."""
        self._threads = threads
        self.transforms = False
        """Whether the environment wants other actions than RLlib trains on."""
        self._transformed: set[int] = set()
        self._session = self.open_session(batch=1)
        self._batch_session: Any = None
        self._check_signature()
        manifest = self.manifest
        self._random = np.random.default_rng(seed)
        row_bytes = max(1, 4 * math.prod(manifest.noise_shape))
        self._noise = np.empty((max(1, min(1024, NOISE_BLOCK_BYTES // row_bytes)), *manifest.noise_shape), np.float32)
        self._noise_views = [self._noise[row, ...] for row in range(len(self._noise))]
        self._noise_used = self._noise_rows = len(self._noise)
        # Batch 1 lives in these arrays: bound once, filled in place, read in place.
        self._observation_in = np.zeros((1, *manifest.observation.shape), manifest.observation.dtype)
        self._noise_in = np.zeros((1, *manifest.noise_shape), np.float32)
        self._epsilon_in = np.zeros((1, 1), np.float32) if manifest.epsilon else None
        self._action_out = np.zeros((1, manifest.action.size), manifest.action.dtype)
        self._env_action_out = np.zeros((1, manifest.env_action.size), manifest.env_action.dtype)
        self._action_parts = Parts(manifest.action_parts, self._action_out)
        self._env_parts = [
            np.zeros((1, part.size), part.dtype) if i in self._transformed else self._action_parts.arrays[i]
            for i, part in enumerate(manifest.env_action_parts)
        ]
        self._logp_out = np.zeros((1, 1), np.float32)
        self._dist_inputs_out = np.zeros((1, manifest.action_dist_inputs), np.float32)
        self._starts = tuple(state.start for state in manifest.state)
        self._states_in = tuple(start[np.newaxis].copy() for start in self._starts)
        self._states_out = tuple(start[np.newaxis].copy() for start in self._starts)
        self._state_rows = tuple(array[0, ...] for array in self._states_in)
        self._state_views = tuple(array[0, ...] for array in self._states_out)
        self._shape = manifest.observation.shape
        self._observation_row = self._observation_in[0, ...]
        self._parts_in = [np.zeros((1, *part.shape), part.dtype) for part in manifest.parts]
        self._cuts: list[tuple[slice, NDArray[np.uint8]]] = []
        at = 0
        for array in self._parts_in:
            if array.nbytes:
                self._cuts.append((slice(at, at + array.nbytes), array.reshape(-1).view(np.uint8)))
            at += array.nbytes
        self._noise_row = self._noise_in[0, ...]
        self._action_view = self._action_out.reshape(manifest.action.shape)
        self._env_action_view = (
            self._env_action_out.reshape(manifest.env_action.shape) if self.transforms else self._action_view
        )
        self._dist_inputs_view = self._dist_inputs_out[0]
        self._scalar = manifest.action.shape == () and not self.transforms
        self._packed_action = manifest.packed_action
        self._bound: IOBinding | None = None
        self._weights: dict[str, OrtValue] | None = None
        self._arrays: dict[str, NDArray[Any]] = {}

    @classmethod
    def load(cls, blob: Buffer, threads: int = 1, seed: int | None = None) -> Policy:
        """The policy of a blob, without weights.

        `threads`: how many one call may compute on. `seed`: of the noise; None draws one from the system.
        Raises PolicyError if the blob is damaged, or its graph is not what its manifest says.
        """
        return cls(blob, threads, seed)

    @property
    def weights_bytes(self) -> int:
        """The size `apply` wants."""
        return self.manifest.weights_bytes

    def apply(self, version: Any, body: Buffer) -> None:
        """Act with these weights from the next call on.

        `version` is kept as it comes, in `self.version`. `body`: the manifest's weights back to back, C order, little
        endian; copied. Raises PolicyError, and changes nothing, if it has another size. Values are not looked at.
        """
        import onnxruntime

        view = memoryview(body)
        if view.nbytes != self.weights_bytes:
            raise PolicyError(
                f"weights of version {version!r} have {view.nbytes} bytes, policy {self.hash} wants "
                f"{self.weights_bytes}: they belong to another architecture, or were cut"
            )
        if self._weights is None:
            # Bound once: making values and bindings anew costs ten times what the copy does.
            self._arrays = {f"weights/{weight.name}": _aligned(weight) for weight in self.manifest.weights}
            self._weights = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self._arrays.items()
            }
            self._bound = self._bind_one()
        offset = 0
        for weight, array in zip(self.manifest.weights, self._arrays.values(), strict=True):
            sent = np.frombuffer(view, np.dtype(weight.dtype).newbyteorder("<"), math.prod(weight.shape), offset)
            array[...] = sent.reshape(weight.shape)
            offset += weight.nbytes
        self.version = version

    def advance(self, steps: int) -> None:
        """The training has sampled so many env steps: the epsilon of an epsilon-greedy policy follows."""
        points = self.manifest.epsilon
        if points:
            self.epsilon = float(np.interp(steps, [step for step, _ in points], [value for _, value in points]))

    def act(
        self,
        observations: NDArray[Any],
        noise: NDArray[Any] | None = None,
        *,
        explore: bool | NDArray[np.bool_] = True,
        state: Sequence[NDArray[Any]] | None = None,
    ) -> Actions:
        """Actions for B >= 1 observations, in new arrays.

        `observations`: (B, *observation.shape), of a dtype that casts to the policy's within its kind.
        `noise`: (B, *noise_shape), drawn if None. `explore`: False for the most likely actions, or (B,) of which.
        `state`: (B, *shape) for each of the manifest's; None = that of episodes which begin.
        Raises PolicyError before the first `apply`, and for other shapes.
        """
        import onnxruntime

        manifest, weights = self.manifest, self._weights
        if weights is None:
            raise PolicyError(_NO_WEIGHTS)
        rows = len(observations) if np.ndim(observations) else 0
        fed = self._rows(observations, "observations", rows, manifest.observation.shape, manifest.observation.dtype)
        explores = np.broadcast_to(np.asarray(explore, bool), (rows,))
        if noise is None:
            noise = self.draw(np.empty((rows, *manifest.noise_shape), np.float32))
            noise[~explores] = 0.0
        if self._batch_session is None:
            # Batch 1 has a session of its own, whose shapes are all known. Many a process never needs this one.
            self._batch_session = self.open_session(batch=None)
        inputs = {
            **{name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self._given(fed)},
            "noise": onnxruntime.OrtValue.ortvalue_from_numpy(
                self._rows(noise, "noise", rows, manifest.noise_shape, "float32")
            ),
            **weights,
        }
        if manifest.epsilon:
            epsilon = np.where(explores, self.epsilon, 0.0).astype(np.float32)[:, np.newaxis]
            inputs["epsilon"] = onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(epsilon))
        if state is None:
            state = [np.repeat(start[np.newaxis], rows, 0) for start in self._starts]
        for part, array in zip(manifest.state, self._counted(state), strict=True):
            inputs[f"state_in/{part.name}"] = onnxruntime.OrtValue.ortvalue_from_numpy(
                self._rows(array, f"the state '{part.name}'", rows, part.shape, part.dtype)
            )
        names = ["action_logp", "action_dist_inputs", *(f"state_out/{part.name}" for part in manifest.state)]
        told = len(names)
        names += self.action_outputs
        values = self._batch_session.run_with_ort_values(names, inputs)
        outputs = [value.numpy() for value in values]
        env_actions, actions = self._acted(dict(zip(names[told:], outputs[told:], strict=True)), rows)
        return Actions(env_actions, actions, outputs[0].reshape(rows), outputs[1], tuple(outputs[2:told]))

    def _acted(self, outputs: dict[str, NDArray[Any]], rows: int) -> tuple[Any, NDArray[Any]]:
        """What the environments want, and what RLlib does."""
        manifest, space = self.manifest, self._packed_action
        if space is None:
            actions = outputs["actions"].reshape(rows, *manifest.action.shape)
            if not self.transforms:
                return actions.copy(), actions
            return outputs["env_actions"].reshape(rows, *manifest.env_action.shape), actions
        parts = [outputs[f"actions/{i}"] for i in range(len(manifest.action_parts))]
        for_env = [
            outputs.get(f"env_actions/{i}", part).reshape(rows, *shaped.shape)
            for i, (part, shaped) in enumerate(zip(parts, manifest.env_action_parts, strict=True))
        ]
        return structured(space, iter(for_env)), join_rows(parts, rows)

    def act_one(
        self, observation: NDArray[Any], explore: bool = True, state: Sequence[NDArray[Any]] | None = None
    ) -> Actions:
        """The action for one observation: the same as `act` for a batch of one, at a fraction of its cost.

        `observation`: exactly of shape `observation.shape`; values are cast. `explore`: False for the most likely
        action. `state`: the memory of the episode's last step, one array for each of the manifest's `state`; None = the
        episode begins. The answer's `env_actions` is new: an int
        for Discrete, else an array. `actions` is an int for Discrete, `action_logp` a float; `actions` otherwise,
        `action_dist_inputs` (k,) and the `state` are views that THE NEXT CALL OVERWRITES (which may be given that very
        `state`): copy them to keep them.
        Raises PolicyError before the first `apply`, and for another shape.
        """
        bound = self._bound
        if bound is None:
            raise PolicyError(_NO_WEIGHTS)
        if observation.shape != self._shape:
            raise PolicyError(f"expected one observation of shape {self._shape}, got {observation.shape}")
        self._observation_row[...] = observation
        for cut, part in self._cuts:
            part[...] = observation[cut]
        used = self._noise_used
        if used == self._noise_rows:
            self._refill()
            used = 0
        self._noise_row[...] = self._noise_views[used] if explore else 0.0
        if self._epsilon_in is not None:
            self._epsilon_in[0, 0] = self.epsilon if explore else 0.0
        self._noise_used = used + 1
        if self._state_rows:
            self._take_state(self._starts if state is None else state)
        self._session.run_with_iobinding(bound)
        if self._packed_action is not None:
            self._action_parts.join()
            env_action, action = self._env_structure(self._packed_action), self._action_view
        elif self._scalar:
            env_action = action = self._action_out.item()
        else:
            env_action, action = self._env_action_view.copy(), self._action_view
        # Half the time of Actions(...), which passes through a Python-level __new__.
        return tuple.__new__(
            Actions, (env_action, action, self._logp_out.item(), self._dist_inputs_view, self._state_views)
        )

    def _env_structure(self, space: Space) -> Any:
        """One action of several parts, as `env.step` wants it: ints for Discrete, new arrays else."""
        parts = self.manifest.env_action_parts
        leaves = (
            array[0].copy().reshape(part.shape) if part.shape else array.item()
            for array, part in zip(self._env_parts, parts, strict=True)
        )
        return structured(space, leaves)

    # ---- memory

    def _counted(self, state: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
        if len(state) != len(self._starts):
            raise PolicyError(f"expected a state of {len(self._starts)} arrays, got {len(state)}")
        return state

    def _take_state(self, state: Sequence[NDArray[Any]]) -> None:
        for row, array in zip(self._state_rows, self._counted(state), strict=True):
            if array.shape != row.shape:
                raise PolicyError(
                    f"expected a state of shapes {[r.shape for r in self._state_rows]}, got {array.shape}"
                )
            row[...] = array

    # ---- noise ------------------------------------------------------------------------------------------------

    def _refill(self) -> None:
        first = 0
        for noise, count in self.manifest.noise_runs or ((self.manifest.noise, 0),):
            some = self._noise[:, first : first + count] if count else self._noise
            first += count
            if noise == "gumbel":
                some[...] = self._random.gumbel(size=some.shape)
            else:
                some[...] = self._random.standard_normal(some.shape, np.float32)
        self._noise_used = 0

    def draw(self, drawn: NDArray[np.float32]) -> NDArray[np.float32]:
        """Fill `drawn` with the next rows of the one stream of noise."""
        rows, filled = len(drawn), 0
        while filled < rows:
            if self._noise_used == self._noise_rows:
                self._refill()
            count = min(rows - filled, self._noise_rows - self._noise_used)
            drawn[filled : filled + count] = self._noise[self._noise_used : self._noise_used + count]
            self._noise_used += count
            filled += count
        return drawn

    # ---- onnxruntime ------------------------------------------------------------------------------------------

    def _options(self, batch: int | None) -> SessionOptions:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # A spinning pool would take the simulator's own core between two steps.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if batch is not None:
            options.add_free_dimension_override_by_name("batch", batch)
        return options

    def open_session(self, batch: int | None) -> Any:
        """ONNX Runtime's, for batches of this size alone; None = of any."""
        import onnxruntime

        try:
            return onnxruntime.InferenceSession(self._graph, self._options(batch), providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no public base
            raise PolicyError(f"ONNX Runtime {onnxruntime.__version__} refuses the policy's graph: {error}") from error

    def _check_signature(self) -> None:
        """The graph reads and writes what the manifest says: buffers are bound by that word alone."""
        manifest = self.manifest
        observed = manifest.parts or (manifest.observation,)
        names = [f"observations/{i}" for i in range(len(manifest.parts))] or ["observations"]
        inputs = {
            **{n: (_ONNX_TYPES[t.dtype], [1, *t.shape]) for n, t in zip(names, observed, strict=True)},
            "noise": ("tensor(float)", [1, *manifest.noise_shape]),
        }
        if manifest.epsilon:
            inputs["epsilon"] = ("tensor(float)", [1, 1])
        states = {part.name: (_ONNX_TYPES[part.dtype], [1, *part.shape]) for part in manifest.state}
        inputs |= {f"state_in/{name}": array for name, array in states.items()}
        for weight in manifest.weights:
            inputs[f"weights/{weight.name}"] = (_ONNX_TYPES[weight.dtype], list(weight.shape))
        outputs = {f"state_out/{name}": array for name, array in states.items()}
        outputs |= {
            "action_logp": ("tensor(float)", [1, 1]),
            "action_dist_inputs": ("tensor(float)", [1, manifest.action_dist_inputs]),
        }
        found = {node.name: (node.type, node.shape) for node in self._session.get_outputs()}
        acted: list[tuple[str, Tensor, Tensor]] = [("", manifest.action, manifest.env_action)]
        if manifest.packed_action is not None:
            pairs = zip(manifest.action_parts, manifest.env_action_parts, strict=True)
            acted = [(f"/{i}", action, env_action) for i, (action, env_action) in enumerate(pairs)]
        for i, (suffix, action, env_action) in enumerate(acted):
            outputs[f"actions{suffix}"] = (_ONNX_TYPES[action.dtype], [1, action.size])
            if f"env_actions{suffix}" in found:
                self._transformed.add(i)
                outputs[f"env_actions{suffix}"] = (_ONNX_TYPES[env_action.dtype], [1, env_action.size])
            elif env_action != action:
                raise PolicyError(
                    f"the policy's graph has no output env_actions{suffix}, and its manifest says it differs"
                )
        self.transforms = bool(self._transformed)
        self.action_outputs = [name for name in outputs if name.startswith(("actions", "env_actions"))]
        for said, is_ in (
            (inputs, {node.name: (node.type, node.shape) for node in self._session.get_inputs()}),
            (outputs, found),
        ):
            if said != is_:
                raise PolicyError(f"the policy's graph has {is_}, its manifest says {said}")

    def bind(self, session: Any, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> IOBinding:
        """A binding of these arrays and the weights. Raises PolicyError before the first `apply`."""
        import onnxruntime

        if self._weights is None:
            raise PolicyError(_NO_WEIGHTS)
        as_value = onnxruntime.OrtValue.ortvalue_from_numpy
        binding: IOBinding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, as_value(array))
        for name, value in self._weights.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in outputs.items():
            binding.bind_ortvalue_output(name, as_value(array))
        return binding

    def _bind_one(self) -> IOBinding:
        """A binding of batch 1: our arrays and the weights."""
        inputs = {f"observations/{i}": array for i, array in enumerate(self._parts_in)} or {
            "observations": self._observation_in
        }
        inputs["noise"] = self._noise_in
        if self._epsilon_in is not None:
            inputs["epsilon"] = self._epsilon_in
        outputs: dict[str, NDArray[Any]] = {
            "action_logp": self._logp_out,
            "action_dist_inputs": self._dist_inputs_out,
        }
        if self._packed_action is None:
            outputs["actions"] = self._action_out
            if self.transforms:
                outputs["env_actions"] = self._env_action_out
        for i, array in enumerate(self._action_parts.arrays):
            outputs[f"actions/{i}"] = array
            if i in self._transformed:
                outputs[f"env_actions/{i}"] = self._env_parts[i]
        for part, given, made in zip(self.manifest.state, self._states_in, self._states_out, strict=True):
            inputs[f"state_in/{part.name}"] = given
            outputs[f"state_out/{part.name}"] = made
        return self.bind(self._session, inputs, outputs)

    def _given(self, rows: NDArray[Any]) -> list[tuple[str, NDArray[Any]]]:
        """Observations by the names of the graph's inputs."""
        parts = self.manifest.parts
        return [(f"observations/{i}", array) for i, array in enumerate(split_rows(rows, parts))] or [
            ("observations", rows)
        ]

    @staticmethod
    def _rows(array: NDArray[Any], what: str, rows: int, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """`array` as ONNX Runtime takes it. Raises PolicyError unless its shape is (rows >= 1, *shape)."""
        array = np.asarray(array)
        if rows < 1 or array.shape != (rows, *shape):
            raise PolicyError(f"expected {what} of shape (B, {', '.join(map(str, shape))}), B >= 1, got {array.shape}")
        try:
            return np.ascontiguousarray(array.astype(dtype, casting="same_kind", copy=False)).reshape(rows, *shape)
        except TypeError as error:
            raise PolicyError(f"{what} of dtype {array.dtype} can't be given as {dtype}") from error


class Parts:
    """Arrays for the parts of packed `rows`, (n, bytes of all): `arrays`, (n, entries of the part) each."""

    def __init__(self, parts: Sequence[Tensor], rows: NDArray[Any]) -> None:
        self.arrays: list[NDArray[Any]] = []
        self._cuts: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
        at = 0
        for part in parts:
            array = np.zeros((len(rows), part.size), part.dtype)
            self.arrays.append(array)
            if part.nbytes:
                self._cuts.append((rows[:, at : at + part.nbytes], array.view(np.uint8)))
            at += part.nbytes

    def join(self) -> None:
        """Arrays -> rows."""
        for rows, part in self._cuts:
            rows[...] = part

    def split(self) -> None:
        """Rows -> arrays."""
        for rows, part in self._cuts:
            part[...] = rows


def _aligned(weight: Weight) -> NDArray[Any]:
    """An array for `weight` that begins on a cache line (64 bytes): worth 3 % of a call, and NumPy promises 16."""
    room = np.empty(weight.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + weight.nbytes].view(weight.dtype).reshape(weight.shape)


_NO_WEIGHTS = "the policy has no weights yet: call apply(version, body) with the first that arrived, then act"

_ONNX_TYPES: dict[str, str] = {
    **{name: f"tensor({name})" for name in DType.__args__},  # type: ignore[attr-defined]
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
}
"""What ONNX Runtime calls NumPy's dtypes."""
