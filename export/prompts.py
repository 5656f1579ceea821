"""Calls of many tokens: a branch of their own, beside the one of single steps and drafts.

What is fastest for one row of activations is not for a hundred. A wide quantized file is one If
over the number of tokens of the call, and each branch is the whole model, of the same weights:

- few tokens: as the graph was quantized, `MatMulNBits` and attention over an int8 cache;
- many: 8-bit matrices with a scale per row are multiplied as integers (`QGemm`), by activations
  that the graph makes u8 with a scale per row of theirs; and attention is in float32, since that of
  onnxruntime over an int8 cache makes floats of keys and values again for every few queries.

Both write the same codes into the cache. Our runtime loads each branch as a session of its own
(`pico_edge.runtime.weights`); any other runs the file as it is. What it gains is in NOTES.md.

Try: `branch_calls(quantized_model.graph)`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pico_edge import artefact
from pico_edge.export.graph import add, array, initializer, replace

# GELU never goes below minus this (tanh and erf form alike): its outputs need no negative half.
GELU_SHIFT = 0.17005


def branch_calls(graph: ir.Graph) -> None:
    """Give a quantized graph, adapted to its target, a second branch for many tokens, in place."""
    inputs = {value.name: value for value in graph.inputs}
    nodes, outputs = list(graph), list(graph.outputs)
    graph.outputs.clear()
    graph.remove(nodes)
    few = ir.Graph([], outputs, nodes=nodes, name="few")
    many = few.clone(allow_outer_scope_values=True)
    many.name = "many"
    _multiply_integers(graph, many)
    _attend_in_floats(graph, many, inputs)
    n_tokens = ir.node("Shape", [inputs[artefact.INPUT_IDS]], {"start": 1, "end": 2})  # (1): S
    limit = _numbers(graph, "few_tokens", [artefact.FEW_TOKENS])
    condition = ir.node("Greater", [n_tokens.outputs[0], limit])
    branches = {"then_branch": many, "else_branch": few}
    choice = ir.node("If", condition.outputs, branches, num_outputs=len(outputs))
    for value, result in zip(choice.outputs, outputs, strict=True):
        value.name, value.type, value.shape = result.name, result.type, result.shape
    for branch in (few, many):  # names are unique in a graph and those in it
        for i, value in enumerate(value for node in branch for value in node.outputs):
            value.name = f"{branch.name}.{i}"
    graph.extend([n_tokens, condition, choice])
    graph.outputs.extend(choice.outputs)


def _multiply_integers(graph: ir.Graph, branch: ir.Graph) -> None:
    """Products of codes, exact in 32 bits, in the place of those of blocks with a scale per row.

    Codes of activations are round(127 x / max|x|) + 128. After GELU, which is hardly negative, they
    are round(255 (x + GELU_SHIFT) / (max x + GELU_SHIFT)): half the step, and what the shift adds
    is taken off again. Measured: a quarter of the divergence.
    """
    last_axis = _numbers(graph, "last_axis", [-1])
    to_signed = initializer(graph, "to_signed", np.array(128, np.uint8))
    for node in list(branch):
        scales = None if node.op_type != "MatMulNBits" else _row_scales(node)
        if scales is None:
            continue
        x, blocks = node.inputs[:2]
        assert blocks is not None and blocks.name is not None
        n, k = node.attributes["N"].as_int(), node.attributes["K"].as_int()
        after_gelu = ".mlp.c_proj." in blocks.name
        nodes: list[ir.Node] = []
        # The blocks' codes are 128 above those of s8: the same bits but for the first.
        matrix = add(nodes, "BitwiseXor", blocks, to_signed)
        matrix = add(nodes, "Cast", matrix, to=ir.DataType.INT8)
        matrix = add(nodes, "Reshape", matrix, _numbers(graph, f"shape.{n}.{k}", [n, k]))
        if after_gelu:
            shift = initializer(graph, "gelu_shift", np.array(GELU_SHIFT, np.float32))
            step = initializer(graph, "gelu_step", np.array(1 / 255, np.float32))
            zero = initializer(graph, "gelu_zero", np.array(0, np.uint8))
            x = add(nodes, "Add", x, shift)  # not negative
            reach = add(nodes, "ReduceMax", x, last_axis, keepdims=1)  # (B, S, 1)
        else:
            step = initializer(graph, "row_step", np.array(1 / 127, np.float32))
            zero = initializer(graph, "row_zero", np.array(128, np.uint8))
            reach = add(nodes, "ReduceMax", add(nodes, "Abs", x), last_axis, keepdims=1)
        # In a row of zeros 0 / 0: whatever code that becomes, it is multiplied by the reach, 0.
        codes = add(nodes, "QuantizeLinear", add(nodes, "Div", x, reach), step, zero)
        codes = add(nodes, "Reshape", codes, _numbers(graph, f"rows.{k}", [-1, k]))  # (B * S, K)
        # One for each: where onnxruntime makes codes u8 for want of VNNI, it makes these u8 too,
        # and fails on the second node that reads them.
        name = blocks.name.removesuffix(".blocks")
        zeros = initializer(graph, f"{name}.zeros", np.zeros(n, np.int8))
        product = add(
            nodes,
            "QGemm",
            *(codes, step, zero, matrix, scales, zeros),
            domain="com.microsoft",
            transB=1,
        )
        shape = add(nodes, "Shape", reach, start=0, end=2)
        shape = add(nodes, "Concat", shape, _numbers(graph, f"width.{n}", [n]), axis=0)
        product = add(nodes, "Reshape", product, shape)  # (B, S, N)
        product = add(nodes, "Mul", product, reach)
        if after_gelu:
            restored = (array(blocks).reshape(n, k) - 128.0) * array(scales)[:, None]
            unshift = (-GELU_SHIFT * restored.sum(1)).astype(np.float32)
            add(nodes, "Add", product, initializer(graph, f"{name}.unshift", unshift))
        replace(branch, node, nodes)


def _row_scales(node: ir.Node) -> ir.Value | None:
    """The scales (N) of a product of blocks whose rows have one each; None for others."""
    assert node.inputs[2] is not None
    expand = node.inputs[2].producer()
    if expand is None or expand.op_type != "Expand":
        return None
    assert expand.inputs[0] is not None
    column = expand.inputs[0].producer()
    assert column is not None
    return column.inputs[0]


def _attend_in_floats(
    graph: ir.Graph, branch: ir.Graph, inputs: dict[str | None, ir.Value]
) -> None:
    """Attention over codes of keys and values that are made floats once.

    The scales of the keys multiply the queries, those of the values the result.
    """
    attentions = [node for node in branch if node.op_type == "GroupQueryAttention"]
    heads = attentions[0].attributes["num_heads"].as_int()
    width = array(attentions[0].inputs[12]).size
    by_head = _numbers(graph, "by_head", [0, 0, heads, width // heads])
    first, token_axis = _numbers(graph, "first", [0]), _numbers(graph, "token_axis", [2])
    step = initializer(graph, "code_step", np.array(1, np.float32))
    zero = initializer(graph, "code_zero", np.array(0, np.int8))
    nodes: list[ir.Node] = []
    places, n_past = _places(graph, nodes, inputs, heads)
    branch.insert_before(branch[0], nodes)
    for layer, node in enumerate(attentions):
        nodes = []
        key_scales, value_scales = node.inputs[12:14]
        present, new, past = [], [], []
        for i, part, scales in ((1, "key", key_scales), (2, "value", value_scales)):
            inverse = initializer(graph, f"cache.{layer}.{part}.inverse", 1 / array(scales))
            codes = add(nodes, "Mul", node.inputs[i], inverse)
            codes = add(nodes, "QuantizeLinear", codes, step, zero)  # (B, S, C)
            new.append(add(nodes, "Cast", codes, to=ir.DataType.FLOAT))
            codes = add(nodes, "Reshape", codes, by_head)  # (B, S, H, D)
            codes = add(nodes, "Transpose", codes, perm=[0, 2, 1, 3])  # (B, H, S, D)
            cache = node.inputs[i + 2]
            present.append(add(nodes, "ScatterND", cache, places, codes))
            valid = add(nodes, "Slice", cache, first, n_past, token_axis)
            past.append(add(nodes, "Cast", valid, to=ir.DataType.FLOAT))
        queries = add(nodes, "Mul", node.inputs[0], key_scales)
        attention = ir.node(
            node.op_type,
            [queries, *new, *past, *node.inputs[5:7]],
            {"num_heads": heads, "kv_num_heads": heads},
            domain=node.domain,
            num_outputs=3,
        )
        nodes.append(attention)
        attended = add(nodes, "Mul", attention.outputs[0], value_scales)
        results = [attended, *present]
        for value, before in zip(results, node.outputs, strict=True):
            value.type, value.shape = before.type, before.shape
        ir.convenience.replace_nodes_and_values(branch, node, [node], nodes, node.outputs, results)


def _places(
    graph: ir.Graph, nodes: list[ir.Node], inputs: dict[str | None, ir.Value], heads: int
) -> tuple[ir.Value, ir.Value]:
    """Where in the cache each token goes, int64 (B, H, S, 3), and how many are there, int64 (1)."""
    positions, total = inputs[artefact.POSITION_IDS], inputs[artefact.TOTAL_SEQ_LEN]
    one = _numbers(graph, "one", [1])
    head = _numbers(graph, "heads", np.arange(heads).reshape(1, heads, 1, 1))
    axes = _numbers(graph, "axes_1_2_3", [1, 2, 3]), _numbers(graph, "axes_1_3", [1, 3])
    zero, step = (_numbers(graph, f"scalar_{i}", i) for i in (0, 1))
    n_rows = add(nodes, "Shape", positions, start=0, end=1)
    n_tokens = add(nodes, "Shape", positions, start=1, end=2)
    n_heads = _numbers(graph, "n_heads", [heads])
    shape = add(nodes, "Concat", n_rows, n_heads, n_tokens, one, axis=0)
    row = add(nodes, "Range", zero, add(nodes, "Squeeze", n_rows), step)
    row = add(nodes, "Unsqueeze", row, axes[0])  # (B, 1, 1, 1)
    position = add(nodes, "Unsqueeze", positions, axes[1])  # (B, 1, S, 1)
    index = [add(nodes, "Expand", value, shape) for value in (row, head, position)]
    places = add(nodes, "Concat", *index, axis=3)
    return places, add(nodes, "Sub", add(nodes, "Cast", total, to=ir.DataType.INT64), n_tokens)


def _numbers(graph: ir.Graph, name: str, values: npt.ArrayLike) -> ir.Value:
    return initializer(graph, name, np.array(values, np.int64))
