"""RLModule -> exported policy, and RLlib's module state -> the body of its weights.

One graph holds what RLlib does between an observation and `env.step`: the module's `forward_exploration`, the draw
from its action distribution (`GetActions`), the action's log-probability, and the env's action
(`NormalizeAndClipActions`). `rllink_zmq.policy` says what goes in and out. What the graph can't hold is refused here,
with the reason: nothing else would notice that a simulator acts by another policy than the one that is trained.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any, NamedTuple, TypeAlias

import gymnasium as gym
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch.torch_distribution import (
    TorchCategorical,
    TorchDiagGaussian,
    TorchMultiCategorical,
    TorchSquashedGaussian,
)
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES
from ray.rllib.utils.numpy import MAX_LOG_NN_OUTPUT, MIN_LOG_NN_OUTPUT, SMALL_NUMBER
from ray.rllib.utils.spaces.space_utils import clip_action, unsquash_action

from rllink_zmq.errors import PolicyError, SpaceError
from rllink_zmq.packing import Packing, packing_of
from rllink_zmq.policy import Noise, Policy, PolicyManifest, Tensor, Weight, pack_policy, unpack_policy
from rllink_zmq.rllib.recurrent import Memory, one_step
from rllink_zmq.spaces import to_wire

OPSET = 20
_REMOTE = "let runners compute the actions (connect(inference='remote'), simulate --inference remote)"


def export_policy(
    module: RLModule,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    *,
    normalize_actions: bool = True,
    clip_actions: bool = False,
    evaluation_explores: bool = True,
) -> bytes:
    """The blob of `module`'s exploring policy (see `rllink_zmq.policy`), with no weights in it.

    The spaces are one environment's. Observations of float64 become float32, as RLlib's `NumpyToTensor` does; other
    dtypes reach the module as they are. Actions may be Discrete, MultiDiscrete or a one-dimensional float Box.
    `normalize_actions` and `clip_actions` are those of the `AlgorithmConfig`, `evaluation_explores` is its evaluation
    config's `explore`. As in RLlib, `start` of a Discrete space
    is not added. The module is unchanged afterwards; the blob of two modules of one architecture is the same.

    A stateful module's state goes in and comes out with each step (`rllink_zmq.rllib.recurrent`).

    Raises PolicyError, naming the module's class, for a module that chooses actions itself, has another distribution
    than RLlib's default one or a state that can't travel, can't be traced, or whose graph doesn't compute what the
    module does.
    """
    module = module.unwrapped()
    name = type(module).__name__
    if isinstance(module, MultiRLModule) or not isinstance(module, TorchRLModule):
        raise PolicyError(f"{name} is not a single TorchRLModule: export the modules of a MultiRLModule one by one")
    try:
        memory = Memory(module)
        states = memory.states()
    except PolicyError as error:
        raise PolicyError(f"{name} has {error}") from error
    example = _Example(name, observation_space)
    head = _head(name, module.get_exploration_action_dist_cls(), action_space)
    for_env = ForEnv(action_space, normalize_actions, clip_actions)
    graph = _Graph(module, head, for_env, memory, example.packing)
    training = module.training
    module.eval()  # as forward_exploration does for the time of the call
    try:
        width = _count_dist_inputs(name, graph, example, head)
        model, weights = _trace(name, graph, example, head)
        manifest = PolicyManifest(
            format=1,
            module=name,
            observation=example.tensor,
            noise=head.noise,
            noise_shape=(head.width,),
            action=head.action,
            env_action=for_env.tensor(head.action),
            action_dist_inputs=width,
            opset=OPSET,
            weights=weights,
            evaluation_explores=evaluation_explores,
            packed=to_wire(observation_space) if example.packing else None,
            parts=example.parts,
            state=states,
        )
        blob = pack_policy(manifest, _canonical(model, manifest))
        _verify(blob, graph, example, head, for_env)
    finally:
        module.train(training)
    return blob


def weights_body(
    policy: PolicyManifest | bytes,
    module_state: Mapping[str, Any],
    module_id: str = DEFAULT_MODULE_ID,
    connectors: bytes = b"",
) -> bytes:
    """The weights of a module's state as `Policy.apply` wants them, and the state of connectors behind them.

    `policy`: the manifest, or the blob. `module_state`: `RLModule.get_state()`, arrays or tensors by name, or that of
    a MultiRLModule, `{module_id: {...}}`; entries that the policy doesn't use (the critic's) are left out.
    Raises PolicyError naming entries that are missing or of another shape or dtype.
    """
    manifest = policy if isinstance(policy, PolicyManifest) else unpack_policy(policy)[0]
    state = module_state
    if module_id in state and isinstance(state[module_id], Mapping):
        state = state[module_id]
    missing = [weight.name for weight in manifest.weights if weight.name not in state]
    if missing:
        raise PolicyError(
            f"the module's state lacks {_listed(missing)}: it belongs to another architecture than the exported "
            f"{manifest.module}. It has {_listed(list(state))}"
        )
    parts = []
    for weight in manifest.weights:
        value = state[weight.name]
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.dtype.name != weight.dtype or array.shape != weight.shape:
            raise PolicyError(
                f"{weight.name} of the module's state is {array.dtype.name}{list(array.shape)}, the exported "
                f"{manifest.module} has {weight.dtype}{list(weight.shape)}: export the policy again"
            )
        parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes("C"))
    if manifest.connectors:
        parts.append(len(connectors).to_bytes(8, "little") + connectors)
        if len(parts[-1]) > manifest.connectors:
            raise PolicyError(
                f"the connectors' state has {len(connectors)} bytes, it had few enough for {manifest.connectors} when "
                f"training began: a piece whose state grows can't travel with the weights"
            )
        parts.append(bytes(manifest.connectors - len(parts[-1])))
    return b"".join(parts)


def connectors_state(manifest: PolicyManifest, body: bytes) -> bytes:
    """The state of the connectors in a version's body; b'' if there is none. Raises PolicyError for a damaged one."""
    if not manifest.connectors:
        return b""
    tail = body[len(body) - manifest.connectors :]
    size = int.from_bytes(tail[:8], "little")
    if size > len(tail) - 8:
        raise PolicyError(f"the connectors' state claims {size} bytes of {len(tail) - 8}")
    return tail[8 : 8 + size]


