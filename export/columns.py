"""fp32 graph -> int8 weights with one scale per output channel, activations quantized as they come.

Two spellings of the same arithmetic: `DynamicQuantizeMatMul` of onnxruntime, the only fast int8 in
WASM, and the standard operators that onnxruntime fuses into it. Knows nothing of models, text or
files. Try: `quantize_columns(trace_portable(model), standard=True)`.

One scale serves all activations of a call, so a token's result depends, within rounding, on the
tokens beside it, which the metadata of the file says (`targets.rows_are_independent`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from pico_edge.export.graph import array, drop_unused, initializer, replace

FloatArray = npt.NDArray[np.float32]

# Weights of 7 bits: x86 without VNNI adds two products of 8-bit numbers in 16 bits, which 255 * 127
# * 2 overflows and 255 * 64 * 2 does not.
LARGEST = 64


def quantize_columns(model: ir.Model, *, standard: bool) -> None:
    """Replace every matrix of a traced graph by an int8 one, in place; one token table stays.

    standard: operators of ONNX only. Raises ValueError for a graph that
    `pico_edge.export.trace` did not make.
    """
    graph = model.graph
    (head,) = (node for node in graph if node.op_type == "Gemm")
    table = head.inputs[1]
    assert table is not None
    gathers = [node for node in graph if node.op_type == "Gather" and node.inputs[0] is table]
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is not None and weight.is_initializer():
            _replace_matmul(graph, node, _weights(graph, weight, array(weight)), standard)
    weights = _weights(graph, table, array(table).T)  # (C, V), a scale per token
    _replace_matmul(graph, head, weights, standard)
    for node in gathers:
        _replace_gather(graph, node, *weights)
    drop_unused(graph)


def quantize_matrix(weight: FloatArray) -> tuple[npt.NDArray[np.int8], FloatArray]:
    """Round a matrix (K, N) to nearest: int8 (K, N) and scales (N), weight ~ codes * scales."""
    scales = np.abs(weight).max(axis=0) / LARGEST
    scales[scales == 0] = 1.0  # a column of zeros: any scale gives zeros back
    return np.rint(weight / scales).astype(np.int8), scales.astype(np.float32)


def _weights(graph: ir.Graph, value: ir.Value, weight: FloatArray) -> tuple[ir.Value, ir.Value]:
    codes, scales = quantize_matrix(weight)
    return (
        initializer(graph, f"{value.name}.codes", codes),
        initializer(graph, f"{value.name}.scales", scales),
    )


def _replace_matmul(
    graph: ir.Graph, node: ir.Node, weights: tuple[ir.Value, ir.Value], standard: bool
) -> None:
    x, (codes, scales) = node.inputs[0], weights
    if not standard:
        fast = ir.node("DynamicQuantizeMatMul", [x, codes, scales], domain="com.microsoft")
        replace(graph, node, [fast])
        return
    # onnxruntime fuses this very shape (DynamicQuantizeMatMulFusion).
    quantize = ir.node("DynamicQuantizeLinear", [x], num_outputs=3)
    rounded, scale, zero_point = quantize.outputs
    product = ir.node("MatMulInteger", [rounded, codes, zero_point])
    cast = ir.node("Cast", [product.outputs[0]], {"to": ir.DataType.FLOAT})
    both = ir.node("Mul", [scale, scales])  # (N)
    result = ir.node("Mul", [cast.outputs[0], both.outputs[0]])
    replace(graph, node, [quantize, product, cast, both, result])


def _replace_gather(graph: ir.Graph, node: ir.Node, codes: ir.Value, scales: ir.Value) -> None:
    """Read embeddings from the columns of the head's table (C, V)."""
    ids = node.inputs[1]
    columns = ir.node("Gather", [codes, ids], {"axis": 1})  # (C, B, S)
    rows = ir.node("Transpose", [columns.outputs[0]], {"perm": [1, 2, 0]})  # (B, S, C)
    cast = ir.node("Cast", [rows.outputs[0]], {"to": ir.DataType.FLOAT})
    last = initializer(graph, "last_axis", np.array([-1], np.int64))
    factor = ir.node("Gather", [scales, ids])  # (B, S)
    column = ir.node("Unsqueeze", [factor.outputs[0], last])
    result = ir.node("Mul", [cast.outputs[0], column.outputs[0]])
    replace(graph, node, [columns, rows, cast, factor, column, result])
