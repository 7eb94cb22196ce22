"""RLModule -> exported policy, and RLlib's module state -> the body of its weights.

One graph holds what RLlib does between an observation and `env.step`: the module's `forward_exploration`, the draw
from its action distribution (`GetActions`), the action's log-probability, and the env's action
(`NormalizeAndClipActions`). `rllink_zmq.policy` says what goes in and out. What the graph can't hold is refused here,
with the reason: nothing else would notice that a simulator acts by another policy than the one that is trained.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import gymnasium as gym
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.core.rl_module.torch import TorchRLModule

from rllink_zmq.errors import PolicyError
from rllink_zmq.packing import Packing
from rllink_zmq.policy import Policy, PolicyManifest, Weight, pack_policy, unpack_policy
from rllink_zmq.rllib import exploration
from rllink_zmq.rllib.export_acting import HALF, Acting
from rllink_zmq.rllib.export_actions import REMOTE
from rllink_zmq.rllib.export_canonical import canonical
from rllink_zmq.rllib.export_observations import Example, Observed
from rllink_zmq.rllib.flattening import Flattening
from rllink_zmq.rllib.recurrent import Memory, one_step
from rllink_zmq.spaces import to_wire

OPSET = 20


def export_policy(
    module: RLModule,
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    *,
    normalize_actions: bool = True,
    clip_actions: bool = False,
    explores: bool = True,
    evaluation_explores: bool = True,
    flattening: Flattening | None = None,
) -> bytes:
    """The blob of `module`'s exploring policy (see `rllink_zmq.policy`), with no weights in it.

    The spaces are one environment's. Observations of float64 become float32, as RLlib's `NumpyToTensor` does; other
    dtypes reach the module as they are. Actions may be Discrete, MultiDiscrete or a one-dimensional float Box.
    `normalize_actions` and `clip_actions` are those of the `AlgorithmConfig`, `explores` is its `explore`, and
    `evaluation_explores` its evaluation config's. `flattening`: the FlattenObservations before the module. As in RLlib,
    `start` of a Discrete space is not added. The module is unchanged afterwards; the blob of two modules of one
    architecture is the same.

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
    example = Example(name, observation_space)
    epsilon = exploration.epsilon_schedule(module)
    acting = Acting(
        name, module.get_exploration_action_dist_cls(), action_space, normalize_actions, clip_actions,
        greedy=bool(epsilon),
    )  # fmt: skip
    graph = _Graph(module, acting, memory, example.packing, flattening)
    training = module.training
    module.eval()  # as forward_exploration does for the time of the call
    try:
        _check_dist_inputs(name, graph, example)
        model, weights = _trace(name, graph, example)
        manifest = PolicyManifest(
            format=1,
            module=name,
            observation=example.tensor,
            noise_shape=(acting.width,),
            action_dist_inputs=acting.dist_inputs,
            opset=OPSET,
            weights=weights,
            explores=explores,
            evaluation_explores=evaluation_explores,
            packed=to_wire(observation_space) if example.packing else None,
            parts=example.parts,
            state=states,
            **acting.described(),
            epsilon=epsilon,
        )
        blob = pack_policy(manifest, canonical(model, manifest))
        _verify(blob, graph, example)
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


# ---- the parts of the graph ---------------------------------------------------------------------------------------


class _Graph(torch.nn.Module):
    """What is traced."""

    def __init__(
        self,
        module: TorchRLModule,
        acting: Acting,
        memory: Memory,
        packing: Packing | None,
        flattening: Flattening | None,
    ) -> None:
        super().__init__()
        self.greedy = acting.greedy
        self.flattening = flattening
        self.memory = memory
        self._packing = packing
        self.module = module
        self.acting = acting

    def infer(self, observations: Observed, *state: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Dist inputs (B, k), and the state after the step. Raises PolicyError if the module answers with anything
        else."""
        given = self.memory.batch(self._structured(observations), state)
        found = exploration.values_of(self.module, given)[1] if self.greedy else self.module.forward_exploration(given)
        answer, after = self.memory.answer(found)
        if Columns.ACTION_DIST_INPUTS not in answer or Columns.ACTIONS in answer:
            raise PolicyError(
                f"{type(self.module).__name__}.forward_exploration answers with {sorted(answer)}: the graph needs "
                f"{Columns.ACTION_DIST_INPUTS} and draws the actions itself. Use an algorithm that samples from a "
                f"distribution (PPO, APPO, IMPALA, SAC), or RLlib's own exploration of DQN"
            )
        return answer[Columns.ACTION_DIST_INPUTS], after

    def _structured(self, observations: Observed) -> Any:
        """What the module gets of them."""
        if self.flattening is not None:
            return self.flattening([observations] if isinstance(observations, torch.Tensor) else observations)
        return observations if self._packing is None else self._packing.structure(list(observations))

    def forward(self, observations: Observed, noise: torch.Tensor, *rest: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`rest`: epsilon, if it is greedy, then the state."""
        epsilon, state = rest[: self.greedy], rest[self.greedy :]
        dist_inputs, after = self.infer(observations, *state)
        return *self.acting(dist_inputs, noise, *epsilon), *after

    def starts(self, rows: int) -> list[torch.Tensor]:
        """The state of `rows` episodes that begin."""
        return [torch.from_numpy(array) for array in self.memory.starts(rows)]


# ---- from module to graph -----------------------------------------------------------------------------------------


def _check_dist_inputs(name: str, graph: _Graph, example: Example) -> None:
    """Raises PolicyError if the module can't run, or its dist inputs are not those of its distribution."""
    try:
        with torch.no_grad():
            dist_inputs, _ = graph.infer(example.given(example.rows(2)), *graph.starts(2))
    except PolicyError:
        raise
    except Exception as error:  # a user's module
        raise PolicyError(
            f"{name}.forward_exploration fails on a batch of observations alone, of {example.tensor.dtype}"
            f"{list(example.tensor.shape)}: {_first_line(error)}. If the dtype is why (RLlib's default modules want "
            f"float32), change the environment's observations, RLlib's own runner gives the same; else {REMOTE}"
        ) from error
    acting = graph.acting
    if dist_inputs.shape != (2, acting.dist_inputs) or dist_inputs.dtype != torch.float32:
        raise PolicyError(
            f"{name} makes dist inputs of {dist_inputs.dtype}{list(dist_inputs.shape[1:])} for one observation, "
            f"{getattr(acting.distribution, '__name__', acting.distribution)} wants torch.float32[{acting.dist_inputs}]"
        )


def _trace(name: str, graph: _Graph, example: Example) -> tuple[Any, tuple[Weight, ...]]:
    """The ONNX model, with the module's state as inputs after the other two, and what of the state it uses.
    Raises PolicyError if torch can't trace the module."""
    outputs = graph.acting.outputs + [f"state_out/{part}" for part in graph.memory.names]
    epsilon = [torch.full((2, 1), HALF)] * graph.greedy
    arguments = (example.given(example.rows(2)), torch.zeros(2, graph.acting.width), *epsilon, *graph.starts(2))
    given = [f"observations/{i}" for i in range(len(example.parts))] or ["observations"]
    given += ["noise", *["epsilon"] * graph.greedy, *(f"state_in/{part}" for part in graph.memory.names)]
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
            f"traceable by torch.export (no Python branches on values, tensors only), or {REMOTE}"
        ) from error
    try:
        return model, msgspec.convert(weights, tuple[Weight, ...])
    except msgspec.ValidationError as error:
        raise PolicyError(f"{name} has weights that can't travel: {error}") from error