def check_connectors(config: AlgorithmConfig) -> None:
    """Raises PolicyError, naming the pieces, if `config` changes RLlib's default env-to-module or module-to-env
    connectors: the graph does what the default ones do, and a simulator has no other."""
    spaces = {INPUT_ENV_SINGLE_SPACES: (config.observation_space, config.action_space)}
    for setting, make, arguments, defaults in (
        (
            "env_to_module_connector",
            config._env_to_module_connector,
            (None, spaces, None),
            config.add_default_connectors_to_env_to_module_pipeline,
        ),
        (
            "module_to_env_connector",
            config._module_to_env_connector,
            (None, spaces),
            config.add_default_connectors_to_module_to_env_pipeline,
        ),
    ):
        if make is not None:
            raise PolicyError(
                f"config.env_runners({setting}=...) adds {_pieces(make, arguments)}, which the exported policy can't "
                f"hold: do its work in the environment (a gymnasium wrapper) or in the RLModule, or {_REMOTE}"
            )
        if not defaults:
            raise PolicyError(
                f"config.env_runners(add_default_connectors_to_{setting.removesuffix('_connector')}_pipeline=False) "
                f"takes away what the exported policy does: leave it True, or {_REMOTE}"
            )


def _pieces(make: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """What a connector setting makes, for a message: the pieces' classes, or else the function's own name."""
    try:
        made = make(*arguments)
    except Exception:  # a user's function, that may well need an env: its name will do
        return getattr(make, "__qualname__", None) or repr(make)
    return ", ".join(type(piece).__name__ for piece in (made if isinstance(made, (list, tuple)) else [made]))


# ---- the parts of the graph ---------------------------------------------------------------------------------------


Observed: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"
"""(B, *shape) observations; of packed ones each part."""


class _Example:
    """Observations to trace and to try with."""

    def __init__(self, module: str, space: gym.Space[Any]) -> None:
        one_array = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)
        try:
            self.packing = packing_of(space)
            if self.packing is None and not isinstance(space, one_array):
                raise SpaceError(f"{type(space).__name__} is none of Box, Discrete, MultiDiscrete, MultiBinary")
            self.parts = self.packing.tensors if self.packing else ()
            if self.packing:
                self.tensor = Tensor("uint8", (self.packing.nbytes,))
            else:
                # RLlib's NumpyToTensor (convert_to_torch_tensor): every float but float16 becomes float32.
                dtype = np.dtype(space.dtype)
                if dtype.kind == "f" and dtype != np.float16:
                    dtype = np.dtype(np.float32)
                self.tensor = msgspec.convert((dtype.name, space.shape or ()), Tensor)
        except (SpaceError, msgspec.ValidationError) as error:
            raise PolicyError(f"{module}: observations of {space} can't travel: {error}") from error
        # A copy: sampling moves a space's random state, and this one is the user's.
        self._space = copy.deepcopy(space)
        self._space.seed(0)

    def rows(self, count: int) -> NDArray[Any]:
        """(count, *shape) observations of moderate size: samples of a huge Box would overflow any network."""
        samples = [self._space.sample() for _ in range(count)]
        if self.packing is not None:
            return np.stack([self.packing.pack(sample, _moderate) for sample in samples])
        return np.stack([_moderate(sample, "", self.tensor.shape, np.dtype(self.tensor.dtype)) for sample in samples])

    def given(self, rows: NDArray[Any]) -> Observed:
        """Rows as the graph takes them."""
        if self.packing is None:
            return torch.from_numpy(rows)
        return tuple(torch.from_numpy(array) for array in self.packing.arrays(rows))


