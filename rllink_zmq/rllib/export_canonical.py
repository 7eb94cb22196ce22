"""An ONNX model -> the same bytes for each export of one architecture."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from rllink_zmq.policy import PolicyManifest, Tensor


def canonical(model: Any, manifest: PolicyManifest) -> bytes:
    """The model's bytes without what differs from one export of an architecture to the next: names, stack traces,
    the exporter's version. Inputs, outputs and their shapes are named as `rllink_zmq.policy` says."""
    graph = model.graph
    given = len(graph.input) - len(manifest.weights)
    keep = {value.name: value.name for value in (*graph.input[:given], *graph.output)}
    for value, weight in zip(graph.input[given:], manifest.weights, strict=True):
        keep[value.name] = f"weights/{weight.name}"
    _rename(graph, keep, iter(range(1 << 31)))
    graph.name = "policy"

    def acted(name: str, whole: Tensor, parts: Sequence[Tensor]) -> dict[str, tuple[int, ...]]:
        return {f"{name}/{i}": (part.size,) for i, part in enumerate(parts)} or {name: (whole.size,)}

    shapes: dict[str, tuple[int, ...]] = {
        **acted("actions", manifest.action, manifest.action_parts),
        **acted("env_actions", manifest.env_action, manifest.env_action_parts),
        "action_logp": (1,),
        "action_dist_inputs": (manifest.action_dist_inputs,),
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