def _capture(graph: _Graph, arguments: tuple[Any, ...]) -> Any:
    """The traced program, for any batch size. Raises whatever torch.export raises."""
    batch = {0: torch.export.Dim("batch")}
    observed = arguments[0]
    shapes: tuple[Any, ...] = (batch if isinstance(observed, torch.Tensor) else (batch,) * len(observed), batch)
    if len(arguments) > 2:
        shapes += ((batch,) * (len(arguments) - 2),)
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


# ---- the proof ----------------------------------------------------------------------------------------------------


def _verify(blob: bytes, graph: _Graph, example: Example) -> None:
    """Acts with the blob and other weights than the module's, and compares with the module, RLlib's distribution and
    RLlib's env actions. Raises PolicyError if they differ: what was traced was not all the module does."""
    name, acting = type(graph.module).__name__, graph.acting
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
    policy.epsilon = HALF
    policy.apply(0, weights_body(policy.manifest, state))
    observations = example.rows(3)  # not the number it was traced with
    if graph.flattening is not None:
        _verify_flattening(name, graph.flattening, example, observations)
    memory = [start + torch.rand(start.shape, generator=generator).to(start.dtype) for start in graph.starts(3)]
    acted = policy.act(observations, state=[part.numpy() for part in memory])
    with torch.no_grad():
        replaced = {f"graph.module.{key}": value for key, value in state.items()}
        given = (example.given(observations), *memory)
        expected, after = torch.func.functional_call(_Infer(graph), replaced, given)
        starts = torch.func.functional_call(_Start(graph), replaced, ())
        logp = acting.logp(torch.from_numpy(acted.action_dist_inputs), acted.actions)
    if not all(np.array_equal(start, of_all) for start, of_all in zip(starts, graph.memory.start, strict=True)):
        raise PolicyError(
            f"{name}.get_initial_state changes with the weights, and a simulator is told it once: let it be constant, "
            f"or {REMOTE}"
        )
    for what, ours, theirs in (
        ("action_dist_inputs", acted.action_dist_inputs, expected.numpy()),
        ("action_logp", acted.action_logp, logp.numpy()),
        *(
            (f"env_actions{part}", ours, theirs)
            for part, ours, theirs in zip(
                acting.names, acting.each(acted.env_actions), acting.env_reference(acted.actions), strict=True
            )
        ),
        *(
            (f"the state '{part}'", ours, theirs.numpy())
            for part, ours, theirs in zip(graph.memory.names, acted.state, after, strict=True)
        ),
    ):
        if not np.allclose(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True):
            worst = float(np.max(np.abs(np.asarray(ours, np.float64) - theirs)))
            raise PolicyError(
                f"the exported {name} differs from the module in {what} by {worst:.3g}: its forward_exploration does "
                f"something that tracing can't see (random numbers, state, Python branches). Change it, or {REMOTE}"
            )


def _verify_flattening(name: str, flattening: Flattening, example: Example, rows: NDArray[Any]) -> None:
    given = example.given(rows)
    ours = flattening([given] if isinstance(given, torch.Tensor) else given).numpy()
    theirs = flattening.of_rows(rows if example.packing is None else example.packing.unpack(rows))
    if not np.array_equal(ours, theirs):
        raise PolicyError(f"{name}: the graph flattens observations differently from FlattenObservations: {REMOTE}")


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
