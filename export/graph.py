"""Small edits of an `onnx_ir` graph, for the passes over a traced one.

Knows nothing of models or targets. Try: `array(graph.initializers["transformer.wpe.weight"])`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir


def array(value: ir.Value | None) -> npt.NDArray[Any]:
    """The contents of an initializer. Raises ValueError for any other value."""
    if value is None or value.const_value is None:
        raise ValueError(f"{value} has no contents: expected a weight of a traced graph")
    return value.const_value.numpy()


def initializer(graph: ir.Graph, name: str, contents: npt.NDArray[np.generic]) -> ir.Value:
    """A new initializer of that name, or the one that is there already."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(contents, name=name)
    shape, kind = ir.Shape(contents.shape), ir.TensorType(tensor.dtype)
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=kind)
    graph.register_initializer(value)
    return value


def add(
    nodes: list[ir.Node], op: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any
) -> ir.Value:
    """Append a node to those that will take the place of another; its first output."""
    nodes.append(ir.node(op, list(inputs), attributes, domain=domain))
    return nodes[-1].outputs[0]


def replace(graph: ir.Graph, old: ir.Node, new: list[ir.Node]) -> None:
    """Swap nodes; the last new one takes over the old one's output: name, type and shape."""
    before, after = old.outputs[0], new[-1].outputs[0]
    name = before.name
    after.type, after.shape = before.type, before.shape
    ir.convenience.replace_nodes_and_values(graph, old, [old], new, [before], [after])
    after.name = name


def drop_unused(graph: ir.Graph) -> None:
    """Delete initializers that no node reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]