def _moderate(value: Any, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    array = np.asarray(value)
    return (np.clip(array, -10.0, 10.0) if array.dtype.kind == "f" else array).astype(dtype)


class _Head(NamedTuple):
    """An action distribution as a function of noise."""

    noise: Noise
    width: int
    """Entries of one row of noise."""
    dist_inputs: int
    action: Tensor
    distribution: Any
    """RLlib's class of it."""
    draw: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    """(dist inputs (B, k), noise (B, width)) -> actions (B, n), logp (B, 1)."""


def _head(module: str, distribution: Any, space: gym.Space[Any]) -> _Head:
    """The head for `space`. Raises PolicyError unless `distribution` is RLlib's own for it."""
    if isinstance(space, gym.spaces.Discrete):
        count = int(space.n)
        head = _Head("gumbel", count, count, Tensor("int64", ()), distribution, _categorical([count]))
        known = distribution is TorchCategorical
    elif isinstance(space, gym.spaces.MultiDiscrete) and len(space.shape) == 1:
        sizes = [int(size) for size in space.nvec]
        head = _Head(
            "gumbel", sum(sizes), sum(sizes), Tensor("int64", (len(sizes),)), distribution, _categorical(sizes)
        )
        # RLlib makes a subclass for each space, that holds `nvec`.
        known = isinstance(distribution, type) and issubclass(distribution, TorchMultiCategorical)
    elif isinstance(space, gym.spaces.Box) and np.dtype(space.dtype).kind == "f" and len(space.shape) == 1:
        size = int(space.shape[0])
        squashed = distribution is TorchSquashedGaussian  # SAC's
        draw = _squashed_gaussian if squashed else _gaussian
        head = _Head("normal", size, 2 * size, Tensor("float32", (size,)), distribution, draw)
        known = squashed or distribution is TorchDiagGaussian
    else:
        raise PolicyError(
            f"{module}: the action space {space} is not supported: use Discrete, MultiDiscrete or a float Box of one "
            f"dimension, or {_REMOTE}"
        )
    if not known:
        raise PolicyError(
            f"{module} draws actions of {type(space).__name__} from {getattr(distribution, '__name__', distribution)}, "
            f"which the graph doesn't know: use RLlib's default distribution, or {_REMOTE}"
        )
    return head


def _categorical(sizes: Sequence[int]) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Categorical choices side by side, of `sizes` logits, by the Gumbel-max trick."""

    def draw(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        actions, logps = [], []
        pairs = zip(torch.split(logits, sizes, -1), torch.split(noise, sizes, -1), strict=True)
        for part, noise_part in pairs if len(sizes) > 1 else [(logits, noise)]:
            action = torch.argmax(part + noise_part, -1, keepdim=True)
            actions.append(action)
            logps.append(torch.log_softmax(part, -1).gather(-1, action))
        if len(sizes) == 1:
            return actions[0], logps[0]
        return torch.cat(actions, -1), torch.stack(logps).sum(0)

    return draw


def _gaussian(dist_inputs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TorchDiagGaussian: means, then log stds; the log-probability of torch.distributions.Normal, summed.
    `(action - mean) / std` is taken anew from the rounded action, as the learner will take it."""
    mean, log_std = dist_inputs.chunk(2, -1)
    std = log_std.exp()
    action = mean + std * noise
    logp = -0.5 * ((action - mean) / std) ** 2 - log_std - 0.5 * float(np.log(2.0 * np.pi))
    return action, logp.sum(-1, keepdim=True)


def _squashed_gaussian(dist_inputs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """TorchSquashedGaussian between -1 and 1: means, then log stds, which it clips. The log-probability is of the
    action as it is, as `GetActions` takes it. Without noise the action is the mean itself: RLlib's `to_deterministic`
    doesn't squash it."""
    mean, log_std = dist_inputs.chunk(2, -1)
    log_std = log_std.clamp(MIN_LOG_NN_OUTPUT, MAX_LOG_NN_OUTPUT)
    std = log_std.exp()
    greedy = (noise == 0.0).all(-1, keepdim=True)
    action = torch.where(greedy, mean, torch.tanh(mean + std * noise).clamp(-1.0, 1.0))
    inner = torch.atanh(action.clamp(-1.0 + SMALL_NUMBER, 1.0 - SMALL_NUMBER))
    logp = -0.5 * ((inner - mean) / std) ** 2 - log_std - 0.5 * float(np.log(2.0 * np.pi))
    logp = logp - 2.0 * (float(np.log(2.0)) - inner - torch.nn.functional.softplus(-2.0 * inner))
    return action, logp.sum(-1, keepdim=True)


class ForEnv:
    """RLlib's NormalizeAndClipActions (`unsquash_action`, `clip_action`), as it is and as graph."""

    def __init__(self, space: gym.Space[Any], normalize: bool, clip: bool) -> None:
        self._space = space
        self._normalize = normalize
        self._clip = clip
        self._mode = "as it is"
        if isinstance(space, gym.spaces.Box):
            # Not as parameters or buffers of a module: these are the architecture's.
            self._low, self._high = torch.from_numpy(space.low.copy()), torch.from_numpy(space.high.copy())
            lows, highs = np.unique(space.low), np.unique(space.high)
            self._bounds = (float(lows[0]), float(highs[0])) if len(lows) == len(highs) == 1 else None
            if normalize:
                if np.all(space.bounded_below) and np.all(space.bounded_above) and self._low.dtype in _FLOATS:
                    self._mode = "unsquash"
            elif clip:
                self._mode = "clip"

    def reference(self, actions: NDArray[Any]) -> NDArray[Any]:
        """What RLlib gives the env for (B, ...) actions."""
        if self._normalize:
            return np.stack([unsquash_action(action, self._space) for action in actions])
        if self._clip:
            return np.stack([clip_action(action, self._space) for action in actions])
        return actions

    def tensor(self, action: Tensor) -> Tensor:
        """dtype and shape of the env's action."""
        if self._mode == "as it is":
            return action
        example = self.reference(np.zeros((1, *action.shape), action.dtype))
        return msgspec.convert((example.dtype.name, example.shape[1:]), Tensor)

    @property
    def transforms(self) -> bool:
        return self._mode != "as it is"

    def __call__(self, actions: torch.Tensor) -> torch.Tensor:
        """(B, n) actions -> (B, n) of the env's; in the dtypes and the order of operations of NumPy's."""
        low, high = self._low, self._high
        if self._mode == "unsquash":
            # The halved span is a constant of the graph. Halving is exact, so NumPy's order of steps doesn't matter.
            actions = low + (actions + 1.0) * ((high - low) / 2.0)
        actions = actions.to(torch.promote_types(actions.dtype, low.dtype))
        if self._bounds is not None:
            return torch.clamp(actions, *self._bounds)  # one node, where tensors take two
        return torch.minimum(torch.maximum(actions, low), high)


_FLOATS = (torch.float32, torch.float64)


class _Graph(torch.nn.Module):
    """What is traced."""

    def __init__(
        self, module: TorchRLModule, head: _Head, for_env: ForEnv, memory: Memory, packing: Packing | None
    ) -> None:
        super().__init__()
        self.memory = memory
        self._packing = packing
        self.module = module
        self._head = head
        self._for_env = for_env

    def infer(self, observations: Observed, *state: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Dist inputs (B, k), and the state after the step. Raises PolicyError if the module answers with anything
        else."""
        if self._packing is not None:
            observations = self._packing.structure(list(observations))
        given = self.memory.batch(observations, state)
        answer, after = self.memory.answer(self.module.forward_exploration(given))
        if Columns.ACTION_DIST_INPUTS not in answer or Columns.ACTIONS in answer:
            raise PolicyError(
                f"{type(self.module).__name__}.forward_exploration answers with {sorted(answer)}: the graph needs "
                f"{Columns.ACTION_DIST_INPUTS} and draws the actions itself. Use an algorithm that samples from a "
                f"distribution (PPO, APPO, IMPALA), or {_REMOTE}"
            )
        return answer[Columns.ACTION_DIST_INPUTS], after

    def forward(self, observations: Observed, noise: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dist_inputs, after = self.infer(observations, *state)
        actions, logp = self._head.draw(dist_inputs, noise)
        if self._for_env.transforms:
            return actions, logp, dist_inputs, self._for_env(actions), *after
        return actions, logp, dist_inputs, *after

    def starts(self, rows: int) -> list[torch.Tensor]:
        """The state of `rows` episodes that begin."""
        return [torch.from_numpy(array) for array in self.memory.starts(rows)]


# ---- from module to graph -----------------------------------------------------------------------------------------


def _count_dist_inputs(name: str, graph: _Graph, example: _Example, head: _Head) -> int:
    """How many dist inputs the module makes of an observation. Raises PolicyError if it can't run or they don't fit."""
    try:
        with torch.no_grad():
            dist_inputs, _ = graph.infer(example.given(example.rows(2)), *graph.starts(2))
    except PolicyError:
        raise
    except Exception as error:  # a user's module
        raise PolicyError(
            f"{name}.forward_exploration fails on a batch of observations alone, of {example.tensor.dtype}"
            f"{list(example.tensor.shape)}: {_first_line(error)}. If the dtype is why (RLlib's default modules want "
            f"float32), change the environment's observations, RLlib's own runner gives the same; else {_REMOTE}"
        ) from error
    if dist_inputs.shape != (2, head.dist_inputs) or dist_inputs.dtype != torch.float32:
        raise PolicyError(
            f"{name} makes dist inputs of {dist_inputs.dtype}{list(dist_inputs.shape[1:])} for one observation, "
            f"{getattr(head.distribution, '__name__', head.distribution)} wants torch.float32[{head.dist_inputs}]"
        )
    return head.dist_inputs


def _trace(name: str, graph: _Graph, example: _Example, head: _Head) -> tuple[Any, tuple[Weight, ...]]:
    """The ONNX model, with the module's state as inputs after the other two, and what of the state it uses.
    Raises PolicyError if torch can't trace the module."""
    outputs = ["actions", "action_logp", "action_dist_inputs"] + ["env_actions"] * graph._for_env.transforms
    outputs += [f"state_out/{part}" for part in graph.memory.names]
    arguments = (example.given(example.rows(2)), torch.zeros(2, head.width), *graph.starts(2))
    given = [f"observations/{i}" for i in range(len(example.parts))] or ["observations"]
    given += ["noise", *(f"state_in/{part}" for part in graph.memory.names)]
    try:
        with _quiet(), one_step(graph.module):
            program = torch.onnx.export(
                _capture(graph, arguments),
                dynamo=True,
                # Only once the weights are inputs: optimising folds constants, and would fold weights into them.
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=given,
                output_names=outputs,
            )
            state = {f"module.{key}": value for key, value in graph.module.state_dict().items()}
            onnx_graph = program.model.graph
            weights = []
            for key, tensor in state.items():
                value = onnx_graph.initializers.get(key)
                if value is None or not value.uses():
                    continue
                del onnx_graph.initializers[key]
                value.const_value = None
                onnx_graph.inputs.append(value)
                dtype = str(tensor.dtype).removeprefix("torch.")
                weights.append((key.removeprefix("module."), dtype, tuple(tensor.shape)))
            program.optimize()
            model = program.model_proto
    except Exception as error:  # torch documents no closed set of what tracing may raise
        raise PolicyError(
            f"{name} can't be exported: {_first_line(error)}. Make its forward_exploration "
            f"traceable by torch.export (no Python branches on values, tensors only), or {_REMOTE}"
        ) from error
    try:
        return model, msgspec.convert(weights, tuple[Weight, ...])
    except msgspec.ValidationError as error:
        raise PolicyError(f"{name} has weights that can't travel: {error}") from error


def _capture(graph: _Graph, arguments: tuple[Observed, torch.Tensor]) -> Any:
    """The traced program, for any batch size. Raises whatever torch.export raises."""
    batch = {0: torch.export.Dim("batch")}
    observed = arguments[0]
    shapes: tuple[Any, ...] = (batch if isinstance(observed, torch.Tensor) else (batch,) * len(observed), batch)
    if graph.memory:
        shapes += ((batch,) * len(graph.memory.names),)
    try:
        return torch.export.export(graph, arguments, dynamic_shapes=shapes, strict=False)
    except Exception as plain:
        # `len(tensor)` pins the batch in the plain mode, and RLlib's free_log_std head says that. The strict mode
        # reads the Python code instead of running it, but knows less of Python: so it is second, and its error too.
        try:
            return torch.export.export(graph, arguments, dynamic_shapes=shapes, strict=True)
        except Exception:
            raise plain from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings, logs, and the program that torch.export prints to stderr when it fails: a
    failure is an exception, and that is not hidden."""
    log = logging.getLogger("torch")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _canonical(model: Any, manifest: PolicyManifest) -> bytes:
    """The model's bytes without what differs from one export of an architecture to the next: names, stack traces,
    the exporter's version. Inputs, outputs and their shapes are named as `rllink_zmq.policy` says."""
    graph = model.graph
    given = len(graph.input) - len(manifest.weights)
    keep = {value.name: value.name for value in (*graph.input[:given], *graph.output)}
    for value, weight in zip(graph.input[given:], manifest.weights, strict=True):
        keep[value.name] = f"weights/{weight.name}"
    _rename(graph, keep, iter(range(1 << 31)))
    graph.name = "policy"
    shapes: dict[str, tuple[int, ...]] = {
        "actions": (manifest.action.size,),
        "action_logp": (1,),
        "action_dist_inputs": (manifest.action_dist_inputs,),
        "env_actions": (manifest.env_action.size,),
        **{f"state_out/{part.name}": part.shape for part in manifest.state},
    }
    for value in (*graph.input[:given], *graph.output):
        dims = value.type.tensor_type.shape.dim
        dims[0].Clear()
        dims[0].dim_param = "batch"
        if value.name in shapes:
            del dims[1:]
            for length in shapes[value.name]:
                dims.add().dim_value = length
    for field in ("doc_string", "producer_name", "producer_version", "domain", "model_version", "metadata_props"):
        model.ClearField(field)
    return model.SerializeToString(deterministic=True)  # type: ignore[no-any-return]


def _rename(graph: Any, names: dict[str, str], numbers: Iterator[int]) -> None:
    """Names the values of a graph, and of the graphs inside its nodes, by their order. `names` is what is known."""
    names = dict(names)

    def renamed(name: str) -> str:
        if name and name not in names:
            names[name] = f"v{next(numbers)}"
        return names.get(name, "")

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
        tensor.ClearField("doc_string")
    for node in graph.node:
        node.input[:] = [renamed(name) for name in node.input]
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _rename(inner, names, numbers)
            if attribute.HasField("t"):
                attribute.t.ClearField("name")
                attribute.t.ClearField("doc_string")
        attributes = sorted(node.attribute, key=lambda attribute: attribute.name)
        copies = [copy.deepcopy(attribute) for attribute in attributes]
        del node.attribute[:]
        node.attribute.extend(copies)
        node.output[:] = [renamed(name) for name in node.output]
        for field in ("name", "doc_string", "metadata_props"):
            node.ClearField(field)
    for value in (*graph.input, *graph.output):
        value.name = renamed(value.name)
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    for field in ("value_info", "doc_string", "metadata_props", "quantization_annotation"):
        graph.ClearField(field)


# ---- the proof ----------------------------------------------------------------------------------------------------


def _verify(blob: bytes, graph: _Graph, example: _Example, head: _Head, for_env: ForEnv) -> None:
    """Acts with the blob and other weights than the module's, and compares with the module, RLlib's distribution and
    RLlib's env actions. Raises PolicyError if they differ: what was traced was not all the module does."""
    name = type(graph.module).__name__
    generator = torch.Generator().manual_seed(0)
    # Others than the module's, or a weight that tracing turned into a constant would pass. Near them, or a deep network
    # would overflow; upwards, so that variances stay positive.
    state = {}
    for key, value in graph.module.state_dict().items():
        if value.is_floating_point():
            value = value * (1.0 + 0.1 * torch.rand(value.shape, generator=generator))
            if value.dim() < 2:  # biases are often all zero
                value = value + 0.01 * torch.rand(value.shape, generator=generator)
        state[key] = value
    policy = Policy.load(blob, seed=0)
    policy.apply(0, weights_body(policy.manifest, state))
    observations = example.rows(3)  # not the number it was traced with
    memory = [start + torch.rand(start.shape, generator=generator).to(start.dtype) for start in graph.starts(3)]
    acted = policy.act(observations, state=[part.numpy() for part in memory])
    with torch.no_grad():
        replaced = {f"graph.module.{key}": value for key, value in state.items()}
        given = (example.given(observations), *memory)
        expected, after = torch.func.functional_call(_Infer(graph), replaced, given)
        starts = torch.func.functional_call(_Start(graph), replaced, ())
        logp = head.distribution.from_logits(torch.from_numpy(acted.action_dist_inputs)).logp(
            torch.from_numpy(acted.actions)
        )
    if not all(np.array_equal(start, of_all) for start, of_all in zip(starts, graph.memory.start, strict=True)):
        raise PolicyError(
            f"{name}.get_initial_state changes with the weights, and a simulator is told it once: let it be constant, "
            f"or {_REMOTE}"
        )
    for what, ours, theirs in (
        ("action_dist_inputs", acted.action_dist_inputs, expected.numpy()),
        ("action_logp", acted.action_logp, logp.numpy()),
        ("env_actions", acted.env_actions, for_env.reference(acted.actions)),
        *(
            (f"the state '{part}'", ours, theirs.numpy())
            for part, ours, theirs in zip(graph.memory.names, acted.state, after, strict=True)
        ),
    ):
        if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True):
            worst = float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))
            raise PolicyError(
                f"the exported {name} differs from the module in {what} by {worst:.3g}: its forward_exploration does "
                f"something that tracing can't see (random numbers, state, Python branches). Change it, or {_REMOTE}"
            )


class _Infer(torch.nn.Module):
    """`_Graph.infer` as a module's forward, for functional_call."""

    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.graph.infer(*given)


class _Start(torch.nn.Module):
    """The module's initial state as a module's forward, for functional_call."""

    def __init__(self, graph: _Graph) -> None:
        super().__init__()
        self.graph = graph

    def forward(self) -> list[NDArray[Any]]:
        return Memory(self.graph.module).start


def _first_line(error: BaseException) -> str:
    """The first line of what an exception says, with its class."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip().rstrip('.')}" if lines else type(error).__name__


def _listed(names: Sequence[str], most: int = 8) -> str:
    """Names for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
